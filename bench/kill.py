"""A run that is killed with SIGKILL at random moments and resumed each time, beside one that nobody
disturbs.

    python bench/kill.py [--kills 20] [--seed 0] [--json PATH]

One blow in three is aimed at a save, half at any moment of a step, the rest at the start of the
process. In the end both runs must have the same metrics (times aside), the same evaluations, the
same trajectories on disk and the same weights, bit for bit; else the exit code is 1. The runs are
small toy runs, in processes forked from this one, which saves the seconds of importing; they are as
dead as any other when they are killed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

SMALL = [
    "--preset=toy",
    "--questions_per_step=4",
    "--group_size=4",
    "--eval_questions=10",
    "--save_every=1",
    "--log_every=1",
]
TIMES = {"roll_s", "update_s"}
Process = multiprocessing.get_context("fork").Process


def work(arguments: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(train.main(arguments))


def start(arguments: list[str], log: Path) -> Process:
    log.unlink(missing_ok=True)
    process = Process(target=work, args=(arguments, log))
    process.start()
    return process


def finish(process: Process, log: Path) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit code {process.exitcode}:\n{log.read_text()}")


def result(run: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        "metrics": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        "evaluations": (summary["before"], summary["after"]),
        "trajectories": {
            file.name: file.read_bytes() for file in (run / "trajectories").glob("*.jsonl")
        },
        "weights": (last.name, (last / "model.safetensors").read_bytes()),
    }


def reported_steps(log: Path) -> list[int]:
    text = log.read_text() if log.exists() else ""
    return [int(number) for number in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]


def saved_step(run: Path) -> int:
    complete = sorted(run.glob("checkpoints/step-*/state.json"))
    return int(complete[-1].parent.name.removeprefix("step-")) if complete else 0


def half_saved(run: Path, since: float) -> list[Path]:
    """Checkpoints that are being written, or were when the run was killed; not those of earlier
    blows.
    """
    found = []
    for part in run.glob("checkpoints/.step-*.part"):
        with contextlib.suppress(FileNotFoundError):  # complete by now, and renamed
            found += [part] if part.stat().st_mtime > since else []
    return found


def strike(process: Process, run: Path, log: Path, draw: random.Random, lap: float) -> str:
    """Kill at a moment drawn at random, and say where that was; lap is the time of a step [s]."""
    aim, begun = draw.choice(["save", "save", "step", "step", "step", "start"]), time.time()
    while not (
        aim == "start" or (half_saved(run, begun) if aim == "save" else reported_steps(log))
    ):
        if not process.is_alive():
            raise RuntimeError(f"the run ended before it was killed:\n{log.read_text()}")
        time.sleep(0.001)
    time.sleep(draw.uniform(0, {"save": lap / 4, "step": lap, "start": 2 * lap}[aim]))
    process.kill()
    process.join()
    if parts := half_saved(run, begun):
        return f"a save, {len(list(parts[0].rglob('*')))} files there"
    return {"save": "just after a save", "step": "a step", "start": "the start"}[aim]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs", flush=True)
    draw, begun = random.Random(args.seed), time.monotonic()
    in_save = twice = 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, log = (Path(folder) / name for name in ("whole", "killed", "log"))
        steps = f"--steps={2 * args.kills + 2}"  # a try seldom gets two steps far
        finish(start([*SMALL, steps, f"--run_dir={whole}"], log), log)
        one = result(whole)
        rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        lap = statistics.median(row["roll_s"] + row["update_s"] for row in rows if "roll_s" in row)
        print(
            f"undisturbed: {steps[2:]}, {lap:.1f} s a step\nkill  in                        "
            f"step reached  step saved"
        )
        process = start([*SMALL, steps, f"--run_dir={killed}"], log)
        for number in range(1, args.kills + 1):
            where = strike(process, killed, log, draw, lap)
            saved = saved_step(killed)
            reached = max([saved, *reported_steps(log)])
            in_save, twice = in_save + where.startswith("a save"), twice + reached - saved
            print(f"{number:4}  {where:24}  {reached:12}  {saved:10}", flush=True)
            started = (killed / "config.yaml").exists()  # else there is nothing to resume
            process = start(
                [f"--resume={killed}"] if started else [*SMALL, steps, f"--run_dir={killed}"], log
            )
        finish(process, log)
        other = result(killed)
    equal = {name: one[name] == other[name] for name in one}
    print(
        f"{args.kills} kills, {in_save} in a save; {twice} steps done twice; "
        f"{time.monotonic() - begun:.0f} s"
    )
    print(
        "like the undisturbed run? "
        + ", ".join(f"{key}: {'yes' if same else 'NO'}" for key, same in equal.items())
    )
    if args.json:
        args.json.write_text(
            json.dumps({"kills": args.kills, "in_save": in_save, "done_twice": twice, **equal})
        )
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
