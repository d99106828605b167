"""The scheduler, measured: a step of 4,096 trajectories in simulation, real conversations, and its
own overhead.

    python bench/rollout.py [--json PATH] [--only sim|real|overhead]

Simulated: the real scheduler under a virtual clock, in front of a model of eight engines and of a
slow web, whose constants are assumptions about an H100 that serves a 7B model; nothing of it was
measured on one. Real: vLLM on this machine's CPU samples the tokens of 64 conversations, whose
tools are HTTP requests to a server on loopback; what a turn says and how long a reply takes is
planned, so that three schedulers meet the same work. Takes about four minutes.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

from simulation import SEARCHES_PER_SECOND, bench_simulated
from workload import (
    GROUP,
    MAX_CALLS,
    Plan,
    PlannedChat,
    make_plans,
    plan_of,
)

from deepresearcher_min import corpus, rollout
from deepresearcher_min.config import Config, load_config
from deepresearcher_min.engine import Completion, Engine, Sampling, make_engine
from deepresearcher_min.protocol import ChatFormat
from deepresearcher_min.rollout import Agent, Batch, Scheduler, Tools, roll_out
from deepresearcher_min.trajectory import Question
from deepresearcher_min.web import Web
from scripts import toy_tokenizer

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
            pages = [
                f"{address}{plan}/{n}/0"
                for n, (kind, _) in enumerate(plans[plan].calls)
                if kind == "browse"
            ]
            found = [
                {"document": {"contents": "Title\nText", "url": url}} for url in pages or [address]
            ]
            reply = json.dumps({"result": [found]}).encode() if body else PAGE
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if body else "text/html")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 256})(
        ("127.0.0.1", 0), Handler
    )
    address = f"http://127.0.0.1:{server.server_port}/"
    port.send(address)
    server.serve_forever()


PAGE = (
    b"<html><body>"
    + b"<p>A sentence about questions 0, 1, 2, 3 and 4, to be kept.</p>" * 40
    + b"</body></html>"
)


class PlannedTurns:
    """A real engine whose turns have planned lengths: it samples all tokens of a turn but the last,
    the plan's.
    """

    def __init__(self, engine: Engine, chat: PlannedChat) -> None:
        self.engine, self.chat, self.turns = engine, chat, Counter()
        self.capacity_tokens, self.max_len = engine.capacity_tokens, engine.max_len

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        plan = plan_of(request_id)
        length = max(2, self.chat.plans[plan].turns[self.turns[plan]] // SCALE)
        self.turns[plan] += 1
        self.engine.submit(
            request_id, token_ids, replace(sampling, max_tokens=length - 1, stop_token_ids=())
        )

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
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, max_position_embeddings=4096, **sizes)
    ).save_pretrained(folder)


def bench_real() -> dict[str, float]:
    plans = make_plans(CONVERSATIONS, 4.0, seed=0)
    at_once = [
        [(kind, [0.0] * len(latencies)) for kind, latencies in plan.calls] for plan in plans[:GROUP]
    ]
    warm_up = [replace(plan, calls=calls) for plan, calls in zip(plans, at_once, strict=False)]
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve_tools, args=(plans + warm_up, theirs), daemon=True
    )
    server.start()
    address = ours.recv()
    changes = {
        "engine": "vllm",
        "max_model_len": 4096,
        "max_turn_tokens": 500,
        "max_in_flight": CONVERSATIONS,
        "max_tool_calls": MAX_CALLS,
        "search_results": MAX_CALLS,
        "search": "retriever",
        "search_url": address,
        "tool_threads": 64,
        "allow_private_hosts": True,
        "connections_per_host": 64,
        "read_timeout": 30.0,
        "requests_per_second": SCALE * SEARCHES_PER_SECOND,
    }
    config = replace(load_config(["--preset=toy"]), **changes)
    schedulers = {"ours": (Scheduler, 64), "lock step": (LockStep, 64), "serial": (LockStep, 1)}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder)
        engine = make_engine(config, folder)
        converse(
            engine, warm_up, config, address, f"{folder}/warm_up.sqlite", Scheduler, len(plans)
        )
        for name, (scheduler, threads) in schedulers.items():
            its = replace(config, tool_threads=threads)
            figures[name] = converse(
                engine, plans, its, address, f"{folder}/{name}.sqlite", scheduler
            )
        engine.close()
    server.terminate()
    slowest = max(sum(max(latencies) for _, latencies in plan.calls) / SCALE for plan in plans)
    print(
        f"\nREAL: vLLM on the CPU, {CONVERSATIONS} conversations; the slowest waits "
        f"{slowest:.1f} s for its tools"
    )
    tokens = sum(max(2, turn // SCALE) - 1 for plan in plans for turn in plan.turns)
    for name, seconds in figures.items():
        print(
            f"  {name:12s} {seconds:7.1f} s {tokens / seconds:8.0f} tokens/s "
            f"{seconds / figures['ours']:8.2f} x ours"
        )
    return {
        "real_tokens_per_s": tokens / figures["ours"],
        "real_vs_lockstep": figures["lock step"] / figures["ours"],
        "real_vs_serial": figures["serial"] / figures["ours"],
    }


def converse(
    engine: Engine,
    plans: Sequence[Plan],
    config: Config,
    address: str,
    cassette: str,
    scheduler: type,
    first: int = 0,
) -> float:
    """Seconds that these conversations take, from an empty cache."""
    chat = PlannedChat([*[plans[0]] * first, *plans], FIRST_CODE, address, SCALE)
    web = Web(config, cassette)
    tools = Tools(config, chat, web=web)
    numbers = range(first // GROUP, (first + len(plans)) // GROUP)
    batch = Batch([Question(str(n), str(n), ("",)) for n in numbers], numbers, GROUP, 1.0, step=1)
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
    """Answers every request in the next step, with ids that were encoded before: three searches,
    then the answer.
    """

    def __init__(self, chat: ChatFormat, name: str) -> None:
        turns = [f"I need it.{toy_tokenizer.CALL_SEARCH}{name}{toy_tokenizer.CALL_END}"] * 3
        turns.append(f"I know the answer.{toy_tokenizer.ANSWER}{name}{toy_tokenizer.ANSWER_END}")
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


def bench_overhead() -> dict[str, float]:
    """CPU time of all but engine and search, with the toy's prompts and observations; tools in
    threads.
    """
    from transformers import AutoTokenizer

    chat, world = (
        ChatFormat(AutoTokenizer.from_pretrained(corpus.MODEL_DIR), date=""),
        corpus.World("training", 0),
    )
    name = next(iter(world.facts))
    config = replace(load_config(["--preset=toy"]), tool_threads=64, max_in_flight=4096)
    tools = Tools(config, chat, world.corpus)
    results = world.corpus.search(name, 2)
    tools.backend = lambda query, counts: results
    times: dict[int, list[float]] = {64: [], 4096: []}
    for count in (64, 4096) * 3:  # in turn, so that a busy neighbour disturbs both
        numbers, rounds = range(count // GROUP), 1024 // count or 1
        batch = Batch(
            [Question(str(n), f"Where is {name}?", ("",)) for n in numbers],
            numbers,
            GROUP,
            1.0,
            step=1,
        )
        start = time.process_time()
        for _ in range(rounds):
            groups = roll_out(batch, Agent(config, InstantEngine(chat, name), tools, chat))
            assert all(len(trajectory.turns) == 4 for group in groups for trajectory in group)
        times[count].append((time.process_time() - start) / (4 * count * rounds) * 1000)
    tools.close()
    print("\nOVERHEAD: an engine and a search that answer at once, four turns each")
    for count, found in times.items():
        three = ", ".join(f"{value:.3f}" for value in found)
        print(
            f"  {count:5d} trajectories in flight: {min(found):.3f} ms of CPU for a turn (the "
            f"least of {three})"
        )
    return {f"overhead_ms_per_turn_{count}": min(found) for count, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
