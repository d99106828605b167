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
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from subprocess import PIPE, Popen
from typing import Any

import webencodings

from deepresearcher_min.config import ROOT, Config, ConfigError, require_environment
from deepresearcher_min.search import Corpus, content_words
from deepresearcher_min.web import BAD_REPLY, TIMEOUT, Web, WebFailure, count, seconds_left

PARSER = [sys.executable, "-W", "ignore", "-m", "deepresearcher_min.browse"]  # this module as a process
NOT_CONTENT = ["script", "style", "noscript", "template", "svg", "iframe", "nav", "header", "footer", "aside", "form"]
Notes = tuple[str, bool]  # what a reader took from one segment, and whether it wants to read on
CHARSET = re.compile(r"(?i)(?:^[^<]*|<meta[^>]*)\bcharset\s*=\s*[\"']?([\w.:-]+)")  # in a header, or in HTML
CONTINUE = re.compile(r"(?i)\bcontinue\W{0,3}:\W{0,3}(yes|no)\b\W*")
READER_RULES = (ROOT / "prompts/reader.txt").read_text(encoding="utf-8").strip()


def main_text(body: bytes, content_type: str) -> str:
    """The main content of a page (HTML, PDF, plain text), one block a line; empty where there is none. Never raises."""
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

        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(body)).pages[:50])
    text = decode(body, content_type)
    if "\0" in text[:1000]:  # a binary file, whatever its header says
        return ""
    if "html" not in (content_type.lower() or text[:1000].lower()):
        return text
    import bs4
    import trafilatura

    found = trafilatura.extract(text, fast=True, include_comments=False) or ""
    if len(found) >= 1000:
        return found
    page = bs4.BeautifulSoup(text, "lxml" if found else "html.parser")  # the slow one forgives everything
    for part in page(NOT_CONTENT):
        part.decompose()
    everything = page.get_text("\n", strip=True)
    return everything if len(found) < 0.25 * len(everything) else found  # less than a quarter has lost the page


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
    """Child processes that run main_text, started when needed; one that takes too long or dies is replaced."""

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
                child = Popen(PARSER, stdin=PIPE, stdout=PIPE, cwd=ROOT, start_new_session=True)  # spared by Ctrl-C
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


def segments(text: str, max_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars`, where a paragraph ends, or else a line, a sentence or a word."""
    pieces, start = [], 0
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            borders = (text.rfind(border, start + max_chars // 2, end) for border in ("\n\n", "\n", ". ", " "))
            end = next((place + 1 for place in borders if place >= 0), end)
        pieces.append(text[start:end].strip())
        start = end
    return list(filter(None, pieces))


def extract(question: str, segment: str) -> str:
    """What the reader without a model notes: the ten sentences that share most content words with the question."""
    wanted = set(content_words(question))
    sentences = re.split(r"(?<=[.!?])\s+|\n+", segment)
    shared = [len(wanted.intersection(content_words(sentence))) for sentence in sentences]
    best = sorted(range(len(sentences)), key=lambda i: (-shared[i], i))[:10]
    return " ".join(sentences[i].strip() for i in sorted(best) if shared[i])


def parse_notes(reply: str) -> Notes:
    """Notes from a model's reply; one that keeps to no format is taken as notes as a whole, and ends the page."""
    reply = reply.rpartition("</think>")[2]
    further = CONTINUE.search(reply)
    notes = re.sub(r"(?i)^\W*notes\W{0,4}:\W*", "", CONTINUE.sub("", reply, count=1)).strip()
    if re.fullmatch(r"(?i)\W*(none|nothing)?\W*", notes):
        notes = ""
    return notes, further is not None and further[1].lower() == "yes"


class Browser:
    """Opens pages, and has them read by whom `reader:` names; raises ConfigError for what that one lacks.

    `in_thread(function, *arguments)` runs what blocks; `generate_text(messages)` asks the policy's own engine.
    """

    parsers = Parsers(2)  # of one rank

    def __init__(self, config: Config, web: Web | None, corpus: Corpus | None, in_thread: Callable, generate_text: Any):
        self.config, self.corpus, self.in_thread, self.generate_text = config, corpus, in_thread, generate_text
        self.web: Any = web
        if config.reader == "openai" and not (config.reader_url and config.reader_model):
            raise ConfigError("reader='openai': needs reader_url and reader_model")
        if config.reader == "openai" and config.cassette_mode != "replay":
            require_environment("READER_API_KEY", "reader: openai sends it (any word, if the server asks for none)")

    async def browse(self, url: str, question: str, memory: Sequence[str], counts: Counter) -> list[tuple[int, str]]:
        """(page_number, page_summary) for each segment with new information; `memory` is what was read before.

        What ends it early (a failure, tool_timeout) leaves the notes so far; raises WebFailure where there are none.
        """
        deadline = time.monotonic() + self.config.tool_timeout
        notes: list[tuple[int, str]] = []
        try:
            text = self.corpus.pages.get(url) if self.corpus else None
            if text is None:
                if self.web is None:
                    raise WebFailure("not_found", "There is no page at this address.")
                text = await self.in_thread(self.fetch_text, url, counts, deadline)
            for number, segment in enumerate(segments(text, self.config.segment_chars)[: self.config.max_segments]):
                earlier = [*memory, *(note for _, note in notes)]
                information, further = await self.read(question, segment, earlier, counts, deadline)
                if information:
                    notes.append((number, information))
                if not further:
                    break
            if not notes:
                raise WebFailure("no_information", "The page says nothing about this.")
        except (WebFailure, TimeoutError) as error:
            failure = error if isinstance(error, WebFailure) else WebFailure(*TIMEOUT)
            if not notes:
                raise failure from None
            count(counts, f"fail_{failure.kind}")
        return notes

    def fetch_text(self, url: str, counts: Counter, deadline: float) -> str:
        """The text of a live page, through the cassette, which records the text and not the page."""

        def produce() -> str:
            body, content_type = self.web.fetch(url, counts, deadline)
            if text := self.parsers.text(body, content_type, deadline):
                return text
            raise WebFailure("no_text", "The page holds no text that can be read.")

        return self.web.cached("page", url.partition("#")[0], produce, counts, deadline)

    async def read(self, question: str, segment: str, memory: Sequence[str], counts: Counter, deadline: float) -> Notes:
        """Notes on one segment, and whether to read on; a model's tokens are in no trajectory."""
        if self.config.reader == "extractive":
            return extract(question, segment), True
        earlier = "\n".join(memory)[-4000:] or "none"  # the newest
        content = f"Question: {question}\n\nEarlier notes: {earlier}\n\nPage segment:\n<<<\n{segment}\n>>>"
        messages = [{"role": "system", "content": READER_RULES}, {"role": "user", "content": content}]
        if self.config.reader == "engine":  # bounded in tokens: the clock would make it unrepeatable
            return parse_notes(await self.generate_text(messages))
        url = self.config.reader_url.rstrip("/") + "/chat/completions"
        payload = {"model": self.config.reader_model, "messages": messages, "temperature": 0, "max_tokens": 600}

        def ask() -> str:
            text, tokens = self.web.chat(url, "READER_API_KEY", payload, counts, deadline)
            if text is None:
                raise WebFailure(*BAD_REPLY)
            count(counts, "reader_tokens", tokens)
            count(counts, "usd", tokens * self.config.price_reader_token)
            return text

        async with asyncio.timeout(seconds_left(deadline)):
            reply = await self.in_thread(self.web.cached, "reader", [url, payload], ask, counts, deadline)
        return parse_notes(reply)


if __name__ == "__main__":  # a parser: [length, content type] and a body in, one line of JSON out, until no more comes
    logging.disable()
    if sys.platform == "linux":  # a PDF of a few kB can ask for gigabytes; elsewhere only the deadline ends it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    while line := sys.stdin.buffer.readline():
        length, content_type = json.loads(line)
        print(json.dumps(main_text(sys.stdin.buffer.read(length), content_type)), flush=True)
