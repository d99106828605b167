"""Checkpoints of policy.py, and several ranks. Run by torchrun, this file is also their worker
(`work_as_rank`).
"""

import json
import re
import sys
import weakref
from pathlib import Path

import processes
import pytest
import torch
from policies import (
    END,
    MODELS,
    adam_policy,
    change,
    check_against_reference,
    config,
    make_groups,
    make_policy,
    reference_update,
    relative,
    spoil,
    weights,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deepresearcher_min.run import Ranks

# --- saving


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
        assert (
            loaded.update(groups[step]) == policy.update(groups[step]) == plain.update(groups[step])
        )
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
    assert any(
        not tensor.to(start[key].dtype).equal(start[key]) for key, tensor in exported.items()
    )
    assert (tmp_path / "out/tokenizer.json").exists()


# --- several ranks

LIMIT = 1.9  # sequence_mask: leaves out about half of the trajectories


def work_as_rank(models: Path, out: Path, shares: str) -> None:
    """One rank of the tests below: update on a share of the questions, load and save together."""
    ranks = Ranks.start()
    rank, world_size = ranks.rank, ranks.world_size
    groups, counts = make_groups(), json.loads(shares)
    policy = make_policy(models, "llama", ranks)
    if counts == "nan on the last rank":
        if rank == world_size - 1:
            spoil(policy, END, backward=False)
        try:
            policy.update(ranks.deal(groups))
        finally:  # whoever gets here goes on to leave the process group, and waits for the others
            (out / f"rank {rank} left").touch()
    start = sum(counts[:rank])
    moved, metrics = change(policy, groups[start : start + counts[rank]])
    options = {
        "updates_per_rollout": 2,
        "lr": 0.3,
        "gradient_checkpointing": True,
        "offload_optimizer": world_size > 1,
    }
    policy = make_policy(models, "llama", ranks, **options)
    dealt, _ = change(policy, ranks.deal(groups))
    policy = make_policy(models, "llama", ranks, sequence_mask=LIMIT)
    kept, kept_metrics = change(policy, ranks.deal(groups))
    policy = adam_policy(models, ranks)
    policy.load(out / "state1")
    loaded = weights(policy)
    policy.save(out / "again")
    whole: list[
        weakref.ref
    ] = []  # the weights as the engine gets them, gathered: never two at once
    for _, tensor in policy.named_weights():
        whole.append(weakref.ref(tensor))
        assert sum(each() is not None for each in whole) == 1
    if rank == 0:
        torch.save(
            {"moved": moved, "metrics": metrics, "dealt": dealt, "loaded": loaded}
            | {"kept": kept, "kept_metrics": kept_metrics},
            out / "result.pt",
        )
    ranks.stop()


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[5], [3, 2], [0, 5], [1, 0, 4], [2, 2, 1]])
def test_gradient_and_checkpoints_do_not_depend_on_the_ranks(models, tmp_path, shares):
    groups = make_groups()
    single = adam_policy(models)
    single.update(groups)
    single.save(tmp_path / "state1")
    done = processes.run(__file__, models, tmp_path, json.dumps(shares), ranks=len(shares))
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    expected = reference_update(models / "llama", groups, config())
    check_against_reference(result["moved"], result["metrics"], *expected)
    two_updates, _ = reference_update(
        models / "llama", groups, config(updates_per_rollout=2, lr=0.3)
    )
    assert relative(result["dealt"], two_updates) < 1e-6
    expected = reference_update(models / "llama", groups, config(sequence_mask=LIMIT))
    assert 0.2 < expected[1]["masked"] < 0.8
    check_against_reference(result["kept"], result["kept_metrics"], *expected)
    for name, tensor in weights(single).items():  # saved by one rank, loaded by several
        assert tensor.equal(result["loaded"][name]), name
    loaded = adam_policy(models)
    loaded.load(tmp_path / "again")  # saved by several, loaded by one
    assert loaded.update(groups) == single.update(groups)


@pytest.mark.slow
def test_a_rank_with_bad_numbers_ends_the_job_with_their_name(models, tmp_path):
    done = processes.run(__file__, models, tmp_path, json.dumps("nan on the last rank"), ranks=2)
    assert done.returncode != 0
    assert not (tmp_path / "rank 1 left").exists()  # rank 0 does: over gloo it hears of the end
    assert re.search(
        r"FloatingPointError: question 'q\d', trajectory \d: log-probability nan", done.stderr
    )


if __name__ == "__main__":
    work_as_rank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
