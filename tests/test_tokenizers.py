"""protocol.py: whatever the tokenizer, what is appended is what the whole conversation is."""

import pytest
from scripted import byte_tokenizer
from test_chat_templates import DATE, TALK, whole_ids
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from deepresearcher_min.config import ROOT
from deepresearcher_min.protocol import (
    ChatFormat,
)

pytestmark = pytest.mark.quick


def sentencepiece(scheme: str, legacy: bool = False) -> Tokenizer:
    """Spaces are a letter of the vocabulary, and one may be put in front of the text, or of each
    part of it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if legacy:  # as in the first Llama: in front of each part between special tokens
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(
        [(ROOT / "prompts/judge.txt").read_text(), "<|user|>\na b\n<|tool|>\n"] * 2, trainer
    )
    return tokenizer


KINDS = {
    "first": lambda: sentencepiece("first"),
    "always": lambda: sentencepiece("always"),
    "never": lambda: sentencepiece("never"),
    "legacy": lambda: sentencepiece("", legacy=True),
    "bytes": lambda: byte_tokenizer().backend_tokenizer,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", [[], ["<|user|>", "<|assistant|>", "<|tool|>", "<|system|>"]])
@pytest.mark.parametrize("strips", [False, True])
def test_the_parts_ids_are_the_wholes_for_every_kind_of_tokenizer(kind, marks, strips):
    lines = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    template = lines + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    backend = KINDS[kind]()
    backend.add_special_tokens([AddedToken(mark, rstrip=strips) for mark in ["<|end|>", *marks]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer, DATE)
    for text in ("a b", " a", "[{'a': 1}]", "", "\n\n", "▁x", "漢字 🦊", "<|end|>"):
        whole = whole_ids(chat, ["<think>x"], [chat.defuse(text)])
        ours = [chat.end_of_turn_id, *chat.observation_ids(text)]
        assert ours == whole[-len(ours) :]


def test_a_tokenizer_whose_parts_depend_on_each_other_is_refused():
    tokenizer = byte_tokenizer()

    class Counting:  # the last id says how long the text is
        chat_template, eos_token_id, added_tokens_decoder = (
            TALK,
            tokenizer.eos_token_id,
            tokenizer.added_tokens_decoder,
        )
        apply_chat_template, convert_tokens_to_ids = (
            tokenizer.apply_chat_template,
            tokenizer.convert_tokens_to_ids,
        )

        def encode(self, text, **given):
            return [*tokenizer.encode(text, **given), len(text)]

    tokenizer.chat_template = TALK
    with pytest.raises(ValueError, match="splits"):
        ChatFormat(Counting(), DATE)
