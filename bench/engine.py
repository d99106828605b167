"""HFEngine, measured beside the engine of an earlier commit: how fast 32 trajectories decode.

    python bench/engine.py [--json PATH] [--rounds N] [--before COMMIT] [--steps N]

Random weights of SmolLM2-135M's architecture, float32, one thread. 32 requests, four questions of
eight: a system prompt that all have in common, a question, and what each has seen and said so far.
Two measures, each in turn with the earlier engine's, which git takes out of its commit into a
temporary folder:

decode  only steps in which all 32 requests run and sample
turns   two turns of each trajectory with an observation between them, all computing included; once
apart   decode, but no two requests have a token in common; only with --only, two more minutes

Rates are tokens per CPU second, ratios medians over rounds of CPU seconds (before / ours). What
both sampled is compared, too: the log-probabilities of the tokens up to the first that differs.
Takes about four minutes on an idle core. The clone must have its history.
"""

import argparse
import dataclasses
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import torch

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "2747c0a"
GROUPS, GROUP = 4, 8
VOCABULARY, MAX_LEN = 49_152, 1024
SYSTEM, QUESTION = 400, 16  # tokens; the agent's own prompt has 431 in common with this tokenizer
OWN = (32, 96)  # tokens that a trajectory has seen and said so far
TURN, OBSERVATION = (16, 48), 80  # tokens of `turns`
SMOLLM2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
SIZES: dict[str, dict] = {"135M": {}, "tiny": {"num_hidden_layers": 2}}  # tiny: to try this script
KEYS = {"decode": "hf_decode", "turns": "hf_turns", "apart": "hf_decode_apart"}


def save_model(folder: str, size: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2 | SIZES[size])).save_pretrained(folder)


# --- in a process of its own, with the package of one commit


def draw_tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def make_prompts(apart: bool) -> dict[str, list[int]]:
    draw = random.Random(0)
    system = draw_tokens(draw, SYSTEM)
    prompts = {}
    for question in range(GROUPS):
        asked = draw_tokens(draw, QUESTION)
        for i in range(GROUP):
            if apart:
                system, asked = draw_tokens(draw, SYSTEM), draw_tokens(draw, QUESTION)
            prompts[f"{question}/{i}"] = system + asked + draw_tokens(draw, draw.randint(*OWN))
    return prompts


def decode(engine: Any, sampling: type, steps: int, apart: bool) -> dict[str, Any]:
    """CPU time of `steps` steps of 32 running requests, and their tokens' log-probabilities."""
    prompts = make_prompts(apart)
    most = steps + (24 if apart else 8)  # the first are let in some steps before the last
    for seed, (name, prompt) in enumerate(prompts.items()):
        engine.submit(name, prompt, sampling(1.0, most, seed, ()))
    while engine.waiting:
        assert not engine.step()
    engine.step()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        assert not engine.step()
    figures = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    done: dict[str, Any] = {}
    while engine.running:
        done |= engine.step()
    sampled = [[done[name].token_ids, done[name].logprobs] for name in prompts]
    return figures | {"tokens": steps * len(prompts), "sampled": sampled}


def turns(engine: Any, sampling: type) -> dict[str, Any]:
    """Two turns of each trajectory; the second follows the first at once, as in a rollout."""
    draw = random.Random(1)
    prompts = make_prompts(apart=False)
    lengths = {name: (draw.randint(*TURN), draw.randint(*TURN)) for name in prompts}
    seen = {name: draw_tokens(draw, OBSERVATION) for name in prompts}
    wall, cpu = time.perf_counter(), time.process_time()
    for seed, (name, prompt) in enumerate(prompts.items()):
        engine.submit(name, prompt, sampling(1.0, lengths[name][0], seed, ()))
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    while len(second) < len(prompts):
        for name, turn in engine.step().items():
            if name in first:
                second[name] = turn
                continue
            first[name] = turn
            ids = prompts[name] + turn.token_ids + seen[name]
            engine.submit(name, ids, sampling(1.0, lengths[name][1], 0, ()))
    figures = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    sampled = [
        [done[name].token_ids, done[name].logprobs] for done in (first, second) for name in prompts
    ]
    return figures | {"tokens": sum(map(sum, lengths.values())), "sampled": sampled}


def work(root: str, model: str) -> None:
    """A measure on each line in, its figures out."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries talk
    sys.path.insert(0, root)
    from deepresearcher_min.config import load_config
    from deepresearcher_min.engine import HFEngine, Sampling

    torch.set_num_threads(1)
    size = GROUPS * GROUP
    config = dataclasses.replace(
        load_config(["--preset=toy"]),
        max_model_len=MAX_LEN,
        max_in_flight=size,
        kv_tokens=size * MAX_LEN,
    )
    engine = HFEngine(config, model)
    for line in sys.stdin:
        name, steps = line.split()
        if name == "turns":
            engine.update_weights(engine.model.named_parameters())  # forgets all prefixes
            figures = turns(engine, Sampling)
        else:
            figures = decode(engine, Sampling, int(steps), name == "apart")
        print(json.dumps(figures), file=out, flush=True)


# --- the other end


class Worker:
    def __init__(self, name: str, root: Path, models: str) -> None:
        self.name, self.log = name, Path(models) / f"{name}.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(root), models],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=root,
        )

    def run(self, measure: str, steps: int) -> dict[str, Any]:
        print(measure, steps, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed at {measure}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def check_out(commit: str, folder: Path) -> Path:
    """The package as it was at a commit."""
    command = ["git", "archive", commit, "deepresearcher_min", "config.yaml", "prompts"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        reason = found.stderr.decode().strip()
        raise SystemExit(f"--before={commit}: {reason}; the bench needs a clone with its history")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def difference(ours: list, theirs: list) -> tuple[float, float]:
    """Share of turns whose tokens are the same, and the largest difference of log-probabilities up
    to the first token that is not [nats].
    """
    same, largest = 0, 0.0
    for (ids, logprobs), (other_ids, other) in zip(ours, theirs, strict=True):
        same += ids == other_ids
        for token, p, other_token, q in zip(ids, logprobs, other_ids, other, strict=True):
            if token != other_token:
                break
            largest = max(largest, abs(p - q))
    return same / len(ours), largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="measured steps of a decode")
    parser.add_argument("--before", default=BEFORE, help="commit of the other engine")
    parser.add_argument("--size", choices=SIZES, default="135M")
    parser.add_argument("--only", nargs="+", choices=KEYS, default=["decode", "turns"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    figures: dict[str, float] = {"load": os.getloadavg()[0], "cpus": os.cpu_count() or 0}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        roots = {"ours": ROOT, "before": check_out(args.before, Path(folder) / "before")}
        save_model(folder, args.size)
        workers = {
            name: stack.enter_context(Worker(name, root, folder)) for name, root in roots.items()
        }
        titles = ("tokens/s", "before", "ratio", "same", "logprobs")
        print(f"{'measure':8}" + "".join(f"{title:>10}" for title in titles))
        for measure in args.only:
            runs: dict[str, list] = {name: [] for name in workers}
            for _ in range(1 if measure == "turns" else args.rounds):
                for name, worker in workers.items():
                    runs[name].append(worker.run(measure, args.steps))
            rate = {
                name: median(run["tokens"] / run["cpu_s"] for run in found)
                for name, found in runs.items()
            }
            pairs = list(zip(runs["before"], runs["ours"], strict=True))
            ratio = median(before["cpu_s"] / ours["cpu_s"] for before, ours in pairs)
            same, off = difference(runs["ours"][0]["sampled"], runs["before"][0]["sampled"])
            print(
                f"{measure:8}{rate['ours']:10.1f}{rate['before']:10.1f}{ratio:10.2f}{same:10.2f}"
                f"{off:10.1e}",
                flush=True,
            )
            key = KEYS[measure]
            figures |= {f"{key}_{GROUPS * GROUP}": rate["ours"], f"{key}_vs_before": ratio}
            figures |= {f"{key}_same_turns": same, f"{key}_logprobs_off": off}
    print(
        f"tokens per CPU second, one thread; load of this machine: {figures['load']:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after, {figures['cpus']} CPUs"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
