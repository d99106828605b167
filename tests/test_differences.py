"""docs/differences.md: the kinds of turns that only one grammar accepts, as far as our own grammar
goes.
"""

import pytest

from deepresearcher_min.protocol import Call, Malformed, parse_turn

pytestmark = pytest.mark.quick
CALL = '<tool_call>{"name": "web_search", "arguments": {"query": ["ice"]}}</tool_call>'


def search(value: str) -> str:
    call = f'{{"name": "web_search", "arguments": {{"query": {value}}}}}'
    return f"Hm.</think><tool_call>{call}</tool_call>"


OURS_REFUSES = [
    f"Hm. {CALL}</think>",
    "Hm. <answer>ice</answer></think>",
    f"Hm. {CALL}</think><tool_call>?</tool_call>",
    f"Hm. <think> So.</think>{CALL}",
    "Hm. <think> So.</think><answer>ice</answer>",
    f"Hm.</think><tool_call>{CALL}",
    f"Close it by </tool_call>.</think>{CALL.removesuffix('</tool_call>')}",
    search("[]"),
    search('[" "]'),
    search('[1, "ice"]'),
    search("[null]"),
    search('[{"q": "ice"}]'),
    search('[["ice"]]'),
    "Hm.</think><ANSWER>ice</ANSWER>",
    "Hm.</think><Answer>ice</Answer>",
]
OURS_ACCEPTS = [
    f"An <answer> comes later.</think>{CALL}",
    f"I use <tool_call> now.</think>{CALL}",
    search('["<answer> ice"]'),
    "The tag </answer>.</think><answer>ice</answer>",
    "Hm.</think></answer><answer>ice</answer>",
    "Hm.</think></think><answer>ice</answer>",
    "Hm.</think><answer>ice</answer></answer>",
    "Hm.</think><tool_call><answer>ice</answer>",
    "Hm.</think><answer>ice</answer><tool_call>",
    f"Hm.</think><answer>ice{CALL}",
    search('"ice"'),
    search('["ice\ncream"]'),
    search('["ice\tcream"]'),
]


@pytest.mark.parametrize("turn", OURS_REFUSES)
def test_what_only_the_official_grammar_accepts(turn):
    assert isinstance(parse_turn(turn), Malformed)


@pytest.mark.parametrize("turn", OURS_ACCEPTS)
def test_what_only_ours_accepts(turn):
    assert not isinstance(parse_turn(turn), Malformed)


def test_where_both_accept_and_differ():
    assert parse_turn(f"Hm. <answer>snow</answer></think>{CALL}") == Call("search", ("ice",))
    other = '<tool_call>{"name": "browse_webpage", "arguments": {"url_list": ["u"]}}</tool_call>'
    assert parse_turn(f"Hm. {other}</think>{CALL}") == Call("search", ("ice",))
