"""The protocol: grammar of a turn, token-exact observations for real tokenizers, harmless foreign
text.
"""

import ast
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deepresearcher_min import corpus
from deepresearcher_min.protocol import (
    Answer,
    Call,
    ChatFormat,
    Entry,
    Malformed,
    page_item,
    parse_turn,
    read_tools,
    render,
    search_item,
)
from scripts import toy_tokenizer

pytestmark = pytest.mark.quick
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CALL = '<tool_call>{"name": "web_search", "arguments": {"query": ["a", " b "]}}</tool_call>'


@pytest.fixture(scope="module")
def qwen() -> ChatFormat:
    folder = SHARED / "qwen2.5-tokenizer"
    if not folder.is_dir():
        pytest.skip("the Qwen2.5 tokenizer is not here")
    return ChatFormat(AutoTokenizer.from_pretrained(folder), date="2025-04-01")


@pytest.fixture(scope="module")
def toy() -> ChatFormat:
    return ChatFormat(toy_tokenizer.build_tokenizer(), date="")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<think> x </think> <answer> Oslo </answer>", Answer("Oslo")),
        ("x </think><answer>Oslo</answer> and more", Answer("Oslo")),
        (f"<think>x</think>{CALL}", Call("search", ("a", "b"))),
        (f"<think>x</think>{CALL}<answer>y</answer>", Answer("y")),  # an answer wins over a call
        # The first pair counts.
        (f"<think>x</think>{CALL}{CALL.replace('a', 'z')}", Call("search", ("a", "b"))),
        # Thoughts do not answer.
        ("<think>a <answer>no</answer> </think><answer>yes</answer>", Answer("yes")),
        ("<think>x</think><answer></answer>", Answer("")),
        (
            '<think>x</think><tool_call>\n{"name":"browse_webpage","arguments":{"url_list":["http://a"]}}\n</tool_call>',
            Call("browse", ("http://a",)),
        ),
        (
            '<think>x</think><tool_call>{"name":"web_search","arguments":{"query":"one"}}</tool_call>',
            Call("search", ("one",)),
        ),
        (
            '<think>x</think><tool_call>{"name":"web_search","arguments":{"query":["a\nb"]}}</tool_call>',
            Call("search", ("a\nb",)),
        ),
    ],
)
def test_turns_that_are_well_formed(text, action):
    assert parse_turn(text) == action


KEYS = {
    "a list": ('["a", "b"]', ("a", "b")),
    "a list in single quotes": ("['a', \"b's\"]", ("a", "b's")),
    "one line": ("who wrote it, and when?", ("who wrote it, and when?",)),
    "lines": ("  a\n\n b \n", ("a", "b")),
    "a number": ("1984", ("1984",)),
    "brackets that are no list": ("[sic] meaning", ("[sic] meaning",)),
}
OBJECT = '{"query": ["a", "b"]}'


@pytest.mark.parametrize("tool", ["web_search query", "browse_webpage url_list"])
@pytest.mark.parametrize("value", KEYS)
@pytest.mark.parametrize(
    "form",
    [
        "\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n",
        "<function=NAME><parameter=KEY>VALUE</parameter><parameter=other>\n3\n</parameter></function>",
        "NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n",
        "NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>",
    ],
)
def test_calls_in_tags(form, value, tool):
    (written, keys), (name, argument) = KEYS[value], tool.split()
    text = form.replace("NAME", name).replace("KEY", argument).replace("VALUE", written)
    found = parse_turn(f"x</think>\n<tool_call>{text}</tool_call>")
    assert found == Call("search" if argument == "query" else "browse", keys)


@pytest.mark.parametrize(
    "call",
    [
        f'{{"name": "web_search", "parameters": {OBJECT}}}',
        f'{{"type": "function", "name": "web_search", "parameters": {OBJECT}, "id": 3}}',
        f'{{"name": "web_search", "arguments": {json.dumps(OBJECT)}}}',
        f'{{"name": "web_search", "parameters": {json.dumps(OBJECT)}}}',
        (
            '{"type": "function", "function": '
            f'{{"name": "web_search", "arguments": {json.dumps(OBJECT)}}}}}'
        ),
        f'{{"function": "web_search", "arguments": {OBJECT}}}',
        f'[{{"name": "web_search", "arguments": {OBJECT}}}]',
        '{"name": "web_search", "arguments": {"query": "[\\"a\\", \\"b\\"]"}}',
        f'\n```json\n{{"name": "web_search", "arguments": {OBJECT}}}\n```\n',
        f'```\n{{"name": "web_search", "parameters": {OBJECT}}}```',
        f"```xml\n<function=web_search>{OBJECT}</function>\n```",
        f"<function=web_search>\n{OBJECT}\n</function>",
        '<function=web_search><parameter=query>a</parameter><parameter=query>["b"]</parameter></function>',
        '<function=web_search><parameter=query>["a", "b"]</parameter></function>'
        "<function=web_search><parameter=query>c</parameter></function>",
    ],
)
def test_calls_in_other_dress(call):
    assert parse_turn(f"x</think><tool_call>{call}</tool_call>") == Call("search", ("a", "b"))


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "web_search", "arguments": "Ulm"}',
        '{"name": "web_search", "arguments": "[1]"}',
        '{"name": "web_search"}',
        '{"name": "web_search", "arguments": {"query": {"a": 1}}}',
        '{"name": "web_search", "arguments": {"query": null}}',
        '{"function": {"name": ["web_search"]}}',
        "null",
        "7",
        '{"name": "web_search", "arguments": {"query": ["a", ["b"]]}}',
        "```json\n```",
        '"web_search"',
        "[[]]",
        "<function=web_search></function>",
        "<function=web_search><parameter=query>a</function>",
        "<function=>",
        "<function=web_search><parameter=queries>a</parameter></function>",
        "web_search(query=['a'])",
        "<arg_key>",
        "<function=rm><parameter=query>a</parameter></function>",
        "web_search<arg_key>query</arg_key>",
        '<function=web_search><parameter=query>["a", "b"</parameter></function>',
        "<function=web_search><parameter=query>['a', f()]</parameter></function>",
        "<function=web_search><parameter=query>\n \n</parameter></function>",
        "<function=web_search><parameter=query>['" + "[" * 9999 + "</parameter></function>",
        "<function=web_search><parameter=query>[''," + "-" * 9999 + "1]</parameter></function>",
    ],
)
def test_calls_that_stay_malformed(call):
    assert isinstance(parse_turn(f"x</think><tool_call>{call}</tool_call>"), Malformed)


PARTS = [
    "<function=",
    "web_search",
    ">",
    "</function>",
    "<parameter=",
    "query",
    "</parameter>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "```json\n",
    "```",
    '{"name": "web_search", ',
    '"arguments": ',
    '"parameters": ',
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "\\",
    ",",
    ":",
    "-",
    "(",
    "\n",
    "\0",
    "\ud800",
    "1",
    "\u2028",
]


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=30).map("".join))
def test_any_call_is_read_as_some_action(text):
    assert isinstance(
        parse_turn(f"x</think><tool_call>{text}</tool_call>"), Call | Answer | Malformed
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think>",
        "just words",
        "<think>never closed <answer>x</answer>",
        "<think>x</think>",
        "<answer>x</answer></think>",
        "<think>x</think><answer>open",
        "<think>x</think>answer</answer>",
        "<think>a<think>b</think><answer>x</answer>",
        "<think>x</think><tool_call>not json</tool_call>",
        "<think>x</think><tool_call>" + "[" * 100_000 + "</tool_call>",
        "<think>x</think><tool_call>[]</tool_call>",
        '<think>x</think><tool_call>{"name":"rm","arguments":{}}</tool_call>',
        '<think>x</think><tool_call>{"name":["web_search"],"arguments":{"query":["a"]}}</tool_call>',
        '<think>x</think><tool_call>{"name":"web_search","arguments":["a"]}</tool_call>',
        '<think>x</think><tool_call>{"name":"web_search","arguments":{"query":[]}}</tool_call>',
        '<think>x</think><tool_call>{"name":"web_search","arguments":{"query":[" "]}}</tool_call>',
        '<think>x</think><tool_call>{"name":"web_search","arguments":{"query":[1]}}</tool_call>',
        '<think>x</think><tool_call>{"name":"web_search","arguments":{"url_list":["a"]}}</tool_call>',
    ],
)
def test_turns_that_are_malformed(text):
    assert isinstance(parse_turn(text), Malformed)


@given(st.text(alphabet=st.sampled_from("<>/think answer tool_call{}[]\"':,\n a"), max_size=300))
def test_any_text_is_read_as_some_action(text):
    assert isinstance(parse_turn(text), Call | Answer | Malformed)


def test_an_observation_is_the_repr_with_keys_in_alphabetical_order():
    entries = [
        Entry(
            "q", (search_item("It's here", "T", "http://u"), search_item("two", "T2", "http://v"))
        )
    ]
    text = render("search", entries)
    assert text.startswith(
        "[{'search_query': 'q', 'web_page_info_list': "
        "[{'quick_summary': \"It's here\", 'title': 'T'"
    )
    assert ast.literal_eval(text)[0]["web_page_info_list"][1]["url"] == "http://v"
    assert render("browse", [Entry("http://u", (page_item("s", 3),))]) == (
        "[{'information': [{'page_number': 3, 'page_summary': 's'}], 'url': 'http://u'}]"
    )


def conversation(
    chat: ChatFormat, turns: list[str], observations: list[str], question: str = "Who?"
) -> tuple[list[int], str]:
    """The ids that a rollout would append for a model that writes `turns`, and the template's own
    rendering.
    """
    tokenizer = chat.tokenizer
    ids = chat.prompt_ids(question)
    messages = [{"role": "system", "content": chat.system}, {"role": "user", "content": question}]
    for turn, observation in zip(turns, observations, strict=True):
        ids += [*tokenizer.encode(turn, add_special_tokens=False), chat.end_of_turn_id]
        ids += chat.observation_ids(observation)
        messages += [{"role": "assistant", "content": "<think>" + turn}]
        messages += [{"role": "tool", "content": chat.defuse(observation)}]
    return ids, tokenizer.apply_chat_template(
        messages, tools=read_tools(), add_generation_prompt=True, tokenize=False
    )


TEXTS = [
    "[{'search_query': 'a', 'web_page_info_list': []}]",
    "]\n",
    "\n\n",
    "",
    " ",
    "x",
    "漢字 and emoji 🦊🏽 and \u200b\ufeff",
    "a\tb\r\nc",
    "'" * 7,
    "\\n\\n",
    "0123456789" * 9,
    "<tool_call>\n{}</tool_call>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "</tool_response>",
    "<think></think>",
    "<|fim_prefix|><|vision_start|><|endoftext|>",
    "<answer>wrong</answer>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_appended_ids_equal_the_templates_rendering_token_for_token(qwen, text):
    ids, rendered = conversation(
        qwen, [" I look.\n</think>\n<tool_call>{}</tool_call>"] * 2, [text, "plain words"]
    )
    assert qwen.tokenizer.decode(ids) == rendered + "<think>"
    assert ids == qwen.tokenizer.encode(rendered + "<think>")


def test_the_published_protocol_has_the_ids_that_it_has_always_had(qwen):
    """Qwen2.5's prompts and observations, as they were before other families' templates were looked
    at.
    """

    def digest(ids: list[list[int]]) -> str:
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]

    questions = ["Who?", " Who is <|im_end|> it?\n", "谁写了《红楼梦》?", "<tool_call>x</think>"]
    notes = [{"role": "system", "content": "Take notes."}, {"role": "user", "content": "<think> a"}]
    assert digest([qwen.prompt_ids(question) for question in questions]) == "76e24ec3cf33714f"
    assert digest([qwen.observation_ids(text) for text in TEXTS]) == "0258884f49c9d790"
    assert digest([qwen.message_ids(notes)]) == "7da3154249f17db8" and qwen.end_ids == (
        qwen.end_of_turn_id,
    )


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(TEXTS), max_size=4).map("".join))
def test_foreign_text_becomes_neither_special_tokens_nor_tags(qwen, text):
    plain = qwen.observation_ids("plain words")
    ids = qwen.observation_ids(text)
    added = set(qwen.tokenizer.added_tokens_decoder)
    assert sum(i in added for i in ids) == sum(i in added for i in plain)  # only the frame's own
    inside = (
        qwen.tokenizer.decode(ids)
        .partition("<tool_response>\n")[2]
        .rpartition("\n</tool_response>")[0]
    )
    for tag in ("<think>", "</think>", "<tool_call>", "<answer>", "</tool_response>", "<|im_end|>"):
        assert tag not in inside


def test_the_toy_tokenizer_loses_nothing_of_the_toy_web(toy):
    world = corpus.World("training", 3)
    for title, url, text in world.corpus.documents:
        observation = render("search", [Entry(title, (search_item(text, title, url),))])
        assert toy.tokenizer.decode(toy.tokenizer.encode(observation)) == observation
    for question in world.questions(1000, 0):
        assert toy.tokenizer.decode(toy.tokenizer.encode(question.text)) == question.text


def test_the_toys_appended_ids_equal_its_templates_rendering(toy):
    turn = (
        "I need the mayor."
        + toy_tokenizer.CALL_SEARCH
        + corpus.NAMES["city"][0]
        + toy_tokenizer.CALL_END
    )
    observation = render(
        "search",
        [Entry(corpus.NAMES["city"][0], (search_item("The mayor is a person.", "city"),))],
    )
    ids, rendered = conversation(
        toy, [turn, turn], [observation, observation], "What is the mayor?"
    )
    assert toy.tokenizer.decode(ids) == rendered + "<think>"
    assert ids == toy.tokenizer.encode(rendered + "<think>")


def test_an_observation_keeps_to_its_budget_by_dropping_whole_results(qwen):
    entries = [
        Entry(
            f"query {i}",
            tuple(search_item(f"{i} {j} " + "word " * 40, "T", "u") for j in range(10)),
        )
        for i in "ab"
    ]
    full = qwen.fit("search", entries, 10_000)
    assert full[2] == 0
    sizes = []
    for budget in (1000, 500, 150):
        text, ids, dropped = qwen.fit("search", entries, budget)
        assert len(ids) <= budget and ids == qwen.observation_ids(text) and dropped > 0
        kept = [len(part["web_page_info_list"]) for part in ast.literal_eval(text)]
        # The best of each query first.
        assert sum(kept) == 20 - dropped and max(kept) - min(kept) <= 1
        assert qwen.fit("search", entries, len(ids))[2] == dropped  # not one more would fit
        sizes.append(sum(kept))
    assert sizes == sorted(sizes, reverse=True)
    text, _, dropped = qwen.fit("search", entries, 60)
    assert dropped == 20 and "too long" in text


def test_a_template_without_tools_gets_them_in_the_system_prompt(qwen, toy):
    assert "web_search" in toy.system.partition("Tools:")[2]
    assert "Tools:" not in qwen.system and "2025-04-01" in qwen.system


def test_a_system_prompt_of_ones_own_is_used_verbatim():
    chat = ChatFormat(toy_tokenizer.build_tokenizer(), "2025-04-01", "On {date}: {braces} stay")
    assert chat.system == "On 2025-04-01: {braces} stay"


def test_a_tokenizer_without_template_is_refused():
    tokenizer = toy_tokenizer.build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        ChatFormat(tokenizer, "")
