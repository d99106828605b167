"""Which detail matters: the toy trained with one thing changed at a time, several seeds each.

    python bench/ablate.py --run [--seeds N] [--only NAME ...] [--steps N]
        train what is missing, then the table
    python bench/ablate.py [--json PATH]
        the table of what is finished
    python bench/ablate.py --collapse [--run] [--seeds N] [--steps N] [--picture PATH]
        runs that collapse, which metric shows it how early, and what sequence_mask does

Every finished run is one line of the results file, so a killed bench goes on where it was, losing
at most one run (about five CPU minutes each, thirty seeds and variants by default). All variants
train on equally many trajectories. F1 at the end is that of train.py's last evaluation; the step is
the first with a mean sampled F1 of 0.8 or more over the five steps that end there.

The runs that collapse have an engine that gets new weights only every sixth step, a learning rate
of 1.5e-3 (the preset's is 4e-4) that does not decay, and no importance cap; half of the preset's
questions a step.
Decided with trials of seed 0 in view, before the other seeds: a sign has moved at the second of two
steps in a row outside its healthy range (docs/metrics.md, from runs of the preset); the reward has
fallen at the first of two steps in a row that are more than 0.3 below the best mean of three steps
before.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL, WINDOW = 0.8, 5  # sampled F1, and over how many steps its mean is taken
NO_MASK = "no observation mask"
VARIANTS = {
    # group 8, no KL, importance cap 2, -1 for a wrong format, advantages divided by std
    "the toy preset": [],
    # Tokens that nobody sampled have no rollout log-probability to weight them by: compare with "no
    # importance cap".
    NO_MASK: ["--importance_cap=0"],
    "group of 4": ["--group_size=4", "--questions_per_step=32"],
    "group of 16": ["--group_size=16", "--questions_per_step=8"],
    "KL 0.01": ["--kl_coef=0.01"],
    "KL 0.001, as in the paper": ["--kl_coef=0.001"],
    "no importance cap": ["--importance_cap=0"],
    "no division by std": ["--advantage_std=false"],
    "no format penalty": ["--format_reward=0"],
    "rewards shuffled (control)": ["--shuffle_rewards=true"],
}


def train_without_mask(argv: list[str]) -> int:
    """train.py, but every token behind the prompt counts as sampled, observations included."""
    import train
    from deepresearcher_min import policy

    masked = policy.training_rows

    def unmasked(group: Any) -> list[Any]:
        rows = [(row, np.arange(row.sampled[0], len(row.token_ids))) for row in masked(group)]
        return [
            dataclasses.replace(row, sampled=all_, rollout_logprobs=np.zeros(len(all_)))
            for row, all_ in rows
        ]

    policy.training_rows = unmasked
    # The engine says nothing of observations that its log-probabilities could be compared in.
    policy.Policy.compare_with = lambda *_: None
    return train.main(argv)


def run(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one variant; what is kept of it. A run that ends with an error of its own is a result,
    too.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    program = [__file__, "--without-mask"] if name == NO_MASK else [str(ROOT / "train.py")]
    options = [f"--run_dir={folder}", f"--seed={seed}", f"--steps={steps}", *VARIANTS[name]]
    done = subprocess.run(
        [sys.executable, *program, *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 2):
        raise SystemExit(
            f"{name}, seed {seed} was stopped ({done.returncode}):\n{done.stderr[-2000:]}"
        )
    result = {"variant": name, "seed": seed, "steps": steps}
    if done.returncode == 2:
        return result | {"error": done.stderr.strip().splitlines()[-1]}
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sampled = [row["f1"] for row in rows if "roll_s" in row]
    reached = first_step(sampled)
    result |= {
        "f1": summary["after"]["f1"],
        "format_errors": summary["after"]["format_errors"],
        "step": reached,
    }
    return result | {"cpu_seconds": summary["cpu_seconds"]}


def first_step(sampled: list[float]) -> int | None:
    """The first step at which the mean over WINDOW steps is GOAL or more. Example: [0, 1, 1, 1, 1,
    1] -> 5.
    """
    windows = ((end, sampled[end - WINDOW : end]) for end in range(WINDOW, len(sampled) + 1))
    return next((end for end, window in windows if mean(window) >= GOAL), None)


# --- runs that collapse

BEHIND = 6  # steps between two hand-overs of weights
FALL = 0.3  # of the reward
SLIM = [
    "--lr=1.5e-3",
    "--lr_decay=false",
    "--importance_cap=0",
    "--questions_per_step=8",
    "--eval_questions=8",
    "--log_every=100",
]
COLLAPSES = {  # options, and steps between two hand-overs of weights to the engine
    "engine falls behind": (SLIM, BEHIND),
    "and sequence_mask=1.1": ([*SLIM, "--sequence_mask=1.1"], BEHIND),
    "engine up to date": (SLIM, 1),
}
HEALTHY = {  # docs/metrics.md
    "logprob_good": (-0.1, 0.0),
    "rare_share": (0.0, 0.002),
    "mismatch": (0.0, 1e-5),
    "weight_max": (0.0, 1.001),
    "entropy": (0.0, 0.15),
    "tied": (0.0, 0.95),
    "tokens": (90.0, 200.0),
}
SHOWN = ("reward", "logprob_good", "rare_share", "weight_max")
SCALES: dict[str, dict[str, Any]] = {
    "logprob_good": {"value": "symlog", "linthresh": 0.1},
    "rare_share": {"value": "symlog", "linthresh": 1e-3},
    "weight_max": {"value": "log"},
}


def train_behind(every: int, argv: list[str]) -> int:
    """train.py, but the engine gets new weights only every so many steps."""
    import train
    from deepresearcher_min.engine import HFEngine

    hand_over, calls = HFEngine.update_weights, itertools.count(-1)

    def update_weights(engine: Any, named_weights: Any) -> None:
        step = next(calls)  # twice before the first step, around the evaluation
        if step <= 0 or step % every == 0:
            hand_over(engine, named_weights)

    HFEngine.update_weights = update_weights  # type: ignore[method-assign]
    return train.main(argv)


def run_collapse(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one of COLLAPSES; its metrics, step by step."""
    shutil.rmtree(folder, ignore_errors=True)
    options, every = COLLAPSES[name]
    program = [__file__, f"--behind={every}", f"--run_dir={folder}", f"--seed={seed}"]
    subprocess.run([sys.executable, *program, f"--steps={steps}", *options], cwd=ROOT, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "roll_s" in row]
    kept = ("step", "reward", "f1", "masked", "roll_s", "update_s", *HEALTHY)
    rows = [{key: row[key] for key in kept} for row in rows]
    return {"variant": name, "seed": seed, "steps": steps, "rows": rows}


def moved(values: list[float | None], low: float, high: float) -> int | None:
    """The step at which a sign has been outside its range twice in a row; null counts as inside.
    Example: [0, 9, 0, 9, 9], 0, 1 -> 5.
    """
    outside = [value is not None and not low <= value <= high for value in values]
    pairs = enumerate(itertools.pairwise(outside), 2)
    return next((step for step, (one, two) in pairs if one and two), None)


def fallen(rewards: list[float]) -> int | None:
    """The first of two steps in a row that are FALL below the best mean of three steps before.
    Example: [0.5, 0.5, 0.5, 0, 0] -> 4.
    """
    best = -1.0
    for step in range(4, len(rewards)):
        best = max(best, mean(rewards[step - 4 : step - 1]))
        if max(rewards[step - 1 : step + 1]) < best - FALL:
            return step
    return None


def collapse_table(results: list[dict[str, Any]]) -> dict[str, float]:
    """Print for each run when the reward fell and when each sign had moved; flat figures."""
    figures: dict[str, float] = {}
    print(
        f"| run | seed | reward: best and last three steps | reward fell | {' | '.join(HEALTHY)} |"
    )
    print("|---|---|---|---|" + "---|" * len(HEALTHY))
    for name, result in itertools.product(COLLAPSES, results):
        if result["variant"] != name:
            continue
        rows, seed = result["rows"], result["seed"]
        rewards = [row["reward"] for row in rows]
        fell = fallen(rewards)
        cells = []
        for key, limits in HEALTHY.items():
            step = moved([row[key] for row in rows], *limits)
            cells.append("-" if step is None else str(step))
            if step is not None and fell is not None:
                figures[f"{name}, seed {seed}: {key}, steps before the reward"] = fell - step
        best = max(map(mean, zip(rewards, rewards[1:], rewards[2:], strict=False)))
        figures[f"{name}, seed {seed}: reward of the last three steps"] = mean(rewards[-3:])
        masked = mean(row["masked"] for row in rows)
        figures[f"{name}, seed {seed}: masked"] = masked
        ends = f"{best:.2f}, {mean(rewards[-3:]):.2f}"
        print(f"| {name} | {seed} | {ends} | {fell or '-'} | {' | '.join(cells)} |")
    return figures


def collapse_picture(results: list[dict[str, Any]], path: Path) -> None:
    """A column for each seed, a row for each of SHOWN. Dotted: where the reward fell; a dot: where
    a sign had moved; green: the healthy range.
    """
    from matplotlib.figure import Figure

    seeds = sorted({result["seed"] for result in results})
    figure = Figure(figsize=(3.2 * len(seeds) + 0.8, 8), dpi=130, layout="constrained")
    grid = figure.subplots(len(SHOWN), len(seeds), sharex=True, sharey="row", squeeze=False)
    colors = dict(zip(COLLAPSES, ("#c2410c", "#1f66b0", "#4b5563"), strict=True))
    for result in results:
        column = seeds.index(result["seed"])
        rows, name = result["rows"], result["variant"]
        steps = [row["step"] for row in rows]
        fell = fallen([row["reward"] for row in rows])
        for key, axes in zip(SHOWN, grid[:, column], strict=True):
            values = np.array([row[key] for row in rows], float)
            if key == "weight_max":
                values = np.maximum(values, 1e-4)
            axes.plot(steps, values, color=colors[name], label=name, linewidth=1.6)
            if fell is not None:
                axes.axvline(fell, color=colors[name], linestyle=":", linewidth=1)
            if key in HEALTHY:
                step = moved([row[key] for row in rows], *HEALTHY[key])
                if step is not None:
                    axes.plot(step, values[step - 1], "o", color=colors[name], markersize=7)
    for axes, seed in zip(grid[0], seeds, strict=True):
        axes.set_title(f"seed {seed}")
    for key, axes in zip(SHOWN, grid[:, 0], strict=True):
        axes.set_ylabel(key)
        axes.set_yscale(**SCALES.get(key, {"value": "linear"}))
        if key == "rare_share":
            axes.set_ylim(bottom=0)
        if key in ("logprob_good", "rare_share"):
            for other in grid[SHOWN.index(key)]:
                other.axhspan(*HEALTHY[key], color="#16a34a", alpha=0.12, linewidth=0)
    for axes in grid[-1]:
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def collapse(args: argparse.Namespace) -> dict[str, float]:
    """Run what is missing of COLLAPSES, then table, picture and the cost of sequence_mask."""
    steps = args.steps or 14
    path = args.results.with_name("collapse.jsonl")
    results = read(path)
    finished = {(result["variant"], result["seed"], result["steps"]) for result in results}
    wanted = itertools.product(range(args.seeds if args.run else 0), COLLAPSES)
    for seed, name in wanted:
        if (name, seed, steps) not in finished:
            print(f"{name}, seed {seed}", flush=True)
            result = run_collapse(name, seed, steps, path.resolve().parent / "run")
            results.append(result)
            add(path, result)
    results = [result for result in results if result["steps"] == steps]
    results.sort(key=lambda result: result["seed"])
    figures = collapse_table(results)
    if args.picture and results:
        collapse_picture(results, args.picture)
    return figures | mask_cost()


def mask_cost(rounds: int = 5) -> dict[str, float]:
    """CPU seconds of one update with and without sequence_mask, in turn: the tiny model of
    bench/update.py, twice eight trajectories of 256 tokens, half of it a common prompt.
    """
    import torch
    from contestants import SETTINGS, make_group, save_model

    from deepresearcher_min.config import load_config
    from deepresearcher_min.policy import Policy
    from deepresearcher_min.run import Ranks
    from deepresearcher_min.trajectory import Question

    torch.set_num_threads(1)  # two would wait for each other, and their waiting would count
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), 4096)
        group = make_group(4096, [256] * 8, shared=128)
        other = dataclasses.replace(group, question=Question("other", "text", ("gold",)))
        groups = [group, other]
        for updates in (1, 2):
            seconds: dict[str, list[float]] = {"off": [], "on": []}
            policies = {}
            for name, limit in (("off", 0), ("on", 2)):
                own = [f"--sequence_mask={limit}", f"--updates_per_rollout={updates}"]
                policies[name] = Policy(load_config([*SETTINGS, *own]), folder, Ranks())
                policies[name].update(groups)  # to warm up
            for _, name in itertools.product(range(rounds), seconds):
                begun = time.process_time()
                policies[name].update(groups)
                seconds[name].append(time.process_time() - begun)
            ratio = median(seconds["on"]) / median(seconds["off"])
            figures[f"sequence_mask, {updates} updates: on / off"] = ratio
            print(
                f"{updates} update(s) a rollout: {median(seconds['off']):.2f} s without, "
                f"{median(seconds['on']):.2f} s with sequence_mask ({ratio:.2f}x)"
            )
    return figures


# --- the table, and finished runs


def read(path: Path) -> list[dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return [json.loads(line) for line in path.read_text().splitlines()]


def add(path: Path, result: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def table(results: list[dict[str, Any]]) -> dict[str, float]:
    """Print the results as Markdown, a row for each variant; the same figures, flat."""
    figures: dict[str, float] = {}
    print(
        "| variant | seeds | F1 at the end (lowest to highest) | step with F1 0.8 (each seed) | "
        "CPU minutes a run |"
    )
    print("|---|---|---|---|---|")
    for name in VARIANTS:
        runs = [result for result in results if result["variant"] == name]
        good = [result for result in runs if "error" not in result]
        if not runs:
            continue
        f1, steps = [result["f1"] for result in good], [result["step"] for result in good]
        final = f"{mean(f1):.3f} ({min(f1):.3f} to {max(f1):.3f})" if good else "none ended"
        failed = f", {len(runs) - len(good)} failed" if len(good) < len(runs) else ""
        reached = ", ".join("never" if step is None else str(step) for step in steps)
        minutes = f"{median(result['cpu_seconds'] for result in good) / 60:.1f}" if good else ""
        print(f"| {name} | {len(runs)}{failed} | {final} | {reached} | {minutes} |")
        if good:
            figures[f"{name}: f1"] = mean(f1)
            figures[f"{name}: seeds that reached {GOAL}"] = sum(step is not None for step in steps)
    return figures


def ablation(args: argparse.Namespace) -> dict[str, float]:
    """Run what is missing of VARIANTS, then the table."""
    steps = args.steps or 80
    results = read(args.results)
    finished = {(result["variant"], result["seed"], result["steps"]) for result in results}
    # Seed by seed, so that an early table compares all variants.
    for seed in range(args.seeds if args.run else 0):
        for name in args.only:
            if (name, seed, steps) in finished:
                continue
            print(f"{name}, seed {seed}", flush=True)
            results.append(run(name, seed, steps, args.results.resolve().parent / "run"))
            add(args.results, results[-1])
    return table([result for result in results if result["steps"] == steps])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="80; with --collapse 14")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/ablation/results.jsonl")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--collapse", action="store_true")
    parser.add_argument("--picture", type=Path)
    if sys.argv[1:2] == ["--without-mask"]:
        return train_without_mask(sys.argv[2:])
    if sys.argv[1:2] and sys.argv[1].startswith("--behind="):
        return train_behind(int(sys.argv[1].removeprefix("--behind=")), sys.argv[2:])
    args = parser.parse_args()
    figures = collapse(args) if args.collapse else ablation(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
