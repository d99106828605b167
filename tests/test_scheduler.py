"""The scheduler: who is let in when, what ends early, and that nothing is left over."""

import asyncio
import itertools
import os
import random
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    PROMPT,
    Recorder,
    Scripted,
    answer_turn,
    batch,
    flat,
    make_agent,
    never,
    same,
    search_turn,
    toy_config,
    turns,
    with_source,
)

from deepresearcher_min import rollout
from deepresearcher_min.config import ROOT
from deepresearcher_min.corpus import SearchResult
from deepresearcher_min.engine import Sampling
from deepresearcher_min.evaluation import step_sums
from deepresearcher_min.rollout import Scheduler, roll_out
from deepresearcher_min.trajectory import POLICY_STOPS

pytestmark = pytest.mark.quick


def test_turns_share_the_engine_s_steps():
    engine = Scripted(turns(search_turn(), search_turn(), answer_turn()), lambda *_: 10)
    roll_out(batch(16), make_agent(engine))
    assert engine.most_running == 16
    # Three turns of ten steps, nobody late for one; one after another would be 480.
    assert engine.steps == 30


def test_a_simulated_step_is_faster_than_lock_step(monkeypatch):
    """bench/rollout.py's simulation, in small: it drives this loop with tools of its own."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import simulation

    plans = simulation.make_plans(128, 3.5, seed=0)
    seconds, _ = simulation.simulate(plans, simulation.PAPER)
    assert 0 < seconds < simulation.lock_step(plans, official=False)


@pytest.mark.parametrize("when", ["step", "submit"])
def test_an_engine_that_fails_ends_the_rollout_with_its_error(when):
    class Broken(Scripted):
        def step(self):
            if when == "step" and self.steps > 20:
                raise RuntimeError("out of memory")
            return super().step()

        def submit(self, request_id, *rest):
            if when == "submit" and self.turns[request_id] == 1:
                raise RuntimeError("out of memory")
            super().submit(request_id, *rest)

    engine, finished = (
        Broken(turns(search_turn(), answer_turn()), lambda name, turn: int(name[-1]) * 10 + 1),
        [],
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        roll_out(batch(1, repeats=8), make_agent(engine), finished.append)
    assert not engine.running
    assert len(finished) == (1 if when == "step" else 0)


def test_a_bug_in_the_agent_ends_the_rollout_with_its_error(monkeypatch):
    monkeypatch.setattr(rollout, "parse_turn", lambda text: 1 / 0)
    engine = Scripted(turns(answer_turn()), lambda name, turn: int(name[2]) + 1)
    with pytest.raises(ZeroDivisionError):
        roll_out(batch(4), make_agent(engine))
    assert not engine.running


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_rollout_between_steps_and_leaves_the_engine_as_new(kind):
    def stop(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        engine, expected = Recorder(toy_config()), []
        forward, calls = engine.model.forward, itertools.count()

        def interrupted(**kwargs):
            if next(calls) == 30:
                os.kill(os.getpid(), kind)  # in the middle of a step
                time.sleep(0.01)
            return forward(**kwargs)

        engine.model.forward = interrupted
        agent, finished = make_agent(engine), []
        with pytest.raises(KeyboardInterrupt):
            roll_out(batch(3, repeats=4), agent, finished.append)
        assert engine.at_rest()
        assert signal.getsignal(kind) is stop
        engine.model.forward = forward
        again = flat(roll_out(batch(3, repeats=4), agent))
        expected = flat(roll_out(batch(3, repeats=4), make_agent(Recorder(toy_config()))))
        close = [
            np.allclose(a.logprobs, b.logprobs, atol=1e-4, equal_nan=True)
            for a, b in zip(again, expected, strict=True)
            if np.array_equal(a.token_ids, b.token_ids)
        ]
        assert len(close) >= 10 and all(close)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_cancelling_keeps_what_is_finished_and_ends_every_coroutine():
    engine = Scripted(lambda name, turn: answer_turn() if int(name[-1]) < 3 else None)
    agent, finished = make_agent(engine), []

    async def session():
        task = asyncio.create_task(
            rollout.roll_out_async(batch(1, repeats=6), agent, finished.append)
        )
        while len(finished) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(session()) == set()
    assert [t.stop_reason for t in finished] == ["answer"] * 3
    assert not engine.running and sorted(engine.aborted) == ["1/0/3", "1/0/4", "1/0/5"]
    engine.write = turns(answer_turn("again"))
    assert {t.answer for t in flat(roll_out(batch(2), agent))} == {"again"}


def test_a_turn_that_ends_in_the_step_in_which_it_is_given_up():
    class Late(Scripted):
        def step(self):
            self.task.cancel()
            return super().step()

    engine = Late(turns(answer_turn()))

    async def session():
        scheduler = Scheduler(engine, 1)
        pumping = asyncio.create_task(scheduler.pump())
        engine.task = asyncio.create_task(
            scheduler.generate("1/0/0", [1], Sampling(1.0, 100, 0, ()))
        )
        await asyncio.wait([engine.task])
        assert engine.task.cancelled() and not pumping.done() and not scheduler.waiting
        pumping.cancel()

    asyncio.run(session())


def test_a_deadline_ends_one_trajectory_and_no_other():
    engine = Scripted(lambda name, turn: None if name == "1/1/0" else answer_turn())
    groups = roll_out(batch(3), make_agent(engine, trajectory_timeout=0.2))
    assert [t.stop_reason for t in flat(groups)] == ["answer", "deadline", "answer"]
    assert engine.aborted == ["1/1/0"]
    assert step_sums(flat(groups))["lost"] == 1


def test_next_in_line_goes_first_and_groups_end_together():
    draw = random.Random(1)
    durations = {
        (n, i, turn): draw.randint(1, 6) for n in range(12) for i in range(4) for turn in range(3)
    }

    def duration(request_id, turn):
        _, number, index = map(int, request_id.split("/"))
        return durations[number, index, turn]

    def order(**limits):
        engine, done = Scripted(turns(search_turn(), search_turn(), answer_turn()), duration), []
        engine.capacity_tokens = limits.pop("capacity", 10**9)
        roll_out(
            batch(12, repeats=4), make_agent(engine, **limits), lambda t: done.append(t.question.id)
        )
        first = list(dict.fromkeys(name for name, _, _ in engine.submitted))
        # Nobody starts before an older one.
        assert first == [f"1/{n}/{i}" for n in range(12) for i in range(4)]
        spans = {name: [i for i, other in enumerate(done) if other == name] for name in done}
        return engine, max(last[-1] - last[0] for last in spans.values())

    engine, spread = order(max_in_flight=5)
    assert engine.most_running == 5
    assert spread < 12  # of 48: a group ends while at most a few others are under way
    engine, spread = order(capacity=8000)
    assert 4 < engine.most_running < 16 and engine.most_tokens <= 8000
    assert spread < 24


def test_a_trajectory_larger_than_the_cache_goes_alone():
    engine = Scripted(
        turns(search_turn(), search_turn(), answer_turn()), lambda *_: 3, capacity=600
    )
    # A turn alone may take 500 tokens, its prompt more than 100.
    found = flat(roll_out(batch(3), make_agent(engine)))
    assert [t.stop_reason for t in found] == ["answer"] * 3
    assert all(len(t.token_ids) > 600 for t in found)
    assert engine.most_running == 1


def test_waiting_for_the_first_turn_is_not_held_against_the_deadline():
    engine = Scripted(turns(answer_turn()), lambda *_: 40)  # 20 ms or more each
    found = flat(roll_out(batch(10), make_agent(engine, max_in_flight=1, trajectory_timeout=0.15)))
    assert [t.stop_reason for t in found] == ["answer"] * 10


def test_a_deadline_in_the_queue_blocks_nobody():
    # The first is let in and never ends its turn; the second waits for room for its second turn, in
    # vain. (Should its deadline come a moment after the first one's, which gives it room, it never
    # ends its turn either.)
    def write(name, turn):
        return None if name != "1/2/0" and turn else [search_turn(), answer_turn()][turn]

    engine = Scripted(write, lambda name, turn: 3 if name == "1/1/0" else 1)
    agent = make_agent(engine, trajectory_timeout=0.3, max_turn_tokens=700)
    with_source(
        agent, lambda query: [SearchResult("Title", "https://a.example/", "Summary. " * 100)]
    )
    engine.capacity_tokens = 2 * (PROMPT + 700) + 500  # both first turns, but not both second ones
    found = flat(roll_out(batch(3), agent))
    assert [t.stop_reason for t in found] == ["deadline", "deadline", "answer"]
    assert not engine.running


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=25),
    st.integers(20, 200),
    st.integers(1, 8),
    # Not st.randoms: its end of data would surface inside a task.
    st.integers(0, 2**32).map(random.Random),
)
def test_admission_never_overfills_never_overtakes_and_never_stops(growth, capacity, most, draw):
    engine, cancelled = Scripted(never, capacity=capacity), set()

    class Checked(Scheduler):
        def leave(self, number: int) -> None:
            before = set(self.held) - {number}
            super().leave(number)
            queue = sorted(
                (n, tokens) for n, tokens, future in self.queue if not future.cancelled()
            )
            assert all(number < queue[0][0] for number in set(self.held) - before if queue)
            assert self.used == sum(self.held.values())
            assert self.used <= capacity or len(self.held) == 1
            assert len(self.held) <= most
            if queue:  # for a reason
                assert self.used + queue[0][1] > capacity or len(self.held) == most

    async def trajectory(scheduler: Scheduler, number: int) -> None:
        context = 0
        try:
            for tokens in growth[number]:
                context += tokens
                await scheduler.enter(number, context)
                for _ in range(draw.randint(0, 4)):
                    await asyncio.sleep(0)
        finally:
            scheduler.leave(number)

    async def session() -> None:
        scheduler = Checked(engine, most)
        tasks = [
            asyncio.create_task(trajectory(scheduler, number)) for number in range(len(growth))
        ]
        for _ in range(draw.randint(0, 30)):
            await asyncio.sleep(0)
        # Deadlines.
        for number in draw.sample(range(len(growth)), draw.randint(0, len(growth) // 3)):
            cancelled.add(number)
            tasks[number].cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        for number, result in enumerate(results):
            assert result is None or (
                number in cancelled and isinstance(result, asyncio.CancelledError)
            ), result
        assert scheduler.used == 0 and not scheduler.held

    asyncio.run(session())


def test_a_small_cache_repeats_to_the_bit_too():
    tight = {"kv_tokens": 4 * 768, "max_in_flight": 32}
    runs = [
        flat(roll_out(batch(4, repeats=4), make_agent(Recorder(toy_config(**tight)), **tight)))
        for _ in range(2)
    ]
    assert all(map(same, *runs))
    assert {t.stop_reason for t in runs[0]} <= set(POLICY_STOPS)
