"""The data that flows: Question -> Trajectory -> Group. Nothing here computes; it holds and checks.

A trajectory is one flat list of token ids that only ever grows by appending:

    P0 prompt | A0 sampled | E0 observation | A1 sampled ...
    token_ids    = P0 + A0 + E0 + A1
    sampled_mask = 0..0  1..1  0..0  1..1

Token ids, once sampled, are never decoded and encoded again on their way into the loss: text is derived
from ids, for parsing and for people. Rewards and advantages live in the Group, not in the trajectory, so
that no field ever changes its meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# How a trajectory ended. The first group is the policy's doing and is rewarded; the second is the
# harness's or the world's fault and is left out of group and loss.
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
    """One assistant turn and what the world said to it, as text for people; the ids are in the trajectory.

    `sampled` and `observed` are [start, end) spans of Trajectory.token_ids; `observed` is empty
    (start == end) for a turn that ended the trajectory.
    """

    sampled: tuple[int, int]
    observed: tuple[int, int]
    text: str  # what the model wrote, the forced "<think>" in front, the end-of-turn token left out
    kind: str  # search | browse | answer | malformed
    observation: str = ""


@dataclass(frozen=True)
class Trajectory:
    """Everything that happened on one question, once.

    token_ids: [T] int32. sampled_mask: [T] bool, true exactly where the model sampled token i.
    logprobs: [T] float32, the engine's log-probability of a sampled token, nan elsewhere.
    cost: counters of this trajectory (searches, pages, bytes, failures by kind, ...).
    Raises ValueError when lengths differ or a sampled token has no finite log-probability.
    """

    question: Question
    token_ids: np.ndarray
    sampled_mask: np.ndarray
    logprobs: np.ndarray
    turns: tuple[Turn, ...]
    answer: str | None
    stop_reason: str
    cost: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in (("token_ids", np.int32), ("sampled_mask", np.bool_), ("logprobs", np.float32)):
            array = np.array(getattr(self, name), dtype=dtype)  # a copy: nothing outside can change it
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        lengths = {len(self.token_ids), len(self.sampled_mask), len(self.logprobs)}
        if len(lengths) != 1:
            raise ValueError(f"trajectory of question {self.question.id!r}: lengths differ: {sorted(lengths)}")
        if not np.isfinite(self.logprobs[self.sampled_mask]).all():
            raise ValueError(f"trajectory of question {self.question.id!r}: a sampled token has no finite logprob")
        if self.stop_reason not in POLICY_STOPS + HARNESS_STOPS:
            raise ValueError(f"unknown stop reason {self.stop_reason!r}")

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens, end-of-turn tokens included."""
        return int(self.sampled_mask.sum())

    def to_json(self) -> dict[str, Any]:
        """A dict that json.dumps accepts; log-probabilities only of the sampled tokens, in order."""
        return {
            "id": self.question.id,
            "question": self.question.text,
            "answers": list(self.question.answers),
            "source": self.question.source,
            "answer": self.answer,
            "stop_reason": self.stop_reason,
            "cost": dict(self.cost),
            "turns": [vars(turn) for turn in self.turns],
            "token_ids": self.token_ids.tolist(),
            "sampled_mask": self.sampled_mask.astype(int).tolist(),
            "logprobs": [round(float(x), 6) for x in self.logprobs[self.sampled_mask]],
        }


@dataclass(frozen=True)
class Group:
    """The G trajectories of one question, with their rewards and group-relative advantages ([G] each)."""

    question: Question
    trajectories: Sequence[Trajectory]
    rewards: Sequence[float]
    advantages: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.trajectories) == len(self.rewards) == len(self.advantages):
            raise ValueError(
                f"group of question {self.question.id!r}: {len(self.trajectories)} trajectories, "
                f"{len(self.rewards)} rewards, {len(self.advantages)} advantages"
            )
