"""The tools at the rollout's edge: what fails, hangs or lies there becomes words and a number."""

import random
import time

import pytest
from scripted import (
    PERSON,
    Scripted,
    answer_turn,
    batch,
    browse_turn,
    flat,
    make_agent,
    observation,
    one,
    questions,
    raising,
    search_turn,
    turns,
    with_source,
)

from deepresearcher_min import corpus
from deepresearcher_min.corpus import Corpus, SearchResult
from deepresearcher_min.rollout import roll_out
from deepresearcher_min.web import WebFailure

pytestmark = pytest.mark.quick


FAILURES = {
    "fail_search_quota": (
        lambda query: raising(WebFailure("quota", "The quota is used up."))(query),
        "The quota is used up.",
    ),
    "fail_search_timeout": (lambda query: time.sleep(1.5) or [], "took too long"),
    "fail_search_error": (raising(KeyError("a bug")), "failed"),
    "fail_search_error by garbage": (lambda query: [None, 7], "failed"),
}


def test_a_timeout_is_one_where_tools_have_no_threads_too():
    agent = make_agent(Scripted(turns(search_turn("bad"), answer_turn())), tool_threads=0)
    with_source(agent, raising(TimeoutError()))
    assert one(agent).cost["fail_search_timeout"] == 1


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_or_hanging_search_is_an_observation_and_a_counter(name, monkeypatch):
    monkeypatch.setattr("deepresearcher_min.rollout.GRACE", 0.4)
    answer, words = FAILURES[name]
    agent = make_agent(
        Scripted(turns(search_turn("bad", "good"), answer_turn())), tool_threads=2, tool_timeout=0.1
    )
    good = [SearchResult("Title", "https://a.example/", "Summary")]
    with_source(agent, lambda query: answer(query) if query == "bad" else good)
    trajectory = one(agent)
    bad, fine = observation(trajectory)
    assert trajectory.stop_reason == "answer"
    assert words in bad["web_page_info_list"][0]["quick_summary"]
    assert fine["web_page_info_list"] == [
        {"quick_summary": "Summary", "title": "Title", "url": "https://a.example/"}
    ]
    assert trajectory.cost["searches"] == 2 and trajectory.cost[name.split()[0]] == 1
    agent.tools.close()


def test_only_shown_addresses_are_opened_and_a_failed_page_says_why():
    known = corpus.url_of(PERSON)
    write = turns(
        browse_turn(known),
        search_turn(),
        browse_turn(known, "https://toy.example/none"),
        answer_turn(),
    )
    trajectory = one(make_agent(Scripted(write)))
    assert "No search has shown" in observation(trajectory)[0]["information"][0]["page_summary"]
    shown, unknown = observation(trajectory, 2)
    assert "No search has shown" not in str(shown) and "No search has shown" in str(unknown)
    assert trajectory.cost["fail_page_unknown_url"] == 2 and trajectory.cost["pages"] == 1
    assert trajectory.stop_reason == "answer"
    write = turns(search_turn(), browse_turn("https://gone.example/"), answer_turn())
    agent = make_agent(Scripted(write))
    with_source(agent, lambda query: [SearchResult("Title", "https://gone.example/", "Summary")])
    trajectory = one(agent)
    assert observation(trajectory, 1)[0]["information"] == [
        {"page_number": 0, "page_summary": "There is no page at this address."}
    ]
    assert trajectory.cost["fail_page_not_found"] == 1


def test_what_another_trajectory_was_shown_is_not_shown():
    first = {"1/0/0": [search_turn(), answer_turn()], "1/1/0": [browse_turn(), answer_turn()]}
    engine = Scripted(
        lambda request_id, turn: first[request_id][turn],
        lambda name, turn: 9 if name == "1/1/0" else 1,
    )
    _, second = flat(roll_out(batch(2), make_agent(engine)))
    assert second.cost["fail_page_unknown_url"] == 1


def test_tools_share_their_threads_and_waiting_for_one_is_not_held_against_them(
    monkeypatch,
):
    monkeypatch.setattr("deepresearcher_min.rollout.GRACE", 0.5)
    engine = Scripted(
        turns(search_turn("a", "b", "c"), answer_turn()),
        lambda name, turn: random.Random(name).randint(1, 9),
    )
    agent = make_agent(engine, tool_threads=4, tool_timeout=0.2)
    source = with_source(
        agent, lambda query: time.sleep(0.05) or [SearchResult("T", "https://a.example/", "S")]
    )
    trajectories = flat(roll_out(batch(20), agent))  # 60 searches, 4 at once: 0.75 s
    assert source.most_at_once == 4
    assert not any("fail_search_timeout" in t.cost for t in trajectories)
    assert {t.stop_reason for t in trajectories} == {"answer"}
    assert engine.most_running > 4
    agent.tools.close()


def test_pages_beyond_the_limit_of_a_call_are_named_and_queries_are_not():
    urls = [f"https://{i}.example/" for i in range(6)]
    corpus = Corpus(
        [(f"T{i}", url, f"Page {i}, {questions(1)[0].text}") for i, url in enumerate(urls)]
    )
    write = turns(search_turn(*"abcde"), browse_turn(*urls), browse_turn(*urls[4:]), answer_turn())
    trajectories = {}
    for most in (3, 4, 0):
        agent = make_agent(Scripted(write), corpus, max_urls=most, max_observation_tokens=4000)
        with_source(agent, lambda query: [SearchResult("T", url, "S") for url in urls])
        trajectories[most] = one(agent)
    assert [entry["search_query"] for entry in observation(trajectories[3], 0)] == ["a", "b", "c"]
    for most, opened in ((3, 3), (4, 4), (0, 6)):
        entries = observation(trajectories[most], 1)
        assert [entry["url"] for entry in entries] == urls
        words = [entry["information"][0]["page_summary"] for entry in entries]
        assert [f"not opened: one call opens at most {most}" in each for each in words] == [
            False
        ] * opened + [True] * (6 - opened)
        assert all(
            set(entry["information"][0]) == {"page_number", "page_summary"} for entry in entries
        )
    later = observation(trajectories[4], 2)  # not opened is not read
    assert [entry["information"][0]["page_summary"][:6] for entry in later] == ["Page 4", "Page 5"]
    assert trajectories[4].cost["pages"] == 6


def test_hundreds_of_addresses_stay_inside_the_budget_of_an_observation():
    urls = [f"https://{i}.example/" for i in range(60)]
    trajectory = one(
        make_agent(Scripted(turns(browse_turn(*urls), answer_turn())), max_observation_tokens=2000)
    )
    start, end = trajectory.turns[0].observed
    assert end - start <= 2000 and "too long" in trajectory.turns[0].observation
