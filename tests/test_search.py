"""search.py: the corpus, and each backend against real loopback servers."""

import time
from collections import Counter
from dataclasses import replace

import pytest

from deepresearcher_min import search
from deepresearcher_min.config import ConfigError, load_config
from deepresearcher_min.search import Corpus, SearchResult, check_search, make_search
from deepresearcher_min.web import WebFailure

pytestmark = pytest.mark.quick
DOCUMENTS = [
    ("Amra Sool", "toy:amra-sool", "Amra Sool was born in Velden. Amra Sool wrote The Red Door."),
    ("Velden", "toy:velden", "Velden is a city on the river Ost."),
    ("Ost", "toy:ost", "The Ost is a river."),
]


def test_best_document_first_and_only_documents_that_share_a_word():
    corpus = Corpus(DOCUMENTS)
    assert [r.url for r in corpus.search("Where was Amra Sool born?", 10)] == ["toy:amra-sool"]
    assert [r.url for r in corpus.search("river Ost", 1)] == ["toy:ost"]
    assert corpus.search("zebra", 10) == []
    assert corpus.search("", 10) == []
    assert corpus.search("the", 10) != []  # a query of function words only is still a query
    assert corpus.page("toy:velden") == DOCUMENTS[1][2]
    assert corpus.page("https://elsewhere.example/") is None


def test_snippets_come_from_the_callback_or_from_the_beginning_of_the_text():
    assert Corpus(DOCUMENTS, snippet=lambda i: f"number {i}").search("Velden city", 1)[0].snippet == "number 1"
    long = Corpus([("Long", "toy:long", "word " * 200)]).search("long", 1)[0].snippet
    assert len(long) <= search.SNIPPET_CHARS + 4 and long.endswith("word ...")


def test_equal_scores_keep_corpus_order():
    corpus = Corpus([(f"Page {i}", f"toy:{i}", "Same words in every page.") for i in range(40)])
    assert [r.url for r in corpus.search("same words", 5)] == [f"toy:{i}" for i in range(5)]


def test_toy_size_query_is_cheap():
    corpus = Corpus(
        [(f"Person {i}", f"toy:{i}", f"Person {i} was born in City {i % 50} and wrote.") for i in range(250)]
    )
    start = time.process_time()
    for i in range(300):
        corpus.search(f"where was Person {i % 250} born", 2)
    assert (time.process_time() - start) / 300 < 0.001  # 0.1 ms measured; the limit leaves room for a loaded machine


def test_index_is_built_once_and_read_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "INDEX_CACHE", tmp_path / "cache")
    file = tmp_path / "corpus.jsonl"
    file.write_text(
        '{"title": "Velden", "url": "u:1", "text": "A city."}\n\n{"title": "Ost", "url": "u:2", "text": "A river."}\n'
    )
    first = Corpus.from_jsonl(file).search("river", 3)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(search, "save_index", lambda *_: pytest.fail("the index was built again"))
    assert Corpus.from_jsonl(file).search("river", 3) == first == [SearchResult("Ost", "u:2", "A river.")]


@pytest.mark.parametrize("line", ["not json", '{"title": "x"}', "[1]"])
def test_a_bad_line_of_the_corpus_is_named(tmp_path, line):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"title": "a", "url": "u", "text": "t"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        Corpus.from_jsonl(file)


def test_local_search_counts_and_says_when_nothing_was_found():
    config = load_config(["--preset=toy"])
    backend, counts = make_search(config, None, Corpus(DOCUMENTS)), Counter()
    assert backend.search("Velden", counts)[0].title == "Velden"
    with pytest.raises(WebFailure) as failure:
        backend.search("zebra", counts)
    assert failure.value.words == "Nothing was found for this query."
    assert counts == {"searches": 2, "fail_no_results": 1}


def test_a_missing_corpus_is_found_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="corpus"):
        check_search(replace(load_config(["--preset=wiki"]), corpus="/nowhere.jsonl"))
