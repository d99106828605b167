"""Which detail matters: the toy trained with one thing changed at a time, several seeds each.

    python bench/ablate.py --run [--seeds N] [--only NAME ...] [--steps N]
        train what is missing, then the table
    python bench/ablate.py [--json PATH]
        the table of what is finished

Every finished run is one line of the results file, so a killed bench goes on where it was, losing
at most one run (about five CPU minutes each, thirty seeds and variants by default). All variants
train on equally many trajectories. F1 at the end is that of train.py's last evaluation; the step is
the first with a mean sampled F1 of 0.8 or more over the five steps that end there.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL, WINDOW = 0.8, 5  # sampled F1, and over how many steps its mean is taken
NO_MASK = "no observation mask"
VARIANTS = {
    # group 8, KL 0.01, importance cap 2, -1 for a wrong format, advantages divided by std
    "the toy preset": [],
    # Tokens that nobody sampled have no rollout log-probability to weight them by: compare with "no
    # importance cap".
    NO_MASK: ["--importance_cap=0"],
    "group of 4": ["--group_size=4", "--questions_per_step=32"],
    "group of 16": ["--group_size=16", "--questions_per_step=8"],
    "KL 0": ["--kl_coef=0"],
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--results", type=Path, default=ROOT / "runs/ablation/results.jsonl")
    parser.add_argument("--json", type=Path)
    if sys.argv[1:2] == ["--without-mask"]:
        return train_without_mask(sys.argv[2:])
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.touch()
    results = [json.loads(line) for line in args.results.read_text().splitlines()]
    finished = {(result["variant"], result["seed"], result["steps"]) for result in results}
    # Seed by seed, so that an early table compares all variants.
    for seed in range(args.seeds if args.run else 0):
        for name in args.only:
            if (name, seed, args.steps) in finished:
                continue
            print(f"{name}, seed {seed}", flush=True)
            results.append(run(name, seed, args.steps, args.results.resolve().parent / "run"))
            with args.results.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    figures = table([result for result in results if result["steps"] == args.steps])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
