"""Rollouts: one coroutine per trajectory, one pump that steps the engine while anyone waits for tokens.

`run_trajectory` is the agent loop of the paper's figure 3: generate a turn, parse it, use the tool, append what
came back, repeat. Many of them run at once in one event loop; their turns share the engine's batches
(continuous batching) while tools work in threads. Results come back in the order asked, whatever finished first.

Left out: starting the next step's trajectories before the update (it is off-policy and not the paper).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepresearcher_min.browse import Reader, browse, make_reader
from deepresearcher_min.config import Config
from deepresearcher_min.engine import Completion, Engine, Sampling
from deepresearcher_min.protocol import (
    Answer,
    Browse,
    ChatFormat,
    Entry,
    Malformed,
    Search,
    page_item,
    parse_turn,
    search_item,
)
from deepresearcher_min.run import Ranks
from deepresearcher_min.search import Backend, Corpus, make_search
from deepresearcher_min.trajectory import Question, Trajectory, Turn
from deepresearcher_min.web import Web, WebFailure

EVALUATION = 2**31  # the step number in the seeds of evaluations: no training step's
Generate = Callable[[list[int], int], Awaitable[Completion]]  # (token ids so far, max new tokens) -> completion


class Recording:
    """A trajectory while it grows: three parallel lists that are only ever appended to."""

    def __init__(self, question: Question, prompt_ids: Sequence[int]) -> None:
        self.question = question
        self.token_ids: list[int] = []
        self.sampled_mask: list[bool] = []
        self.logprobs: list[float] = []
        self.turns: list[Turn] = []
        self.cost: Counter = Counter()
        self.append_given(prompt_ids)

    def append_given(self, ids: Sequence[int]) -> tuple[int, int]:
        start = len(self.token_ids)
        self.token_ids += ids
        self.sampled_mask += [False] * len(ids)
        self.logprobs += [float("nan")] * len(ids)
        return start, len(self.token_ids)

    def append_sampled(self, completion: Completion) -> tuple[int, int]:
        start = len(self.token_ids)
        self.token_ids += completion.token_ids
        self.sampled_mask += [True] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        return start, len(self.token_ids)

    def finish(self, stop_reason: str, answer: str | None = None) -> Trajectory:
        return Trajectory(
            question=self.question,
            token_ids=np.array(self.token_ids),
            sampled_mask=np.array(self.sampled_mask),
            logprobs=np.array(self.logprobs),
            turns=tuple(self.turns),
            answer=answer,
            stop_reason=stop_reason,
            cost=dict(self.cost),
        )


class Tools:
    """What the agent can do to the world; failures of the world come back as words and are counted."""

    def __init__(self, config: Config, chat: ChatFormat, corpus: Corpus | None = None, web: Web | None = None) -> None:
        self.config, self.chat, self.corpus, self.web = config, chat, corpus, web
        self.backend: Backend = make_search(config, web, corpus)
        self.reader: Reader = make_reader(config, web, self.generate_text)
        self.pool = ThreadPoolExecutor(config.tool_threads, "tool") if config.tool_threads else None
        self.pump: Pump | None = None  # of the rollout that is going on; the reader `engine` generates through it
        self.readings = 0

    async def generate_text(self, messages: list[dict[str, str]]) -> str:
        """The policy's own engine as a plain chat model, greedy; these tokens belong to no trajectory."""
        token_ids = self.chat.message_ids(messages)[-(self.config.max_model_len - self.config.max_turn_tokens) :]
        self.readings += 1
        sampling = Sampling(0.0, 1.0, self.config.max_turn_tokens, 0, (self.chat.end_of_turn_id,))
        completion = await self.pump.generate(f"reader/{self.readings}", token_ids, sampling)
        return self.chat.decode(completion.token_ids)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run in a thread of the pool; with tool_threads 0 in place, so that the order is always the same."""
        if self.pool is None:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    async def search(self, action: Search, cost: Counter) -> list[Entry]:
        queries = action.queries[: self.config.max_queries]
        return list(await asyncio.gather(*(self._search_one(query, cost) for query in queries)))

    async def _search_one(self, query: str, cost: Counter) -> Entry:
        try:
            async with asyncio.timeout(self.config.tool_timeout):
                results = await self.in_thread(self.backend.search, query, cost)
        except WebFailure as failure:
            return Entry(query, (search_item(failure.words),))
        except TimeoutError:
            cost["fail_timeout"] += 1
            return Entry(query, (search_item("The search took too long and was given up."),))
        return Entry(query, tuple(search_item(r.snippet, r.title, r.url) for r in results))

    async def browse(self, action: Browse, question: str, memory: list[str], shown: set[str], cost: Counter):
        urls = action.urls[: self.config.max_urls]
        return list(await asyncio.gather(*(self._browse_one(url, question, memory, shown, cost) for url in urls)))

    async def _browse_one(self, url: str, question: str, memory: list[str], shown: set[str], cost: Counter) -> Entry:
        if url not in shown:
            cost["fail_unknown_url"] += 1
            return Entry(url, (page_item("No search has shown this address, so it cannot be opened."),))
        try:
            async with asyncio.timeout(self.config.tool_timeout):
                notes = await browse(
                    url, question, memory, config=self.config, web=self.web, corpus=self.corpus,
                    reader=self.reader, counts=cost, in_thread=self.in_thread,
                )  # fmt: skip
        except WebFailure as failure:
            return Entry(url, (page_item(failure.words),))
        except TimeoutError:
            cost["fail_timeout"] += 1
            return Entry(url, (page_item("The page took too long and was given up."),))
        return Entry(url, tuple(page_item(summary, number) for number, summary in notes))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


async def run_trajectory(question: Question, generate: Generate, agent: "Agent") -> Trajectory:
    """One question, once: think, act, observe, until an answer or a limit (stop reasons: see trajectory.py)."""
    record = Recording(question, agent.chat.prompt_ids(question.text))
    try:
        async with asyncio.timeout(agent.config.trajectory_timeout):
            return await agent_loop(record, generate, agent)
    except TimeoutError:
        return record.finish("deadline")


async def agent_loop(record: Recording, generate: Generate, agent: "Agent") -> Trajectory:
    config, tools, chat = agent.config, agent.tools, agent.chat
    memory: list[str] = []  # what the reader has noted so far, for this trajectory only
    shown: set[str] = set()  # every URL that a search of this trajectory has shown
    calls = 0
    while True:
        room = config.max_model_len - len(record.token_ids)
        if room < 1:
            return record.finish("context")
        completion = await generate(record.token_ids, min(config.max_turn_tokens, room))
        if completion.finish_reason == "aborted":
            return record.finish("cancelled")
        sampled = record.append_sampled(completion)
        text = "<think>" + chat.decode(completion.token_ids)
        action = parse_turn(text)
        if completion.finish_reason == "length":
            action = Malformed("the turn was cut off")
        kind = type(action).__name__.lower()
        ended = Turn(sampled, (sampled[1], sampled[1]), text, kind)
        if completion.finish_reason == "length":
            record.turns.append(ended)
            return record.finish("context" if room <= config.max_turn_tokens else "length")
        if isinstance(action, Malformed | Answer):
            record.turns.append(ended)
            return record.finish(kind, action.text if isinstance(action, Answer) else None)
        if calls == config.max_tool_calls:
            record.turns.append(ended)
            return record.finish("tool_budget")
        calls += 1
        if isinstance(action, Search):
            entries = await tools.search(action, record.cost)
            shown.update(item["url"] for entry in entries for item in entry.items if item["url"])
        else:
            entries = await tools.browse(action, record.question.text, memory, shown, record.cost)
        observation, ids, dropped = chat.fit(kind, entries, config.max_observation_tokens)
        record.cost["dropped_results"] += dropped
        if len(record.token_ids) + len(ids) >= config.max_model_len:
            record.turns.append(Turn(sampled, (sampled[1], sampled[1]), text, kind, observation))
            return record.finish("context")
        record.turns.append(Turn(sampled, record.append_given(ids), text, kind, observation))


class Pump:
    """Lets coroutines await completions: it steps the engine as long as anyone waits, and sleeps otherwise."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: dict[str, asyncio.Future[Completion]] = {}
        self.wake = asyncio.Event()

    async def generate(self, request_id: str, token_ids: list[int], sampling: Sampling) -> Completion:
        future = asyncio.get_running_loop().create_future()
        self.waiting[request_id] = future
        self.engine.submit(request_id, token_ids, sampling)
        self.wake.set()
        try:
            return await future
        except asyncio.CancelledError:  # a deadline or Ctrl-C: the engine must not go on with it
            if self.waiting.pop(request_id, None) is not None:
                self.engine.abort([request_id])
            raise

    async def run(self) -> None:
        while True:
            await self.wake.wait()
            for request_id, completion in self.engine.step().items():
                future = self.waiting.pop(request_id, None)
                if future is not None and not future.done():
                    future.set_result(completion)
            if not self.waiting:
                self.wake.clear()
            # Two rounds of the loop: one for the coroutines whose turn ended, one for the tools they started.
            # With tools answered in place, their next turns are then submitted before the next step.
            await asyncio.sleep(0)
            await asyncio.sleep(0)


@dataclass(frozen=True)
class Agent:
    """What a rollout needs beside questions."""

    config: Config
    engine: Engine
    tools: Tools
    chat: ChatFormat


@dataclass(frozen=True)
class Batch:
    """What to roll out: `repeats` trajectories for each question.

    A trajectory's random numbers come from (seed, step, number of the question in the step, index, turn), so they
    do not depend on how questions are dealt out to ranks.
    """

    questions: Sequence[Question]
    numbers: Sequence[int]  # of the questions, within the step and over all ranks
    repeats: int
    temperature: float
    top_p: float
    step: int


def roll_out(
    batch: Batch, agent: Agent, on_done: Callable[[Trajectory], None] = lambda trajectory: None
) -> list[list[Trajectory]]:
    """Run all trajectories of a batch; returns them by question and index. `on_done` is for progress bars."""
    return asyncio.run(roll_out_async(batch, agent, on_done))


async def roll_out_async(batch: Batch, agent: Agent, on_done: Callable[[Trajectory], None]) -> list[list[Trajectory]]:
    pump = agent.tools.pump = Pump(agent.engine)
    pumping = asyncio.create_task(pump.run())
    admitted = asyncio.Semaphore(agent.config.max_in_flight)

    async def one(question: Question, number: int, index: int) -> Trajectory:
        turn = 0

        async def generate(token_ids: list[int], max_tokens: int) -> Completion:
            nonlocal turn
            seed = seed_of(agent.config.seed, batch.step, number, index, turn)
            turn += 1
            sampling = Sampling(batch.temperature, batch.top_p, max_tokens, seed, (agent.chat.end_of_turn_id,))
            return await pump.generate(f"{batch.step}/{number}/{index}", token_ids, sampling)

        async with admitted:
            trajectory = await run_trajectory(question, generate, agent)
        on_done(trajectory)
        return trajectory

    numbered = list(zip(batch.questions, batch.numbers, strict=True))
    jobs = [asyncio.create_task(one(q, n, index)) for q, n in numbered for index in range(batch.repeats)]
    everything = asyncio.gather(*jobs)
    try:
        await asyncio.wait([pumping, everything], return_when=asyncio.FIRST_COMPLETED)
        if pumping.done():
            pumping.result()  # the engine failed: raise its error instead of waiting for ever
        flat = everything.result()
    finally:
        for task in (pumping, *jobs):
            task.cancel()
        await asyncio.gather(pumping, *jobs, return_exceptions=True)
    return [flat[start : start + batch.repeats] for start in range(0, len(flat), batch.repeats)]


def evaluate(
    questions: Sequence[Question], agent: Agent, ranks: Ranks, on_done: Callable[[Trajectory], None]
) -> list[Trajectory]:
    """One trajectory for each question at config.eval_temperature; every rank gets all of them, in order."""
    numbers = range(ranks.rank, len(questions), ranks.world_size)
    batch = Batch([questions[n] for n in numbers], numbers, 1, agent.config.eval_temperature, 1.0, step=EVALUATION)
    return ranks.gather([trajectory for (trajectory,) in roll_out(batch, agent, on_done)])


def seed_of(*numbers: int) -> int:
    """One 32-bit seed from a tuple of non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
