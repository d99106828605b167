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
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deepresearcher_min.trajectory import Group, Trajectory, Turn

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
    "n": ("questions", "d"), "f1": ("F1", ".3f"), "em": ("EM", ".3f"), "mbe": ("MBE", ".3f"),
    "f1_1hop": ("F1, 1-hop questions", ".3f"), "f1_2hop": ("F1, 2-hop questions", ".3f"),
    "searches": ("searches", ".2f"), "pages": ("pages opened", ".2f"), "calls": ("tool calls", ".2f"),
    "format_errors": ("format errors", ".1%"), "full_name": ("full name in the query", ".1%"),
    "browse_when_needed": ("browses when needed", ".1%"), "second_hop": ("takes the second hop", ".1%"),
}  # fmt: skip


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
    """One row of cells for each evaluation, the head first; columns that no evaluation has are left out."""
    keys = [key for key in SCORES if any(scores.get(key) is not None for scores in named.values())]
    rows = [["data source", *(SCORES[key][0] for key in keys)]]
    for name, scores in named.items():
        values = [(scores.get(key), SCORES[key][1]) for key in keys]
        rows.append([printable(name), *("-" if value is None else format(value, form) for value, form in values)])
    return rows


def compare_rows(before: Scores, after: Scores) -> list[list[str]]:
    columns = score_rows({"before": before, "after": after})
    return [["", "before", "after"], *(list(row) for row in list(zip(*columns, strict=True))[1:])]


def text_table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of cells, the head first, as aligned text or as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + "-:"[markdown] for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(lines)


def compare_table(before: Scores, after: Scores, markdown: bool = False) -> str:
    """The evaluations before and after training side by side."""
    return text_table(compare_rows(before, after), markdown)


def source_table(sources: Mapping[str, Scores], overall: Scores, markdown: bool = False) -> str:
    """Scores for each data source, and over all questions."""
    return text_table(score_rows({**sources, "all": overall}), markdown)


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
    """Draw F1 and reward of the sampled trajectories with greedy F1 before and after; tool calls; format errors."""
    import matplotlib as mpl  # here: only this picture needs it
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.spines.bottom": False, "font.size": 8.5}
    style |= {"axes.grid": True, "axes.grid.axis": "y", "axes.titlelocation": "left", "grid.color": "#e4e7eb"}
    steps = [row["step"] for row in metrics]
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 3.8), dpi=160, layout="constrained")
        panels = figure.subplot_mosaic([["answers", "calls"], ["answers", "format"]], width_ratios=[2, 1])
        for panel, key, label, color, width in (
            ("answers", "reward", "reward, sampled", "#9aa5b1", 1.2),
            ("answers", "f1", "F1, sampled", "#1f66b0", 2.2),
            ("calls", "calls", "", "#7c5cad", 1.6),
            ("format", "bad_format", "", "#b7791f", 1.6),
        ):
            values = [math.nan if row.get(key) is None else row[key] for row in metrics]
            panels[panel].plot(steps, values, label=label, color=color, lw=width)
            panels[panel].axhline(0, color="#8c959f", lw=0.8)
            panels[panel].xaxis.get_major_locator().set_params(integer=True)
        for step, scores in ((0, before), (max(steps, default=1), after)):
            f1 = scores.get("f1", math.nan)
            panels["answers"].plot(step, f1, "o", color="#c2410c")
            panels["answers"].annotate(f"{f1:.2f}", (step, f1), (0, 7), textcoords="offset points", ha="center")
        panels["answers"].set(title="Answers (dots: greedy, held-out questions)", xlabel="step", ylim=(None, 1.1))
        panels["answers"].legend(frameon=False)
        panels["calls"].set(title="Tool calls per trajectory")
        panels["format"].set(title="Format errors, share of trajectories")
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

    Opening it drops the rows after `resumed_step`, whose steps will run again, and a torn last line.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.path = Path(path)
        self.rows = [row for row in read_json_lines(self.path) if row["step"] <= resumed_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(aside, self.path)  # a kill in between leaves the old file whole

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of one step; their key 'step' is its number."""
        self.rows.append(jsonable(metrics))
        append_json_lines(self.path, self.rows[-1:])


def write_trajectories(path: Path, step: int, groups: Sequence[Group], explain: Explain, policy: Any = None) -> None:
    """Append each trajectory as one JSON line: to_json() with step, index in the group, reward, why, and advantage.

    A turn also gets the mean log-probability of its sampled tokens, and where `policy` ([group][index] -> [T]
    log-probabilities under the policy) is given, their mean absolute difference from those as `mismatch`.
    """
    for g, group in enumerate(groups):
        for i, one in enumerate(group.trajectories):
            turns = [{**vars(turn), "logprob": one.logprobs[slice(*turn.sampled)].mean()} for turn in one.turns]
            for turn in turns if policy is not None else ():
                turn["mismatch"] = np.abs(policy[g][i] - one.logprobs)[slice(*turn["sampled"])].mean()
            scores = {"step": step, "index": i, "reward": group.rewards[i], "advantage": group.advantages[i]}
            own = jsonable(scores | {"why": explain(one), "turns": turns})
            append_json_lines(path, [one.to_json() | own])


def readable_turn(turn: Turn) -> str:
    """What the model wrote in a turn, and, indented, what it was shown."""
    indent = {"initial_indent": "    ", "subsequent_indent": "    "}
    return printable(f"{turn.text}\n\n{textwrap.fill(turn.observation, 116, **indent)}".rstrip() + "\n")


def readable(trajectory: Trajectory, reward: float, advantage: float, why: str = "") -> str:
    """A trajectory as text for people: question, gold answers, reward in words, what was written and observed."""
    question = trajectory.question
    parts = [
        f"Question ({question.source or 'no source'}): {question.text}\nGold: {' | '.join(question.answers)}\n"
        f"Answer: {trajectory.answer}\nReward {reward:.3f}, advantage {advantage:+.3f}; {why}\n"
    ]
    parts += [f"--- turn {i}: {turn.kind}\n{readable_turn(turn)}" for i, turn in enumerate(trajectory.turns, 1)]
    return printable("\n".join(parts)) + f"\n--- end: {trajectory.stop_reason}\n"


def write_readable(path: Path, groups: Sequence[Group], explain: Explain) -> None:
    """The trajectories with the highest and with the lowest reward of these groups, as one text file."""
    scored = [row for group in groups for row in zip(group.trajectories, group.rewards, group.advantages, strict=True)]
    text = ""
    for name, pick in (("highest", max), ("lowest", min)) if scored else ():
        trajectory, reward, advantage = pick(scored, key=lambda row: row[1])
        text += f"=== {name} reward\n\n{readable(trajectory, reward, advantage, explain(trajectory))}\n"
    path.write_text(text, encoding="utf-8")


def write_html(run_dir: Path) -> Path:
    """Write report.html from the files of a run folder; it is one file without requests, and opens from disk.

    Files that are not there (yet) leave their part of the page out: a stopped run and an evaluation have a page too.
    """
    run_dir = Path(run_dir).resolve()
    config, scores = run_dir / "config.yaml", run_dir / "summary.json"
    summary = json.loads(scores.read_text()) if scores.exists() else {}
    page = load_trajectories(run_dir / "trajectories") | {
        "name": run_dir.name,
        "config": yaml.safe_load(config.read_text()) if config.exists() else {},
        "summary": summary,
        "metrics": list(read_json_lines(run_dir / "metrics.jsonl")),
        "compared": compare_rows(summary["before"], summary["after"]) if {"before", "after"} <= summary.keys() else [],
        "sources": score_rows({**summary["sources"], "all": summary["overall"]}) if "sources" in summary else [],
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
    """What the page embeds of trajectories/*.jsonl, without arrays and with long texts cut, and a sentence about it.

    Evaluations come first, then the last file, the middle one, the quarters and so on, until the page is full.
    """
    files = sorted(folder.glob("*.jsonl"))
    order = [(not f.stem.startswith("eval"), f"{len(files) - 1 - i:032b}"[::-1], f) for i, f in enumerate(files)]
    rows: dict[tuple, dict[str, Any]] = {}  # a step that ran again after a resume replaces its first try
    for _, _, file in sorted(order):
        for row in read_json_lines(file) if len(rows) < MAX_TRAJECTORIES else ():
            row |= {"file": file.stem, "tokens": len(row["token_ids"])}
            row["answers"] = [answer[:300] for answer in row["answers"][:20]]  # official data has some of 40 kB
            del row["token_ids"], row["sampled_mask"], row["logprobs"]
            rows[file.stem, row["step"], row["id"], row["index"]] = row
    kept = list(rows.values())[:MAX_TRAJECTORIES]
    left, cut = MAX_PAGE_TEXT, 0
    # By question, so that the trajectories that stay whole are those that can be compared with each other.
    for row in sorted(kept, key=lambda row: zlib.crc32(repr(row["id"]).encode())):
        size = sum(len(turn["text"]) + len(turn["observation"]) for turn in row["turns"])
        fits = size <= left
        left, cut = left - size * fits, cut + (not fits)
        for turn in row["turns"]:
            turn["text"] = turn["text"] if fits else turn["text"][:MAX_TURN]
            turn["observation"] = unpack(turn["observation"]) if fits else None
    note = f"{len(kept):,} trajectories from {len({row['file'] for row in kept})} of {len(files)} files"
    note += f"; {cut:,} of them without observations, to keep the page small" if cut else ""
    return {"trajectories": sorted(kept, key=lambda row: (row["step"], row["file"])), "note": note}


def unpack(observation: str) -> Any:
    """The list whose repr an observation is, so that the page can fold it; else the text itself."""
    try:
        return ast.literal_eval(observation)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return observation
