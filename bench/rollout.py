"""The scheduler, measured: a step of 4,096 trajectories in simulation, real conversations, and its own overhead.

    python bench/rollout.py [--json PATH] [--only sim|real|overhead]

Simulated: the real scheduler under a virtual clock, in front of a model of eight engines and of a slow web. The constants
are assumptions about an H100 that serves a 7B model, and no measurements. Real: vLLM on this machine's CPU samples every
token of 64 conversations, whose tools are HTTP requests to a server on loopback; what a turn says and how long a reply
takes is planned, so that three schedulers meet the same work. Takes about four minutes.
"""

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import random
import selectors
import sys
import tempfile
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)  # before torch is imported; see README on threads
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min import rollout, toyworld  # noqa: E402
from deepresearcher_min.config import Config, load_config  # noqa: E402
from deepresearcher_min.engine import Completion, Engine, Sampling, make_engine  # noqa: E402
from deepresearcher_min.protocol import ChatFormat, Entry  # noqa: E402
from deepresearcher_min.rollout import Agent, Batch, Scheduler, Tools, roll_out, roll_out_async  # noqa: E402
from deepresearcher_min.search import SearchResult  # noqa: E402
from deepresearcher_min.trajectory import Question  # noqa: E402
from deepresearcher_min.web import Web  # noqa: E402

PAPER = load_config(["--preset=paper"])


# --- the work: what every trajectory will do


@dataclass(frozen=True)
class Plan:
    """A trajectory: the length of each turn and of each observation [tokens], and each call's kind and latencies [s]."""

    turns: list[int]
    observations: list[int]
    calls: list[tuple[str, list[float]]]


PROMPT, SHARED = 900, 850  # tokens of a prompt; those that all prompts have in common
LATENCY = {"search": 0.8, "browse": 4.0}  # median of the log-normal latency of one request [s]; 99th percentile: 10 x
SIGMA = math.log(10) / 2.3263
MAX_CALLS, CUT = 10, 120.0  # latencies are cut here [s]


def make_plans(count: int, mean_calls: float, seed: int) -> list[Plan]:
    """The workload: a geometric number of calls, first a search of one to three queries, then six in ten are searches.

    The order of the draws is part of it: with the same seed these are the trajectories of the published simulation.
    """
    draw = random.Random(seed)

    def plan() -> Plan:
        calls = 0
        while calls < MAX_CALLS and draw.random() > 1 / (mean_calls + 1):
            calls += 1
        turns = [max(20, int(180 * math.exp(0.5 * draw.gauss(0, 1)))) for _ in range(calls + 1)]
        observations, made = [], []
        for number in range(calls):
            search = number == 0 or draw.random() < 0.6
            requests = draw.randint(1, 3) if search else 1
            median = LATENCY["search" if search else "browse"]
            latencies = [min(CUT, median * math.exp(SIGMA * draw.gauss(0, 1))) for _ in range(requests)]
            made.append(("search" if search else "browse", latencies))
            observations.append(600 * requests if search else int(700 * math.exp(0.4 * draw.gauss(0, 1))))
        return Plan(turns, observations, made)

    return [plan() for _ in range(count)]


class PlannedChat:
    """Stands for the tokenizer: the last token of a turn is the number of its plan and turn, which says what it says."""

    end_of_turn_id = 0

    def __init__(self, plans: Sequence[Plan], first_code: int, pages: str = "", scale: int = 1) -> None:
        self.plans, self.first_code, self.pages, self.scale = plans, first_code, pages, scale

    def code(self, plan: int, turn: int) -> int:
        return self.first_code + plan * (MAX_CALLS + 1) + turn

    def read(self, ids: Sequence[int]) -> tuple[int, int]:
        """Plan and turn that a turn's ids belong to."""
        return divmod(ids[-1] - self.first_code, MAX_CALLS + 1)

    def prompt_ids(self, text: str) -> list[int]:
        return [1] * (SHARED // self.scale) + [2 + int(text) % 7] * ((PROMPT - SHARED) // self.scale)

    def decode(self, ids: Sequence[int]) -> str:
        plan, turn = self.read(ids)
        if turn == len(self.plans[plan].calls):
            return "</think><answer>the answer</answer>"
        kind, latencies = self.plans[plan].calls[turn]
        keys = [f"{plan}/{turn}/{i}" for i in range(len(latencies))]
        name, argument = ("web_search", "query") if kind == "search" else ("browse_webpage", "url_list")
        arguments = {argument: keys if kind == "search" else [self.pages + key for key in keys]}
        return f"</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    def fit(self, kind: str, entries: Sequence[Entry], max_tokens: int) -> tuple[str, list[int], int]:
        plan, turn, _ = map(int, entries[0].key.removeprefix(self.pages).split("/"))
        return "", [3] * max(1, self.plans[plan].observations[turn] // self.scale), 0


# --- simulated: engines and web under a virtual clock

STEP, STEP_PER_REQUEST = 9e-3, 1.2e-4  # one decoding step: weights, and the cache of each running request [s]
PREFILL = 25_000.0  # tokens a second, during which nothing is decoded
SLOTS, KV_TOKENS = 128, 900_000  # requests that decode together; tokens that the cache holds
ENGINES, SEARCHES_PER_SECOND = 8, 200.0


class Clock(selectors.SelectSelector):
    """An event loop that waits with this selector does not wait: its clock jumps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("every coroutine waits, and no timer is set")
        self.now += max(0.0, timeout)
        return []


class SimulatedEngine:
    """vLLM in outline: continuous batching, and the contexts of trajectories kept until the room is needed."""

    max_len = PAPER.max_model_len

    def __init__(self, chat: PlannedChat, clock: Any, capacity: int = KV_TOKENS, keep: bool = True) -> None:
        self.chat, self.clock, self.capacity_tokens, self.keep = chat, clock, capacity, keep
        self.turns: Counter[int] = Counter()  # by plan
        self.queue: deque[tuple[str, int, int, int]] = deque()  # (request, plan, turn, context)
        self.running: list[tuple[int, int, str, int, int]] = []  # a heap: (last step, order, request, plan, turn)
        self.idle: OrderedDict[int, int] = OrderedDict()  # contexts of plans that wait for a tool, oldest first
        self.used = self.steps = self.prefilled = 0
        self.order = itertools.count()

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        plan = int(request_id.split("/")[1]) * PAPER.group_size + int(request_id.split("/")[2])
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
            known = held or (SHARED if self.keep else 0)  # of an evicted context, the shared beginning is still there
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
    """The web in outline: a rate limit for searches, shared out over the engines, and a latency for every request."""

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
    """Seconds that the slowest of the engines takes with the real scheduler, and prefilled tokens [millions].

    Each engine is a rank with an event loop of its own and its share of the questions, as in training.
    """
    chat, seconds, prefilled = PlannedChat(plans, first_code=10), 0.0, 0
    for rank in range(ENGINES):
        clock = Clock()
        engine = SimulatedEngine(chat, clock)
        engine.capacity_tokens = KV_TOKENS if by_tokens else 10**12
        numbers = range(rank, len(plans) // config.group_size, ENGINES)
        batch = Batch([Question(str(n), str(n), ("",)) for n in numbers], numbers, config.group_size, 1.0, 1.0, step=1)
        tools = SimulatedTools(chat, SEARCHES_PER_SECOND / ENGINES)
        with closing(asyncio.SelectorEventLoop(clock)) as loop:
            loop.time = lambda clock=clock: clock.now
            groups = loop.run_until_complete(roll_out_async(batch, Agent(config, engine, tools, chat), lambda _: None))
        assert {t.stop_reason for group in groups for t in group} == {"answer"}
        seconds, prefilled = max(seconds, clock.now), prefilled + engine.prefilled
    return seconds, prefilled / 1e6
