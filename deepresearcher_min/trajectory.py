"""The data that flows, Question -> Trajectory -> Group, and where questions come from. It holds and checks.

A trajectory is one flat list of token ids that only ever grows by appending:

    P0 prompt | A0 sampled | E0 observation | A1 sampled ...
    token_ids    = P0 + A0 + E0 + A1
    sampled_mask = 0..0  1..1  0..0  1..1

Sampled ids are never decoded and encoded again on their way into the loss: text is derived from them.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# How a trajectory ended: by the policy's doing, which is rewarded, or by the harness's or the world's fault, which is
# left out of group and loss.
POLICY_STOPS = ("answer", "malformed", "tool_budget", "length", "context")
HARNESS_STOPS = ("deadline", "cancelled")


@dataclass(frozen=True)
class Question:
    """One question with all its accepted (gold) answers."""

    id: str
    text: str
    answers: tuple[str, ...]
    source: str = ""  # data source: nq, hotpotqa, ..., toy_1hop, toy_2hop


@dataclass(frozen=True)
class Turn:
    """One assistant turn and what the world said to it, as text for people; the ids are in the trajectory."""

    sampled: tuple[int, int]  # [start, end) in Trajectory.token_ids
    observed: tuple[int, int]  # empty (start == end) for a turn that ended the trajectory
    text: str  # what the model wrote, the forced "<think>" in front, the end-of-turn token left out
    kind: str  # search | browse | answer | malformed
    observation: str = ""


@dataclass(frozen=True)
class Trajectory:
    """Everything that happened on one question, once.

    Raises ValueError when lengths differ or a sampled token has no finite log-probability.
    """

    question: Question
    token_ids: np.ndarray  # [T] int32
    sampled_mask: np.ndarray  # [T] bool, true exactly where the model sampled token i
    logprobs: np.ndarray  # [T] float32, the engine's log-probability of a sampled token, nan elsewhere
    turns: tuple[Turn, ...]
    answer: str | None
    stop_reason: str
    cost: Mapping[str, float] = field(default_factory=dict)  # searches, pages, bytes, failures by kind, ...

    def __post_init__(self) -> None:
        for name, dtype in (("token_ids", np.int32), ("sampled_mask", np.bool_), ("logprobs", np.float32)):
            array = np.array(getattr(self, name), dtype=dtype)  # a copy: nothing outside can change it
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        lengths = len(self.token_ids), len(self.sampled_mask), len(self.logprobs)
        if len(set(lengths)) != 1:
            raise ValueError(f"trajectory of question {self.question.id!r}: lengths differ: {lengths}")
        if not np.isfinite(self.logprobs[self.sampled_mask]).all():
            raise ValueError(f"trajectory of question {self.question.id!r}: a sampled token has no finite logprob")
        if self.stop_reason not in POLICY_STOPS + HARNESS_STOPS:
            raise ValueError(f"unknown stop reason {self.stop_reason!r}")

    def to_json(self) -> dict[str, Any]:
        """A dict that json.dumps accepts; log-probabilities only of the sampled tokens, in order."""
        asked, mask, turns = self.question, self.sampled_mask, [vars(turn) for turn in self.turns]
        question = {"id": asked.id, "question": asked.text, "answers": list(asked.answers), "source": asked.source}
        end = {"answer": self.answer, "stop_reason": self.stop_reason, "cost": dict(self.cost)}
        tokens = {"token_ids": self.token_ids.tolist(), "sampled_mask": mask.astype(int).tolist()}
        logprobs = [round(x, 6) for x in self.logprobs[mask].tolist()]
        return {**question, **end, "turns": turns, **tokens, "logprobs": logprobs}


@dataclass
class Reading:
    """A page that is being read: what the reader is told beside the text, and how far it has come."""

    question: str
    query: str = ""  # the latest that showed the page
    memory: Sequence[str] = ()  # what earlier calls noted for this query
    next: int = 0  # number of the segment to go on with, from 0
    total: int = 0  # segments of the page, known when it is opened
    notes: list[tuple[int, str]] = field(default_factory=list)  # of this call: page_number, page_summary


class Recording:
    """A trajectory while it grows: three parallel lists that are only ever appended to, and what the agent knows."""

    def __init__(self, question: Question, prompt_ids: Sequence[int]) -> None:
        self.question = question
        self.token_ids: list[int] = []
        self.sampled_mask: list[bool] = []
        self.logprobs: list[float] = []
        self.turns: list[Turn] = []
        self.cost: Counter = Counter()
        self.shown: dict[str, str] = {}  # every URL that a search of this trajectory has shown: the latest query
        self.memory: dict[str, list[str]] = defaultdict(list)  # what the reader noted in earlier turns, by query
        self.read: Counter[str] = Counter()  # segments read in earlier turns, by URL
        self.readings: dict[str, Reading] = {}  # of this turn, by URL
        self.append(prompt_ids)

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> tuple[int, int]:
        """Add given tokens, or with logprobs sampled ones; returns their span [start, end)."""
        start = len(self.token_ids)
        self.token_ids += ids
        self.sampled_mask += [logprobs is not None] * len(ids)
        self.logprobs += [float("nan")] * len(ids) if logprobs is None else logprobs
        return start, len(self.token_ids)

    def finish(self, stop_reason: str, answer: str | None = None) -> Trajectory:
        ids, mask, logprobs = map(np.array, (self.token_ids, self.sampled_mask, self.logprobs))
        return Trajectory(self.question, ids, mask, logprobs, tuple(self.turns), answer, stop_reason, dict(self.cost))


@dataclass(frozen=True)
class Group:
    """The G trajectories of one question, with their rewards and group-relative advantages ([G] each)."""

    question: Question
    trajectories: Sequence[Trajectory]
    rewards: Sequence[float]
    advantages: Sequence[float]


def load_questions(path: str | Path) -> list[Question]:
    """Read questions from an official .parquet or from .jsonl with `question`, `answers`, optional `id`, `source`.

    The question's text stays as it is, byte for byte; gold answers lose the spaces around them, and empty ones are
    dropped. A missing id becomes the file's name and the row, and a repeated one gets the row appended. Raises
    ValueError naming the file and the row (parquet: from 0; jsonl: the line, from 1) of the first that is unusable.
    """
    path, where, questions = Path(path), "", dict[str, Question]()
    if path.suffix not in (".parquet", ".jsonl") or not path.is_file():
        raise ValueError(f"{path}: must be an existing file that ends in .parquet or .jsonl")
    try:
        if path.suffix == ".parquet":
            rows = [(f", row {number}", row) for number, row in enumerate(pq.read_table(path).to_pylist())]
        else:  # bytes: text would also be split at U+2028, which JSON allows inside strings
            lines = enumerate(path.read_bytes().split(b"\n"), start=1)
            rows = [(f", line {number}", line) for number, line in lines if line.strip()]
        for where, row in rows:
            question = parse_row(row)
            name = question.id or f"{path.stem}{where}"
            name = f"{name}{where}" if name in questions else name
            questions[name] = replace(question, id=name)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}{where}: {reason}") from error
    if not questions:
        raise ValueError(f"{path}: there are no questions in it")
    return list(questions.values())


def parse_row(row: Any) -> Question:
    """A question from a line of JSON (bytes), or from the official prompt, reward_model, data_source, extra_info."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"not an object with question and answers: {str(row)[:80]}")
    else:
        users = [message["content"] for message in row["prompt"] or [] if message["role"] == "user"]
        if len(users) != 1:
            raise ValueError(f"prompt has {len(users)} user messages, not 1")
        gold, extra = (row["reward_model"] or {})["ground_truth"], row.get("extra_info") or {}
        row = {"question": users[0], "answers": gold, "source": row.get("data_source"), "id": extra.get("index")}
    text, answers = row["question"], row["answers"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"question must be a text that is not empty, not {text!r}")
    parts = answers.split("<|answer_split|>") if isinstance(answers, str) else answers
    usable = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    golds = tuple(part.strip() for part in parts if part.strip()) if usable else ()
    if not golds:
        raise ValueError(f"answers must hold a text, or be a list that holds texts, not {str(answers)[:80]!r}")
    return Question("" if row.get("id") is None else str(row["id"]), text, golds, str(row.get("source") or ""))


def take_questions(questions: Sequence[Question], seed: int, start: int, count: int) -> list[Question]:
    """Questions `start` to `start + count` of an endless order, a function of the seed and so the same on all ranks.

    Each epoch is a shuffle of its own. A checkpoint needs only the number of questions taken so far.
    """
    size = len(questions)
    epochs = range(start // size, (start + count) // size + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs])
    return [questions[number] for number in order[start % size :][:count]]
