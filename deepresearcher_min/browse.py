"""From an address to notes: the page as text, the text in segments, a reader that takes notes and
remembers.

Live pages are parsed in child processes: parsing holds Python's interpreter lock and would stall
the engine, and a page made to crash or to occupy a parser takes only a child with it. Left out:
scripts, frames, images.
"""

import asyncio
import codecs
import html
import io
import json
import logging
import math
import queue
import re
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from subprocess import PIPE, Popen
from typing import Any

import webencodings

from deepresearcher_min.config import ROOT, Config, ConfigError, require_environment
from deepresearcher_min.search import ENDS, SENTENCE_END, Corpus, content_words
from deepresearcher_min.trajectory import Reading
from deepresearcher_min.web import (
    BAD_REPLY,
    TIMEOUT,
    Web,
    WebFailure,
    code_of,
    count,
    count_failure,
    seconds_left,
)

PARSER = [
    sys.executable,
    "-W",
    "ignore",
    "-m",
    "deepresearcher_min.browse",
]  # this module as a process
EXTRACTOR = code_of(
    __file__, "trafilatura", "beautifulsoup4", "lxml", "pypdf", "charset-normalizer"
)  # of a page
NOT_CONTENT = """head title script style noscript template svg iframe nav footer aside dialog button select
    textarea""".split()  # noqa: SIM905
BLOCKS = """address article aside blockquote body br caption center dd details div dl dt fieldset figcaption figure form
    h1 h2 h3 h4 h5 h6 header hr html legend li main ol p pre section summary table tr ul""".split()  # noqa: SIM905
PREFIX = {"li": "- ", "td": " | ", "th": " | "}
NO_WORD = re.compile(r"\W+")
ORDINALS = "st nd rd th e er re me ère ème o os".split()  # noqa: SIM905
SIGNED = re.compile(r"^[+\u2212\u2013-]|[+\u2212-]$")
# A unit or variable, a function, a number below 1,000, a power of ten, a bracket.
POWER = re.compile(
    r"(?<![\w.,$€£¥])(?:[^\W\d_]{1,2}|sin|cos|tan|log|\d{1,3}(?:\.\d+)?|10+)$|[)\]}|]$"
)
Notes = tuple[str, bool]  # what a reader took from one segment, and whether it wants to read on
NOT_READ = "The page is built in a way that cannot be read."
INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f\xad\u200b\u2060\ufeff\ud800-\udfff]"
)  # and control characters
PDF_ROOT = re.compile(rb"(?s)(\d{1,9}) +\d+ +obj\b(?:(?!endobj).){0,2000}?/Catalog\b")
NO_TEXT = re.compile(r"(?is)<!--.*?(?:-->|\Z)|<(script|style|noscript)\b.*?(?:</\1[^<>]*>|\Z)")
HEADER_CHARSET = re.compile(r"(?i)\bcharset\s*=\s*[\"']?([\w.:-]+)")
CHARSET = re.compile(
    r"(?i)(?:<meta\s[^>]{0,500}?\bcharset|<\?xml[^>]{0,500}?\bencoding)\s*=\s*[\"']?\s*([\w.:-]+)"
)
LEGACY = """gb18030 big5 cp932 euc_jp cp949 cp1251 koi8_r iso8859_5 cp1253 cp1255 cp1256 cp874 cp1252 cp1250 iso8859_2
    cp1254 cp1257 cp1258""".split()  # noqa: SIM905  # what pages are found in, in Python's names
CONTINUE = re.compile(r"(?i)\bcontinue\W{0,3}:\W{0,3}(yes|no)\b\W*")
BORDERS = (("\n\n",), ("\n",), (". ", *ENDS), (" ",))  # of segments, best first
READER_RULES = (ROOT / "prompts/reader.txt").read_text(encoding="utf-8").strip()


def main_text(body: bytes, content_type: str) -> str:
    """The main content of a page (HTML, PDF, plain text), one block a line; empty where there is
    none. Never raises.
    """
    return parse(body, content_type)[0]


def parse(body: bytes, content_type: str) -> tuple[str, str]:
    """(main_text, ""), or ("", why the page cannot be read)."""
    try:
        text = page_text(body, content_type)
    except Exception as error:  # parsers of hostile bytes may raise anything
        return "", getattr(error, "words", NOT_READ)
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip(), ""


def page_text(body: bytes, content_type: str) -> str:
    """main_text without its safety net; raises WebFailure (unreadable), and what parsers raise."""
    if body.startswith(b"%PDF-") or "pdf" in content_type:
        return pdf_text(body)
    text = decode(body, content_type)
    if "\0" in text[:1000]:  # a binary file, whatever its header says
        return ""
    if "html" not in (content_type.lower() or text[:1000].lower()):
        return text
    return html_text(text)


def pdf_text(body: bytes) -> str:
    """The text of a PDF's first fifty pages; a broken page costs only itself."""
    import pypdf  # here, like the others: only the parsers need them, and trafilatura takes 0.6 s

    try:
        reader = pypdf.PdfReader(io.BytesIO(body))
    except (
        Exception
    ):  # the file's end is lost: one that only names the root makes pypdf look for the objects
        root = PDF_ROOT.findall(body)[-1]
        end = b"\ntrailer<</Root %s 0 R>>\nstartxref\n%d\n%%%%EOF" % (root, len(body))
        reader = pypdf.PdfReader(io.BytesIO(body + end))
    if reader.is_encrypted and not reader.decrypt(
        ""
    ):  # many files are encrypted only to forbid printing
        raise WebFailure(
            "unreadable", "The file is locked: it cannot be read without its password."
        )
    texts = []
    for number in range(min(50, len(reader.pages))):
        with suppress(Exception):
            texts.append(reader.pages[number].extract_text())
    if not texts:
        raise ValueError("not one page can be read")
    return "\n\n".join(texts)


def html_text(text: str) -> str:
    """The library's extract, or, where it has lost the page or its lines, the page's own lines."""
    import trafilatura

    for pattern, written in MARKS.items():
        text = re.sub("(?i)<" + pattern, written, text)
    document = trafilatura.bare_extraction(text, fast=True, include_comments=False)
    found = document.text if document else ""
    one_block = document and len(document.body) == 1  # its last resort: lines torn, or all joined
    if len(found) >= 1000 and not one_block:
        return found
    lines = page_lines(text)[:5000]  # more than is ever read
    prose = [line for line, menu in lines if not menu]
    # A frame has up to 800 characters outside links: with more, the library has lost the page.
    if len("".join(prose)) > 3 * len(found) + 500 * bool(found):
        return "\n".join(prose)
    if one_block:
        found = whole_lines(found, lines)
    return found or html.unescape(re.sub("<[^<>]*>", "\n", NO_TEXT.sub("", text)))


def whole_lines(found: str, lines: list[tuple[str, bool]]) -> str:
    """The page's lines that `found` is made of; `found` itself if it is data that no line holds."""
    words = NO_WORD.sub("", found)
    lines = [(line, menu) for line, menu in lines if NO_WORD.sub("", line) in words]
    held = "\n".join(line for line, _ in lines)
    prose = "\n".join(line for line, menu in lines if not menu)
    if len(held) < 0.8 * len(found):
        return found
    return prose if len(prose.encode()) >= 120 else held  # else links are the content


def page_lines(text: str) -> list[tuple[str, bool]]:
    """(line, whether most of it is links, as in a menu) of an HTML page, one a block."""
    import bs4

    soup = bs4.BeautifulSoup(text, "lxml")
    in_links = {id(words) for link in soup("a") for words in link.strings}
    lines, line, linked, waiting = [], "", 0, list[Any]([soup])
    while waiting:
        node = waiting.pop()
        if node.name in NOT_CONTENT:
            continue
        if node.name in BLOCKS:  # a line ends here
            lines.append((line, 2 * linked > len(line)))
            line, linked = "", 0
            if node.contents:
                waiting.append(bs4.Tag(name="br"))  # the line ends where the block ends
        if isinstance(node, bs4.Tag):
            line += PREFIX.get(node.name, "")
            waiting += reversed(node.contents)
        elif type(node) is bs4.NavigableString:  # and no comment
            words = re.sub(r"\s+", " ", node)
            line += words
            linked += len(words) * (id(node) in in_links)
    return [(line, menu) for line, menu in lines if NO_WORD.sub("", line)]


def superscript(found: re.Match) -> str:
    """The text of a <sup>: a power, a note, or the rest of a word."""
    mark = html.unescape(re.sub("<[^<>]*>", "", found[1])).strip()
    before = found.string[max(0, found.start() - 60) : found.start()]
    base = re.sub("</[^<>]*>", "", before).rpartition(">")[2]
    after = found.string[found.end() : found.end() + 1]
    ordinal = mark in ORDINALS and not base[-1:].islower()
    if not mark or len(mark) > 20 or ordinal:
        return found[1]
    if after in ("/", "\u2044") or mark.startswith("["):  # 3 1/2
        return f" {mark}"
    power = SIGNED.search(mark) or (POWER.search(base) and mark[0].isalnum())
    if "#" in found[0] or not power:  # a link within the page
        return f" [{mark}]"
    return f"^({mark})" if re.search(r"\w\W+\w", mark) else f"^{mark}"


# Mark-up that carries meaning, and how it is written in characters: extractors keep only its text.
MARKS: dict[str, Any] = {
    r"/?q(?:\s[^<>]*)?>": '"',
    r"/?(?:del|s|strike)(?:\s[^<>]*)?>": "~~",
    r"rp>[^<]*(?:</rp>)?": "",
    r"rt(?:\s[^<>]*)?>([^<]*)(?:</rt>)?": r"(\1)",
    r"sub(?:\s[^<>]*)?>([^<]{0,80}[^\w<][^<]{0,80})</sub>": r"_(\1)",  # a_(n+1)
    r"/?sub(?:\s[^<>]*)?>": "",  # H2O
    r"time(?:\s[^<>]*)?>([^<]*)</time>(?=\s*[\w,.;)])": r"\1",  # in a sentence
    r"sup(?:\s[^<>]*)?>((?s:.{0,400}?))</sup>": superscript,
}


def decode(body: bytes, content_type: str) -> str:
    """Bytes to text: mark, UTF-8, what is declared, detection; raises WebFailure (unreadable)."""
    if body.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return webencodings.decode(body, "utf-8")[0]
    text = body.decode(errors="replace")
    if not text.isascii() and fits(text):
        return text
    page = NO_TEXT.sub("", body.decode("latin-1"))
    pieces = [piece for piece in re.split("<[^<>]*>", page) if not piece.isascii()]
    sample = "\n".join(pieces).encode("latin-1")
    beyond = len(sample.translate(None, bytes(range(128))))
    western = 2 * beyond <= len(sample)  # ASCII with accents
    enough = beyond >= (12 if western else 60)  # fewer characters are often judged wrongly
    declared = []
    for label in HEADER_CHARSET.findall(content_type) + CHARSET.findall(page[:100_000]):
        encoding = webencodings.lookup(label)
        if not encoding or (encoding.name == "windows-1252" and enough and not western):
            continue  # that one is the default of many servers, whatever they send
        declared.append(webencodings.decode(body, encoding)[0])
        if fits(declared[-1]):
            return declared[-1]
    if enough:
        text = body.decode(detect(sample, western), "replace")
    elif western:
        return [*declared, body.decode("cp1252", "replace")][0]
    if fits(text):
        return text
    raise WebFailure("unreadable", "The page's characters are in an unknown encoding.")


def fits(text: str) -> bool:
    """Whether at most a tenth of a decoded text's characters beyond ASCII are errors."""
    beyond = len(text) - len(text.encode("ascii", "ignore"))
    return 10 * text.count("\ufffd") <= beyond


def detect(sample: bytes, western: bool) -> str:
    """An encoding by statistics of the text; Windows-1252 first where `western`, as in browsers."""
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=["cp1252"]).best() if western else None
    if not best or best.chaos:
        best = from_bytes(sample, cp_isolation=LEGACY).best()
    return best.encoding if best else "cp1252" if western else "ascii"


class Parsers:
    """Child processes that run parse, started when needed; one that takes too long or dies is
    replaced.
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
        reply: Any = None
        alarm = threading.Timer(deadline - time.monotonic(), lambda: child.kill())
        try:
            if child is None or child.poll() is not None:
                child = Popen(
                    PARSER, stdin=PIPE, stdout=PIPE, cwd=ROOT, start_new_session=True
                )  # spared by Ctrl-C
            alarm.start()
            child.stdin.write(json.dumps([len(body), content_type]).encode() + b"\n" + body)
            child.stdin.flush()
            reply = json.loads(child.stdout.readline())
        except (OSError, ValueError):  # the child is gone: killed by the alarm, or by the page
            raise WebFailure("unreadable", NOT_READ) from None
        finally:
            alarm.cancel()
            if (
                reply is None and child is not None
            ):  # what it may still send is not to be taken for the next page
                child.kill()
                child.communicate()
            self.idle.put(child)
        text, reason = reply
        if reason:
            raise WebFailure("unreadable", reason)
        return text


def segments(text: str, max_chars: int) -> list[str]:
    """Cut a text into pieces of at most `max_chars`, where a paragraph ends, or else a line, a
    sentence or a word.
    """
    pieces, start = [], 0
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            half = start + max_chars // 2
            borders = (max(text.rfind(border, half, end) for border in kind) for kind in BORDERS)
            end = next((place + 1 for place in borders if place >= 0), end)
        pieces.append(text[start:end].strip())
        start = end
    return list(filter(None, pieces))


def extract(question: str, segment: str) -> str:
    """What the reader without a model notes: the ten sentences that share most content words with
    the question.
    """
    wanted = set(content_words(question))
    if not segment.isascii():
        segment = SENTENCE_END.sub(r"\g<0>\n", segment)
    sentences = re.split(r"(?<=[.!?])\s+|\n+", segment)
    shared = [len(wanted.intersection(content_words(sentence))) for sentence in sentences]
    best = sorted(range(len(sentences)), key=lambda i: (-shared[i], i))[:10]
    return " ".join(sentences[i].strip() for i in sorted(best) if shared[i])


def parse_notes(reply: str) -> Notes:
    """Notes from a model's reply; one that keeps to no format is taken as notes as a whole, and
    ends the page.
    """
    reply = reply.rpartition("</think>")[2]
    further = CONTINUE.search(reply)
    notes = re.sub(r"(?i)^\W*notes\W{0,4}:\W*", "", CONTINUE.sub("", reply, count=1)).strip()
    if re.fullmatch(r"(?i)\W*(none|nothing)?\W*", notes):
        notes = ""
    return notes, further is not None and further[1].lower() == "yes"


class Browser:
    """Opens pages, and has them read by whom `reader:` names; raises ConfigError for what that one
    lacks.

    `in_thread(function, *arguments)` runs what blocks; `generate_text(messages)` asks the policy's
    own engine.
    """

    parsers = Parsers(2)  # of one rank

    def __init__(
        self,
        config: Config,
        web: Web | None,
        corpus: Corpus | None,
        in_thread: Callable,
        generate_text: Any,
    ):
        self.config, self.corpus, self.in_thread, self.generate_text = (
            config,
            corpus,
            in_thread,
            generate_text,
        )
        self.web: Any = web
        if config.reader == "openai" and not (config.reader_url and config.reader_model):
            raise ConfigError("reader='openai': needs reader_url and reader_model")
        if config.reader == "openai" and config.cassette_mode != "replay":
            require_environment(
                "READER_API_KEY", "reader: openai sends it (any word, if the server asks for none)"
            )

    async def browse(self, url: str, reading: Reading, counts: Counter) -> list[tuple[int, str]]:
        """(page_number, page_summary) for each segment with new information, from reading.next on,
        which it moves.

        Fetching and each reading keep tool_timeout, all together browse_timeout. What ends it early
        leaves the notes so far; raises WebFailure where there are none.
        """
        config, notes = self.config, reading.notes
        limit = config.tool_timeout if config.browse_timeout < 0 else config.browse_timeout
        end = time.monotonic() + (limit or math.inf)

        def deadline() -> float:
            return min(end, time.monotonic() + config.tool_timeout)

        try:
            text = self.corpus.pages.get(url) if self.corpus else None
            if text is None:
                if self.web is None:
                    raise WebFailure("not_found", "There is no page at this address.")
                text = await self.in_thread(self.fetch_text, url, counts, deadline())
            pieces = segments(text, config.segment_chars)
            reading.total = len(pieces)
            if 0 < reading.total <= reading.next:
                raise WebFailure(
                    "nothing_left", "This page was read to its end before; nothing is left of it."
                )
            for segment in pieces[reading.next :][: config.max_segments or None]:
                information, further = await self.read(reading, segment, counts, deadline())
                if information:
                    notes.append((reading.next, information))
                reading.next += 1
                if not further:
                    break
            if not notes:
                raise WebFailure("no_information", "The page says nothing about this.")
        except (WebFailure, TimeoutError) as error:
            failure = error if isinstance(error, WebFailure) else WebFailure(*TIMEOUT)
            if not notes:
                raise failure from None
            count_failure(counts, "page", failure)
        return notes

    def fetch_text(self, url: str, counts: Counter, deadline: float) -> str:
        """The text of a live page, through the cassette, which records the text and not the page."""

        def produce() -> str:
            body, content_type = self.web.fetch(url, counts, deadline)
            if text := self.parsers.text(body, content_type, deadline):
                return text
            raise WebFailure("no_text", "The page holds no text that can be read.")

        return self.web.cached("page", url.partition("#")[0], produce, counts, deadline, EXTRACTOR)

    async def read(self, reading: Reading, segment: str, counts: Counter, deadline: float) -> Notes:
        """Notes on one segment, and whether to read on; a model's tokens are in no trajectory."""
        if self.config.reader == "extractive":
            return extract(reading.question, segment), True
        earlier = "\n".join([*reading.memory, *(note for _, note in reading.notes)])
        content = (
            f"Question: {reading.question}\n\nSearch query: {reading.query or 'none'}\n\n"
            # the newest; [-0:] is all
            f"Earlier notes: {earlier[-self.config.reader_memory :] or 'none'}\n\n"
            f"Page segment {reading.next + 1} of {reading.total}:\n<<<\n{segment}\n>>>"
        )
        messages = [
            {"role": "system", "content": READER_RULES},
            {"role": "user", "content": content},
        ]
        if (
            self.config.reader == "engine"
        ):  # bounded in tokens: the clock would make it unrepeatable
            return parse_notes(await self.generate_text(messages))
        url = self.config.reader_url.rstrip("/") + "/chat/completions"
        temperature = self.config.reader_temperature
        payload = {
            "model": self.config.reader_model,
            "messages": messages,
            "temperature": temperature,
        }
        if self.config.reader_tokens:
            payload["max_tokens"] = self.config.reader_tokens

        def ask() -> str:
            text, tokens = self.web.chat(url, "READER_API_KEY", payload, counts, deadline)
            if text is None:
                raise WebFailure(*BAD_REPLY)
            count(counts, "reader_tokens", tokens)
            count(counts, "usd", tokens * self.config.price_reader_token)
            return text

        async with asyncio.timeout(seconds_left(deadline)):
            reply = await self.in_thread(
                self.web.cached, "reader", [url, payload], ask, counts, deadline
            )
        return parse_notes(reply)


if (
    __name__ == "__main__"
):  # a parser: [length, content type] and a body in, one line of JSON out, until no more comes
    logging.disable()
    if (
        sys.platform == "linux"
    ):  # a PDF of a few kB can ask for gigabytes; elsewhere only the deadline ends it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    while line := sys.stdin.buffer.readline():
        length, content_type = json.loads(line)
        print(json.dumps(parse(sys.stdin.buffer.read(length), content_type)), flush=True)
