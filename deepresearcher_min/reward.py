"""The reward: word-level F1 of the answer, or a penalty when there is no answer in the right
format; and MBE (model-based evaluation), a model's verdict, by which evaluations score, too.

The scorer follows the published one to the bit: words are sets, so neither order nor repetition
counts, and articles are words (SQuAD's F1 differs in both). Omitted, as in the paper: any reward
for how the answer was reached (tool use, length, style).
"""

import json
import random
import re
import time

from deepresearcher_min.config import WORDS, Config, WebFailure
from deepresearcher_min.grpo import group_advantages
from deepresearcher_min.search import JUDGE_FIELDS, ask_service, judge_rules, parse_verdict
from deepresearcher_min.trajectory import POLICY_STOPS, Group, Trajectory


def words(text):
    """'The U.S.' -> ['the', 'u', 's']. Only ASCII punctuation separates: an en dash stays part of
    its word.
    """
    return re.findall(r"[^\s!-/:-@\[-`{-~]+", text.lower())


def f1_score(prediction: str, answers: list | tuple) -> float:
    """Word-level F1, best over the gold answers: 'downtown diner' against ['A DINER'] is 1/2 (the
    official scorer).

    Raises ValueError without gold answers, and TypeError for a single string, whose letters would
    pass as answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, not one string {answers[:50]!r}")
    if not answers:
        raise ValueError("a question needs at least one gold answer")
    best = 0.0
    given = set(words(prediction))
    for gold in answers:
        wanted = set(words(gold))
        common = len(given & wanted)
        if common:  # an empty answer never scores, not even against an empty one
            precision = common / len(given)
            recall = common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def exact_match(prediction: str, answers: list | tuple) -> float:
    """1.0 if the prediction's words equal those of a gold answer, in order, else 0.0 (the official
    scorer).
    """
    f1_score(prediction, answers)  # the same complaints about unusable answers
    return float(words(prediction) in map(words, answers))


def reward(trajectory: Trajectory, config: Config) -> float:
    """F1 of the answer, or config.format_reward when the trajectory ended without one (paper
    section 3.3).

    Raises ValueError for what the harness ended (deadline, cancelled): it says nothing about the
    policy.
    """
    if trajectory.stop_reason not in POLICY_STOPS:
        raise ValueError(
            f"question {trajectory.question.id!r}: a {trajectory.stop_reason} trajectory has no "
            "reward"
        )
    if trajectory.stop_reason != "answer":
        return config.format_reward
    assert trajectory.answer is not None, "stopped with an answer: there is none"
    return f1_score(trajectory.answer, trajectory.question.answers)


def explain(trajectory, config):
    """The reward in words: which gold answer it was compared with, precision and recall, or what
    went wrong.
    """
    answer = trajectory.answer
    stop_reason = trajectory.stop_reason
    if stop_reason not in POLICY_STOPS:
        return f"no reward: the harness ended this trajectory ({stop_reason}), so it is left out"
    value = reward(trajectory, config)
    if answer is None:
        return f"reward {value:g} for the format: {WORDS[stop_reason]}"
    golds = trajectory.question.answers
    best = max(golds, key=lambda gold: f1_score(answer, [gold]))
    given = set(words(answer))
    wanted = set(words(best))
    right = len(given & wanted)
    if not right:
        shown = " / ".join(gold[:80] for gold in golds[:3])
        return f"reward {value:g}: {answer[:80]!r} shares no word with the gold answers ({shown})"
    verdict = " (exact match)" if exact_match(answer, golds) else ""
    return (
        f"reward {value:.3g}{verdict}: against {best[:80]!r}, "
        f"{right} of the {len(given)} words given are right (precision {right / len(given):.2f}), "
        f"{right} of the {len(wanted)} wanted are there (recall {right / len(wanted):.2f})"
    )


def judge(question, trajectories, config, step) -> Group:
    """Rewards and advantages of one question's trajectories; what the harness ended is left out. No
    model is asked: that is ask_judge.
    """
    kept = [one for one in trajectories if one.stop_reason in POLICY_STOPS]
    rewards = [reward(one, config) for one in kept]
    if config.shuffle_rewards:  # a control experiment
        random.Random(f"{config.seed} {step} {question.id}").shuffle(rewards)
    return Group(question, kept, rewards, group_advantages(rewards, config.advantage_std).tolist())


def ask_judge(trajectory: Trajectory, config: Config, web, counts) -> float | None:
    """MBE, a language model's verdict on an answer: 1 or 0; None, counted as fail_judge_*, where
    there is no verdict. `web` is a web.Web.

    No answer is wrong and an exact match is right without asking, as in the official code. The
    case follows the rules as a JSON message of its own; but rules with fields (JUDGE_FIELDS), as
    the official prompt has, get it filled into them.
    """
    answer = trajectory.answer
    golds = list(trajectory.question.answers)
    if answer is None or exact_match(answer, golds):
        return float(answer is not None)
    if config.judge_normalize:
        golds = [*map(str.lower, golds)]
        answer = " ".join(words(answer))
    rules = judge_rules(config)
    question = trajectory.question.text
    case = {"question": question, "accepted": golds, "given": answer}
    asked = json.dumps(case, ensure_ascii=False)
    if JUDGE_FIELDS.search(rules):
        fields = {"question": question, "gt_answer": str(golds), "pred_answer": answer}
        asked = JUDGE_FIELDS.sub(lambda field: fields[field[1]], rules)
        rules = "You are a helpful assistant."
    messages = [{"role": "system", "content": rules}, {"role": "user", "content": asked}]
    deadline = time.monotonic() + config.tool_timeout
    try:
        return ask_service(
            "judge", config, web, messages, parse_verdict, "no_verdict", counts, deadline
        )
    except WebFailure:
        return None
