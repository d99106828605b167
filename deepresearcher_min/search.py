"""From a query to results (title, address, snippet): one small class for each backend, chosen by `search:`.

rollout.py asks the backend for each query of a call. `local` and `toy` search a Corpus in memory and touch no
network; the others ask a service through web.py, which caches, retries and records. Left out: answer boxes and
"people also ask", as in the paper; Bing, whose API was retired in 2025.
"""

import hashlib
import html
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import numpy as np

from deepresearcher_min.config import Config, ConfigError, require_environment
from deepresearcher_min.web import Web, WebFailure, count

WORD = re.compile(r"\w+")
# Words that carry no content, so that a query matches by its names and nouns.
FUNCTION_WORDS = frozenset(
    WORD.findall(
        "a an and any are as at be been but by can could did do does for from had has have he her him his how i if in "
        "into is it its may me my of on or our she should so than that the their them then there these they this those "
        "to us was we were what when where which who whom whose why will with would you your"
    )
)
NO_RESULTS = ("no_results", "Nothing was found for this query.")
SNIPPET_CHARS = 300
INDEX_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepresearcher_min"


@dataclass(frozen=True)
class SearchResult:
    """One line of a result page."""

    title: str
    url: str
    snippet: str


class Backend(Protocol):
    """Anything that answers a query; counts `searches`, and raises WebFailure where there is nothing to return."""

    def search(self, query: str, counts: Counter) -> list[SearchResult]: ...


def content_words(text: str) -> list[str]:
    """The lower-case words of a text without function words; all of its words where nothing else is there."""
    words = WORD.findall(text.casefold())
    return [word for word in words if word not in FUNCTION_WORDS] or words


class Corpus:
    """Documents (title, url, text) with a BM25 index over title and text; pages by address.

    `snippet(document_index)` gives the snippet of a result; by default the beginning of the text.
    """

    def __init__(
        self,
        documents: Sequence[tuple[str, str, str]],
        snippet: Callable[[int], str] | None = None,
        index_folder: Path | None = None,
    ) -> None:
        if not documents:
            raise ConfigError("the corpus has no documents")
        import bm25s  # here, because importing it takes 0.7 s and a live run does not need it

        self.documents = list(documents)
        self.snippet = snippet or (lambda index: shorten(self.documents[index][2], SNIPPET_CHARS, placeholder=" ..."))
        self.pages = {url: text for _, url, text in self.documents}
        if index_folder is not None and index_folder.is_dir():
            self.index = bm25s.BM25.load(index_folder)
        else:
            self.index = bm25s.BM25()
            words = [WORD.findall(f"{title}\n{text}".casefold()) for title, _, text in self.documents]
            self.index.index(words, show_progress=False)
            if index_folder is not None:
                save_index(self.index, index_folder)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Corpus":
        """Read lines of {"title", "url", "text"}; the index is built once and kept under ~/.cache, by content.

        Raises ConfigError, with file and line, for a line that cannot be used.
        """
        content, documents = Path(path).read_bytes(), []
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                documents.append((str(row["title"]), str(row["url"]), str(row["text"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"corpus={path}: line {number} is not title, url, text: {error!r}") from error
        return cls(documents, index_folder=INDEX_CACHE / f"bm25-{hashlib.sha256(content).hexdigest()[:24]}")

    def search(self, query: str, k: int) -> list[SearchResult]:
        """The k best documents, best first, equal scores in corpus order; none that shares no word with the query."""
        words = list(dict.fromkeys(content_words(query)))
        scores = self.index.get_scores_from_ids(self.index.get_tokens_ids(words))
        found = np.flatnonzero(scores > 0)
        best = found[np.argsort(-scores[found], kind="stable")[:k]]
        return [SearchResult(self.documents[i][0], self.documents[i][1], self.snippet(i)) for i in best.tolist()]

    def page(self, url: str) -> str | None:
        """The text behind an address of the corpus, None for any other address."""
        return self.pages.get(url)


def save_index(index: object, folder: Path) -> None:
    """Write beside the target and rename, so that no other rank ever reads half an index."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    index.save(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another rank was first
        shutil.rmtree(unfinished)


class LocalSearch:
    """BM25 over a corpus in memory: `search: local` and `search: toy`."""

    def __init__(self, corpus: Corpus, results: int) -> None:
        self.corpus = corpus
        self.results = results

    def search(self, query: str, counts: Counter) -> list[SearchResult]:
        count(counts, "searches")
        found = self.corpus.search(query, self.results)
        if not found:
            count(counts, "fail_no_results")
            raise WebFailure(*NO_RESULTS)
        return found


class LiveSearch:
    """A search service over HTTP. A subclass adds two methods:

    request(query) -> (URL, headers, JSON payload or None for a GET); no key may stand in URL or payload.
    read(reply) -> results; LookupError, TypeError or AttributeError if the reply is not what the service promises.
    """

    service = ""  # default base URL; `search_url` replaces it
    priced = False

    def __init__(self, config: Config, web: Web) -> None:
        self.config, self.web = config, web
        self.base = (config.search_url or self.service).rstrip("/")
        self.lock, self.next_slot = threading.Lock(), 0.0
        self.interval = web.world_size / config.requests_per_second  # between two requests of this rank [s]

    def search(self, query: str, counts: Counter) -> list[SearchResult]:
        """Ask once, whoever asks; results without an address are left out. Raises WebFailure."""
        count(counts, "searches")
        deadline = time.monotonic() + self.config.tool_timeout
        url, headers, payload = self.request(clean(query))

        def ask() -> list[list[str]]:
            self.wait_for_slot(deadline)
            reply = self.web.fetch_json(url, headers, payload, counts, deadline)
            count(counts, "usd", self.config.price_search if self.priced else 0.0)
            try:
                rows = [[r.title, r.url, r.snippet] for r in self.read(reply) if r.url]
            except (LookupError, TypeError, AttributeError):
                raise WebFailure("bad_reply", "The search service sent a reply that cannot be read.") from None
            if not rows:
                raise WebFailure(*NO_RESULTS)
            return rows

        try:
            rows = self.web.cached("search", [type(self).__name__, url, payload], ask, counts, deadline)
        except WebFailure as failure:
            count(counts, f"fail_{failure.kind}")
            raise
        return [SearchResult(*row) for row in rows][: self.config.search_results]

    def wait_for_slot(self, deadline: float) -> None:
        """A token bucket that holds one token: a larger one would break the service's limit in its first second."""
        with self.lock:
            slot = max(self.next_slot, time.monotonic())
            if slot >= deadline:
                raise WebFailure("rate_limited", "Too many searches are under way at the moment.")
            self.next_slot = slot + self.interval
        time.sleep(max(0.0, slot - time.monotonic()))


class Serper(LiveSearch):
    """Google's results by serper.dev, as in the paper; the key comes from SERPER_API_KEY."""

    service = "https://google.serper.dev"
    priced = True

    def request(self, query: str) -> tuple[str, dict[str, str], Any]:
        key = os.environ.get("SERPER_API_KEY", "").strip()
        return f"{self.base}/search", {"X-API-KEY": key}, {"q": query, "num": self.config.search_results}

    def read(self, reply: Any) -> list[SearchResult]:
        found = reply.get("organic", []) if "searchParameters" in reply else reply["organic"]
        return [SearchResult(text(row, "title"), text(row, "link"), text(row, "snippet")) for row in found]


class Searxng(LiveSearch):
    """A SearXNG of your own; its settings must allow the format json."""

    def request(self, query: str) -> tuple[str, dict[str, str], Any]:
        return f"{self.base}/search?" + urlencode({"q": query, "format": "json"}), {}, None

    def read(self, reply: Any) -> list[SearchResult]:
        return [SearchResult(text(r, "title"), text(r, "url"), text(r, "content")) for r in reply["results"]]


class Wikipedia(LiveSearch):
    """The search of Wikipedia, which needs no key; `search_url` chooses another language or wiki."""

    service = "https://en.wikipedia.org"

    def request(self, query: str) -> tuple[str, dict[str, str], Any]:
        what = {"action": "query", "list": "search", "srsearch": query, "srlimit": self.config.search_results}
        return f"{self.base}/w/api.php?" + urlencode({**what, "format": "json", "formatversion": 2}), {}, None

    def read(self, reply: Any) -> list[SearchResult]:
        def result(row: Any) -> SearchResult:
            snippet = html.unescape(re.sub("<[^>]*>", "", text(row, "snippet")))  # matches come marked up
            title = text(row, "title")
            return SearchResult(title, f"{self.base}/wiki/{quote(title.replace(' ', '_'))}", snippet)

        return [result(row) for row in reply["query"]["search"]]


class Retriever(LiveSearch):
    """A server that speaks Search-R1's protocol; passages without an address cannot be browsed, so all is shown."""

    def request(self, query: str) -> tuple[str, dict[str, str], Any]:
        payload = {"queries": [query], "topk": self.config.search_results, "return_scores": True}
        return f"{self.base}/retrieve", {}, payload

    def read(self, reply: Any) -> list[SearchResult]:
        def result(found: Any) -> SearchResult:
            title, _, passage = found["contents"].partition("\n")
            return SearchResult(
                clean(title.strip('" ')), text(found, "url") or f"passage:{found['id']}", clean(passage)
            )

        return [result(row["document"]) for row in reply["result"][0]]


def clean(text: str) -> str:
    """The text on one line, without the lone surrogates that JSON can bring and UTF-8 cannot carry."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def text(row: Any, key: str) -> str:
    """The text under a key of a result, empty where there is none."""
    value = row.get(key)
    return clean(value) if isinstance(value, str) else ""


LIVE = {"serper": Serper, "searxng": Searxng, "wikipedia": Wikipedia, "retriever": Retriever}


def check_search(config: Config) -> None:
    """Raise ConfigError for what the chosen backend lacks, before anything is loaded."""
    if config.search == "local" and not Path(config.corpus).is_file():
        raise ConfigError(f"corpus={config.corpus!r}: search: local needs a corpus.jsonl (title, url, text)")
    if config.cassette_mode == "replay":
        return  # a recording needs neither key nor server
    if config.search == "serper":
        require_environment("SERPER_API_KEY", "search: serper asks serper.dev; search: wikipedia needs no key")
    if config.search in ("searxng", "retriever") and not config.search_url.startswith(("http://", "https://")):
        raise ConfigError(f"search_url={config.search_url!r}: search: {config.search} needs its base URL (http...)")


def make_search(config: Config, web: Web | None, corpus: Corpus | None) -> Backend:
    """The backend that `search:` names: local and toy need a corpus, all others a Web."""
    check_search(config)
    if config.search in LIVE and web is not None:
        return LIVE[config.search](config, web)
    if config.search not in LIVE and corpus is not None:
        return LocalSearch(corpus, config.search_results)
    raise ConfigError(f"search={config.search!r} needs {'the web' if config.search in LIVE else 'a corpus'}")
