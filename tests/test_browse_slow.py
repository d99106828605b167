"""browse.py, the part that takes long: pages far larger than real ones, thousands of mutated real
pages, and parsers that are replaced.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_pages import ARTICLE, HTML, PAGES, fuzz, needs_pages, page

from deepresearcher_min import browse as browse_module
from deepresearcher_min.browse import Parsers, main_text
from deepresearcher_min.web import WebFailure

pytestmark = pytest.mark.slow


@needs_pages
def test_thousands_of_mutated_real_pages():
    rows = [json.loads(line) for line in (PAGES / "pages.jsonl").read_text().splitlines()]
    fuzz(
        [(PAGES / "files" / row["file"]).read_bytes() for row in rows if row["bytes"] < 100_000],
        3000,
    )


def test_a_hundred_thousand_nested_tags_and_ten_megabytes():
    assert main_text(b"<div>" * 100_000 + b"hello" + b"</div>" * 100_000, "text/html") == "hello"
    big = (
        b"<html><body>"
        + b"<p>A sentence that is long enough to be kept as a paragraph.</p>" * 160_000
    )
    assert main_text(big, "text/html").count("A sentence") > 100_000


# --- parsers in child processes


def test_a_parser_that_takes_too_long_or_dies_is_replaced():
    own = Parsers(1)
    body = page(ARTICLE).encode()
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)
    heavy = (
        b"<html><body>"
        + b"<p>Some words that are <a href=b>long</a> enough to be read by it.</p>" * 50_000
    )
    start = time.monotonic()
    with pytest.raises(WebFailure, match="unreadable"):
        own.text(heavy, HTML, start + 0.2)
    assert time.monotonic() - start < 1.0
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)
    child = own.idle.get()
    child.kill()
    child.wait()
    own.idle.put(child)
    # One that died meanwhile harms no page.
    assert "Velden" in own.text(body, HTML, time.monotonic() + 30)
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
        texts = list(
            threads.map(
                lambda i: own.text(b"page %d" % i, "text/plain", time.monotonic() + 60), range(16)
            )
        )
    assert texts == [f"page {i}" for i in range(16)] and 1 <= len(started) <= 2
    for child in started:
        child.communicate()
