"""What a run tells people: console line, metrics.jsonl, curves, tables, trajectories as text, report.html.

Place in the loop: the last word of train.py (measure, act, judge, learn, report) and of eval.py. It reads groups
and metrics and writes files; nothing flows back into training. What the web and the model wrote is hostile until
shown otherwise: text files get it without control characters, the page gets it as JSON and renders it as text nodes.

Omitted: trackers; metrics.jsonl is one JSON object for each step, which any tracker, pandas or jq reads. The page
shows runs of tokens (a turn, an observation) and not single tokens, whose texts are not kept.
"""

import ast
import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deepresearcher_min.trajectory import Group, Question, Trajectory, Turn

Scores = Mapping[str, Any]  # one evaluation: {"f1": 0.41, "em": 0.35, ...}
Explain = Callable[[Trajectory], str]  # the reward in words (reward.explain)
TEMPLATE = Path(__file__).with_name("report.html")
MAX_TRAJECTORIES = 4096  # that the page embeds; the files in trajectories/ hold all of them
MAX_PAGE_TEXT = 16_000_000  # characters of turns and observations on the page; what is beyond is cut to MAX_TURN
MAX_TURN = 1000  # characters of a turn, without its observation
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # terminal escapes, and what UTF-8 cannot hold

STEP_LINE = (  # {key:width|format}
    "step {step:3|}/{steps:1|} | reward {reward:5|.2f} | f1 {f1:4|.2f} | bad_format {bad_format:4|.0%} | "
    "tied {tied:4|.0%} | calls {calls:4|.1f} | tokens {length:5|} | kl {kl:6|.4f} | mismatch {mismatch:7|.2g} | "
    "grad {grad_norm:5|.2f} | roll {roll_s:5|.1f}s upd {update_s:5|.1f}s | ${usd:1|.2f}"
)
SCORES = {  # key of an evaluation: its name in tables and how it prints
    "n": ("questions", "d"), "f1": ("F1", ".3f"), "f1_interval": ("F1, 95 % interval", ".2f"),
    "em": ("EM", ".3f"), "mbe": ("MBE", ".3f"),
    "f1_1hop": ("F1, 1-hop questions", ".3f"), "f1_2hop": ("F1, 2-hop questions", ".3f"),
    "searches": ("searches", ".2f"), "pages": ("pages opened", ".2f"), "calls": ("tool calls", ".2f"),
    "format_errors": ("format errors", ".1%"), "full_name": ("full name in the query", ".1%"),
    "browse_when_needed": ("browses when needed", ".1%"), "second_hop": ("takes the second hop", ".1%"),
    "plans": ("plans", ".1%"), "cross-checks": ("cross-checks", ".1%"), "reflects": ("reflects", ".1%"),
    "admits": ("admits not knowing", ".1%"),
}  # fmt: skip
WORDS = yaml.safe_load(Path(__file__).with_name("behaviours.yaml").read_text())
BEHAVIOURS = {name: re.compile("|".join(words), re.I | re.S) for name, words in WORDS.items()}


def step_line(metrics: Mapping[str, Any]) -> str:
    """The console line of one step; columns keep their width; shares are in [0, 1]; a missing value prints '-'."""
    tokens = metrics.get("tokens") or 0
    values = {**metrics, "length": f"{tokens / 1000:.1f}k" if tokens >= 1000 else f"{tokens:.0f}" if tokens else None}

    def fill(match: re.Match) -> str:
        key, width, form = match.groups()
        text = "-" if values.get(key) is None else format(values[key], form)
        return (text if key == "usd" else re.sub(r"\b0\.", ".", text)).rjust(int(width))

    return re.sub(r"\{(\w+):(\d+)\|(.*?)\}", fill, STEP_LINE)


def score_rows(named: Mapping[str, Scores]) -> list[list[str]]:
    """A table of evaluations side by side, the head first; what none of them measured is left out."""
    rows = [["", *map(printable, named)]]
    for key, (name, form) in SCORES.items():
        values = [scores.get(key) for scores in named.values()]
        if any(value is not None for value in values):
            cells = ["-" if value is None else "–".join(format(x, form) for x in np.ravel(value)) for value in values]
            rows.append([name, *cells])
    return rows


def text_table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of cells, the head first, as aligned text or as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + "-:"[markdown] for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(lines)


def compare_table(before: Scores, after: Scores) -> str:
    """The evaluations before and after training side by side."""
    return text_table(score_rows({"before": before, "after": after}))


def text_plot(series: Sequence[tuple[int, float | None]], width: int = 64, height: int = 8) -> str:
    """(step, value) points as columns for a terminal, eight levels to a line; the axis holds at least 0 to 1."""
    points = [(step, value) for step, value in series if value is not None and math.isfinite(value)]
    if not points:
        return "nothing to plot yet"
    edges = [column * len(points) // width for column in range(width + 1)]
    columns = [float(np.mean([value for _, value in points[a : max(b, a + 1)]])) for a, b in itertools.pairwise(edges)]
    low, high = min(0.0, *columns), max(1.0, *columns)
    levels = [round((value - low) / (high - low) * height * 8) for value in columns]
    rows = ["".join(" ▁▂▃▄▅▆▇█"[min(max(x - 8 * row, 0), 8)] for x in levels) for row in reversed(range(height))]
    first, last = f"step {points[0][0]}", str(points[-1][0])
    lines = [f"{high:5.2f} │{rows[0]}", *(f"      │{row}" for row in rows[1:]), f"{low:5.2f} └" + "─" * width]
    return "\n".join([*lines, " " * 7 + first + last.rjust(width - len(first))])


def curve_png(metrics: Sequence[Mapping[str, Any]], path: Path, before: Scores, after: Scores) -> None:
    """Draw reward and F1 of the sampled trajectories, and greedy F1 before and after; the page has all the curves."""
    from matplotlib.figure import Figure  # here: only this picture needs it

    steps = [row["step"] for row in metrics]
    figure = Figure(figsize=(8, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    for key, color in (("reward", "#9aa5b1"), ("f1", "#1f66b0")):
        values = [math.nan if row.get(key) is None else row[key] for row in metrics]
        axes.plot(steps, values, label=f"{key}, sampled", color=color)
    greedy = [scores.get("f1", math.nan) for scores in (before, after)]
    axes.plot([0, max(steps, default=1)], greedy, "o", label="f1, greedy, held-out questions", color="#c2410c")
    axes.set(xlabel="step", ylim=(None, 1.1))
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(path)


def printable(text: str) -> str:
    return CONTROL.sub("\ufffd", text)


def jsonable(value: Any) -> Any:
    """A copy with array and tensor numbers as Python's, and with None for nan and infinity, which JSON lacks."""
    return json.loads(json.dumps(value, default=lambda x: x.item()), parse_constant=lambda _: None)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines (none without the file); a line torn by a kill is passed over."""
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one line for each row; a torn last line is ended first, so that it cannot swallow the next one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            file.write(b"\n")
        file.writelines(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)


class MetricsFile:
    """metrics.jsonl: `rows` in memory, and one line for each on disk as soon as `append` returns.

    Opening it drops the rows after `resumed_step`, whose steps will run again, and a torn last line. Only rank 0 has a
    file: on the others `write` is false, nothing is read or written, and rows are not kept.
    """

    def __init__(self, path: Path, resumed_step: int = 0, write: bool = True) -> None:
        self.path, self.write, self.rows = Path(path), write, list[dict[str, Any]]()
        if not write:
            return
        self.rows = [row for row in read_json_lines(self.path) if row["step"] <= resumed_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(aside, self.path)  # a kill in between leaves the old file whole

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of one step; their key 'step' is its number."""
        if not self.write:
            return
        self.rows.append(jsonable(metrics))
        append_json_lines(self.path, self.rows[-1:])


def behaviours(trajectory: Trajectory) -> list[str]:
    """Which behaviours of the paper's section 6 the words of its turns show: cheap, and rough.

    plans: the first thought names several steps. After that, in thoughts that go on to a tool: cross-checks, another
    look at what was found; reflects, the results did not help and the search changes. admits: the last turn says that
    the answer was not found (honesty). Accuracy on hand-labelled trajectories: tests/test_report.py.
    """
    turns = trajectory.turns
    later = [turn for turn in turns[1:] if turn.kind not in ("answer", "malformed")]
    scope = {"plans": turns[:1], "cross-checks": later, "reflects": later, "admits": turns[-1:]}
    texts = {name: " ".join(turn.text.partition("<tool_call>")[0] for turn in scope[name]) for name in scope}
    return [name for name, words in BEHAVIOURS.items() if words.search(texts[name])]


def write_trajectories(path: Path, step: int, groups: Sequence[Group], explain: Explain) -> None:
    """Append each trajectory as one JSON line: to_json(), what is known of its reward, each turn's mean logprob."""
    for group in groups:
        for i, one in enumerate(group.trajectories):
            turns = [{**vars(turn), "logprob": one.logprobs[slice(*turn.sampled)].mean()} for turn in one.turns]
            scores = {"step": step, "index": i, "reward": group.rewards[i], "advantage": group.advantages[i]}
            own = jsonable(scores | {"why": explain(one), "behaviours": behaviours(one), "turns": turns})
            append_json_lines(path, [one.to_json() | own])


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """What write_trajectories wrote, the log-probabilities rounded to six digits."""
    for row in read_json_lines(path):
        logprobs = np.full(len(row["token_ids"]), np.nan)
        logprobs[np.flatnonzero(row["sampled_mask"])] = row["logprobs"]
        spans = [(tuple(turn["sampled"]), tuple(turn["observed"])) for turn in row["turns"]]
        texts = [(turn["text"], turn["kind"], turn["observation"]) for turn in row["turns"]]
        turns = tuple(Turn(*span, *text) for span, text in zip(spans, texts, strict=True))
        question = Question(row["id"], row["question"], tuple(row["answers"]), row["source"])
        ended = row["answer"], row["stop_reason"], row["cost"]
        yield Trajectory(question, row["token_ids"], row["sampled_mask"], logprobs, turns, *ended)


def readable(trajectory: Trajectory, why: str = "") -> str:
    """A trajectory as text for people: question, gold answers, what was written and observed, and the reward."""
    question = trajectory.question
    parts = [f"Question ({question.source or 'no source'}): {question.text}"]
    for i, turn in enumerate(trajectory.turns, 1):
        observed = textwrap.fill(turn.observation, 116, initial_indent="    ", subsequent_indent="    ")
        parts += [f"\n--- turn {i}: {turn.kind}", turn.text, *([f"\n{observed}"] if observed else [])]
    parts += [f"\n--- end: {trajectory.stop_reason}", f"Answer: {trajectory.answer}"]
    parts += [f"Gold: {' | '.join(question.answers)}\n{why}"] if why else []
    return printable("\n".join(parts))


def write_readable(path: Path, groups: Sequence[Group], explain: Explain) -> None:
    """The trajectories with the highest and with the lowest reward of these groups, as one text file."""
    scored = [row for group in groups for row in zip(group.rewards, group.advantages, group.trajectories, strict=True)]
    text = ""
    for name, pick in (("Highest", max), ("Lowest", min)) if scored else ():
        reward, advantage, one = pick(scored, key=lambda row: row[0])
        text += f"=== {name} reward: {reward:.3f}, advantage {advantage:+.3f}\n{readable(one, explain(one))}\n\n"
    path.write_text(text, encoding="utf-8")


def write_html(run_dir: Path) -> Path:
    """Write report.html from the files of a run folder; it is one file without requests, and opens from disk.

    Files that are not there (yet) leave their part of the page out: a stopped run and an evaluation have a page too.
    """
    run_dir = Path(run_dir).resolve()
    config, scores = run_dir / "config.yaml", run_dir / "summary.json"
    summary = json.loads(scores.read_text()) if scores.exists() else {}
    measured = {name: summary[name] for name in ("before", "after") if name in summary}
    page = load_trajectories(run_dir / "trajectories") | {
        "name": run_dir.name,
        "config": yaml.safe_load(config.read_text()) if config.exists() else {},
        "summary": summary,
        "metrics": list(read_json_lines(run_dir / "metrics.jsonl")),
        "compared": score_rows(measured) if len(measured) == 2 else [],
    }
    data = json.dumps(jsonable(page), ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script element
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):  # only the template's own, known by their hashes, may run
        own = template.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"
    text = template.replace("__POLICY__", policy, 1).replace("__DATA__", data, 1)
    (run_dir / "report.html").write_bytes(text.encode("utf-8", "replace"))
    return run_dir / "report.html"


def load_trajectories(folder: Path) -> dict[str, Any]:
    """What the page embeds of trajectories/*.jsonl, evaluations and late steps first, and a sentence about it.

    Without arrays; when the page is full, without observations. A step that ran again after a resume is shown once.
    """
    files = sorted(folder.glob("*.jsonl"), key=lambda file: (file.stem.startswith("eval"), file.stem), reverse=True)
    rows: dict[tuple, dict[str, Any]] = {}
    for file in files:
        for row in read_json_lines(file) if len(rows) < MAX_TRAJECTORIES else ():
            row |= {"file": file.stem, "tokens": len(row["token_ids"])}
            row["answers"] = [answer[:300] for answer in row["answers"][:20]]  # official data has some of 40 kB
            del row["token_ids"], row["sampled_mask"], row["logprobs"]
            rows[file.stem, row["step"], row["id"], row["index"]] = row
    kept, left, cut = list(rows.values())[:MAX_TRAJECTORIES], MAX_PAGE_TEXT, 0
    # By question, so that the trajectories that stay whole are those that can be compared with each other.
    for row in sorted(kept, key=lambda row: hashlib.sha256(repr(row["id"]).encode()).digest()):
        left -= sum(len(turn["text"]) + len(turn["observation"]) for turn in row["turns"])
        cut += left < 0
        for turn in row["turns"]:
            if left < 0:
                turn |= {"text": turn["text"][:MAX_TURN], "observation": turn["observation"] and None}
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                turn["observation"] = ast.literal_eval(turn["observation"])  # a list, which the page can fold
    note = f"{len(kept):,} trajectories from {len({row['file'] for row in kept})} of {len(files)} files"
    note += f"; {cut:,} of them without observations, to keep the page small" if cut else ""
    return {"trajectories": sorted(kept, key=lambda row: (row["step"], row["file"])), "note": note}
