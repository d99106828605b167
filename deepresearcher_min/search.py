"""From a query to results (title, address, snippet): `search:` names who answers. At the end, what
in the segments of a page belongs to a question.

`local` and `toy` search a Corpus in memory; the others are services, asked through web.py, which
caches and retries. Left out: answer boxes and "people also ask", as in the paper; Bing, whose API
was retired in 2025; an index on disk: making one takes 0.2 s for a thousand passages, and whoever
has millions asks a `retriever`.
"""

import hashlib
import heapq
import html
import json
import os
import re
import threading
import time
import unicodedata
from collections import defaultdict, namedtuple
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote

import numpy as np

from deepresearcher_min.config import (
    BAD_REPLY,
    ConfigError,
    WebFailure,
    code_of,
    count,
    host_list,
    is_blocked,
    require_environment,
)

# Letters and digits, and the signs that belong to letters from Hindi to Khmer, which are no \w.
WORD = re.compile(
    r"[\w\u0900-\u0963\u0966-\u0eff\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17db-\u17ff]+"
)
# Scripts that put no space between words, or, as Korean, put endings to them.
UNSPACED = r"[\u0e00-\u11ff\u1780-\u17ff\u3005-\uffdc\U00020000-\U0003ffff]"
RUN = (
    r"""(?x) (  # in pairs
      [\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+  # Chinese
    | [\u3041-\u309f\u30fc]+ | [\u30a1-\u30ff\u31f0-\u31ff]+  # Hiragana, Katakana
    | [\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]+ )  # Korean
    | ( [\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+ )  # in triples: Thai, Lao, Myanmar, Khmer
    | [^\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\ud7a3"""
    r"""\uf900-\ufaff\U00020000-\U0003ffff]+ | ."""
)
# No space follows a sentence of Chinese, Japanese, Khmer or Myanmar; Thai and Lao have nothing but
# a space there.
ENDS = "。！？｡।॥។៕။"
SENTENCE_END = re.compile(rf"[{ENDS}]+[」』”’）]*|[\u0e00-\u0eff](?=\s+[\u0e00-\u0eff])")
# Where a segment ends best: at a paragraph's end, or else a line's, a sentence's, a word's.
BORDER = re.compile(rf"(?s).*\n(?=\n)|.*\n|.*(?:\.(?= )|[{ENDS}])|.* ")
# What a reader writes around its notes, and in place of them.
CONTINUE = r"(?i)\bcontinue\W{0,3}:\W{0,3}(?:(yes)|no)\b\W*"
NO_NOTES = r"(?i)^(?:\W*notes\W{0,4}:\W*)?(?:\W*(?:none|nothing)?\W*\Z)?"
NO_RESULTS = "no_results", "Nothing was found for this query."
TOO_MANY = "rate_limited", "Too many searches are under way at the moment."
SNIPPET_CHARS = 300
SOURCE = code_of(__file__)
SearchResult = namedtuple("SearchResult", "title url snippet")


def words(text):
    """The lower-case words of a text, in order.

    Where a script has no spaces, each two neighbouring signs (Chinese, Japanese, Korean) or three
    neighbouring letters (Thai, Lao, Myanmar, Khmer) are a word, and so is a shorter run:
    'iPad平板电脑' -> ipad 平板 板电 电脑.
    """
    text = text.casefold()
    if not re.search(UNSPACED, text):
        return WORD.findall(text)
    found = []
    for word in WORD.findall(unicodedata.normalize("NFKC", text)):
        for run in re.finditer(RUN, word):
            size = (len(word), 2, 3)[run.lastindex or 0]  # none, or one of the groups of RUN
            starts = range(max(1, len(run[0]) - size + 1))
            found += [run[0][start : start + size] for start in starts]
    return found


# Words without content: a query is to match by its names and nouns.
FUNCTION_WORDS = set(
    words("""a an and any are as at be been but by can could did do does for from had has have he
    her him his how i if in into is it its may me my of on or our she should so than that the their
    them then there these they this those to us was we were what when where which who whom whose why
    will with would you your
    什么 哪里 哪个 哪些 哪位 怎么 为什么 多少 是谁 是什么 在哪
    の は が を に で と も か な へ や です ですか ます でした ました ある いる する した して から
    まで とは どこ だれ いつ なに なぜ
    คือ คืออะไร อะไร ที่ไหน เมื่อไร เมื่อไหร่ ใคร เป็น ของ และ ที่""")
)


def content_words(text):
    """The lower-case words of a text without function words; all of its words where nothing else is
    there.
    """
    found = words(text)
    return [word for word in found if word not in FUNCTION_WORDS] or found


def read_passage(row):
    """(title, address, text) of a passage as this package, BEIR, Search-R1 or their servers write
    it.

    A text alone is `contents`, whose first line is the title (Search-R1). Without `url` the address
    is passage:ID, with a hash of the text as ID where there is none. Raises LookupError, TypeError
    or AttributeError without any text.
    """
    if isinstance(row, str):
        row = {"contents": row}
    title = row.get("title")
    text = row.get("text")
    name = row.get("id", row.get("_id"))
    if text is None:
        text = row["contents"]
        first, _, rest = text.partition("\n")
        first = first.strip('" ')
        if rest and title in (None, first):
            title = first
            text = rest
    title = str(title or "")
    text = str(text)
    if name is None:
        name = hashlib.sha256(f"{title}{text}".encode("utf-8", "replace")).hexdigest()[:12]
    return title, str(row.get("url") or f"passage:{name}"), text


class Corpus:
    """Documents (title, url, text) and a BM25 index; a result shows snippet(index of the document).

    `pages`: by url, the texts of all its documents, in their order.
    """

    def __init__(self, documents, snippet=None):
        if not documents:
            raise ConfigError("the corpus has no documents")
        import bm25s  # here, because importing it takes 0.7 s and a live run does not need it

        self.documents = documents
        self.snippet = snippet or self.beginning
        self.index = bm25s.BM25()
        indexed = []
        passages = defaultdict(list)
        for title, url, text in documents:
            indexed.append(words(f"{title}\n{text}"))
            passages[url].append(text)
        self.index.index(indexed, show_progress=False)
        self.pages = {url: "\n\n".join(texts) for url, texts in passages.items()}

    @classmethod
    def from_jsonl(cls, path: str | Path):
        """From lines that read_passage reads; ConfigError names a bad line."""
        documents = []
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                documents.append(read_passage(json.loads(line)))
                "".join(documents[-1]).encode()  # no tokenizer takes half of a two-part sign
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ConfigError(
                    f"corpus={str(path)!r}: line {number} is not title, url, text: {error!r}"
                ) from error
        return cls(documents)

    def beginning(self, index):
        """The first SNIPPET_CHARS of a text, up to the end of a word where it has words."""
        flat = " ".join(self.documents[index][2].split())
        short = shorten(flat, SNIPPET_CHARS, placeholder=" ...")
        if len(short) < min(len(flat), SNIPPET_CHARS // 2):
            return f"{flat[:SNIPPET_CHARS]} ..."
        return short

    def search(self, query, k: int):
        """The k best documents, best first, equal scores in corpus order; none that shares no word
        with the query.
        """
        wanted = list(dict.fromkeys(content_words(query)))
        scores = self.index.get_scores_from_ids(self.index.get_tokens_ids(wanted))
        found = np.flatnonzero(scores > 0)
        best = found[np.argsort(-scores[found], kind="stable")[:k]]
        rows = [(*self.documents[number][:2], self.snippet(number)) for number in best.tolist()]
        return [SearchResult(*row) for row in rows]


def live_search(config, web):
    """One of SERVICES as a function (query, counts) -> SearchResults that have addresses; asked by
    web.py, at this rank's share of `requests_per_second`."""
    service, base, key = SERVICES[config.search]
    base = (config.search_url or base).rstrip("/")
    headers = {"X-API-KEY": os.environ.get(key, "").strip()} if key else {}
    price = config.price_search if key else 0.0
    place = {"gl": config.search_country, "hl": config.search_language} if key else {}
    place = {name: value for name, value in place.items() if value}
    most = config.search_results
    lock, next_slot = threading.Lock(), 0.0

    def search(query, counts):
        query = one_line(query)
        deadline = time.monotonic() + config.tool_timeout

        def ask(path, payload=None):
            nonlocal next_slot
            with lock:  # a bucket of one token: a larger one would break the limit at once
                slot = max(next_slot, time.monotonic())
                if slot >= deadline:
                    raise WebFailure(*TOO_MANY)
                next_slot = slot + web.world_size / config.requests_per_second
            time.sleep(max(0.0, slot - time.monotonic()))
            if payload:
                payload = payload | place
            reply = web.fetch_json(f"{base}{path}", headers, payload, counts, deadline)
            count(counts, "usd", price)
            return reply

        def find():
            try:
                found = [[*map(one_line, row)] for row in service(query, most, ask)]
            except (LookupError, TypeError, AttributeError):
                raise WebFailure(*BAD_REPLY) from None
            kept = [row for row in found if row[1]]
            if not kept:
                raise WebFailure(*NO_RESULTS)
            return kept

        request = [config.search, base, query, most, *place.items()]
        rows = web.cached("search", request, find, counts, deadline, SOURCE)
        found = []
        for title, url, snippet in rows[:most]:
            if url.startswith("/"):
                url = f"{base}{url}"
            found.append(SearchResult(title, url, snippet))
        return found

    return search


def one_line(text):
    """Text without line breaks and without the half characters that JSON can bring; empty for what
    is no text.
    """
    return " ".join(str(text or "").encode("utf-8", "replace").decode().split())


# The services: ask(path, JSON to POST or nothing for a GET) gives the JSON of the reply; what is
# found are rows of title, url (or path of the service) and snippet: texts, or whatever was sent.


def serper(query, results, ask):
    """Google's results by serper.dev, as in the paper; without `organic` where there are none."""
    reply = ask("/search", {"q": query, "num": results})
    if "searchParameters" not in reply or "organic" in reply:
        for row in reply["organic"]:
            yield row.get("title"), row.get("link"), row.get("snippet")


def searxng(query, results, ask):
    """A SearXNG of your own; its settings must allow the format json."""
    reply = ask(f"/search?format=json&q={quote(query)}")
    for row in reply["results"]:
        yield row.get("title"), row.get("url"), row.get("content")


def wikipedia(query, results, ask):
    """Wikipedia's own search, which needs no key; `search_url` chooses another language or wiki."""
    api = "/w/api.php?action=query&list=search&format=json&formatversion=2"
    reply = ask(f"{api}&srlimit={results}&srsearch={quote(query)}")
    for row in reply["query"]["search"]:
        path = quote(row["title"].replace(" ", "_"), errors="replace")
        plain = re.sub("<[^>]*>", "", row.get("snippet") or "")  # matches come marked up
        yield row["title"], f"/wiki/{path}", html.unescape(plain)


def retriever(query, results, ask):
    """A server that speaks Search-R1's protocol; passages without an address cannot be browsed, so
    all is shown.
    """
    reply = ask("/retrieve", {"queries": [query], "topk": results, "return_scores": True})
    rows = reply["result"][0]
    found = []
    for row in rows:
        with suppress(LookupError, TypeError, AttributeError):  # a bad one costs only itself
            document = row.get("document", row) if isinstance(row, dict) else row
            found.append(read_passage(document))
    if not isinstance(rows, list) or (rows and not found):
        raise LookupError
    return found


# How to ask; the URL of the public one, which `search_url` replaces; the variable that holds the
# key of a paid one.
SERVICES = {
    "serper": (serper, "https://google.serper.dev", "SERPER_API_KEY"),
    "searxng": (searxng, "", ""),
    "wikipedia": (wikipedia, "https://en.wikipedia.org", ""),
    "retriever": (retriever, "", ""),
}


def check_search(config):
    """Raise ConfigError for what the chosen backend and reader lack, before anything is loaded."""
    name = config.search
    replay = config.cassette_mode == "replay"
    if config.reader == "openai":
        if not (config.reader_url and config.reader_model):
            raise ConfigError("reader='openai': needs reader_url and reader_model")
        if not replay:
            require_environment(
                "READER_API_KEY", "reader: openai sends it (any word, if the server asks for none)"
            )
    if name == "local" and not Path(config.corpus).is_file():
        raise ConfigError(
            f"corpus={config.corpus!r}: search: local needs a corpus.jsonl (title, url, text)"
        )
    if name not in SERVICES or replay:
        return  # a recording needs neither key nor server
    _, base, key = SERVICES[name]
    if key:
        require_environment(key, f"search: {name} asks for it; search: wikipedia needs no key")
    if not re.match("https?://", config.search_url or base):
        raise ConfigError(
            f"search_url={config.search_url!r}: search: {name} needs its base URL (http...)"
        )


def make_search(config, web, corpus):
    """What `search:` names, as a function (query, counts) -> SearchResults: local and toy need a
    corpus, all others a Web, and that check_search finds nothing.

    Results at `blocked_hosts` are dropped from what it finds, and so from what a cassette holds,
    too.
    """
    live = live_search(config, web) if config.search in SERVICES else None
    blocked = host_list(config)

    def search(query, counts):
        found = live(query, counts) if live else corpus.search(query, config.search_results)
        kept = [one for one in found if not is_blocked(one.url, blocked)]
        if kept != found:
            count(counts, "blocked", len(found) - len(kept))
        if not kept:
            raise WebFailure(*NO_RESULTS)
        return kept

    return search


# --- inside a page


def segments(text, max_chars):
    """Cut a text into pieces of at most `max_chars`, at the best border in the second half."""
    pieces = []
    start = 0
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            border = BORDER.match(text, start + max_chars // 2, end)
            if border:
                end = border.end()
        piece = text[start:end].strip()
        if piece:
            pieces.append(piece)
        start = end
    return pieces


def extract(question: str, segment: str) -> str:
    """What the reader without a model notes: the ten sentences with most words of the question."""
    wanted = set(content_words(question))
    text = SENTENCE_END.sub(r"\g<0>\n", segment)
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    shared = [len(wanted.intersection(content_words(sentence))) for sentence in sentences]
    best = heapq.nlargest(10, range(len(sentences)), key=shared.__getitem__)
    return " ".join(sentences[place].strip() for place in sorted(best) if shared[place])


def parse_notes(reply):
    """(notes, whether to read on) of a reply; one in no format is all notes, and ends the page."""
    reply = reply.rpartition("</think>")[2]
    further = re.search(CONTINUE, reply)
    notes = re.sub(NO_NOTES, "", re.sub(CONTINUE, "", reply, count=1)).strip()
    return notes, bool(further and further[1])
