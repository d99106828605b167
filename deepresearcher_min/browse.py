"""From a URL to notes: page text, segments, a reader with a memory."""

import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepresearcher_min.config import Config, ConfigError
from deepresearcher_min.search import Corpus, content_words
from deepresearcher_min.web import Web, WebFailure, count

MAX_SENTENCES = 10  # of one segment that the extractive reader returns


@dataclass(frozen=True)
class Notes:
    """What a reader took from one segment, and whether it wants to read on."""

    information: str
    page_down: bool


class Reader(Protocol):
    """Turns a segment into notes; `memory` is what this trajectory read before."""

    async def read(self, question: str, segment: str, memory: Sequence[str], counts: Counter) -> Notes: ...


def segments(text: str, max_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars` characters, on the best border that the second half offers.

    Borders, best first: paragraph, line, sentence, word; a run without any is cut where it is full.
    Nothing but white space at the borders is lost.
    """
    pieces = []
    rest = text.strip()
    while len(rest) > max_chars:
        cut = max_chars
        for border in ("\n\n", "\n", ". ", " "):
            found = rest.rfind(border, max_chars // 2, max_chars + 1)
            if found >= 0:
                cut = min(found + len(border), max_chars)
                break
        pieces.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [piece for piece in [*pieces, rest] if piece]


class ExtractiveReader:
    """No model: the sentences that share content words with the question, those with the most, in page order."""

    async def read(self, question: str, segment: str, memory: Sequence[str], counts: Counter) -> Notes:
        wanted = set(content_words(question))
        sentences = re.split(r"(?<=[.!?])\s+|\n+", segment)
        shared = [len(wanted.intersection(content_words(sentence))) for sentence in sentences]
        best = sorted(range(len(sentences)), key=lambda i: (-shared[i], i))[:MAX_SENTENCES]
        information = " ".join(sentences[i].strip() for i in sorted(best) if shared[i])
        return Notes(information, page_down=True)


def make_reader(config: Config, web: Web | None, generate_text: Callable[..., Awaitable[str]] | None = None) -> Reader:
    """The reader that `reader:` names."""
    if config.reader == "extractive":
        return ExtractiveReader()
    raise ConfigError(f"reader={config.reader!r} is not written yet")


async def browse(
    url: str,
    question: str,
    memory: list[str],
    *,
    config: Config,
    web: Web | None,
    corpus: Corpus | None,
    reader: Reader,
    counts: Counter,
    in_thread: Callable[..., Awaitable[Any]],
) -> list[tuple[int, str]]:
    """Read one page for a question: (page_number, page_summary) for each segment with new information.

    Appends to `memory`, which belongs to the trajectory. Raises WebFailure, in words, where there is nothing to read.
    """
    count(counts, "pages")
    deadline = time.monotonic() + config.tool_timeout
    try:
        text = corpus.page(url) if corpus is not None else None
        if text is None:
            raise WebFailure("not_found", "There is no page at this address.")
        notes = []
        for number, segment in enumerate(segments(text, config.segment_chars)[: config.max_segments]):
            found = await reader.read(question, segment, tuple(memory), counts)
            if found.information:
                notes.append((number, found.information))
                memory.append(found.information)
            if not found.page_down or time.monotonic() > deadline:
                break
        if not notes:
            raise WebFailure("no_information", "The page says nothing about this.")
        return notes
    except WebFailure as failure:
        count(counts, f"fail_{failure.kind}")
        raise
