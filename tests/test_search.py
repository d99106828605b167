"""search.py: the corpus, and each backend against real loopback servers."""

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from loopback import Server

from deepresearcher_min.config import ROOT, ConfigError, load_config
from deepresearcher_min.corpus import Corpus, SearchResult
from deepresearcher_min.search import check_search, make_search
from deepresearcher_min.web import Web, WebFailure

pytestmark = pytest.mark.quick
FIXTURES = ROOT.parent / "shared/data/serp_fixtures"
DOCUMENTS = [
    ("Amra Sool", "toy:amra-sool", "Amra Sool was born in Velden. Amra Sool wrote The Red Door."),
    ("Velden", "toy:velden", "Velden is a city on the river Ost."),
    ("Ost", "toy:ost", "The Ost is a river."),
]


def test_local_search_says_when_nothing_was_found():
    config = load_config(["--preset=toy"])
    local = make_search(config, None, Corpus(DOCUMENTS))
    assert local("Velden", Counter())[0].title == "Velden"
    with pytest.raises(WebFailure) as failure:
        local("zebra", Counter())
    assert (failure.value.kind, failure.value.words) == (
        "no_results",
        "Nothing was found for this query.",
    )


def test_a_missing_corpus_is_found_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="corpus"):
        check_search(replace(load_config(["--preset=wiki"]), corpus="/nowhere.jsonl"))


# --- services over HTTP

CONFIG = replace(load_config(["--preset=paper"]), max_retries=0, read_timeout=1.0, tool_timeout=3.0)
SERPER = {
    "searchParameters": {"q": "x"},
    "organic": [
        {
            "title": "One",
            "link": "https://one.example/",
            "snippet": "First.",
            "date": "Jan 1, 2024",
            "position": 1,
        },
        {"title": "No address", "snippet": "left out"},
        {"link": "https://two.example/"},
    ],
}
SEARXNG = {
    "results": [
        {"url": "https://one.example/", "title": "One", "content": "First."},
        {"title": "no url"},
    ]
}
WIKIPEDIA = {
    "query": {
        "search": [
            {
                "title": "C&A (shop)",
                "snippet": 'a <span class="searchmatch">shop</span> &amp; more',
                "pageid": 7,
            },
            {"title": "half an emoji \ud83d", "snippet": ""},
        ]
    }
}
RETRIEVER = {
    "result": [[{"document": {"id": "7", "contents": '"Ost"\nThe Ost is a river.'}, "score": 0.5}]]
}


class Site:
    """A backend, a server that plays its service, and the counters."""

    def __init__(self, name, reply, folder, **changes):
        path = {
            "serper": "/search",
            "searxng": "/search",
            "wikipedia": "/w/api.php",
            "retriever": "/retrieve",
        }[name]
        self.server = Server(
            {path: reply if isinstance(reply, tuple) or callable(reply) else (200, {}, reply)}
        )
        config = replace(CONFIG, search=name, search_url=self.server.url, **changes)
        self.web, self.counts = Web(config, folder / "cassette.sqlite"), Counter()
        self.search = make_search(config, self.web, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.web.close()
        self.server.__exit__()

    def failure(self, query="x"):
        with pytest.raises(WebFailure) as failure:
            self.search(query, self.counts)
        return failure.value


@pytest.fixture(autouse=True)
def serper_key(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")


@pytest.mark.parametrize(("country", "language"), [("", ""), ("us", "en"), ("", "de")])
def test_serper_is_sent_country_and_language_and_a_recording_for_others_does_not_answer(
    tmp_path, country, language
):
    place = {name: value for name, value in (("gl", country), ("hl", language)) if value}
    with Site("serper", SERPER, tmp_path, search_country=country, search_language=language) as site:
        site.search("Who?", Counter())
        assert json.loads(site.server.sent[-1][2]) == {"q": "Who?", "num": 10, **place}
        for other in (("", ""), ("us", "en"), ("", "de")):
            there = {"search_country": other[0], "search_language": other[1]}
            replay = Web(
                replace(site.web.config, cassette_mode="replay", **there), site.web.cassette
            )
            search = make_search(replay.config, replay, None)
            if other == (country, language):
                assert search("Who?", Counter())
            else:
                with pytest.raises(WebFailure, match="replay_miss"):
                    search("Who?", Counter())
            replay.close()


def test_serper_asks_as_documented_and_reads_what_is_there(tmp_path):
    with Site("serper", SERPER, tmp_path, search_results=10, price_search=0.5) as site:
        assert site.search("who?", site.counts) == [
            SearchResult("One", "https://one.example/", "First."),
            SearchResult("", "https://two.example/", ""),
        ]
        path, headers, body = site.server.sent[0]
        assert (path, headers["X-API-KEY"], json.loads(body)) == (
            "/search",
            "secret-key",
            {"q": "who?", "num": 10},
        )
        site.search("who?", site.counts)
        assert site.counts["requests"] == site.counts["cache_hits"] == 1
        assert site.counts["usd"] == 0.5
        assert b"secret-key" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_searxng_wikipedia_and_retriever(tmp_path):
    with Site("searxng", SEARXNG, tmp_path / "a") as site:
        assert site.search("a b?", site.counts) == [
            SearchResult("One", "https://one.example/", "First.")
        ]
        assert parse_qs(urlsplit(site.server.sent[0][0]).query) == {
            "q": ["a b?"],
            "format": ["json"],
        }
        assert site.search(" a\n b? ", site.counts) and site.counts["cache_hits"] == 1
        assert site.search("half an emoji \ud83d", site.counts)
    with Site("wikipedia", WIKIPEDIA, tmp_path / "b") as site:
        shop, emoji = (
            f"{site.server.url}/wiki/{name}" for name in ("C%26A_%28shop%29", "half_an_emoji_%3F")
        )
        found = [
            SearchResult("C&A (shop)", shop, "a shop & more"),
            SearchResult("half an emoji ?", emoji, ""),
        ]
        assert site.search("shop", site.counts) == found
    with Site("retriever", RETRIEVER, tmp_path / "c", search_results=3) as site:
        assert site.search("Ost", site.counts) == [
            SearchResult("Ost", "passage:7", "The Ost is a river.")
        ]
        assert json.loads(site.server.sent[0][2]) == {
            "queries": ["Ost"],
            "topk": 3,
            "return_scores": True,
        }
        assert "usd" not in site.counts or site.counts["usd"] == 0


SEARCH_R1 = {  # the documents of its own servers, and of others that speak its protocol
    "dense": {"document": {"id": "7", "contents": '"Ost"\nA river.'}, "score": 0.5},
    "dense, its corpus loaded with columns that this row lacks": {
        "document": {"id": 7, "contents": "Ost\nA river.", "url": None, "title": None},
        "score": 0.5,
    },
    "BM25": {
        "document": {"title": "Ost", "text": "A river.", "contents": '"Ost"\nA river.'},
        "score": 9,
    },
    "online": {"document": {"contents": '"Ost"\nA river.'}},
    "without scores": {"contents": '"Ost"\nA river.'},
    "text": {"document": '"Ost"\nA river.'},
    "only text": '"Ost"\nA river.',
    "address": {"document": {"url": "https://ost.example/", "title": "Ost", "text": "A river."}},
}


@pytest.mark.parametrize("kind", SEARCH_R1)
def test_every_retriever_of_search_r1_is_understood(tmp_path, kind):
    """A bad document costs only itself; an address without id is the same every time, and another
    for another text.
    """
    other = {"document": {"contents": "A brook."}}
    with Site(
        "retriever",
        {"result": [[SEARCH_R1[kind], {"document": {"error": 1}}, None, other]]},
        tmp_path,
    ) as site:
        found, brook = site.search("Ost", site.counts)
        assert (found.title, found.snippet, brook.title, brook.snippet) == (
            "Ost",
            "A river.",
            "",
            "A brook.",
        )
        expected = (
            "https://ost.example/"
            if kind == "address"
            else "passage:7"
            if "dense" in kind
            else found.url
        )
        assert found.url == expected != brook.url and re.fullmatch(
            "https://.*|passage:[0-9a-f]+", found.url
        )
    with Site("retriever", {"result": [[other, SEARCH_R1[kind]]]}, tmp_path / "b") as site:
        assert site.search("river", site.counts)[::-1] == [found, brook]


def test_rows_of_the_other_services_may_lack_what_is_optional(tmp_path):
    rows = {"query": {"search": [{"title": "Ost"}, {"title": "Ulm", "snippet": None}]}}
    with Site("wikipedia", rows, tmp_path / "a") as site:
        assert [(one.title, one.snippet) for one in site.search("x", site.counts)] == [
            ("Ost", ""),
            ("Ulm", ""),
        ]
    rows = {
        "results": [
            {"url": "https://a.example/"},
            {"url": "https://b.example/", "title": None, "content": None},
        ]
    }
    with Site("searxng", rows, tmp_path / "b") as site:
        assert [(one.title, one.snippet) for one in site.search("x", site.counts)] == [
            ("", ""),
            ("", ""),
        ]


NOTHING = {
    "serper": {"searchParameters": {}, "organic": []},
    "searxng": {"results": []},
    "wikipedia": {"query": {"search": []}},
    "retriever": {"result": [[]]},
}
STRANGE = [
    [],
    None,
    7,
    "text",
    {},
    {"error": {"info": "no"}},
    {"organic": 3, "results": 3, "query": 3, "result": 3},
    {"organic": [3], "results": [3], "query": {"search": [3]}, "result": [[3]]},
    {"result": [{"document": {"contents": "not a list for each query"}}]},
]


@pytest.mark.parametrize("name", ["serper", "searxng", "wikipedia", "retriever"])
def test_every_service_can_find_nothing_or_reply_nonsense(tmp_path, name):
    with Site(name, NOTHING[name], tmp_path / "nothing") as site:
        assert site.failure().words == "Nothing was found for this query."
    replies = iter(STRANGE)
    with Site(name, lambda _: (200, {}, next(replies)), tmp_path / "strange") as site:
        for number in range(len(STRANGE)):
            assert site.failure(f"query {number}").kind == "bad_reply", STRANGE[number]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((403, {}, {"message": "Unauthorized.", "statusCode": 403}), "unauthorized"),
        ((400, {}, {"message": "Not enough credits", "statusCode": 400}), "quota"),
        (
            (429, {"Retry-After": "900"}, {"message": "Too many requests", "statusCode": 429}),
            "rate_limited",
        ),
        ((502, {}, b"<html><h1>502 Bad Gateway</h1></html>"), "http_502"),
        ((200, {}, b"<html>a login page</html>"), "bad_reply"),
        ((200, {}, b'{"organic": [{"title": "cut o'), "bad_reply"),
        ((301, {"Location": "http://127.0.0.1/"}, b""), "http_301"),
    ],
)
def test_errors_of_a_service_have_names_and_words(tmp_path, reply, kind):
    with Site("serper", reply, tmp_path) as site:
        failure = site.failure()
        assert (
            failure.kind == kind
            and failure.words.endswith(".")
            and "secret-key" not in failure.words
        )


def test_requests_keep_to_the_rate_that_the_ranks_share(tmp_path):
    config = replace(CONFIG, search="serper", requests_per_second=80.0)
    with Server({"/search": (200, {}, SERPER)}) as server, ThreadPoolExecutor(8) as threads:
        config = replace(config, search_url=server.url)
        # Half of it: 40 a second.
        web = Web(config, tmp_path / "cassette.sqlite", rank=1, world_size=2)
        live, start = make_search(config, web, None), time.monotonic()
        list(threads.map(lambda i: live(f"query {i}", Counter()), range(8)))
        assert time.monotonic() - start >= 7 / 40
        hasty = make_search(replace(config, requests_per_second=0.1, tool_timeout=1.0), web, None)
        assert hasty("first", Counter())
        with pytest.raises(WebFailure, match="rate_limited"):
            hasty("second", Counter())
        web.close()


def test_missing_keys_and_addresses_are_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "")
    with pytest.raises(ConfigError, match="SERPER_API_KEY"):
        check_search(replace(CONFIG, search="serper"))
    check_search(replace(CONFIG, search="serper", cassette_mode="replay"))
    for name in ("searxng", "retriever"):
        with pytest.raises(ConfigError, match="search_url"):
            check_search(replace(CONFIG, search=name))
    check_search(replace(CONFIG, search="wikipedia"))


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the recorded responses of ../shared")
def test_recorded_responses_give_results_or_words(tmp_path):
    """All recordings, of foreign services too, served to the backends serper and searxng."""
    expected = {
        ("serper", "serper_search_olivia_wilde.json"): 9,
        ("serper", "serper_search_langgraph_2025.json"): 3,
        ("searxng", "searxng_python_infobox.json"): 2,
        ("searxng", "searxng_one_real_result.json"): 1,
        ("serper", "serper_search_no_organic.json"): "no_results",
        ("serper", "serper_search_organic_key_missing.json"): "no_results",
        ("searxng", "searxng_empty.json"): "no_results",
        ("serper", "serper_images_lion.json"): "no_results",
        ("serper", "serper_places_italian_restaurants_in_upper_e.json"): "no_results",
        ("serper", "serper_error_403_unauthorized.json"): "unauthorized",
        ("serper", "serper_error_429.json"): "rate_limited",
        ("serper", "serper_error_502_html.html"): "http_502",
        ("serper", "tavily_error_432_usage_limit.json"): "quota",
        ("serper", "bing_site_filter_devblogs_microsoft.com.json"): "bad_reply",
    }
    for name in ("serper", "searxng"):
        pages = iter(json.loads((FIXTURES / "INDEX.json").read_text()))
        now = {}

        def reply(_, pages=pages, now=now):
            now.update(next(pages))
            return now["http_status"], now["headers"], Path(FIXTURES / now["file"]).read_bytes()

        with Site(name, reply, tmp_path / name, max_retries=0) as site:
            for number in range(24):
                try:
                    outcome = len(site.search(f"query {number}", site.counts))
                except WebFailure as failure:
                    outcome = failure.kind
                assert outcome == expected.get((name, now["file"]), outcome), now["file"]
