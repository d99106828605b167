"""The signs of a collapse: metrics.jsonl's logprob_good, rare_share and weight_max. Over packings,
updates and ranks they are compared with the reference of policies.py, as all metrics are.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from policies import logprobs, make_groups, make_policy

from deepresearcher_min.grpo import TrainingRow, pack, sequence_weights, token_losses
from deepresearcher_min.trajectory import Group

pytestmark = pytest.mark.quick


def row(advantage: float, *rollout: float) -> TrainingRow:
    """A prompt of one token, then one sampled token for each log-probability of the engine."""
    sampled = np.arange(1, len(rollout) + 1)
    return TrainingRow("t", np.arange(len(rollout) + 1), sampled, np.array(rollout), advantage)


def test_signs_of_a_collapse_worked_by_hand():
    rows = [row(1.0, -1.0, -2.0), row(-0.5, -1.0, -9.0, -1.0), row(0.25, -10.0)]
    batch = pack(rows)
    new = torch.tensor([-1.5, -2.5, -9.5, -9.0, -2.0, -4.0])
    known = (batch.rollout_S, None, batch.advantages_S)
    _, found = token_losses(new, new, *known, torch.zeros(6), clip_low=0.2, clip_high=0.2)
    # ln 1e-4 is -9.21: below it is the policy once (-9.5) and the engine once (-10).
    assert (found["rare_share"], found["good_tokens"]) == (2, 3)
    assert found["logprob_good"] == -1.5 - 2.5 - 4.0  # the second row was punished
    assert sequence_weights(new, batch).tolist() == [-0.5 - 0.5, -8.5 + 0 - 1, 6]
    assert sequence_weights(torch.zeros(0), pack([])).tolist() == []


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
