"""From a query to results (title, address, snippet): `search:` names who answers.

`local` and `toy` search a Corpus in memory; the others are services, asked through web.py, which caches and retries.
Left out: answer boxes and "people also ask", as in the paper; Bing, whose API was retired in 2025.
"""

import hashlib
import html
import json
import os
import re
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np

from deepresearcher_min.config import Config, ConfigError, host_list, require_environment
from deepresearcher_min.web import BAD_REPLY, Web, WebFailure, count, is_blocked

WORD = re.compile(r"\w+")
FUNCTION_WORDS = set(  # words without content: a query is to match by its names and nouns
    WORD.findall("""a an and any are as at be been but by can could did do does for from had has have
    he her him his how i if in into is it its may me my of on or our she should so than that the their them then there
    these they this those to us was we were what when where which who whom whose why will with would you your""")
)
NO_RESULTS = ("no_results", "Nothing was found for this query.")
SNIPPET_CHARS = 300
INDEX_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepresearcher_min"
SearchResult = namedtuple("SearchResult", ["title", "url", "snippet"])
Ask = Callable[..., Any]  # ask(path, JSON to POST or nothing for a GET) -> JSON of the service
Rows = Iterable[tuple[Any, Any, Any]]  # title, url (or path of the service), snippet: texts, or whatever was sent


def content_words(text: str) -> list[str]:
    """The lower-case words of a text without function words; all of its words where nothing else is there."""
    words = WORD.findall(text.casefold())
    return [word for word in words if word not in FUNCTION_WORDS] or words


class Corpus:
    """Documents (title, url, text), their `pages`, and a BM25 index; a result shows snippet(index of the document)."""

    def __init__(self, documents: Sequence, snippet: Callable[[int], str] | None = None, folder: Path | None = None):
        if not documents:
            raise ConfigError("the corpus has no documents")
        import bm25s  # here, because importing it takes 0.7 s and a live run does not need it

        self.documents, self.pages = documents, {url: text for _, url, text in documents}
        self.snippet = snippet or (lambda index: shorten(documents[index][2], SNIPPET_CHARS, placeholder=" ..."))
        if folder is not None and folder.is_dir():
            self.index = bm25s.BM25.load(folder)
            return
        self.index = bm25s.BM25()
        words = [WORD.findall(f"{title}\n{text}".casefold()) for title, _, text in documents]
        self.index.index(words, show_progress=False)
        if folder is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError), TemporaryDirectory(dir=folder.parent) as unfinished:  # another rank was first
                self.index.save(unfinished)
                os.rename(unfinished, folder)  # at once: nobody ever reads half an index

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Corpus":
        """From lines of {"title", "url", "text"}, with its index under ~/.cache; ConfigError names a bad line."""
        content, documents = Path(path).read_bytes(), []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                if line.strip():
                    row = json.loads(line)
                    documents.append((str(row["title"]), str(row["url"]), str(row["text"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"corpus={path}: line {number} is not title, url, text: {error!r}") from error
        return cls(documents, folder=INDEX_CACHE / f"bm25-{hashlib.sha256(content).hexdigest()[:24]}")

    def search(self, query: str, k: int) -> list[SearchResult]:
        """The k best documents, best first, equal scores in corpus order; none that shares no word with the query."""
        words = list(dict.fromkeys(content_words(query)))
        scores = self.index.get_scores_from_ids(self.index.get_tokens_ids(words))
        found = np.flatnonzero(scores > 0)
        best = found[np.argsort(-scores[found], kind="stable")[:k]]
        return [SearchResult(self.documents[i][0], self.documents[i][1], self.snippet(i)) for i in best.tolist()]


class LiveSearch:
    """One of the SERVICES, asked through web.py at this rank's share of `requests_per_second`."""

    def __init__(self, config: Config, web: Web) -> None:
        self.config, self.web = config, web
        self.service, base, key = SERVICES[config.search]
        self.base, self.price = (config.search_url or base).rstrip("/"), config.price_search if key else 0.0
        self.headers = {"X-API-KEY": os.environ.get(key, "").strip()} if key else {}
        self.lock, self.next_slot = threading.Lock(), 0.0

    def search(self, query: str, counts: Counter) -> list[SearchResult]:
        """Ask once, whoever asks; results without an address are left out. Raises WebFailure."""
        query, results = one_line(query), self.config.search_results
        deadline = time.monotonic() + self.config.tool_timeout

        def ask(path: str, payload: Any = None) -> Any:
            with self.lock:  # a bucket of one token: a larger one would break the service's limit in its first second
                slot = max(self.next_slot, time.monotonic())
                if slot >= deadline:
                    raise WebFailure("rate_limited", "Too many searches are under way at the moment.")
                self.next_slot = slot + self.web.world_size / self.config.requests_per_second
            time.sleep(max(0.0, slot - time.monotonic()))
            reply = self.web.fetch_json(self.base + path, self.headers, payload, counts, deadline)
            count(counts, "usd", self.price)
            return reply

        def find() -> list[list[str]]:
            try:
                found = [[one_line(text) for text in row] for row in self.service(query, results, ask)]
            except (LookupError, TypeError, AttributeError):
                raise WebFailure(*BAD_REPLY) from None
            if not (rows := [row for row in found if row[1]]):
                raise WebFailure(*NO_RESULTS)
            return rows

        rows = self.web.cached("search", [self.config.search, self.base, query, results], find, counts, deadline)
        found = [SearchResult(*row) for row in rows[:results]]
        return [one._replace(url=self.base + one.url) if one.url[0] == "/" else one for one in found]


def one_line(text: Any) -> str:
    """Text without line breaks and without the half characters that JSON can bring; empty for what is no text."""
    return " ".join(text.encode("utf-8", "replace").decode().split()) if isinstance(text, str) else ""


def serper(query: str, results: int, ask: Ask) -> Rows:
    """Google's results by serper.dev, as in the paper."""
    reply = ask("/search", {"q": query, "num": results})
    found = reply.get("organic", []) if "searchParameters" in reply else reply["organic"]
    return [(row.get("title"), row.get("link"), row.get("snippet")) for row in found]


def searxng(query: str, results: int, ask: Ask) -> Rows:
    """A SearXNG of your own; its settings must allow the format json."""
    found = ask("/search?" + urlencode({"q": query, "format": "json"}))["results"]
    return [(row.get("title"), row.get("url"), row.get("content")) for row in found]


def wikipedia(query: str, results: int, ask: Ask) -> Rows:
    """The search of Wikipedia, which needs no key; `search_url` chooses another language or wiki."""
    wanted = urlencode({"srsearch": query, "srlimit": results})
    reply = ask(f"/w/api.php?action=query&list=search&format=json&formatversion=2&{wanted}")
    for row in reply["query"]["search"]:
        snippet = html.unescape(re.sub("<[^>]*>", "", row["snippet"]))  # matches come marked up
        yield row["title"], "/wiki/" + quote(row["title"].replace(" ", "_"), errors="replace"), snippet


def retriever(query: str, results: int, ask: Ask) -> Rows:
    """A server that speaks Search-R1's protocol; passages without an address cannot be browsed, so all is shown."""
    reply = ask("/retrieve", {"queries": [query], "topk": results, "return_scores": True})
    for document in (row["document"] for row in reply["result"][0]):
        title, _, passage = document["contents"].partition("\n")
        yield title.strip('" '), document.get("url") or f"passage:{document['id']}", passage


# How to ask; the URL of the public one, which `search_url` replaces; the variable that holds the key of a paid one.
SERVICES: dict[str, tuple[Callable[[str, int, Ask], Rows], str, str]] = {
    "serper": (serper, "https://google.serper.dev", "SERPER_API_KEY"),
    "searxng": (searxng, "", ""),
    "wikipedia": (wikipedia, "https://en.wikipedia.org", ""),
    "retriever": (retriever, "", ""),
}


def check_search(config: Config) -> None:
    """Raise ConfigError for what the chosen backend lacks, before anything is loaded."""
    if config.search == "local" and not Path(config.corpus).is_file():
        raise ConfigError(f"corpus={config.corpus!r}: search: local needs a corpus.jsonl (title, url, text)")
    if config.search in SERVICES and config.cassette_mode != "replay":  # a recording needs neither key nor server
        _, base, key = SERVICES[config.search]
        if key:
            require_environment(key, f"search: {config.search} asks for it; search: wikipedia needs no key")
        if not (config.search_url or base).startswith(("http://", "https://")):
            raise ConfigError(f"search_url={config.search_url!r}: search: {config.search} needs its base URL (http...)")


def make_search(config: Config, web: Web | None, corpus: Corpus | None) -> Callable[[str, Counter], list[SearchResult]]:
    """What `search:` names: local and toy need a corpus, all others a Web, and that check_search finds nothing.

    Results at `blocked_hosts` are dropped from what it finds, and so from what a cassette holds, too.
    """
    source: Any = corpus
    if config.search in SERVICES and web is not None:
        source = LiveSearch(config, web)
    if source is None:
        raise ConfigError(f"search={config.search!r} needs a corpus")
    blocked = host_list(config)

    def search(query: str, counts: Counter) -> list[SearchResult]:
        found = source.search(query, config.search_results if source is corpus else counts)
        kept = [one for one in found if not is_blocked(one.url, blocked)]
        if len(kept) < len(found):
            count(counts, "blocked", len(found) - len(kept))
        if not kept:
            raise WebFailure(*NO_RESULTS)
        return kept

    return search
