"""policy.py against an independent float64 reference, over packings, chunk sizes, ranks, restarts and broken input.

Run by torchrun, this file is also the worker of the tests with several ranks (see `work_as_rank`).
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deepresearcher_min import policy as policy_module
from deepresearcher_min.config import Config, load_config
from deepresearcher_min.grpo import group_advantages
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Group, Question, Trajectory, deal

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {  # tied and untied head, as many key heads as query heads and fewer
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)),
}
ONE_RANK = Ranks(0, 1, torch.device("cpu"))
END = 60  # plays the end-of-turn token


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():  # far from uniform, so that every term of the loss matters
                parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def config(**changes: object) -> Config:
    """Exact arithmetic, plain gradient descent settings; the paper's loss with every term switched on."""
    values = {
        "dtype": "float64", "lr": 1.0, "lr_warmup": 0, "lr_decay": False, "max_grad_norm": 1e9, "group_size": 4,
        "updates_per_rollout": 1, "questions_per_step": 4, "kl_coef": 0.05, "entropy_coef": 0.01, "importance_cap": 1.1,
        "clip_low": 0.1, "clip_high": 0.15, "microbatch_tokens": 100, "logprob_chunk": 16,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return dataclasses.replace(load_config([]), **{**values, **changes})


def make_trajectory(question: Question, rng: np.random.Generator) -> Trajectory:
    """Prompt, then one to three sampled turns, each closed by the end token, with observations between them."""
    ids, mask = list(rng.integers(0, END, rng.integers(2, 9))), []
    mask += [False] * len(ids)
    for turn in range(rng.integers(1, 4)):
        for sampled, length in ((False, 0 if turn == 0 else rng.integers(1, 12)), (True, rng.integers(0, 9))):
            ids += list(rng.integers(0, END, length))
            mask += [sampled] * int(length)
        ids.append(END)
        mask.append(True)
    logprobs = np.where(mask, rng.normal(-3.5, 0.5, len(ids)), np.nan)
    return Trajectory(question, ids, mask, logprobs, (), "an answer", "answer")


def make_groups(questions: int = 5, size: int = 4, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(questions):
        question = Question(f"q{i}", "text", ("gold",))
        trajectories = [make_trajectory(question, rng) for _ in range(size)]
        rewards = rng.choice([-1.0, 0.0, 0.4, 1.0], size) if i != 1 else np.ones(size)  # question 1 is tied
        groups.append(Group(question, trajectories, rewards, group_advantages(rewards).tolist()))
    return groups


def make_policy(models: Path, name: str = "qwen2", ranks: Ranks = ONE_RANK, **changes: object) -> Policy:
    """A policy whose optimizer is plain gradient descent, so that a change of weights is a gradient."""
    policy = Policy(config(**changes), str(models / name), ranks)
    policy.optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    return policy


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_weights()}


def change(policy: Policy, groups: list[Group]) -> tuple[torch.Tensor, dict[str, float]]:
    """What update() subtracts from the weights, as one vector, and its metrics."""
    before = weights(policy)
    metrics = policy.update(groups)
    after = weights(policy)
    return torch.cat([(before[name] - after[name]).flatten() for name in before]), metrics


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the reference: one sequence at a time through the plain model, every logit kept, autograd for everything


def reference_logprobs(model, trajectory: Trajectory, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(trajectory.token_ids, dtype=torch.int64)
    logprobs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
    mask = torch.tensor(trajectory.sampled_mask)[1:]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0][mask], entropy[mask]


def reference_update(folder: Path, groups: list[Group], config: Config) -> tuple[torch.Tensor, dict[str, float]]:
    """The module docstring of grpo.py, typed in as directly as possible; returns what policy's `change` returns."""
    load = {"dtype": torch.float64, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **load)
    start = AutoModelForCausalLM.from_pretrained(folder, **load)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    rows = [[(t, a) for t, a in zip(g.trajectories, g.advantages, strict=True)] for g in groups]
    updates = config.updates_per_rollout
    cuts = [len(rows) * u // updates for u in range(updates + 1)]
    with torch.no_grad():
        old = [[reference_logprobs(model, t, config.temperature)[0] for t, _ in group] for group in rows]
        ref = [[reference_logprobs(start, t, config.temperature)[0] for t, _ in group] for group in rows]
    tokens = sums = 0
    for low, high in itertools.pairwise(cuts):
        losses, metrics = [], []
        for g in range(low, high):
            for i, (trajectory, advantage) in enumerate(rows[g]):
                new, entropy = reference_logprobs(model, trajectory, config.temperature)
                rollout = torch.tensor(trajectory.logprobs[trajectory.sampled_mask])
                rho = torch.exp(new - old[g][i])
                clipped = torch.clip(rho, 1 - config.clip_low, 1 + config.clip_high)
                weight = torch.exp(old[g][i] - rollout)
                capped = (weight > (config.importance_cap or torch.inf)).double()
                weight = torch.clip(weight, max=config.importance_cap) if config.importance_cap else 1.0
                d = ref[g][i] - new
                k3 = torch.clip(torch.exp(d) - d - 1, -10, 10)
                surrogate = torch.minimum(rho * advantage, clipped * advantage)
                losses.append(-(weight * surrogate - config.kl_coef * k3 + config.entropy_coef * entropy))
                held = (rho * advantage > clipped * advantage).double()
                mismatch = (old[g][i] - rollout).abs()
                metrics.append(torch.stack([losses[-1], k3, entropy, held, capped, mismatch]).detach())
        loss = torch.cat(losses)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        tokens += len(loss)
        sums = sums + torch.cat(metrics, dim=1).sum(1)
    moved = [(a - b).flatten() for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    names = ("loss", "kl", "entropy", "clip_fraction", "capped_fraction", "mismatch")
    return torch.cat(moved).detach(), dict(zip(names, (sums / tokens).tolist(), strict=True))


def check_against_reference(moved, metrics, expected, expected_metrics) -> None:
    assert relative(moved, expected) < 1e-6
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


# --- the gradient


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("microbatch_tokens", "logprob_chunk", "gradient_checkpointing"),
    [(1, 1, False), (1, 1000, False), (60, 7, True), (100_000, 13, False), (100_000, 1000, True)],
)
def test_gradient_equals_the_reference_for_any_packing(
    models, name, microbatch_tokens, logprob_chunk, gradient_checkpointing
):
    groups = make_groups()
    options = {"microbatch_tokens": microbatch_tokens, "logprob_chunk": logprob_chunk}
    policy = make_policy(models, name, **options, gradient_checkpointing=gradient_checkpointing, temperature=1.3)
    expected = reference_update(models / name, groups, policy.config)
    assert expected[0].norm() > 0.01
    check_against_reference(*change(policy, groups), *expected)


@pytest.mark.quick
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_several_updates_use_the_logprobs_before_the_first(models, updates):
    groups = make_groups(6)
    policy = make_policy(models, updates_per_rollout=updates, lr=0.3)
    expected = reference_update(models / "qwen2", groups, policy.config)
    moved, metrics = change(policy, groups)
    check_against_reference(moved, metrics, *expected)
    assert metrics["updates"] == updates
    assert (metrics["clip_fraction"] > 0.02) == (updates > 1)  # the first update cannot clip, later ones do here


@pytest.mark.quick
def test_float32_gradient_is_close_to_float64(models):
    groups = make_groups()
    expected, _ = reference_update(models / "qwen2", groups, config())
    moved, _ = change(make_policy(models, dtype="float32"), groups)
    assert relative(moved.double(), expected) < 1e-4


@pytest.mark.quick
def test_order_of_trajectories_and_junk_behind_the_last_sampled_token_do_not_matter(models):
    groups = make_groups()
    expected, _ = change(make_policy(models), groups)
    shuffled = []
    for group in reversed(groups):
        order = np.random.default_rng(0).permutation(len(group.trajectories))
        junk = [dataclasses.replace(
            t, token_ids=np.append(t.token_ids, [5, 7]), sampled_mask=np.append(t.sampled_mask, [False, False]),
            logprobs=np.append(t.logprobs, [np.nan, np.nan]),
        ) for t in group.trajectories]  # fmt: skip
        shuffled.append(
            Group(group.question, *([x[i] for i in order] for x in (junk, group.rewards, group.advantages)))
        )
    moved, _ = change(make_policy(models), shuffled)
    assert relative(moved, expected) < 1e-10


@pytest.mark.quick
def test_the_end_of_turn_token_is_trained(models):
    question, mask = Question("q", "text", ("gold",)), [False, False, False, True]
    one = Trajectory(question, [1, 2, 3, END], mask, np.where(mask, -1.0, np.nan), (), "x", "answer")
    policy = make_policy(models, lr=0.1, kl_coef=0.0, entropy_coef=0.0)
    before = policy.logprobs([one], 1.0)[0]
    metrics = policy.update([Group(question, [one], [1.0], [1.0])])
    assert metrics["trained_tokens"] == 1
    assert policy.logprobs([one], 1.0)[0] > before + 0.01


@pytest.mark.quick
def test_equal_rewards_change_nothing_and_stay_in_n(models):
    groups = make_groups(3)
    tied = [Group(g.question, g.trajectories, [0.5] * 4, group_advantages([0.5] * 4).tolist()) for g in groups]
    options = {"kl_coef": 0.0, "entropy_coef": 0.0}
    moved, metrics = change(make_policy(models, **options), tied)
    assert moved.eq(0).all()
    assert metrics["grad_norm"] == 0
    # Next to a group that is trained, their tokens still count.
    mixed = [groups[0], *tied[1:]]
    policy = make_policy(models, **options)
    expected, expected_metrics = reference_update(models / "qwen2", mixed, policy.config)
    moved, metrics = change(policy, mixed)
    assert relative(moved, expected) < 1e-6
    assert metrics["loss"] == pytest.approx(expected_metrics["loss"])
    assert metrics["trained_tokens"] == sum(t.num_sampled for g in mixed for t in g.trajectories)
    # With a KL term they are trained, as soon as the policy has left the start model.
    policy = make_policy(models)
    policy.update(groups)
    moved, _ = change(policy, tied)
    assert moved.norm() > 0


@pytest.mark.quick
def test_no_reference_model_and_no_extra_pass_without_kl(models, monkeypatch):
    passes = []
    forward = policy_module.TokenScorer.forward
    monkeypatch.setattr(
        policy_module.TokenScorer, "forward", lambda self, *args: (passes.append(self), forward(self, *args))[1]
    )
    policy = make_policy(models, kl_coef=0.0, microbatch_tokens=10**6)
    assert policy.reference is None
    policy.update(make_groups())
    assert len(passes) == 1
    policy = make_policy(models, microbatch_tokens=10**6)
    metrics = policy.update(make_groups())
    assert len(passes) == 3
    assert metrics["kl"] == 0  # the first step: the policy is the start model, exactly


@pytest.mark.quick
def test_no_attention_mask_is_built(models):
    masks = []
    policy = make_policy(models)
    for layer in policy.model.base_model.layers:
        layer.register_forward_pre_hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    policy.update(make_groups())
    assert masks
    assert all(mask is None for mask in masks)


# --- learning


@pytest.mark.quick
def test_one_step_makes_a_rewarded_trajectory_likelier_and_its_rival_unlikelier(models):
    group = make_groups(1, 2)[0]
    group = Group(group.question, group.trajectories, [1.0, 0.0], group_advantages([1.0, 0.0]).tolist())
    policy = Policy(config(lr=1e-3, dtype="float32", importance_cap=0.0), str(models / "qwen2"), ONE_RANK)
    before = [values.sum() for values in policy.logprobs(group.trajectories, 1.0)]
    policy.update([group])
    after = [values.sum() for values in policy.logprobs(group.trajectories, 1.0)]
    assert after[0] > before[0] + 0.01
    assert after[1] < before[1] - 0.01


@pytest.mark.quick
def test_clipping_and_warmup_bound_the_step(models):
    groups = make_groups()
    free, metrics = change(make_policy(models), groups)
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()))
    clipped, metrics = change(make_policy(models, max_grad_norm=0.01), groups)
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()))
    policy = make_policy(models, max_grad_norm=0.01, lr_warmup=4, lr=0.5)
    steps = [change(policy, groups) for _ in range(6)]
    assert [m["lr"] for _, m in steps] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert [float(moved.norm()) for moved, _ in steps] == pytest.approx([0.01 * m["lr"] for _, m in steps], rel=1e-2)


@pytest.mark.quick
def test_the_learning_rate_decays_to_zero_over_the_steps(models):
    policy = make_policy(models, lr=0.5, lr_warmup=2, lr_decay=True, steps=4)
    rates = [policy.update(make_groups(2))["lr"] for _ in range(5)]
    assert rates == pytest.approx([0.25, 0.375, 0.25, 0.125, 0.0])  # warm-up 1/2, 1 times decay 4/4, 3/4, 2/4, 1/4, 0


@pytest.mark.quick
def test_inputs_stay_as_they_were(models):
    groups = make_groups()
    before = json.dumps([[t.to_json() for t in g.trajectories] + [list(g.rewards), g.advantages] for g in groups])
    make_policy(models, updates_per_rollout=2).update(groups)
    after = json.dumps([[t.to_json() for t in g.trajectories] + [list(g.rewards), g.advantages] for g in groups])
    assert after == before


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_the_plain_model_at_any_temperature(models, name):
    trajectories = [t for g in make_groups(2) for t in g.trajectories]
    policy = make_policy(models, name, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64)
    for temperature in (1.0, 0.6):
        for trajectory, values in zip(trajectories, policy.logprobs(trajectories, temperature), strict=True):
            expected, _ = reference_logprobs(plain, trajectory, temperature)
            np.testing.assert_allclose(values, expected.detach().numpy(), atol=2e-5)


# --- what must stop the run


@pytest.mark.quick
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rewards_stop_before_the_weights_move(models, bad):
    groups = make_groups()
    rewards = [0.0, bad, 0.0, 1.0]
    groups[2] = Group(groups[2].question, groups[2].trajectories, rewards, [0.0, 1.0, 0.0, 0.0])
    policy = make_policy(models)
    before = weights(policy)
    with pytest.raises(FloatingPointError, match="'q2', trajectory 1: reward"):
        policy.update(groups)
    assert all(before[name].equal(tensor) for name, tensor in weights(policy).items())


def spoil(policy: Policy, token: int, backward: bool, bad: float = float("nan")) -> None:
    """Make the model return nan or infinity for one token id, going forward or only in the gradient."""

    def forward_hook(module, inputs, output):
        hit = (inputs[0] == token)[..., None]
        if backward and output.requires_grad:
            output.register_hook(lambda gradient: gradient.masked_fill(hit, bad))
        return output if backward else output.masked_fill(hit, bad)

    policy.model.get_input_embeddings().register_forward_hook(forward_hook)


@pytest.mark.quick
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("backward", "what"), [(False, "log-probability nan"), (True, "gradient norm (nan|inf)")])
def test_bad_logprobs_and_gradients_name_their_trajectory(models, backward, what, bad, updates):
    groups = make_groups()
    victim = groups[1 if updates == 2 else 3]
    ids = victim.trajectories[2].token_ids.copy()
    ids[0] = 59
    groups = [
        Group(g.question, [dataclasses.replace(t, token_ids=np.where(t.token_ids == 59, 58, t.token_ids))
                           for t in g.trajectories], g.rewards, g.advantages)
        for g in groups
    ]  # fmt: skip
    index = groups.index(next(g for g in groups if g.question == victim.question))
    broken = list(groups[index].trajectories)
    broken[2] = dataclasses.replace(broken[2], token_ids=ids)
    groups[index] = Group(victim.question, broken, groups[index].rewards, groups[index].advantages)
    policy = make_policy(models, updates_per_rollout=updates)
    spoil(policy, 59, backward, bad)
    before = weights(policy)
    with pytest.raises(FloatingPointError, match=what) as caught:
        policy.update(groups)
    assert f"question {victim.question.id!r}, trajectory 2" in str(caught.value)
    assert all(before[name].equal(tensor) for name, tensor in weights(policy).items())


@pytest.mark.quick
def test_offload_needs_several_ranks(models):
    with pytest.raises(ValueError, match="offload_optimizer"):
        make_policy(models, offload_optimizer=True)


@pytest.mark.quick
def test_nothing_to_train_is_no_step(models):
    moved, metrics = change(make_policy(models), [])
    assert moved.eq(0).all()
    assert (metrics["updates"], metrics["trained_tokens"], metrics["loss"]) == (0, 0, 0)


# --- saving


def adam_policy(models: Path, ranks: Ranks = ONE_RANK) -> Policy:
    changes = {"lr": 1e-2, "lr_warmup": 3, "dtype": "float32", "updates_per_rollout": 2, "max_grad_norm": 1.0}
    return Policy(config(**changes), str(models / "qwen2"), ranks)


@pytest.mark.quick
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_loaded_policy_continues_bit_for_bit(models, tmp_path, steps_before):
    groups = [make_groups(4, seed=seed) for seed in range(4)]
    policy = adam_policy(models)
    for step in range(steps_before):
        policy.update(groups[step])
    policy.save(tmp_path / "state")
    loaded, plain = adam_policy(models), adam_policy(models)
    loaded.load(tmp_path / "state")
    for step in range(steps_before):
        plain.update(groups[step])  # never saved: saving must not change the run either
    for step in range(steps_before, 4):
        assert loaded.update(groups[step]) == policy.update(groups[step]) == plain.update(groups[step])
    for (name, tensor), other, third in zip(
        weights(policy).items(), weights(loaded).values(), weights(plain).values(), strict=True
    ):
        assert tensor.equal(other), name
        assert tensor.equal(third), name


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_loads_as_a_plain_model(models, tmp_path, name, dtype):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    policy = make_policy(models, name, dtype=dtype, lr=0.1)
    policy.update(make_groups())
    policy.export(tmp_path / "out", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == getattr(torch, dtype)
    assert plain.config._attn_implementation != "packed"
    exported = dict(plain.named_parameters())
    assert exported.keys() == weights(policy).keys()
    for key, tensor in weights(policy).items():
        assert tensor.equal(exported[key]), key
    start = dict(AutoModelForCausalLM.from_pretrained(models / name).named_parameters())
    assert any(not tensor.to(start[key].dtype).equal(start[key]) for key, tensor in exported.items())
    assert (tmp_path / "out/tokenizer.json").exists()


# --- several ranks


def work_as_rank(models: Path, out: Path, shares: str) -> None:
    """One rank of the tests below: update on a share of the questions, and load and save together."""
    ranks = Ranks.start()
    rank, world_size = ranks.rank, ranks.world_size
    groups, counts = make_groups(), json.loads(shares)
    policy = make_policy(models, "llama", ranks)
    if counts == "nan on the last rank":
        if rank == world_size - 1:
            spoil(policy, END, backward=False)
        policy.update(deal(groups, rank, world_size))
    start = sum(counts[:rank])
    moved, metrics = change(policy, groups[start : start + counts[rank]])
    options = {"updates_per_rollout": 2, "lr": 0.3, "gradient_checkpointing": True, "offload_optimizer": world_size > 1}
    policy = make_policy(models, "llama", ranks, **options)
    dealt, _ = change(policy, deal(groups, rank, world_size))
    policy = adam_policy(models, ranks)
    policy.load(out / "state1")
    loaded = weights(policy)
    policy.save(out / "again")
    whole: list[weakref.ref] = []  # the weights as the engine gets them, gathered: never two at once
    for _, tensor in policy.named_weights():
        whole.append(weakref.ref(tensor))
        assert sum(each() is not None for each in whole) == 1
    if rank == 0:
        torch.save({"moved": moved, "metrics": metrics, "dealt": dealt, "loaded": loaded}, out / "result.pt")
    ranks.stop()


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launcher, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[5], [3, 2], [0, 5], [1, 0, 4], [2, 2, 1]])
def test_gradient_and_checkpoints_do_not_depend_on_the_ranks(models, tmp_path, shares):
    groups = make_groups()
    single = adam_policy(models)
    single.update(groups)
    single.save(tmp_path / "state1")
    done = torchrun(len(shares), str(models), str(tmp_path), json.dumps(shares))
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    expected = reference_update(models / "llama", groups, config())
    check_against_reference(result["moved"], result["metrics"], *expected)
    two_updates, _ = reference_update(models / "llama", groups, config(updates_per_rollout=2, lr=0.3))
    assert relative(result["dealt"], two_updates) < 1e-6
    for name, tensor in weights(single).items():  # saved by one rank, loaded by several
        assert tensor.equal(result["loaded"][name]), name
    loaded = adam_policy(models)
    loaded.load(tmp_path / "again")  # saved by several, loaded by one
    assert loaded.update(groups) == single.update(groups)


@pytest.mark.slow
def test_a_rank_with_bad_numbers_ends_the_job_with_their_name(models, tmp_path):
    done = torchrun(2, str(models), str(tmp_path), json.dumps("nan on the last rank"))
    assert done.returncode != 0
    assert re.search(r"FloatingPointError: question 'q\d', trajectory \d: log-probability nan", done.stderr)


if __name__ == "__main__":
    work_as_rank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
