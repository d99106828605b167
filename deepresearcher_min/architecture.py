"""Does our code compute a model exactly as the model itself does? Tried on a small copy before a run starts.

The update has its own packing, attention and output head, HFEngine its own attention and cache. They leave out what few
architectures have: scaled, biased or capped heads, sliding windows, attention sinks, alibi. No list of names could be
complete. So a copy of the architecture (few layers, narrow, random weights, biases included) runs through the same
code, and its log-probabilities must be those of the copy under its own attention and head. Any number in the model's
config may turn out to be a window: the longest sequence is longer than all of them, as far as max_model_len allows.
"""

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deepresearcher_min.config import Config, load_config

# (config, folder of the copy, prompts) -> for each, token ids and log-probabilities of the last of them
Trial = Callable[[Config, str, list[list[int]]], list[tuple[list[int], Tensor]]]

LIMIT = 3e-4  # nats; in float32 what is exact differs by up to 2e-5 here
SHORT = 32  # tokens of the first trial
MARGIN = 64  # tokens behind the longest window
VOCABULARY, WIDTH, HEADS, HEAD_DIM = 64, 64, 4, 16
INNER = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
CHANGED = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", *INNER)
# What an unfit architecture raises, on its own or in our code.
FAILURES = (AttributeError, AssertionError, KeyError, IndexError, TypeError, RuntimeError, ValueError, ArithmeticError)


def check_architecture(part: str, trial: Trial, model_dir: str, max_model_len: int) -> None:
    """ValueError where `trial`, which runs `part` of our code, does not compute this architecture exactly."""
    own = AutoConfig.from_pretrained(model_dir)
    kind: Any = type(own)
    what = difference(trial, kind, own.to_json_string(use_diff=False), max_model_len)
    if what:
        raise ValueError(f"model={model_dir}: {part} does not compute {own.model_type} models exactly: {what}")


@functools.cache  # an architecture is tried once in a process
def difference(trial: Trial, kind: Any, architecture: str, max_model_len: int) -> str:
    """What differs between the trial and the model's own computation, in words; "" where nothing does."""
    settings = {"dtype": "float32", "temperature": 1, "kl_coef": 0, "max_in_flight": 2, "max_model_len": max_model_len}
    config = load_config([f"--{key}={value}" for key, value in settings.items()])
    for length in trial_lengths(json.loads(architecture), max_model_len):
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            try:
                model = small_copy(kind.from_dict(json.loads(architecture)), length)
                model.save_pretrained(folder)
                ids = torch.randint(3, VOCABULARY, (2, length)).tolist()
                half = min(length, SHORT) // 2
                tried = trial(
                    config, folder, [ids[0], ids[0][: half // 4] + ids[1][half // 4 : half]]
                )  # they begin alike
                off = max(float((own_logprobs(model, ids, len(found)) - found).abs().max()) for ids, found in tried)
            except FAILURES as error:
                return f"{type(error).__name__} at {length} tokens: {' '.join(str(error).split())[:200]}"
        if not off < LIMIT:
            remedy = "; a lower max_model_len may avoid it" if length > SHORT else ""
            return f"log-probabilities of {length} tokens differ by {off:.2g} nats (limit {LIMIT:g}){remedy}"
    return ""


def trial_lengths(architecture: dict[str, Any], max_model_len: int) -> list[int]:
    """A short sequence, and one that is longer than any window below max_model_len, if there may be one."""
    short = min(SHORT, max_model_len)
    longest = max((n for n in numbers(architecture) if n < max_model_len), default=0)
    return [short] if longest < short else [short, min(longest + MARGIN, max_model_len)]


def numbers(values: dict[str, Any]) -> Iterator[int]:
    """All whole numbers of a config but token ids and the sizes that the copy changes."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value)
        elif type(value) is int and name not in CHANGED and not name.endswith("_token_id"):
            yield value


def small_copy(config: PreTrainedConfig, length: int) -> PreTrainedModel:
    """A model of this architecture with random weights, as narrow as its other settings allow, on the CPU."""
    heads = config.get_text_config().num_attention_heads
    head_dim = getattr(config.get_text_config(), "head_dim", None) or config.get_text_config().hidden_size // heads
    narrow = {"vocab_size": VOCABULARY, "num_attention_heads": HEADS} | dict.fromkeys(INNER, WIDTH)
    tries = (
        narrow | {"head_dim": HEAD_DIM, "hidden_size": HEADS * HEAD_DIM},
        narrow | {"hidden_size": HEADS * head_dim},  # rotary settings may have the head's own width
        {"vocab_size": VOCABULARY},
    )
    for sizes in tries:
        try:
            model = build(copy.deepcopy(config), sizes)
            own_logprobs(model, [3, 4, 5], 1)
            break
        except FAILURES as error:
            failure = error
    else:
        raise failure
    # Biases and sinks are zero in a new model, which would hide them. Sharp attention shows caps and windows, and a
    # head that is not sharp gives no token a probability near one, at which nothing could be seen.
    for parameter in model.parameters():
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
        else:
            torch.nn.init.normal_(parameter, 0.0, 4 / parameter.shape[-1] ** 0.5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    if length > SHORT and model._supports_sdpa:
        model.set_attn_implementation("sdpa")  # never holds all weights, as eager does, but lacks soft-capping
    return model


def build(config: PreTrainedConfig, sizes: dict[str, int]) -> PreTrainedModel:
    """A model with the given sizes, and the first layers only: at least two, and one of each kind."""
    text = config.get_text_config()
    layers, kept = text.num_hidden_layers, 2
    shared = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    values = text.to_dict()
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers}
    for value in lists.values():
        kinds = set(value)
        if len(kinds) < layers or isinstance(value[0], str):  # not the numbers of the layers
            kept = max(kept, *(value.index(kind) + 1 for kind in kinds))
    changes: dict[str, Any] = sizes | {name: value[:kept] for name, value in lists.items()}
    if "num_attention_heads" in sizes:
        changes["num_key_value_heads"] = max(1, HEADS // shared) if shared < HEADS else 1
    changes |= {name: None for name in values if name.endswith("_token_id")}
    text.num_hidden_layers = min(layers, kept)
    for name, value in changes.items():
        if hasattr(text, name):
            setattr(text, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, token_ids: list[int], count: int) -> Tensor:
    """Log-probabilities of the last `count` tokens by the model's own attention and head."""
    ids = torch.tensor(token_ids)
    logits = model(ids[None], use_cache=False).logits[0, -count - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[-count:, None])[:, 0]
