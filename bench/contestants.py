"""Who bench/update.py measures, and on what: fixed batches, a tiny model, and four ways to compute
the same gradient.

ours           Policy.backward on the micro-batches that Policy.plan made
ours, apart    the same, with a shared prompt computed in every trajectory
GRPOTrainer    as it runs here: padded, the head at every position
GRPO compact   the same with the head at completion tokens only, as on a GPU; the switch is patched
               for this bench
AsyncGRPO      packed, prefixes shared, the head at trained tokens only; its GPU attention is
               replaced by ours
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deepresearcher_min import grpo
from deepresearcher_min.config import load_config
from deepresearcher_min.policy import Policy, training_rows
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Group, Question, Trajectory

PROMPT = 40  # tokens of a prompt
SETTINGS = [
    "--preset=wiki",
    "--temperature=1",
    "--kl_coef=0",
    "--importance_cap=0",
    "--gradient_checkpointing=true",
    "--microbatch_tokens=8192",
]


# --- the batches


def make_group(vocabulary: int, lengths: Sequence[int], shared: int = 0) -> Group:
    """Trajectories of the given lengths with about 15 % sampled tokens: a prompt, then turns of 18
    tokens.

    shared: tokens of the prompt that all have in common; 0: PROMPT tokens, in which they differ.
    """
    rng, question = np.random.default_rng(0), Question("q", "text", ("gold",))
    trajectories, prompt = [], rng.integers(1, vocabulary, shared)
    for length in lengths:
        mask = np.zeros(length, bool)
        starts = np.linspace(
            shared or PROMPT, length - 18, max(1, round(0.15 * length / 18))
        ).astype(int)
        for start in starts:
            mask[start : start + 18] = True
        logprobs = np.where(mask, -math.log(vocabulary), np.nan)
        ids = rng.integers(1, vocabulary, length)
        ids[:shared] = prompt
        trajectories.append(Trajectory(question, ids, mask, logprobs, (), "gold", "answer"))
    rewards = rng.random(len(lengths)) if len(lengths) > 1 else np.ones(1)
    advantages = grpo.group_advantages(rewards).tolist() if len(lengths) > 1 else [1.0]
    return Group(question, trajectories, rewards, advantages)


def save_model(folder: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "max_position_embeddings": 8192,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **sizes, **heads)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, "a"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
    ).save_pretrained(folder)


# --- the contestants: a model and a function that adds its gradient and returns the loss

Contestant = tuple[torch.nn.Module, Callable[[], float]]


def ours(folder: str, group: Group, apart: bool = False) -> Contestant:
    policy = Policy(load_config(SETTINGS), folder, Ranks())
    rows = training_rows(group)
    if apart:
        rows = [replace(row, group=None) for row in rows]
    total, plan = sum(t.sampled_mask.sum() for t in group.trajectories), policy.plan(rows)

    def run() -> float:
        sums: Counter[str] = Counter()
        for batch in plan:
            sums.update(policy.backward(batch, total))
        return float(sums["loss"]) / total

    return policy.model, run


def ours_apart(folder: str, group: Group) -> Contestant:
    return ours(folder, group, apart=True)


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
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=count,
        num_generations=count,
        loss_type="bnpo",
        beta=0.0,
        model_init_kwargs={"dtype": "float32"},
    )
    prompts = Dataset.from_list([{"prompt": "a"}] * count)
    trainer = GRPOTrainer(
        folder, lambda completions, **_: [0.0] * len(completions), options, prompts
    )
    model = as_trained(trainer)

    def padded(rows: list[np.ndarray]) -> torch.Tensor:  # on the right
        return torch.nn.utils.rnn.pad_sequence(
            [torch.as_tensor(row, dtype=torch.int64) for row in rows], True
        )

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
        # The backward of the head asks for the device, too, and must find no Triton: only the
        # selection is switched.
        utils._use_triton = lambda device: compact
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        return float(loss)

    return model, run


def trl_grpo_compact(folder: str, group: Group) -> Contestant:
    return trl_grpo(folder, group, compact=True)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    *_: Any,
    **options: Any,
) -> torch.Tensor:
    """Causal attention within packed pieces [tokens, heads, size], in place of FlashAttention's."""

    def pieces(x: torch.Tensor, ends: torch.Tensor) -> Sequence[torch.Tensor]:
        return x.transpose(0, 1)[None].split(ends.diff().tolist(), 2)

    done = []
    for piece in zip(pieces(q, ends_q), pieces(k, ends_k), pieces(v, ends_k), strict=True):
        settings = {"scale": options["softmax_scale"], "enable_gqa": True}
        new, past = piece[0].shape[2], piece[1].shape[2]
        bias = None if new == past else causal_lower_right(new, past)
        done.append(sdpa(*piece, bias, is_causal=bias is None, **settings))
    return torch.cat(done, dim=2)[0].transpose(0, 1)


def tree_row(folder: str, group: Group) -> Any:
    """The group as AsyncGRPO gets it. With one update old = new, and this trainer must be told."""
    from trl.experimental.async_grpo import packing

    row = packing.TreeRow()
    policy = Policy(load_config(SETTINGS), folder, Ranks())
    old = [policy.score(policy.scorer, grpo.pack([scored])) for scored in training_rows(group)]
    members = zip(group.trajectories, group.advantages, old, strict=True)
    for trajectory, advantage, logprobs_S in members:
        known = np.zeros(len(trajectory.token_ids), np.float32)
        known[trajectory.sampled_mask] = logprobs_S
        arrays = {
            "input_ids": trajectory.token_ids,
            "completion_mask": trajectory.sampled_mask,
            "old_log_probs": known,
        }
        tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
        row.add(tensors | {"advantage": advantage, "group_id": 0, "metrics": {}})
    return row


def trl_async(folder: str, group: Group) -> Contestant:
    from queue import Queue
    from types import SimpleNamespace

    from datasets import Dataset
    from trl.experimental.async_grpo import (
        AsyncGRPOConfig,
        AsyncGRPOTrainer,
        async_grpo_trainer,
        packing,
    )
    from trl.trainer import utils

    # It asks for a GPU's name, for a figure in the log.
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: 1.0
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    # Only of the module that selects the positions, see above.
    utils._use_triton = lambda device: True
    options = AsyncGRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=1,
        dtype="float32",
        per_device_train_batch_size=len(group.trajectories),
    )
    worker = SimpleNamespace(rollout_buffer=Queue(), metrics_queue=Queue())
    trainer = AsyncGRPOTrainer(
        folder,
        args=options,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        rollout_worker=worker,
        weight_transfer=SimpleNamespace(),
    )
    model = as_trained(trainer)
    collator = async_grpo_trainer.DataCollatorForRollout(pad_token_id=0)
    inputs = collator.torch_call([[tree_row(folder, group)]])

    def run() -> float:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        return float(loss)

    return model, run
