"""The update, measured: forward and backward of the loss (no optimizer step) on fixed batches, and
its peak memory.

    python bench/update.py [--json PATH] [--rounds N] [--peers] [--cache DIR]

--peers measures TRL's two trainers on the same weights and tokens, in turn with ours; TRL and the
libraries that we share with it are installed once into an environment of the bench's own, under
--cache. Everybody gets float32, one thread, gradient checkpointing and tensors that are ready;
losses and gradient norms must agree, or nothing is reported. Who they are, and on which batches, is
in contestants.py. Peak extra memory is the process's highest resident size during the call, less
the size before it; it includes the gradients. Needs Linux. A round takes 25 s of CPU time, with
--peers one more minute and four to six for GRPOTrainer, which runs in the first round only; one
more round measures memory.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zlib
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import contestants
import numpy as np
import torch
from contestants import Contestant, make_group, save_model

# What the peers' environment has is pinned by this file, or has the version of ours.
PEERS_FILE = Path(__file__).with_name("requirements-peers.txt")
SHARED = (
    "torch",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pyyaml",
    "pyarrow",
    "requests",
)
# Tried before anything is measured; contestants imports the package.
NEEDED = (
    "import requests, contestants; from trl import GRPOTrainer; "
    "from trl.experimental.async_grpo import AsyncGRPOTrainer"
)
TAIL = (96, 112, 128, 144, 160, 192, 224, 256, 288, 320, 352, 448, 640, 1024, 1600, 2560)
EVEN = (307, 358, 410, 461, 563, 614, 666, 717)  # 0.6 to 1.4 times 512
# Vocabulary, lengths [tokens].
CASES = {"152k": (151_936, EVEN), "4k": (4096, EVEN), "tail_4k": (4096, TAIL)}
SLOPE = {f"{n}": (4096, (n,)) for n in (1024, 2048, 4096, 8192)}  # one sequence of growing length
# Eight trajectories of 512 tokens on average begin with one prompt, which is so many percent of
# them.
PROMPTS = {
    f"shared_{share}": (
        4096,
        tuple(512 * share // 100 + n * (100 - share) // 100 for n in EVEN),
        512 * share // 100,
    )
    for share in (25, 50, 80)
}
ALL = CASES | SLOPE | PROMPTS
PEERS = {"trl_grpo": "GRPOTrainer", "trl_grpo_compact": "GRPO compact", "trl_async": "AsyncGRPO"}
SLOW = {"trl_grpo", "trl_grpo_compact"}  # one round is enough for what takes 2 to 17 times as long
LABELS = PEERS | {"ours_apart": "ours, apart"}
CAPTION = """
What carries over to a 7B model on GPUs: no work on padding, no head at tokens that are not
trained, logits never kept (24k trained tokens x 152k words in float32 are 14.6 GB), memory linear
in length. What does not: the ratios. At 152k words the head is most of this small model; of a 7B
model it is 6 % of the FLOPs, and so much less is gained there. Only the batches shared_* share a
prompt: ours and AsyncGRPO compute it once, "ours, apart" in every trajectory, as the others do.
GPUs: untested.
"""


def resident(field: str) -> float:
    """A size of this process in GB: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def measure(model: torch.nn.Module, run: Callable[[], float]) -> dict[str, float]:
    """One call: CPU and wall time [s], peak extra memory [GB], loss, gradient norm."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest size so far
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    loss = run()
    figures = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    figures |= {"peak_gb": resident("VmHWM") - before, "loss": loss}
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return figures | {"grad_norm": float(norm)}


def work(name: str, models: str) -> None:
    """A contestant in a process of its own: a case on each line in, the figures of one call out."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries talk
    torch.set_num_threads(1)
    ready: dict[str, Contestant] = {}
    for line in sys.stdin:
        case = line.strip()
        vocabulary, *shape = ALL[case]
        if case not in ready:
            ready = {
                case: getattr(contestants, name)(
                    f"{models}/{vocabulary}", make_group(vocabulary, *shape)
                )
            }
            # Pages the mapped weights in.
            assert all(p.isfinite().all() for p in ready[case][0].parameters())
        print(json.dumps(measure(*ready[case])), file=out, flush=True)


class Worker:
    """The other end of `work`. To measure memory, the C library must give back at once what was
    freed.
    """

    def __init__(self, python: str, name: str, models: str, memory: bool) -> None:
        command = [python, __file__, "--worker", name, models]
        malloc = (
            {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if memory else {}
        )
        self.name, self.log = name, open(f"{models}/{name}.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=models,
            env=os.environ | malloc,
        )

    def run(self, case: str) -> dict[str, float]:
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.name} failed at {case}:\n{Path(self.log.name).read_text()[-3000:]}"
            )
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def peers_python(cache: Path) -> str:
    """The interpreter of the environment with TRL, which is made if it is not there."""
    shared = [f"{name}=={version(name)}" for name in SHARED]
    pins = PEERS_FILE.read_text() + "\n".join(shared)
    folder = cache / f"peers-{zlib.crc32(pins.encode()):08x}"
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        print(f"installing TRL into {folder} ...", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "-r", PEERS_FILE, *shared]
        subprocess.run(install, check=True)
        done.touch()
    subprocess.run([python, "-c", NEEDED], check=True, cwd=PEERS_FILE.parent)
    return str(python)


def check_agreement(case: str, found: dict[str, dict[str, float]]) -> None:
    ours = found["ours"]
    for name, figures in found.items():
        for key in ("loss", "grad_norm"):
            if abs(figures[key] - ours[key]) > 1e-4 * ours["grad_norm"]:
                raise SystemExit(
                    f"{case}: {key} is {figures[key]} for {name}, {ours[key]} for ours: not "
                    f"comparable"
                )


def cases_of(name: str) -> dict[str, Any]:
    """The batches that a contestant runs on."""
    if name == "ours_apart":
        return PROMPTS
    return CASES | PROMPTS if name in ("ours", "trl_async") else CASES


def bench_memory(
    start: Callable[[str], Worker], names: list[str]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The first call of every case for every contestant, and how our peak grows with the length of
    a sequence.
    """
    first: dict[str, dict[str, dict[str, float]]] = {case: {} for case in CASES | PROMPTS}
    for name in names:
        with closing(start(name)) as worker:
            for case in cases_of(name):
                first[case][name] = worker.run(case)
            if name == "ours":
                peaks = np.array([worker.run(length)["peak_gb"] for length in SLOPE])
    for case, found in first.items():
        check_agreement(case, found)
    lengths = np.array([int(name) for name in SLOPE])
    slope, fixed = np.polyfit(lengths, peaks, 1)
    off = np.abs(peaks - fixed - slope * lengths).max() / peaks.max()
    pairs = ", ".join(f"{n}: {peak * 1000:.0f}" for n, peak in zip(lengths, peaks, strict=True))
    print(f"\npeak extra memory of ours by length of one sequence, 4k words [tokens: MB]  {pairs}")
    print(
        f"line: {fixed * 1000:.0f} MB + {slope * 1e6:.1f} kB per token, off by at most "
        f"{off:.1%} of the largest peak"
    )
    return first, {"memory_kb_per_token": slope * 1e6, "memory_off_line": float(off)}


def key_of(name: str, case: str) -> str:
    """The name of a ratio: a contestant's time to ours."""
    rival = {"ours_apart": "today", "trl_async": "async"}.get(name, name)
    return case.replace("shared_", f"shared_vs_{rival}_") if case in PROMPTS else f"{name}_{case}"


def bench_time(workers: dict[str, Worker], rounds: int, first: dict[str, Any]) -> dict[str, float]:
    """Rounds of one call of every contestant, and the table."""
    figures: dict[str, float] = {}
    print(
        f"\n{'batch':10}{'':14}{'CPU s':>8}{'x ours':>8}{'wall s':>8}"
        f"{'peak GB':>9}{'loss':>12}{'grad norm':>11}"
    )
    for case in CASES | PROMPTS:
        found: dict[str, list[dict[str, float]]] = {
            name: [] for name in workers if case in cases_of(name)
        }
        for number in range(rounds):
            for name, runs in found.items():
                if number == 0 or name not in SLOW:
                    runs.append(workers[name].run(case))
        for name, runs in found.items():
            row = first[case][name] | {
                key: median(run[key] for run in runs) for key in ("cpu_s", "wall_s")
            }
            ratio = median(
                a["cpu_s"] / b["cpu_s"] for a, b in zip(runs, found["ours"], strict=False)
            )
            times = f"{row['cpu_s']:8.2f}{ratio:8.2f}{row['wall_s']:8.2f}"
            checks = f"{row['peak_gb']:9.3f}{row['loss']:12.6f}{row['grad_norm']:11.6f}"
            print(f"{case:10}{LABELS.get(name, name):14}{times}{checks}", flush=True)
            figures[f"{name}_{case}_cpu_s"] = row["cpu_s"]
            figures[f"{'' if name == 'ours' else name + '_'}peak_extra_gb_{case}"] = row["peak_gb"]
            if name != "ours":
                figures[key_of(name, case)] = ratio
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/deepresearcher_min")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    figures: dict[str, float] = {"load": os.getloadavg()[0], "cpus": os.cpu_count() or 0}
    python = peers_python(args.cache) if args.peers else sys.executable
    with tempfile.TemporaryDirectory() as models:
        for vocabulary in {vocabulary for vocabulary, *_ in ALL.values()}:
            save_model(Path(models) / str(vocabulary), vocabulary)
        names = ["ours", "ours_apart", *(PEERS if args.peers else [])]
        first, slope = bench_memory(lambda name: Worker(python, name, models, memory=True), names)
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(closing(Worker(python, name, models, memory=False)))
                for name in names
            }
            figures |= slope | bench_time(workers, args.rounds, first)
    print(CAPTION)
    print(
        f"load of this machine: {figures['load']:.1f} before, {os.getloadavg()[0]:.1f} after, "
        f"{figures['cpus']} CPUs"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
