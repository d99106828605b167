"""What a machine with GPUs confirms or refutes of all that we could not run, in three parts of at
most four minutes each. No network; the weights are random.

    python bench/gpu_smoke.py [--part 1 2 3] [--shape 0.5B] [--tokens 8192] [--json FILE]
    python bench/gpu_smoke.py --cpu    the same on CPUs, to test this script: two ranks, float32

Part 1: policy and HFEngine in bfloat16 on one GPU, and on all with FSDP (NCCL), once with the
optimizer in CPU memory: do they agree, do new weights arrive, does sleep give memory back, which
attention ran, memory by phase beside what docs/memory.md computes. It imports nothing beyond torch,
transformers, numpy, safetensors, pyarrow, pyyaml, requests, urllib3 and tqdm.
Part 2: train.py, two steps of the toy on one GPU and on all, and a third on one from the checkpoint
of all.
Part 3: part 1 with vLLM as engine.

One line for each check; exit code 1 if one failed. FILE holds everything as JSON: please send it.
"""

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from shapes import GB, SHAPES, computed, make_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.config import load_config  # noqa: E402
from deepresearcher_min.engine import Engine, Sampling, make_engine  # noqa: E402
from deepresearcher_min.grpo import group_advantages, pack  # noqa: E402
from deepresearcher_min.policy import Policy, training_rows  # noqa: E402
from deepresearcher_min.run import Ranks  # noqa: E402
from deepresearcher_min.trajectory import Group, Question, Trajectory  # noqa: E402

PART_SECONDS = 240.0
# Engine against policy, mean over tokens [nats]: float32 is measured, bfloat16 was measured on CPUs
# only.
MISMATCH = {"float32": 1e-4, "bfloat16": 0.05}
# Gradient norms of the same batch: of ranks among themselves, and of one rank, whose residual
# stream is float32 under autocast, against several, whose is bfloat16.
SAME_NORM = {"float32": 1e-4, "bfloat16": 0.02}
LIKE_NORM = {"float32": 1e-4, "bfloat16": 0.1}


@dataclass(frozen=True)
class Plan:
    """What to run, and on what."""

    shape: str
    dtype: str
    engine: str
    tokens: int  # in each trajectory of the update, and in a micro-batch
    ranks: int
    offload: bool = False


# --- in a process of its own, one for each rank


def memory(device: torch.device) -> float:
    """In use on the whole device, by vLLM, PyTorch and libraries [GB]; on a CPU the peak of this
    process so far.
    """
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GB


def prompts() -> list[list[int]]:
    """Of eight requests, which share their first 100 tokens."""
    rng = np.random.default_rng(0)
    shared = rng.integers(10, 400, 100).tolist()
    return [shared + rng.integers(10, 400, 20 + 7 * i).tolist() for i in range(8)]


def sample_turns(engine: Engine) -> list[Trajectory]:
    """One turn at temperature 1 for each prompt; the same seeds at every call."""
    for i, prompt in enumerate(prompts()):
        engine.submit(str(i), prompt, Sampling(1.0, 64, seed=i, stop_token_ids=()))
    done = {}
    while len(done) < len(prompts()):
        done |= engine.step()
    trajectories = []
    for i, prompt in enumerate(prompts()):
        turn = done[str(i)]
        ids = prompt + turn.token_ids
        mask = [False] * len(prompt) + [True] * len(turn.token_ids)
        logprobs = [math.nan] * len(prompt) + turn.logprobs
        asked = Question(str(i), "", ())
        trajectories.append(Trajectory(asked, ids, mask, logprobs, (), None, "answer"))
    return trajectories


def mismatch(policy: Policy, trajectories: list[Trajectory]) -> float:
    """Mean distance between the policy's and the engine's log-probabilities [nats]."""
    nothing = [0.0] * len(trajectories)
    distances = []
    for row in training_rows(Group(trajectories[0].question, trajectories, nothing, nothing)):
        batch = pack([row], policy.ranks.device)
        own_S = policy.score(policy.scorer, batch).float()
        distances.append((own_S - batch.rollout_S).abs())
    return float(torch.cat(distances).mean())


def random_group(vocabulary: int, tokens: int) -> Group:
    """Four trajectories of random tokens, 15 % of them sampled: the same on every rank and in every
    part. They share a prompt of an eighth.
    """
    rng = np.random.default_rng(0)
    question = Question("random", "", ())
    prompt = rng.integers(0, vocabulary, tokens // 8)
    trajectories = []
    for _ in range(4):
        mask = np.arange(tokens) % 100 >= 85
        mask[: len(prompt)] = False
        logprobs = np.where(mask, -math.log(vocabulary), np.nan)
        ids = np.concatenate([prompt, rng.integers(0, vocabulary, tokens - len(prompt))])
        trajectories.append(Trajectory(question, ids, mask, logprobs, (), None, "answer"))
    rewards = [1.0, 0.0, 0.5, -1.0]
    return Group(question, trajectories, rewards, group_advantages(rewards).tolist())


def attention_that_runs(policy: Policy, group: Group) -> dict[str, int]:
    """PyTorch's attention operators in one scoring of two trajectories, and how often each ran."""
    batch = pack(training_rows(group)[:2], policy.ranks.device)
    with torch.profiler.profile() as profiled:
        policy.score(policy.scorer, batch)
    ran = {}
    for event in profiled.key_averages():
        if "_scaled_dot_product" in event.key or "varlen" in event.key:
            ran[event.key.rpartition("::")[2]] = event.count
    return ran


def work(plan: Plan, folder: str) -> None:
    """The phases of one training step, by hand; rank 0 prints what it found as one line of JSON."""
    ranks = Ranks.start()
    torch.set_num_threads(1)
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"  # at ERROR it hides "weights were not loaded"
    length = max(768, plan.tokens)
    arguments = [
        f"--{key}={value}" for key, value in asdict(plan).items() if key in ("dtype", "engine")
    ]
    arguments += [f"--max_model_len={length}", f"--microbatch_tokens={plan.tokens}"]
    arguments += ["--max_turn_tokens=64", f"--offload_optimizer={plan.offload}", "--lr=1e-3"]
    config = load_config(["--preset=paper", "--max_in_flight=16", *arguments])
    gpu = ranks.device.type == "cuda"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpu else "CPU"}
    found["ranks"] = ranks.world_size
    phases = found["memory_gb"] = {"start": memory(ranks.device)}

    def phase(name: str) -> None:
        phases[name] = memory(ranks.device)

    policy = Policy(config, folder, ranks)
    phase("policy")
    engine = make_engine(config, folder, ranks.world_size)
    engine.update_weights(policy.named_weights())
    phase("+ engine")
    first = sample_turns(engine)
    found["mismatch"] = mismatch(policy, first)
    phase("after sampling")
    engine.sleep()
    phase("asleep")
    group = random_group(SHAPES[plan.shape].vocabulary, plan.tokens)
    found["attention"] = attention_that_runs(policy, group)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    lap = time.monotonic()
    metrics = policy.update([group] if ranks.rank == 0 else [])
    found |= {"grad_norm": metrics["grad_norm"], "update_s": time.monotonic() - lap}
    if gpu:
        phases["peak of the update (PyTorch's own)"] = torch.cuda.max_memory_allocated() / GB
    phase("after the update")
    engine.wake_up()
    lap = time.monotonic()
    engine.update_weights(policy.named_weights())
    found["weights_s"] = time.monotonic() - lap
    phase("awake")
    found["mismatch_if_stale"] = mismatch(policy, first)
    found["mismatch_after_update"] = mismatch(policy, sample_turns(engine))
    engine.close()
    if ranks.rank == 0:
        print(json.dumps({"found": found}), flush=True)
    ranks.stop()


# --- the parent


class Clock:
    """What is left of a part's time."""

    def __init__(self) -> None:
        self.end = time.monotonic() + PART_SECONDS

    def left(self) -> float:
        return self.end - time.monotonic()


def launch(clock: Clock, ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """torchrun; a process that takes longer than the part's time is ended, and says so."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    whole = [*torchrun, f"--nproc_per_node={ranks}", *command]
    if clock.left() < 5:
        return subprocess.CompletedProcess(whole, 124, "", "Error: no time was left for it")
    try:
        return subprocess.run(
            whole, cwd=ROOT, capture_output=True, text=True, timeout=clock.left(), check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(whole, 124, "", f"Error: over {PART_SECONDS:g} s")


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return f"exit code {done.returncode}: {lines[0].strip() if lines else done.stderr[-300:]}"


Found = dict[str, Any] | str  # what `work` found, or why it found nothing
Check = tuple[str, bool, str]  # what was checked, whether it holds, what was found


def run_work(plan: Plan, folder: str, clock: Clock) -> Found:
    done = launch(
        clock, plan.ranks, __file__, "--work", json.dumps(asdict(plan)), "--folder", folder
    )
    for line in done.stdout.splitlines():
        if line.startswith('{"found"'):
            return json.loads(line)["found"]
    return last_words(done)


def run_engine(plan: Plan, folder: str) -> dict[str, Found]:
    """Part 1, or with another engine part 3: on one rank, on all, and with offload."""
    clock = Clock()
    plans = {"1 rank": Plan(**{**asdict(plan), "ranks": 1})}
    if plan.ranks > 1:
        plans[f"{plan.ranks} ranks"] = plan
        plans[f"{plan.ranks} ranks, offloaded"] = Plan(**{**asdict(plan), "offload": True})
    return {name: run_work(each, folder, clock) for name, each in plans.items()}


def run_training(plan: Plan, folder: Path) -> Iterator[Check]:
    """Part 2: train.py."""
    clock = Clock()
    settings = [f"--dtype={plan.dtype}", "--engine=hf", "--steps=2", "--questions_per_step=4"]
    settings += ["--group_size=4", "--eval_questions=4", "--save_every=1", "--max_in_flight=16"]
    last = folder / str(plan.ranks)
    jobs = {}
    for ranks in sorted({1, plan.ranks}):
        jobs[f"two steps on {ranks}"] = (ranks, [*settings, f"--run_dir={folder / str(ranks)}"])
    name = f"step 3 on 1, from the checkpoint of {plan.ranks}"
    jobs[name] = (1, [f"--resume={last}", "--steps=3"])
    for name, (ranks, arguments) in jobs.items():
        done = launch(clock, ranks, "train.py", *arguments)
        if done.returncode:
            yield f"train.py: {name}", False, last_words(done)
            continue
        run = last if "step 3" in name else folder / str(ranks)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        row = [row for row in rows if "mismatch" in row][-1]
        finite = math.isfinite(row["kl"] + row["grad_norm"])
        shown = [f"{key} {row[key]:.3g}" for key in ("step", "mismatch", "kl", "grad_norm")]
        good = row["mismatch"] < MISMATCH[plan.dtype] and finite
        yield f"train.py: {name}", good, "  ".join(shown)


def checks(plan: Plan, parts: dict[str, Found]) -> Iterator[Check]:
    """Of the parts with an engine and a policy."""
    limit = MISMATCH[plan.dtype]
    norms = {}
    for name, found in parts.items():
        name = f"{plan.engine}, {name}"
        if isinstance(found, str):
            yield f"{name}: runs", False, found
            continue
        norms[name] = found["grad_norm"]
        first, after = found["mismatch"], found["mismatch_after_update"]
        yield f"{name}: engine and policy agree", first < limit, f"{first:.2g}, limit {limit:g}"
        stale = found["mismatch_if_stale"]
        said = f"{after:.2g}, limit {limit:g}; stale ones would show {stale:.2g}"
        yield f"{name}: new weights arrive", after < limit and stale > 3 * after, said
        ran = found["attention"]
        said = ", ".join(f"{count} x {operator}" for operator, count in ran.items())
        fast = bool(ran) and not any("math" in operator for operator in ran)
        yield f"{name}: attention by a fast operator", fast, said
        if found["device"] == "CPU":
            continue
        phases = found["memory_gb"]
        held = phases["+ engine"] - phases["policy"]
        freed = phases["after sampling"] - phases["asleep"]
        said = f"{freed:.1f} of {held:.1f} GB"
        # HFEngine keeps its weights.
        yield f"{name}: sleep gives memory back", freed > held / 4, said
        back = phases["awake"] - phases["after the update"]
        yield f"{name}: wake_up takes it back", back > held / 4, f"{back:.1f} of {held:.1f} GB"
        for key, expected in computed(SHAPES[plan.shape], found["ranks"], plan.tokens).items():
            seen = phases[key] - (phases["start"] if key == "policy" else 0)
            said = f"{seen:.1f} GB, computed {expected:.1f}"
            yield f"{name}: memory, {key}", seen < 1.15 * expected + 1, said
    for (one, a), (other, b) in itertools.pairwise(norms.items()):
        near = LIKE_NORM if "1 rank" in one else SAME_NORM
        said = f"{a:.6g} | {b:.6g}"
        yield f"gradient norm, {one} | {other}", abs(a / b - 1) < near[plan.dtype], said


def show_memory(name: str, found: dict[str, Any]) -> None:
    shown = ", ".join(f"{phase} {value:.2f}" for phase, value in found["memory_gb"].items())
    times = f"update {found['update_s']:.1f} s, weights {found['weights_s']:.1f} s"
    print(f"  {name}, {found['device']}: {shown}; {times}")


def arguments_of(argv: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--part", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--shape", choices=SHAPES, help="of the random model; default 0.5B")
    parser.add_argument("--tokens", type=int, help="of a trajectory and a micro-batch")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    args = arguments_of(sys.argv[1:])
    if args.work:
        work(Plan(**args.work), args.folder)
        return 0
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        plan = Plan(args.shape or "tiny", "float32", "hf", args.tokens or 700, 2)
    elif torch.cuda.is_available():
        count = torch.cuda.device_count()
        plan = Plan(args.shape or "0.5B", "bfloat16", "hf", args.tokens or 8192, count)
    else:
        print(
            "gpu_smoke.py needs a CUDA GPU, and PyTorch sees none here (an old driver looks alike);"
        )
        print("--cpu tests the script itself.")
        return 2
    print(f"{plan}; torch {torch.__version__}, transformers {transformers.__version__}")
    results: list[dict[str, Any]] = []
    parts: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(SHAPES[plan.shape], Path(folder) / "model")
        for part in args.part:
            print(f"\npart {part}", flush=True)
            if part == 2:
                found = run_training(plan, Path(folder))
            else:
                each = Plan(**{**asdict(plan), "engine": "hf" if part == 1 else "vllm"})
                ran = run_engine(each, str(Path(folder) / "model"))
                parts |= {f"part {part}, {name}": value for name, value in ran.items()}
                found = checks(each, ran)
            for name, good, said in found:
                results.append({"part": part, "check": name, "pass": bool(good), "found": said})
                print(f"{'pass' if good else 'FAIL'}  {name:55} {said}", flush=True)
    print("\nmemory in use by phase [GB]" + (" (CPU: the process's peak)" if args.cpu else ""))
    for name, seen in parts.items():
        if isinstance(seen, dict):
            show_memory(name, seen)
    passed = sum(result["pass"] for result in results)
    print(f"\n{passed} of {len(results)} checks passed; load {os.getloadavg()[0]:.1f}")
    if args.json:
        about = {"torch": torch.__version__, "transformers": transformers.__version__}
        whole = {"passed": passed, "checks": len(results), **about, "plan": asdict(plan)}
        args.json.write_text(json.dumps({**whole, "parts": parts, "results": results}, indent=1))
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
