"""From an address to notes: the page as text, its segments, a reader that takes notes of them.

Live pages are parsed in child processes: parsing holds Python's interpreter lock and would stall
the engine, and a page made to crash or to occupy a parser takes only a child with it. Left out:
scripts, frames, images.
"""
# ruff: noqa: SIM905  (lists of words are easier to read as text)

import html
import io
import json
import logging
import math
import pickle
import queue
import re
import sys
import threading
import time
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from subprocess import PIPE, Popen
from typing import Any

import webencodings

from deepresearcher_min.config import (
    ROOT,
    WORDS,
    Config,
    WebFailure,
    code_of,
    count_failure,
    seconds_left,
)
from deepresearcher_min.corpus import Corpus, extract, segments
from deepresearcher_min.search import ask_service, parse_notes

# What made a recorded text.
EXTRACTOR = code_of(
    __file__, "trafilatura", "beautifulsoup4", "lxml", "pypdf", "charset-normalizer"
)
INVISIBLE = r"[\x00-\x08\x0e-\x1b\x7f\xad\u200b\u2060\ufeff\ud800-\udfff]"
TAG = re.compile("<[^<>]*>")
NO_TEXT = re.compile(r"(?is)<!--.*?(?:-->|\Z)|<(script|style|noscript)\b.*?(?:</\1[^<>]*>|\Z)")
NO_WORD = re.compile(r"\W+")
NOT_CONTENT = """head title script style noscript template svg iframe nav footer aside dialog button
    select textarea""".split()
# Characters that no page uses: where a line ends, and on both sides of what is a link.
BREAK = "\U0010fff0"
LINK = "\U0010fff1"
LAYOUT = {
    # One mark for a run of tags: beautifulsoup takes the square of the time for nested texts.
    r"(?:</?(?:address|article|aside|blockquote|br|caption|center|dd|details|div|dl|dt|fieldset"
    r"|figcaption|figure|form|h\d|header|hr|legend|li|main|ol|p|pre|section|summary|table|tr|ul)"
    r"\b[^<>]*>\s*)+": rf"{BREAK}\g<0>",
    r"<t[dh]\b[^<>]*>": r"\g<0> | ",
    r"<li\b[^<>]*>": r"\g<0>- ",
}
ORDINALS = "st nd rd th e er re me ère ème o os".split()
# Before a power: a unit or variable, a function, a number below 1,000, a power of ten, a bracket.
BASE = r"(?<![\w.,$€£¥])(?:[^\W\d_]{1,2}|sin|cos|tan|log|\d{1,3}(?:\.\d+)?|10+)$|[)\]}|]$"
CHARSET = (
    r"(?i)(?:<meta\s[^>]{0,500}?\bcharset|<\?xml[^>]{0,500}?\bencoding)\s*=\s*[\"']?\s*([\w.:-]+)"
)
# The encodings before UTF-8 in which pages are found, in Python's names.
LEGACY = """gb18030 big5 cp932 euc_jp cp949 cp1251 koi8_r iso8859_5 cp1253 cp1255 cp1256 cp874
    cp1252 cp1250 iso8859_2 cp1254 cp1257 cp1258""".split()
READER_RULES = (ROOT / "prompts/reader.txt").read_text("utf-8").strip()


def main_text(body: bytes, content_type: str) -> str:
    """The main content of a page (HTML, PDF, plain text), one block a line, or ""; never raises."""
    return parse(body, content_type)[0]


def parse(body, content_type):
    """(main_text, ""), or ("", why the page cannot be read)."""
    try:
        text = page_text(body, content_type)
    except Exception as error:  # parsers of hostile bytes may raise anything
        return "", getattr(error, "words", WORDS["unreadable"])
    text = unicodedata.normalize("NFC", re.sub(INVISIBLE, "", text))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip(), ""


def page_text(body: bytes, content_type: str) -> str:
    """main_text without its safety net; raises WebFailure (unreadable), and what parsers raise."""
    if body.startswith(b"%PDF-") or "pdf" in content_type:
        return pdf_text(body)
    text = decode(body, content_type)
    if "\0" in text[:1000]:  # a binary file, whatever its header says
        return ""
    if "html" not in (content_type or text[:1000]).lower():
        return text
    return html_text(text)


def pdf_text(body):
    """The text of a PDF's first fifty pages; a broken page costs only itself."""
    import pypdf  # here, like the others: only the parsers need them, and trafilatura takes 0.6 s

    try:
        reader = pypdf.PdfReader(io.BytesIO(body))
    except Exception:
        # The file's end is lost: one that only names the root makes pypdf look for the objects.
        root = re.findall(rb"(?s)(\d{1,9}) +\d+ +obj\b(?:(?!endobj).){0,2000}?/Catalog\b", body)[-1]
        body += b"\ntrailer<</Root %s 0 R>>\nstartxref\n%d\n%%%%EOF" % (root, len(body))
        reader = pypdf.PdfReader(io.BytesIO(body))
    # Many files are encrypted only to forbid printing.
    if reader.is_encrypted and not reader.decrypt(""):
        raise WebFailure(
            "unreadable", "The file is locked: it cannot be read without its password."
        )
    texts = []
    for number in range(min(50, len(reader.pages))):
        with suppress(Exception):
            texts.append(reader.pages[number].extract_text())
    return "\n\n".join(texts)


def rewrite(text, tags):
    for pattern, written in tags.items():
        text = re.sub(f"(?i){pattern}", written, text)
    return text


def html_text(text):
    """The library's extract, or, where it has lost the page or its lines, the page's own lines."""
    import trafilatura

    text = rewrite(text, MARKS)
    document = trafilatura.bare_extraction(text, fast=True, include_comments=False)
    found = document.text if document else ""
    one_block = document and len(document.body) == 1  # its last resort: lines torn, or all joined
    if len(found) >= 1000 and not one_block:
        return found
    prose, everything = page_lines(text)
    # More prose than what frames an article (menus, footers) has: the library has lost the page.
    # Where it found nothing, any prose will do.
    if len("".join(prose)) > 3 * len(found) + 500 * bool(found):
        return "\n".join(prose)
    if one_block:
        whole = lines_of(found, everything)
        without_menus = lines_of(found, prose)
        if len(whole) >= 0.8 * len(found):  # else it is data, which no line holds
            # Else the menus are the page. In bytes: a Chinese sign says more than a letter.
            found = without_menus if len(without_menus.encode()) >= 120 else whole
    return found or html.unescape(TAG.sub("\n", NO_TEXT.sub("", text)))


def lines_of(found, lines):
    """Those of a page's lines that stand in `found`, however it is broken into lines."""
    words = NO_WORD.sub("", found)
    return "\n".join(line for line in lines if NO_WORD.sub("", line) in words)


def page_lines(text):
    """(prose, everything) of an HTML page: a line for each block; prose is not mostly links."""
    import bs4

    soup = bs4.BeautifulSoup(rewrite(text, LAYOUT), "lxml")
    for node in soup(NOT_CONTENT):
        node.decompose()
    for link in soup("a"):
        for words in list(link.strings):
            words.replace_with(f"{LINK}{words}{LINK}")
    prose = []
    everything = []
    lines = re.sub(r"\s+", " ", soup.get_text()).split(BREAK)
    for marked in lines[:9000]:  # more than is ever read
        line = marked.replace(LINK, "")
        if NO_WORD.sub("", line):
            everything.append(line)
            if 2 * sum(map(len, marked.split(LINK)[1::2])) <= len(line):  # of what is linked
                prose.append(line)
    return prose, everything


def superscript(found):
    """The text of a <sup>: a power, a note, or the rest of a word."""
    mark = html.unescape(TAG.sub("", found[1])).strip()
    before = found.string[max(0, found.start() - 60) : found.start()]
    base = TAG.sub("", re.split("<[^/]", before)[-1])  # the text since the last opening tag
    ordinal = mark in ORDINALS and not base[-1:].islower()
    if not mark or len(mark) > 20 or ordinal:
        return found[1]
    fraction = found.string.startswith(("/", "\u2044"), found.end())  # 3 1/2
    if fraction or mark.startswith("["):
        return f" {mark}"
    signed = re.search(r"^[+\u2212\u2013-]|[+\u2212-]$", mark)
    power = signed or (re.search(BASE, base) and mark[0].isalnum())
    if "#" in found[0] or not power:  # a link within the page
        return f" [{mark}]"
    if re.search(r"\w\W+\w", mark):
        mark = f"({mark})"
    return f"^{mark}"


# Mark-up that carries meaning, and how it is written in characters: extractors keep only its text.
MARKS = {
    r"</?q(?:\s[^<>]*)?>": '"',
    r"</?(?:del|s|strike)(?:\s[^<>]*)?>": "~~",
    r"<rp>[^<]*(?:</rp>)?": "",
    r"<rt(?:\s[^<>]*)?>([^<]*)(?:</rt>)?": r"(\1)",
    r"<sub(?:\s[^<>]*)?>([^<]{0,80}[^\w<][^<]{0,80})</sub>": r"_(\1)",  # a_(n+1)
    r"</?sub(?:\s[^<>]*)?>": "",  # H2O
    r"<time(?:\s[^<>]*)?>([^<]*)</time>(?=\s*[\w,.;)])": r"\1",  # in a sentence
    r"<sup(?:\s[^<>]*)?>((?s:.{0,400}?))</sup>": superscript,
}


def decode(body, content_type):
    """Bytes to text by the first that fits: a byte-order mark or UTF-8, what is declared, what is
    detected; raises WebFailure (unreadable).
    """
    text = webencodings.decode(body, "utf-8")[0]
    # Pure ASCII says nothing yet: ISO-2022-JP is written in it, too.
    if fits(text) and not body.isascii():
        return text
    page = NO_TEXT.sub("", body.decode("latin-1"))
    sample = "\n".join(text for text in TAG.split(page) if not text.isascii()).encode("latin-1")
    beyond = len(re.findall(rb"[\x80-\xff]", sample))
    western = 2 * beyond <= len(sample)  # ASCII with accents
    enough = beyond >= (12 if western else 60)  # fewer characters are often judged wrongly
    text = ""
    for label in re.findall(CHARSET, f"<meta {content_type}>{page[:100_000]}"):
        encoding = webencodings.lookup(label)
        if not encoding or (encoding.name == "windows-1252" and enough and not western):
            continue  # that one is the default of many servers, whatever they send
        text = webencodings.decode(body, encoding)[0]
        if fits(text):
            return text
    if western and not enough:
        return text or body.decode("cp1252", "replace")
    if enough:
        from charset_normalizer import from_bytes

        best = from_bytes(sample, cp_isolation=LEGACY).best()
        text = body.decode(best.encoding if best else "ascii", "replace")
        if fits(text):
            return text
    raise WebFailure("unreadable", "The page's characters are in an unknown encoding.")


def fits(text):
    """Whether at most a tenth of a decoded text's characters beyond ASCII are errors."""
    beyond = len(text) - len(text.encode("ascii", "ignore"))
    return 10 * text.count("\ufffd") <= beyond


class Parsers:
    """Child processes that run parse, replaced where one hangs or dies. No pool of a library's: its
    children would import the program's main module again, and torch with it.
    """

    def __init__(self, number):
        self.idle = queue.LifoQueue()  # of children, None where none is started yet
        for _ in range(number):
            self.idle.put(None)

    def text(self, body, content_type, deadline):
        """main_text(body, content_type) from a child; raises WebFailure (timeout, unreadable)."""
        try:
            child = self.idle.get(timeout=seconds_left(deadline))
        except queue.Empty:
            raise WebFailure("timeout") from None
        try:
            if not child or child.poll() is not None:
                # A session of its own spares it a Ctrl-C.
                command = [sys.executable, "-W", "ignore", "-m", __name__]
                child = Popen(command, stdin=PIPE, stdout=PIPE, cwd=ROOT, start_new_session=True)
            alarm = threading.Timer(seconds_left(deadline), child.kill)
            alarm.start()
            try:
                pickle.dump((body, content_type), child.stdin)
                child.stdin.flush()
                reply = child.stdout.readline()
            finally:
                alarm.cancel()
            text, reason = json.loads(reply)
        except (OSError, ValueError):  # the child is gone: killed by the alarm, or by the page
            child = None
            raise WebFailure("unreadable") from None
        finally:
            self.idle.put(child)
        if reason:
            raise WebFailure("unreadable", reason)
        return text


@dataclass
class Browser:
    """Opens pages, and has them read by whom `reader:` names."""

    config: Config
    web: Any  # None where only the corpus is read
    corpus: Corpus | None
    in_thread: Any  # awaited as in_thread(function, *arguments), it runs what blocks
    generate_text: Any  # awaited as generate_text(messages), it asks the policy's own engine
    parsers = Parsers(2)  # of one rank

    async def browse(self, url, reading, counts):
        """(page_number, page_summary) of what is new in segments from reading.next on, which moves.

        Fetching and each reading keep tool_timeout, all together browse_timeout. What ends it early
        leaves the notes so far; raises WebFailure where there are none.
        """
        config = self.config
        notes = reading.notes
        limit = config.tool_timeout if config.browse_timeout < 0 else config.browse_timeout
        end = time.monotonic() + (limit or math.inf)  # 0: no limit

        def deadline():
            return min(end, time.monotonic() + config.tool_timeout)

        try:
            if self.corpus and url in self.corpus.pages:
                text = self.corpus.pages[url]
            elif self.web:
                text = await self.in_thread(self.fetch_text, url, counts, deadline())
            else:
                raise WebFailure("not_found")
            pieces = segments(text, config.segment_chars)
            reading.total = len(pieces)
            if 0 < reading.total <= reading.next:
                raise WebFailure("nothing_left")
            for segment in pieces[reading.next :][: config.max_segments or None]:
                information, further = await self.read(reading, segment, counts, deadline())
                if information:
                    notes.append((reading.next, information))
                reading.next += 1
                if not further:
                    break
            if not notes:
                raise WebFailure("no_information")
        except WebFailure as failure:
            if not notes:
                raise
            count_failure(counts, "page", failure)
        return notes

    def fetch_text(self, url, counts, deadline):
        """The text of a live page, through the cassette, which records the text, not the page."""

        def produce():
            body, content_type = self.web.fetch(url, counts, deadline)
            text = self.parsers.text(body, content_type, deadline)
            if not text:
                raise WebFailure("no_text")
            return text

        return self.web.cached("page", url.partition("#")[0], produce, counts, deadline, EXTRACTOR)

    async def read(self, reading, segment, counts, deadline):
        """(notes on one segment, whether to read on); a model's tokens are in no trajectory."""
        config = self.config
        if config.reader == "extractive":
            return extract(reading.question, segment), True
        notes = [note for _, note in reading.notes]
        # [-0:] is all
        earlier = "\n".join([*reading.memory, *notes])[-config.reader_memory :]
        content = (
            f"Question: {reading.question}\n\nSearch query: {reading.query or 'none'}\n\n"
            f"Earlier notes: {earlier or 'none'}\n\n"
            f"Page segment {reading.next + 1} of {reading.total}:\n<<<\n{segment}\n>>>"
        )
        messages = [
            {"role": "system", "content": READER_RULES},
            {"role": "user", "content": content},
        ]
        if config.reader == "engine":  # bounded in tokens: the clock would make it unrepeatable
            return parse_notes(await self.generate_text(messages))
        reply = await self.in_thread(
            ask_service, "reader", config, self.web, messages, str, "bad_reply", counts, deadline
        )
        return parse_notes(reply)


# A parser: (body, content type) in, one line of JSON out (which a page that took it over could
# write, too), until no more comes.
if __name__ == "__main__":
    logging.disable()
    # A PDF of a few kB can ask for gigabytes; elsewhere only the deadline ends it.
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    with suppress(EOFError):
        while True:
            print(json.dumps(parse(*pickle.load(sys.stdin.buffer))), flush=True)
