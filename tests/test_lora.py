"""LoRA: what an adapter learns by definition, that the frozen model is the reference, and that
engine, export and checkpoints get what was trained. Run by torchrun, this file is also the worker
of its test with ranks.
"""

import json
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from engines import GREEDY, engine_config, prompts, run
from policies import (
    adam_policy,
    change,
    config,
    make_groups,
    make_policy,
    relative,
    save_models,
    weights,
)
from small_runs import metrics, run_small
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import train
from deepresearcher_min import architecture
from deepresearcher_min.config import ConfigError
from deepresearcher_min.engine import HFEngine
from deepresearcher_min.grpo import pack, training_rows
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
PRECISE = ["float32", "bfloat16"]
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def scored(policy: Policy, scorer, groups) -> torch.Tensor:
    rows = [row for group in groups for row in training_rows(group)]
    return policy.score(scorer, pack(rows))


def adapted(policy: Policy) -> dict:
    """Name of a weight -> its layer."""
    names = [
        name for name, _ in policy.model.named_parameters() if name.endswith("base_layer.weight")
    ]
    return {
        name.replace(".base_layer", ""): policy.model.get_submodule(
            name[: -len(".base_layer.weight")]
        )
        for name in names
    }


def factors(layer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


# --- one step, by definition


@pytest.mark.slow
def test_one_step_moves_the_weights_along_the_gradient(models, monkeypatch):
    """W + s B A with B = 0: dL/dB = s G A^T, so B = -lr s G A^T after a step, and W moves by
    -lr s^2 G A^T A, which is -lr s^2 G where A is square and orthogonal.
    """
    monkeypatch.setattr(architecture, "LORA_ALPHA", 48)
    rate, rank, scale, groups = 0.25, 32, 1.5, make_groups()
    full = make_policy(models, lr=rate)
    before = weights(full)
    full.update(groups)
    gradients = {name: (before[name] - after) / rate for name, after in weights(full).items()}
    policy = make_policy(models, lr=rate, lora_rank=rank)
    layers = adapted(policy)
    assert len(layers) == 2 * 7
    for layer in layers.values():
        torch.nn.init.orthogonal_(factors(layer)[0].data)
    for _, batches, total in policy.prepare(groups):
        for batch in batches:
            policy.backward(batch, total)
    square = 0
    for name, layer in layers.items():
        factor_A, factor_B = factors(layer)
        assert relative(factor_B.grad, scale * gradients[name] @ factor_A.T) < 1e-6, name
        assert not factor_A.grad.any(), name  # B = 0
    policy.step()
    for name, after in weights(policy).items():
        moved = after - before[name]
        if name not in layers:
            assert not moved.any(), name
            continue
        factor_A, _ = factors(layers[name])
        expected = -rate * scale**2 * gradients[name]
        assert relative(moved, expected @ factor_A.T @ factor_A) < 1e-6, name
        if factor_A.shape[0] == factor_A.shape[1]:
            assert relative(moved, expected) < 1e-6, name
            square += 1
    assert square == 2 * 6


# --- the reference


@pytest.mark.quick
@pytest.mark.parametrize("dtype", PRECISE)
def test_the_reference_is_the_start_model_to_the_last_bit(models, dtype):
    groups = make_groups()
    policy = make_policy(models, dtype=dtype, lora_rank=8, lr=0.5)
    start = scored(policy, policy.scorer, groups)  # B = 0
    assert policy.update(groups)["kl"] == 0
    assert policy.update(groups)["kl"] > 0
    assert scored(policy, policy.reference, groups).equal(start)
    assert not scored(policy, policy.scorer, groups).equal(start)  # the adapters are on again
    if dtype == "float32":
        plain = make_policy(models, dtype=dtype)
        assert scored(plain, plain.reference, groups).equal(start)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", PRECISE)
def test_the_base_is_frozen_in_the_compute_type_and_adapters_are_float32(models, dtype):
    policy = adam_policy(models, dtype=dtype, lora_rank=8)
    policy.update(make_groups(4))
    start = AutoModelForCausalLM.from_pretrained(models / "qwen2", dtype=dtype)
    kept = dict(start.named_parameters())
    for name, parameter in policy.model.named_parameters():
        trained = ".lora_" in name
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else getattr(torch, dtype)), name
        if not trained:
            assert parameter.equal(kept[name.replace(".base_layer", "")]), name
    assert policy.optimizer.state.keys() == set(policy.trained.values())


# --- what the engine and the folders get


@pytest.mark.quick
def test_weights_of_the_engine_do_not_drift(tmp_path):
    """Away and back a hundred times, in bfloat16: the start model's weights, to the last bit."""
    from engines import random_model

    random_model("qwen2", 0).to(torch.bfloat16).save_pretrained(tmp_path)
    policy = Policy(config(dtype="bfloat16", lora_rank=8), str(tmp_path), Ranks(), tried=True)
    engine = HFEngine(engine_config(dtype="bfloat16"), str(tmp_path))
    start = {name: tensor.clone() for name, tensor in engine.model.named_parameters()}
    layers = adapted(policy)
    for layer in layers.values():
        torch.nn.init.normal_(factors(layer)[1].data, 0.0, 0.1)
    kept = [factors(layer)[1].data.clone() for layer in layers.values()]
    engine.update_weights(policy.named_weights())
    first = {name: tensor.clone() for name, tensor in engine.model.named_parameters()}
    assert not any(first[name].equal(start[name]) for name in layers)
    for name, layer in layers.items():
        factor_A, factor_B = (factor.double() for factor in factors(layer))
        exact = start[name].double() + 4.0 * factor_B @ factor_A  # alpha / rank
        assert ((first[name] - exact).abs() <= exact.abs() / 256 + 1e-6).all(), name
    for _ in range(100):
        for layer in layers.values():
            factors(layer)[1].data.zero_()
        engine.update_weights(policy.named_weights())
        for layer, factor_B in zip(layers.values(), kept, strict=True):
            factors(layer)[1].data.copy_(factor_B)
    assert all(tensor.equal(start[name]) for name, tensor in engine.model.named_parameters())
    engine.update_weights(policy.named_weights())
    assert all(tensor.equal(first[name]) for name, tensor in engine.model.named_parameters())
    assert run(engine, prompts(2, seed=1), GREEDY)


def save_random(name: str, folder: Path) -> None:
    own = AutoConfig.for_model(name, **SIZES)
    AutoModelForCausalLM.from_config(own).save_pretrained(folder / name)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])  # gpt2's layers keep W transposed
def test_the_engine_gets_the_model_that_was_trained(models, tmp_path, name):
    if name == "gpt2":
        models = tmp_path
        save_random(name, models)
    groups = make_groups(2)
    policy = make_policy(models, name, lora_rank=8, lr=0.1)
    start = scored(policy, policy.scorer, groups)
    for _ in range(2):  # A learns once B is no longer zero
        policy.update(groups)
    trained = scored(policy, policy.scorer, groups)
    assert (trained - start).abs().max() > 1e-6
    plain = make_policy(models, name)
    parameters = dict(plain.model.named_parameters())
    for key, tensor in policy.named_weights():
        parameters.pop(key).data.copy_(tensor)
    assert not parameters
    assert (scored(plain, plain.scorer, groups) - trained).abs().max() < 1e-12


@pytest.mark.quick
def test_experts_are_refused(tmp_path):
    save_random("mixtral", tmp_path)
    with pytest.raises(ConfigError, match=r"^lora_rank=8: must be 0 for a model with experts$"):
        make_policy(tmp_path, "mixtral", dtype="float32", lora_rank=8)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", PRECISE)
def test_the_adapter_on_the_start_model_is_the_merged_model(models, tmp_path, dtype):
    from peft import PeftModel

    policy = make_policy(models, "llama", dtype=dtype, lora_rank=8, lr=0.1)
    for _ in range(2):
        policy.update(make_groups(2))
    policy.export(tmp_path / "out", TOKENIZER)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == getattr(torch, dtype)
    base = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=dtype).float()
    both = PeftModel.from_pretrained(base, tmp_path / "out/adapter").merge_and_unload()
    given = weights(policy)
    changed = 0
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-22
    for (name, one), other in zip(merged.named_parameters(), both.parameters(), strict=True):
        start = policy.model.state_dict().get(name.replace(".weight", ".base_layer.weight"))
        assert ((one - other).abs() <= 2 * rounding * other.abs() + 1e-8).all(), name
        assert one.equal(given[name]), name
        changed += start is not None and not one.equal(start)
    assert changed == 2 * 7
    settings = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 32)
    assert settings["base_model_name_or_path"] == str(models / "llama")


# --- checkpoints


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapters_and_goes_on_bit_for_bit(models, tmp_path):
    groups = [make_groups(4, seed=seed) for seed in range(4)]
    torch.manual_seed(1)
    policy = adam_policy(models, lora_rank=8)
    for step in range(2):
        policy.update(groups[step])
    policy.save(tmp_path / "state")
    held = dcp.FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    assert {key.removeprefix("model.") for key in held if key.startswith("model.")} == {
        name for name, _ in policy.model.named_parameters() if ".lora_" in name
    }
    torch.manual_seed(2)
    loaded = adam_policy(models, lora_rank=8)  # begins with another A
    loaded.load(tmp_path / "state")
    for step in range(2, 4):
        assert loaded.update(groups[step]) == policy.update(groups[step])
    for name, tensor in weights(policy).items():
        assert tensor.equal(weights(loaded)[name]), name


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_only_with_its_own_rank(tmp_path, capsys):
    options = ["--lora_rank=8", "--lr=4e-3", "--kl_coef=0.01"]
    whole = run_small(tmp_path / "whole", *options)
    run_small(tmp_path / "part", *options, "--steps=1")
    for rank in (0, 4):
        assert (
            train.main([f"--resume={tmp_path / 'part'}", f"--lora_rank={rank}", "--steps=2"]) == 2
        )
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        assert f"lora_rank={rank}: " in said and "were written with 8" in said
    assert train.main([f"--resume={tmp_path / 'part'}", "--steps=2"]) == 0
    assert metrics(tmp_path / "part") == whole
    last = "checkpoints/step-000002"
    adapters = [
        tmp_path / run / last / "adapter/adapter_model.safetensors" for run in ("whole", "part")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ("-1", "lora_rank=-1: must be at least 0"),
        ("1.5", "lora_rank='1.5': not a whole number"),
        ("129", "lora_rank=129: must be at most 128, the model's hidden_size"),
    ],
)
def test_a_rank_that_cannot_be_is_one_line(tmp_path, capsys, rank, words):
    assert train.main([f"--lora_rank={rank}", f"--run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.by_hand
def test_the_toy_learns_with_lora(tmp_path):
    """Rank 16 and ten times the preset's lr: greedy F1 .158 -> .997 in 30 steps (seed 0; 101
    CPU-s, 420 s beside other programs on two cores), where training all weights ends at 1.000.
    """
    folder = tmp_path / "run"
    options = ["--preset=toy", "--lora_rank=16", "--lr=4e-3"]
    assert train.main([*options, f"--run_dir={folder}"]) == 0
    assert json.loads((folder / "summary.json").read_text())["after"]["f1"] >= 0.95


# --- several ranks


def work(ranks: Ranks, folder: Path) -> None:
    """Of one rank, in the test below: update, load, save and export together."""
    models, groups, result = folder / "models", make_groups(), {}
    for dtype in ("float64", "bfloat16"):
        torch.manual_seed(5)
        options = {"gradient_checkpointing": True, "offload_optimizer": ranks.world_size > 1}
        policy = make_policy(models, "llama", ranks, dtype=dtype, lora_rank=8, lr=0.3, **options)
        moved = [change(policy, ranks.deal(groups)) for _ in range(3)]
        result[dtype] = (sum(vector for vector, _ in moved), moved[-1][1])
    policy = adam_policy(models, ranks, lora_rank=8)
    policy.load(folder / "state")
    result["loaded"] = weights(policy)
    policy.save(folder / f"again{ranks.world_size}")
    policy.export(folder / f"out{ranks.world_size}", TOKENIZER)
    if ranks.rank == 0:
        torch.save(result, folder / f"result{ranks.world_size}.pt")


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path):
    save_models(tmp_path / "models")
    groups = make_groups()
    single = adam_policy(tmp_path / "models", lora_rank=8)
    single.update(groups)
    single.save(tmp_path / "state")
    work(Ranks(), tmp_path)
    done = processes.run(__file__, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"result{count}.pt") for count in (1, 2))
    for dtype, limit in (("float64", 1e-6), ("bfloat16", 0.05)):
        (expected, known), (found, measured) = one[dtype], two[dtype]
        assert relative(found.double(), expected.double()) < limit
        assert measured.keys() == known.keys()
        assert all(measured[key] == pytest.approx(known[key], rel=limit) for key in known)
        assert known["kl"] > 0
    for name, tensor in weights(single).items():  # saved by one rank, loaded by several
        assert tensor.equal(two["loaded"][name]), name
    adapters = [tmp_path / f"out{count}/adapter/adapter_model.safetensors" for count in (1, 2)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    loaded = adam_policy(tmp_path / "models", lora_rank=8)
    loaded.load(tmp_path / "again2")  # saved by several, loaded by one
    assert loaded.update(groups) == single.update(groups)


if __name__ == "__main__":
    job = Ranks.start()
    place = Path(sys.argv[1])
    make_policy(place / "models", "llama", job)
    assert "peft" not in sys.modules  # only LoRA imports it
    work(job, place)
    job.stop()
