"""The scheduler, measured: a step of 4,096 trajectories in simulation, real conversations, and its own overhead.

    python bench/rollout.py [--json PATH] [--only sim|real|overhead]

Simulated: the real scheduler under a virtual clock, in front of a model of eight engines and of a slow web, whose
constants are assumptions about an H100 that serves a 7B model; nothing of it was measured on one. Real: vLLM on this
machine's CPU samples the tokens of 64 conversations, whose tools are HTTP requests to a server on loopback; what a turn
says and how long a reply takes is planned, so that three schedulers meet the same work. Takes about four minutes.
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
GROUP = PAPER.group_size


# --- the work: what every trajectory will do


@dataclass(frozen=True)
class Plan:
    """A trajectory: the lengths of its turns and observations [tokens], the kinds and latencies of its calls [s]."""

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


def plan_of(request_id: str) -> int:
    """The rollout's requests are named step/question/index, with GROUP trajectories to a question."""
    _, question, index = map(int, request_id.split("/"))
    return question * GROUP + index


class PlannedChat:
    """Stands for the tokenizer: the last token of a turn is the number of its plan and turn, which gives its text."""

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
        numbers = range(rank, len(plans) // GROUP, ENGINES)
        batch = Batch([Question(str(n), str(n), ("",)) for n in numbers], numbers, GROUP, 1.0, 1.0, step=1)
        tools = SimulatedTools(chat, SEARCHES_PER_SECOND / ENGINES)
        with closing(asyncio.SelectorEventLoop(clock)) as loop:
            loop.time = lambda clock=clock: clock.now
            groups = loop.run_until_complete(roll_out_async(batch, Agent(config, engine, tools, chat), lambda _: None))
        assert {t.stop_reason for group in groups for t in group} == {"answer"}
        seconds, prefilled = max(seconds, clock.now), prefilled + engine.prefilled
    return seconds, prefilled / 1e6


def lock_step(plans: Sequence[Plan], official: bool) -> float:
    """Seconds for the same work in lock step: everyone's turn, then everyone's tools, then everyone's next turn.

    `official` adds what the published code does: both sides poll for files every 10 s, searches go first and browses
    after them, each with 1,000 threads, and the KV cache is dropped at every turn.
    """
    chat, draw, now, active = PlannedChat(plans, first_code=10), random.Random(1), 0.0, list(range(len(plans)))
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
        searches = [latency for kind, latencies in calls if kind == "search" for latency in latencies]
        browses = [latency for kind, latencies in calls if kind == "browse" for latency in latencies]
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
    """When the last of these requests is answered, if so many workers send at most `rate` of them a second."""
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
            print(f"  {'a official: lock step, polling, cache dropped':46s} {figures['sim_official_s']:8.0f}")
        figures[f"sim_{name}lock_step_s"] = lock_step(plans, official=False)
        print(f"  {'b lock step':46s} {figures[f'sim_{name}lock_step_s']:8.0f}")
        free = replace(PAPER, max_in_flight=512)
        runs = {
            "uncapped": ("c asynchronous, all 512 of an engine in flight", free, False),
            "best_cap": (f"c asynchronous, {cap} in flight (the best cap)", replace(free, max_in_flight=cap), False),
            "async": ("  ours: admission by KV tokens, no cap given", free, True),
        }
        for key, (words, config, by_tokens) in runs.items():
            seconds, prefilled = simulate(plans, config, by_tokens)
            figures[f"sim_{name}{key}_s"] = seconds
            print(f"  {words:46s} {seconds:8.0f} {prefilled:15.1f}", flush=True)
    return figures


# --- real: vLLM on the CPU, a tool server on loopback

SCALE = 10  # latencies and lengths of (b) are the workload's divided by this
CONVERSATIONS, FIRST_CODE = 64, 16


def serve_tools(plans: Sequence[Plan], port: Any) -> None:
    """A process of its own: a search service and pages, each answer after its planned latency."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = json.loads(body)["queries"][0] if body else self.path[1:]
            plan, turn, i = map(int, key.split("/"))
            time.sleep(plans[plan].calls[turn][1][i] / SCALE)
            pages = [f"{address}{plan}/{n}/0" for n, (kind, _) in enumerate(plans[plan].calls) if kind == "browse"]
            found = [{"document": {"contents": "Title\nText", "url": url}} for url in pages or [address]]
            reply = json.dumps({"result": [found]}).encode() if body else PAGE
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if body else "text/html")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 256})(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}/"
    port.send(address)
    server.serve_forever()


PAGE = b"<html><body>" + b"<p>A sentence about questions 0, 1, 2, 3 and 4, to be kept.</p>" * 40 + b"</body></html>"


class PlannedTurns:
    """A real engine whose turns have planned lengths: it samples all tokens of a turn but the last, the plan's."""

    def __init__(self, engine: Engine, chat: PlannedChat) -> None:
        self.engine, self.chat, self.turns = engine, chat, Counter()
        self.capacity_tokens, self.max_len = engine.capacity_tokens, engine.max_len

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        plan = plan_of(request_id)
        length = max(2, self.chat.plans[plan].turns[self.turns[plan]] // SCALE)
        self.turns[plan] += 1
        self.engine.submit(request_id, token_ids, replace(sampling, max_tokens=length - 1, stop_token_ids=()))

    def step(self) -> dict[str, Completion]:
        finished = {}
        for request_id, sampled in self.engine.step().items():
            plan = plan_of(request_id)
            ids = [*sampled.token_ids, self.chat.code(plan, self.turns[plan] - 1)]
            finished[request_id] = Completion(ids, [*sampled.logprobs, 0.0], "stop")
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        self.engine.abort(request_ids)


class LockStep(Scheduler):
    """All turns, then all tools, then all turns again."""

    async def pump(self) -> None:
        while True:
            await self.wake.wait()
            while len(self.waiting) < len(self.held):
                await asyncio.sleep(0.001)
            finished: dict[str, Completion] = {}
            while len(finished) < len(self.waiting):
                finished |= self.engine.step()
            self.wake.clear()
            for request_id, completion in finished.items():
                self.waiting.pop(request_id).set_result(completion)


def tiny_model(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=4096, **sizes)).save_pretrained(folder)


def bench_real() -> dict[str, float]:
    plans = make_plans(CONVERSATIONS, 4.0, seed=0)
    at_once = [[(kind, [0.0] * len(latencies)) for kind, latencies in plan.calls] for plan in plans[:GROUP]]
    warm_up = [replace(plan, calls=calls) for plan, calls in zip(plans, at_once, strict=False)]
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve_tools, args=(plans + warm_up, theirs), daemon=True
    )
    server.start()
    address = ours.recv()
    changes = {
        "engine": "vllm", "max_model_len": 4096, "max_turn_tokens": 500, "max_in_flight": CONVERSATIONS,
        "max_tool_calls": MAX_CALLS, "search_results": MAX_CALLS, "search": "retriever", "search_url": address,
        "tool_threads": 64, "allow_private_hosts": True, "connections_per_host": 64, "read_timeout": 30.0,
        "requests_per_second": SCALE * SEARCHES_PER_SECOND,
    }  # fmt: skip
    config = replace(load_config(["--preset=toy"]), **changes)
    schedulers = {"ours": (Scheduler, 64), "lock step": (LockStep, 64), "serial": (LockStep, 1)}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder)
        engine = make_engine(config, folder, tokenizer=None)
        converse(engine, warm_up, config, address, f"{folder}/warm_up.sqlite", Scheduler, len(plans))
        for name, (scheduler, threads) in schedulers.items():
            its = replace(config, tool_threads=threads)
            figures[name] = converse(engine, plans, its, address, f"{folder}/{name}.sqlite", scheduler)
        engine.close()
    server.terminate()
    slowest = max(sum(max(latencies) for _, latencies in plan.calls) / SCALE for plan in plans)
    print(f"\nREAL: vLLM on the CPU, {CONVERSATIONS} conversations; the slowest waits {slowest:.1f} s for its tools")
    tokens = sum(max(2, turn // SCALE) - 1 for plan in plans for turn in plan.turns)
    for name, seconds in figures.items():
        print(f"  {name:12s} {seconds:7.1f} s {tokens / seconds:8.0f} tokens/s {seconds / figures['ours']:8.2f} x ours")
    return {
        "real_tokens_per_s": tokens / figures["ours"],
        "real_vs_lockstep": figures["lock step"] / figures["ours"],
        "real_vs_serial": figures["serial"] / figures["ours"],
    }


def converse(
    engine: Engine, plans: Sequence[Plan], config: Config, address: str, cassette: str, scheduler: type, first: int = 0
) -> float:
    """Seconds that these conversations take, from an empty cache."""
    chat = PlannedChat([*[plans[0]] * first, *plans], FIRST_CODE, address, SCALE)
    web = Web(config, cassette)
    tools = Tools(config, chat, web=web)
    numbers = range(first // GROUP, (first + len(plans)) // GROUP)
    batch = Batch([Question(str(n), str(n), ("",)) for n in numbers], numbers, GROUP, 1.0, 1.0, step=1)
    engine.llm.reset_prefix_cache()
    start = time.monotonic()
    with patch.object(rollout, "Scheduler", scheduler):
        groups = roll_out(batch, Agent(config, PlannedTurns(engine, chat), tools, chat))
    seconds = time.monotonic() - start
    for trajectory in (trajectory for group in groups for trajectory in group):
        assert trajectory.stop_reason == "answer", trajectory.stop_reason
        assert not any(name.startswith("fail") for name in trajectory.cost), trajectory.cost
    tools.close()
    web.close()
    return seconds


# --- overhead: an engine that answers at once


class InstantEngine:
    """Answers every request in the next step, with ids that were encoded before: three searches, then the answer."""

    def __init__(self, chat: ChatFormat, name: str) -> None:
        turns = [f"I need it.{toyworld.CALL_SEARCH}{name}{toyworld.CALL_END}"] * 3
        turns.append(f"I know the answer.{toyworld.ANSWER}{name}{toyworld.ANSWER_END}")
        self.written = [[*chat.tokenizer.encode(turn), chat.end_of_turn_id] for turn in turns]
        self.capacity_tokens, self.max_len = 10**12, 768
        self.turns: Counter[str] = Counter()
        self.requests: list[str] = []

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        self.requests.append(request_id)

    def step(self) -> dict[str, Completion]:
        finished = {}
        for request_id in self.requests:
            ids = self.written[self.turns[request_id]]
            self.turns[request_id] += 1
            finished[request_id] = Completion(ids, [-0.5] * len(ids), "stop")
        self.requests = []
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        raise AssertionError("nothing is aborted here")


class InstantSearch:
    def __init__(self, results: list[SearchResult]) -> None:
        self.results = results

    def search(self, query: str, counts: Counter) -> list[SearchResult]:
        return self.results


def bench_overhead() -> dict[str, float]:
    """CPU time of all but engine and search, with the toy's prompts and observations; tools in threads."""
    from transformers import AutoTokenizer

    chat, world = ChatFormat(AutoTokenizer.from_pretrained(toyworld.MODEL_DIR), date=""), toyworld.training_world(0)
    name = next(iter(world.facts))
    config = replace(load_config(["--preset=toy"]), tool_threads=64, max_in_flight=4096)
    tools = Tools(config, chat, world.corpus)
    tools.backend = InstantSearch(world.corpus.search(name, 2))
    times: dict[int, list[float]] = {64: [], 4096: []}
    for count in (64, 4096) * 3:  # in turn, so that a busy neighbour disturbs both
        numbers, rounds = range(count // GROUP), 1024 // count or 1
        batch = Batch([Question(str(n), f"Where is {name}?", ("",)) for n in numbers], numbers, GROUP, 1.0, 1.0, step=1)
        start = time.process_time()
        for _ in range(rounds):
            groups = roll_out(batch, Agent(config, InstantEngine(chat, name), tools, chat))
            assert all(len(trajectory.turns) == 4 for group in groups for trajectory in group)
        times[count].append((time.process_time() - start) / (4 * count * rounds) * 1000)
    tools.close()
    print("\nOVERHEAD: an engine and a search that answer at once, four turns each")
    for count, found in times.items():
        three = ", ".join(f"{value:.3f}" for value in found)
        print(f"  {count:5d} trajectories in flight: {min(found):.3f} ms of CPU for a turn (the least of {three})")
    return {f"overhead_ms_per_turn_{count}": min(found) for count, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("sim", "real", "overhead"))
    args = parser.parse_args()
    figures: dict[str, float] = {"load": os.getloadavg()[0], "cpus": os.cpu_count() or 0}
    print(f"load of this machine: {figures['load']:.1f} on {figures['cpus']} CPUs")
    parts = {"real": bench_real, "sim": bench_simulated, "overhead": bench_overhead}
    for name, part in parts.items():
        if args.only in (None, name):
            figures |= part()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
