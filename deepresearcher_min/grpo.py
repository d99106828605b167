"""GRPO as plain tensor math, without a model: advantages, packing into micro-batches, and the loss
of each token.

    loss = -(1/N) sum over sampled tokens t of
           [ w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) - kl_coef k3_t
             + entropy_coef H_t ]
    rho_t = exp(new_t - old_t)        w_t = min(exp(old_t - rollout_t), importance_cap)
    k3_t  = exp(ref_t - new_t) - (ref_t - new_t) - 1, clamped to +-10
    N     = sampled tokens of one optimizer step, over all ranks and micro-batches

With config.sequence_mask the bracket is 0 for all tokens of a trajectory that `kept` leaves out.

Four log-probabilities, four names: rollout_ is what the engine reported while sampling, old_ the
policy before the first update of this rollout, new_ the policy now (with gradient), ref_ the frozen
start model.

Who proposed what: group-relative advantages, k3 in the loss: DeepSeekMath (GRPO); k3: J. Schulman.
Clipping: PPO, with clip_high > clip_low: DAPO. No division by std: Dr. GRPO. One N: DAPO's
token-level mean, over the whole step. w: truncated importance sampling (TIS), for engines that
round otherwise than the trainer. The entropy bonus is older. Omitted: a value function, reward
shaping and sequence-level ratios; the paper's code uses none of them.

Shape suffixes of tensor names (a parameter that has one is a Tensor):
    G  trajectories of one question          T  tokens of one micro-batch, joined without padding
    S  sampled (= trained) tokens in it      D  hidden width of the model      V  vocabulary
    C  trained tokens of one chunk
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Of log-probability differences before exp. Beyond it there is no gradient; infinity would make it
# nan.
EXPONENT_LIMIT = 20.0
RARE = 1e-4  # probability below which a sampled token is called rare (docs/metrics.md)


def group_advantages(rewards, normalize_std=True):
    """Advantages of one question's trajectories: rewards_G -> advantages_G, float32 (paper eq. 1).

    (r - mean) / (std + 1e-6), std unbiased; undivided if normalize_std is false. Equal rewards give
    exact zeros, which float arithmetic alone does not. ValueError if a reward is not finite.
    [0, 0, 1] -> [-0.577, -0.577, 1.155].
    """
    rewards_G = torch.as_tensor(rewards).double()
    if not torch.isfinite(rewards_G).all():
        raise ValueError(f"rewards of a group must be finite, not {rewards_G.tolist()}")
    advantages_G = rewards_G - rewards_G.mean()
    if (rewards_G == rewards_G[:1]).all():  # [:1], not [0]: a group may be empty
        advantages_G = torch.zeros_like(rewards_G)
    elif normalize_std:
        advantages_G = advantages_G / (rewards_G.std() + 1e-6)
    return advantages_G.float()


# --- packing: which trajectories are computed together, and what of them only once


@dataclass
class TrainingRow:
    """What the loss needs of one trajectory; nothing behind the last sampled token matters."""

    name: str  # for error messages
    token_ids: np.ndarray  # up to the last sampled one, which is only ever predicted
    sampled: np.ndarray  # indices into token_ids
    rollout_logprobs: np.ndarray  # of the sampled tokens
    advantage: float
    group: str = ""  # rows of one group begin alike: what they share is computed once

    @property
    def length(self):
        """How many inputs it has: all tokens but the last."""
        return len(self.token_ids) - 1


def training_rows(group):
    """A group's trajectories that sampled anything; a reward or advantage that is not finite is an
    error.
    """
    rows = []
    for i, trajectory in enumerate(group.trajectories):
        name = f"question {group.question.id!r}, trajectory {i}"
        reward = group.rewards[i]
        advantage = float(group.advantages[i])
        if not np.isfinite(reward + advantage):
            raise FloatingPointError(f"{name}: reward {reward}, advantage {advantage}")
        sampled = np.flatnonzero(trajectory.sampled_mask)
        if len(sampled):
            ids = trajectory.token_ids[: sampled[-1] + 1]
            logprobs = trajectory.logprobs[sampled]
            rows.append(TrainingRow(name, ids, sampled, logprobs, advantage, group.question.id))
    return rows


@dataclass
class PackedBatch:
    """One micro-batch: segments end to end, and where in them the sampled tokens are predicted.

    Of a group, the common prefix is one segment and the rest of each row another; a row alone is
    one segment.
    """

    lengths: tuple  # of each segment, sums to T
    prefix_of: dict  # the segment that a segment continues
    token_ids_T: Tensor
    position_ids_T: Tensor
    # indices into T: token i of a row is predicted at its position i-1, which rows may share
    predict_S: Tensor
    targets_S: Tensor
    rollout_S: Tensor
    advantages_S: Tensor
    names: list  # of the trajectories
    owner_S: Tensor  # which of them the sampled tokens belong to
    old_S: Tensor | None = None  # None: new_S of the first pass becomes it


def families(rows, limit=math.inf):
    """A list of (shared, rows): the rows of a group, in their order, and how many first tokens the
    inputs of all of them share. A group of more than `limit` tokens comes in several pieces, each
    within it or of a single row. A row without a group is a family of its own.
    """
    members = defaultdict(list)
    for i, row in enumerate(rows):
        members[row.group or i].append(row)
    found = []
    for family in members.values():
        # Compared by numpy: every rank does this for the rows of all, up to a whole context each.
        shortest = min(row.length for row in family)
        heads = np.array([row.token_ids[:shortest] for row in family])
        shared = np.logical_and.accumulate((heads == heads[0]).all(axis=0)).sum()
        room = -1  # the first row opens a piece
        for row in family:
            rest = row.length - shared
            if rest > room:
                piece = []
                found.append((shared, piece))
                room = limit - shared
            piece.append(row)
            room -= rest
    return found


def pack(rows, device="cpu"):
    """Join rows into one micro-batch. ValueError when nothing is sampled, or a first token.

    No rows give one token and no trained position: an idle rank still takes part in collectives.
    """
    for row in rows:
        if 0 in row.sampled or not len(row.sampled):
            raise ValueError(f"{row.name}: it needs a prompt and a sampled token")
    nothing = np.arange(0)
    rows = rows or [TrainingRow("nobody", np.zeros(2), nothing, nothing, 0.0)]
    ids: list = []
    positions, predict, packed = [], [], []
    prefix_of = {}

    def add_segment(row, first, end):
        """Append a row's tokens from its position `first` to `end`; returns their places in T."""
        places = np.arange(first, end)
        start = sum(map(len, ids))
        if len(places):
            ids.append(row.token_ids[first:end])
            positions.append(places)
        return start + places - first

    for shared, family in families(rows):
        prefix = len(ids)
        prefix_places = add_segment(family[0], 0, shared)
        for row in family:
            if 0 < shared < row.length:
                prefix_of[len(ids)] = prefix
            places = np.append(prefix_places, add_segment(row, shared, row.length))
            predict.append(places[row.sampled - 1])
            packed.append(row)
    owner_S = [i for i, row in enumerate(packed) for _ in row.sampled]

    def tensor(arrays, dtype=torch.int64):
        return torch.from_numpy(np.concatenate(arrays)).to(device, dtype)

    return PackedBatch(
        lengths=tuple(map(len, ids)),
        prefix_of=prefix_of,
        token_ids_T=tensor(ids),
        position_ids_T=tensor(positions),
        predict_S=tensor(predict),
        targets_S=tensor([row.token_ids[row.sampled] for row in packed]),
        rollout_S=tensor([row.rollout_logprobs for row in packed], torch.float32),
        advantages_S=torch.tensor([packed[i].advantage for i in owner_S], device=device),
        names=[row.name for row in packed],
        owner_S=tensor([owner_S]),
    )


def plan_microbatches(rows, budget, world_size, hidden_size):
    """Share rows out: plan[rank][micro-batch] is a list of rows, longest first.

    budget: tokens of one micro-batch; a longer row gets one of its own. What a family shares counts
    once in a micro-batch. A piece of a family goes to the rank with the least work so far: a family
    stays together, unless it is over the budget, or more than a quarter of a rank's share. All
    ranks get equally many micro-batches, at least one; the last may be empty.
    """

    def work_of(first, end):
        # A transformer's linear layers take 24 D^2 FLOPs a token, attention 4 D for each it sees,
        # on average (first + end) / 2 of them. In units of 24 D^2.
        return (end - first) * (1 + (first + end) / (12 * hidden_size))

    limit = budget
    if world_size > 1:
        limit = min(budget, sum(row.length for row in rows) // world_size // 4)
    plan = [[] for _ in range(world_size)]
    work = [0.0] * world_size
    tokens = [budget] * world_size  # of each rank's last micro-batch; full, so a first one opens
    longest_first = sorted(rows, key=lambda row: -row.length)
    for shared, piece in families(longest_first, limit):
        rank = work.index(min(work))
        work[rank] += work_of(0, shared) + sum(work_of(shared, row.length) for row in piece)
        size = shared + sum(row.length - shared for row in piece)
        tokens[rank] += size
        if tokens[rank] > budget:
            plan[rank].append([])
            tokens[rank] = size
        plan[rank][-1] += piece
    count = max(1, *map(len, plan))
    return [batches + [[]] * (count - len(batches)) for batches in plan]


# --- the loss of a token


def kl_k3(new_S, ref_S):
    """The k3 estimate of KL(new || ref) of each sampled token. Clamped at 10, as in the official
    code; beyond a clamp there is no gradient.
    """
    difference_S = (ref_S - new_S).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    return (difference_S.exp() - difference_S - 1).clamp(-10, 10)


def token_losses(
    new_S,
    old_S,
    rollout_S,
    ref_S,
    advantages_S,
    entropy_S,
    kept_S=1.0,
    *,
    clip_low,
    clip_high,
    kl_coef=0.0,
    entropy_coef=0.0,
    importance_cap=0.0,
):
    """The loss of each sampled token, [S], not yet divided by N, and sums of metrics.

    Gradient flows through new_S and entropy_S only. One update per rollout: pass old_S =
    new_S.detach(), and the ratio's gradient is the policy gradient. importance_cap 0: no weight;
    ref_S None: no KL; kept_S 0: left out. The metrics (docs/metrics.md) are float64 sums.
    """
    ratio_S = (new_S - old_S).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    free_S = ratio_S * advantages_S
    clipped_S = ratio_S.clamp(1 - clip_low, 1 + clip_high) * advantages_S
    losses_S = -torch.minimum(free_S, clipped_S)
    # Corrects for the engine's numerics only; the change since the rollout is the ratio's business.
    weights_S = (old_S - rollout_S).exp()
    cap = importance_cap or math.inf
    if importance_cap:
        losses_S = losses_S * weights_S.clamp(max=cap)
    kl_S = torch.zeros_like(new_S) if ref_S is None else kl_k3(new_S, ref_S)
    losses_S = (losses_S + kl_coef * kl_S) * kept_S
    if entropy_coef:  # HeadLoss has less to do for an entropy that is not used
        losses_S = losses_S - entropy_coef * entropy_S * kept_S
    ones_S = torch.ones_like(new_S)
    metrics = {
        "loss": losses_S,
        "kl": kl_S,
        "mismatch": (old_S - rollout_S).abs(),
        "entropy": entropy_S,
        "clip_fraction": free_S > clipped_S,
        "capped_fraction": weights_S > cap,
        "tokens": ones_S,
        "rare_share": torch.minimum(new_S, rollout_S) < math.log(RARE),
        "masked": ones_S - kept_S,
        "logprob_good": new_S * (advantages_S > 0),
        "good_tokens": advantages_S > 0,
    }
    return losses_S, {name: value_S.detach().double().sum() for name, value_S in metrics.items()}


def sequence_log_weights(batch):
    """The importance weight of each trajectory, as its logarithm, the sum of old - rollout [nats]:
    the product itself overflows, 2,000 tokens that are off by half a nat make e^1000.
    """
    return torch.bincount(batch.owner_S, (batch.old_S - batch.rollout_S).double())


def kept(batch, limit):
    """[S], 0 for a trajectory whose geometric mean of exp(old - rollout), or its inverse, is above
    the limit, else 1. The mean, unlike the product, does not grow with a trajectory's length.
    """
    means = sequence_log_weights(batch) / torch.bincount(batch.owner_S)
    within = means.abs() <= math.log(limit)
    return within[batch.owner_S].float()


# --- the output head


class HeadLoss(torch.autograd.Function):
    """Output head, log-softmax and loss at the trained positions, a chunk at a time, with the
    head's gradient.

    Returns the sum of the losses, and log-probabilities_S, which carry no gradient. A chunk's
    gradient is formed in the forward pass, while its logits exist; autograd would keep the logits
    or compute them twice.
    """

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, targets_S, chunk, loss):
        """loss(logprobs_C, entropy_C, slice of S) is the sum of one chunk's losses; None: only
        the log-probabilities are wanted.
        """
        weight_VD = weight_VD.to(hidden_SD.dtype)
        wide = torch.promote_types(hidden_SD.dtype, torch.float32)
        logprobs_S = hidden_SD.new_zeros(len(hidden_SD), dtype=wide)
        total = logprobs_S.new_zeros(())
        ctx.mark_non_differentiable(logprobs_S)
        # One memory for all chunks: fresh pages would cost a seventh of the time on a CPU.
        memory_2CV = logprobs_S.new_empty(2, min(chunk, len(hidden_SD)), len(weight_VD))
        if loss:
            d_hidden_SD = torch.zeros_like(hidden_SD)
            # The head is not trained under LoRA.
            d_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
            ctx.gradients = d_hidden_SD, d_weight_VD
        for start in range(0, len(hidden_SD), chunk):
            part = slice(start, start + chunk)
            hidden_CD = hidden_SD[part]
            logprobs_S[part], value, d_logits_CV = head_chunk(
                hidden_CD, weight_VD, targets_S[part, None], part, loss, memory_2CV
            )
            if loss:
                total += value
                d_hidden_SD[part] = d_logits_CV @ weight_VD
                if d_weight_VD is not None:
                    d_weight_VD.addmm_(d_logits_CV.T, hidden_CD)
                del d_logits_CV  # before the next chunk's logits are made
        return total, logprobs_S

    @staticmethod
    def backward(ctx, d_total, _):
        gradients = [
            None if gradient is None else gradient.mul_(d_total) for gradient in ctx.gradients
        ]
        del ctx.gradients  # [V, D] is large: let go of it as early as possible
        return *gradients, None, None, None


def head_chunk(hidden_CD, weight_VD, targets_C1, part, loss, memory_2CV):
    """Log-probabilities_C of the targets, and with a loss its value and d value / d logits_CV.

    The two float32 [C, V] that exist at a time lie in memory_2CV; half precision adds one of its
    own for the product and one for the gradient. With p the probabilities, H the entropy and t the
    target:
        d logprob[t] / d logits = onehot(t) - p        d H / d logits = -p (log p + H)
    """
    logits_CV, logprobs_CV = memory_2CV[:, : len(hidden_CD)]
    # Where the types agree, mm writes right into the memory, and copy_ has nothing left to do.
    place = logits_CV if logits_CV.dtype == hidden_CD.dtype else None
    logits_CV.copy_(torch.mm(hidden_CD, weight_VD.T, out=place))
    torch.log_softmax(logits_CV, -1, out=logprobs_CV)
    new_C = logprobs_CV.gather(-1, targets_C1)[:, 0]
    if not loss:
        return new_C, None, None
    probs_CV = torch.exp(logprobs_CV, out=logits_CV)  # takes over the memory of the logits
    entropy_C = torch.einsum("cv,cv->c", probs_CV, logprobs_CV).neg_()
    with torch.enable_grad():
        value = loss(new_C.requires_grad_(), entropy_C.requires_grad_(), part)
    d_new_C, d_entropy_C = torch.autograd.grad(value, (new_C, entropy_C), allow_unused=True)
    factor = -d_new_C[:, None]
    if d_entropy_C is not None:  # with an entropy bonus
        factor = factor - d_entropy_C[:, None] * (logprobs_CV + entropy_C[:, None])
    d_logits_CV = probs_CV.mul_(factor).scatter_add_(-1, targets_C1, d_new_C[:, None])
    return new_C.detach(), value.detach(), d_logits_CV.to(hidden_CD.dtype)
