"""browse.py: page text, segments, readers, and whole pages from corpus and web."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepresearcher_min.browse import ExtractiveReader, browse, make_reader, segments
from deepresearcher_min.config import load_config
from deepresearcher_min.search import Corpus
from deepresearcher_min.web import WebFailure

pytestmark = pytest.mark.quick
TOY = load_config(["--preset=toy"])
PAGE = "Amra Sool is a writer. She was born in Velden. Her cat is grey."


async def inline(function, *args):
    return function(*args)


def read_page(url, question, corpus, memory=None, config=TOY):
    memory = [] if memory is None else memory
    counts = Counter()
    reader = make_reader(config, None)
    coroutine = browse(
        url, question, memory,
        config=config, web=None, corpus=corpus, reader=reader, counts=counts, in_thread=inline,
    )  # fmt: skip
    return asyncio.run(coroutine), counts


def test_corpus_page_gives_the_sentences_that_answer():
    memory = []
    notes, counts = read_page("toy:amra", "Where was Amra Sool born?", Corpus([("Amra", "toy:amra", PAGE)]), memory)
    assert notes == [(0, "Amra Sool is a writer. She was born in Velden.")]
    assert memory == ["Amra Sool is a writer. She was born in Velden."]
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


def test_extractive_reader_returns_nothing_where_nothing_is_shared():
    notes = asyncio.run(ExtractiveReader().read("zebra?", PAGE, [], Counter()))
    assert notes.information == ""
