"""Rollouts, the part that takes minutes: vLLM's prefix cache, and a world that is against us."""

import asyncio
import gc
import importlib.util
import json
import os
import random
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from engines import counted
from loopback import FAULTS, Handler, Server
from scripted import TOY_CHAT, WORLD, Recorder, batch, flat, toy_config

from deepresearcher_min import corpus, rollout
from deepresearcher_min.corpus import MODEL_DIR
from deepresearcher_min.engine import Completion, Request, make_engine
from deepresearcher_min.evaluation import step_sums
from deepresearcher_min.reward import judge
from deepresearcher_min.rollout import Agent, Tools, roll_out
from deepresearcher_min.trajectory import HARNESS_STOPS, POLICY_STOPS
from deepresearcher_min.web import Web

pytestmark = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_computes_only_what_is_new_in_a_turn(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM ends it for good
    config = toy_config(engine="vllm", max_in_flight=32, tool_threads=8)
    engine = counted(make_engine(config, str(MODEL_DIR)))
    try:
        agent = Agent(config, engine, Tools(config, TOY_CHAT, WORLD.corpus), TOY_CHAT)
        trajectories = flat(roll_out(batch(8, repeats=4), agent))
        agent.tools.close()
        assert {t.stop_reason for t in trajectories} <= set(POLICY_STOPS)
        later = [turn for t in trajectories for turn in t.turns[1:]]
        assert len(later) > 30
        block = 32  # tokens; of a context's last block, what is not full is computed again
        first = sum(t.turns[0].sampled[0] for t in trajectories)
        observed = sum(
            turn.observed[1] - turn.observed[0] for t in trajectories for turn in t.turns
        )
        assert engine.stats["prefill_tokens"] <= first + observed + block * len(later)
        assert engine.stats["cached_tokens"] >= sum(
            turn.sampled[0] for turn in later
        ) - observed - block * len(later)
        assert engine.stats["decode_tokens"] == sum(t.sampled_mask.sum() for t in trajectories)
        assert engine.engine.get_num_unfinished_requests() == 0
    finally:
        engine.close()


class HostileWorld(Handler):
    """A search service and the pages of the toy web; one request in five fails, hangs or brings
    garbage.
    """

    draw = random.Random(0)
    faults = (
        "silence",
        "drip_head",
        "drip_body",
        "endless_head",
        "reset_in_body",
        "short_body",
        "bad_chunk",
        "no_http",
        "nothing",
        "bad_gzip",
        "bomb",
        "circle",
        "to_file",
        "picture",
        "bad_length",
        "missing",
        "broken",
        "busy",
    )
    garbage = (
        b"",
        b"[[[",
        b'{"result": []}',
        b'{"result": [[{"document": null}]]}',
        b"\xff\xfe" * 500,
        b"null",
    )

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.site.lock:
            self.site.requests["all"] += 1
            bad = self.draw.random() < 0.2
            fault, garbage = (
                self.draw.choice([*self.faults, "garbage"]),
                self.draw.choice(self.garbage),
            )
            self.site.requests[fault if bad else "good"] += 1
        if bad and fault == "garbage":
            self.reply(200, {}, garbage)
        elif bad:
            FAULTS[fault](self)
        elif body:
            found = WORLD.corpus.search(json.loads(body)["queries"][0], 2)
            documents = [
                {"contents": f"{result.title}\n{result.snippet}", "url": result.url}
                for result in found
            ]
            self.reply(200, {}, {"result": [[{"document": document} for document in documents]]})
        else:
            text = WORLD.corpus.pages.get(corpus.SITE + self.path[1:])
            self.reply(200, {"Content-Type": "text/plain"}, (text or "").encode())

    do_POST = do_GET


class LoopbackWeb(Web):
    """Real requests; only the name of the toy's site leads to the server of this test."""

    def fetch(self, url: str, *rest, **more):
        return super().fetch(url.replace(corpus.SITE, self.config.search_url + "/"), *rest, **more)


class Unreliable(Recorder):
    """Now and then it ends a request by itself, or loses one without a word."""

    draw = random.Random(1)

    def step(self) -> dict[str, Completion]:
        finished = super().step()
        if self.running and self.draw.random() < 0.05:
            request_id = self.draw.choice(list(self.running))
            self.abort([request_id])
            if self.draw.random() < 0.8:
                finished[request_id] = Completion([], [], "aborted")
        return finished


def left_over() -> dict[str, int]:
    """What a rollout may leak: threads, file descriptors, tasks, requests, trajectories that grow,
    and memory [MB].
    """
    gc.collect()
    kinds = {
        "tasks": asyncio.Task,
        "futures": asyncio.Future,
        "requests": Request,
        "recordings": rollout.Recording,
    }
    alive = {
        name: sum(isinstance(thing, kind) for thing in gc.get_objects())
        for name, kind in kinds.items()
    }
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 10**6
    # Not ours: the test server's threads, which hang on purpose. Bounded, and meant to stay: those
    # that resolve names.
    threads = [
        one for one in threading.enumerate() if not re.search("process_request|resolver", one.name)
    ]
    return alive | {
        "threads": len(threads),
        "files": len(os.listdir("/proc/self/fd")),
        "MB": resident,
    }


HARD_TIMES = {
    "search": "retriever",
    "allow_private_hosts": True,
    "tool_threads": 24,
    "tool_timeout": 1.5,
    "read_timeout": 1.0,
    "connect_timeout": 1.0,
    "max_retries": 1,
    "trajectory_timeout": 20.0,
    "requests_per_second": 1000.0,
    "search_ttl": 1.0,
    "max_in_flight": 128,
}


def test_a_hostile_world_leaves_every_trajectory_accounted_for_and_nothing_behind(tmp_path):
    server = Server()
    server.http.RequestHandlerClass = type("Hostile", (HostileWorld,), {"site": server})
    config = toy_config(**HARD_TIMES, search_url=server.url)
    engine = Unreliable(config)
    rounds = []
    with server:
        # The first warms up what stays: connections, parsers, the cache.
        for number, count in enumerate((6, 32)):
            web = LoopbackWeb(config, tmp_path / f"{number}.sqlite")
            agent = Agent(config, engine, Tools(config, TOY_CHAT, web=web), TOY_CHAT)
            finished = []
            groups = roll_out(batch(count, repeats=16, step=number), agent, finished.append)
            agent.tools.close()
            # No thread hangs for longer than its tool's deadline.
            agent.tools.pool.shutdown(wait=True)
            web.close()
            assert engine.at_rest() and len(finished) == count * 16
            finished.clear()
            engine.log.clear()
            rounds.append(left_over() if number == 0 else (groups, left_over()))
    groups, after = rounds[1]
    trajectories = flat(groups)
    assert len(trajectories) == 512
    stops = Counter(t.stop_reason for t in trajectories)
    assert stops.keys() <= set(POLICY_STOPS + HARNESS_STOPS)
    assert stops["answer"] > 250 and stops["cancelled"] > 5 and stops["deadline"] > 0
    judged = [judge(group[0].question, group, config, 0) for group in groups]
    sums = step_sums(trajectories, judged)
    assert sums["trajectories"] + sums["lost"] == 512
    assert sums["lost"] == stops["cancelled"] + stops["deadline"]
    assert sums["cost_searches"] == sum(t.cost.get("searches", 0) for t in trajectories) > 500
    failures = {name: int(count) for name, count in sums.items() if name.startswith("cost_fail")}
    assert sum(failures.values()) > 30 and len(failures) > 4
    # The tools themselves know every one of these failures.
    assert not any(name.endswith("_error") for name in failures)
    before = rounds[0]
    print(stops, failures, before, after, sep="\n")
    for name in ("tasks", "futures", "requests", "recordings"):
        assert after[name] <= before[name], (before, after)
    assert after["threads"] <= before["threads"] + 1, (before, after)
    assert after["files"] <= before["files"] + 4, (before, after)
    # The 512 trajectories themselves among it.
    assert after["MB"] <= before["MB"] + 150, (before, after)
