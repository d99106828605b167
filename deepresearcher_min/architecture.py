"""Does our code compute a model exactly as the model itself does? Tried on a small copy before a
run starts.

The update has its own packing, attention and output head, HFEngine its own attention and cache.
They leave out what few architectures have: scaled, biased or capped heads, sliding windows,
attention sinks, alibi. No list of names could be complete. So a copy of the architecture (few
layers, narrow, random weights, biases included) runs through the same code, and its
log-probabilities must be those of the copy under its own attention and head. Any number in the
model's config may turn out to be a window: the longest sequence is longer than all of them, as far
as max_model_len allows.
"""

import copy
import functools
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deepresearcher_min.config import Config, load_config

# (config, folder of the copy, prompts) -> for each, token ids and log-probabilities of the last of
# them. Of a prompt of n tokens, at least n - 8 come back.
Trial = Callable[[Config, str, list[list[int]]], list[tuple[list[int], Tensor]]]

LIMIT = 3e-4  # nats; in float32 what is exact differs by up to 2e-5 here
SHORT = 32  # tokens of the first trial
MARGIN = 64  # tokens behind the longest window
HEADS, VOCABULARY, INNER = 4, 64, 64
INNERS = (
    "intermediate_size moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp"
)
WIDTHS = "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim " + INNERS


def load_model(folder: str, dtype: Any, attention: str) -> nn.Module:
    """The model with this attention; ValueError for weights that transformers would make up, or
    could not place.
    """
    # cuDNN's attention plans every new shape anew, hundreds of milliseconds each. Never run by us
    # on a GPU.
    torch.backends.cuda.enable_cudnn_sdp(False)
    told = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    options = {"dtype": dtype, "attn_implementation": attention, **told}
    model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
    wrong = [*found["missing_keys"], *found["mismatched_keys"]]
    if wrong:
        what = "weights are missing or have other shapes than the model"
        raise ValueError(f"{len(wrong)} {what}, first {wrong[0]}")
    return model


def key_shape(config: Any) -> tuple[int, int, int]:
    """(layers, heads of the keys, width of a head)"""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, kv_heads, head_dim


def check_architecture(part: str, trial: Trial, model_dir: str, max_model_len: int) -> None:
    """ValueError where `trial`, which runs `part` of our code, does not compute this architecture
    exactly.
    """
    own = AutoConfig.from_pretrained(model_dir)
    kind: Any = type(own)
    what = difference(trial, kind, own.to_json_string(use_diff=False), max_model_len)
    if what:
        raise ValueError(
            f"model={model_dir!r}: {part} does not compute {own.model_type} models exactly: {what}"
        )


@functools.cache  # an architecture is tried once in a process
def difference(trial: Trial, kind: Any, architecture: str, max_model_len: int) -> str:
    """What differs between the trial and the model's own computation, in words; "" where nothing
    does.
    """
    for length in trial_lengths(architecture, max_model_len):
        config = replace(
            load_config(["--preset=toy", "--kl_coef=0", "--max_in_flight=2"]), max_model_len=length
        )
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            try:
                model = small_copy(kind.from_dict(json.loads(architecture)), length)
                model.should_save_on_this_rank = lambda _: (
                    True
                )  # every rank has a folder of its own
                model.save_pretrained(folder)
                first, second = torch.randint(3, VOCABULARY, (2, length)).tolist()
                off = 0.0
                for ids, found in trial(
                    config, folder, [first, first[:4] + second[4:20]]
                ):  # they begin alike
                    off = max(
                        off, float((own_logprobs(model, ids, len(found)) - found).abs().max())
                    )
            # whatever an architecture raises that our code or this copy is not made for
            except Exception as error:
                return f"{type(error).__name__} at {length} tokens: {' '.join(str(error).split())[:200]}"
        if not off < LIMIT:
            remedy = "; a lower max_model_len may avoid it" if length > SHORT else ""
            return f"log-probabilities of {length} tokens differ by {off:.2g} nats (limit {LIMIT:g}){remedy}"
    return ""


def trial_lengths(architecture: str, max_model_len: int) -> list[int]:
    """A short sequence, and one that is longer than any window below max_model_len, if there may be
    one.
    """
    short, longest = max(20, min(SHORT, max_model_len)), 0
    for name, number in re.findall(r'"(\w+)": (\d+)[,\s]', architecture):
        if (
            int(number) < max_model_len
            and name not in WIDTHS.split()
            and not name.endswith("_token_id")
        ):
            longest = max(longest, int(number))
    return [short] if longest < short else [short, min(longest + MARGIN, max_model_len)]


def small_copy(config: Any, length: int) -> PreTrainedModel:
    """A narrow model of this architecture with random weights on the CPU; its own attention suits
    the length.
    """
    *_, own = key_shape(config)
    try:
        model = build(copy.deepcopy(config), 16)
        own_logprobs(model, [3, 4, 5], 1)
    except (
        RuntimeError,
        ValueError,
        AssertionError,
    ):  # its rotary settings may be made for heads of their own width
        model = build(config, own)
    # Biases and sinks are zero in a new model, which would hide them. Sharp attention shows caps
    # and windows, and a head that is not sharp gives no token a probability near one, at which
    # nothing could be seen.
    for parameter in model.parameters():
        matrix = parameter.dim() > 1
        torch.nn.init.normal_(
            parameter, *((0.0, 4 / parameter.shape[-1] ** 0.5) if matrix else (0.5, 0.5))
        )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    if length > SHORT and model._supports_sdpa:
        model.set_attn_implementation(
            "sdpa"
        )  # never holds all weights, as eager does, but lacks soft-capping
    return model


def build(config: Any, head_dim: int) -> PreTrainedModel:
    """A model with narrow heads, and the first layers only: at least two, and one of each kind."""
    text = config.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None) not in (None, text.num_attention_heads)
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2 if grouped else HEADS}
    sizes |= {"vocab_size": VOCABULARY, "hidden_size": HEADS * head_dim, "head_dim": head_dim}
    changes: dict[str, Any] = sizes | dict.fromkeys(INNERS.split(), INNER)
    kept, lists = 2, dict[str, list]()
    for name, value in text.to_dict().items():
        if name.endswith("_token_id"):
            changes[name] = None
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            lists[name] = value
            if len(set(value)) < len(value) or isinstance(
                value[0], str
            ):  # kinds, not numbers of layers
                kept = max(kept, *(value.index(kind) + 1 for kind in set(value)))
    changes |= {name: value[:kept] for name, value in lists.items()}
    changes["num_hidden_layers"] = min(text.num_hidden_layers, kept)
    for name, value in changes.items():
        if hasattr(text, name):
            setattr(text, name, value)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, token_ids: list[int], count: int) -> Tensor:
    """Log-probabilities of the last `count` tokens by the model's own attention and head."""
    ids = torch.tensor(token_ids)
    logits = model(ids[None], use_cache=False).logits[0, -count - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[-count:, None])[:, 0]
