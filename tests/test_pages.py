"""browse.py: from the bytes of a page to its text, encodings, hostile pages, and parsers in child processes."""

import json
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.tools import quality
from deepresearcher_min import browse as browse_module
from deepresearcher_min.browse import Parsers, decode, main_text
from deepresearcher_min.config import ROOT
from deepresearcher_min.web import WebFailure

pytestmark = pytest.mark.quick
HTML = "text/html; charset=utf-8"
TOWNS = ("Velden", "Marn", "Sool", "Tarn", "Oberau", "Kell", "Brae", "Lund", "Hove", "Esk", "Dorn", "Wick")
ARTICLE = "".join(
    f"<p>The river Ost rises in the hills and passes the town of {town} on its way.</p>" for town in TOWNS
)


def page(content, head=""):
    return f"<!doctype html><html><head><title>T</title>{head}</head><body>{content}</body></html>"


def test_main_content_is_kept_legible_and_the_frame_around_it_is_left_out():
    table = "<table><tr><th>Town</th><th>People</th></tr><tr><td>Marn</td><td>4,100</td></tr></table>"
    content = (
        f"<nav><a href=/a>Shop now</a></nav><article><h1>The Ost</h1>{ARTICLE}<ul><li>one</li><li>two</li></ul>{table}"
    )
    text = main_text(
        page(content + "</article><footer>All rights reserved</footer><script>evil()</script>").encode(), HTML
    )
    assert "The Ost\n" in text and "- one\n- two" in text and re.search(r"Marn \| 4,100", text)
    assert not re.search("Shop now|rights reserved|evil", text)


def test_where_the_extractor_loses_the_page_all_its_text_is_kept():
    formulas = "".join(f"<x-formula><x-row>x = {i}</x-row></x-formula>" for i in range(200))
    sentences = "".join(f"<p>Sentence {i} says how such a formula is to be written in a page.</p>" for i in range(4))
    text = main_text(page(f"<nav>Menu</nav>{sentences}{formulas}").encode(), HTML)
    assert "x = 39" in text and "Menu" not in text


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        ("Grüße".encode(), "text/html", "Grüße"),
        ("Grüße €".encode("cp1252"), "text/html; charset=ISO-8859-1", "Grüße €"),
        ("Grüße".encode("cp1252"), "text/html", "Grüße"),
        (b'<meta charset="windows-1251">' + "Река".encode("cp1251"), "text/html", '<meta charset="windows-1251">Река'),
        (b'<meta charset="utf-16">' + "Река".encode(), "text/html", '<meta charset="utf-16">Река'),
        ("川".encode("cp932"), "text/html; charset=Shift_JIS", "川"),
        ("河".encode("gb18030"), 'text/html; charset="gb2312"', "河"),
        (b"\xef\xbb\xbf" + "ü".encode(), "text/html; charset=latin-1", "ü"),
        (b"\xff\xfe" + "ü".encode("utf-16-le"), "text/html", "ü"),
        (b"abc", "text/html; charset=rot13", "abc"),
        (b"abc", "text/html; charset=hex", "abc"),
        (b"+ADw-script+AD4-", "text/html; charset=utf-7", "+ADw-script+AD4-"),
        (b"ok \xff\xfe\xfa", "text/html; charset=utf-8", "ok \ufffd\ufffd\ufffd"),
    ],
)
def test_encodings_are_read_as_browsers_read_them(body, content_type, expected):
    assert decode(body, content_type) == expected


def pdf(text):
    """A PDF file of one page."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, body)
    rows = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        rows,
        len(out),
    )


def test_pdf_and_plain_text():
    assert main_text(pdf("The Ost is a river."), "application/pdf") == "The Ost is a river."
    assert main_text(pdf("The Ost is a river."), "text/html") == "The Ost is a river."
    assert main_text(b"a <b> c\r\n\r\n\r\nd\x07", "text/plain") == "a <b> c\n\nd"
    for broken in (
        b"%PDF-1.7",
        b"%PDF-1.4 trailer<</Root 1 0 R>>",
        pdf("x")[:200],
        pdf("x").replace(b"/Kids[3", b"/Kids[2"),
    ):
        assert isinstance(main_text(broken, "application/pdf"), str)


HOSTILE = {
    "empty": b"",
    "spaces": b" \n" * 100,
    "nested": b"<div>" * 20_000 + b"hello" + b"</div>" * 20_000,
    "unclosed": b"<html><body>" + b"<b><i>" * 5_000 + b"hello",
    "attributes": b"<p " + b"a=1 " * 20_000 + b">hello</p>",
    "entities": b"&amp;" * 20_000 + b"&#xD800;&#0;&#99999999;",
    "binary": bytes(range(256)) * 400,
    "lies": b"\x1f\x8b\x08" + b"\0" * 1000,
    "surrogates": "<p>\ud800 hello</p>".encode("utf-8", "surrogatepass") * 50,
    "comment": b"<!--" + b"-" * 100_000,
    "cdata": b"<![CDATA[" * 5_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pages_give_text_or_nothing(name):
    text = main_text(HOSTILE[name], "text/html")
    assert "\0" not in text and isinstance(text.encode(), bytes)
    assert name not in ("nested", "unclosed", "attributes") or text == "hello"


def mutated(body, rng):
    """The page with a few pieces cut, doubled, moved or overwritten."""
    body = bytearray(body)
    for _ in range(rng.randint(1, 12)):
        start, length = rng.randrange(len(body)), rng.choice((1, 3, 40, 2000))
        piece = bytes(body[start : start + length])
        new = rng.choice(
            (b"", piece * 2, bytes(rng.randbytes(4)), b"<", b"</div>", b"<table><tr>", b'"', b"&#x", b"<!--")
        )
        body[start : start + length] = new or b"x"
    return bytes(body)


def fuzz(pages, number):
    rng = random.Random(0)
    for _ in range(number):
        text = main_text(mutated(rng.choice(pages), rng), rng.choice(("text/html", "", "text/html; charset=utf-8")))
        assert isinstance(text, str) and text.encode() is not None


def test_mutated_pages():
    fuzz([page(f"<nav>menu</nav><article><h1>Ost</h1>{ARTICLE}</article>").encode(), pdf("text")], 100)


# --- real pages

PAGES = ROOT.parent / "shared/data/html_pages"
needs_pages = pytest.mark.skipif(not PAGES.is_dir(), reason="needs the pages of ../shared")


def real_pages():
    rows = [json.loads(line) for line in (PAGES / "pages.jsonl").read_text().splitlines()]
    return [(row, (PAGES / "files" / row["file"]).read_bytes()) for row in rows]


@needs_pages
def test_quality_on_real_pages_is_at_least_that_of_trafilaturas_fast_mode():
    """Its figures on these pages: kept .972, absent .844, F1 .888; with recall .972, .812, .886."""
    figures = quality(real_pages(), main_text)
    assert figures["kept"] >= 0.97
    assert figures["absent"] >= 0.84
    assert figures["f1"] >= 0.94


# --- parsers in child processes


def test_a_parser_that_takes_too_long_or_dies_is_replaced():
    own = Parsers(1)
    body = page(ARTICLE).encode()
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)
    heavy = b"<html><body>" + b"<p>Some words that are <a href=b>long</a> enough to be read by it.</p>" * 50_000
    start = time.monotonic()
    with pytest.raises(WebFailure, match="unreadable"):
        own.text(heavy, HTML, start + 0.2)
    assert time.monotonic() - start < 1.0
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)
    child = own.idle.get()
    child.kill()
    child.wait()
    own.idle.put(child)
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)  # one that died meanwhile harms no page
    held = own.idle.get()
    with pytest.raises(WebFailure, match="timeout"):
        own.text(body, HTML, time.monotonic() + 0.1)
    held.communicate()


def test_many_threads_that_need_a_parser_at_once_start_no_more_than_there_may_be(monkeypatch):
    started, start = [], browse_module.Popen

    def counted(*args, **options):
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(browse_module, "Popen", counted)
    own = Parsers(2)
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda i: own.text(b"page %d" % i, "text/plain", time.monotonic() + 60), range(16)))
    assert texts == [f"page {i}" for i in range(16)] and 1 <= len(started) <= 2
    for child in started:
        child.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_a_parser_cannot_take_all_memory():
    parsers = Parsers(1)
    assert parsers.text(b"<p>A word.</p>", "text/html", time.monotonic() + 30) == "A word."
    child = parsers.idle.get()
    assert re.search(r"address space +2147483648 ", Path(f"/proc/{child.pid}/limits").read_text())
    child.kill()
