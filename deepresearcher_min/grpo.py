"""GRPO as plain tensor math: advantages, packing of sequences into micro-batches, and the loss of each token.

Place in the loop: policy.py calls `plan_microbatches` and `pack` to lay out a rollout, runs the model, and hands
log-probabilities to `token_losses`. There is no model and no input or output here, so every line can be checked
against numbers worked by hand.

    loss = -(1/N) sum over sampled tokens t of [ w_t min(rho_t A, clip(rho_t, 1-clip_low, 1+clip_high) A)
                                                 - kl_coef k3_t + entropy_coef H_t ]
    rho_t = exp(new_t - old_t)        w_t = min(exp(old_t - rollout_t), importance_cap)
    k3_t  = exp(ref_t - new_t) - (ref_t - new_t) - 1, clamped to +-10
    N     = sampled tokens of the whole step, over all ranks and micro-batches

Four log-probabilities, four names: rollout_ is what the engine reported while sampling, old_ the policy before the
first update of this rollout, new_ the policy now (with gradient), ref_ the frozen start model.

Who proposed what: group-relative advantages and the k3 term in the loss: DeepSeekMath (GRPO). Clipping: PPO.
clip_high > clip_low: DAPO. No division by the standard deviation: Dr. GRPO. One global N: DAPO's token-level mean,
taken over the whole step. Importance weight w: truncated importance sampling (TIS), for engines whose numerics
differ from the trainer's. k3: J. Schulman's note on approximating KL. The entropy bonus is older than all of them.

Shape suffixes of tensor names:
    G  trajectories of one question          T  tokens of one micro-batch, sequences joined without padding
    S  sampled (= trained) tokens in it      D  hidden width of the model      V  vocabulary

Omitted: a value function, reward shaping and sequence-level ratios; the paper uses none of them in its code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

KL_CLAMP = 10.0  # of one token's k3 value, as in the official code


def group_advantages(rewards: Sequence[float] | np.ndarray | torch.Tensor, normalize_std: bool = True) -> torch.Tensor:
    """Advantages of the trajectories of one question: rewards_G -> advantages_G (paper eq. 1).

    (r - mean) / (std + 1e-6), std unbiased; without the division when normalize_std is false. Equal rewards give
    exact zeros, which float arithmetic alone does not: the mean of seven times 0.1 is not 0.1.
    Raises ValueError for a reward that is not finite. Example: [0, 0, 1] -> [-0.577, -0.577, 1.155].
    """
    given_G = torch.as_tensor(rewards)
    rewards_G = given_G.double()
    if not torch.isfinite(rewards_G).all():
        raise ValueError(f"rewards of a group must be finite, not {rewards_G.tolist()}")
    dtype = given_G.dtype if given_G.is_floating_point() else torch.float32
    if rewards_G.numel() == 0 or rewards_G.max() == rewards_G.min():
        return torch.zeros_like(rewards_G, dtype=dtype)
    advantages_G = rewards_G - rewards_G.mean()
    if normalize_std:
        advantages_G = advantages_G / (rewards_G.std(unbiased=True) + 1e-6)
    return advantages_G.to(dtype)


@dataclass(frozen=True)
class ScoredTrajectory:
    """What the loss needs of one trajectory: arrays over its tokens ([length] each), its reward and advantage."""

    question_id: str
    token_ids: np.ndarray
    sampled_mask: np.ndarray
    rollout_logprobs: np.ndarray  # nan where nothing was sampled
    reward: float
    advantage: float

    @property
    def num_inputs(self) -> int:
        """Tokens that the model must read: all before the last sampled one, which is only ever predicted."""
        sampled = np.flatnonzero(self.sampled_mask)
        return int(sampled[-1]) if len(sampled) else 0


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: sequences end to end, and where in them tokens are predicted.

    The sampled token i of a sequence is predicted at position i-1, so predict_S points one before it.
    """

    rows: tuple[ScoredTrajectory, ...]
    lengths: tuple[int, ...]  # of each sequence, sums to T
    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predict_S: torch.Tensor  # indices into T
    targets_S: torch.Tensor
    rollout_S: torch.Tensor
    advantages_S: torch.Tensor

    def row_of(self, s: int) -> ScoredTrajectory:
        """The trajectory that the s-th sampled token belongs to."""
        ends = np.cumsum([int(row.sampled_mask.sum()) for row in self.rows])
        return self.rows[int(np.searchsorted(ends, s, side="right"))]


def pack(rows: Sequence[ScoredTrajectory], device: torch.device | str = "cpu") -> PackedBatch:
    """Join sequences into one micro-batch without padding.

    No rows give a batch of one token and no trained position: a rank with nothing to do still runs the model,
    because the other ranks wait for it in collective operations.
    Raises ValueError when a first token counts as sampled, since nothing could have predicted it.
    """
    token_ids, positions, predict, targets, rollout, advantages = [], [], [], [], [], []
    start = 0
    for row in rows:
        sampled = np.flatnonzero(row.sampled_mask)
        if len(sampled) == 0 or sampled[0] == 0:
            raise ValueError(f"question {row.question_id!r}: a trajectory needs a prompt and a sampled token")
        token_ids.append(row.token_ids[: row.num_inputs])
        positions.append(np.arange(row.num_inputs))
        predict.append(start + sampled - 1)
        targets.append(row.token_ids[sampled])
        rollout.append(row.rollout_logprobs[sampled])
        advantages.append(np.full(len(sampled), row.advantage))
        start += row.num_inputs

    def tensor(arrays: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        joined = np.concatenate(arrays) if arrays else np.zeros(0)
        return torch.as_tensor(joined, device=device).to(dtype)

    return PackedBatch(
        rows=tuple(rows),
        lengths=tuple(row.num_inputs for row in rows) or (1,),
        token_ids_T=tensor(token_ids or [np.zeros(1)], torch.int64),
        position_ids_T=tensor(positions or [np.zeros(1)], torch.int64),
        predict_S=tensor(predict, torch.int64),
        targets_S=tensor(targets, torch.int64),
        rollout_S=tensor(rollout, torch.float32),
        advantages_S=tensor(advantages, torch.float32),
    )


def plan_microbatches(
    lengths: Sequence[int], budget: int, world_size: int = 1, hidden_size: int = 1024
) -> list[list[list[int]]]:
    """Share sequences out: plan[rank][micro-batch] is a list of indices into lengths, longest sequences first.

    budget: tokens of one micro-batch; a longer sequence gets one of its own. Each sequence goes to the rank with the
    least work so far; work is length + length^2 / (12 hidden_size), the ratio of a transformer's linear layers
    (24 D^2 FLOPs a token) to its causal attention (2 length D). All ranks get the same number of micro-batches,
    the last ones empty where needed, and at least one. Every rank computes the same plan from the same lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    work = [0.0] * world_size
    plan: list[list[list[int]]] = [[] for _ in range(world_size)]
    used = [math.inf] * world_size  # tokens in the rank's open micro-batch
    for i in order:
        rank = work.index(min(work))
        work[rank] += lengths[i] + lengths[i] ** 2 / (12 * hidden_size)
        if used[rank] + lengths[i] > budget:
            plan[rank].append([])
            used[rank] = 0
        plan[rank][-1].append(i)
        used[rank] += lengths[i]
    count = max(1, *(len(batches) for batches in plan))
    return [batches + [[] for _ in range(count - len(batches))] for batches in plan]


def kl_k3(new_S: torch.Tensor, ref_S: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(new || ref) at each sampled token, clamped to +-10; beyond the clamp no gradient.

    exp(d) - d - 1 with d = ref - new. d itself is held within +-20, where k3 is long past the clamp, because
    exp would overflow to infinity there and turn the gradient of the clamp into nan (0 times infinity).
    """
    difference_S = (ref_S - new_S).clamp(-20.0, 20.0)
    return (difference_S.exp() - difference_S - 1).clamp(-KL_CLAMP, KL_CLAMP)


def importance_weights(old_S: torch.Tensor, rollout_S: torch.Tensor, cap: float) -> torch.Tensor:
    """min(exp(old - rollout), cap): how much likelier the policy finds a token than the engine did; cap 0: all 1.

    It corrects for the engine's numerics only; the change since the rollout is the ratio's business.
    """
    if cap == 0:
        return torch.ones_like(old_S)
    return (old_S - rollout_S).exp().clamp(max=cap)


def token_losses(
    new_S: torch.Tensor,
    old_S: torch.Tensor,
    rollout_S: torch.Tensor,
    ref_S: torch.Tensor | None,
    advantages_S: torch.Tensor,
    entropy_S: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    importance_cap: float = 0.0,
) -> torch.Tensor:
    """The loss of each sampled token, [S], before the division by N (module docstring); gradient through new_S.

    With one update per rollout pass old_S = new_S.detach(): the ratio is 1 and its gradient is the policy gradient.
    ref_S may be None only when kl_coef is 0.
    """
    ratio_S = (new_S - old_S).exp()
    clipped_S = ratio_S.clamp(1 - clip_low, 1 + clip_high)
    weights_S = importance_weights(old_S, rollout_S, importance_cap)
    losses_S = -weights_S * torch.minimum(ratio_S * advantages_S, clipped_S * advantages_S)
    if kl_coef:
        losses_S = losses_S + kl_coef * kl_k3(new_S, ref_S)
    if entropy_coef:
        losses_S = losses_S - entropy_coef * entropy_S
    return losses_S


@torch.no_grad()
def token_sums(
    new_S: torch.Tensor,
    old_S: torch.Tensor,
    rollout_S: torch.Tensor,
    ref_S: torch.Tensor | None,
    advantages_S: torch.Tensor,
    entropy_S: torch.Tensor,
    losses_S: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance_cap: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Sums over the sampled tokens of a micro-batch, float64; divided by "tokens" they are means over the step.

    clip_fraction counts tokens whose gradient the clip removed; mismatch is |old - rollout|, in nats.
    """
    ratio_S = (new_S - old_S).exp()
    clipped_S = torch.where(advantages_S > 0, ratio_S > 1 + clip_high, (advantages_S < 0) & (ratio_S < 1 - clip_low))
    capped_S = (old_S - rollout_S).exp() > (importance_cap or math.inf)
    values = {
        "loss": losses_S,
        "kl": torch.zeros_like(new_S) if ref_S is None else kl_k3(new_S, ref_S),
        "mismatch": (old_S - rollout_S).abs(),
        "entropy": entropy_S,
        "clip_fraction": clipped_S,
        "capped_fraction": capped_S,
        "tokens": torch.ones_like(new_S),
    }
    return {name: value_S.double().sum() for name, value_S in values.items()}
