"""browse.py: page text, segments, readers, and whole pages from corpus and web."""

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import Server

from deepresearcher_min import browse as browse_module
from deepresearcher_min.browse import (
    Notes,
    Parsers,
    browse,
    decode,
    extract,
    main_text,
    make_reader,
    parse_notes,
    segments,
)
from deepresearcher_min.config import ROOT, ConfigError, load_config
from deepresearcher_min.search import Corpus
from deepresearcher_min.web import Web, WebFailure

pytestmark = pytest.mark.quick
TOY = load_config(["--preset=toy"])
PAGE = "Amra Sool is a writer. She was born in Velden. Her cat is grey."


async def inline(function, *args):
    return function(*args)


def read_page(url, question, corpus, memory=None, config=TOY, web=None, reader=None):
    memory = [] if memory is None else memory
    counts = Counter()
    reader = reader or make_reader(config, web)
    coroutine = browse(
        url, question, memory,
        config=config, web=web, corpus=corpus, reader=reader, counts=counts, in_thread=inline,
    )  # fmt: skip
    return asyncio.run(coroutine), counts


def test_corpus_page_gives_the_sentences_that_answer():
    memory = []
    notes, counts = read_page("toy:amra", "Where was Amra Sool born?", Corpus([("Amra", "toy:amra", PAGE)]), memory)
    assert notes == [(0, "Amra Sool is a writer. She was born in Velden.")]
    assert counts == {"pages": 1}


def test_unknown_page_and_useless_page_are_failures_in_words():
    corpus = Corpus([("Amra", "toy:amra", PAGE)])
    for url, question, kind in (("toy:nobody", "Amra", "not_found"), ("toy:amra", "zebra?", "no_information")):
        with pytest.raises(WebFailure) as failure:
            read_page(url, question, corpus)
        assert failure.value.kind == kind and failure.value.words.endswith(".")


@given(st.text(alphabet="ab .\n", max_size=400), st.integers(5, 60))
def test_segments_lose_only_white_space(text, size):
    pieces = segments(text, size)
    assert all(0 < len(piece) <= size for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_segments_prefer_paragraph_borders():
    assert segments("a" * 60 + "\n\n" + "b. " * 20, 100) == ["a" * 60, ("b. " * 20).strip()]
    assert segments("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_a_long_text_is_cut_in_linear_time():
    start = time.process_time()
    assert sum(map(len, segments("word " * 1_000_000, 8000))) > 4_900_000
    assert time.process_time() - start < 0.3  # 0.01 s measured


def test_extractive_reader_returns_nothing_where_nothing_is_shared():
    notes = asyncio.run(extract("zebra?", PAGE, [], None))
    assert notes.information == ""


# --- pages to text

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
    kept, absent, f1 = [], [], []
    for row, body in real_pages():
        text = main_text(body, "text/html")
        line = " ".join(text.split())
        kept += [" ".join(wanted.split()) in line for wanted in row.get("must_contain", [])]
        absent += [" ".join(unwanted.split()) not in line for unwanted in row.get("must_not_contain", [])]
        if "expected_text" in row:
            expected, got = Counter(re.findall(r"\w+", row["expected_text"])), Counter(re.findall(r"\w+", text))
            f1.append(2 * (expected & got).total() / (expected.total() + got.total()))
    assert sum(kept) / len(kept) >= 0.97
    assert sum(absent) / len(absent) >= 0.84
    assert sum(f1) / len(f1) >= 0.94


# --- parsers in child processes


def test_a_parser_that_takes_too_long_or_dies_is_replaced():
    own = Parsers(1)
    body = page(ARTICLE).encode()
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)
    heavy = b"<html><body>" + b"<p>Some words that are <a href=b>long</a> enough to be read by it.</p>" * 50_000
    start = time.monotonic()
    with pytest.raises(WebFailure, match="unreadable"):
        own.text(heavy, HTML, start + 0.5)
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
    started, start = [], subprocess.Popen

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


# --- readers


def test_notes_are_read_from_tidy_and_untidy_replies():
    assert parse_notes("CONTINUE: yes\nNOTES: Born in Velden.") == Notes("Born in Velden.", True)
    assert parse_notes("NOTES: Born in Velden.\nCONTINUE: no") == Notes("Born in Velden.", False)
    assert parse_notes("<think>hm</think>**Continue**: No\n**Notes:** none") == Notes("", False)
    assert parse_notes("She was born in Velden.") == Notes("She was born in Velden.", False)
    assert parse_notes("") == parse_notes("none.") == Notes("", False)
    told = "The talks continue. No date is known."
    assert parse_notes(f"CONTINUE: yes\nNOTES: {told}") == Notes(told, True)
    assert parse_notes(f"NOTES: {told}\nCONTINUE: yes") == Notes(told, True)


class Scripted:
    """An engine that says what a script says."""

    def __init__(self, *replies):
        self.replies, self.prompts = list(replies), []

    async def __call__(self, messages):
        self.prompts.append(messages)
        return self.replies.pop(0)


def long_page(parts):
    return Corpus([("Long", "toy:long", "\n\n".join(f"Part {i}. " + "word " * 20 for i in range(parts)))])


def test_the_reader_goes_on_while_it_wants_to_remembers_and_stops_at_the_last_segment():
    config = replace(TOY, reader="engine", segment_chars=120, max_segments=4)
    engine, memory = (
        Scripted("CONTINUE: yes\nNOTES: A.", "CONTINUE: yes\nNOTES: none", "CONTINUE: no\nNOTES: C."),
        ["before"],
    )
    notes, _ = read_page("toy:long", "q", long_page(9), memory, config, reader=make_reader(config, None, engine))
    assert notes == [(0, "A."), (2, "C.")] and memory == ["before"]
    assert "Part 0" in engine.prompts[0][1]["content"] and "before\nA." in engine.prompts[1][1]["content"]
    always = Scripted(*["CONTINUE: yes\nNOTES: More."] * 9)
    for parts, read in ((9, 4), (2, 2)):
        notes, _ = read_page("toy:long", "q", long_page(parts), [], config, reader=make_reader(config, None, always))
        assert len(notes) == read


def completion(text, **usage):
    return 200, {}, {"choices": [{"message": {"content": text}}], **usage}


@pytest.fixture
def live(tmp_path, monkeypatch):
    """(server, config, web) of a live page and a reading model, both on loopback."""
    monkeypatch.setenv("READER_API_KEY", "secret-key")
    with Server({"/page": (200, {}, page(f"<article>{ARTICLE}</article>").encode())}) as server:
        config = replace(
            load_config(["--preset=paper"]), reader="openai", reader_url=server.url + "/v1", reader_model="m",
            price_reader_token=0.01, allow_private_hosts=True, max_retries=0, read_timeout=2.0, segment_chars=600,
        )  # fmt: skip
        web = Web(config, tmp_path / "cassette.sqlite")
        yield server, config, web
        web.close()


def test_openai_reader_asks_pays_and_caches_by_content(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion("CONTINUE: no\nNOTES: The Ost.", usage={"total_tokens": 50})
    for round_ in range(2):
        notes, counts = read_page(server.url + "/page", "Which river?", None, [], config, web)
        assert notes == [(0, "The Ost.")]
        assert counts["pages"] == 1 and counts["reader_tokens"] == (0 if round_ else 50)
        assert counts["cache_hits"] == (2 if round_ else 0) and counts["usd"] == (0 if round_ else 0.5)
    _, headers, body = server.sent[1]
    assert headers["Authorization"] == "Bearer secret-key"
    assert json.loads(body)["model"] == "m" and "Which river?" in json.loads(body)["messages"][1]["content"]
    replay = Web(replace(config, cassette_mode="replay"), web.cassette)
    before = sum(server.requests.values())
    assert read_page(server.url + "/page#part", "Which river?", None, [], config, replay)[0] == [(0, "The Ost.")]
    with pytest.raises(WebFailure, match="replay_miss"):
        read_page(server.url + "/other", "Which river?", None, [], config, replay)
    assert sum(server.requests.values()) == before
    replay.close()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [((200, {}, {}), "bad_reply"), ((200, {}, b"oops"), "bad_reply"), (completion(None), "bad_reply"),
     ((401, {}, b""), "unauthorized"), ((500, {}, b""), "http_500"), (completion("none"), "no_information")],
)  # fmt: skip
def test_a_reader_that_fails_is_a_failure_in_words(live, reply, kind):
    server, config, web = live
    server.pages["/v1/chat/completions"] = reply
    with pytest.raises(WebFailure) as failure:
        read_page(server.url + "/page", "Which river?", None, [], config, web)
    assert failure.value.kind == kind and failure.value.words.endswith(".")


def test_notes_taken_before_a_failure_are_kept(live):
    server, config, web = live
    first = completion("CONTINUE: yes\nNOTES: First.")
    server.pages["/v1/chat/completions"] = lambda number: first if number == 1 else (500, {}, b"")
    notes, counts = read_page(server.url + "/page", "q", None, [], config, web)
    assert notes == [(0, "First.")] and counts["fail_http_500"] == 1


def test_a_slow_reader_meets_the_deadline_of_the_call(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = lambda _: server.over.wait(3) or completion("late")
    start = time.monotonic()
    with pytest.raises(WebFailure, match="timeout"):
        read_page(server.url + "/page", "q", None, [], replace(config, tool_timeout=1.0), web)
    assert time.monotonic() - start < 1.5
    replay = Web(replace(config, cassette_mode="replay"), web.cassette)
    time.sleep(0.5)  # a reply that comes too late is not what is recorded
    with pytest.raises(WebFailure, match="timeout"):
        read_page(server.url + "/page", "q", None, [], replace(config, tool_timeout=1.0), replay)
    replay.close()


def test_a_reader_waits_in_the_thread_that_tools_are_given_and_counts_tokens_as_it_can(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion("NOTES: The Ost.", usage={"prompt_tokens": 7})
    asked = []

    async def in_thread(function, *args):
        asked.append(function.__name__)
        return function(*args)

    reader, counts = make_reader(config, web), Counter()
    call = dict(config=config, web=web, corpus=None, reader=reader, counts=counts, in_thread=in_thread)
    assert asyncio.run(browse(server.url + "/page", "Which river?", [], **call)) == [(0, "The Ost.")]
    assert asked == ["fetch_text", "cached"] and counts["reader_tokens"] > 100


def test_live_pages_that_cannot_be_read_say_so(live):
    server, config, web = live
    config = replace(config, reader="extractive")
    server.pages["/empty"] = (200, {}, b"<html><body></body></html>")
    server.pages["/script"] = (200, {}, b"<html><body><script>render()</script></body></html>")
    for path, kind in (
        ("/empty", "no_text"),
        ("/script", "no_text"),
        ("/missing", "http_404"),
        ("/fault/picture", "content_type"),
    ):
        with pytest.raises(WebFailure) as failure:
            read_page(server.url + path, "q", None, [], config, web)
        assert failure.value.kind == kind
    notes, counts = read_page(server.url + "/page", "Where does the Ost rise?", None, [], config, web)
    assert "Velden" in notes[0][1] and counts["bytes"] > 0


def test_readers_say_what_they_lack(monkeypatch):
    monkeypatch.delenv("READER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="engine"):
        make_reader(replace(TOY, reader="engine"), None)
    with pytest.raises(ConfigError, match="reader_url"):
        make_reader(replace(TOY, reader="openai"), None)
    with pytest.raises(ConfigError, match="READER_API_KEY"):
        make_reader(replace(TOY, reader="openai", reader_url="http://x/v1", reader_model="m"), object())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_a_parser_cannot_take_all_memory():
    parsers = Parsers(1)
    assert parsers.text(b"<p>A word.</p>", "text/html", time.monotonic() + 30) == "A word."
    child = parsers.idle.get()
    assert re.search(r"address space +2147483648 ", Path(f"/proc/{child.pid}/limits").read_text())
    child.kill()
