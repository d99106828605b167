"""The update, measured: forward and backward of the loss (no optimizer step) on fixed batches, and its peak memory.

    python bench/update.py [--json PATH] [--rounds N] [--peers] [--cache DIR]

--peers measures TRL's two trainers on the same weights and tokens, in turn with ours; TRL and the libraries that we
share with it are installed once into an environment of the bench's own, under --cache. Everybody gets float32, one
thread, gradient checkpointing and tensors that are ready; losses and gradient norms must agree, or nothing is reported.
  ours           Policy.backward on the micro-batches that Policy.plan made
  GRPOTrainer    as it runs here: padded, the head at every position
  GRPO compact   the same with the head at completion tokens only, as on a GPU; the switch is patched for this bench
  AsyncGRPO      packed, the head at trained tokens only; its GPU attention is replaced by the attention that ours uses
Peak extra memory is the process's highest resident size during the call, less the size before it; it includes the
gradients. Needs Linux. A round takes 12 s of CPU time, with --peers four minutes; one more round measures memory.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from deepresearcher_min import grpo  # noqa: E402
from deepresearcher_min.config import load_config  # noqa: E402
from deepresearcher_min.policy import Policy, score_group  # noqa: E402
from deepresearcher_min.run import Ranks  # noqa: E402
from deepresearcher_min.trajectory import Group, Question, Trajectory  # noqa: E402

TRL = "trl==1.16.0"
# What the peers' environment has in the same version as ours.
SHARED = ("torch", "transformers", "safetensors", "numpy", "pyyaml", "pyarrow")
PROMPT = 40  # tokens of a prompt
TAIL = (96, 112, 128, 144, 160, 192, 224, 256, 288, 320, 352, 448, 640, 1024, 1600, 2560)
EVEN = (307, 358, 410, 461, 563, 614, 666, 717)  # 0.6 to 1.4 times 512
CASES = {"152k": (151_936, EVEN), "4k": (4096, EVEN), "tail_4k": (4096, TAIL)}  # vocabulary, lengths [tokens]
SLOPE = {f"{n}": (4096, (n,)) for n in (1024, 2048, 4096, 8192)}  # one sequence of growing length
PEERS = {"trl_grpo": "GRPOTrainer", "trl_grpo_compact": "GRPO compact", "trl_async": "AsyncGRPO"}
SETTINGS = [
    "--preset=wiki", "--temperature=1", "--kl_coef=0", "--importance_cap=0", "--gradient_checkpointing=true",
    "--microbatch_tokens=8192",
]  # fmt: skip
CAPTION = """
What carries over to a 7B model on GPUs: no work on padding, no head at tokens that are not trained, logits never kept
(24k trained tokens x 152k words in float32 are 14.6 GB), memory linear in length. What does not: the ratios. At 152k
words the head is most of this small model; of a 7B model it is 6 % of the FLOPs, and so much less is gained there.
These batches share no prompt: AsyncGRPO would run a shared one once, ours runs it in every trajectory. GPUs: untested.
"""


# --- the batches


def make_group(vocabulary: int, lengths: Sequence[int]) -> Group:
    """Trajectories of the given lengths with about 15 % sampled tokens: a prompt, then turns of 18 tokens."""
    rng, question = np.random.default_rng(0), Question("q", "text", ("gold",))
    trajectories = []
    for length in lengths:
        mask = np.zeros(length, bool)
        starts = np.linspace(PROMPT, length - 18, max(1, round(0.15 * length / 18))).astype(int)
        for start in starts:
            mask[start : start + 18] = True
        logprobs = np.where(mask, -math.log(vocabulary), np.nan)
        ids = rng.integers(1, vocabulary, length)
        trajectories.append(Trajectory(question, ids, mask, logprobs, (), "gold", "answer"))
    rewards = rng.random(len(lengths)) if len(lengths) > 1 else np.ones(1)
    advantages = grpo.group_advantages(rewards).tolist() if len(lengths) > 1 else [1.0]
    return Group(question, trajectories, rewards, advantages)


def save_model(folder: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **sizes, **heads)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)


# --- the contestants: a model and a function that adds its gradient and returns the loss

Contestant = tuple[torch.nn.Module, Callable[[], float]]


def ours(folder: str, group: Group) -> Contestant:
    policy = Policy(load_config(SETTINGS), folder, Ranks())
    rows = score_group(group)
    total, plan = sum(t.sampled_mask.sum() for t in group.trajectories), policy.plan(rows)

    def run() -> float:
        sums: Counter[str] = Counter()
        for batch in plan:
            sums.update(policy.backward(batch, None, total))
        return float(sums["loss"]) / total

    return policy.model, run


def as_trained(trainer: Any) -> torch.nn.Module:
    """Do what the trainer does when its training starts."""
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.args.gradient_checkpointing  # its default, too
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer.accelerator.prepare(trainer.model).train()


def trl_grpo(folder: str, group: Group, compact: bool = False) -> Contestant:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    count = len(group.trajectories)
    options = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=count,
        num_generations=count, loss_type="bnpo", beta=0.0, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": "a"}] * count)
    trainer = GRPOTrainer(folder, lambda completions, **_: [0.0] * len(completions), options, prompts)
    model = as_trained(trainer)

    def padded(
        rows: list[np.ndarray],
    ) -> torch.Tensor:  # prompts are equally long here, completions padded on the right
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], True)

    ids = [t.token_ids for t in group.trajectories]
    inputs = {
        "prompt_ids": padded([row[:PROMPT] for row in ids]),
        "prompt_mask": torch.ones(count, PROMPT, dtype=torch.int64),
        "completion_ids": padded([row[PROMPT:] for row in ids]),
        "completion_mask": padded([np.ones(len(row) - PROMPT) for row in ids]),
        "tool_mask": padded([t.sampled_mask[PROMPT:] for t in group.trajectories]),
        "advantages": torch.tensor(group.advantages),
    }

    def run() -> float:
        # The backward of the head asks for the device, too, and must find no Triton: only the selection is switched.
        utils._use_triton = lambda device: compact
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        return float(loss)

    return model, run


def trl_grpo_compact(folder: str, group: Group) -> Contestant:
    return trl_grpo(folder, group, compact=True)


def trl_async(folder: str, group: Group) -> Contestant:
    from queue import Queue
    from types import SimpleNamespace

    from datasets import Dataset
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
    from trl.trainer import utils

    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: Any, ends_k: Any, *_: Any, **options: Any):
        assert torch.equal(ends_q, ends_k), "the trajectories of this bench share no prefix"
        settings = {"is_causal": True, "scale": options["softmax_scale"], "enable_gqa": True}
        pieces = zip(*(x.transpose(0, 1)[None].split(ends_q.diff().tolist(), 2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*piece, **settings) for piece in pieces], dim=2)[0].transpose(0, 1)

    async_grpo_trainer.get_peak_flops_per_device = lambda *_: 1.0  # asks for a GPU's name, for a figure in the log
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    utils._use_triton = lambda device: True  # only of the module that selects the positions, see above
    options = AsyncGRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", max_steps=1, dtype="float32",
        per_device_train_batch_size=len(group.trajectories),
    )  # fmt: skip
    worker = SimpleNamespace(rollout_buffer=Queue(), metrics_queue=Queue())
    trainer = AsyncGRPOTrainer(
        folder, args=options, train_dataset=Dataset.from_list([{"prompt": "a"}]), rollout_worker=worker,
        weight_transfer=SimpleNamespace(),
    )  # fmt: skip
    model = as_trained(trainer)
    row = packing.TreeRow()
    policy = Policy(load_config(SETTINGS), folder, Ranks())
    old = [policy.score(policy.scorer, grpo.pack([scored])) for scored in score_group(group)]
    for trajectory, advantage, logprobs_S in zip(group.trajectories, group.advantages, old, strict=True):
        known = np.zeros(len(trajectory.token_ids), np.float32)  # one update: old = new; this trainer must be told
        known[trajectory.sampled_mask] = logprobs_S
        arrays = {"input_ids": trajectory.token_ids, "completion_mask": trajectory.sampled_mask, "old_log_probs": known}
        tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
        row.add(tensors | {"advantage": advantage, "group_id": 0, "metrics": {}})
    inputs = async_grpo_trainer.DataCollatorForRollout(pad_token_id=0).torch_call([[row]])

    def run() -> float:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        return float(loss)

    return model, run


# --- measuring


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
        vocabulary, lengths = (CASES | SLOPE)[case]
        if case not in ready:
            ready = {case: globals()[name](f"{models}/{vocabulary}", make_group(vocabulary, lengths))}
            assert all(p.isfinite().all() for p in ready[case][0].parameters())  # pages the mapped weights in
        print(json.dumps(measure(*ready[case])), file=out, flush=True)


class Worker:
    """The other end of `work`. To measure memory, the C library must give back at once what was freed."""

    def __init__(self, python: str, name: str, models: str, memory: bool) -> None:
        command = [python, __file__, "--worker", name, models]
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if memory else {}
        self.name, self.log = name, open(f"{models}/{name}.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=models,
            env=os.environ | malloc,
        )  # fmt: skip

    def run(self, case: str) -> dict[str, float]:
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed at {case}:\n{Path(self.log.name).read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def peers_python(cache: Path) -> str:
    """The interpreter of the environment with TRL, which is made if it is not there."""
    folder = cache / TRL.replace("==", "-")
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        print(f"installing {TRL} into {folder} ...", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        shared = [f"{name}=={version(name)}" for name in SHARED]
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL, *shared], check=True)
        done.touch()
    return str(python)


def check_agreement(case: str, found: dict[str, dict[str, float]]) -> None:
    ours = found["ours"]
    for name, figures in found.items():
        for key in ("loss", "grad_norm"):
            if abs(figures[key] - ours[key]) > 1e-4 * ours["grad_norm"]:
                raise SystemExit(f"{case}: {key} is {figures[key]} for {name}, {ours[key]} for ours: not comparable")


def bench_memory(start: Callable[[str], Worker], names: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """The first call of every case for every contestant, and how our peak grows with the length of a sequence."""
    first: dict[str, dict[str, dict[str, float]]] = {case: {} for case in CASES}
    for name in names:
        with closing(start(name)) as worker:
            for case in CASES:
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
    print(f"line: {fixed * 1000:.0f} MB + {slope * 1e6:.1f} kB per token, off by at most {off:.1%} of the largest peak")
    return first, {"memory_kb_per_token": slope * 1e6, "memory_off_line": float(off)}


def bench_time(workers: dict[str, Worker], rounds: int, first: dict[str, Any]) -> dict[str, float]:
    """Rounds of one call of every contestant, and the table."""
    figures: dict[str, float] = {}
    print(f"\n{'batch':9}{'':14}{'CPU s':>8}{'x ours':>8}{'wall s':>8}{'peak GB':>9}{'loss':>12}{'grad norm':>11}")
    for case in CASES:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                found[name].append(worker.run(case))
        for name, runs in found.items():
            row = first[case][name] | {key: median(run[key] for run in runs) for key in ("cpu_s", "wall_s")}
            ratio = median(a["cpu_s"] / b["cpu_s"] for a, b in zip(runs, found["ours"], strict=True))
            times = f"{row['cpu_s']:8.2f}{ratio:8.2f}{row['wall_s']:8.2f}"
            checks = f"{row['peak_gb']:9.3f}{row['loss']:12.6f}{row['grad_norm']:11.6f}"
            print(f"{case:9}{PEERS.get(name, name):14}{times}{checks}", flush=True)
            figures[f"{name}_{case}_cpu_s"] = row["cpu_s"]
            figures[f"{'' if name == 'ours' else name + '_'}peak_extra_gb_{case}"] = row["peak_gb"]
            if name != "ours":
                figures[f"{name}_{case}"] = ratio
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        for vocabulary in {vocabulary for vocabulary, _ in CASES.values()}:
            save_model(Path(models) / str(vocabulary), vocabulary)
        names = ["ours", *(PEERS if args.peers else [])]
        first, slope = bench_memory(lambda name: Worker(python, name, models, memory=True), names)
        with ExitStack() as stack:
            workers = {name: stack.enter_context(closing(Worker(python, name, models, memory=False))) for name in names}
            figures |= slope | bench_time(workers, args.rounds, first)
    print(CAPTION)
    print(f"load of this machine: {figures['load']:.1f} before, {os.getloadavg()[0]:.1f} after, {figures['cpus']} CPUs")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
