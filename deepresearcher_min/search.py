"""Who is asked: for results (title, address, snippet), as `search:` names it; and language models
at an endpoint, the reader of pages and the judge of answers. Last, the file of the official test
set.

`local` and `toy` search a Corpus in memory; all others are services of the operator, asked through
web.py, which caches and retries. Left out: answer boxes and "people also ask", as in the paper;
Bing, whose API was retired in 2025.
"""

import hashlib
import html
import os
import re
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from deepresearcher_min import corpus
from deepresearcher_min.config import (
    ROOT,
    ConfigError,
    WebFailure,
    code_of,
    count,
    host_list,
    is_blocked,
    named,
    replace_file,
    require_environment,
)
from deepresearcher_min.corpus import Corpus, SearchResult, read_passage
from deepresearcher_min.web import Web

SOURCE = code_of(__file__) + code_of(corpus.__file__)  # what made recorded results
# What a reader writes around its notes, and in place of them.
CONTINUE = r"(?i)\bcontinue\W{0,3}:\W{0,3}(?:(yes)|no)\b\W*"
NO_NOTES = r"(?i)^(?:\W*notes\W{0,4}:\W*)?(?:\W*(?:none|nothing)?\W*\Z)?"
# In a judge_prompt_file, as in the official prompt.
JUDGE_FIELDS = re.compile(r"\{(question|gt_answer|pred_answer)\}")


def live_search(config, web):
    """One of SERVICES as a function (query, counts) -> SearchResults that have addresses; asked by
    web.py, at this rank's share of `requests_per_second`."""
    service, base, key = SERVICES[config.search]
    base = (config.search_url or base).rstrip("/")
    headers = {"X-API-KEY": os.environ.get(key, "").strip()} if key else {}
    place = {"gl": config.search_country, "hl": config.search_language}
    place = {name: value for name, value in place.items() if key and value}
    most = config.search_results
    lock, next_slot = threading.Lock(), 0.0

    def search(query, counts):
        query = one_line(query)
        deadline = time.monotonic() + config.tool_timeout

        def ask(path, payload=None):
            nonlocal next_slot
            with lock:  # a bucket of one token: a larger one would break the limit at once
                now = time.monotonic()
                slot = max(next_slot, now)
                if slot >= deadline:
                    raise WebFailure(
                        "rate_limited", "Too many searches are under way at the moment."
                    )
                next_slot = slot + web.world_size / config.requests_per_second
            time.sleep(slot - now)
            payload = payload and payload | place
            reply = web.fetch_json(f"{base}{path}", headers, payload, counts, deadline)
            if key:
                count(counts, "usd", config.price_search)
            return reply

        def find():
            try:
                found = [[*map(one_line, row)] for row in service(query, most, ask)]
            except (LookupError, TypeError, AttributeError):
                raise WebFailure("bad_reply") from None
            kept = [row for row in found if row[1]]
            if not kept:
                raise WebFailure("no_results")
            return kept

        request = [config.search, base, query, most, *place.items()]
        rows = web.cached("search", request, find, counts, deadline, SOURCE)
        return [
            SearchResult(title, f"{base}{url}" if url.startswith("/") else url, snippet)
            for title, url, snippet in rows[:most]
        ]

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
    # No results: its parameters without `organic`. Else `organic` is missed: a bad reply.
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
    reply = ask(
        "/w/api.php?action=query&list=search&format=json&formatversion=2"
        f"&srlimit={results}&srsearch={quote(query)}"
    )
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
        with suppress(Exception):  # a bad one costs only itself
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


def make_search(config, web, corpus: Corpus):
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
            raise WebFailure("no_results")
        return kept

    return search


# --- models at an endpoint: the reader of pages, and the judge of answers (MBE)

# by endpoint and model: the names of parameters that it refuses
LEFT_OUT = {}
# what a message that refuses a parameter calls it
PARAMETER = (
    r"(?i)\b(?:(?P<temperature>temperature)|(?P<max_tokens>max[_ ]?tokens)"
    r"|(?P<max_completion_tokens>max_completion_tokens))\b"
)


def ask_model(web, url, key, payload, counts, deadline):
    """(text, tokens) of a chat completion; ("", 0) without text. `web` is a web.Web.

    `key`: the environment variable of the key. Parameters that the endpoint refuses by name are
    left out, max_tokens only after it was tried by its newer name.
    """
    headers = {"Authorization": f"Bearer {os.environ.get(key, '').strip()}"}
    known = LEFT_OUT.setdefault((url, payload["model"]), [])
    refused = list(known)
    while True:
        sent = dict(payload)
        for name in refused:
            value = sent.pop(name, None)
            if name == "max_tokens" and value:
                sent["max_completion_tokens"] = value
        try:
            reply = web.fetch_json(url, headers, sent, counts, deadline)
            text = reply["choices"][0]["message"].get("content")
            break
        except WebFailure as failure:
            said = failure.said
            # A context that is too long names max_tokens, too, but refuses no parameter.
            told = [one.lastgroup for one in re.finditer(PARAMETER, said) if one.lastgroup in sent]
            if not told or failure.kind not in ("http_400", "http_422") or "context length" in said:
                raise
            refused.append(told[0])
        except (LookupError, TypeError, AttributeError):
            raise WebFailure("bad_reply") from None
    if refused != known:
        known[:] = refused
        if web.rank == 0:
            print(
                f"{url} refuses {', '.join(refused)}, and is asked without: {said}", file=sys.stderr
            )
    if not isinstance(text, str):
        return "", 0
    with suppress(LookupError, TypeError):
        return text, reply["usage"]["total_tokens"] + 0  # TypeError for what is no number
    return text, len(f"{payload['messages']}{text}") // 4  # an estimate


def ask_service(role, config, web, messages, read, unread, counts, deadline):
    """read(the text of a reply) of the reader or the judge, through the cassette.

    `read` gives None or "" for what it cannot read: the third such reply is a WebFailure of the
    kind `unread`.
    """
    keys = vars(config)
    url = f"{keys[f'{role}_url'].rstrip('/')}/chat/completions"
    payload = {
        "model": keys[f"{role}_model"],
        "messages": messages,
        "temperature": keys[f"{role}_temperature"],
    }
    if role == "reader" and config.reader_tokens:
        payload["max_tokens"] = config.reader_tokens

    def ask():
        for _ in range(3):
            text, tokens = ask_model(web, url, f"{role.upper()}_API_KEY", payload, counts, deadline)
            count(counts, f"{role}_tokens", tokens)
            count(counts, "usd", tokens * keys[f"price_{role}_token"])
            found = read(text)
            if found not in (None, ""):
                return found
        raise WebFailure(unread)

    return web.cached(role, [url, payload], ask, counts, deadline)


def parse_notes(reply):
    """(notes, whether to read on) of a reply; one in no format is all notes, and ends the page."""
    reply = reply.rpartition("</think>")[2]
    further = re.search(CONTINUE, reply)
    notes = re.sub(NO_NOTES, "", re.sub(CONTINUE, "", reply, count=1)).strip()
    return notes, bool(further and further[1])


def judge_rules(config):
    """The text of judge_prompt_file, or ours; ConfigError where it cannot be used."""
    with named("judge_prompt_file", config.judge_prompt_file):
        rules = Path(config.judge_prompt_file or ROOT / "prompts/judge.txt").read_text("utf-8")
        if len(set(JUDGE_FIELDS.findall(rules))) in (1, 2):
            raise ValueError(
                "must hold all of {question}, {gt_answer} and {pred_answer}, or none of them"
            )
    return rules


def parse_verdict(reply):
    """1.0 or 0.0 by {"judgement": word} in the reply, the official form, or else by a word alone on
    its last line; None without either.
    """
    reply = reply.rpartition("</think>")[2].strip()
    told = re.findall(r'"judgement"\s*:\s*"(.*?)"', reply) or reply.splitlines()[-1:]
    verdict = re.fullmatch(r"(?i)\W*(IN)?CORRECT\W*", "\n".join(told))
    return verdict and float(not verdict[1])


# --- the official test set

# The revision is the one at which a public copy of the official repository has the file; never
# fetched by us. What decides is the checksum, that of the published file, 3,197 questions.
OFFICIAL = "https://raw.githubusercontent.com/GAIR-NLP/DeepResearcher"
TEST_SET_URL = f"{OFFICIAL}/b576f0cc08e1ca39027f29a56a99548b743bfd3b/data/test.parquet"
TEST_SET_SHA256 = "30c21c7da1872af08d7db1aacb5f45a57d0a7f038dd7f7baed51231bf6c5e10e"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepresearcher_min"


def test_set(config):
    """The official test set, fetched once and kept under ~/.cache; ConfigError if it cannot be."""
    path = CACHE / f"test-{TEST_SET_SHA256[:12]}.parquet"
    body = path.read_bytes() if os.path.isfile(path) else b""
    if hashlib.sha256(body).hexdigest() != TEST_SET_SHA256:
        with closing(Web(replace(config, cassette_mode="live"), ":memory:")) as web:
            try:
                body, _ = web.fetch(TEST_SET_URL, Counter(), time.monotonic() + 120, own=True)
            except WebFailure as failure:
                raise ConfigError(
                    f"the official test set: {failure.words} ({TEST_SET_URL}) Or name --data=FILE"
                ) from None
        found = hashlib.sha256(body).hexdigest()
        if found != TEST_SET_SHA256:
            raise ConfigError(
                f"{TEST_SET_URL} sent another file: sha256 {found}, not {TEST_SET_SHA256}"
            )
        replace_file(path, body)
    return str(path)
