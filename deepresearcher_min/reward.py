"""The reward: word-level F1 of the answer, or a penalty when there is no answer in the right format.

Place in the loop: train.py calls `reward` on every finished trajectory; eval.py calls `f1_score` and `exact_match`.
A fork with another reward changes `reward` and nothing else.

The scorer follows the published one to the bit: words are sets, so neither order nor repetition counts; articles
count as words; lower case; each ASCII punctuation mark is a space; the best of all gold answers counts. (SQuAD's
F1, which many papers quote, drops articles and counts repeated words.)

Omitted: any reward for the way (tool use, length, style). The paper rewards the outcome only.
"""

import random
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from deepresearcher_min.config import Config
from deepresearcher_min.grpo import group_advantages
from deepresearcher_min.trajectory import POLICY_STOPS, Group, Question, Trajectory

PUNCTUATION_TO_SPACE = str.maketrans({mark: " " for mark in string.punctuation})

# Why there is no answer, for people. Keys are the policy's stop reasons (trajectory.POLICY_STOPS) but "answer".
FORMAT_FAILURES = {
    "malformed": "its last turn was neither a complete thought with one tool call nor one with an answer",
    "tool_budget": "it asked for another tool after its last allowed call instead of answering",
    "length": "its last turn reached the limit of tokens for a turn (max_turn_tokens)",
    "context": "it reached the limit of tokens for a whole trajectory (max_model_len)",
}


class Score(NamedTuple):
    """How one prediction compares with one gold answer."""

    f1: float
    precision: float
    recall: float
    gold: str


def words(text: str) -> list[str]:
    """'The U.S.' -> ['the', 'u', 's']. Only ASCII punctuation separates: an en dash stays part of its word."""
    return text.lower().translate(PUNCTUATION_TO_SPACE).split()


def best_score(prediction: str, answers: Sequence[str]) -> Score:
    """The gold answer with the highest F1 (the first of equals), and precision and recall against it.

    Raises ValueError without gold answers, and TypeError for a single string, whose letters would pass as answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, not one string {answers[:50]!r}")
    if not answers:
        raise ValueError("a question needs at least one gold answer")
    predicted = set(words(prediction))
    best = Score(0.0, 0.0, 0.0, answers[0])
    for gold in answers:
        wanted = set(words(gold))
        common = len(predicted & wanted)
        if common == 0:  # also when either has no words: an empty answer never scores
            continue
        precision, recall = common / len(predicted), common / len(wanted)
        score = Score(2 * precision * recall / (precision + recall), precision, recall, gold)
        best = max(best, score, key=lambda each: each.f1)
    return best


def f1_score(prediction: str, answers: list[str]) -> float:
    """Word-level F1 of a prediction, 0 to 1, best over the gold answers (the official scorer).

    Example: 'downtown diner' against ['A DINER'] has precision 1/2, recall 1/2, F1 1/2.
    """
    return best_score(prediction, answers).f1


def exact_match(prediction: str, answers: list[str]) -> float:
    """1.0 if the prediction's words equal those of a gold answer, in order, else 0.0 (the official scorer)."""
    best_score(prediction, answers)  # the same complaints about unusable answers
    return float(any(words(prediction) == words(gold) for gold in answers))


def reward(trajectory: Trajectory, config: Config) -> float:
    """F1 of the answer, or config.format_reward when the trajectory ended without one (paper section 3.3).

    Raises ValueError for a trajectory that the harness ended (deadline, cancelled): it says nothing about the
    policy and must be left out of group and loss.
    """
    if trajectory.stop_reason not in POLICY_STOPS:
        raise ValueError(f"question {trajectory.question.id!r}: a {trajectory.stop_reason} trajectory has no reward")
    if trajectory.stop_reason != "answer":
        return config.format_reward
    if trajectory.answer is None:
        raise ValueError(f"question {trajectory.question.id!r}: stopped with an answer, but there is none")
    return f1_score(trajectory.answer, list(trajectory.question.answers))


def explain(trajectory: Trajectory, config: Config) -> str:
    """The reward in words: which gold answer it was compared with, precision and recall, or what went wrong."""
    if trajectory.stop_reason not in POLICY_STOPS:
        return f"no reward: the harness ended this trajectory ({trajectory.stop_reason}), so it is left out"
    value = reward(trajectory, config)
    if trajectory.stop_reason != "answer":
        return f"reward {value:g} for the format: {FORMAT_FAILURES[trajectory.stop_reason]}"
    score = best_score(trajectory.answer, trajectory.question.answers)
    if score.f1 == 0:
        golds = " / ".join(shorten(gold) for gold in trajectory.question.answers[:3])
        return f"reward 0: {shorten(trajectory.answer)!r} shares no word with the gold answers ({golds})"
    verdict = " (exact match)" if exact_match(trajectory.answer, list(trajectory.question.answers)) else ""
    predicted, wanted = set(words(trajectory.answer)), set(words(score.gold))
    common = len(predicted & wanted)
    return (
        f"reward {value:.3g}{verdict}: against {shorten(score.gold)!r}, {common} of the {len(predicted)} words given "
        f"are right (precision {score.precision:.2f}), {common} of the {len(wanted)} wanted are there "
        f"(recall {score.recall:.2f})"
    )


def shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def judge(question: Question, trajectories: Sequence[Trajectory], config: Config, seed: int) -> Group:
    """Rewards and advantages of one question's trajectories; what the harness ended is left out.

    With config.shuffle_rewards (a control experiment) the rewards are permuted inside the group.
    """
    kept = [trajectory for trajectory in trajectories if trajectory.stop_reason in POLICY_STOPS]
    rewards = [reward(trajectory, config) for trajectory in kept]
    if config.shuffle_rewards:
        random.Random(seed).shuffle(rewards)
    return Group(question, kept, rewards, group_advantages(rewards, config.advantage_std).tolist())


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over trajectories: f1, em (0 without an answer), format_errors [share], calls, searches, pages; and n.

    Where data sources are named ..._1hop and ..._2hop, f1_1hop and f1_2hop are their F1.
    """
    kept = [trajectory for trajectory in trajectories if trajectory.stop_reason in POLICY_STOPS]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    def f1(trajectory: Trajectory) -> float:
        return f1_score(trajectory.answer, list(trajectory.question.answers)) if trajectory.answer is not None else 0.0

    scores = {
        "n": len(kept),
        "f1": mean([f1(t) for t in kept]),
        "em": mean([exact_match(t.answer, list(t.question.answers)) if t.answer is not None else 0.0 for t in kept]),
        "format_errors": mean([t.stop_reason != "answer" for t in kept]),
        "calls": mean([sum(turn.kind in ("search", "browse") for turn in t.turns) for t in kept]),
        "searches": mean([t.cost.get("searches", 0) for t in kept]),
        "pages": mean([t.cost.get("pages", 0) for t in kept]),
    }
    for hops in ("1hop", "2hop"):
        chosen = [t for t in kept if t.question.source.endswith(hops)]
        if chosen:
            scores[f"f1_{hops}"] = mean([f1(t) for t in chosen])
    return scores


def step_sums(groups: Sequence[Group], rollouts: Sequence[Sequence[Trajectory]]) -> Counter[str]:
    """Sums over this rank's share of a step, for `step_means`; costs count for what the harness ended, too."""
    sums: Counter[str] = Counter({"groups": len(groups), "cost_usd": 0.0})
    for trajectory in (each for rollout in rollouts for each in rollout):
        sums["lost"] += trajectory.stop_reason not in POLICY_STOPS
        sums.update({f"cost_{name}": amount for name, amount in trajectory.cost.items()})
    for group in groups:
        sums["tied_groups"] += not any(group.advantages)
        for trajectory, value in zip(group.trajectories, group.rewards, strict=True):
            answered = trajectory.answer is not None
            sums["trajectories"] += 1
            sums["reward"] += value
            sums["f1"] += f1_score(trajectory.answer, list(trajectory.question.answers)) if answered else 0.0
            sums["bad_format"] += trajectory.stop_reason != "answer"
            sums["calls"] += sum(turn.kind in ("search", "browse") for turn in trajectory.turns)
            sums["tokens"] += len(trajectory.token_ids)
    return sums


def step_means(sums: Counter[str]) -> dict[str, float]:
    """Means over the trajectories of all ranks; `tied` is the share of groups; lost and cost_... stay totals."""
    count = max(1, sums["trajectories"])
    means = {name: sums[name] / count for name in ("reward", "f1", "bad_format", "calls", "tokens")}
    totals = {name: value for name, value in sums.items() if name.startswith("cost_") or name == "lost"}
    return means | {"tied": sums["tied_groups"] / max(1, sums["groups"])} | totals
