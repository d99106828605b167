"""What a GPU will ask of HFEngine, as far as a CPU can tell: bfloat16, tensors declared on cuda, a
cache that fits, and one line on what was taken. Never run by us on a GPU.
"""

import contextlib
import dataclasses
import importlib.util
import re
import weakref

import numpy as np
import pytest
import torch
from engines import (
    GREEDY,
    counted,
    engine_config,
    prompts,
    random_model,
    reference_logprobs,
    run,
    tokens,
    two_turns,
)
from policies import logprobs as policy_logprobs
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from deepresearcher_min import engine as engine_module
from deepresearcher_min.config import ConfigError
from deepresearcher_min.engine import HFEngine, Sampling, make_engine, missing_gpu
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Question, Trajectory

pytestmark = pytest.mark.quick
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
SAMPLING = Sampling(temperature=1.0, max_tokens=20, seed=3, stop_token_ids=())
OLD_DRIVER = (  # c10/cuda/CUDAFunctions.cpp
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com"
)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model_dir(request, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp(request.param))
    random_model(request.param, seed=1).save_pretrained(path)
    return path


def errors(done, requests, logprobs_of) -> torch.Tensor:
    """How far reported log-probabilities are from those of `logprobs_of(prompt, sampled)`."""
    found = []
    for name, prompt in requests.items():
        completion = done[name]
        expected = logprobs_of(prompt, completion.token_ids)
        found.append((torch.tensor(completion.logprobs) - expected).abs())
    return torch.cat(found)


def test_bfloat16_is_as_near_to_float32_as_the_type_allows(model_dir):
    """A plain forward pass in bfloat16 says what the type costs; the engine may cost no more."""
    engine = HFEngine(engine_config(dtype="bfloat16"), model_dir)
    assert engine.cache.dtype == torch.bfloat16
    requests = prompts(24, seed=200)
    done = run(engine, requests, SAMPLING)
    exact = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)

    def plain(model):
        return lambda prompt, ids: reference_logprobs(model, prompt, ids)[
            range(len(ids)), ids
        ].float()

    of_the_engine = errors(done, requests, plain(exact))
    of_the_type = torch.cat(
        [
            (plain(exact)(prompt, ids) - plain(rounded)(prompt, ids)).abs()
            for prompt, ids in ((prompt, done[name].token_ids) for name, prompt in requests.items())
        ]
    )
    assert 0 < of_the_engine.mean() < 1.25 * of_the_type.mean()
    assert of_the_engine.max() < 2 * of_the_type.max()


def test_bfloat16_engine_and_policy_agree(model_dir):
    """As in a run: the policy's float32 weights go to the engine, which samples in bfloat16; the
    update computes under autocast.
    """
    config = engine_config(dtype="bfloat16", temperature=1.0, kl_coef=0.0)
    policy = Policy(config, model_dir, Ranks())
    engine = HFEngine(config, model_dir)
    engine.update_weights(policy.named_weights())
    requests = prompts(16, seed=210)
    done = run(engine, requests, SAMPLING)
    question, trajectories = Question("q", "text", ("gold",)), []
    for name, prompt in requests.items():
        ids = done[name].token_ids
        mask = [False] * len(prompt) + [True] * len(ids)
        values = [np.nan] * len(prompt) + done[name].logprobs
        trajectories.append(Trajectory(question, prompt + ids, mask, values, (), None, "answer"))
    own = np.concatenate(policy_logprobs(policy, trajectories))
    reported = np.concatenate([t.logprobs[t.sampled_mask] for t in trajectories])
    off = np.abs(own - reported)
    assert 1e-5 < off.mean() < 0.03 and off.max() < 0.3  # nats; bfloat16 has 8 bits


def test_bfloat16_repeats_and_shares_prefixes(model_dir):
    config = engine_config(dtype="bfloat16")
    engine = counted(HFEngine(config, model_dir))
    first = two_turns(engine)
    assert engine.stats["cached_tokens"] > engine.stats["prefill_tokens"]
    assert two_turns(HFEngine(config, model_dir)) == first


# --- tensors declared on cuda: one that is left on the CPU, or of another type, makes an operation
# fail


class WithoutGuards(TorchFunctionMode):
    """Calls the operators behind methods whose Python side looks for the device first, which a
    PyTorch for CPUs lacks.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.copy_:
            return aten.copy_(*args)
        if function is Tensor.__getitem__:
            return item(*args)
        if function is Tensor.__setitem__:
            return aten.copy_(item(*args[:2]), args[2])
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if function is Tensor.to:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            return aten._to_copy(args[0], device=device, dtype=dtype)
        return function(*args, **kwargs)


def item(tensor: Tensor, index) -> Tensor:
    """tensor[index]"""
    parts, dim = index if isinstance(index, tuple) else (index,), 0
    for i, part in enumerate(parts):
        if part is None:
            tensor = aten.unsqueeze(tensor, dim)
        elif part is Ellipsis:
            dim = tensor.dim() - sum(rest is not None for rest in parts[i + 1 :]) - 1
        elif isinstance(part, slice):
            tensor = aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, Tensor):
            tensor = aten.index(tensor, [None] * dim + [part])
        else:
            tensor, dim = aten.select(tensor, dim, part), dim - 1
        dim += 1
    return tensor


@contextlib.contextmanager
def fake_gpu(monkeypatch, free: float = 80e9, total: float = 80e9):
    """torch.cuda says that there is a GPU with so much memory, and its tensors hold no values."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(total)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # What FakeTensorMode would find out by is_available: nothing can be initialised.
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)

    def load(folder, dtype, attention):
        config, kind = AutoConfig.from_pretrained(folder), getattr(torch, dtype)
        options = {"dtype": kind, "attn_implementation": attention}
        with CUDA:
            model = AutoModelForCausalLM.from_config(config, **options)
        model.to = {"cuda": model}.__getitem__  # it is there already; elsewhere it must not go
        return model

    monkeypatch.setattr(engine_module, "load_model", load)
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutGuards():
        yield


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fake_cuda_tensors_pass_a_step(model_dir, monkeypatch, dtype):
    with fake_gpu(monkeypatch), torch.no_grad():
        engine = HFEngine(engine_config(dtype=dtype), model_dir, tried=True)
        kind = getattr(torch, dtype)
        assert (engine.cache.device, engine.cache.dtype) == (CUDA, kind)
        (prompt,) = prompts(1, seed=220, low=40, high=40).values()
        for name, ids in {"a": prompt, "shares": [*prompt, 1, 2], "short": [5]}.items():
            engine.submit(name, ids, SAMPLING)
            engine.admit(name)
        requests = list(engine.running.values())
        for _ in range(2):  # prompts with a copied prefix, then single tokens
            logits = engine.forward(requests)
            assert (logits.shape, logits.device, logits.dtype) == ((3, 150), CUDA, kind)
            sampled, logprobs = engine_module.sample(logits, requests)
            assert (sampled.device, sampled.dtype) == (CUDA, torch.int64)
            assert (logprobs.device, logprobs.dtype) == (CUDA, torch.float32)
            assert sampled.shape == logprobs.shape == (3,)
            for request in requests:
                assert request.append(7, -1.0, engine.max_len) == ""


def test_fake_cuda_weights_arrive_from_the_cpu_and_from_cuda(model_dir, monkeypatch):
    with fake_gpu(monkeypatch):
        engine = HFEngine(engine_config(dtype="bfloat16"), model_dir, tried=True)
        given = []
        for i, (name, parameter) in enumerate(engine.model.named_parameters()):
            given.append((name, torch.zeros(parameter.shape, device="cpu" if i % 2 else CUDA)))
        engine.update_weights(given)
        assert {p.device for p in engine.model.parameters()} == {CUDA}
        assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}


def test_fake_cuda_cache_goes_to_sleep(model_dir, monkeypatch):
    freed = []
    with fake_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
        engine = HFEngine(engine_config(dtype="bfloat16"), model_dir, tried=True)
        shape = engine.cache.shape
        engine.sleep()
        assert freed and not hasattr(engine, "cache")
        engine.wake_up()
        assert engine.cache.shape == shape and engine.cache.device == CUDA


def test_cudnn_s_attention_is_off(model_dir):
    torch.backends.cuda.enable_cudnn_sdp(True)
    engine_module.load_model(model_dir, "float32", "sdpa")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- the size of the cache

# Bytes: layers, keys and values, heads, max_model_len, head_dim, type.
ROW = 2 * 2 * 4 * 256 * 32 * 2


@pytest.mark.parametrize(
    "free, share, kv_tokens, rows",
    [
        (1000 * ROW, 0.5, 0, 24),  # all of max_in_flight
        (506 * ROW, 0.5, 0, 6),  # 494 rows are taken by others, and 500 are to be left free
        (1000 * ROW, 0.01, 0, 10),
        (1000 * ROW, 0.5, 5 * 256 + 1, 5),
        (503 * ROW, 0.5, 5 * 256, 3),  # more than fit
        (1000 * ROW, 0.5, 1, 1),
    ],
)
def test_fake_cuda_rows_that_do_not_fit_are_not_made(
    tmp_path, monkeypatch, free, share, kv_tokens, rows
):
    random_model("qwen2", seed=1).save_pretrained(tmp_path)
    config = engine_config(dtype="bfloat16", engine_memory=share)
    config = dataclasses.replace(config, kv_tokens=kv_tokens)
    with fake_gpu(monkeypatch, free, 1000 * ROW):
        engine = HFEngine(config, str(tmp_path), tried=True)
        assert engine.cache.nbytes == rows * ROW
        assert engine.capacity_tokens == rows * 256
        assert len(engine.idle) == rows


def test_fake_cuda_without_room_for_one_context_is_refused(tmp_path, monkeypatch):
    random_model("qwen2", seed=1).save_pretrained(tmp_path)
    config = dataclasses.replace(engine_config(dtype="bfloat16"), kv_tokens=0, engine_memory=0.5)
    said = r"engine_memory=0\.5: leaves .* GB, and max_model_len=256 needs 0\.00026 GB"
    with (
        fake_gpu(monkeypatch, 500.5 * ROW, 1000 * ROW),
        pytest.raises(ConfigError, match=said),
    ):
        HFEngine(config, str(tmp_path), tried=True)


def test_sleep_frees_the_cache_and_wake_up_makes_an_empty_one(model_dir):
    engine = counted(make_engine(engine_config(engine="hf"), model_dir))
    requests = prompts(5, seed=230)
    before = run(engine, requests, GREEDY)
    cache = weakref.ref(engine.cache)
    engine.sleep()
    assert cache() is None
    engine.wake_up()
    engine.stats.clear()
    assert tokens(run(engine, requests, GREEDY)) == tokens(before)
    fresh = counted(make_engine(engine_config(engine="hf"), model_dir))
    run(fresh, requests, GREEDY)
    assert engine.stats == fresh.stats  # nothing was found in the cache that was not there


# --- which engine, and why


def installed(monkeypatch, vllm: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: vllm or None)


def test_auto_says_what_it_took_and_why(model_dir, monkeypatch, capsys):
    config = engine_config(engine="auto")
    installed(monkeypatch, vllm=False)
    make_engine(config, model_dir)
    assert capsys.readouterr().out == "engine=auto: hf, since vllm is not installed\n"
    installed(monkeypatch, vllm=True)
    make_engine(config, model_dir)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"engine=auto: hf, since there is no CUDA GPU that PyTorch can use \(.+\)", line
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine_module, "VLLMEngine", lambda *given: given)
    assert make_engine(config, model_dir, 2) == (config, model_dir, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "engine=auto: vllm, since vllm and a CUDA GPU are there"


def test_one_rank_speaks_for_all_and_a_choice_of_the_user_needs_no_line(
    model_dir, monkeypatch, capsys
):
    installed(monkeypatch, vllm=False)
    make_engine(engine_config(engine="hf"), model_dir)
    monkeypatch.setenv("RANK", "1")
    make_engine(engine_config(engine="auto"), model_dir)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError(OLD_DRIVER), "driver on your system is too old (found version 12020)"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), "Found no NVIDIA"),
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled with CUDA"),
    ],
)
def test_an_old_driver_is_told_from_no_gpu(monkeypatch, error, said):
    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    line = missing_gpu()
    assert "there is no CUDA GPU" in line and said in line and "http" not in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_gpu() == ""
