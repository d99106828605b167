"""The reward: word-level F1 of the answer, or a penalty when there is no answer in the right
format.

The scorer follows the published one to the bit: words are sets, so neither order nor repetition
counts, and articles are words (SQuAD's F1 differs in both). Omitted, as in the paper: any reward
for the way (tool use, length, style).
"""

import itertools
import json
import random
import re
import string
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepresearcher_min.config import ROOT, Config, named
from deepresearcher_min.grpo import group_advantages
from deepresearcher_min.trajectory import POLICY_STOPS, Group, Question, Trajectory
from deepresearcher_min.web import ROLES, Web, WebFailure, count

PUNCTUATION_TO_SPACE = str.maketrans({mark: " " for mark in string.punctuation})
FORMAT_FAILURES = {  # why there is no answer, for people; by stop reason
    "malformed": "its last turn was neither a complete thought with one tool call nor one with an answer",
    "tool_budget": "it asked for another tool after its last allowed call instead of answering",
    "length": "its last turn reached the limit of tokens for a turn (max_turn_tokens)",
    "context": "it reached the limit of tokens for a whole trajectory (max_model_len)",
}
JUDGE_RULES = (ROOT / "prompts/judge.txt").read_text(encoding="utf-8")
JUDGE_FIELDS = re.compile(
    r"\{(question|gt_answer|pred_answer)\}"
)  # in a judge_prompt_file, as in the official prompt
VERDICT = re.compile(r"\W*(CORRECT|INCORRECT)\W*", re.I)


def words(text: str) -> list[str]:
    """'The U.S.' -> ['the', 'u', 's']. Only ASCII punctuation separates: an en dash stays part of
    its word.
    """
    return text.lower().translate(PUNCTUATION_TO_SPACE).split()


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """Word-level F1, best over the gold answers: 'downtown diner' against ['A DINER'] is 1/2 (the
    official scorer).

    Raises ValueError without gold answers, and TypeError for a single string, whose letters would
    pass as answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, not one string {answers[:50]!r}")
    if not answers:
        raise ValueError("a question needs at least one gold answer")
    given, best = set(words(prediction)), 0.0
    for wanted in (set(words(gold)) for gold in answers):
        if common := len(
            given & wanted
        ):  # an empty answer never scores, not even against an empty one
            precision, recall = common / len(given), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction's words equal those of a gold answer, in order, else 0.0 (the official
    scorer).
    """
    f1_score(prediction, answers)  # the same complaints about unusable answers
    return float(any(words(prediction) == words(gold) for gold in answers))


def reward(trajectory: Trajectory, config: Config) -> float:
    """F1 of the answer, or config.format_reward when the trajectory ended without one (paper
    section 3.3).

    Raises ValueError for what the harness ended (deadline, cancelled): it says nothing about the
    policy.
    """
    if trajectory.stop_reason not in POLICY_STOPS:
        raise ValueError(
            f"question {trajectory.question.id!r}: a {trajectory.stop_reason} trajectory has no reward"
        )
    if trajectory.stop_reason != "answer":
        return config.format_reward
    assert trajectory.answer is not None, (
        f"question {trajectory.question.id!r} stopped with an answer: there is none"
    )
    return f1_score(trajectory.answer, trajectory.question.answers)


def explain(trajectory: Trajectory, config: Config) -> str:
    """The reward in words: which gold answer it was compared with, precision and recall, or what
    went wrong.
    """
    if trajectory.stop_reason not in POLICY_STOPS:
        return f"no reward: the harness ended this trajectory ({trajectory.stop_reason}), so it is left out"
    value, answer, golds = (
        reward(trajectory, config),
        trajectory.answer,
        trajectory.question.answers,
    )
    if answer is None:
        return f"reward {value:g} for the format: {FORMAT_FAILURES[trajectory.stop_reason]}"
    best = max(golds, key=lambda gold: f1_score(answer, [gold]))
    given, wanted = set(words(answer)), set(words(best))
    right = len(given & wanted)
    if not right:
        shown = " / ".join(gold[:80] for gold in golds[:3])
        return f"reward {value:g}: {answer[:80]!r} shares no word with the gold answers ({shown})"
    verdict = " (exact match)" if exact_match(answer, golds) else ""
    return (
        f"reward {value:.3g}{verdict}: against {best[:80]!r}, {right} of the {len(given)} words given are right "
        f"(precision {right / len(given):.2f}), {right} of the {len(wanted)} wanted are there "
        f"(recall {right / len(wanted):.2f})"
    )


def judge(
    question: Question, trajectories: Sequence[Trajectory], config: Config, step: int
) -> Group:
    """Rewards and advantages of one question's trajectories; what the harness ended is left out."""
    kept = [trajectory for trajectory in trajectories if trajectory.stop_reason in POLICY_STOPS]
    rewards = [reward(trajectory, config) for trajectory in kept]
    if config.shuffle_rewards:  # a control experiment
        random.Random(f"{config.seed} {step} {question.id}").shuffle(rewards)
    return Group(question, kept, rewards, group_advantages(rewards, config.advantage_std).tolist())


def judge_rules(config: Config) -> str:
    """The text of judge_prompt_file, or ours; ConfigError where it cannot be used."""
    if not config.judge_prompt_file:
        return JUDGE_RULES
    with named("judge_prompt_file", config.judge_prompt_file):
        rules = Path(config.judge_prompt_file).read_text(encoding="utf-8")
        if len(set(JUDGE_FIELDS.findall(rules))) in (1, 2):
            raise ValueError(
                "must hold all of {question}, {gt_answer} and {pred_answer}, or none of them"
            )
    return rules


def judge_messages(rules: str, question: str, golds: list[str], given: str) -> list[dict[str, str]]:
    """What the judge is asked: rules with fields, filled in, as the official scorer does, or rules
    before the case.
    """
    if not JUDGE_FIELDS.search(rules):
        case = json.dumps(
            {"question": question, "accepted": golds, "given": given}, ensure_ascii=False
        )
        return [{"role": "system", "content": rules}, {"role": "user", "content": case}]
    values = {"question": question, "gt_answer": str(golds), "pred_answer": given}
    filled = JUDGE_FIELDS.sub(lambda field: values[field[1]], rules)
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": filled},
    ]


def parse_verdict(reply: str) -> float | None:
    """1.0 or 0.0 by {"judgement": word} in the reply, the official form, or else by a word alone on
    its last line.
    """
    reply = reply.rpartition("</think>")[2].strip()
    told = re.findall(r'"judgement"\s*:\s*"(.*?)"', reply) or reply.splitlines()[-1:]
    verdict = VERDICT.fullmatch(told[0]) if len(told) == 1 else None
    return float(verdict[1].upper() == "CORRECT") if verdict else None


def ask_judge(trajectory: Trajectory, config: Config, web: Web, counts: Counter) -> float | None:
    """MBE, a language model's verdict on an answer: 1 or 0; None, counted as fail_judge_*, where
    there is no verdict.

    No answer is wrong and an exact match is right without asking, as in the official code.
    """
    question, answer = trajectory.question, trajectory.answer
    if answer is None or exact_match(answer, question.answers):
        return float(answer is not None)
    golds = list(question.answers)
    if config.judge_normalize:
        golds, answer = [gold.lower() for gold in golds], " ".join(words(answer))
    messages = judge_messages(judge_rules(config), question.text, golds, answer)
    url = config.judge_url.rstrip("/") + "/chat/completions"
    payload = {
        "model": config.judge_model,
        "messages": messages,
        "temperature": config.judge_temperature,
    }
    deadline = time.monotonic() + config.tool_timeout

    def ask() -> float:
        for _ in range(3):  # replies without a verdict, before an answer stays without one
            text, tokens = web.chat(url, "JUDGE_API_KEY", payload, counts, deadline)
            count(counts, "usd", tokens * config.price_judge_token)
            verdict = parse_verdict(text or "")
            if verdict is not None:
                return verdict
        raise WebFailure("no_verdict", "The judge gave no verdict.")

    try:
        return web.cached("judge", [url, payload], ask, counts, deadline)
    except WebFailure:
        return None


def measures(trajectory: Trajectory) -> dict[str, float]:
    """What counts about one trajectory: f1 and em (0 without an answer), format_errors (0 or 1),
    calls, costs.
    """
    answer, golds = trajectory.answer, trajectory.question.answers
    return {
        "f1": f1_score(answer or "", golds),
        "em": exact_match(answer, golds) if answer is not None else 0.0,
        "format_errors": float(trajectory.stop_reason != "answer"),
        "calls": sum(
            turn.observation != "" for turn in trajectory.turns
        ),  # a call too many is not answered
    } | {name: trajectory.cost.get(name, 0) for name in ("searches", "pages", "usd")}


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means of `measures` over the trajectories that the policy ended; n, their number; F1 by hops
    on the toy.
    """
    kept = [trajectory for trajectory in trajectories if trajectory.stop_reason in POLICY_STOPS]
    rows = [measures(trajectory) for trajectory in kept]
    scores: dict[str, float] = {"n": len(rows)}
    for name in ("f1", "em", "format_errors", "calls", "searches", "pages"):
        scores[name] = sum(row[name] for row in rows) / max(1, len(rows))
    for hops in ("1hop", "2hop"):
        f1 = [
            row["f1"]
            for one, row in zip(kept, rows, strict=True)
            if one.question.source.endswith(hops)
        ]
        if f1:
            scores[f"f1_{hops}"] = sum(f1) / len(f1)
    return scores


def step_sums(groups: Sequence[Group], rollouts: Sequence[Sequence[Trajectory]]) -> Counter[str]:
    """Sums over this rank's share of a step, for `step_means`; costs count for what the harness
    ended, too.
    """
    sums: Counter[str] = Counter({"groups": len(groups), "cost_usd": 0.0})
    for trajectory in itertools.chain(*rollouts):
        sums["lost"] += trajectory.stop_reason not in POLICY_STOPS
        sums.update({f"cost_{name}": amount for name, amount in trajectory.cost.items()})
    for group in groups:
        sums["tied_groups"] += not any(group.advantages)
        for trajectory, value in zip(group.trajectories, group.rewards, strict=True):
            sums.update({"trajectories": 1, "reward": value, "tokens": len(trajectory.token_ids)})
            sums.update(measures(trajectory))
    return sums


def step_means(sums: Counter[str]) -> dict[str, float]:
    """Means over the trajectories of all ranks; lost and cost_... stay totals.

    `tied` is the share of groups, `failed` that of the calls to pages and services.
    """
    count = max(1, sums["trajectories"])
    means = {name: sums[name] / count for name in ("reward", "f1", "calls", "tokens")}
    means |= {
        "bad_format": sums["format_errors"] / count,
        "tied": sums["tied_groups"] / max(1, sums["groups"]),
    }
    failed, asked = (
        sum(sums[f"cost_{source}_{what}"] for source in ("page", *ROLES))
        for what in ("failed", "calls")
    )
    means["failed"] = failed / max(1, asked)
    return means | {
        name: value for name, value in sums.items() if name.startswith("cost_") or name == "lost"
    }
