"""What the tests of policy.py share: small models, trajectories, policies, and an independent
float64 reference.
"""

import copy
import dataclasses
import functools
import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deepresearcher_min.config import Config, load_config
from deepresearcher_min.grpo import group_advantages, pack
from deepresearcher_min.policy import Policy, training_rows
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Group, Question, Trajectory

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {  # tied and untied head, as many key heads as query heads and fewer
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    ),
}
END = 60  # plays the end-of-turn token


def save_models(folder: Path) -> Path:
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # far from uniform, so that every term of the loss matters
                parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(
                    0.1 * torch.randn_like(parameter)
                )
        model.save_pretrained(folder / name)
    return folder


def config(**changes: object) -> Config:
    """Exact arithmetic, plain gradient descent settings; the paper's loss with every term switched
    on.
    """
    values = {
        "dtype": "float64",
        "lr": 1.0,
        "lr_warmup": 0,
        "lr_decay": False,
        "max_grad_norm": 1e9,
        "group_size": 4,
        "updates_per_rollout": 1,
        "questions_per_step": 4,
        "kl_coef": 0.05,
        "entropy_coef": 0.01,
        "importance_cap": 1.1,
        "clip_low": 0.1,
        "clip_high": 0.15,
        "microbatch_tokens": 100,
        "logprob_chunk": 16,
        "gradient_checkpointing": False,
    }
    return dataclasses.replace(load_config([]), **{**values, **changes})


def make_trajectory(question: Question, rng: np.random.Generator) -> Trajectory:
    """Prompt, then one to three sampled turns, each closed by the end token, with observations
    between them.
    """
    ids, mask = list(rng.integers(0, END, rng.integers(2, 9))), []
    mask += [False] * len(ids)
    for turn in range(rng.integers(1, 4)):
        for sampled, length in (
            (False, 0 if turn == 0 else rng.integers(1, 12)),
            (True, rng.integers(0, 9)),
        ):
            ids += list(rng.integers(0, END, length))
            mask += [sampled] * int(length)
        ids.append(END)
        mask.append(True)
    logprobs = np.where(mask, rng.normal(-3.5, 0.5, len(ids)), np.nan)
    return Trajectory(question, ids, mask, logprobs, (), "an answer", "answer")


def branch(other: Trajectory, rng: np.random.Generator, shared: int) -> Trajectory:
    """A trajectory that begins like another one, sampled tokens included; the engine reported them
    as it liked.
    """
    rest = make_trajectory(other.question, rng)
    ids, mask = (
        np.append(a[:shared], b)
        for a, b in ((other.token_ids, rest.token_ids), (other.sampled_mask, rest.sampled_mask))
    )
    logprobs = np.where(mask, rng.normal(-3.5, 0.5, len(ids)), np.nan)
    return dataclasses.replace(rest, token_ids=ids, sampled_mask=mask, logprobs=logprobs)


def make_groups(questions: int = 5, size: int = 4, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(questions):
        question = Question(f"q{i}", "text", ("gold",))
        trajectories = [make_trajectory(question, rng)]
        # A common prompt, or more; those of question 2 have nothing in common.
        while len(trajectories) < size:
            shared = 0 if i == 2 else max(2, rng.integers(0, len(trajectories[-1].token_ids) + 1))
            trajectories.append(branch(trajectories[-1], rng, shared))
        # Question 1 is tied.
        rewards = rng.choice([-1.0, 0.0, 0.4, 1.0], size) if i != 1 else np.ones(size)
        groups.append(Group(question, trajectories, rewards, group_advantages(rewards).tolist()))
    return groups


def make_policy(
    models: Path, name: str = "qwen2", ranks: Ranks = Ranks(), **changes: object
) -> Policy:
    """A policy whose optimizer is plain gradient descent, so that a change of weights is a
    gradient.
    """
    policy = Policy(config(**changes), str(models / name), ranks)
    policy.optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    return policy


def adam_policy(models: Path, ranks: Ranks = Ranks(), **others: object) -> Policy:
    changes = {
        "lr": 1e-2,
        "lr_warmup": 3,
        "dtype": "float32",
        "updates_per_rollout": 2,
        "max_grad_norm": 1.0,
        **others,
    }
    return Policy(config(**changes), str(models / "qwen2"), ranks)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_weights()}


def logprobs(policy: Policy, trajectories: list[Trajectory]) -> list[np.ndarray]:
    """Log-probabilities of each trajectory's sampled tokens, as the update computes them."""
    nothing = [0.0] * len(trajectories)
    rows = training_rows(Group(trajectories[0].question, trajectories, nothing, nothing))
    return [policy.score(policy.scorer, pack([row])).float().numpy() for row in rows]


def change(policy: Policy, groups: list[Group]) -> tuple[torch.Tensor, dict[str, float]]:
    """What update() subtracts from the weights, as one vector, and its metrics."""
    before = weights(policy)
    metrics = policy.update(groups)
    after = weights(policy)
    return torch.cat([(before[name] - after[name]).flatten() for name in before]), metrics


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def spoil(policy: Policy, token: int, backward: bool, bad: float = float("nan")) -> None:
    """Make the model return nan or infinity for one token id, going forward or only in the
    gradient.
    """

    def forward_hook(module, inputs, output):
        hit = (inputs[0] == token)[..., None]
        if backward and output.requires_grad:
            output.register_hook(lambda gradient: gradient.masked_fill(hit, bad))
        return output if backward else output.masked_fill(hit, bad)

    policy.model.get_input_embeddings().register_forward_hook(forward_hook)


def overwrite_parameters(module, fn, recurse: bool = True):
    """In place of Module._apply, which cannot move or cast fake parameters."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(fn(p.detach()), requires_grad=p.requires_grad))
    return module


# --- the reference: one sequence at a time through the plain model, every logit kept, autograd for
# everything


def reference_logprobs(
    model, trajectory: Trajectory, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(trajectory.token_ids, dtype=torch.int64)
    logprobs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
    mask = torch.tensor(trajectory.sampled_mask)[1:]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0][mask], entropy[mask]


def reference_kept(ratios: torch.Tensor, limit: float) -> float:
    """1 for a trajectory that sequence_mask keeps, from its tokens' ratios policy / engine."""
    geometric_mean = math.prod(ratios.tolist()) ** (1 / len(ratios))
    return float(not limit or 1 / limit <= geometric_mean <= limit)


@functools.cache
def reference_model(folder: Path):
    """As it is in the folder; nobody may change it."""
    load = {"dtype": torch.float64, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **load)


def reference_update(
    folder: Path, groups: list[Group], config: Config
) -> tuple[torch.Tensor, dict[str, float]]:
    """The module docstring of grpo.py, typed in as directly as possible; returns what policy's
    `change` returns.
    """
    start = reference_model(folder)
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    rows = [[(t, a) for t, a in zip(g.trajectories, g.advantages, strict=True)] for g in groups]
    updates = config.updates_per_rollout
    cuts = [len(rows) * u // updates for u in range(updates + 1)]
    with torch.no_grad():
        old, ref = (
            [[reference_logprobs(m, t, config.temperature)[0] for t, _ in group] for group in rows]
            for m in (model, start)
        )
    tokens, sums, largest = 0, torch.zeros(()), 0.0
    good: list[float] = []
    for low, high in itertools.pairwise(cuts):
        losses, metrics = [], []
        for g in range(low, high):
            for i, (trajectory, advantage) in enumerate(rows[g]):
                new, entropy = reference_logprobs(model, trajectory, config.temperature)
                rollout = torch.tensor(trajectory.logprobs[trajectory.sampled_mask])
                rho = torch.exp(new - old[g][i])
                clipped = torch.clip(rho, 1 - config.clip_low, 1 + config.clip_high)
                weight = torch.exp(old[g][i] - rollout)
                kept = reference_kept(weight, config.sequence_mask)
                capped = (weight > (config.importance_cap or torch.inf)).double()
                weight = (
                    torch.clip(weight, max=config.importance_cap) if config.importance_cap else 1.0
                )
                d = ref[g][i] - new
                k3 = torch.clip(torch.exp(d) - d - 1, -10, 10)
                surrogate = torch.minimum(rho * advantage, clipped * advantage)
                losses.append(
                    -kept
                    * (weight * surrogate - config.kl_coef * k3 + config.entropy_coef * entropy)
                )
                held = (rho * advantage > clipped * advantage).double()
                mismatch = (old[g][i] - rollout).abs()
                rare = ((new.exp() < 1e-4) | (rollout.exp() < 1e-4)).double()
                masked = torch.full_like(new, 1 - kept)
                values = [losses[-1], k3, entropy, held, capped, mismatch, rare, masked]
                metrics.append(torch.stack(values).detach())
                good += new.tolist() if advantage > 0 else []
                largest = max(largest, math.prod(torch.exp(old[g][i] - rollout).tolist()))
        loss = torch.cat(losses)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        tokens += len(loss)
        sums = sums + torch.cat(metrics, dim=1).sum(1)
    moved = [(a - b).flatten() for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    names = "loss kl entropy clip_fraction capped_fraction mismatch rare_share masked"
    means = dict(zip(names.split(), (sums / tokens).tolist(), strict=True))
    means |= {"logprob_good": statistics.mean(good), "weight_max": min(largest, math.exp(20))}
    return torch.cat(moved).detach(), means


def check_against_reference(moved, metrics, expected, expected_metrics) -> None:
    assert relative(moved, expected) < 1e-6
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
