"""A step of 4,096 trajectories, SIMULATED: the real scheduler under a virtual clock, before a model
of engines and web.

The constants are assumptions about an H100 that serves a 7B model; nothing of it was measured on
one. `bench/rollout.py --only sim` runs it.
"""

import asyncio
import itertools
import math
import random
import selectors
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any

from workload import (
    GROUP,
    MAX_CALLS,
    PAPER,
    PROMPT,
    SHARED,
    Plan,
    PlannedChat,
    make_plans,
    plan_of,
)

from deepresearcher_min.config import Config
from deepresearcher_min.engine import Completion, Sampling
from deepresearcher_min.protocol import Entry
from deepresearcher_min.rollout import Agent, Batch, roll_out_async
from deepresearcher_min.trajectory import Question

# One decoding step: weights, and the cache of each running request [s].
STEP, STEP_PER_REQUEST = 9e-3, 1.2e-4
PREFILL = 25_000.0  # tokens a second, during which nothing is decoded
SLOTS, KV_TOKENS = 128, 900_000  # requests that decode together; tokens that the cache holds
ENGINES, SEARCHES_PER_SECOND = 8, 200.0


class Clock(selectors.SelectSelector):
    """An event loop that waits with this selector does not wait: its clock jumps to the next
    timer.
    """

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("every coroutine waits, and no timer is set")
        self.now += max(0.0, timeout)
        return []


class SimulatedEngine:
    """vLLM in outline: continuous batching, and the contexts of trajectories kept until the room is
    needed.
    """

    max_len = PAPER.max_model_len

    def __init__(
        self, chat: PlannedChat, clock: Any, capacity: int = KV_TOKENS, keep: bool = True
    ) -> None:
        self.chat, self.clock, self.capacity_tokens, self.keep = chat, clock, capacity, keep
        self.turns: Counter[int] = Counter()  # by plan
        self.queue: deque[tuple[str, int, int, int]] = deque()  # (request, plan, turn, context)
        self.running: list[
            tuple[int, int, str, int, int]
        ] = []  # a heap: (last step, order, request, plan, turn)
        # Contexts of plans that wait for a tool, oldest first.
        self.idle: OrderedDict[int, int] = OrderedDict()
        self.used = self.steps = self.prefilled = 0
        self.order = itertools.count()

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        plan = plan_of(request_id)
        self.queue.append((request_id, plan, self.turns[plan], len(token_ids)))
        self.turns[plan] += 1

    def admit(self) -> float:
        """Start what has a slot and room; returns the time of its prefill [s]."""
        before = self.prefilled
        while self.queue and len(self.running) < SLOTS:
            request, plan, turn, context = self.queue[0]
            length, held = self.chat.plans[plan].turns[turn], self.idle.get(plan, 0)
            room = context + length - held
            others = iter([other for other in self.idle if other != plan])
            while self.used + room > KV_TOKENS and (other := next(others, None)) is not None:
                self.used -= self.idle.pop(other)
            if self.used + room > KV_TOKENS and self.running:
                break
            self.queue.popleft()
            self.idle.pop(plan, None)
            self.used += room
            # Of an evicted context, the shared beginning is still there.
            known = held or (SHARED if self.keep else 0)
            self.prefilled += context - known
            heappush(self.running, (self.steps + length, next(self.order), request, plan, turn))
        return (self.prefilled - before) / PREFILL

    def step(self) -> dict[str, Completion]:
        self.clock.now += self.admit() + STEP + STEP_PER_REQUEST * len(self.running)
        self.steps += 1
        finished = {}
        while self.running and self.running[0][0] <= self.steps:
            _, _, request, plan, turn = heappop(self.running)
            work = self.chat.plans[plan]
            context = PROMPT + sum(work.turns[: turn + 1]) + sum(work.observations[:turn])
            if self.keep and turn < len(work.calls):
                self.idle[plan] = context
            else:
                self.used -= context
            ids = [0] * (work.turns[turn] - 1) + [self.chat.code(plan, turn)]
            finished[request] = Completion(ids, [0.0] * len(ids), "stop")
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        assert not list(request_ids), "nothing is aborted in this simulation"


class SimulatedTools:
    """The web in outline: a rate limit for searches, shared out over the engines, and a latency for
    every request.
    """

    def __init__(self, chat: PlannedChat, rate: float) -> None:
        self.chat, self.interval, self.next_slot = chat, 1 / rate, 0.0

    async def use(self, action: Any, record: Any) -> list[Entry]:
        plan, turn = self.chat.read(record.token_ids)
        kind, latencies = self.chat.plans[plan].calls[turn]
        await asyncio.gather(*(self.request(kind, latency) for latency in latencies))
        return [Entry(f"{plan}/{turn}/0", ())]

    async def request(self, kind: str, latency: float) -> None:
        async with self.slots:
            now = asyncio.get_running_loop().time()
            if kind == "search":
                self.next_slot = max(now, self.next_slot) + self.interval
            await asyncio.sleep(latency + (self.next_slot - now if kind == "search" else 0.0))


def simulate(plans: Sequence[Plan], config: Config, by_tokens: bool = True) -> tuple[float, float]:
    """Seconds that the slowest of the engines takes with the real scheduler, and prefilled tokens
    [millions].

    Each engine is a rank with an event loop of its own and its share of the questions, as in
    training.
    """
    chat, seconds, prefilled = PlannedChat(plans, first_code=10), 0.0, 0
    for rank in range(ENGINES):
        clock = Clock()
        engine = SimulatedEngine(chat, clock)
        engine.capacity_tokens = KV_TOKENS if by_tokens else 10**12
        numbers = range(rank, len(plans) // GROUP, ENGINES)
        batch = Batch(
            [Question(str(n), str(n), ("",)) for n in numbers], numbers, GROUP, 1.0, step=1
        )
        tools = SimulatedTools(chat, SEARCHES_PER_SECOND / ENGINES)
        with closing(asyncio.SelectorEventLoop(clock)) as loop:
            loop.time = lambda clock=clock: clock.now
            groups = loop.run_until_complete(
                roll_out_async(batch, Agent(config, engine, tools, chat), lambda _: None)
            )
        assert {t.stop_reason for group in groups for t in group} == {"answer"}
        seconds, prefilled = max(seconds, clock.now), prefilled + engine.prefilled
    return seconds, prefilled / 1e6


def lock_step(plans: Sequence[Plan], official: bool) -> float:
    """Seconds for the same work in lock step: everyone's turn, then everyone's tools, then
    everyone's next turn.

    `official` adds what the published code does: both sides poll for files every 10 s, searches go
    first and browses after them, each with 1,000 threads, and the KV cache is dropped at every
    turn.
    """
    chat, draw, now, active = (
        PlannedChat(plans, first_code=10),
        random.Random(1),
        0.0,
        list(range(len(plans))),
    )
    engines = [SimulatedEngine(chat, Clock(), keep=not official) for _ in range(ENGINES)]
    for turn in range(MAX_CALLS + 1):
        for engine in engines:
            engine.clock.now = now
        for place, plan in enumerate(active):
            engine, work = engines[(place if official else plan) % ENGINES], plans[plan]
            engine.turns[plan] = turn
            context = PROMPT + sum(work.turns[:turn]) + sum(work.observations[:turn])
            engine.submit(f"0/{plan // GROUP}/{plan % GROUP}", range(context), None)
        for engine in engines:
            while engine.queue or engine.running:
                engine.step()
        now = max(engine.clock.now for engine in engines)
        active = [plan for plan in active if turn < len(plans[plan].calls)]
        calls = [plans[plan].calls[turn] for plan in active]
        searches = [
            latency for kind, latencies in calls if kind == "search" for latency in latencies
        ]
        browses = [
            latency for kind, latencies in calls if kind == "browse" for latency in latencies
        ]
        if official and active:
            start, now = now, now + draw.uniform(0, 10)
            now = answered(searches, now, 1000, SEARCHES_PER_SECOND)
            now = answered(browses, now, 1000, math.inf)
            now = start + 10 * math.ceil((now - start) / 10)
        else:
            searched = answered(searches, now, len(searches), SEARCHES_PER_SECOND)
            now = max(searched, answered(browses, now, len(browses), math.inf))
    return now


def answered(latencies: Sequence[float], now: float, workers: int, rate: float) -> float:
    """When the last of these requests is answered, if so many workers send at most `rate` of them a
    second.
    """
    free, slot, last = [now] * workers, now, now
    for latency in latencies:
        start = slot = max(heappop(free), slot) + 1 / rate
        heappush(free, start + latency)
        last = max(last, start + latency)
    return last


def bench_simulated() -> dict[str, float]:
    print(
        f"\nSIMULATED with assumed constants of an H100: 4,096 trajectories on {ENGINES} engines\n"
        f"{'':48s} {'seconds':>8s} {'prefill [Mtok]':>15s}"
    )
    figures = {}
    for name, mean_calls, cap in (("", 4.0, 160), ("long_", 12.0, 96)):
        plans = make_plans(4096, mean_calls, seed=0)
        print(f"{sum(len(plan.calls) for plan in plans) / len(plans):.2f} tool calls each")
        if not name:
            figures["sim_official_s"] = lock_step(plans, official=True)
            print(
                f"  {'a official: lock step, polling, cache dropped':46s} "
                f"{figures['sim_official_s']:8.0f}"
            )
        figures[f"sim_{name}lock_step_s"] = lock_step(plans, official=False)
        print(f"  {'b lock step':46s} {figures[f'sim_{name}lock_step_s']:8.0f}")
        free = replace(PAPER, max_in_flight=512)
        runs = {
            "uncapped": ("c asynchronous, all 512 of an engine in flight", free, False),
            "best_cap": (
                f"c asynchronous, {cap} in flight (the best cap)",
                replace(free, max_in_flight=cap),
                False,
            ),
            "async": ("  ours: admission by KV tokens, no cap given", free, True),
        }
        for key, (words, config, by_tokens) in runs.items():
            seconds, prefilled = simulate(plans, config, by_tokens)
            figures[f"sim_{name}{key}_s"] = seconds
            print(f"  {words:46s} {seconds:8.0f} {prefilled:15.1f}", flush=True)
    return figures
