"""What the tests of reports share: trajectories written by hand, and run folders as train.py leaves
them.
"""

import json
import random
import re
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import yaml

from deepresearcher_min import report
from deepresearcher_min.config import load_config
from deepresearcher_min.protocol import Entry, page_item, render, search_item
from deepresearcher_min.reward import explain
from deepresearcher_min.trajectory import Group, Question, Trajectory, Turn

CONFIG = load_config([])
WHY = partial(explain, config=CONFIG)


def plain(trajectory):
    """All of a trajectory, to be compared."""
    return report.jsonable(asdict(trajectory))


def build(question, script, answer, stop_reason="answer", seed=0):
    """A trajectory from [(kind, text, observation)]: about four characters to a token, logprobs
    from a seed.
    """
    rng = np.random.default_rng(seed)
    mask, turns = [False] * 40, []
    for kind, text, observation in script:
        start, end = len(mask), len(mask) + 2 + len(text) // 4
        seen = end + len(observation) // 4
        mask += [True] * (end - start) + [False] * (seen - end)
        turns.append(Turn((start, end), (end, seen), text, kind, observation))
    logprobs = np.where(mask, -rng.exponential(0.3, len(mask)), np.nan)
    ids = rng.integers(0, 500, len(mask))
    cost = {"searches": sum(kind == "search" for kind, _, _ in script)}
    return Trajectory(question, ids, mask, logprobs, tuple(turns), answer, stop_reason, cost)


def researcher(
    question, answer, seed=0, title="Ray Lake", note="He lived in Liverpool.", stop_reason="answer"
):
    url, look = (
        "https://example.org/lake",
        "I look first, then I read." if question.id == "q3" else "Look.",
    )
    hits = (search_item(f"About {title}", title, url), search_item("b", "B", "u"))
    found = render("search", [Entry(f"ray lake {title}", hits)])
    notes = render("browse", [Entry(url, (page_item(note), page_item("More.", 1)))])
    script = [
        (
            "search",
            f'<think> {look} </think>\n<tool_call>{{"name": "web_search"}}</tool_call>',
            found,
        ),
        (
            "browse",
            '<think> Read. </think>\n<tool_call>{"name": "browse_webpage"}</tool_call>',
            notes,
        ),
        ("answer", f"<think> Known. </think>\n<answer> {answer} </answer>", ""),
    ]
    if stop_reason == "malformed":
        script[-1] = ("malformed", "<think> the the the", "")
    return build(question, script, answer if stop_reason == "answer" else None, stop_reason, seed)


def group(number, step=1, size=4):
    rng = random.Random(f"{number} {step}")
    question = Question(
        f"q{number}",
        f"Where was number {number} born?",
        ("Liverpool",),
        ("nq", "2wiki")[number % 2],
    )
    rewards = [rng.choice([1.0, 0.5, 0.0, -1.0]) for _ in range(size)]
    stops = ["malformed" if reward < 0 else "answer" for reward in rewards]
    trajectories = [
        researcher(question, "Liverpool", i, stop_reason=stop) for i, stop in enumerate(stops)
    ]
    return Group(
        question, trajectories, rewards, [reward - sum(rewards) / size for reward in rewards]
    )


def write_run(folder, steps=6, questions=4, size=4):
    """A run folder as train.py leaves it; returns its folder."""
    metrics = folder / "metrics.jsonl"
    report.append_json_line(metrics, {"step": 0, "eval": {"f1": 0.26}})
    for step in range(1, steps + 1):
        share = step / steps
        numbers = {
            "reward": share - 0.1,
            "f1": share,
            "bad_format": 0.1 - 0.1 * share,
            "calls": 2.0,
            "mismatch": 2e-6,
        }
        row = {"step": step, "steps": steps, **numbers, "kl": 0.01, "roll_s": 2.0, "update_s": 1.0}
        report.append_json_line(metrics, row)
        groups = [group(number, step, size) for number in range(questions)]
        report.write_trajectories(
            folder / "trajectories" / f"step-{step:06d}.jsonl", step, groups, WHY
        )
    evaluation = [group(number, 0, 1) for number in range(questions)]
    report.write_trajectories(folder / "trajectories" / "eval-before.jsonl", 0, evaluation, WHY)
    summary = {
        "seed": 0,
        "seconds": 90.0,
        "before": {"f1": 0.26, "em": 0.2},
        "after": {"f1": 0.99, "em": 0.98},
    }
    summary["table"] = report.score_rows({name: summary[name] for name in ("before", "after")})
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("preset: toy\nmodel: toy\nlr: 0.0004\n")
    return folder


def write_html(folder):
    """The page of a folder with the config and the summary that are in it, if any."""
    values, summary = {}, {}
    if (folder / "config.yaml").exists():
        values = yaml.safe_load((folder / "config.yaml").read_text())
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
    report.publish(replace(load_config([f"--run_dir={folder}"]), **values), summary)
    return folder / "report.html"


def page_data(path):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1]
    )
