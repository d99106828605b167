"""Ten minutes on a machine with GPUs that confirm or refute every line that we could not run.

    python bench/gpu_smoke.py [--model DIR_OR_HUB_ID] [--tokens 16384] [--json PATH]
    python bench/gpu_smoke.py --cpu [--engine hf|vllm]     the same on CPUs, to test this script:
    two ranks, float32

Each part is a process of its own: an engine and a policy side by side on one GPU, on all GPUs with
FSDP (NCCL), and once more with the optimizer in CPU memory; then train.py for two steps on one GPU
and on all, and a third step on one GPU from the checkpoint of all. With
--model=Qwen/Qwen2.5-7B-Instruct --tokens=32768 on 8 GPUs, the memory by phase is what README's
table computes. Prints one line for each check and the memory; exits with 1 if a check failed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min import toyworld  # noqa: E402
from deepresearcher_min.config import load_config  # noqa: E402
from deepresearcher_min.engine import Engine, Sampling, make_engine  # noqa: E402
from deepresearcher_min.grpo import group_advantages, pack  # noqa: E402
from deepresearcher_min.policy import Policy, training_rows  # noqa: E402
from deepresearcher_min.protocol import ChatFormat  # noqa: E402
from deepresearcher_min.run import Ranks  # noqa: E402
from deepresearcher_min.trajectory import Group, Question, Trajectory  # noqa: E402

# Engine against policy, mean over tokens. float32 was measured, bfloat16 is a guess: whoever runs
# this corrects it.
MISMATCH = {"float32": 1e-4, "bfloat16": 0.05}
SAME_GRADIENT = {
    "float32": 1e-4,
    "bfloat16": 0.02,
}  # relative difference of gradient norms on 1 and N ranks
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """What to run, and on what."""

    model: str
    dtype: str
    engine: str
    tokens: int  # in each trajectory of the update
    ranks: int


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


def sample_turns(engine: Engine, prompts: list[list[int]], end_id: int) -> list[Trajectory]:
    """One turn at temperature 1 for each prompt; the same seeds at every call."""
    for i, prompt in enumerate(prompts):
        engine.submit(str(i), prompt, Sampling(1.0, 64, seed=i, stop_token_ids=(end_id,)))
    done = {}
    while len(done) < len(prompts):
        done |= engine.step()
    trajectories = []
    for i, prompt in enumerate(prompts):
        ids, logprobs = done[str(i)].token_ids, done[str(i)].logprobs
        mask, values = (
            [False] * len(prompt) + [True] * len(ids),
            [math.nan] * len(prompt) + logprobs,
        )
        trajectories.append(
            Trajectory(Question(str(i), "", ()), prompt + ids, mask, values, (), None, "answer")
        )
    return trajectories


def mismatch(policy: Policy, trajectories: list[Trajectory]) -> float:
    nothing = [0.0] * len(trajectories)
    rows = training_rows(Group(trajectories[0].question, trajectories, nothing, nothing))
    batches = [pack([row], policy.device) for row in rows]
    pairs = [(policy.score(policy.scorer, batch).float(), batch.rollout_S) for batch in batches]
    return float(torch.cat([(own_S - rollout_S).abs() for own_S, rollout_S in pairs]).mean())


def random_group(vocabulary: int, tokens: int) -> Group:
    """Four trajectories of random tokens, 15 % of them sampled: the same on every rank and in every
    part.
    """
    rng, question, trajectories = np.random.default_rng(0), Question("random", "", ()), []
    for _ in range(4):
        mask = np.arange(tokens) % 100 >= 85
        logprobs = np.where(mask, -math.log(vocabulary), np.nan)
        ids = rng.integers(0, vocabulary, tokens)
        trajectories.append(Trajectory(question, ids, mask, logprobs, (), None, "answer"))
    rewards = [1.0, 0.0, 0.5, -1.0]
    return Group(question, trajectories, rewards, group_advantages(rewards).tolist())


def work(plan: Plan, offload: bool) -> None:
    """The phases of one training step, by hand; rank 0 prints what it found as one line of JSON."""
    ranks = Ranks.start()
    torch.set_num_threads(1)
    model_dir = str(toyworld.MODEL_DIR) if plan.model == "toy" else plan.model
    length = max(768, plan.tokens)
    config = load_config(
        [
            "--preset=paper",
            f"--dtype={plan.dtype}",
            f"--engine={plan.engine}",
            f"--max_model_len={length}",
            f"--microbatch_tokens={plan.tokens}",
            "--max_turn_tokens=64",
            f"--offload_optimizer={offload}",
            "--lr=1e-3",
            "--max_in_flight=16",
        ]
    )
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    }
    phases = found["memory_gb"] = {"start": memory(ranks.device)}

    policy = Policy(config, model_dir, ranks)
    phases["policy"] = memory(ranks.device)
    engine = make_engine(config, model_dir, ranks.world_size)
    engine.update_weights(policy.named_weights())
    phases["+ engine"] = memory(ranks.device)
    chat = ChatFormat(AutoTokenizer.from_pretrained(model_dir), "2025-01-01", "")
    questions = toyworld.World("training", 0).questions(8, 0)
    prompts = [list(chat.prompt_ids(question.text)) for question in questions]
    first = sample_turns(engine, prompts, chat.end_of_turn_id)
    found["mismatch"] = mismatch(policy, first)
    phases["after sampling"] = memory(ranks.device)
    engine.sleep()
    phases["asleep"] = memory(ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    vocabulary = policy.model.config.vocab_size
    lap = time.monotonic()
    metrics = policy.update([random_group(vocabulary, plan.tokens)] if ranks.rank == 0 else [])
    found |= {"grad_norm": metrics["grad_norm"], "update_s": time.monotonic() - lap}
    if ranks.device.type == "cuda":
        phases["peak of the update (PyTorch's own)"] = torch.cuda.max_memory_allocated() / GB
        found["between_updates_gb"] = torch.cuda.memory_allocated() / GB
    phases["after the update"] = memory(ranks.device)
    engine.wake_up()
    lap = time.monotonic()
    engine.update_weights(policy.named_weights())
    found["weights_s"] = time.monotonic() - lap
    phases["awake"] = memory(ranks.device)
    found["mismatch_if_stale"] = mismatch(policy, first)
    found["mismatch_after_update"] = mismatch(
        policy, sample_turns(engine, prompts, chat.end_of_turn_id)
    )
    engine.close()
    if ranks.rank == 0:
        print(json.dumps({"found": found}), flush=True)
    ranks.stop()


# --- the parent


def launch(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    return subprocess.run(
        [*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False
    )


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return f"exit code {done.returncode}: {lines[0].strip() if lines else done.stderr[-300:]}"


def run_part(plan: Plan, ranks: int, offload: bool) -> dict[str, Any] | str:
    """What `work` found, or why it found nothing."""
    done = launch(
        ranks, __file__, "--work", json.dumps(vars(plan)), *(["--offload"] if offload else [])
    )
    for line in done.stdout.splitlines():
        if line.startswith('{"found"'):
            return json.loads(line)["found"]
    return last_words(done)


def run_training(plan: Plan, folder: Path) -> Iterator[tuple[str, bool, str]]:
    """train.py for two steps on one rank and on all, then a third step on one rank from the
    checkpoint of all.
    """
    settings = [
        "--preset=toy",
        f"--model={plan.model}",
        f"--dtype={plan.dtype}",
        f"--engine={plan.engine}",
        "--steps=2",
        "--questions_per_step=4",
        "--group_size=4",
        "--eval_questions=4",
        "--save_every=1",
        "--max_in_flight=16",
    ]
    if plan.model != "toy":  # longer prompts and turns than the toy's
        settings += [
            "--max_model_len=4096",
            "--max_turn_tokens=256",
            "--lr=1e-6",
            "--gradient_checkpointing=true",
        ]
    last = folder / f"{plan.ranks}"
    jobs = {
        f"two steps on {ranks}": (ranks, [*settings, f"--run_dir={folder / str(ranks)}"])
        for ranks in sorted({1, plan.ranks})
    }
    jobs[f"step 3 on 1, from the checkpoint of {plan.ranks}"] = (
        1,
        [f"--resume={last}", "--steps=3"],
    )
    for name, (ranks, arguments) in jobs.items():
        done = launch(ranks, "train.py", *arguments)
        if done.returncode:
            yield f"train.py: {name}", False, last_words(done)
            continue
        run = last if "step 3" in name else folder / str(ranks)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        row = [row for row in rows if "mismatch" in row][-1]
        good = row["mismatch"] < MISMATCH[plan.dtype] and math.isfinite(
            row["kl"] + row["grad_norm"]
        )
        shown = "  ".join(
            f"{key} {row[key]:.3g}" for key in ("step", "mismatch", "kl", "grad_norm", "roll_s")
        )
        yield f"train.py: {name}", good, shown


def checks(plan: Plan, parts: dict[str, dict[str, Any] | str]) -> Iterator[tuple[str, bool, str]]:
    """(what was checked, whether it holds, what was found), for the parts with an engine and a
    policy.
    """
    limit, gpu = MISMATCH[plan.dtype], plan.dtype == "bfloat16"
    good = {name: found for name, found in parts.items() if isinstance(found, dict)}
    for name, found in parts.items():
        if isinstance(found, str):
            yield f"{name}: runs", False, found
            continue
        first, after, stale = (
            found[key] for key in ("mismatch", "mismatch_after_update", "mismatch_if_stale")
        )
        yield f"{name}: engine and policy agree", first < limit, f"{first:.2g}, limit {limit:g}"
        moved = after < limit and stale > 3 * after
        yield (
            f"{name}: new weights arrive",
            moved,
            f"{after:.2g}, limit {limit:g}; stale ones would show {stale:.2g}",
        )
        phases = found["memory_gb"]
        if gpu:
            freed, held = (
                phases["after sampling"] - phases["asleep"],
                phases["+ engine"] - phases["policy"],
            )
            yield (
                f"{name}: sleep gives memory back",
                freed > held / 2,
                f"{freed:.1f} of {held:.1f} GB",
            )
            back = phases["awake"] - phases["after the update"]
            yield f"{name}: wake_up takes it back", back > held / 2, f"{back:.1f} of {held:.1f} GB"
    for (one, a), (other, b) in itertools.pairwise(good.items()):
        close = abs(a["grad_norm"] / b["grad_norm"] - 1) < SAME_GRADIENT[plan.dtype]
        yield (
            f"gradient norm, {one} | {other}",
            close,
            f"{a['grad_norm']:.6g} | {b['grad_norm']:.6g}",
        )
        if gpu:
            less = b["between_updates_gb"] < a["between_updates_gb"]
            found = (
                f"{a['between_updates_gb']:.1f} | {b['between_updates_gb']:.1f} GB between updates"
            )
            yield f"shards are smaller, {one} | {other}", less, found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "hf"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--offload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Plan(**args.work), args.offload)
        return 0
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        plan = Plan(args.model or "toy", "float32", args.engine, args.tokens or 700, 2)
    elif torch.cuda.is_available():
        model = args.model or "Qwen/Qwen2.5-0.5B-Instruct"
        plan = Plan(model, "bfloat16", args.engine, args.tokens or 16384, torch.cuda.device_count())
    else:
        print(
            "gpu_smoke.py needs a CUDA GPU, and this machine has none; --cpu tests the script itself on CPUs."
        )
        return 2
    print(
        f"{plan.model}, {plan.dtype}, {plan.engine}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    )
    parts = {"1 rank": run_part(plan, 1, False)}
    if plan.ranks > 1:
        parts[f"{plan.ranks} ranks"] = run_part(plan, plan.ranks, False)
        parts[f"{plan.ranks} ranks, offloaded"] = run_part(plan, plan.ranks, True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, good, found in itertools.chain(
            checks(plan, parts), run_training(plan, Path(folder))
        ):
            results.append({"check": name, "pass": bool(good), "found": found})
            print(f"{'pass' if good else 'FAIL'}  {name:55} {found}", flush=True)
    print(
        "\nmemory in use by phase [GB]" + (" (CPU: the process's peak so far)" if args.cpu else "")
    )
    for name, found in parts.items():
        if isinstance(found, dict):
            shown = ", ".join(f"{phase} {value:.2f}" for phase, value in found["memory_gb"].items())
            times = f"update {found['update_s']:.1f} s, weights {found['weights_s']:.1f} s"
            print(f"  {name}, {found['device']}: {shown}; {times}")
    if args.json:
        passed = sum(result["pass"] for result in results)
        args.json.write_text(
            json.dumps(
                {"passed": passed, "checks": len(results), "parts": parts, "results": results}
            )
        )
    return 0 if all(result["pass"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
