"""What a run tells people: console line, metrics.jsonl (trackers read it), curves, tables,
trajectories, report.html.

What the web and the model wrote is hostile: text files get it without control characters, the page
as text nodes.
"""

import ast
import base64
import hashlib
import json
import random
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import numpy as np
import yaml

from deepresearcher_min.config import ROOT, replace_file
from deepresearcher_min.trajectory import Question, Trajectory, Turn

MAX_TRAJECTORIES = 4096  # that the page embeds; the files in trajectories/ hold all of them
# Characters of turns and observations on the page; what is beyond is cut to MAX_TURN.
MAX_PAGE_TEXT = 16_000_000
MAX_TURN = 1000  # characters of a turn, without its observation

# The console line of a step; every format begins with its width, in one digit.
STEP_LINE = (
    "step {step:3d}/{steps:1d} | reward {reward:5.2f} | f1 {f1:4.2f} | "
    "bad_format {bad_format:4.0%} | tied {tied:4.0%} | calls {calls:4.1f} | failed {failed:4.0%} | "
    "tokens {tokens:5} | kl {kl:6.4f} | mismatch {mismatch:7.2g} | grad {grad_norm:5.2f} | "
    "roll {roll_s:5.1f}s upd {update_s:5.1f}s | ${usd:1.2f}"
)
# The rows of a table: {key of an evaluation: (name, format)}.
SCORES = yaml.safe_load((ROOT / "deepresearcher_min/scores.yaml").read_bytes())
# {name: regular expressions}
BEHAVIOURS = yaml.safe_load((ROOT / "deepresearcher_min/behaviours.yaml").read_bytes())
PAGE = (ROOT / "deepresearcher_min/report.html").read_text("utf-8")


# --- lines and tables


class Missing:
    """What was not measured: a dash, as wide as the figure would be."""

    def __format__(self, form: str) -> str:
        return "-".rjust(int(form[0]))


def step_line(metrics: dict) -> str:
    """The console line of one step, from its metrics {"f1": 0.41, "em": 0.35, ...}; columns keep
    their width; shares are in [0, 1]; a missing value prints '-'.
    """
    figures = defaultdict(Missing, metrics)
    tokens = metrics.get("tokens")
    if tokens:
        short = f"{tokens / 1000:4.1f}k"
        figures["tokens"] = short if tokens >= 1000 else f"{tokens:5.0f}"
    line = STEP_LINE.format_map(figures)
    return re.sub(r"(?<![\d$])(-?)0\.", r" \1.", line)  # .41 is easier to read than 0.41


def score_rows(named: dict) -> list:
    """A table of evaluations {name: scores} side by side, the head first; what none of them
    measured is left out.
    """
    rows = [["", *map(printable, named)]]
    for key, (name, form) in SCORES.items():
        cells = []
        for scores in named.values():
            value = scores.get(key)
            ends = np.ravel([] if value is None else value)  # one number, or an interval
            cells.append("–".join(format(end, form) for end in ends) or "-")
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return rows


def text_table(rows: list, markdown: bool = False) -> str:
    """Rows of cells, the head first, as aligned text or as a Markdown table."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    end = ":" if markdown else "-"  # figures are aligned to the right
    rule = ["-" * first, *("-" * (width - 1) + end for width in others)]
    lines = []
    for name, *figures in [rows[0], rule, *rows[1:]]:
        cells = [name.ljust(first), *map(str.rjust, figures, others)]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    return "\n".join(lines)


def curve_png(metrics: list, path: Path, before: dict, after: dict):
    """Draw reward and F1 of the sampled trajectories, and greedy F1 before and after; the page has
    all the curves.
    """
    from matplotlib.figure import Figure  # here: only this picture needs it

    figure = Figure(figsize=(8, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in metrics]
    for key, color in (("reward", "#9aa5b1"), ("f1", "#1f66b0")):
        values = np.array([row.get(key) for row in metrics], float)  # nan for what there is not
        axes.plot(steps, values, label=f"{key}, sampled", color=color)
    ends = [0, max(steps, default=1)]
    greedy = np.array([before.get("f1"), after.get("f1")], float)
    axes.plot(ends, greedy, "o", label="f1, greedy, held-out questions", color="#c2410c")
    axes.set(xlabel="step", ylim=(None, 1.1))
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(path)


# --- files of JSON lines


def jsonable(value):
    """A copy with array and tensor numbers as Python's, and with None for nan and infinity, which
    JSON lacks.
    """
    text = json.dumps(value, default=lambda number: number.item())
    return json.loads(text, parse_constant=lambda name: None)


def read_json_lines(path: Path):
    """The objects in a file of JSON lines (none without the file); a line torn by a kill is passed
    over.
    """
    with suppress(FileNotFoundError), path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError):
                yield json.loads(line)


def append_json_line(path: Path, row: dict):
    """Append one line; a torn last one is ended, lest it swallow this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(jsonable(row)).encode()
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")
        file.write(line + b"\n")


def resume_metrics(path: Path, step: int) -> list:
    """The rows of metrics.jsonl up to this step; those after it, whose steps will run again, leave
    the file, too.
    """
    rows = [row for row in read_json_lines(path) if row["step"] <= step]
    lines = [*map(json.dumps, rows), ""]
    replace_file(path, "\n".join(lines).encode())
    return rows


# --- trajectories


def behaviours(trajectory: Trajectory) -> list:
    """Which behaviours of the paper's section 6 the words of its turns show; how well:
    tests/test_report.py.
    """
    turns = trajectory.turns
    where = {"plans": turns[:1], "admits": turns[-1:]}
    later = [turn for turn in turns[1:] if turn.kind in ("search", "browse")]
    shown = []
    for name, patterns in BEHAVIOURS.items():
        thoughts = [turn.text.partition("<tool_call>")[0] for turn in where.get(name, later)]
        if re.search("|".join(patterns), " ".join(thoughts), re.I | re.S):
            shown.append(name)
    return shown


def write_trajectories(path: Path, step: int, groups: Sequence, explain: Callable, first: int = 0):
    """Append each trajectory as one JSON line: to_json(), its reward and why (explain(trajectory)),
    each turn's mean logprob.

    `index` numbers the trajectories of a group from `first`: in an evaluation it is the run.
    """
    for group in groups:
        for number, one in enumerate(group.trajectories):
            turns = [
                {**vars(turn), "logprob": one.logprobs[slice(*turn.sampled)].mean()}
                for turn in one.turns
            ]
            row = one.to_json() | {
                "step": step,
                "index": first + number,
                "reward": group.rewards[number],
                "advantage": group.advantages[number],
                "why": explain(one),
                "behaviours": behaviours(one),
                "turns": turns,
            }
            append_json_line(path, row)


def read_trajectory(row: dict) -> Trajectory:
    """What write_trajectories wrote, the log-probabilities rounded to six digits."""
    logprobs = np.full(len(row["token_ids"]), np.nan)
    np.place(logprobs, row["sampled_mask"], row["logprobs"])
    turns = []
    for turn in row["turns"]:
        spans = tuple(turn["sampled"]), tuple(turn["observed"])
        turns.append(Turn(*spans, turn["text"], turn["kind"], turn["observation"]))
    return Trajectory(
        Question(row["id"], row["question"], tuple(row["answers"]), row["source"]),
        row["token_ids"],
        row["sampled_mask"],
        logprobs,
        tuple(turns),
        row["answer"],
        row["stop_reason"],
        row["cost"],
    )


def printable(text: str) -> str:
    """Without escape sequences, and without what UTF-8 cannot hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def readable(trajectory: Trajectory, why: str = "") -> str:
    """A trajectory as text for people: question, gold answers, what was written and observed, and
    the reward.
    """
    question = trajectory.question
    text = f"Question ({question.source or 'no source'}): {question.text}\n"
    for number, turn in enumerate(trajectory.turns, 1):
        text += f"\n--- turn {number}: {turn.kind}\n{turn.text}\n"
        if turn.observation:
            observed = textwrap.fill(turn.observation, 112)
            text += f"\n{textwrap.indent(observed, '    ')}\n"
    text += f"\n--- end: {trajectory.stop_reason}\nAnswer: {trajectory.answer}"
    if why:
        text += f"\nGold: {' | '.join(question.answers)}\n{why}"
    return printable(text)


def write_readable(path: Path, groups: Sequence, explain: Callable):
    """The trajectories with the highest and with the lowest reward of these groups, as one text
    file.
    """
    scored: list = []
    for group in groups:
        scored += zip(group.rewards, group.advantages, group.trajectories, strict=True)
    text = ""
    for name, pick in (("Highest", max), ("Lowest", min)):
        if scored:
            reward, advantage, one = pick(scored, key=itemgetter(0))
            text += f"=== {name} reward: {reward:.3f}, advantage {advantage:+.3f}\n"
            text += f"{readable(one, explain(one))}\n\n"
    path.write_text(text, "utf-8")


# --- the page


def write_html(run_dir: Path) -> Path:
    """Write report.html, one file without requests, from what a run folder holds: a stopped run has
    a page, too.
    """
    data = json.dumps(page_data(run_dir.resolve()), ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # no text can end the script element
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):  # only the template's own, known by their hashes, may run
        own = PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest())
        policy += f"; {tag}-src 'sha256-{digest.decode()}'"
    page = PAGE.replace("__POLICY__", policy, 1).replace("__DATA__", data, 1)
    path = run_dir / "report.html"
    path.write_text(page, "utf-8", "replace")
    return path


def page_data(run_dir: Path) -> dict:
    """What the page embeds of a run folder."""
    page: dict = {"name": run_dir.name, "config": {}, "summary": {}, "compared": []}
    with suppress(FileNotFoundError):
        page["config"] = yaml.safe_load((run_dir / "config.yaml").read_bytes())
    with suppress(FileNotFoundError, KeyError):  # of a stopped run; of an evaluation
        page["summary"] = summary = json.loads((run_dir / "summary.json").read_bytes())
        page["compared"] = score_rows({"before": summary["before"], "after": summary["after"]})
    page["metrics"] = list(read_json_lines(run_dir / "metrics.jsonl"))
    return page | load_trajectories(run_dir / "trajectories")


def load_trajectories(folder: Path) -> dict:
    """What the page embeds of trajectories/*.jsonl, evaluations and late steps first, and a
    sentence about it.
    """
    files = sorted(folder.glob("eval*.jsonl"), reverse=True)
    files += sorted(folder.glob("step*.jsonl"), reverse=True)
    rows: dict = {}
    for file in files:
        if len(rows) >= MAX_TRAJECTORIES:
            break
        for row in read_json_lines(file):
            row |= {"file": file.stem, "tokens": len(row["token_ids"])}
            for key in ("token_ids", "sampled_mask", "logprobs"):
                del row[key]
            # Official data has answers of 40 kB.
            row["answers"] = [answer[:300] for answer in row["answers"][:20]]
            # A step that ran twice is shown once.
            rows[file.stem, row["step"], row["id"], row["index"]] = row
    kept = list(rows.values())[:MAX_TRAJECTORIES]
    kept.sort(key=itemgetter("step", "file"))
    shown = {row["file"] for row in kept}
    note = f"{len(kept):,} trajectories from {len(shown)} of {len(files)} files"
    cut = shorten(kept)
    if cut:
        note += f"; {cut:,} of them without observations, to keep the page small"
    return {"trajectories": kept, "note": note}


def shorten(rows: list) -> int:
    """Fit the texts of these rows into the page, in place; how many lost their observations.

    By question, so that those that stay whole can be compared with each other.
    """
    left, cut = MAX_PAGE_TEXT, 0
    for row in sorted(rows, key=lambda row: random.Random(repr(row["id"])).random()):
        left -= sum(len(turn["text"] + turn["observation"]) for turn in row["turns"])
        cut += left < 0
        for turn in row["turns"]:
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                # A list, which the page can fold.
                turn["observation"] = ast.literal_eval(turn["observation"])
            if left < 0:
                turn["text"] = turn["text"][:MAX_TURN]
                turn["observation"] = turn["observation"] and None  # None: cut
    return cut


def publish(run: Path, summary: dict):
    """Write summary.json and report.html."""
    text = json.dumps(jsonable(summary), indent=1)
    (run / "summary.json").write_text(text, encoding="utf-8")
    write_html(run)
