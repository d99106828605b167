"""The signs of a collapse, metrics.jsonl's logprob_good, rare_share and weight_max, and the guard
sequence_mask. Over packings, updates and ranks they are compared with the reference of policies.py,
as all metrics are.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from policies import (
    change,
    check_against_reference,
    config,
    logprobs,
    make_groups,
    make_policy,
    reference_kept,
    reference_update,
    relative,
)

from deepresearcher_min import policy as policy_module
from deepresearcher_min.config import ConfigError, load_config
from deepresearcher_min.grpo import TrainingRow, kept, pack, sequence_log_weights, token_losses
from deepresearcher_min.trajectory import Group


def row(advantage: float, *rollout: float) -> TrainingRow:
    """A prompt of one token, then one sampled token for each log-probability of the engine."""
    sampled = np.arange(1, len(rollout) + 1)
    return TrainingRow("t", np.arange(len(rollout) + 1), sampled, np.array(rollout), advantage)


def known_as(old_S, batch):
    """The batch with these log-probabilities from before the first update."""
    return dataclasses.replace(batch, old_S=old_S)


@pytest.mark.quick
def test_signs_of_a_collapse_worked_by_hand():
    rows = [row(1.0, -1.0, -2.0), row(-0.5, -1.0, -9.0, -1.0), row(0.25, -10.0)]
    batch = pack(rows)
    new = torch.tensor([-1.5, -2.5, -9.5, -9.0, -2.0, -4.0])
    known = (batch.rollout_S, None, batch.advantages_S)
    _, found = token_losses(new, new, *known, torch.zeros(6), clip_low=0.2, clip_high=0.2)
    # ln 1e-4 is -9.21: below it is the policy once (-9.5) and the engine once (-10).
    assert (found["rare_share"], found["good_tokens"]) == (2, 3)
    assert found["logprob_good"] == -1.5 - 2.5 - 4.0  # the second row was punished
    assert sequence_log_weights(known_as(new, batch)).tolist() == [-0.5 - 0.5, -8.5 + 0 - 1, 6]
    assert sequence_log_weights(known_as(torch.zeros(0), pack([]))).tolist() == []


@pytest.mark.quick
def test_signs_of_a_collapse_at_their_edges(models):
    group = make_groups(1, 2)[0]
    far = [dataclasses.replace(t, logprobs=t.logprobs - 500) for t in group.trajectories]
    policy = make_policy(models, kl_coef=0.0, entropy_coef=0.0, dtype="float32")
    metrics = policy.update([Group(group.question, far, [1.0, 0.0], [1.0, -1.0])])
    assert metrics["weight_max"] == math.exp(20)  # no overflow: more is not told apart
    assert metrics["rare_share"] == 1  # for the engine
    # Imitation: the loss is -advantage whatever the model knows, logprob_good is what it knows.
    twice = Group(group.question, group.trajectories, [1.0, 1.0], [1.0, 1.0])
    known = np.concatenate(logprobs(policy, group.trajectories)).mean()
    metrics = policy.update([twice])
    assert metrics["logprob_good"] == pytest.approx(known, rel=1e-5)
    # No advantage is positive: nothing to average, and null in metrics.jsonl; 0 would be certainty.
    punished = Group(group.question, group.trajectories, [1.0, 1.0], [-1.0, -1.0])
    assert math.isnan(policy.update([punished])["logprob_good"])
    assert policy.update([])["weight_max"] == 0


# --- sequence_mask


@pytest.mark.quick
def test_what_sequence_mask_leaves_out_worked_by_hand():
    log2 = math.log(2)
    rows = [
        row(1.0, -3 * log2, -3 * log2),  # ratios 4 and 1: geometric mean 2
        row(1.0, -5 * log2, -log2, -log2),  # 8, 1/2, 1/2: mean 2^(1/3) = 1.26; the tokens differ
        row(1.0, -log2),  # 1/2: its inverse is 2
    ]
    batch = pack(rows)
    policy = -log2 * torch.tensor([1, 3, 2, 2, 2, 2], dtype=torch.float64)
    batch.old_S = policy
    assert kept(batch, 2.01).tolist() == [1] * 6
    assert kept(batch, 1.99).tolist() == [0, 0, 1, 1, 1, 0]
    assert kept(batch, 1.25).tolist() == [0] * 6
    assert kept(known_as(torch.zeros(0), pack([])), 1.5).tolist() == []


@pytest.mark.quick
@pytest.mark.parametrize("length", [1, 100, 10_000])
def test_length_alone_masks_nothing(length):
    """Every token 1 % likelier than the engine said: the product is 1.01, 2.7 or 1.6e43."""
    batch = pack([row(1.0, *[-1.0] * length)])
    policy = torch.full((length,), -1 + math.log(1.01), dtype=torch.float64)
    batch.old_S = policy
    assert kept(batch, 1.02).eq(1).all()
    assert kept(batch, 1.009).eq(0).all()
    (weight,) = sequence_log_weights(batch).tolist()
    assert weight == pytest.approx(length * math.log(1.01))


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=4, phases=[Phase.generate])
@given(
    st.sampled_from([1.7, 1.9, 2.1]),
    st.integers(0, 99),
    st.sampled_from([1, 60, 10_000]),
    st.sampled_from([1, 2]),
)
def test_the_masked_update_equals_the_reference(models, limit, seed, microbatch_tokens, updates):
    groups = make_groups(4, seed=seed)
    options = {"sequence_mask": limit, "updates_per_rollout": updates, "lr": 0.3}
    moved, metrics = change(
        make_policy(models, microbatch_tokens=microbatch_tokens, **options), groups
    )
    expected, expected_metrics = reference_update(models / "qwen2", groups, config(**options))
    assert 0 < expected_metrics["masked"] < 1
    check_against_reference(moved, metrics, expected, expected_metrics)


@pytest.mark.quick
def test_the_others_learn_as_if_the_masked_had_no_advantage(models):
    """N stays: what is left out makes the step smaller, and weighs nobody else up."""
    groups = make_groups()
    options = {"kl_coef": 0.0, "entropy_coef": 0.0}
    policy = make_policy(models, **options)
    edited = []
    for group in groups:
        advantages = []
        known = logprobs(policy, group.trajectories)
        for i, trajectory in enumerate(group.trajectories):
            rollout = trajectory.logprobs[trajectory.sampled_mask]
            ratios = torch.tensor(known[i] - rollout).exp()
            advantages.append(group.advantages[i] * reference_kept(ratios, 1.9))
        edited.append(Group(group.question, group.trajectories, group.rewards, advantages))
    expected, _ = change(policy, edited)
    moved, metrics = change(make_policy(models, **options, sequence_mask=1.9), groups)
    assert 0.2 < metrics["masked"] < 0.8
    assert expected.norm() > 0.01
    assert relative(moved, expected) < 1e-6


@pytest.mark.quick
def test_a_mask_that_leaves_nothing_out_changes_no_bit(models):
    off, metrics_off = change(make_policy(models), make_groups())
    on, metrics_on = change(make_policy(models, sequence_mask=1e9), make_groups())
    assert on.equal(off)
    assert metrics_on == metrics_off
    assert metrics_on["masked"] == 0


@pytest.mark.quick
def test_where_all_are_masked_nothing_moves_and_another_model_is_still_recognized(models):
    policy = make_policy(models, sequence_mask=1.0001)
    moved, metrics = change(policy, make_groups())
    assert moved.eq(0).all()
    assert (metrics["masked"], metrics["loss"]) == (1, 0)
    assert metrics["mismatch"] > 0.1
    with pytest.raises(ValueError, match="computes another model"):
        policy.update(make_groups(), "VLLMEngine")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("limit", "updates", "passes"),
    [(0.0, 1, 1), (2.0, 1, 2), (0.0, 2, 3), (2.0, 2, 4)],
)
def test_the_mask_costs_one_scoring_forward_before_the_first_gradient(
    models, monkeypatch, limit, updates, passes
):
    seen = []
    forward = policy_module.TokenScorer.forward

    def watched(self, batch, loss=None):
        seen.append("score" if loss is None else "learn")
        return forward(self, batch, loss)

    monkeypatch.setattr(policy_module.TokenScorer, "forward", watched)
    options = {"kl_coef": 0.0, "updates_per_rollout": updates, "microbatch_tokens": 10**6}
    make_policy(models, sequence_mask=limit, **options).update(make_groups(4))
    scores = passes - updates
    assert seen == ["score"] * scores + ["learn"] * updates


@pytest.mark.quick
@pytest.mark.parametrize("limit", ["0.5", "1", "1.0"])
def test_a_limit_that_would_mask_everything_is_refused(limit):
    with pytest.raises(ConfigError, match=r"sequence_mask=\S+: must be above 1, or 0: off"):
        load_config([f"--sequence_mask={limit}"])
    with pytest.raises(ConfigError, match=r"sequence_mask=-1.0: must be at least 0"):
        load_config(["--sequence_mask=-1"])
