"""The data that flows, Question -> Trajectory -> Group, and where questions come from. Nothing here
acts: it is held and checked.

A trajectory is one flat list of token ids that only ever grows by appending:

    P0 prompt | A0 sampled | E0 observation | A1 sampled ...
    token_ids    = P0 + A0 + E0 + A1
    sampled_mask = 0..0  1..1  0..0  1..1

Sampled ids are never decoded and encoded again on their way into the loss: text is derived from
them.
"""

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# How a trajectory ended: by the policy's doing, which is rewarded, or by the harness's or the
# world's fault, which is left out of group and loss.
POLICY_STOPS = ("answer", "malformed", "tool_budget", "length", "context")
HARNESS_STOPS = ("deadline", "cancelled")
# In a list that numpy printed, array(['a' 'b'], dtype=object): a text in quotes (1) and, if another
# follows, the gap that has no comma (2); or what stands around the list.
PRINTED = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')(\s+(?=["']))?"""
    r"""|array\((?=\[)|(?<=\])(,\s*dtype=[^)]+)?\)""",
    re.DOTALL,
)


load_json = partial(json.loads, strict=False)  # models write raw line breaks inside strings


@dataclass(frozen=True)
class Question:
    """One question with all its accepted (gold) answers."""

    id: str
    text: str
    answers: tuple  # of strings
    source: str = ""  # data source: nq, hotpotqa, ..., toy_1hop, toy_2hop


@dataclass(frozen=True)
class Turn:
    """One assistant turn and what the world said to it, as text for people; the ids are in the
    trajectory.
    """

    sampled: tuple  # span [start, end) in Trajectory.token_ids
    observed: tuple  # the same; empty (start == end) for a turn that ended the trajectory
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
    # [T] float32, the engine's log-probability of a sampled token, nan elsewhere
    logprobs: np.ndarray
    turns: tuple  # of Turn
    answer: str | None
    stop_reason: str
    # searches, pages, bytes, failures by kind, ...
    cost: dict = field(default_factory=dict)

    def __post_init__(self):
        types = {"token_ids": np.int32, "sampled_mask": np.bool_, "logprobs": np.float32}
        for name, dtype in types.items():
            array = np.array(getattr(self, name), dtype)  # a copy: nobody changes it
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        whose = f"trajectory of question {self.question.id!r}"
        lengths = tuple(len(vars(self)[name]) for name in types)
        if len(set(lengths)) != 1:
            raise ValueError(f"{whose}: lengths differ: {lengths}")
        if not np.isfinite(self.logprobs[self.sampled_mask]).all():
            raise ValueError(f"{whose}: a sampled token has no finite logprob")
        if self.stop_reason not in POLICY_STOPS + HARNESS_STOPS:
            raise ValueError(f"unknown stop reason {self.stop_reason!r}")


@dataclass(frozen=True)
class Entry:
    """What one query or one URL brought; a failure is one item with the reason as its content."""

    key: str  # the query or the URL
    items: tuple  # dicts as search_item and page_item make them, best first


def best(entries, kept):
    """The entries with `kept` items together: every entry's best, every entry's second, ..."""
    ranked = sorted(
        (rank, i) for i, entry in enumerate(entries) for rank in range(len(entry.items))
    )
    shown = Counter(i for _, i in ranked[:kept])  # so many items of each entry
    return [Entry(entry.key, entry.items[: shown[i]]) for i, entry in enumerate(entries)]


@dataclass
class Reading:
    """A page under way: what the reader is told beside the text, and how far it has come."""

    question: str
    query: str = ""  # the latest that showed the page
    memory: Sequence = ()  # what earlier calls noted for this query
    next: int = 0  # number of the segment to go on with, from 0
    total: int = 0  # segments of the page, known when it is opened
    # of this call: pairs (number of a segment, what was noted of it)
    notes: list = field(default_factory=list)


class Recording:
    """A trajectory while it grows: two parallel lists that are only ever appended to, and what the
    agent knows.
    """

    def __init__(self, question: Question, prompt_ids):
        self.question = question
        self.token_ids: Any = []
        self.logprobs: Any = []  # of sampled tokens; None elsewhere
        self.turns = []
        self.cost = Counter()
        self.shown = {}  # every URL that a search has shown: the latest query
        # What the reader noted in earlier turns, by query, and how many segments it read, by URL.
        self.memory = defaultdict(list)
        self.read = Counter()
        self.readings = {}  # each Reading of this turn, by URL
        self.append(prompt_ids)

    def append(self, ids, logprobs=None):
        """Add given tokens, or with logprobs sampled ones; returns their span [start, end)."""
        start = len(self.token_ids)
        self.token_ids += ids
        self.logprobs += [None] * len(ids) if logprobs is None else logprobs
        return start, len(self.token_ids)

    def finish(self, stop_reason, answer=None):
        return Trajectory(
            self.question,
            self.token_ids,
            np.not_equal(self.logprobs, None),  # type: ignore[call-overload]
            self.logprobs,  # float32 makes nan of None
            tuple(self.turns),
            answer,
            stop_reason,
            dict(self.cost),
        )


@dataclass
class Group:
    """The G trajectories of one question, with their rewards and group-relative advantages ([G]
    each).
    """

    question: Question
    trajectories: Sequence  # of Trajectory
    rewards: Sequence
    advantages: Sequence


def load_questions(path: str | Path) -> list[Question]:
    """Read questions from a .parquet or a .jsonl with the columns that parse_row knows.

    The question's text stays as it is, byte for byte; gold answers lose the spaces around them, and
    empty ones are dropped. A missing id becomes the file's name and the row, and a repeated one
    gets the row appended. Raises ValueError naming the file and the row (parquet: from 0; jsonl:
    the line, from 1) of the first that is unusable.
    """
    path = Path(path)
    where = ""
    questions = {}
    if path.suffix not in (".parquet", ".jsonl") or not path.is_file():
        raise ValueError(f"{path}: must be an existing file that ends in .parquet or .jsonl")
    try:
        if path.suffix == ".parquet":
            kind = "row"
            rows = enumerate(pq.read_table(path).to_pylist())
        else:  # bytes: text would also be split at U+2028, which JSON allows inside strings
            kind = "line"
            rows = enumerate(path.read_bytes().split(b"\n"), start=1)
        for number, row in rows:
            where = f", {kind} {number}"
            if isinstance(row, bytes) and not row.strip():
                continue
            question = parse_row(row)
            name = question.id or path.stem + where
            if name in questions:
                name += where
            questions[name] = replace(question, id=name)
    except (pa.ArrowException, OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}{where}: {error}") from error
    if not questions:
        raise ValueError(f"{path}: there are no questions in it")
    return list(questions.values())


def parse_row(row):
    """A question from an object, or from a line of JSON (bytes); of several columns for one thing
    the first counts.

    question, query or prompt: a text, or messages of which one is the user's. answers, answer,
    golden_answers, ground_truth or reward_model's ground_truth: see gold_answers. Optional: id,
    _id, index or extra_info's index; source or data_source. ValueError lists the columns there.
    """
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"not an object with question and answers: {str(row)[:80]}")
    columns = f"; the columns here: {', '.join(map(str, row))}"
    text = first_of(row, "question", "query", "prompt")
    if isinstance(text, list):
        users = [one for one in text if isinstance(one, dict) and one.get("role") == "user"]
        if len(users) != 1:
            raise ValueError(f"prompt has {len(users)} user messages, not 1")
        text = users[0].get("content")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"question must be a text that is not empty, not {text!r}{columns}")
    found = first_of(
        row, "answers", "answer", "golden_answers", "ground_truth", "reward_model.ground_truth"
    )
    golds = gold_answers(found)
    if not golds:
        raise ValueError(
            "answers must hold a text, or be a list that holds texts, "
            f"not {str(found)[:80]!r}{columns}"
        )
    name = first_of(row, "id", "_id", "index", "extra_info.index")
    source = first_of(row, "source", "data_source")
    question = Question("" if name is None else str(name), text, golds, str(source or ""))
    # Raises UnicodeEncodeError, a ValueError, for a lone surrogate: no file takes one.
    "".join((text, *golds, question.id, question.source)).encode()
    return question


def first_of(row, *columns):
    """What the first of these columns holds that is there and not null, else None. "outer.inner" is
    the key inner of an object in the column outer.
    """
    for column in columns:
        value = row
        for name in column.split("."):
            value = unpacked(value.get(name)) if isinstance(value, dict) else None
        if value is not None:
            return value


def unpacked(value):
    """The list or dict that a text stores, as JSON or as Python and numpy print them; anything else
    as it is.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{", "array(")):
        with suppress(Exception):
            return load_json(value)
        with suppress(Exception):  # literal_eval raises many kinds for what it cannot read
            # numpy prints no commas, and Python joins texts that stand side by side
            return ast.literal_eval(
                PRINTED.sub(lambda found: (found[1] or "") + "," * bool(found[2]), value)
            )
    return value


def gold_answers(value):
    """The texts in a text, a number, a list of them or {"target": ...}; nulls are passed over, and
    there are none where anything else is in it.

    A text may join several by <|answer_split|>. True is "yes", as the prompt asks for; 1998.0 is
    "1998".
    """
    if isinstance(value, dict):
        value = first_of(value, "target")
    golds = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, bool):
            part = "yes" if part else "no"
        elif isinstance(part, int | float) and part == part:  # nan, unlike itself, is no answer
            part = str(part).removesuffix(".0")
        if not isinstance(part, str | None):
            return ()
        golds += (part or "").split("<|answer_split|>")
    return tuple(gold.strip() for gold in golds if gold.strip())


def take_questions(questions, seed, start, count):
    """Questions `start` to `start + count` of an endless order, a function of the seed and so the
    same on all ranks.

    Each epoch is a shuffle of its own. A checkpoint needs only the number of questions taken so
    far.
    """
    order = []
    while len(order) < start + count:
        epoch = len(order) // len(questions)
        order += np.random.default_rng([seed, epoch]).permutation(questions).tolist()
    return order[start : start + count]
