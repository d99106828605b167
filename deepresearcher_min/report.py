"""What a run tells people: console line, metrics.jsonl (trackers read it), curves, tables,
trajectories, report.html.

What the web and the model wrote is hostile: text files get it without control characters, the page
as text nodes.
"""

import ast
import base64
import contextlib
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deepresearcher_min.config import replace_file
from deepresearcher_min.trajectory import Group, Question, Trajectory, Turn

Row = Mapping[
    str, Any
]  # the metrics of a step, or the scores of an evaluation: {"f1": 0.41, "em": 0.35, ...}
MAX_TRAJECTORIES = 4096  # that the page embeds; the files in trajectories/ hold all of them
# characters of turns and observations on the page; what is beyond is cut to MAX_TURN
MAX_PAGE_TEXT = 16_000_000
MAX_TURN = 1000  # characters of a turn, without its observation
printable = partial(
    re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]").sub, "\ufffd"
)  # no escapes, all UTF-8

STEP_LINE = (  # {key:width|format}
    "step {step:3|}/{steps:1|} | reward {reward:5|.2f} | f1 {f1:4|.2f} | bad_format {bad_format:4|.0%} | "
    "tied {tied:4|.0%} | calls {calls:4|.1f} | failed {failed:4|.0%} | tokens {length:5|} | kl {kl:6|.4f} | "
    "mismatch {mismatch:7|.2g} | grad {grad_norm:5|.2f} | roll {roll_s:5|.1f}s upd {update_s:5|.1f}s | ${usd:1|.2f}"
)
SCORES = {  # key of an evaluation: its name in tables and how it prints
    "n": ("questions", "d"),
    "f1": ("F1", ".3f"),
    "f1_interval": ("F1, 95 % interval", ".2f"),
    "em": ("EM", ".3f"),
    "mbe": ("MBE", ".3f"),
    "f1_std": ("F1, deviation over runs", ".3f"),
    "em_std": ("EM, deviation over runs", ".3f"),
    "mbe_std": ("MBE, deviation over runs", ".3f"),
    "pass_at_k": ("pass@k", ".3f"),
    "majority_f1": ("F1 of the majority", ".3f"),
    "majority_em": ("EM of the majority", ".3f"),
    "majority_mbe": ("MBE of the majority", ".3f"),
    "f1_1hop": ("F1, 1-hop questions", ".3f"),
    "f1_2hop": ("F1, 2-hop questions", ".3f"),
    "searches": ("searches", ".2f"),
    "pages": ("pages opened", ".2f"),
    "calls": ("tool calls", ".2f"),
    "format_errors": ("format errors", ".1%"),
    "full_name": ("full name in the query", ".1%"),
    "browse_when_needed": ("browses when needed", ".1%"),
    "second_hop": ("takes the second hop", ".1%"),
    "plans": ("plans", ".1%"),
    "cross-checks": ("cross-checks", ".1%"),
    "reflects": ("reflects", ".1%"),
    "admits": ("admits not knowing", ".1%"),
    "blocked": ("dropped as blocked", ".0f"),
    "failed": ("failed calls", ".1%"),
}
BEHAVIOURS = yaml.safe_load(
    Path(__file__).with_name("behaviours.yaml").read_text(encoding="utf-8")
)  # name: regular expressions


def step_line(metrics: Row) -> str:
    """The console line of one step; columns keep their width; shares are in [0, 1]; a missing value
    prints '-'.
    """
    tokens = metrics.get("tokens") or 0
    values = {
        **metrics,
        "length": f"{tokens / 1000:.1f}k"
        if tokens >= 1000
        else f"{tokens:.0f}"
        if tokens
        else None,
    }

    def fill(match: re.Match) -> str:
        key, width, form = match.groups()
        text = "-" if values.get(key) is None else format(values[key], form)
        return (text if key == "usd" else re.sub(r"\b0\.", ".", text)).rjust(int(width))

    return re.sub(r"\{(\w+):(\d+)\|(.*?)\}", fill, STEP_LINE)


def score_rows(named: Mapping[str, Row]) -> list[list[str]]:
    """A table of evaluations side by side, the head first; what none of them measured is left out."""
    rows = [["", *map(printable, named)]]
    for key, (name, form) in SCORES.items():
        values = [scores.get(key) for scores in named.values()]
        if any(value is not None for value in values):
            cells = [
                "-" if value is None else "–".join(format(x, form) for x in np.ravel(value))
                for value in values
            ]
            rows.append([name, *cells])
    return rows


def text_table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of cells, the head first, as aligned text or as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + "-:"[markdown] for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(lines)


def curve_png(metrics: Sequence[Row], path: Path, before: Row, after: Row) -> None:
    """Draw reward and F1 of the sampled trajectories, and greedy F1 before and after; the page has
    all the curves.
    """
    from matplotlib.figure import Figure  # here: only this picture needs it

    steps = [row["step"] for row in metrics]
    figure = Figure(figsize=(8, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    for key, color in (("reward", "#9aa5b1"), ("f1", "#1f66b0")):
        axes.plot(
            steps,
            np.array([row.get(key) for row in metrics], float),
            label=f"{key}, sampled",
            color=color,
        )
    greedy = np.array([before.get("f1"), after.get("f1")], float)  # nan for what there is not
    axes.plot(
        [0, max(steps, default=1)],
        greedy,
        "o",
        label="f1, greedy, held-out questions",
        color="#c2410c",
    )
    axes.set(xlabel="step", ylim=(None, 1.1))
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(path)


def jsonable(value: Any) -> Any:
    """A copy with array and tensor numbers as Python's, and with None for nan and infinity, which
    JSON lacks.
    """
    return json.loads(json.dumps(value, default=lambda x: x.item()), parse_constant=lambda _: None)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines (none without the file); a line torn by a kill is passed
    over.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def append_json_line(path: Path, row: Row, plain: Row | None = None) -> None:
    """Append what is `plain` JSON, and `row` made so, as one line; a torn last one is ended, lest
    it swallow this.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps({**(plain or {}), **jsonable(row)}).encode() + b"\n")


def resume_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to this step; those after it, whose steps will run again, leave
    the file, too.
    """
    rows = [row for row in read_json_lines(path) if row["step"] <= step]
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def behaviours(trajectory: Trajectory) -> list[str]:
    """Which behaviours of the paper's section 6 the words of its turns show; how well:
    tests/test_report.py.
    """
    turns = trajectory.turns
    later = [turn for turn in turns[1:] if turn.kind not in ("answer", "malformed")]
    scope = {"plans": turns[:1], "cross-checks": later, "reflects": later, "admits": turns[-1:]}
    texts = {
        name: " ".join(turn.text.partition("<tool_call>")[0] for turn in scope[name])
        for name in scope
    }
    return [
        name
        for name, words in BEHAVIOURS.items()
        if re.search("|".join(words), texts[name], re.I | re.S)
    ]


def write_trajectories(
    path: Path,
    step: int,
    groups: Sequence[Group],
    explain: Callable[[Trajectory], str],
    first: int = 0,
) -> None:
    """Append each trajectory as one JSON line: to_json(), its reward and why (`explain`), each
    turn's mean logprob.

    `index` numbers the trajectories of a group from `first`: in an evaluation it is the run.
    """
    for group in groups:
        rewarded = zip(group.trajectories, group.rewards, group.advantages, strict=True)
        for i, (one, reward, advantage) in enumerate(rewarded, first):
            turns = [
                {**vars(turn), "logprob": one.logprobs[slice(*turn.sampled)].mean()}
                for turn in one.turns
            ]
            row = {
                "step": step,
                "index": i,
                "reward": reward,
                "advantage": advantage,
                "why": explain(one),
            }
            append_json_line(
                path, row | {"behaviours": behaviours(one), "turns": turns}, plain=one.to_json()
            )


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """What write_trajectories wrote, the log-probabilities rounded to six digits."""
    yield from map(read_trajectory, read_json_lines(path))


def read_trajectory(row: Row) -> Trajectory:
    logprobs = np.full(len(row["token_ids"]), np.nan)
    logprobs[np.flatnonzero(row["sampled_mask"])] = row["logprobs"]
    turns = tuple(
        Turn(
            tuple(turn["sampled"]),
            tuple(turn["observed"]),
            turn["text"],
            turn["kind"],
            turn["observation"],
        )
        for turn in row["turns"]
    )
    question = Question(row["id"], row["question"], tuple(row["answers"]), row["source"])
    ended = row["answer"], row["stop_reason"], row["cost"]
    return Trajectory(question, row["token_ids"], row["sampled_mask"], logprobs, turns, *ended)


def readable(trajectory: Trajectory, why: str = "") -> str:
    """A trajectory as text for people: question, gold answers, what was written and observed, and
    the reward.
    """
    question = trajectory.question
    parts = [f"Question ({question.source or 'no source'}): {question.text}"]
    for i, turn in enumerate(trajectory.turns, 1):
        observed = textwrap.fill(
            turn.observation, 116, initial_indent="    ", subsequent_indent="    "
        )
        parts += [
            f"\n--- turn {i}: {turn.kind}",
            turn.text,
            *([f"\n{observed}"] if observed else []),
        ]
    parts += [f"\n--- end: {trajectory.stop_reason}", f"Answer: {trajectory.answer}"]
    parts += [f"Gold: {' | '.join(question.answers)}\n{why}"] if why else []
    return printable("\n".join(parts))


def write_readable(
    path: Path, groups: Sequence[Group], explain: Callable[[Trajectory], str]
) -> None:
    """The trajectories with the highest and with the lowest reward of these groups, as one text
    file.
    """
    scored = [
        row
        for group in groups
        for row in zip(group.rewards, group.advantages, group.trajectories, strict=True)
    ]
    text = ""
    for name, pick in (("Highest", max), ("Lowest", min)) if scored else ():
        reward, advantage, one = pick(scored, key=lambda row: row[0])
        text += f"=== {name} reward: {reward:.3f}, advantage {advantage:+.3f}\n{readable(one, explain(one))}\n\n"
    path.write_text(text, encoding="utf-8")


def write_html(run_dir: Path) -> Path:
    """Write report.html, one file without requests, from what a run folder holds: a stopped run has
    a page, too.
    """
    run_dir = Path(run_dir).resolve()
    config, scores = run_dir / "config.yaml", run_dir / "summary.json"
    summary = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {}
    page = load_trajectories(run_dir / "trajectories")
    page |= {
        "name": run_dir.name,
        "config": yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {},
    }
    page |= {"summary": summary, "metrics": list(read_json_lines(run_dir / "metrics.jsonl"))}
    page["compared"] = (
        score_rows({name: summary[name] for name in ("before", "after")})
        if "after" in summary
        else []
    )
    data = json.dumps(jsonable(page), ensure_ascii=False).replace(
        "<", "\\u003c"
    )  # no text can end the script element
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):  # only the template's own, known by their hashes, may run
        own = template.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"
    path = run_dir / "report.html"
    path.write_text(
        template.replace("__POLICY__", policy, 1).replace("__DATA__", data, 1), "utf-8", "replace"
    )
    return path


def load_trajectories(folder: Path) -> dict[str, Any]:
    """What the page embeds of trajectories/*.jsonl, evaluations and late steps first, and a
    sentence about it.
    """
    files = sorted(
        folder.glob("*.jsonl"),
        key=lambda file: (file.stem.startswith("eval"), file.stem),
        reverse=True,
    )
    rows: dict[tuple, dict[str, Any]] = {}
    for file in files:
        for row in read_json_lines(file) if len(rows) < MAX_TRAJECTORIES else ():
            row |= {"file": file.stem, "tokens": len(row["token_ids"])}
            row["answers"] = [
                answer[:300] for answer in row["answers"][:20]
            ]  # official data has some of 40 kB
            del row["token_ids"], row["sampled_mask"], row["logprobs"]
            rows[file.stem, row["step"], row["id"], row["index"]] = row
    kept, left, cut = list(rows.values())[:MAX_TRAJECTORIES], MAX_PAGE_TEXT, 0
    # By question, so that the trajectories that stay whole are those that can be compared with each
    # other.
    for row in sorted(kept, key=lambda row: hashlib.sha256(repr(row["id"]).encode()).digest()):
        left -= sum(len(turn["text"]) + len(turn["observation"]) for turn in row["turns"])
        cut += left < 0
        for turn in row["turns"]:
            if left < 0:
                turn |= {
                    "text": turn["text"][:MAX_TURN],
                    "observation": turn["observation"] and None,
                }  # None: cut
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                turn["observation"] = ast.literal_eval(
                    turn["observation"]
                )  # a list, which the page can fold
    note = f"{len(kept):,} trajectories from {len({row['file'] for row in kept})} of {len(files)} files"
    note += f"; {cut:,} of them without observations, to keep the page small" if cut else ""
    return {"trajectories": sorted(kept, key=lambda row: (row["step"], row["file"])), "note": note}
