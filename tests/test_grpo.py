"""grpo.py against numbers worked by hand, and the properties that any GRPO must have."""

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepresearcher_min.grpo import (
    HeadLoss,
    TrainingRow,
    group_advantages,
    kl_k3,
    pack,
    plan_microbatches,
    token_losses,
)

pytestmark = pytest.mark.quick
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- advantages


def test_advantages_worked_by_hand():
    # mean 1/3, unbiased variance (1/9 + 1/9 + 4/9) / 2 = 1/3
    std = math.sqrt(1 / 3) + 1e-6
    expected = [-1 / 3 / std, -1 / 3 / std, 2 / 3 / std]
    assert group_advantages([0, 0, 1]).tolist() == pytest.approx(expected, rel=1e-6)
    # mean 2.5, unbiased variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3
    std = math.sqrt(5 / 3) + 1e-6
    given_rewards = np.array([1.0, 2.0, 3.0, 4.0])
    assert group_advantages(given_rewards).tolist() == pytest.approx(
        [x / std for x in (-1.5, -0.5, 0.5, 1.5)]
    )
    assert given_rewards.tolist() == [1.0, 2.0, 3.0, 4.0]
    plain = group_advantages([1.0, 2.0, 3.0, 4.0], normalize_std=False)
    assert plain.tolist() == [-1.5, -0.5, 0.5, 1.5]


@settings(deadline=None)  # another process may hold the core
@given(st.floats(-1e3, 1e3), st.integers(1, 20), st.booleans())
def test_equal_rewards_give_exactly_zero(value, count, normalize):
    advantages = group_advantages([value] * count, normalize)
    assert advantages.dtype == torch.float32
    assert advantages.eq(0).all()


def test_float_arithmetic_alone_would_not_give_zero():
    rewards = torch.full((7,), 0.1)
    assert ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).abs().max() > 0
    assert group_advantages(rewards).tolist() == [0.0] * 7


@settings(deadline=None)
@given(
    st.lists(st.integers(-100, 100), min_size=2, max_size=16).filter(lambda r: len(set(r)) > 1),
    st.randoms(),
)
def test_advantages_are_centred_keep_the_order_and_follow_permutations(rewards, random):
    advantages = group_advantages([float(r) for r in rewards])
    assert abs(float(advantages.sum())) < 1e-4
    assert np.argmax(rewards) == int(advantages.argmax())
    order = list(range(len(rewards)))
    random.shuffle(order)
    assert torch.allclose(
        group_advantages([float(rewards[i]) for i in order]), advantages[order], atol=1e-6
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        group_advantages([0.0, bad, 1.0])


# --- the loss of a token


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: the policy gradient
        (1.5, 1.0, -1.28, 0.0),  # above the upper side, rewarded: held
        (1.25, 1.0, -1.25, -1.25),  # between 1 + clip_low and 1 + clip_high: still free
        (1.5, -1.0, 1.5, 1.5),  # above it, punished: the pessimistic minimum does not clip
        (0.5, -1.0, 0.8, 0.0),  # below the lower side, punished: held
        (0.5, 1.0, -0.5, -0.5),  # below it, rewarded: free
        (0.5, 0.0, 0.0, 0.0),
    ],
)
def test_both_clip_sides(ratio, advantage, loss, gradient):
    new = tensor(math.log(ratio)).requires_grad_()
    losses, sums = token_losses(
        new, tensor(0.0), tensor(0.0), None, tensor(advantage), tensor(0.0), **CLIP
    )
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert new.grad.item() == pytest.approx(gradient)
    assert sums["clip_fraction"] == (gradient == 0 and advantage != 0)


@pytest.mark.parametrize(
    # ref - new; k3; its derivative with regard to new, 1 - exp(difference).
    ("difference", "value", "gradient"),
    [
        (0.0, 0.0, 0.0),
        (math.log(2), 1 - math.log(2), -1.0),
        (-math.log(2), 0.5 + math.log(2) - 1, 0.5),
        (5.0, 10.0, 0.0),  # e^5 - 6 = 142, clamped
        (-15.0, 10.0, 0.0),  # 15 + e^-15 - 1 = 14, clamped
        (-10.5, 9.5 + math.exp(-10.5), 1 - math.exp(-10.5)),  # just not clamped
        (1000.0, 10.0, 0.0),  # exp overflows: no nan
        (-1000.0, 10.0, 0.0),
    ],
)
def test_k3_and_its_clamp(difference, value, gradient):
    new = tensor(0.0).float().requires_grad_()
    kl_S = kl_k3(new, torch.tensor([difference]))
    kl_S.sum().backward()
    assert kl_S.item() == pytest.approx(value, abs=1e-6)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("cap", "weight", "capped"),
    [(2.0, (2.0, 1.5, 0.25), 1), (0.0, (1.0, 1.0, 1.0), 0), (9.0, (3.0, 1.5, 0.25), 0)],
)
def test_importance_weight_and_its_cap(cap, weight, capped):
    old = tensor(-1.0, -1.0, -1.0)
    rollout = old - tensor(math.log(3), math.log(1.5), math.log(0.25))
    new = old.clone().requires_grad_()
    known = (rollout, None, torch.ones(3), torch.zeros(3))
    losses, sums = token_losses(new, old, *known, **CLIP, importance_cap=cap)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-w for w in weight])
    # The weight itself carries no gradient.
    assert new.grad.tolist() == pytest.approx([-w for w in weight])
    assert sums["capped_fraction"] == capped


def test_an_overflowing_ratio_or_weight_gives_no_nan():
    new = torch.zeros(2, requires_grad=True)
    old, rollout = torch.full((2,), -200.0), torch.full((2,), -400.0)
    known = (rollout, None, tensor(1.0, -1.0), torch.zeros(2))
    losses, _ = token_losses(new, old, *known, **CLIP, importance_cap=2.0)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(new.grad).all()


def test_all_terms_together_and_metrics_are_sums():
    generator = torch.Generator().manual_seed(0)
    new, old, rollout, ref, advantages, entropy = (
        torch.randn(50, generator=generator, dtype=torch.float64) * 0.3 for _ in range(6)
    )
    options = {**CLIP, "kl_coef": 0.1, "entropy_coef": 0.01, "importance_cap": 1.2}
    losses, sums = token_losses(new, old, rollout, ref, advantages, entropy, **options)
    for i in range(50):
        rho = math.exp(new[i] - old[i])
        policy = min(rho * advantages[i], min(max(rho, 0.8), 1.28) * advantages[i])
        d = float(ref[i] - new[i])
        expected = (
            -min(math.exp(old[i] - rollout[i]), 1.2) * policy
            + 0.1 * (math.exp(d) - d - 1)
            - 0.01 * entropy[i]
        )
        assert losses[i].item() == pytest.approx(float(expected))
    assert sums["tokens"] == 50
    assert sums["mismatch"].item() == pytest.approx((old - rollout).abs().sum().item())
    parts = [
        token_losses(*(x[part] for x in (new, old, rollout, ref, advantages, entropy)), **options)[
            1
        ]
        for part in (slice(0, 7), slice(7, 50))
    ]
    for name, value in sums.items():
        assert (parts[0][name] + parts[1][name]).item() == pytest.approx(value.item())


# --- the output head


def head_reference(hidden, weight, targets, temperature, entropy_coef):
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    new = logprobs.gather(-1, targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return (new**2 + 3 * new).sum() - entropy_coef * entropy.sum(), new, entropy


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize(("temperature", "entropy_coef"), [(1.0, 0.0), (0.7, 0.0), (1.3, 0.5)])
def test_head_gradient_written_out_equals_autograd(chunk, temperature, entropy_coef):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (10, 30))
    targets = torch.randint(0, 30, (10,))
    expected, new_expected, entropy_expected = head_reference(
        hidden, weight, targets, temperature, entropy_coef
    )
    expected_gradients = torch.autograd.grad(2 * expected, (hidden, weight))
    seen = []

    def loss(new, entropy, part):
        seen.append((new.detach(), entropy.detach()))
        value = (new**2 + 3 * new).sum()
        return value - entropy_coef * entropy.sum() if entropy_coef else value

    total, logprobs = HeadLoss.apply(hidden / temperature, weight, targets, chunk, loss)
    (2 * total).backward()
    assert total.item() == pytest.approx(expected.item())
    torch.testing.assert_close(torch.cat([new for new, _ in seen]), new_expected.detach())
    torch.testing.assert_close(logprobs, new_expected.detach())
    with torch.no_grad():
        assert torch.equal(
            HeadLoss.apply(hidden / temperature, weight, targets, chunk, None)[1], logprobs
        )
    torch.testing.assert_close(
        torch.cat([entropy for _, entropy in seen]), entropy_expected.detach()
    )
    torch.testing.assert_close(hidden.grad, expected_gradients[0])
    torch.testing.assert_close(weight.grad, expected_gradients[1])


def test_two_tensors_of_chunk_times_vocabulary_exist_at_a_time():
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    alive = []

    def loss(new, entropy, part):
        alive.append(
            sum(
                type(thing) is torch.Tensor and thing.shape == (4, 33) for thing in gc.get_objects()
            )
        )
        return new.sum()

    HeadLoss.apply(hidden, weight, torch.zeros(12, dtype=torch.int64), 4, loss)
    assert alive == [2] * 3


def test_head_with_nothing_to_train_gives_zero_gradients():
    hidden = torch.zeros(0, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    HeadLoss.apply(hidden, weight, torch.zeros(0, dtype=torch.int64), 4, lambda *_: 1 / 0)[
        0
    ].backward()
    assert hidden.grad.shape == (0, 8)
    assert weight.grad.eq(0).all()


# --- packing


def trajectory(mask: str, first_id: int = 0, advantage: float = 0.0) -> TrainingRow:
    sampled = np.array([i for i, c in enumerate(mask) if c == "1"], int)
    ids = np.arange(first_id, first_id + sampled.max(initial=0) + 1, dtype=np.int32)
    return TrainingRow(f"t{first_id}", ids, sampled, -ids[sampled] / 100, advantage)


def owners(batch) -> list[str]:
    """The trajectories' names, one for each sampled token."""
    return [batch.names[i] for i in batch.owner_S]


def test_pack_worked_by_hand():
    rows = [trajectory("001011", 10, 0.5), trajectory("01", 40, -1.0)]
    batch = pack(rows)
    # Inputs end before the last sampled token: 10..14 (15 is only predicted) and 40.
    assert batch.lengths == (5, 1)
    assert batch.token_ids_T.tolist() == [10, 11, 12, 13, 14, 40]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0]
    # Token i is predicted at i-1: 12 at 1, 14 at 3, 15 at 4; 41 at 0 of the second, which starts at
    # 5.
    assert batch.predict_S.tolist() == [1, 3, 4, 5]
    assert batch.targets_S.tolist() == [12, 14, 15, 41]
    assert batch.rollout_S.tolist() == pytest.approx([-0.12, -0.14, -0.15, -0.41])
    assert batch.advantages_S.tolist() == [0.5, 0.5, 0.5, -1.0]
    assert owners(batch) == ["t10", "t10", "t10", "t40"]
    assert rows[0].token_ids.tolist() == list(range(10, 16))


def test_pack_of_a_group_worked_by_hand():
    sampled, logprobs = np.array([2, 4]), np.array([-0.5, -0.25])
    rows = [
        TrainingRow("a", np.array([7, 8, 20, 9, 30]), sampled, logprobs, 1.0, "q"),
        TrainingRow("alone", np.array([7, 8, 5]), np.array([2]), np.array([-1.0]), 0.5, "other"),
        # All its inputs are a's, too.
        TrainingRow("b", np.array([7, 8, 20, 9, 31]), sampled, logprobs, -1.0, "q"),
        TrainingRow("c", np.array([7, 8, 21, 9, 30]), sampled, logprobs, 0.0, "q"),
    ]
    batch = pack(rows)
    # The group's inputs have 7, 8 in common; then come the rests of a, b and c, then the row that
    # stands alone.
    assert batch.token_ids_T.tolist() == [7, 8, 20, 9, 20, 9, 21, 9, 7, 8]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 0, 1]
    assert (batch.lengths, batch.prefix_of) == ((2, 2, 2, 2, 2), {1: 0, 2: 0, 3: 0})
    # The first sampled token of a, b and c is predicted at the same place, the last one of the
    # prefix.
    assert batch.predict_S.tolist() == [1, 3, 1, 5, 1, 7, 9]
    assert batch.targets_S.tolist() == [20, 30, 20, 31, 21, 30, 5]
    assert owners(batch) == ["a", "a", "b", "b", "c", "c", "alone"]
    assert batch.advantages_S.tolist() == [1, 1, -1, -1, 0, 0, 0.5]
    twice = pack([rows[0], rows[2]])  # nothing is left of either but what is predicted
    assert (twice.lengths, twice.prefix_of, twice.predict_S.tolist()) == ((4,), {}, [1, 3, 1, 3])


def test_pack_of_nothing_still_feeds_the_model_one_token():
    batch = pack([])
    assert batch.token_ids_T.tolist() == [0]
    assert (batch.lengths, len(batch.predict_S), len(owners(batch))) == ((1,), 0, 0)


@pytest.mark.parametrize("mask", ["000", "101"])
def test_pack_refuses_what_nothing_can_predict(mask):
    with pytest.raises(ValueError, match="t7: it needs a prompt and a sampled token"):
        pack([trajectory(mask, 7)])


def plan_of(lengths, budget, world_size, hidden_size, families):
    """plan[rank][micro-batch], as indices into `lengths`, for rows with inputs that long; those of
    a family (shared, indices) have so many first tokens in common and no more.
    """
    rows = {}
    for name, (shared, indices) in enumerate(families):
        for own, i in enumerate(indices, start=1):
            ids = np.full(lengths[i] + 1, own)
            ids[:shared] = 0
            rows[i] = TrainingRow(str(i), ids, ids[:1], ids[:1], 0.0, f"family {name}")
    ordered = [rows[i] for i in range(len(lengths))]
    plan = plan_microbatches(ordered, budget, world_size, hidden_size)
    return [[[int(row.name) for row in batch] for batch in batches] for batches in plan]


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 1000), st.integers(1, 5))
def test_plan_covers_everything_once_within_budget_and_balanced(lengths, budget, world_size):
    alone = [(0, [i]) for i in range(len(lengths))]
    plan = plan_of(lengths, budget, world_size, 16, alone)
    assert len({len(batches) for batches in plan}) == 1  # every rank takes part in every collective
    assert len(plan[0]) >= 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(
        range(len(lengths))
    )
    for batches in plan:
        for batch in batches:
            assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= budget
        ordered = [lengths[i] for batch in batches for i in batch]
        assert ordered == sorted(ordered, reverse=True)
    work = [
        sum(lengths[i] + lengths[i] ** 2 / 192 for batch in batches for i in batch)
        for batches in plan
    ]
    heaviest = max((length + length**2 / 192 for length in lengths), default=0)
    assert max(work) - min(work) <= heaviest + 1e-6


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.lists(st.integers(0, 90), min_size=1, max_size=8)),
        max_size=9,
    ),
    st.integers(1, 1000),
    st.integers(1, 5),
)
def test_plan_of_families_covers_everything_within_the_budget(drawn, budget, world_size):
    lengths, families, prefix = [], [], {}
    for shared, rests in drawn:
        families.append((shared, list(range(len(lengths), len(lengths) + len(rests)))))
        prefix |= dict.fromkeys(families[-1][1], shared)
        lengths += [max(1, shared + rest) for rest in rests]  # rest 0: nothing but what is shared
    family = {i: n for n, (_, indices) in enumerate(families) for i in indices}
    plan = plan_of(lengths, budget, world_size, 16, families)
    assert len({len(batches) for batches in plan}) == 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(
        range(len(lengths))
    )
    for batch in (batch for batches in plan for batch in batches):
        once = {family[i]: prefix[i] for i in batch}
        assert (
            len(batch) <= 1
            or sum(lengths[i] - prefix[i] for i in batch) + sum(once.values()) <= budget
        )


def test_plan_keeps_families_together_unless_ranks_would_be_idle():
    four = [(100, list(range(first, first + 4))) for first in range(0, 16, 4)]
    plan = plan_of([150] * 16, 600, 2, 64, four)
    # 2 x (100 + 4 x 50) tokens in a micro-batch, where without sharing it would be 1,200.
    assert sorted(sorted(batch) for batches in plan for batch in batches) == [
        sorted(a + b) for a, b in ((four[0][1], four[2][1]), (four[1][1], four[3][1]))
    ]
    (first,), (second,) = plan_of([150] * 4, 600, 2, 64, four[:1])
    assert len(first) == len(second) == 2  # one family, two ranks


def test_plan_counts_attention_as_quadratic():
    # Work 2,400 against 5 x 533: by tokens alone (1,200 against 5 x 400) the first rank would get
    # one of the short.
    alone = [(0, [i]) for i in range(6)]
    plan = plan_of([1200, 400, 400, 400, 400, 400], 10_000, 2, 100, alone)
    work = [
        sum(n + n * n / 1200 for n in ([1200, 400, 400, 400, 400, 400][i] for i in batches[0]))
        for batches in plan
    ]
    assert plan[0] == [[0]]
    assert work == pytest.approx([2400, 5 * (400 + 400**2 / 1200)])
