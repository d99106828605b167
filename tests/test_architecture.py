"""Architectures that our code computes exactly start; others are refused by the part that would get
them wrong.
"""

import dataclasses

import pytest
import torch
from engines import engine_config
from policies import config as update_config
from policies import logprobs, make_groups, make_policy
from transformers import AutoConfig, AutoModelForCausalLM

from deepresearcher_min.engine import HFEngine
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks

pytestmark = pytest.mark.quick
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=None,
    eos_token_id=None,
    bos_token_id=None,
)
UNCAPPED = dict(final_logit_softcapping=None, attn_logit_softcapping=None)
SLIDING, FULL = "sliding_attention", "full_attention"
DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
CASES = [  # architecture, settings, does the update compute it, does HFEngine; max_model_len is 256
    ("llama", {}, True, True),
    ("qwen2", {}, True, True),
    ("qwen3", {"head_dim": 16}, True, True),
    ("mistral", {"sliding_window": 256}, True, True),
    ("mistral", {"sliding_window": 4096}, True, True),
    ("mistral", {"sliding_window": 200}, False, False),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
        False,
        False,
    ),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 40}, True, True),
    (
        "qwen3",
        {"layer_types": [FULL, SLIDING], "use_sliding_window": True, "sliding_window": 16},
        False,
        False,
    ),
    ("phi3", {"sliding_window": 128}, False, False),
    ("starcoder2", {"sliding_window": 100}, False, False),
    ("gemma2", UNCAPPED | {"sliding_window": 300, "head_dim": 16}, True, True),
    ("gemma2", UNCAPPED | {"sliding_window": 60, "head_dim": 16}, False, False),
    ("gemma2", UNCAPPED | {"attn_logit_softcapping": 50.0, "head_dim": 16}, False, False),
    ("gemma2", UNCAPPED | {"final_logit_softcapping": 30.0, "head_dim": 16}, False, True),
    (
        "gemma3_text",
        {"layer_types": [SLIDING, FULL], "sliding_window": 32, "head_dim": 16},
        False,
        False,
    ),
    ("llama4_text", {"attention_chunk_size": 64, "head_dim": 16}, False, False),
    ("granite", {"logits_scaling": 8.0}, False, True),
    ("granite", {"logits_scaling": 1.0, "attention_multiplier": 0.3}, True, True),
    ("cohere", {"logit_scale": 0.0625}, False, True),
    ("phi", {}, False, True),
    ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, False, False),
    ("bloom", {"n_layer": 2, "n_head": 4}, False, False),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 100}, False, False),
    # Its dropout must be off.
    ("gpt2", {"n_positions": 256, "resid_pdrop": 0.1, "num_key_value_heads": 4}, True, True),
    ("gpt_neox", {"num_key_value_heads": 4}, True, True),
    ("olmo2", {}, True, True),
    ("mixtral", {"num_local_experts": 4}, True, True),
    (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        True,
        True,
    ),
]


def name_of(case) -> str:
    return f"{case[0]}-{'-'.join(case[1]) or 'plain'}" if isinstance(case, tuple) else ""


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_not_computed_exactly_is_refused(tmp_path, case):
    kind, settings, update_works, engine_works = case
    config = AutoConfig.for_model(kind, **SIZES | settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    parts = {
        "the update": (
            update_works,
            lambda: Policy(update_config(max_model_len=256), str(tmp_path), Ranks()),
        ),
        "engine=hf": (engine_works, lambda: HFEngine(engine_config(), str(tmp_path))),
    }
    for name, (works, start) in parts.items():
        if works:
            start()
            continue
        with pytest.raises(ValueError) as caught:
            start()
        message = str(caught.value)
        assert message.startswith(
            f"model='{tmp_path}': {name} does not compute {kind} models exactly: "
        )
        assert "\n" not in message
    assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize("engine", ["VLLMEngine", "HFEngine"])
def test_an_engine_with_another_model_is_found_before_the_weights_move(models, engine):
    groups = make_groups()  # their log-probabilities are made up
    policy = make_policy(models)
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    with pytest.raises(
        ValueError, match=rf"engine={engine}: .* by \d\.?\d* nats .*limit 0\.001 for dtype=float64"
    ):
        policy.update(groups, engine)
    assert all(tensor.equal(before[name]) for name, tensor in policy.named_weights())


def test_the_engine_is_held_against_the_policy_in_the_first_update_only(models):
    policy, exact = make_policy(models), []
    for group in make_groups():
        trajectories = []
        for one, found in zip(
            group.trajectories, logprobs(policy, group.trajectories), strict=True
        ):
            known = one.logprobs.copy()
            known[one.sampled_mask] = found
            trajectories.append(dataclasses.replace(one, logprobs=known))
        exact.append(dataclasses.replace(group, trajectories=trajectories))
    assert policy.update(exact, "VLLMEngine")["mismatch"] < 1e-6
    # Later the policy may have moved away.
    assert policy.update(make_groups(), "VLLMEngine")["mismatch"] > 0.1
