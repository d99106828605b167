"""What a GPU would be given, without one: every tensor is declared on cuda (FakeTensorMode), has a
shape, a type and a device, and no values. Whatever mixes devices fails. Left out: what reads values
(the finite checks, the metrics' sums), and autograd's engine, which asks for a real device.
"""

import ctypes
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from policies import config, make_policy, overwrite_parameters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2Config

from deepresearcher_min import architecture, grpo
from deepresearcher_min import policy as policy_module
from deepresearcher_min.grpo import TrainingRow
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks

pytestmark = pytest.mark.quick
GPU = torch.device("cuda", 0)
SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PRECISE = ["float32", "bfloat16"]
TRAINED = [("float32", 0), ("bfloat16", 0), ("bfloat16", 4)]  # dtype, lora_rank


@pytest.fixture
def current_gpu():
    """Many operations set "the current GPU" first, and a torch without cuda has no way to. The CPU
    has one, which does nothing, and that is right where no kernel will run.
    """
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    ways = (ctypes.c_void_p * 2).in_dll(c10, name)  # of the CPU, of cuda
    borrowed = not ways[1]
    if borrowed:
        ways[1] = ways[0]
    yield
    if borrowed:
        ways[1] = None


@pytest.fixture
def fake_gpu(monkeypatch, current_gpu):
    """Tensors without values; torch believes that cuda can be declared."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)

    def load_model(folder, dtype, attention):
        shape = Qwen2Config(**SIZES, attn_implementation=attention)
        with GPU:
            return AutoModelForCausalLM.from_config(shape, dtype=dtype)

    monkeypatch.setattr(policy_module, "load_model", load_model)  # there are no files to read
    monkeypatch.setattr(policy_module, "check_finite", lambda *_: None)
    monkeypatch.setattr(policy_module, "float", lambda value: value, raising=False)
    # Module.to cannot move fake parameters: they are made where they belong.
    monkeypatch.setattr(policy_module.TokenScorer, "to", lambda self, device: self)
    monkeypatch.setattr(torch.nn.Module, "_apply", overwrite_parameters)  # LoRA's factors
    # A CausalBias is a tensor that cannot be fake; this is what it stands for.
    mask = lambda n, m: torch.ones(n, m, dtype=torch.bool, device=GPU).tril(m - n)  # noqa: E731
    monkeypatch.setattr(architecture, "causal_lower_right", mask)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake_policy(dtype: str, **changes) -> Policy:
    settings = config(dtype=dtype, max_grad_norm=1.0, **changes)
    return Policy(settings, "nowhere", Ranks(0, 1, GPU), tried=True)


def rows() -> list[TrainingRow]:
    """A group of two that begin alike, and one that stands alone."""
    found = []
    for name, length, group in (("a", 30, "q"), ("b", 24, "q"), ("c", 20, "")):
        ids = np.arange(length)
        ids[12:] += len(found)
        sampled = np.arange(15, length)
        found.append(TrainingRow(name, ids, sampled, np.zeros(len(sampled)), 0.5, group))
    return found


@pytest.fixture
def fake_gradients(monkeypatch):
    """In place of autograd's engine: gradients with the shape, type and device they must have."""
    grad = lambda value, inputs, **_: tuple(map(torch.empty_like, inputs))  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", grad)


def test_fake_packing_is_on_the_gpu(fake_gpu):
    batch = grpo.pack(rows(), GPU)
    for name, kind in (
        ("token_ids_T", torch.int64),
        ("position_ids_T", torch.int64),
        ("predict_S", torch.int64),
        ("targets_S", torch.int64),
        ("rollout_S", torch.float32),
        ("advantages_S", torch.float32),
    ):
        tensor = getattr(batch, name)
        assert (tensor.device, tensor.dtype) == (GPU, kind), name


@pytest.mark.parametrize(("dtype", "lora_rank"), TRAINED)
def test_fake_scores_and_losses_stay_on_the_gpu_in_float32(
    fake_gpu, fake_gradients, dtype, lora_rank
):
    policy = fake_policy(dtype, lora_rank=lora_rank)
    (batch,) = policy.plan(rows())
    old_S = batch.old_S = policy.score(policy.scorer, batch)
    ref_S = policy.score(policy.reference, batch)
    assert (old_S.device, old_S.dtype) == (GPU, torch.float32)
    sums = {}
    loss = policy.loss_of(batch, ref_S, 99, sums)
    total, logprobs_S = policy.scorer(batch, loss)
    for tensor in (total, logprobs_S):
        assert (tensor.device, tensor.dtype) == (GPU, torch.float32)
    assert {value.device for value in sums.values()} == {GPU}
    assert {value.dtype for value in sums.values()} == {torch.float64}


@pytest.mark.parametrize(("dtype", "lora_rank"), TRAINED)
def test_fake_step_and_weights_for_the_engine(fake_gpu, dtype, lora_rank):
    policy = fake_policy(dtype, lora_rank=lora_rank)
    for p in policy.trained.values():
        p.grad = torch.empty_like(p)
    assert policy.clip_gradient().device == GPU
    policy.step()
    assert {p.device for p in policy.model.parameters()} == {GPU}
    for p in policy.trained.values():
        assert (p.device, p.dtype) == (GPU, torch.float32)
        assert {t.device for t in policy.optimizer.state[p].values()} == {GPU}
    for name, tensor in policy.named_weights():
        assert (tensor.device, tensor.dtype) == (GPU, getattr(torch, dtype)), name


@pytest.mark.parametrize("name", ["token_ids_T", "position_ids_T", "targets_S", "rollout_S"])
def test_fake_tensors_on_the_wrong_device_are_found(fake_gpu, fake_gradients, name):
    policy = fake_policy("bfloat16")
    (batch,) = policy.plan(rows())
    wrong = dataclasses.replace(batch, **{name: getattr(batch, name).cpu()})
    with pytest.raises(RuntimeError, match="device"):
        policy.scorer(wrong, policy.loss_of(wrong, None, 99, {}))


def test_fake_tensors_of_the_wrong_type_are_found(fake_gpu):
    policy = fake_policy("bfloat16")
    (batch,) = policy.plan(rows())
    wrong = dataclasses.replace(batch, targets_S=batch.targets_S.float())
    with pytest.raises(RuntimeError, match="type"):
        policy.score(policy.scorer, wrong)


# --- attention


def test_fake_half_precision_takes_one_launch_for_all_segments(fake_gpu, monkeypatch):
    calls = []
    real = architecture.varlen_attn

    @functools.wraps(real)
    def varlen_attn(*tensors, **options):
        calls.append((tensors, options))
        return real(*tensors, **options)

    monkeypatch.setattr(architecture, "varlen_attn", varlen_attn)
    policy = fake_policy("bfloat16")
    (batch,) = policy.plan(rows())
    assert batch.lengths == (12, 17, 11, 19)  # what a and b share, their rests, c
    assert batch.prefix_of == {1: 0, 2: 0}
    policy.score(policy.scorer, batch)
    assert len(calls) == 2  # layers
    for (q, k, v, begin_q, begin_k, longest_q, longest_k), options in calls:
        assert q.shape == (59, 4, 16)
        assert k.shape == v.shape == (59 + 2 * 12, 2, 16)
        assert {tensor.device for tensor in (q, k, v, begin_q, begin_k)} == {GPU}
        assert {tensor.dtype for tensor in (q, k, v)} == {torch.bfloat16}
        assert begin_q.shape == begin_k.shape == (5,)
        assert begin_q.dtype == begin_k.dtype == torch.int32
        assert (longest_q, longest_k) == (19, 12 + 17)
        assert options == {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True}


def test_fake_single_precision_and_odd_heads_take_sdpa(fake_gpu, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("not made for this")

    monkeypatch.setattr(architecture, "varlen_attn", refuse)
    policy = fake_policy("float32")
    policy.score(policy.scorer, *policy.plan(rows()))
    odd = torch.empty(1, 2, 8, 12, dtype=torch.bfloat16, device=GPU)
    wide = torch.empty(1, 2, 8, 512, dtype=torch.bfloat16, device=GPU)
    assert not architecture.takes_varlen(odd) and not architecture.takes_varlen(wide)


def by_definition(q, k, v, begin_q, begin_k, longest_q, longest_k, scale, window_size, enable_gqa):
    """varlen_attn as its documentation has it: the last query of a sequence sees its last key."""
    assert window_size == (-1, 0)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mixed = []
    for i in range(len(begin_q) - 1):
        queries = q[begin_q[i] : begin_q[i + 1]]
        keys, values = (x[begin_k[i] : begin_k[i + 1]] for x in (k, v))
        n, m = len(queries), len(keys)
        assert n <= longest_q and m <= longest_k
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        scores = scores.masked_fill(~torch.ones(n, m).tril(m - n).bool(), -torch.inf)
        mixed.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(mixed)


def test_one_launch_gives_what_a_call_for_each_segment_gives(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 59, 16) for heads in (4, 2, 2))
    given = {"lengths": (19, 12, 17, 11), "prefix_of": {2: 1, 3: 1}, "scaling": 0.25}
    expected, _ = architecture.attend(None, q, k, v, None, **given)
    monkeypatch.setattr(architecture, "takes_varlen", lambda _: True)
    monkeypatch.setattr(architecture, "varlen_attn", by_definition)
    found, _ = architecture.attend(None, q, k, v, None, **given)
    torch.testing.assert_close(found, expected)


def test_the_policy_switches_off_attention_plans_of_cudnn(models):
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_policy(models)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
