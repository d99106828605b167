"""A model: its packed attention in the update, its folder, and whether our code computes it exactly
as the model itself does.

The last is tried on a small copy before a run starts. The update has its own packing, attention and
output head, HFEngine its own attention and cache. They leave out what few architectures have:
scaled, biased or capped heads, sliding windows, attention sinks, alibi. No list of names could be
complete. So a copy of the architecture (few layers, narrow, random weights, biases included) runs
through the same code, and its log-probabilities must be those of the copy under its own attention
and head. Any number in the model's config may turn out to be a window: the longest sequence is
longer than all of them, as far as max_model_len allows.
"""

import copy
import functools
import math
import os
import re
import tempfile
from contextlib import suppress
from itertools import accumulate

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig

from deepresearcher_min.config import ConfigError, load_config

# --- attention


def attend(_, query, key, value, mask, lengths, prefix_of, scaling, **rest):
    """Causal attention inside each segment and to its prefix: [1, heads, T, head_dim] -> [1, T,
    heads, head_dim]; no attention weights.

    Half precision on a GPU: one launch for all segments; elsewhere one for each.
    """
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    # The rotation for positions leaves queries and keys in float32, and the attention that
    # causal_lower_right dispatches to runs before autocast would cast them.
    queries = query.to(value.dtype).split(lengths, dim=2)
    keys = seen(key.to(value.dtype).split(lengths, dim=2), prefix_of)
    values = seen(value.split(lengths, dim=2), prefix_of)
    if takes_varlen(value):
        q, begin_q, longest_q = joined(queries)
        k, begin_k, longest_k = joined(keys)
        v, _, _ = joined(values)
        # The window: all keys before, none behind; aligned at the last one.
        options["window_size"] = (-1, 0)
        mixed_THd = varlen_attn(q, k, v, begin_q, begin_k, longest_q, longest_k, **options)
        return mixed_THd[None], None
    mixed = []
    for q, k, v in zip(queries, keys, values, strict=True):
        bias = causal_lower_right(q.shape[2], k.shape[2])  # the last query sees the last key
        mixed.append(scaled_dot_product_attention(q, k, v, bias, **options))
    return torch.cat(mixed, dim=2).transpose(1, 2), None


# transformers builds no [T, T] mask for an attention that it does not know.
AttentionInterface.register("packed", attend)


def seen(segments, prefix_of):
    """What each segment's queries may look at of keys or values: its prefix's, then its own.

    One by one: the order of operations is also the order in which autograd adds their gradients.
    """
    for i, own in enumerate(segments):
        yield torch.cat([segments[prefix_of[i]], own], dim=2) if i in prefix_of else own


def takes_varlen(value):
    """Whether FlashAttention's kernel behind varlen_attn is made for these (never run by us)."""
    head_dim = value.shape[3]
    half = value.is_cuda and value.dtype == torch.bfloat16
    return half and head_dim % 8 == 0 and head_dim <= 256


def joined(segments):
    """Segments [1, heads, n, head_dim] as varlen_attn takes them: their tokens [sum of n, heads,
    head_dim], where in those each begins (and the last ends), and the longest n.
    """
    parts = list(segments)
    lengths = [part.shape[2] for part in parts]
    begin = parts[0].new_tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return torch.cat(parts, dim=2)[0].transpose(0, 1), begin, max(lengths)


# --- a model, its folder and its device

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a model on the hub


def fetch_model(model, ranks):
    """Download a hub's model once on each node, with a bar; the other ranks wait. ConfigError where
    it cannot be had. Left out: weights in other formats than safetensors.
    """
    if os.path.isfile(f"{model}/config.json"):
        return
    if os.path.exists(model):
        problem = "this is not the folder of a model: there is no config.json in it"
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        problem = "there is no such folder; name a chat model with --model=DIR"
    else:
        problem = max(ranks.gather([download(model)]))  # that of any rank: "" is the smallest
    if problem:
        raise ConfigError(f"model={model!r}: {problem}")


def download(model):
    """Bring a model into the hub's cache, by a node's first rank; what keeps it from there."""
    # Here: it takes a while, and only this needs it.
    from huggingface_hub import model_info, snapshot_download, utils

    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # A download would wait for its first answer without end; this for 10 s.
            model_info(model, timeout=10.0)
            utils.enable_progress_bars()
            snapshot_download(model, allow_patterns=MODEL_FILES)
        return ""
    # Its own errors, those of its HTTP client and of the disk have no other class in common.
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        with suppress(OSError, ValueError):
            snapshot_download(model, allow_patterns=MODEL_FILES, local_files_only=True)
            return ""
        return f"no folder here, and the hub cannot give it: {cause}; try --model=DIR"
    finally:
        utils.disable_progress_bars()


def declared_ends(model):
    """The end tokens of a model's generation config; none if it has no such file."""
    try:
        found = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return []
    return [found] if isinstance(found, int) else found or []


def missing_gpu():
    """Why there is none, by PyTorch's words: no GPU, an old driver, a build for CPUs. Or ""."""
    try:
        if not torch.cuda.is_available():
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"there is no CUDA GPU that PyTorch can use ({str(error).split('. ')[0]})"
    return ""


def load_model(folder, dtype, attention):
    """The model with this attention; ValueError for weights that transformers would make up, or
    could not place.
    """
    # cuDNN's attention plans every new shape anew, hundreds of milliseconds each. Never run by us
    # on a GPU.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = [*found["missing_keys"], *found["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights are missing or have other shapes than the model, "
            f"first {wrong[0]}"
        )
    return model


LORA_ALPHA = 32  # B A counts alpha / rank times: the best learning rate hardly depends on the rank


def add_adapters(model, rank, dtype):
    """LoRA (arXiv 2106.09685): freeze the model; every linear layer but the head is W + alpha/rank
    B A from now on, B = 0 at first, with factors of this type. ConfigError for a rank above the
    model's width, and for experts, which peft adapts another way.
    """
    from peft import LoraConfig  # here: nothing else needs it

    most = model.config.get_text_config().hidden_size
    if rank > most:
        raise ConfigError(f"lora_rank={rank}: must be at most {most}, the model's hidden_size")
    settings = LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model.add_adapter(settings)
    if settings.target_parameters:
        raise ConfigError(f"lora_rank={rank}: must be 0 for a model with experts")
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)
            # Autocast would keep a copy of this cast input, beside the input itself.
            layer.cast_input_dtype_enabled = False


def full_weights(model, device, dtype):
    """Pairs: a model's weights under their Hugging Face names on this device, one by one, gathered
    from all ranks. With adapters W + alpha/rank B A, from float32 factors every time: merged in
    place, weights would drift.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        # a shard is cast before it is gathered
        weight = whole(parameter, device, dtype)
        path, adapted, _ = name.rpartition(".base_layer.weight")
        if adapted:
            layer = model.get_submodule(path)
            factor_B = whole(layer.lora_B.default.weight, device)
            factor_A = whole(layer.lora_A.default.weight, device)
            change = layer.scaling["default"] * factor_B @ factor_A
            if layer.fan_in_fan_out:  # GPT-2's layers keep W transposed
                change = change.T
            weight = (weight + change).to(dtype)
        yield name.replace(".base_layer.", "."), weight


def whole(tensor, device=None, dtype=None):
    """The values of a tensor, also of one of which FSDP keeps a shard on each rank, gathered on
    this device.
    """
    tensor = tensor.detach().to(device, dtype)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_settings(model, dtype, tokenizer, folder):
    """All of a model's folder but the weights, which are of this type; of sampling values that
    contradict each other, none.
    """
    config = copy.copy(model.config)
    config.dtype = dtype
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # many published ones; save_pretrained would refuse them
        values = generation.to_dict()
        ids = {key: values[key] for key in values if key.endswith("_token_id")}
        generation = GenerationConfig(**ids)
    for part in (config, generation, tokenizer):
        part.save_pretrained(folder)


def key_shape(config):
    """(layers, heads of the keys, width of a head)"""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, kv_heads, head_dim


# --- the trial

LIMIT = 3e-4  # nats; in float32 what is exact differs by up to 2e-5 here
SHORT = 32  # tokens of the first trial
SMALL = {  # what the copy has of each; what an architecture does not know, it does not read
    "vocab_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size_mlp": 64,
}
WIDTHS = {*SMALL, "hidden_size", "num_key_value_heads", "head_dim"}  # no windows


@functools.cache  # a folder is tried once in a process
def check_architecture(part, trial, model_dir, max_model_len):
    """ValueError where `trial`, which runs `part` of our code, does not compute this architecture
    exactly: in a short sequence, and in one that is longer than any window below max_model_len, if
    there may be one.
    """
    own = AutoConfig.from_pretrained(model_dir)
    longest = 0
    numbers = r'"(\w+)(?<!_token_id)": (\d+)[,\s]'
    for name, text in re.findall(numbers, own.to_json_string(use_diff=False)):
        number = int(text)
        if number < max_model_len and name not in WIDTHS:
            longest = max(longest, number)
    lengths = [SHORT]
    if longest >= SHORT:
        lengths.append(min(longest + 64, max_model_len))  # where windows have an effect
    for length in lengths:
        try:
            off = difference(trial, copy.deepcopy(own), length)
            why = f"log-probabilities of {length} tokens differ by {off:.2g} nats (limit {LIMIT:g})"
        # whatever an architecture raises that our code or this copy is not made for
        except Exception as error:
            off = math.inf
            why = f"{type(error).__name__} at {length} tokens: {' '.join(str(error).split()):.200}"
        if not off < LIMIT:
            remedy = "; a lower max_model_len may avoid it" if length > SHORT else ""
            raise ValueError(
                f"model={model_dir!r}: {part} does not compute {own.model_type} models exactly: "
                f"{why}{remedy}"
            )


@torch.no_grad()
def difference(trial, architecture, length):
    """How far the trial is from the model's own attention and head [nats]. Two sequences that begin
    alike, random weights.

    trial: (config, folder of the copy, prompts) -> for each, token ids and log-probabilities of the
    last of them. The ids begin with the prompt's, of which the last eight may be others.
    """
    config = load_config(
        [
            "--preset=toy",
            "--kl_coef=0",
            "--max_in_flight=2",
            "--max_turn_tokens=1",
            f"--max_model_len={length}",
        ]
    )
    differences = []
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = small_copy(architecture, length)
        model.should_save_on_this_rank = lambda _: True  # every rank has a folder of its own
        model.save_pretrained(folder)
        first, second = torch.randint(3, SMALL["vocab_size"], (2, length)).tolist()
        prompts = [first, first[:4] + second[4:20]]
        for ids, logprobs in trial(config, folder, prompts):
            count = len(logprobs)
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -count - 1 : -1]
            losses = cross_entropy(logits, torch.tensor(ids[-count:]), reduction="none")
            differences.append(logprobs + losses)
    return torch.cat(differences).abs().max()


def small_copy(config, length):
    """A narrow model of this architecture with random weights on the CPU, and the first layers
    only: at least two, and one of each kind. Its own attention suits the length.
    """
    text = config.get_text_config()
    # The width of a head is kept: rotary settings may be made for it.
    layers, kv_heads, head_dim = key_shape(config)
    kv_heads = 4 if kv_heads == text.num_attention_heads else 2
    changes = {"head_dim": head_dim, "hidden_size": 4 * head_dim, "num_key_value_heads": kv_heads}
    kept = 2
    by_layer = []
    for name, value in text.to_dict().items():
        if name.endswith("_token_id"):
            changes[name] = None
        if isinstance(value, list) and len(value) == layers:
            by_layer.append(name)
            kinds = set(value)
            if len(kinds) < len(value) or isinstance(value[0], str):  # kinds, not numbers
                kept = max(kept, *(value.index(kind) + 1 for kind in kinds))
    for name in by_layer:
        changes[name] = getattr(text, name)[:kept]
    changes["num_hidden_layers"] = min(layers, kept)
    text.update(SMALL | changes)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        # The default, sdpa, never holds all attention weights, as eager does, but lacks
        # soft-capping.
        attn_implementation="eager" if length == SHORT else None,
    ).eval()
    # Biases and sinks are zero in a new model, which would hide them. Sharp attention shows caps
    # and windows, and a head that is not sharp gives no token a probability near one, at which
    # nothing could be seen.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 4 / parameter.shape[-1] ** 0.5)
        else:
            parameter.normal_(0.5, 0.5)
    model.get_output_embeddings().weight.mul_(0.2)
    return model
