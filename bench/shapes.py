"""Shapes of published models for bench/gpu_smoke.py: random weights of such a shape, and the memory
that docs/memory.md computes for it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """Of a published Qwen2.5 (docs/memory.md); tiny is for CPUs."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        kv = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden**2 + 2 * self.hidden * kv + self.hidden + 2 * kv
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        tables = 1 if self.tied else 2
        return self.layers * layer + tables * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "tiny": Shape(64, 2, 128, 2, 1, 4096, True),
    "0.5B": Shape(896, 24, 4864, 14, 2, 151_936, True),
    "1.5B": Shape(1536, 28, 8960, 12, 2, 151_936, True),
    "7B": Shape(3584, 28, 18944, 28, 4, 152_064, False),
}


def computed(shape: Shape, ranks: int, tokens: int) -> dict[str, float]:
    """What docs/memory.md computes for each GPU [GB]."""
    count, wide = shape.parameters, 1 if ranks > 1 else 2  # one rank keeps float32 layer inputs
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer = 28 * shape.hidden + 4 * kv + 14 * shape.intermediate
    gathered, reduced = 2 * count, 0
    if ranks > 1:
        tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
        gathered = 2 * (tables + 2 * (count - tables) // shape.layers)
        reduced = 4 * (count - tables) // shape.layers
    update = gathered + reduced + 2 * shape.vocabulary * shape.hidden
    update += wide * 2 * shape.layers * tokens * shape.hidden + tokens * layer
    return {
        "policy": 16 * count / ranks / GB,
        "peak of the update (PyTorch's own)": (20 * count / ranks + update) / GB,
    }


def make_model(shape: Shape, folder: Path) -> None:
    """Random weights of that shape, with the toy's tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        dtype="bfloat16",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for file in (ROOT / "deepresearcher_min" / "toy_model").glob("*token*"):
        shutil.copy(file, folder)
