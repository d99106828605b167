"""Rollouts: one coroutine for each trajectory, and a scheduler that keeps the engine busy while
tools work.

The agent loop is the paper's figure 3: generate a turn, read it, use a tool, append what came back,
repeat. Many run at once: their turns share the engine's batches (continuous batching), tools work
in threads, and the KV cache decides how many are under way. Left out: starting the next step's
trajectories before the update (off-policy, not the paper).
"""

import asyncio
import heapq
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from signal import SIGINT, SIGTERM, default_int_handler, raise_signal, signal

import numpy as np

from deepresearcher_min.browse import Browser
from deepresearcher_min.config import (
    NO_FAULT,
    Config,
    RunStopped,
    WebFailure,
    count,
    count_failure,
    host_list,
    is_blocked,
)
from deepresearcher_min.engine import Completion, Engine, Sampling
from deepresearcher_min.protocol import (
    THINK,
    TOOLS,
    Call,
    ChatFormat,
    Malformed,
    page_item,
    parse_turn,
    search_item,
)
from deepresearcher_min.search import SERVICES, ask_service, live_search, make_search
from deepresearcher_min.trajectory import Entry, Reading, Recording, Trajectory, Turn, best
from deepresearcher_min.web import Web

EVALUATION = 2**31  # the step number in the seeds of evaluations: no training step's
GRACE = 1.0  # after a tool's own deadline its thread is given up, although it cannot be ended [s]


@dataclass(frozen=True)
class Agent:
    """What a rollout needs beside questions."""

    config: Config
    engine: Engine
    tools: "Tools"
    chat: ChatFormat


async def agent_loop(record: Recording, generate, agent: Agent) -> Trajectory:
    """Think, act, observe, until an answer or a limit. await generate(max new tokens) gives the
    turn that follows the record.
    """
    config = agent.config
    while (room := config.max_model_len - len(record.token_ids)) > 0:
        completion = await generate(min(config.max_turn_tokens, room))
        if completion.finish_reason not in ("stop", "length"):
            return record.finish("cancelled")
        sampled = record.append(completion.token_ids, completion.logprobs)
        text = THINK + agent.chat.decode(completion.token_ids)
        action = parse_turn(text)
        stop = observation = ""
        ids = []
        if completion.finish_reason == "length":  # cut off, whatever it reads like
            action = Malformed()
            stop = "length" if room > config.max_turn_tokens else "context"
        elif not isinstance(action, Call):
            stop = action.kind
        elif len(record.turns) == config.max_tool_calls:
            stop = "tool_budget"
        else:
            observation, ids = await observe(action, record, agent)
            if len(record.token_ids) + len(ids) >= config.max_model_len:
                stop = "context"
                ids = []
        record.turns.append(Turn(sampled, record.append(ids), text, action.kind, observation))
        if stop:
            return record.finish(stop, getattr(action, "text", None))  # an Answer has one
    return record.finish("context")


async def observe(call: Call, record: Recording, agent: Agent):
    """Use a tool; what the agent is to read of it, as text and as the ids that follow its turn.

    The reader's memory keeps what the agent was shown of a page; the next browse of it begins at
    the first segment whose notes did not fit.
    """
    chat = agent.chat
    entries = await agent.tools.use(call, record)
    text, ids, dropped = chat.fit(
        call.kind, entries, agent.config.max_observation_tokens, len(record.turns)
    )
    count(record.cost, "dropped_results", dropped)
    found = sum(len(entry.items) for entry in entries)
    for entry in best(entries, found - dropped):
        reading = record.readings.pop(entry.key, None)
        if reading:
            shown = len(entry.items)
            record.memory[reading.query] += [summary for _, summary in reading.notes[:shown]]
            unseen = reading.notes[shown:]
            record.read[entry.key] = unseen[0][0] if unseen else reading.next
    if record.token_ids[-1] != chat.end_of_turn_id:
        ids = [chat.end_of_turn_id, *ids]  # it ended by another token: the template's is given
    return text, ids


class Tools:
    """What the agent can do to the world, whose failures come back as words and are counted."""

    scheduler: "Scheduler"  # of the rollout that is under way
    slots: asyncio.Semaphore  # so many of its tool calls may be under way

    def __init__(self, config: Config, chat: ChatFormat, corpus=None, web=None):
        self.config = config
        self.chat = chat
        self.backend = make_search(config, web, corpus)
        self.browser = Browser(config, web, corpus, self.in_thread, self.generate_text)
        self.pool = ThreadPoolExecutor(config.tool_threads or 1, "tool")
        self.reader_calls = 0  # for the names of their requests

    async def use(self, call: Call, record: Recording):
        """What each query of a search or address of a browse brought."""
        tool = TOOLS[call.kind]
        most = getattr(self.config, tool.limit_key) or len(call.keys)
        jobs = [self.entry(call.kind, key, record) for key in call.keys[:most]]
        if self.config.tool_threads:
            entries = await asyncio.gather(*jobs)
        else:  # one by one, to be repeatable
            entries = [await job for job in jobs]
        # In the call's order, whichever came first: a replay asks the reader the same.
        for entry in entries:
            for item in entry.items:
                if item.get("url"):
                    record.shown[item["url"]] = entry.key
        if tool.over:
            words = tool.item(tool.over.format(most=most))
            entries += [Entry(key, (words,)) for key in call.keys[most:]]
        return entries

    async def search(self, query, record):
        count(record.cost, "searches")
        found = await self.in_thread(self.backend, query, record.cost)
        return [search_item(one.snippet, one.title, one.url) for one in found]

    async def browse(self, url, record):
        if is_blocked(url, host_list(self.config)):
            raise WebFailure("blocked_host")
        query = record.shown.get(url)
        if query is None:
            raise WebFailure("unknown_url")
        count(record.cost, "pages")
        reading = Reading(record.question.text, query, record.memory[query], record.read[url])
        record.readings[url] = reading
        notes = await self.browser.browse(url, reading, record.cost)
        return [page_item(summary, number) for number, summary in notes]

    async def entry(self, kind, key, record):
        """What one query or address brought; a failure of the world as words."""
        try:
            async with self.slots:
                return Entry(key, tuple(await getattr(self, kind)(key, record)))
        except RunStopped:
            raise
        except WebFailure as raised:
            failure = raised
        except Exception:
            # A bug, or a world stranger than its tool: it costs this call, and the log says where.
            logging.getLogger(__name__).exception("tool call for %.200r", key)
            failure = WebFailure("error", "The tool failed.")
        count_failure(record.cost, "page" if kind == "browse" else kind, failure)
        return Entry(key, (TOOLS[kind].item(failure.words),))

    async def in_thread(self, function, *args):
        """Run a blocking function, which keeps tool_timeout itself; WebFailure if it does not."""
        try:
            if not self.config.tool_threads:
                return function(*args)
            async with asyncio.timeout(self.config.tool_timeout + GRACE):
                return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        except TimeoutError:
            raise WebFailure("timeout", "This took too long and was given up.") from None

    async def generate_text(self, messages):
        """The policy's own engine as a plain chat model; in no trajectory, and not counted for
        admission.
        """
        config = self.config
        token_ids = self.chat.message_ids(messages)
        # Too long: cut before the last 32 tokens, which hold the generation prompt.
        del token_ids[config.max_model_len - config.max_turn_tokens - 32 : -32]
        self.reader_calls += 1
        # One seed for all: the same messages get the same notes.
        sampling = Sampling(
            config.reader_temperature, config.max_turn_tokens, config.seed, self.chat.end_ids
        )
        name = f"reader/{self.reader_calls}"
        completion = await self.scheduler.generate(name, token_ids, sampling)
        return self.chat.decode(completion.token_ids)

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)


def try_services(config, asks=True, judges=False):
    """Ask each service that a run will use once, unrecorded: what is wrong with the first that
    fails, or an empty text.

    `asks`: those of its tools; `judges`: that of evaluations.
    """
    tools = config.max_tool_calls
    used = {
        "search": asks and config.search in SERVICES and (tools or config.method == "rag"),
        "reader": asks and config.reader == "openai" and tools,
        "judge": judges,
    }
    web = Web(config, ":memory:")
    hello = [{"role": "user", "content": "Hello"}]
    for role in filter(used.get, used):
        address = getattr(config, f"{role}_url")
        key = f"{role.upper()}_API_KEY"
        deadline = time.monotonic() + config.tool_timeout
        try:
            if role == "search":
                _, public, key = SERVICES[config.search]
                address = address or public
                key = key or "the network"
                live_search(config, web)("Wikipedia", Counter())
            else:  # any reply will do
                ask_service(role, config, web, hello, bool, "bad_reply", Counter(), deadline)
        except WebFailure as failure:
            if failure.kind not in NO_FAULT:
                remedy = f"check that it runs, {role}_url, {key} and what is left of its quota"
                return f"the {role} service at {address} does not work ({failure}); {remedy}"
    return ""


class Scheduler:
    """Shares one engine among trajectories: lets in as many as its KV cache holds, and steps it
    while anyone waits.

    Whoever is let in holds room for its context and next turn, until it asks for the turn after.
    The oldest goes first and nobody overtakes, so groups end together. Who waits holds nothing, and
    alone, a trajectory of any size goes on.
    """

    def __init__(self, engine: Engine, max_in_flight):
        self.engine = engine
        self.most = max_in_flight
        self.held = {}  # tokens by trajectory; trajectories are numbered by age
        self.used = 0  # their sum
        self.queue = []  # a heap: (number, tokens, admitted)
        self.waiting = {}  # futures by request
        self.wake = asyncio.Event()

    async def enter(self, number, tokens):
        """Wait for room, in place of what the trajectory has held so far."""
        admitted = asyncio.Future()
        heapq.heappush(self.queue, (number, tokens, admitted))
        self.leave(number)
        await admitted

    def leave(self, number):
        """Give back what a trajectory has held, and let in whom there is room for now."""
        self.used -= self.held.pop(number, 0)
        while self.queue:
            oldest, tokens, admitted = self.queue[0]
            if not admitted.cancelled():
                too_much = self.used + tokens > self.engine.capacity_tokens
                if self.held and (too_much or len(self.held) == self.most):
                    return
                self.held[oldest] = tokens
                self.used += tokens
                admitted.set_result(None)
            heapq.heappop(self.queue)

    async def generate(self, request_id, token_ids, sampling: Sampling) -> Completion:
        """Wait for one turn."""
        self.engine.submit(request_id, token_ids, sampling)
        self.waiting[request_id] = asyncio.Future()
        self.wake.set()
        try:
            return await self.waiting[request_id]
        finally:
            if self.waiting.pop(request_id, None):  # cancelled: the engine must not go on with it
                self.engine.abort([request_id])

    async def pump(self):
        """Step the engine while anyone waits; without an end, but by an error of the engine."""
        while True:
            await self.wake.wait()
            for request_id, completion in self.engine.step().items():
                future = self.waiting.pop(request_id, None)
                if future and not future.done():  # else given up a moment ago
                    future.set_result(completion)
            if not self.waiting:
                self.wake.clear()
            # Those whose turn ended go on now; where tools answer at once (tool_threads 0), their
            # next turn is submitted before the next step.
            await asyncio.sleep(0)


@dataclass
class Batch:
    """What to roll out: `repeats` trajectories for each question, the same however questions are
    dealt out to ranks.
    """

    questions: Sequence
    numbers: Sequence  # of the questions, within the step and over all ranks, for the seeds
    repeats: int
    temperature: float
    step: int
    first: int = 0  # index of the first of the repeats, for the seeds


async def roll_out_async(batch: Batch, agent: Agent, on_done):
    """See roll_out. However it ends, nothing is left over. An iterator, not a list: at its end,
    asyncio.run makes a string of its SIGINT handler, and so of the task's result.
    """
    config = agent.config
    scheduler = agent.tools.scheduler = Scheduler(agent.engine, config.max_in_flight)
    # Whoever waits for a slot has no tool's deadline running.
    agent.tools.slots = asyncio.Semaphore(config.tool_threads or 2**31)

    async def one(age, question, number, index):
        record = Recording(question, agent.chat.prompt_ids(question.text))

        async def generate(max_tokens):
            ids = record.token_ids
            turn = len(record.turns)
            if turn:
                await scheduler.enter(age, len(ids) + max_tokens)
            place = config.seed, batch.step, number, index, turn
            seed = int(np.random.SeedSequence(place).generate_state(1)[0])
            sampling = Sampling(batch.temperature, max_tokens, seed, agent.chat.end_ids)
            # One name for all turns: by it HFEngine finds the row of the last.
            return await scheduler.generate(f"{batch.step}/{number}/{index}", ids, sampling)

        try:
            # Until it is let in, no deadline runs.
            await scheduler.enter(age, len(record.token_ids) + config.max_turn_tokens)
            async with asyncio.timeout(config.trajectory_timeout):
                trajectory = await agent_loop(record, generate, agent)
        except TimeoutError:
            trajectory = record.finish("deadline")
        finally:
            scheduler.leave(age)
        on_done(trajectory)
        return trajectory

    jobs = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for question, number in zip(batch.questions, batch.numbers, strict=True):
                for index in range(batch.first, batch.first + batch.repeats):
                    jobs.append(tasks.create_task(one(len(jobs), question, number, index)))
            pumping = tasks.create_task(scheduler.pump())
            flat = await asyncio.gather(*jobs)
            pumping.cancel()
    except ExceptionGroup as errors:  # of a trajectory, or of the pump, which is the engine's
        raise errors.exceptions[0] from None
    return zip(*[iter(flat)] * batch.repeats, strict=True)  # so many of each question


def roll_out(batch: Batch, agent: Agent, on_done=lambda trajectory: None):
    """Run all trajectories of a batch; returns them by question and index.

    `on_done` sees each one as it ends, so that an interruption loses none. Ctrl-C and SIGTERM raise
    KeyboardInterrupt when everything has ended: not inside a step of the engine, which would spoil
    it. Main thread only.
    """
    # Only where it finds Python's own handler does asyncio.run cancel the main task at Ctrl-C.
    on_interrupt = signal(SIGINT, default_int_handler)
    on_terminate = signal(SIGTERM, lambda *_: raise_signal(SIGINT))
    try:
        return list(asyncio.run(roll_out_async(batch, agent, on_done)))
    finally:
        signal(SIGINT, on_interrupt)
        signal(SIGTERM, on_terminate)
