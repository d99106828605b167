"""From a query to results: title, address, snippet. One class for each backend, chosen by `search:`."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from deepresearcher_min.config import Config, ConfigError
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


def shorten(text: str, limit: int = SNIPPET_CHARS) -> str:
    """The text on one line, cut at a word's end after at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit].rsplit(" ", 1)[0] + " ..."


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
        self.snippet = snippet or (lambda index: shorten(self.documents[index][2]))
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
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"corpus={str(path)!r} cannot be read: {error.strerror}") from error
        documents = []
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
        if not words:
            return []
        scores = self.index.get_scores(words)
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
            raise fail(counts, "no_results", "Nothing was found for this query.")
        return found


def fail(counts: Counter, kind: str, words: str) -> WebFailure:
    """Count a failure and return it, to be raised."""
    count(counts, f"fail_{kind}")
    return WebFailure(kind, words)


def check_search(config: Config) -> None:
    """Raise ConfigError for anything that the chosen backend lacks, before a model is loaded."""
    if config.search == "local" and not Path(config.corpus).is_file():
        raise ConfigError(f"corpus={config.corpus!r}: search: local needs a corpus.jsonl with title, url, text")


def make_search(config: Config, web: Web | None, corpus: Corpus | None) -> Backend:
    """The backend that `search:` names; local and toy need a corpus and no Web."""
    check_search(config)
    if config.search in ("local", "toy"):
        if corpus is None:
            raise ConfigError(f"search={config.search!r} needs a corpus")
        return LocalSearch(corpus, config.search_results)
    raise ConfigError(f"search={config.search!r} is not written yet")
