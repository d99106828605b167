"""`blocked_hosts`: what search shows, what may be opened, where a redirect leads, and what is said
about it.
"""

import time
from collections import Counter
from dataclasses import replace

import pytest
from loopback import CONFIG, Server, lead_to
from scripted import (
    Scripted,
    answer_turn,
    browse_turn,
    make_agent,
    observation,
    one,
    search_turn,
    turns,
    with_source,
)

import eval as evaluation
from deepresearcher_min.config import ConfigError, host_list, load_config
from deepresearcher_min.corpus import Corpus, SearchResult
from deepresearcher_min.search import make_search
from deepresearcher_min.web import WebFailure, is_blocked

pytestmark = pytest.mark.quick
SETS = host_list(load_config(["--blocked_hosts=sets.example Bücher.Example."]))

AT_BLOCKED_HOSTS = """
http://sets.example https://sets.example/ https://sets.example:8443/x http://SETS.Example/a
http://sets.example./a http://sets.example../a https://a.b.sets.example/x?y#z
http://user:word@sets.example/ http://a@b@sets.example/ //sets.example/x sets.example/x sets.example
sets.example:80/x http:\\\\sets.example\\x http://sets.example?q=//other.example
http://sets%2Eexample/ http://s%65ts.example/ http://sets。example/ http://ｓｅｔｓ.example/
http://bücher.example/ http://BÜCHER.example./ http://xn--bcher-kva.example/
http://www.bücher.example:80/ http://se\u00adts.example/
"""
ELSEWHERE = """
http://notsets.example/ http://sets.example.org/ http://sets-example/ http://example/
http://other.example/sets.example http://other.example/?u=http://sets.example
http://other.example/#@sets.example http://sets.example@other.example/
http://other.example:80/sets.example http://b\u00fccher.example.org/ passage:12 http://[::1
http://..../ http://[sets.example
"""


@pytest.mark.parametrize("url", AT_BLOCKED_HOSTS.split())
def test_every_spelling_of_a_blocked_host(url):
    assert is_blocked(url, SETS) and is_blocked(f" {url} ", SETS) and not is_blocked(url, [])


@pytest.mark.parametrize(
    "url", [*ELSEWHERE.split(), "", "http://", "http://" + "a" * 100 + ".example/"]
)
def test_other_hosts_stay(url):
    assert not is_blocked(url, SETS)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("https://sets.example", "https://sets.example"),
        ("a.example sets.example:443", "sets.example:443"),
        ("*.sets.example", "*.sets.example"),
        ("a.example,b.example", "a.example,b.example"),
        ("atuo", "atuo"),
        ("auto sets.example", "auto"),
        ("none none", "none"),
        ("", ""),
        ("  ", ""),
        ("a..example", "a..example"),
        ("sets.example/path", "sets.example/path"),
        ("me@sets.example", "me@sets.example"),
        ("...", "..."),
    ],
)
def test_words_that_are_no_hosts_are_refused(value, word, capsys):
    with pytest.raises(ConfigError, match="blocked_hosts=") as error:
        load_config([f"--blocked_hosts={value}"])
    assert repr(word) in str(error.value) and "huggingface.co" in str(error.value)
    assert evaluation.main(["--preset=toy", "--model=toy", f"--blocked_hosts={value}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_auto_is_a_list_for_eval_and_nothing_for_train():
    hosts = host_list(evaluation.resolve(["--preset=toy", "--model=toy"]))
    assert len(hosts) > 5 and len(set(hosts)) == len(hosts)
    assert is_blocked("https://datasets-server.huggingface.co/rows?dataset=x", hosts)
    assert not is_blocked("https://nothuggingface.co/", hosts) and not is_blocked(
        "https://en.wikipedia.org/", hosts
    )
    assert host_list(load_config(["--preset=toy"])) == []
    for value in ("none", "sets.example"):
        config = evaluation.resolve(["--preset=toy", "--model=toy", f"--blocked_hosts={value}"])
        assert host_list(config) == host_list(load_config([f"--blocked_hosts={value}"]))


def test_a_stopped_evaluation_goes_on_with_the_list(tmp_path):
    folder = tmp_path / "eval"
    assert evaluation.main(["--preset=toy", "--model=toy", "--limit=1", f"--run_dir={folder}"]) == 0
    for typed in ([], ["--blocked_hosts=auto"]):
        assert "huggingface.co" in host_list(evaluation.resolve([f"--resume={folder}", *typed]))
    assert host_list(evaluation.resolve([f"--resume={folder}", "--blocked_hosts=none"])) == []


RESULTS = {
    "searchParameters": {},
    "organic": [
        {
            "title": "The question, answered",
            "link": "https://www.Sets.example/rows",
            "snippet": "It is 42.",
        },
        {"title": "A page", "link": "https://other.example/page", "snippet": "About it."},
    ],
}


def test_results_are_dropped_and_the_recording_stays_whole(open_web, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "key")
    with Server({"/search": (200, {}, RESULTS)}) as server:
        config = replace(
            CONFIG, search="serper", search_url=server.url, blocked_hosts="sets.example"
        )
        web, counts = open_web(blocked_hosts="sets.example"), Counter()
        assert [found.title for found in make_search(config, web, None)("it", counts)] == ["A page"]
        assert counts["blocked"] == 1
        free, counts = replace(config, blocked_hosts="none"), Counter()
        assert len(make_search(free, web, None)("it", counts)) == 2  # recorded, not dropped
        assert "blocked" not in counts and server.requests["/search"] == 1
        hasty = replace(config, blocked_hosts="sets.example other.example")
        with pytest.raises(WebFailure, match="Nothing was found"):
            make_search(hasty, web, None)("it", counts)
        assert counts["blocked"] == 2 and server.requests["/search"] == 1


def test_a_corpus_is_filtered_too():
    corpus = Corpus(
        [
            ("Rows", "https://sets.example/rows", "apples"),
            ("Page", "https://other.example/", "apples"),
        ]
    )
    config = replace(CONFIG, search="local", blocked_hosts="sets.example")
    assert [found.title for found in make_search(config, None, corpus)("apples", Counter())] == [
        "Page"
    ]


def test_a_browse_call_is_refused_in_words_whatever_was_shown():
    engine = Scripted(
        turns(search_turn("it"), browse_turn("https://sets.example./rows"), answer_turn())
    )
    agent = make_agent(engine, blocked_hosts="sets.example")
    with_source(
        agent, lambda query: [SearchResult("Rows", "https://sets.example./rows", "It is 42.")]
    )
    trajectory = one(agent)
    (entry,) = observation(trajectory, 1)
    assert "blocked" in entry["information"][0]["page_summary"]
    assert trajectory.cost["fail_page_blocked_host"] == 1 and "pages" not in trajectory.cost


def test_a_redirect_ends_at_a_blocked_host(open_web, monkeypatch):
    lead_to(monkeypatch, "127.0.0.1")
    with Server({"/rows": (200, {}, b"<p>42</p>")}) as server:
        port = server.http.server_port
        for target in (f"http://sets.example:{port}/rows", f"//WWW.sets.example.:{port}/rows"):
            server.pages["/page"] = (302, {"Location": target}, b"")
            web = open_web(blocked_hosts="sets.example")
            with pytest.raises(WebFailure, match="This host is blocked") as failure:
                web.fetch(f"http://other.example:{port}/page", Counter(), time.monotonic() + 2)
            assert failure.value.kind == "blocked_host"
        assert not server.requests["/rows"]
        body, _ = open_web().fetch(
            f"http://other.example:{port}/page", Counter(), time.monotonic() + 2
        )
        assert body == b"<p>42</p>"  # nothing is blocked: the redirect is followed


def test_services_of_the_operator_are_not_blocked(open_web):
    with Server({"/": (200, {}, b"{}")}) as server:
        web = open_web(blocked_hosts="127.0.0.1")
        assert web.fetch_json(server.url, {}, None, Counter(), time.monotonic() + 2) == {}
        with pytest.raises(WebFailure, match="blocked"):
            web.fetch(server.url, Counter(), time.monotonic() + 2)
