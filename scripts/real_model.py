"""The experiment of docs/real_model.md: from run folders to what the document shows.

    python -m scripts.real_model collect --out=docs/runs --questions=held_out.jsonl RUN ...
    python -m scripts.real_model draw docs/runs

`collect` takes what is small from each run folder: metrics.jsonl or cold_start.jsonl, and of the
evaluations in it (folders of eval.py named greedy and sampled, --run_dir=RUN/greedy) a summary.json
with scores, the F1 of each question and what the model did. The names of the run folders say what
they are: cold (the cold start, which is no point of the curve), grpo_0, grpo_1, ..., shuffled_0,
imitation_0.

`draw` writes real_model.png beside DIR, and prints the table: F1 and its difference from the cold
start, over the seeds of a kind, with the 95 % interval of a paired bootstrap over questions.

What the model did (behaviours), over the trajectories of an evaluation:

    covered           words of the question that its first query takes over
    opens             a page was opened where the first result lacked the answer
    opens_needlessly  a page was opened where the first result had it
    found             a result was the paragraph that answers the question
    shown             the answer stands in what was shown
    f1_found, f1_shown  F1 where that was so
"""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.corpus import content_words  # noqa: E402
from deepresearcher_min.report import jsonable, read_json_lines, text_table  # noqa: E402
from deepresearcher_min.reward import f1_score, words  # noqa: E402
from scripts.items import read_rows  # noqa: E402

WAYS = ("greedy", "sampled")  # folders of the evaluations in a run's
DRAWS = 10_000  # of a bootstrap
SCORES = ("n", "f1", "em", "format_errors", "calls", "searches", "pages")
COLORS = {"grpo": "#1f66b0", "shuffled": "#9aa5b1", "imitation": "#c2410c"}


# --- what the model did


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether the words of an answer stand in the text, in their order."""
    inside = f" {' '.join(words(text))} "
    return any(f" {' '.join(words(answer))} " in inside for answer in answers if words(answer))


def titles_shown(observation: str) -> set[str]:
    """Titles of a search's results; empty for what is no list of them."""
    try:
        entries = ast.literal_eval(observation)
    except (ValueError, SyntaxError):
        return set()
    found = set()
    for entry in entries:
        for result in entry.get("web_page_info_list", ()):
            found.add(result["title"])
    return found


def behaviour(row: dict[str, Any], gold: Sequence[str]) -> dict[str, Any]:
    """What one trajectory (a line of eval.jsonl) shows; a measure that has no case is left out."""
    searches = [turn for turn in row["turns"] if turn["kind"] == "search"]
    pages = [turn for turn in row["turns"] if turn["kind"] == "browse"]
    everything = " ".join(turn["observation"] for turn in row["turns"])
    answers = row["answers"]
    f1 = f1_score(row["answer"] or "", answers)
    shown: dict[str, Any] = {"f1": f1}
    if searches:
        query = searches[0]["text"].partition("<tool_call>")[2]
        asked = set(content_words(row["question"]))
        shown["covered"] = len(asked.intersection(words(query))) / len(asked)
        enough = holds(searches[0]["observation"], answers)
        shown["opens_needlessly" if enough else "opens"] = bool(pages)
    titles: set[str] = set()
    for turn in searches:
        titles |= titles_shown(turn["observation"])
    shown["found"] = bool(titles.intersection(gold))
    shown["shown"] = holds(everything, answers)
    for name in ("found", "shown"):
        if shown[name]:
            shown[f"f1_{name}"] = f1
    return shown


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each measure over the trajectories that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}


# --- collecting


def gold_titles(path: Path) -> dict[str, list[str]]:
    """By question; an id is what eval.py makes of the file."""
    return {question.id: gold for question, gold, _ in read_rows("questions", str(path))}


def evaluation(folder: Path, gold: dict[str, list[str]]) -> dict[str, Any]:
    """What is kept of a folder of eval.py: the last trajectory of each question and run counts."""
    known: dict[tuple[str, int], dict] = {}
    for row in read_json_lines(folder / "trajectories" / "eval.jsonl"):
        known[row["id"], row["index"]] = row
    if not known:
        raise SystemExit(f"{folder}/trajectories/eval.jsonl holds no trajectory")
    f1: dict[str, list[float]] = {}
    rows = []
    for (name, _), row in sorted(known.items()):
        if name not in gold:
            raise SystemExit(f"{folder}: question {name} is not in --questions")
        rows.append(behaviour(row, gold[name]))
        f1.setdefault(name, []).append(rows[-1]["f1"])
    scores = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["overall"]
    kept: dict[str, Any] = {name: scores[name] for name in SCORES}
    kept["tokens"] = sum(len(row["token_ids"]) for row in known.values()) / len(known)
    kept["behaviours"] = means(rows)
    kept["f1_by_question"] = {name: round(sum(found) / len(found), 4) for name, found in f1.items()}
    return kept


def collect(runs: Sequence[Path], out: Path, questions: Path) -> None:
    if len({run.name for run in runs}) < len(runs):
        raise SystemExit("two runs have the same name, which says what they are")
    for run in runs:
        if (out / run.name).resolve() == run.resolve():
            raise SystemExit(f"--out={out} is where {run} stands; it would be overwritten")
        if not any((run / name / "summary.json").is_file() for name in WAYS):
            raise SystemExit(f"{run} holds no evaluation that is complete (greedy, sampled)")
    gold = gold_titles(questions)
    for run in runs:
        target = out / run.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "cold_start.jsonl"):
            if (run / name).is_file():
                (target / name).write_bytes((run / name).read_bytes())
        for name in WAYS:
            if (run / name / "summary.json").is_file():
                kept = jsonable(evaluation(run / name, gold))
                (target / name).mkdir(exist_ok=True)
                text = json.dumps(kept, indent=1)
                (target / name / "summary.json").write_text(text + "\n", encoding="utf-8")


# --- table and curve


def paired_interval(after: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean difference, [Q] each: the same questions are drawn of both."""
    difference = after - before
    draws = np.random.default_rng(0).integers(0, len(difference), (DRAWS, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: {"steps": rows of metrics.jsonl with a reward, "greedy": ..., "sampled": ...}."""
    runs = {}
    folders = [path for path in folder.glob("*") if path.is_dir()]
    for run in sorted(folders):
        rows = [row for row in read_json_lines(run / "metrics.jsonl") if "reward" in row]
        found: dict[str, Any] = {"steps": rows}
        for name in WAYS:
            path = run / name / "summary.json"
            if path.is_file():
                found[name] = json.loads(path.read_text(encoding="utf-8"))
                if "f1_by_question" not in found[name]:
                    raise SystemExit(f"{path} is not what `collect` writes")
        if rows or len(found) > 1:
            runs[run.name] = found
    return runs


def kind_of(name: str) -> str:
    """grpo of grpo_0."""
    return name.rpartition("_")[0] or name


def f1_of(runs: Sequence[dict[str, Any]], way: str, names: Sequence[str]) -> np.ndarray:
    """[Q] the mean over runs of each question's F1."""
    each = [[run[way]["f1_by_question"][name] for name in names] for run in runs]
    return np.array(each).mean(axis=0)


def table(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of cells: each run, then each kind of several, against the cold start; last GRPO against
    further imitation.
    """
    head = ["run", "decoding", "F1", "- cold start", "95 % interval", "calls", "pages", "tokens"]
    head += ["format errors", "covered", "opens", "found", "shown", "F1 if shown", "tied"]
    rows = [head]
    groups: dict[str, list[str]] = {name: [name] for name in runs}
    for name in runs:
        if name != "cold":
            groups.setdefault(f"all {kind_of(name)}", []).append(name)
    for way in WAYS:
        cold = [runs["cold"]] if way in runs.get("cold", {}) else []
        for title, members in groups.items():
            known = [runs[name] for name in members if way in runs[name]]
            if not known or (title.startswith("all ") and len(known) < 2):
                continue
            names = sorted(known[0][way]["f1_by_question"])
            f1 = f1_of(known, way, names).mean()
            compared = difference(known, cold, way) if cold and title != "cold" else ["", ""]
            rows.append([title, way, f"{f1:.3f}", *compared, *what_was_done(known, way)])
        ours = [run for name, run in runs.items() if kind_of(name) == "grpo" and way in run]
        theirs = [run for name, run in runs.items() if kind_of(name) == "imitation" and way in run]
        if ours and theirs:
            empty = [""] * (len(head) - 5)
            rows.append(["grpo - imitation", way, "", *difference(ours, theirs, way), *empty])
    return rows


def difference(
    runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], way: str
) -> list[str]:
    """The cells of (mean of the runs - mean of the others) and of its interval."""
    names = sorted(runs[0][way]["f1_by_question"])
    after, before = f1_of(runs, way, names), f1_of(others, way, names)
    low, high = paired_interval(after, before)
    return [f"{(after - before).mean():+.3f}", f"{low:+.3f} to {high:+.3f}"]


def what_was_done(runs: Sequence[dict[str, Any]], way: str) -> list[str]:
    """The other cells, means over the runs; `tied` is of the training."""
    cells = []
    for name, form in (("calls", ".2f"), ("pages", ".2f"), ("tokens", ".0f")):
        cells.append(format(np.mean([run[way][name] for run in runs]), form))
    cells.append(f"{np.mean([run[way]['format_errors'] for run in runs]):.1%}")
    for name in ("covered", "opens", "found", "shown", "f1_shown"):
        values = [run[way]["behaviours"].get(name, np.nan) for run in runs]
        cells.append(f"{np.mean(values):.2f}")
    tied = [row["tied"] for run in runs for row in run["steps"] if row.get("tied") is not None]
    cells.append(f"{np.mean(tied):.2f}" if tied else "")
    return cells


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """In training: F1 and tool calls of the samples, by step. On held-out questions: F1 of each run
    with its 95 % interval over questions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=140, layout="constrained")
    curve, calls, scores = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    named: set[str] = set()
    for name, run in runs.items():
        kind = kind_of(name)
        rows = [row for row in run["steps"] if row.get("f1") is not None]
        if rows:  # imitation samples nothing
            steps = [row["step"] for row in rows]
            label = None if kind in named else kind
            look = {"color": COLORS.get(kind, "#444444"), "label": label}
            curve.plot(steps, [row["f1"] for row in rows], **look)
            calls.plot(steps, [row["calls"] for row in rows], **look)
            named.add(kind)
    curve.set(title="F1 of the training's samples", xlabel="step", ylim=(0, None))
    calls.set(title="tool calls of a sample: search, open", xlabel="step", ylim=(1, 2.1))
    if named:
        calls.legend(frameon=False)
    for shift, way, marker in ((-0.15, "greedy", "o"), (0.15, "sampled", "s")):
        for place, (name, run) in enumerate(runs.items()):
            if way in run:
                f1 = np.array(list(run[way]["f1_by_question"].values()))
                low, high = paired_interval(f1, np.zeros_like(f1))
                color = COLORS.get(kind_of(name), "#444444")
                scores.plot([place + shift] * 2, [low, high], color=color)
                scores.plot([place + shift], [f1.mean()], marker, color=color)
        scores.plot([], [], marker, color="#444444", label=way)
    scores.legend(frameon=False)
    scores.set(title="F1 on held-out questions, 95 % intervals", ylim=(0, None))
    scores.set_xlim(-0.5, len(runs) - 0.5)
    scores.set_xticks(range(len(runs)), runs, rotation=30)
    for axes in (curve, calls, scores):
        axes.grid(axis="y", alpha=0.4)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="from run folders to small ones")
    collecting.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    collecting.add_argument("--out", type=Path, required=True, metavar="DIR")
    collecting.add_argument("--questions", type=Path, required=True, metavar="FILE")
    drawing = commands.add_parser("draw", help="curve and table of what was collected")
    drawing.add_argument("folder", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        if args.command == "collect":
            collect(args.runs, args.out, args.questions)
            return
        runs = read_runs(args.folder)
    except (OSError, ValueError) as error:  # torn files; folders that cannot be written
        raise SystemExit(f"real_model.py: {error}") from error
    if not runs:
        parser.error(f"{args.folder} holds no run; `collect` makes such folders")
    asked = set()
    for run in runs.values():
        for way in run.keys() & WAYS:
            asked.add(frozenset(run[way]["f1_by_question"]))
    if len(asked) > 1:
        parser.error(f"the runs in {args.folder} were not asked the same questions")
    draw(runs, args.folder.parent / "real_model.png")
    print(text_table(table(runs)))


if __name__ == "__main__":
    main(sys.argv[1:])
