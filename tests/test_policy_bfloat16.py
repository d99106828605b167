"""The update in bfloat16, on the CPU: against float32, within what eight bits of mantissa give. Run
by torchrun, this file is also the worker of its test with ranks.
"""

import sys
from pathlib import Path

import processes
import pytest
import torch
from policies import MODELS, make_groups, make_policy, relative

from deepresearcher_min.grpo import HeadLoss
from deepresearcher_min.policy import Policy, whole
from deepresearcher_min.run import Ranks

# The cap's edge is no matter of rounding.
OPTIONS = {"importance_cap": 0.0, "microbatch_tokens": 200}


def gradient(policy: Policy, groups) -> tuple[torch.Tensor, dict[str, float]]:
    """What one step of plain gradient descent takes off the float32 master weights; the metrics."""
    before = [whole(p.detach()).cpu().clone() for p in policy.model.parameters()]
    metrics = policy.update(groups)
    after = [whole(p.detach()).cpu() for p in policy.model.parameters()]
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    return torch.cat([(b - a).flatten() for b, a in zip(before, after, strict=True)]), metrics


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("microbatch_tokens", "checkpointing"), [(1, False), (200, True)])
def test_bfloat16_gradient_for_any_packing(models, name, microbatch_tokens, checkpointing):
    options = OPTIONS | {"microbatch_tokens": microbatch_tokens}
    options["gradient_checkpointing"] = checkpointing
    groups = make_groups()
    expected, exact = gradient(make_policy(models, name, dtype="float32", **OPTIONS), groups)
    found, rounded = gradient(make_policy(models, name, dtype="bfloat16", **options), groups)
    assert relative(found, expected) < 0.05
    for key in ("loss", "entropy", "mismatch", "grad_norm"):
        assert rounded[key] == pytest.approx(exact[key], rel=0.02), key
    assert rounded["kl"] == 0  # reference and policy round alike


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_weights_for_the_engine_are_the_rounded_master_weights(models, name):
    policy = make_policy(models, name, dtype="bfloat16")
    policy.update(make_groups())
    for (key, given), master in zip(policy.named_weights(), policy.model.parameters(), strict=True):
        assert given.dtype == torch.bfloat16 and master.dtype == torch.float32, key
        assert given.equal(master.detach().bfloat16()), key


@pytest.mark.quick
def test_bfloat16_head_sums_in_float32(models):
    torch.manual_seed(0)
    exact_hidden, exact_weight = torch.randn(200, 32), torch.randn(400, 32) / 4
    targets = torch.randint(0, 400, (200,))

    def run(hidden, weight):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        loss = lambda new, entropy, part: new.sum() + 0.1 * entropy.sum()  # noqa: E731
        total, logprobs = HeadLoss.apply(hidden, weight, targets, 64, loss)
        total.backward()
        return total.detach(), logprobs, hidden.grad, weight.grad

    half = [tensor.bfloat16() for tensor in (exact_hidden, exact_weight)]
    expected = run(*(tensor.float() for tensor in half))  # the same rounded inputs
    found = run(*half)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert (found[1] - expected[1]).abs().max() < 0.06  # logits near 10, eight bits
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-3)
    for given, wanted in zip(found[2:], expected[2:], strict=True):
        assert relative(given.float(), wanted) < 0.01


# --- several ranks


def work_as_rank(models: Path, out: Path) -> None:
    """The gradient with weights sharded over gloo, and with the shards in "host memory"."""
    ranks = Ranks.start()
    found = {}
    for name in MODELS:
        for offload in (False, True):
            options = OPTIONS | {"offload_optimizer": offload, "gradient_checkpointing": True}
            policy = make_policy(models, name, ranks, dtype="bfloat16", **options)
            found[name, offload] = gradient(policy, ranks.deal(make_groups()))
            given = {tensor.dtype for _, tensor in policy.named_weights()}
            assert given == {torch.bfloat16}
    if ranks.rank == 0:
        torch.save(found, out / "bfloat16.pt")
    ranks.stop()


@pytest.mark.slow
def test_bfloat16_on_two_ranks_is_that_of_one(models, tmp_path):
    done = processes.run(__file__, models, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    for (name, _), (found, metrics) in torch.load(tmp_path / "bfloat16.pt").items():
        exact, _ = gradient(make_policy(models, name, dtype="float32", **OPTIONS), make_groups())
        alone, same = gradient(
            make_policy(models, name, dtype="bfloat16", **OPTIONS), make_groups()
        )
        assert relative(found, exact) < 0.05
        assert relative(found, alone) < 0.05
        assert metrics["grad_norm"] == pytest.approx(same["grad_norm"], rel=0.01)
        assert metrics["loss"] == pytest.approx(same["loss"], rel=0.01)


if __name__ == "__main__":
    work_as_rank(Path(sys.argv[1]), Path(sys.argv[2]))
