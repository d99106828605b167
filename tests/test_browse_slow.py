"""browse.py, the part that takes minutes: pages far larger than real ones, and thousands of mutated
real pages.
"""

import json

import pytest
from test_pages import PAGES, fuzz, needs_pages

from deepresearcher_min.browse import main_text

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
