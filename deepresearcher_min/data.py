"""Questions from files, and the order in which training sees them.

Place in the loop: train.py loads the questions once, takes questions_per_step of them at each step, and each rank
keeps its share (`deal`). The order depends on the seed only, so all ranks agree on it without talking, and a
checkpoint needs just two numbers to continue it.

Omitted: streaming and tokenisation ahead of time; 80,000 questions are a few dozen MB, and prompts are short.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepresearcher_min.trajectory import Question

ANSWER_SPLIT = "<|answer_split|>"  # joins several gold answers in one string of the official files

Item = TypeVar("Item")


def load_questions(path: str | Path) -> list[Question]:
    """Read questions from an official .parquet or from .jsonl with `question`, `answers`, optional `id`, `source`.

    The question's text stays as it is, byte for byte; gold answers lose the spaces around them, and empty ones are
    dropped. A missing id becomes the file's name and the row, and a repeated one gets the row appended. Raises
    ValueError naming the file and the row (parquet: from 0; jsonl: the line, from 1) of the first row that is unusable.
    """
    path = Path(path)
    readers = {".parquet": parquet_rows, ".jsonl": jsonl_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path}: questions come from a file that ends in {' or '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    questions: list[Question] = []
    seen: set[str] = set()
    for where, row in readers[path.suffix](path):
        try:
            question = parse_parquet_row(row) if path.suffix == ".parquet" else parse_jsonl_row(row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, {where}: {reason}") from error
        row_id = question["id"] or f"{path.stem}, {where}"
        if row_id in seen:
            row_id = f"{row_id}, {where}"
        seen.add(row_id)
        questions.append(Question(**{**question, "id": row_id}))
    if not questions:
        raise ValueError(f"{path}: there are no questions in it")
    return questions


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    return ((f"row {number}", row) for number, row in enumerate(rows))


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:  # bytes: text would also be split at U+2028, which JSON allows inside strings
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error


def parse_parquet_row(row: dict[str, Any]) -> dict[str, Any]:
    """The official schema: prompt [{role, content}], reward_model {ground_truth}, data_source, extra_info {index}."""
    users = [message["content"] for message in row["prompt"] or [] if message["role"] == "user"]
    if len(users) != 1:
        raise ValueError(f"prompt has {len(users)} user messages, not 1")
    return {
        "id": str((row.get("extra_info") or {}).get("index") or ""),
        "text": check_text(users[0], "prompt"),
        "answers": split_answers((row["reward_model"] or {})["ground_truth"], "ground_truth"),
        "source": str(row.get("data_source") or ""),
    }


def parse_jsonl_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"not an object with question and answers: {str(row)[:80]}")
    return {
        "id": str(row.get("id") or ""),
        "text": check_text(row["question"], "question"),
        "answers": split_answers(row["answers"], "answers"),
        "source": str(row.get("source") or ""),
    }


def check_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, not {value!r}")
    return value


def split_answers(value: Any, name: str) -> tuple[str, ...]:
    """Gold answers from one string, joined by <|answer_split|>, or from a list of strings."""
    parts = value.split(ANSWER_SPLIT) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name} must be a string or a list of strings, not {str(value)[:80]!r}")
    answers = tuple(part.strip() for part in parts if part.strip())
    if not answers:
        raise ValueError(f"{name} holds no answer: {str(value)[:80]!r}")
    return answers


class QuestionOrder:
    """An endless order of questions: each epoch is a shuffle of its own, a function of seed and epoch only."""

    def __init__(self, questions: Sequence[Question], seed: int):
        if not questions:
            raise ValueError("there are no questions to put in order")
        self.questions, self.seed = tuple(questions), seed
        self.epoch, self.position = 0, 0

    def take(self, n: int) -> list[Question]:
        """The next n questions, in the same order on every rank; goes on with the next epoch where one ends."""
        taken: list[Question] = []
        while len(taken) < n:
            shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.questions))
            piece = shuffled[self.position : self.position + n - len(taken)]
            taken += [self.questions[i] for i in piece]
            self.position += len(piece)
            if self.position == len(self.questions):
                self.epoch, self.position = self.epoch + 1, 0
        return taken

    def state(self) -> dict[str, int]:
        """What restore() needs to continue after the last question taken; JSON-serialisable."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "questions": len(self.questions)}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from state(); ValueError if it belongs to another seed or another number of questions."""
        for name, mine in (("seed", self.seed), ("questions", len(self.questions))):
            if state[name] != mine:
                raise ValueError(f"the saved data order has {name}={state[name]}, this run has {name}={mine}")
        self.epoch, self.position = state["epoch"], state["position"]


def deal(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """This rank's share of the items, dealt out one by one; policy.gather puts the shares back in this order."""
    return list(items[rank::world_size])
