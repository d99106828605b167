"""What a run tells people: console line, metrics.jsonl (trackers read it), curves, tables,
trajectories, report.html.

What the web and the model wrote is hostile: text files get it without control characters, the page
as text nodes.
"""

import ast
import json
import re
import textwrap
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import numpy as np

from deepresearcher_min.config import ROOT, replace_file, table
from deepresearcher_min.trajectory import Trajectory, Turn

MAX_TRAJECTORIES = 4096  # that the page embeds; the files in trajectories/ hold all of them
# Characters of turns and observations on the page; what is beyond is cut to MAX_TURN.
MAX_PAGE_TEXT = 16_000_000
MAX_TURN = 1000  # characters of a turn, without its observation

# The console line of a step.
STEP_LINE = (
    "step {step:3d}/{steps:1d} | reward {reward:5.2f} | f1 {f1:4.2f} | "
    "bad_format {bad_format:4.0%} | tied {tied:4.0%} | calls {calls:4.1f} | failed {failed:4.0%} | "
    "tokens {tokens:5} | kl {kl:6.4f} | mismatch {mismatch:7.2g} | grad {grad_norm:5.2f} | "
    "roll {roll_s:5.1f}s upd {update_s:5.1f}s | ${usd:1.2f}"
)
# The rows of a table: {key of an evaluation: (name, format)}.
SCORES = table("scores")
# {name: regular expressions}
BEHAVIOURS = table("behaviours")


# --- lines and tables


def step_line(metrics):
    """The console line of one step, from its metrics {"f1": 0.41, "em": 0.35, ...}; columns keep
    their width; shares are in [0, 1].
    """
    tokens = metrics["tokens"]
    short = f"{tokens / 1000:4.1f}k" if tokens >= 1000 else f"{tokens:5.0f}"
    line = STEP_LINE.format_map(metrics | {"tokens": short})
    return re.sub(r"(?<![\d$])(-?)0\.", r" \1.", line)  # .41 is easier to read than 0.41


def score_rows(named):
    """A table of evaluations {name: scores} side by side, the head first; what none of them
    measured is left out.
    """
    rows = [["", *map(printable, named)]]
    for key, (name, form) in SCORES.items():
        cells = []
        for scores in named.values():
            ends = np.ravel(scores.get(key))  # one number, an interval, or None
            cells.append("–".join(format(end, form) for end in ends if end is not None) or "-")
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return rows


def text_table(rows, markdown=False):
    """Rows of cells, the head first, as aligned text or as a Markdown table."""
    width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    end = ":" if markdown else "-"  # figures are aligned to the right
    # `end`, filled up on its left by dashes
    rule = ["-" * width, *(f"{end:->{each}}" for each in widths)]
    lines = []
    for name, *figures in [rows[0], rule, *rows[1:]]:
        cells = [name.ljust(width), *map(str.rjust, figures, widths)]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    return "\n".join(lines)


def curve_png(metrics, path, greedy):
    """Draw reward and F1 of the sampled trajectories, and greedy F1 before and after; the page has
    all the curves.
    """
    from matplotlib.figure import Figure  # here: only this picture needs it

    figure = Figure((8, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    for key in ("reward", "f1"):
        steps = [row["step"] for row in metrics]
        axes.plot(steps, [row[key] for row in metrics], label=f"{key}, sampled")
    axes.plot([0, len(metrics)], greedy, "o", label="f1, greedy, held-out questions")
    axes.set_xlabel("step")
    axes.grid(alpha=0.4)
    axes.legend()
    figure.savefig(path)


# --- files of JSON lines


def jsonable(value):
    """A copy with arrays and tensors as lists and numbers, and with None for nan and infinity,
    which JSON lacks.
    """
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda name: None)


def read_json_lines(path):
    """The objects in a file of JSON lines (none without the file); a line torn by a kill is passed
    over.
    """
    with suppress(FileNotFoundError), open(path, "rb") as lines:
        for line in lines:
            with suppress(ValueError):
                yield json.loads(line)


def append_json_line(path, row):
    """Append one line; a torn last one is ended, lest it swallow this."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(jsonable(row)).encode()
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")
        file.write(line + b"\n")


def resume_metrics(path, step):
    """Take the rows after this step, which will run again, out of metrics.jsonl; returns those that
    stay.
    """
    rows = [row for row in read_json_lines(path) if row["step"] <= step]
    replace_file(path, "\n".join([*map(json.dumps, rows), ""]).encode())
    return rows


# --- trajectories


def behaviours(trajectory):
    """Which behaviours of the paper's section 6 the words of its turns show; how well:
    tests/test_report.py.
    """
    thoughts = [turn.text.partition("<tool_call>")[0] for turn in trajectory.turns]
    where = {"plans": thoughts[:1], "admits": thoughts[-1:]}
    shown = []
    for name, patterns in BEHAVIOURS.items():
        text = " ".join(where.get(name, thoughts[1:-1]))
        if re.search("(?is)" + "|".join(patterns), text):
            shown.append(name)
    return shown


def write_trajectories(path, step, groups, explain, first=0):
    """Append each trajectory as one JSON line: what it holds (log-probabilities only of the sampled
    tokens, in order; each turn's mean), its reward and why (what `explain` says).

    `index` numbers the trajectories of a group from `first`: in an evaluation it is the run.
    """
    for group in groups:
        for number, one in enumerate(group.trajectories):
            asked = one.question
            mask = one.sampled_mask
            turns = []
            for turn in one.turns:
                mean = one.logprobs[slice(*turn.sampled)].mean()
                turns.append(vars(turn) | {"logprob": mean})
            row = vars(one) | {
                "id": asked.id,
                "question": asked.text,
                "answers": asked.answers,
                "source": asked.source,
                "turns": turns,
                "sampled_mask": mask.astype(int),
                "logprobs": [round(logprob, 6) for logprob in one.logprobs[mask].tolist()],
                "step": step,
                "index": first + number,
                "reward": group.rewards[number],
                "advantage": group.advantages[number],
                "why": explain(one),
                "behaviours": behaviours(one),
            }
            append_json_line(path, row)


def read_trajectory(row, question):
    """What write_trajectories wrote of this question, log-probabilities rounded to six digits."""
    logprobs = np.full(len(row["token_ids"]), np.nan)
    np.place(logprobs, row["sampled_mask"], row["logprobs"])
    said = itemgetter("text", "kind", "observation")
    turns = [
        Turn(tuple(one["sampled"]), tuple(one["observed"]), *said(one)) for one in row["turns"]
    ]
    return Trajectory(
        question,
        row["token_ids"],
        row["sampled_mask"],
        logprobs,
        tuple(turns),
        row["answer"],
        row["stop_reason"],
        row["cost"],
    )


def printable(text):
    """Without escape sequences, and without what UTF-8 cannot hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def readable(trajectory, why=""):
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


def write_readable(path, groups, explain):
    """The trajectories with the highest and with the lowest reward of these groups, as one text
    file.
    """
    scored = []
    for group in groups:
        scored += zip(group.rewards, group.advantages, group.trajectories, strict=True)
    text = ""
    for name, pick in (("Highest", max), ("Lowest", min)):
        if scored:
            reward, advantage, one = pick(scored, key=itemgetter(0))
            text += f"=== {name} reward: {reward:.3f}, advantage {advantage:+.3f}\n"
            text += f"{readable(one, explain(one))}\n\n"
    replace_file(path, text.encode())


# --- the page


def publish(config, summary):
    """Write summary.json, and report.html: one file without requests that holds the summary, the
    config, the metrics and the trajectories of a run folder.
    """
    run = Path(config.run_dir)
    summary = jsonable(summary)
    replace_file(run / "summary.json", json.dumps(summary, indent=1).encode())
    page = {
        "name": run.name,
        "config": vars(config),
        "summary": summary,
        "metrics": [*read_json_lines(run / "metrics.jsonl")],
        **load_trajectories(run / "trajectories"),
    }
    # No text can end the script element.
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    text = (ROOT / "deepresearcher_min/report.html").read_text("utf-8")
    (run / "report.html").write_text(text.replace("__DATA__", data), "utf-8", "replace")


def load_trajectories(folder):
    """What the page embeds of trajectories/*.jsonl, evaluations and late steps first, and a
    sentence about it.

    What is too much loses its observations by question, so that those that stay whole can be
    compared with each other.
    """
    files = sorted(folder.glob("eval*.jsonl"))
    files += sorted(folder.glob("step*.jsonl"), reverse=True)
    rows = {}
    for file in files:
        if len(rows) >= MAX_TRAJECTORIES:
            break
        for row in read_json_lines(file):
            row |= {"file": file.stem, "tokens": len(row.pop("token_ids"))}
            del row["sampled_mask"], row["logprobs"]
            # Official data has answers of 40 kB.
            row["answers"] = [answer[:300] for answer in row["answers"][:20]]
            # What was asked twice, after a service failed, is shown once.
            rows[file, row["id"], row["index"]] = row
    kept = list(rows.values())[:MAX_TRAJECTORIES]
    left = MAX_PAGE_TEXT
    cut = 0
    # In the order of the ids read backwards: a fixed one that mixes the sources.
    for row in sorted(kept, key=lambda row: row["id"][::-1]):
        left -= sum(len(turn["text"] + turn["observation"]) for turn in row["turns"])
        cut += left < 0
        for turn in row["turns"]:
            with suppress(Exception):  # literal_eval raises many kinds for what is no list
                # A list, which the page can fold.
                turn["observation"] = ast.literal_eval(turn["observation"])
            if left < 0:
                turn["text"] = turn["text"][:MAX_TURN]
                turn["observation"] = turn["observation"] and None  # None: cut
    shown = {row["file"] for row in kept}
    note = f"{len(kept):,} trajectories from {len(shown)} of {len(files)} files"
    if cut:
        note += f"; {cut:,} of them without observations, to keep the page small"
    return {"trajectories": sorted(kept, key=itemgetter("step", "file")), "note": note}
