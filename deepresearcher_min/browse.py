"""From an address to notes: the page as text, the text in segments, a reader that takes notes and remembers.

Live pages are parsed in child processes: parsing holds Python's interpreter lock and would stall the engine, and a
page made to crash or to occupy a parser takes only a child with it. Left out: scripts, frames, images.
"""

import asyncio
import io
import json
import logging
import queue
import re
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from subprocess import PIPE, Popen
from typing import Any

import webencodings

from deepresearcher_min.config import ROOT, Config, ConfigError, require_environment
from deepresearcher_min.search import Corpus, content_words
from deepresearcher_min.web import BAD_REPLY, TIMEOUT, Web, WebFailure, count, seconds_left

PARSER = [sys.executable, "-W", "ignore", "-m", "deepresearcher_min.browse"]  # this module as a process
MAX_PDF_PAGES = 50
SHORT, LOST = 1000, 0.25  # an extract of fewer characters that is less than this share of the page has lost it
NOT_CONTENT = ["script", "style", "noscript", "template", "svg", "iframe", "nav", "header", "footer", "aside", "form"]
MAX_SENTENCES = 10  # of one segment that the extractive reader returns
MEMORY_CHARS = 4000  # of earlier notes that a reader is shown, the newest
MAX_TOKENS = 600  # of one reply of the openai reader
InThread = Callable[..., Awaitable[Any]]  # runs a blocking function: await in_thread(function, *arguments)
Context = tuple[Counter, float, InThread]  # what readers that wait need: counters, deadline, thread
Notes = tuple[str, bool]  # what a reader took from one segment, and whether it wants to read on
Reader = Callable[[str, str, Sequence[str], Context], Awaitable[Notes]]  # question, segment, earlier notes, context
CHARSET = re.compile(r"(?i)(?:^[^<]*|<meta[^>]*)\bcharset\s*=\s*[\"']?([\w.:-]+)")  # in a header, or in HTML
CONTINUE = re.compile(r"(?i)\bcontinue\W{0,3}:\W{0,3}(yes|no)\b\W*")
READER_RULES = (ROOT / "prompts/reader.txt").read_text().strip()


def main_text(body: bytes, content_type: str) -> str:
    """The main content of a page (HTML, PDF or plain text) as text, one block a line; empty where there is none.

    Never raises, whatever the bytes are. Quality and time beside other extractors: bench/tools.py.
    """
    try:
        text = page_text(body, content_type)
    except Exception:  # parsers of hostile bytes may raise anything; the caller says in words that there is no text
        text = ""
    lines = re.sub(r"[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]", "", text).splitlines()  # no control characters
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in lines)).strip()


def page_text(body: bytes, content_type: str) -> str:
    """main_text without its safety net: a PDF's text, plain text as it is, the extract of HTML or else all its text."""
    if body.startswith(b"%PDF-") or "pdf" in content_type:
        import pypdf  # here, like the others: only the parsers need them, and trafilatura takes 0.6 s

        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(body)).pages[:MAX_PDF_PAGES])
    text = decode(body, content_type)
    if "\0" in text[:1000]:  # a binary file, whatever its header says
        return ""
    if "html" not in (content_type.lower() or text[:1000].lower()):
        return text
    import bs4
    import trafilatura

    found = trafilatura.extract(text, fast=True, include_comments=False) or ""
    if len(found) >= SHORT:
        return found
    page = bs4.BeautifulSoup(text, "lxml" if found else "html.parser")  # the slow one forgives everything
    for part in page(NOT_CONTENT):
        part.decompose()
    everything = page.get_text("\n", strip=True)
    return everything if len(found) < LOST * len(everything) else found


def decode(body: bytes, content_type: str) -> str:
    """Bytes to text as browsers do it: byte-order mark, HTTP header, <meta>, UTF-8 if it is valid, Windows-1252."""
    for match in map(CHARSET.search, (content_type, body[:1024].decode("latin-1"))):
        encoding = match and webencodings.lookup(match[1])
        if encoding and "utf-16" not in encoding.name:  # which must have its mark
            return webencodings.decode(body, encoding)[0]
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        return webencodings.decode(body, "windows-1252")[0]


class Parsers:
    """Child processes that run main_text, started when needed; one that takes too long or dies is replaced.

    Each has a session of its own, since Ctrl-C is for the parent, whose end closes their input and so ends them.
    """

    def __init__(self, number: int) -> None:
        self.idle: queue.LifoQueue[Popen | None] = queue.LifoQueue()
        for _ in range(number):
            self.idle.put(None)

    def text(self, body: bytes, content_type: str, deadline: float) -> str:
        """main_text(body, content_type) from a child; raises WebFailure (timeout, unreadable)."""
        try:
            child: Any = self.idle.get(timeout=seconds_left(deadline))
        except queue.Empty:
            raise WebFailure(*TIMEOUT) from None
        text: Any = None
        alarm = threading.Timer(deadline - time.monotonic(), lambda: child.kill())
        try:
            if child is None or child.poll() is not None:
                child = Popen(PARSER, stdin=PIPE, stdout=PIPE, cwd=ROOT, start_new_session=True)
            alarm.start()
            child.stdin.write(json.dumps([len(body), content_type]).encode() + b"\n" + body)
            child.stdin.flush()
            text = json.loads(child.stdout.readline())
        except (OSError, ValueError):  # the child is gone: killed by the alarm, or by the page
            raise WebFailure("unreadable", "The page is built in a way that cannot be read.") from None
        finally:
            alarm.cancel()
            if text is None and child is not None:  # what it may still send is not to be taken for the next page
                child.kill()
                child.communicate()
            self.idle.put(child)
        return text


PARSERS = Parsers(2)  # of one rank


def fetch_text(url: str, web: Web, counts: Counter, deadline: float) -> str:
    """The text of a live page, through the cassette, which records the text and not the page."""

    def produce() -> str:
        body, content_type = web.fetch(url, counts, deadline)
        text = PARSERS.text(body, content_type, deadline)
        if not text:
            raise WebFailure("no_text", "The page holds no text that can be read.")
        return text

    return web.cached("page", url.partition("#")[0], produce, counts, deadline)


def segments(text: str, max_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars` characters; only white space at the borders is lost.

    Borders in the second half of a piece, best first: paragraph, line, sentence, word; else where it is full.
    """
    pieces, start = [], 0
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            borders = (text.rfind(border, start + max_chars // 2, end) for border in ("\n\n", "\n", ". ", " "))
            end = next((place + 1 for place in borders if place >= 0), end)
        pieces.append(text[start:end].strip())
        start = end
    return list(filter(None, pieces))


async def extract(question: str, segment: str, memory: Sequence[str], context: Context) -> Notes:
    """A reader without a model: the sentences that share most content words with the question, in page order."""
    wanted = set(content_words(question))
    sentences = re.split(r"(?<=[.!?])\s+|\n+", segment)
    shared = [len(wanted.intersection(content_words(sentence))) for sentence in sentences]
    best = sorted(range(len(sentences)), key=lambda i: (-shared[i], i))[:MAX_SENTENCES]
    return " ".join(sentences[i].strip() for i in sorted(best) if shared[i]), True


def parse_notes(reply: str) -> Notes:
    """Notes from a model's reply; one that keeps to no format is taken as notes as a whole, and ends the page."""
    reply = reply.rpartition("</think>")[2]
    further = CONTINUE.search(reply)
    notes = re.sub(r"(?i)^\W*notes\W{0,4}:\W*", "", CONTINUE.sub("", reply, count=1)).strip()
    if re.fullmatch(r"(?i)\W*(none|nothing)?\W*", notes):
        notes = ""
    return notes, further is not None and further[1].lower() == "yes"


def model_reader(complete: Callable[..., Awaitable[str]]) -> Reader:
    """A reader that asks a chat model, `await complete(messages, context)`; its tokens are in no trajectory."""

    async def read(question: str, segment: str, memory: Sequence[str], context: Context) -> Notes:
        earlier = "\n".join(memory)[-MEMORY_CHARS:] or "none"
        content = f"Question: {question}\n\nEarlier notes: {earlier}\n\nPage segment:\n<<<\n{segment}\n>>>"
        messages = [{"role": "system", "content": READER_RULES}, {"role": "user", "content": content}]
        return parse_notes(await complete(messages, context))

    return read


async def ask_openai(config: Config, web: Web, messages: list[dict[str, str]], context: Context) -> str:
    """The reply of the endpoint `reader_url`, before the deadline, through the cassette."""
    counts, deadline, in_thread = context
    url = config.reader_url.rstrip("/") + "/chat/completions"
    payload = {"model": config.reader_model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}

    def ask() -> str:
        text, tokens = web.chat(url, "READER_API_KEY", payload, counts, deadline)
        if text is None:
            raise WebFailure(*BAD_REPLY)
        count(counts, "reader_tokens", tokens)
        count(counts, "usd", tokens * config.price_reader_token)
        return text

    async with asyncio.timeout(seconds_left(deadline)):
        return await in_thread(web.cached, "reader", [url, payload], ask, counts, deadline)


def make_reader(config: Config, web: Web | None, generate_text: Callable[..., Awaitable[str]] | None = None) -> Reader:
    """The reader that `reader:` names; raises ConfigError for what it lacks."""
    if config.reader == "extractive":
        return extract
    if config.reader == "engine" and generate_text is not None:
        # Bounded in tokens, not by the deadline: the clock would make it unrepeatable.
        return model_reader(lambda messages, _: generate_text(messages))
    if config.reader == "openai" and web is not None and config.reader_url and config.reader_model:
        if config.cassette_mode != "replay":
            require_environment("READER_API_KEY", "reader: openai sends it (any word, if the server asks for none)")
        return model_reader(partial(ask_openai, config, web))
    raise ConfigError(f"reader={config.reader!r}: openai needs the web, reader_url and reader_model; engine an engine")


async def browse(
    url: str, question: str, memory: Sequence[str], *, config: Config, web: Web | None, corpus: Corpus | None,
    reader: Reader, counts: Counter, in_thread: InThread,
) -> list[tuple[int, str]]:  # fmt: skip
    """Read a page: (page_number, page_summary) for each segment with new information; `memory` is what was read before.

    Stops when the reader does, at the last segment, at max_segments, or after tool_timeout, with the notes so far.
    Raises WebFailure, in words, where there is nothing to note.
    """
    deadline = time.monotonic() + config.tool_timeout
    notes: list[tuple[int, str]] = []
    try:
        text = corpus.pages.get(url) if corpus is not None else None
        if text is None:
            if web is None:
                raise WebFailure("not_found", "There is no page at this address.")
            text = await in_thread(fetch_text, url, web, counts, deadline)
        for number, segment in enumerate(segments(text, config.segment_chars)[: config.max_segments]):
            earlier = [*memory, *(note for _, note in notes)]
            information, page_down = await reader(question, segment, earlier, (counts, deadline, in_thread))
            if information:
                notes.append((number, information))
            if not page_down:
                break
        if not notes:
            raise WebFailure("no_information", "The page says nothing about this.")
    except (WebFailure, TimeoutError) as error:
        failure = error if isinstance(error, WebFailure) else WebFailure(*TIMEOUT)
        if not notes:
            raise failure from None
        count(counts, f"fail_{failure.kind}")
    return notes


if __name__ == "__main__":  # a parser: [length, content type] and a body in, one line of JSON out, until no more comes
    logging.disable()
    if sys.platform == "linux":  # a PDF of a few kB can ask for gigabytes; elsewhere only the deadline ends it
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    while line := sys.stdin.buffer.readline():
        length, content_type = json.loads(line)
        print(json.dumps(main_text(sys.stdin.buffer.read(length), content_type)), flush=True)
