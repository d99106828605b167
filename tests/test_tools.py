"""The tools at the rollout's edge: what fails, hangs or lies becomes words and a counter."""

import asyncio
import random
import time

import pytest
from scripted import (
    CHAT,
    PERSON,
    Scripted,
    answer_turn,
    batch,
    browse_turn,
    completion,
    flat,
    make_agent,
    never,
    observation,
    one,
    questions,
    raising,
    same,
    search_turn,
    turns,
    with_source,
)

from deepresearcher_min import toyworld
from deepresearcher_min.protocol import Call
from deepresearcher_min.rollout import roll_out
from deepresearcher_min.search import Corpus, SearchResult
from deepresearcher_min.trajectory import Recording
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
    known = toyworld.url_of(PERSON)
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


async def tiring(reading, segment, counts, deadline):
    """Reads the first segment at once and the second one never to the end."""
    async with asyncio.timeout(deadline - time.monotonic()):
        if reading.notes:
            await asyncio.sleep(60)
    return "The first half.", True


def test_a_page_that_takes_too_long_gives_what_was_read_of_it():
    url = "https://long.example/"
    corpus = Corpus([(PERSON, url, "word " * 1000)])
    engine = Scripted(turns(search_turn(), browse_turn(url), answer_turn()))
    agent = make_agent(engine, corpus, tool_timeout=0.2, segment_chars=2000)
    agent.tools.browser.read = tiring
    trajectory = one(agent)
    assert observation(trajectory, 1) == [
        {"information": [{"page_number": 0, "page_summary": "The first half."}], "url": url}
    ]
    assert trajectory.cost["fail_page_timeout"] == 1


def test_the_engine_reads_pages_for_the_agent():
    url = "https://long.example/"
    corpus = Corpus([(PERSON, url, f"{PERSON} was here. " * 400)])
    agent_turns = [search_turn(), browse_turn(url), answer_turn()]
    notes = ["CONTINUE: yes\nNOTES: first", "CONTINUE: no\nNOTES: second"]

    def write(request_id: str, turn: int) -> str:
        return (
            notes[(int(request_id.removeprefix("reader/")) - 1) % 2]
            if "reader" in request_id
            else agent_turns[turn]
        )

    engine = Scripted(write)
    agent = make_agent(engine, corpus, reader="engine", segment_chars=3000, max_model_len=5000)
    trajectory = one(agent)
    assert [note["page_summary"] for note in observation(trajectory, 1)[0]["information"]] == [
        "first",
        "second",
    ]
    assert trajectory.stop_reason == "answer"
    assert trajectory.sampled_mask.sum() == sum(
        len(completion(turn).token_ids) for turn in agent_turns
    )
    readings = [
        (ids, sampling) for name, ids, sampling in engine.submitted if name.startswith("reader/")
    ]
    assert len(readings) == 2
    for ids, sampling in readings:
        assert sampling.temperature == 0 and len(ids) + sampling.max_tokens <= 5000
    assert "first" in CHAT.tokenizer.decode(readings[1][0])  # it remembers what it noted before
    engine.turns.clear()
    assert same(one(agent), trajectory)  # a second rollout with the same tools
    assert not engine.running


def test_a_segment_longer_than_the_context_leaves_the_reader_its_instructions():
    url = "https://long.example/"
    corpus = Corpus([(PERSON, url, f"{PERSON} was here. " * 400)])
    engine = Scripted(
        lambda name, turn: (
            "NOTES: none"
            if "reader" in name
            else [search_turn(), browse_turn(url), answer_turn()][turn]
        )
    )
    one(make_agent(engine, corpus, reader="engine", segment_chars=8000, max_model_len=4000))
    (asked,) = [ids for name, ids, _ in engine.submitted if name.startswith("reader/")]
    assert len(asked) == 3500
    text = CHAT.tokenizer.decode(asked)
    assert text.startswith(f"<|user|>Question: {questions(1)[0].text}") and text.endswith(
        "<|end|><|assistant|>"
    )


def test_tools_run_while_others_generate_in_at_most_tool_threads_and_waiting_for_one_is_not_held_against_them(
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


def test_notes_of_one_call_are_remembered_in_its_order_whichever_page_was_read_first():
    """And for the query that showed the page: what was noted for another one stays out."""
    asked: list[list[str]] = []

    async def slow(reading, segment, *_):
        asked.append(list(reading.memory))
        await asyncio.sleep(0.05 if "first" in segment else 0.0)
        return segment, False

    pages = {
        f"https://{name}.example/": f"{name} page"
        for name in ("first", "second", "third", "fourth", "other")
    }
    *four, other = pages
    agent = make_agent(Scripted(never), tool_threads=4)
    agent.tools.browser.corpus = Corpus([("T", url, text) for url, text in pages.items()])
    agent.tools.browser.read = slow
    record = Recording(questions(1)[0], [1])
    record.shown.update(dict.fromkeys(four, "one query") | {other: "another query"})

    async def calls():
        agent.tools.slots = asyncio.Semaphore(4)
        for urls in (four[:2], four[2:], [other]):
            agent.tools.remember(await agent.tools.use(Call("browse", tuple(urls)), record), record)

    asyncio.run(calls())
    assert asked == [[], [], ["first page", "second page"], ["first page", "second page"], []]
    agent.tools.close()


def test_pages_beyond_the_limit_of_a_call_are_named_and_queries_as_in_the_published_system_are_not():
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
