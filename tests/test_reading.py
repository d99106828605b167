"""How the agent reads pages: who is told what, what is kept, where the next browse goes on."""

import asyncio
import re
import time
from collections.abc import Callable

import pytest
from scripted import (
    CHAT,
    PERSON,
    Scripted,
    answer_turn,
    browse_turn,
    completion,
    make_agent,
    never,
    observation,
    one,
    questions,
    same,
    search_turn,
    turns,
    with_source,
)

from deepresearcher_min.corpus import Corpus, SearchResult
from deepresearcher_min.protocol import Call
from deepresearcher_min.rollout import observe
from deepresearcher_min.trajectory import Recording
from deepresearcher_min.web import WebFailure

pytestmark = pytest.mark.quick


async def tiring(reading, segment, counts, deadline):
    """Reads the first segment at once and the second one never to the end."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            if reading.notes:
                await asyncio.sleep(60)
    except TimeoutError:
        raise WebFailure("timeout") from None
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
            await observe(Call("browse", tuple(urls)), record, agent)

    asyncio.run(calls())
    assert asked == [[], [], ["first page", "second page"], ["first page", "second page"], []]
    agent.tools.close()


def engine_reading(replies: Callable[[str], str], *agent_turns: str) -> tuple[Scripted, list[str]]:
    """An engine that plays the agent, and answers readings by replies(prompt); with the prompts, in
    order.
    """
    prompts: list[str] = []

    def write(request_id: str, turn: int) -> str:
        if not request_id.startswith("reader/"):
            return agent_turns[turn]
        prompts.append(
            CHAT.tokenizer.decode(
                next(ids for name, ids, _ in engine.submitted if name == request_id)
            )
        )
        return replies(prompts[-1])

    engine = Scripted(write)
    return engine, prompts


def words_of(prompt: str, name: str) -> str:
    """What stands behind `name` in the reader's prompt."""
    return re.search(rf"{name}:? (.*?)(?:\n\n|:\n)", prompt, re.DOTALL)[1]


LONG = "https://long.example/"


def long_agent(engine: Scripted, parts: int = 5, **changes):
    """An agent whose web is one page of several segments; every query finds it."""
    text = "\n\n".join(f"Part {i}. " + "word " * 30 for i in range(parts))
    config = {"reader": "engine", "segment_chars": 170, "max_tool_calls": 9} | changes
    agent = make_agent(engine, Corpus([("Title", LONG, text)]), **config)
    with_source(agent, lambda query: [SearchResult("Title", LONG, "Summary")])
    return agent


def pages_of(trajectory, turn: int) -> list[tuple[int, str]]:
    (entry,) = observation(trajectory, turn)
    return [(note["page_number"], note["page_summary"]) for note in entry["information"]]


def test_the_reader_is_told_question_query_segment_and_the_notes_for_that_query():
    def reply(prompt: str) -> str:
        number = words_of(prompt, "Page segment").split()[0]
        return f"CONTINUE: {'yes' if number in '13' else 'no'}\nNOTES: note {number}"

    browse = browse_turn(LONG)
    agent_turns = (
        search_turn("a first", "a second"),
        browse,
        browse,
        search_turn("a third"),
        browse,
        browse,
    )
    engine, prompts = engine_reading(reply, *agent_turns, answer_turn())
    trajectory = one(long_agent(engine))
    question = questions(1)[0].text
    told = [
        tuple(words_of(prompt, name) for name in ("Search query", "Page segment", "Earlier notes"))
        for prompt in prompts
    ]
    assert all(words_of(prompt, "Question") == question for prompt in prompts)
    assert told == [
        ("a second", "1 of 5", "none"),
        ("a second", "2 of 5", "note 1"),
        ("a second", "3 of 5", "note 1\nnote 2"),
        ("a second", "4 of 5", "note 1\nnote 2\nnote 3"),
        ("a third", "5 of 5", "none"),
    ]
    assert [pages_of(trajectory, turn) for turn in (1, 2, 4)] == [
        [(0, "note 1"), (1, "note 2")],
        [(2, "note 3"), (3, "note 4")],
        [(4, "note 5")],
    ]
    ((number, words),) = pages_of(trajectory, 5)
    assert (
        number == 0
        and "nothing is left" in words
        and trajectory.cost["fail_page_nothing_left"] == 1
    )


def test_a_browse_that_reads_so_many_segments_at_most_is_gone_on_with_by_the_next_one():
    engine, prompts = engine_reading(
        lambda prompt: "CONTINUE: yes\nNOTES: none",
        search_turn(),
        *[browse_turn(LONG)] * 4,
        answer_turn(),
    )
    trajectory = one(long_agent(engine, max_segments=2))
    assert [words_of(prompt, "Page segment") for prompt in prompts] == [
        f"{i} of 5" for i in (1, 2, 3, 4, 5)
    ]
    words = [pages_of(trajectory, turn)[0][1] for turn in (1, 2, 3, 4)]
    assert ["nothing about this" in each for each in words] == [
        True,
        True,
        True,
        False,
    ] and "left" in words[3]
    engine, prompts = engine_reading(
        lambda prompt: "CONTINUE: yes\nNOTES: none", search_turn(), browse_turn(LONG), answer_turn()
    )
    one(long_agent(engine, parts=30, max_segments=0))
    assert len(prompts) == 30


def test_a_failed_segment_is_read_again_and_one_that_did_not_fit_into_the_observation_too():
    replies = iter(
        [
            "CONTINUE: yes\nNOTES: first",
            "no",
            "CONTINUE: no\nNOTES: " + "second " * 40,
            "NOTES: third",
        ]
    )
    engine, prompts = engine_reading(
        lambda prompt: next(replies), search_turn(), *[browse_turn(LONG)] * 3, answer_turn()
    )
    agent = long_agent(engine, max_observation_tokens=300)
    real, calls = agent.tools.generate_text, []

    async def failing(messages):
        calls.append(messages)
        reply = await real(messages)
        if len(calls) == 2:
            raise WebFailure("timeout", "Too late.")
        return reply

    agent.tools.browser.generate_text = failing
    trajectory = one(agent)
    assert [words_of(prompt, "Page segment") for prompt in prompts] == [
        f"{i} of 5" for i in (1, 2, 2, 2)
    ]
    assert pages_of(trajectory, 1) == [(0, "first")] and trajectory.cost["fail_page_timeout"] == 1
    assert "too long to be shown" in pages_of(trajectory, 2)[0][1]
    # Of the second, the agent has seen nothing.
    assert words_of(prompts[3], "Earlier notes") == "first"
    assert pages_of(trajectory, 3) == [(1, "third")]


@pytest.mark.parametrize("threads", [0, 4])
def test_the_query_of_a_page_is_the_last_of_the_call_whichever_answered_first(threads):
    async def read(reading, *_):
        return reading.query, False

    write = turns(search_turn("slow", "fast", "slower"), browse_turn(LONG), answer_turn())
    agent = long_agent(Scripted(write), tool_threads=threads)
    agent.tools.browser.read = read
    found = [SearchResult("Title", LONG, "Summary")]
    with_source(agent, lambda query: time.sleep(0.05 * query.startswith("slow")) or found)
    assert pages_of(one(agent), 1) == [(0, "slower")]
    agent.tools.close()


@pytest.mark.parametrize("threads", [0, 4])
def test_a_page_that_one_call_names_twice_is_read_twice_from_the_same_place(threads):
    async def read(reading, *_):
        await asyncio.sleep(0)
        return f"{reading.next} after {len(reading.memory)}", reading.next == 0

    write = turns(search_turn(), browse_turn(LONG, LONG), browse_turn(LONG), answer_turn())
    agent = long_agent(Scripted(write), tool_threads=threads)
    agent.tools.browser.read = read
    trajectory = one(agent)
    first, second = observation(trajectory, 1)
    assert first == second and len(first["information"]) == 2
    assert pages_of(trajectory, 2) == [(2, "2 after 2")]
    agent.tools.close()


def test_the_engine_reads_at_the_readers_temperature_and_the_same_twice():
    engine, _ = engine_reading(
        lambda prompt: "NOTES: x", search_turn(), browse_turn(LONG), answer_turn()
    )
    agent = long_agent(engine, reader_temperature=0.6, seed=7)
    samplings = []
    for _ in range(2):
        engine.turns.clear()
        one(agent)
        samplings.append(
            next(each for name, _, each in reversed(engine.submitted) if name.startswith("reader/"))
        )
    assert samplings[0] == samplings[1] and (samplings[0].temperature, samplings[0].seed) == (
        0.6,
        7,
    )
