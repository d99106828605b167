"""docs/memory.md's arithmetic against PyTorch's own tracker of live bytes, on fake tensors: forward
and backward pass of the published shapes run, and nothing is computed.
"""

import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from policies import overwrite_parameters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, Qwen2Config

from deepresearcher_min import architecture
from deepresearcher_min import policy as policy_module
from deepresearcher_min.config import load_config
from deepresearcher_min.grpo import TrainingRow, pack
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks

pytestmark = pytest.mark.slow
T = 32_768
DOCUMENT = Path(__file__).parents[1] / "docs/memory.md"
SHAPES = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


class FlashMemory(torch.autograd.Function):
    """What FlashAttention keeps: its inputs, its output and one number a query and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        mixed = torch.empty_like(query)
        sums = torch.empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mixed, sums)
        return mixed

    @staticmethod
    def backward(ctx, _):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class OfTheWhole(WeakIdKeyDictionary):
    """The tracker compares every module's own peak at every operation, which is most of its time;
    only the peak of the whole is read here.
    """

    def values(self):
        return ()


@contextmanager
def fake_ranks(count: int):
    """Ranks that send nothing; this process is the first."""
    if count > 1:
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield Ranks(0, count)
    finally:
        if count > 1:
            dist.destroy_process_group()


def computed(row: str) -> list[float]:
    """The figures in bold or not of a row of the document's tables [GB]."""
    line = next(text for text in DOCUMENT.read_text().splitlines() if text.startswith(f"| {row}"))
    return [
        float(cell.strip(" *"))
        for cell in line.split("|")
        if re.fullmatch(r" \**\d[\d.]*\** ", cell)
    ]


def gigabytes(tensors) -> float:
    """Of this rank's part of each tensor."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local) / 1e9


@pytest.fixture
def update_bytes(monkeypatch):
    """A function of (size, ranks, lora_rank): what stays, and what lives at the update's peak
    [GB].
    """
    attention = lambda q, k, v, *_, **__: FlashMemory.apply(q, k, v)  # noqa: E731
    monkeypatch.setattr(architecture, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(architecture, "causal_lower_right", lambda *_: None)
    monkeypatch.setattr(policy_module.TokenScorer, "to", lambda self, device: self)
    monkeypatch.setattr(torch.nn.Module, "_apply", overwrite_parameters)  # LoRA's factors
    ids, sampled = np.zeros(T + 1, np.int32), np.arange(T - T // 7, T + 1)
    row = TrainingRow("one", ids, sampled, np.zeros(len(sampled)), 1.0)

    def measure(size: str, ranks: Ranks, lora_rank: int = 0):
        def load_model(folder, dtype, attention):
            shape = Qwen2Config(**SHAPES[size], attn_implementation=attention)
            return AutoModelForCausalLM.from_config(shape, dtype=dtype)

        monkeypatch.setattr(policy_module, "load_model", load_model)
        settings = load_config(["--preset=paper", f"--lora_rank={lora_rank}"])
        policy = Policy(settings, "nowhere", ranks, tried=True)
        reference = policy.reference if lora_rank == 0 else torch.nn.Module()
        moments = [m for state in policy.optimizer.state.values() for m in state.values()]
        stays = {
            "weights": gigabytes(policy.model.parameters()),
            "moments": gigabytes(moments),
            "reference": gigabytes(reference.parameters()),
            "adapters": gigabytes(policy.trained.values()) if lora_rank else 0.0,
        }
        batch = pack([row])
        loss = policy.loss_of(batch, torch.zeros(len(sampled)), 1, Counter())
        tracker = MemTracker()
        if lora_rank:  # it would hang hooks on frozen weights, too; only its labels need them
            track = MemTracker._track_module_params_and_buffers
            unhooked = lambda self, module, *_, **__: track(self, module, install_grad_hooks=False)  # noqa: E731
            monkeypatch.setattr(MemTracker, track.__name__, unhooked)
        if ranks.world_size > 1:
            tracker = FSDPMemTracker(policy.scorer, policy.optimizer)
        else:
            tracker.track_external(policy.scorer, policy.optimizer)
        tracker.memory_tracking = OfTheWhole()
        with tracker:
            policy.scorer(batch, loss)[0].backward()
            (peak,) = tracker.get_tracker_snapshot("peak").values()
        return stays, {str(kind): count / 1e9 for kind, count in peak.items()}

    return measure


def test_fake_bytes_of_7b_on_eight_are_what_the_document_computes(monkeypatch, update_bytes):
    with fake_ranks(8) as ranks:
        mesh = dist.init_device_mesh("cpu", (8,))
        monkeypatch.setattr(dist, "init_device_mesh", lambda *_: mesh)  # it reads values
        with FakeTensorMode(allow_non_fake_inputs=True):
            stays, peak = update_bytes("7B", ranks)
    assert stays["weights"] == pytest.approx(*computed("master weights"), abs=0.05)
    assert stays["moments"] == pytest.approx(*computed("AdamW's two moments"), abs=0.05)
    assert stays["reference"] == pytest.approx(*computed("reference model"), abs=0.05)
    (gradients,) = computed("gradients, float32")
    (update,) = computed("**peak of the update")  # all gradients, which come as activations go
    total = peak["Total"] + stays["reference"]
    assert total < update
    assert total == pytest.approx(update - gradients, rel=0.06)


def test_fake_bytes_of_1_5b_on_one_are_what_the_document_computes(update_bytes):
    with FakeTensorMode(allow_non_fake_inputs=True):
        stays, peak = update_bytes("1.5B", Ranks())
    always, copies, *_, update, _ = computed("1.5B on 1")
    assert sum(stays.values()) == pytest.approx(always * 16 / 20, abs=0.1)
    gradients = always * 4 / 20
    total = peak["Total"] + stays["reference"]
    assert total < update  # whose copies autocast lets go at the end of the forward pass
    assert total == pytest.approx(update - gradients - copies, rel=0.06)


RANK = 16
LAYERS = 2  # are enough: what the document adds up is the same in every layer


def lora_bytes(size: str) -> list[float]:
    """The document's arithmetic [GB]: frozen model, adapters with moments and gradients, layer
    inputs, one layer.
    """
    shape = Qwen2Config(**SHAPES[size])
    with torch.device("meta"):
        numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    H, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    K = H // shape.num_attention_heads * shape.num_key_value_heads
    adapters = RANK * layers * (9 * H + 2 * K + 3 * inner)
    counts = [
        2 * numbers,
        16 * adapters,
        2 * layers * T * H,
        T * (28 * H + 4 * K + 14 * inner),
    ]
    return [count / 1e9 for count in counts]


@pytest.mark.parametrize(
    ("size", "row", "card"),
    [("1.5B", "24 GB", 24.1), ("3B", "24 GB", 24.1), ("7B", "80 GB", 85.5)],
)
def test_fake_bytes_of_lora_on_one_are_what_the_document_computes(
    monkeypatch, update_bytes, size, row, card
):
    known = computed(f"LoRA, {size}, {row}")
    parts = lora_bytes(size)
    rollout = 0.6 * card + parts[0] + parts[1] * 12 / 16
    assert [*parts, sum(parts), rollout] == pytest.approx(known, abs=0.051)
    assert max(known) < card
    monkeypatch.setitem(SHAPES[size], "num_hidden_layers", LAYERS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stays, peak = update_bytes(size, Ranks(), RANK)
    frozen, adapters, inputs, layer = lora_bytes(size)
    assert stays["reference"] == 0
    assert stays["weights"] - stays["adapters"] == pytest.approx(frozen, rel=1e-3)
    assert stays["adapters"] == pytest.approx(adapters * 4 / 16, rel=1e-3)
    assert stays["moments"] == pytest.approx(adapters * 8 / 16, rel=1e-2)
    activations = peak["Total"] - stays["weights"] - stays["moments"]
    assert 0.8 * (inputs + layer) < activations < inputs + layer
