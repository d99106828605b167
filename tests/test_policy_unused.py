"""A model with a part that no text passes (the eyes of one that sees): it is trained, saved and
gone on with.
"""

import pytest
import torch
from policies import SIZES, config, make_groups
from transformers import AutoModelForCausalLM, Gemma3Config

from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks

pytestmark = pytest.mark.quick


def test_eyes_stay_as_they_are_and_checkpoints_hold_them(tmp_path):
    eyes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    eyes |= {"image_size": 28, "patch_size": 14}
    words = SIZES | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=words, vision_config=eyes))
    model.save_pretrained(tmp_path / "model")
    settings = config(weight_decay=0.5, lr=0.01)
    policy = Policy(settings, str(tmp_path / "model"), Ranks(), tried=True)
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    groups = make_groups(2)
    policy.update(groups)
    changed = {
        name for name, tensor in policy.named_weights() if not torch.equal(tensor, before[name])
    }
    assert changed and all("language_model" in name for name in changed)
    policy.save(tmp_path / "state")
    again = Policy(settings, str(tmp_path / "model"), Ranks(), tried=True)
    again.load(tmp_path / "state")
    policy.update(groups)
    again.update(groups)
    for (name, one), (_, other) in zip(policy.named_weights(), again.named_weights(), strict=True):
        assert torch.equal(one, other), name
