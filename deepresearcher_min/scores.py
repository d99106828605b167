"""The scores of an evaluation from its trajectories: of one run, and of several runs over the same questions.

Left out: tests of significance; the interval and the deviation over runs say what a difference is worth.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import mode
from typing import Any

import numpy as np

from deepresearcher_min import report
from deepresearcher_min.config import Config, host_list
from deepresearcher_min.reward import measures, summarize, words
from deepresearcher_min.trajectory import Trajectory

Scores = dict[str, Any]
Verdicts = Mapping[str, float | None]  # of the judge, by question


def scores_of(found: Sequence[Trajectory], verdicts: Verdicts, config: Config) -> Scores:
    """summarize(), and F1's interval, MBE over the answers with a verdict, behaviours, dollars, what was blocked."""
    shown = Counter(name for one in found for name in report.behaviours(one))
    costs = sum((Counter(one.cost) for one in found), Counter())
    rows = [{"f1": measures(one)["f1"], "mbe": verdicts.get(one.question.id)} for one in found]
    scores: Scores = {name: shown[name] / len(found) for name in report.BEHAVIOURS}
    scores |= {"f1_interval": interval(rows), "mbe": mean(rows, "mbe"), "usd": costs["usd"]}
    if host_list(config):
        scores["blocked"] = costs["blocked"] + costs["fail_blocked_host"]
    return {**summarize(found), **scores}


def interval(rows: Sequence[Scores]) -> list[float]:
    """The 95 % interval of the mean F1, from 2,000 draws of as many questions."""
    means = np.random.default_rng(0).choice([row["f1"] for row in rows], (2000, len(rows))).mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).round(3).tolist()


def mean(rows: Sequence[Scores], name: str) -> float | None:
    """The mean of a score over the rows that have it."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None


def scores_over_runs(
    runs: Sequence[Sequence[Trajectory]], verdicts: Sequence[Verdicts], config: Config
) -> tuple[Scores, list[Scores]]:
    """(means over the runs, scores_of each run). Several have deviations, pass@k and the majority's scores, too.

    Their interval draws questions, with the mean F1 of each. What has no result or no verdict is left out.
    """
    each, answers = list[Scores](), defaultdict[str, list[Scores]](list)
    for found, known in zip(runs, verdicts, strict=True):
        for one in found:
            text = None if one.answer is None else " ".join(words(one.answer))
            row = {**measures(one), "mbe": known.get(one.question.id), "text": text}
            answers[one.question.id].append(row)
        if found:
            each.append(scores_of(found, known, config))
    if config.repeats == 1:
        return each[0], each
    scores: Scores = {name: mean(each, name) for name in each[0] if name != "f1_interval"}
    averages = [{"f1": mean(rows, "f1")} for rows in answers.values()]
    scores |= {"n": len(answers), "f1_interval": interval(averages)}
    chosen = [majority(rows) for rows in answers.values()]
    for name in ("f1", "em", "mbe"):
        values = [row[name] for row in each if row[name] is not None]
        scores[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        scores[f"majority_{name}"] = mean(chosen, name)
    right = "em" if scores["mbe"] is None else "mbe"
    best = [max(rows, key=lambda row: row[right] or 0.0) for rows in answers.values()]
    return {**scores, "pass_at_k": mean(best, right)}, each


def majority(rows: Sequence[Scores]) -> Scores:
    """The run with the commonest answer, as the scorer reads it; the earliest of equally common ones."""
    texts = [row["text"] for row in rows if row["text"] is not None]
    commonest = mode(texts) if texts else None
    return next(row for row in rows if row["text"] == commonest)
