"""The tokenizer of the toy web: whole words, and the fixed parts of calls and observations as one
token each.

It ships with the start model; the vocabulary must not change, since that model was trained on it.
"""

import re
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepresearcher_min.corpus import FILLERS, NAMES, RELATIONS, SITE
from deepresearcher_min.protocol import THINK

CALL_SEARCH = '</think><tool_call>{"name": "web_search", "arguments": {"query": ["'
CALL_BROWSE = '</think><tool_call>{"name": "browse_webpage", "arguments": {"url_list": ["'
CALL_END, ANSWER, ANSWER_END = '"]}}</tool_call>', "</think><answer>", "</answer>"
PIECES = (
    THINK,
    CALL_SEARCH,
    CALL_BROWSE,
    CALL_END,
    ANSWER,
    ANSWER_END,
    '", "',
    "[{'search_query': '",
    "', 'web_page_info_list': [{'quick_summary': '",
    "', 'web_page_info_list': []}]",
    ".', 'title': '",
    "', 'title': '",
    "', 'url': '",
    "'}, {'quick_summary': '",
    "'}]}]",
    "'}]}, {'search_query': '",
    "[{'information': [{'page_number': ",
    ", 'page_summary': '",
    ".'}], 'url': '",
    "'}], 'url': '",
    "'}]",
    "'}, {'information': [{'page_number': ",
    SITE,
    "_",
    ". ",
    ".",
    "?",
    ", ",
    ": ",
    " ",
)
WORDS = """
What is The the of a I need do not see page may say guess that it know answer person company book
city Nothing was found for this query says nothing about No search has shown address so cannot be
opened result too long to 0 1 2
""".split()  # noqa: SIM905 (as a list of strings it could not be read)
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content "
    "}}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that loses nothing of the toy web's text.

    A space between two words is not a token: the pre-tokenizer drops it and the decoder puts it
    back, so that a name is the same token after a space and after a quotation mark, which is what
    makes copying learnable.
    """
    special = ["<unk>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    # Of dicts, the keys.
    words = [*WORDS, *chain(*NAMES.values(), *RELATIONS.values(), *FILLERS.values())]
    values = " ".join(chain(*(facts.values() for facts in FILLERS.values()))).split()
    vocab = {
        token: i for i, token in enumerate(dict.fromkeys([*special, *PIECES, *words, *values]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pieces = "|".join(
        re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True) if piece != " "
    )
    word, mark = "[A-Za-z0-9]", "\u241f"  # the mark stands between tokens while decoding
    between_words = f"(?<={word}) (?={word})"
    split = pre_tokenizers.Split(Regex(f"{pieces}|{word}+|{between_words}|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.Split(Regex(r"\A \z"), "removed")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"\z"), mark),
            decoders.Fuse(),
            decoders.Replace(Regex(f"(?<={word}){mark}(?={word})"), " "),
            decoders.Replace(mark, ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
