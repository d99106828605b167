"""What the tests of rollouts share: an engine whose turns the test writes, a tokenizer of bytes,
batches, a search.
"""

import ast
import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepresearcher_min import corpus
from deepresearcher_min.config import Config, load_config
from deepresearcher_min.corpus import MODEL_DIR, Corpus, SearchResult
from deepresearcher_min.engine import Completion, HFEngine, Sampling
from deepresearcher_min.protocol import ChatFormat
from deepresearcher_min.rollout import (
    Agent,
    Batch,
    Tools,
    roll_out,
)
from deepresearcher_min.trajectory import Question, Trajectory
from scripts.toy_tokenizer import TEMPLATE

WORLD = corpus.World("training", 0)
TOY_CHAT = ChatFormat(AutoTokenizer.from_pretrained(MODEL_DIR), date="2026-01-01")
PERSON = next(name for name, kind in WORLD.kind.items() if kind == "person")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the toy's template: nothing is unknown to it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|user|>", "<|assistant|>", "<|tool|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=special,
        chat_template=TEMPLATE,
    )


CHAT = ChatFormat(byte_tokenizer(), date="2026-01-01")


def toy_config(**changes) -> Config:
    return dataclasses.replace(load_config(["--preset=toy"]), **changes)


def call(name: str, **arguments: list[str]) -> str:
    written = json.dumps({"name": name, "arguments": arguments})
    return f"Let us see.</think><tool_call>{written}</tool_call>"


def search_turn(*queries: str) -> str:
    return call("web_search", query=list(queries or [PERSON]))


def browse_turn(*urls: str) -> str:
    return call("browse_webpage", url_list=list(urls or [corpus.url_of(PERSON)]))


def answer_turn(text: str = "Velden") -> str:
    return f"I know it.</think><answer>{text}</answer>"


class Scripted:
    """An engine whose turns the test writes: `write(request_id, turn)` gives text, a Completion, or
    None for never.

    `duration(request_id, turn)` is the number of steps that a turn takes.
    """

    def __init__(
        self,
        write: Callable[[str, int], str | Completion | None],
        duration: Callable[[str, int], int] = lambda request_id, turn: 1,
        capacity: int = 10**9,
    ) -> None:
        self.write, self.duration, self.capacity_tokens, self.max_len = (
            write,
            duration,
            capacity,
            10**9,
        )
        self.stats: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.running: dict[str, list] = {}  # request -> [steps to go, turn, tokens]
        self.submitted: list[tuple[str, list[int], Sampling]] = []
        self.aborted: list[str] = []
        self.steps = self.most_tokens = self.most_running = 0

    def submit(self, request_id, token_ids, sampling) -> None:
        assert request_id not in self.running
        turn = self.turns[request_id]
        self.turns[request_id] += 1
        self.submitted.append((request_id, list(token_ids), sampling))
        self.running[request_id] = [
            self.duration(request_id, turn),
            turn,
            len(token_ids) + sampling.max_tokens,
        ]

    def step(self) -> dict[str, Completion]:
        self.steps += 1
        self.most_running = max(self.most_running, len(self.running))
        self.most_tokens = max(
            self.most_tokens, sum(tokens for _, _, tokens in self.running.values())
        )
        finished = {}
        for request_id, state in list(self.running.items()):
            state[0] -= 1
            written = self.write(request_id, state[1]) if state[0] <= 0 else None
            if written is not None:
                del self.running[request_id]
                finished[request_id] = (
                    written if isinstance(written, Completion) else completion(written)
                )
        time.sleep(0.0005)  # threads want the interpreter, too
        return finished

    def abort(self, request_ids) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            self.running.pop(request_id, None)

    def update_weights(self, named_tensors) -> None:
        pass


def completion(text: str, finish_reason: str = "stop") -> Completion:
    ids = CHAT.tokenizer.encode(text, add_special_tokens=False)
    ids += [CHAT.end_of_turn_id] if finish_reason == "stop" else []
    return Completion(ids, [-0.5] * len(ids), finish_reason)


def turns(*texts: str | Completion | None) -> Callable[[str, int], str | Completion | None]:
    """Every trajectory writes these turns; the last one for ever."""
    return lambda request_id, turn: texts[min(turn, len(texts) - 1)]


def never(*_) -> None:
    return None


def make_agent(engine, corpus: Corpus | None = WORLD.corpus, **changes) -> Agent:
    if isinstance(engine, HFEngine):
        config, chat = toy_config(**changes), TOY_CHAT
    else:
        lengths = {"max_model_len": 9000, "max_turn_tokens": 500, "max_observation_tokens": 2000}
        config, chat = toy_config(**(lengths | changes)), CHAT
    return Agent(config, engine, Tools(config, chat, corpus), chat)


def questions(count: int) -> list[Question]:
    return WORLD.questions(count, seed=1)


def batch(count: int, repeats: int = 1, **changes) -> Batch:
    return dataclasses.replace(
        Batch(questions(count), range(count), repeats, 1.0, step=1), **changes
    )


def one(agent: Agent) -> Trajectory:
    ((trajectory,),) = roll_out(batch(1), agent)
    return trajectory


def flat(groups: list[list[Trajectory]]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group]


def same(one: Trajectory, other: Trajectory) -> bool:
    return (
        np.array_equal(one.token_ids, other.token_ids)
        and np.array_equal(one.logprobs, other.logprobs, equal_nan=True)
        and (one.stop_reason, one.answer, one.turns, one.cost)
        == (other.stop_reason, other.answer, other.turns, other.cost)
    )


class Recorder(HFEngine):
    """The toy model; keeps what it was given and what it sampled, in order, for each trajectory."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, str(MODEL_DIR))
        self.log: dict[str, list] = {}

    def submit(self, request_id, token_ids, sampling) -> None:
        super().submit(request_id, token_ids, sampling)
        self.log.setdefault(request_id, []).append(list(token_ids))

    def step(self) -> dict[str, Completion]:
        finished = super().step()
        for request_id, done in finished.items():
            self.log[request_id].append(done)
        return finished

    def at_rest(self) -> bool:
        return not self.waiting and not self.running and len(self.idle) == len(self.ids)


class Source:
    """A search backend that the test writes."""

    def __init__(self, answer: Callable[[str], list[SearchResult]]) -> None:
        self.answer = answer
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0

    def __call__(self, query: str, counts: Counter) -> list[SearchResult]:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.answer(query)
        finally:
            with self.lock:
                self.at_once -= 1


def with_source(agent: Agent, answer: Callable[[str], list[SearchResult]]) -> Source:
    agent.tools.backend = Source(answer)
    return agent.tools.backend


def raising(error: Exception) -> Callable[[str], list[SearchResult]]:
    def answer(query: str) -> list[SearchResult]:
        raise error

    return answer


def observation(trajectory: Trajectory, turn: int = 0) -> list[dict]:
    return ast.literal_eval(trajectory.turns[turn].observation)


PROMPT = len(CHAT.prompt_ids(questions(1)[0].text))
