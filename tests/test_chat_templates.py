"""Chat templates of other families: thought, date, end tokens, call syntax, results; and kinds of
tokenizers.
"""

import asyncio
import json
import re
from pathlib import Path

import pytest
from scripted import CHAT, Scripted, answer_turn, byte_tokenizer, make_agent, one, search_turn
from transformers import AutoTokenizer

from deepresearcher_min.architecture import declared_ends
from deepresearcher_min.config import ROOT
from deepresearcher_min.engine import Completion
from deepresearcher_min.protocol import (
    TOOLS,
    Call,
    ChatFormat,
    parse_turn,
)
from deepresearcher_min.rollout import Scheduler
from scripts.toy_tokenizer import TEMPLATE

pytestmark = pytest.mark.quick
SHARED = ROOT.parent / "shared" / "data"
MESSAGES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TALK = MESSAGES + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
DATE = "2025-04-01"


def chat_of(template: str, **given) -> ChatFormat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, DATE, **given)


def whole_ids(
    chat: ChatFormat, turns: list[str], results: list[str], question: str = "Who?"
) -> list[int]:
    """The template's own rendering of a conversation, encoded in one go; a thought is open at its
    end.
    """
    messages = chat.opening(question)
    for turn, result in zip(turns, results, strict=True):
        messages += [{"role": "assistant", "content": turn}, chat.result(result)]
    text = chat.template(messages, chat.tools)
    opened = text if text.rstrip().endswith("<think>") else text + "<think>"
    return chat.tokenizer.encode(opened, add_special_tokens=False)


def appended_ids(
    chat: ChatFormat, turns: list[str], results: list[str], question: str = "Who?"
) -> list[int]:
    """What a rollout appends for a model that writes these turns behind the open thought."""
    ids = chat.prompt_ids(question)
    for number, (turn, result) in enumerate(zip(turns, results, strict=True)):
        ids += [*chat.encode(turn), chat.end_of_turn_id, *chat.observation_ids(result, number)]
    return ids


# --- the thought

SWITCH = MESSAGES + (
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("end", "opened"),
    [
        ("", "<think>"),
        ("\n", "\n<think>"),
        ("<think>", "<think>"),
        ("<think>\n", "<think>\n"),
        ("\n<think> \n\n", "\n<think> \n\n"),
        ("<think>\n\n</think>\n\n", "<think>"),
        ("<think></think>", "<think>"),
        ("\n</think>", "\n<think>"),
        ("</think>\n\n", "<think>"),
    ],
)
def test_one_thought_is_open_at_the_start_of_every_turn(end, opened):
    chat = chat_of(TALK.replace("<|assistant|>{% endif", f"<|assistant|>{end}{{% endif"))
    for ids in (
        chat.prompt_ids("Who?"),
        chat.observation_ids("words"),
        chat.observation_ids("words", 2),
    ):
        assert chat.tokenizer.decode(ids).rpartition("<|assistant|>")[2] == opened
    assert parse_turn("<think>" + "\nI look.</think><answer>x</answer>").text == "x"


def test_a_switch_for_thinking_is_on_for_the_agent_and_off_for_a_reader():
    chat = chat_of(SWITCH)
    assert chat.tokenizer.decode(chat.prompt_ids("Who?")).endswith("<|assistant|><think>\n")
    plain = chat.message_ids([{"role": "user", "content": "Take notes."}])
    assert chat.tokenizer.decode(plain).endswith("<|assistant|><think>\n\n</think>\n\n")


# A template that renders thoughts in its own way, as those of Qwen3.5 do; a turn written so comes
# back as it is.
REASONS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n"
    "{{ parts[-1].strip() }}"
    "{% else %}{{ m.content | trim }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@pytest.mark.parametrize("result", ["plain", " \n[{'a': \"é\\n\"}] \n", "THE-WORDS", "<|end|>", ""])
def test_a_conversation_with_thoughts_equals_the_templates_own(result):
    chat, turn = chat_of(REASONS), "I look.\n</think>\n\n<tool_call>{}</tool_call>"
    appended = appended_ids(chat, [turn] * 2, [result, "more"])
    assert appended == whole_ids(chat, ["<think>\n" + turn] * 2, [chat.defuse(result), "more"])


# --- the date


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "01 Apr 2025"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2025-04-01"),
        (
            "{% if not date_string is defined %}{% set date_string = 'x' %}{% endif %}"
            "{{ date_string }}",
            "01 Apr 2025",
        ),
    ],
)
def test_the_template_states_the_runs_date(line, shown):
    text = chat_of("Today: " + line + TALK).template([{"role": "user", "content": "x"}], None)
    assert text.startswith(f"Today: {shown}<|user|>")


def test_a_date_in_words_reaches_the_template_as_it_is():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TALK
    chat = ChatFormat(tokenizer, "in spring")
    assert tokenizer.decode(chat.prompt_ids("Who?")).startswith("in spring<|")


# --- end tokens

LATER = (  # as GLM's: the mark of whoever speaks next is what ends a turn
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_all_end_tokens_end_a_turn(tmp_path):
    for written, ends in (({"eos_token_id": [3, 5]}, [3, 5]), ({"eos_token_id": 7}, [7]), ({}, [])):
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
        assert declared_ends(str(tmp_path)) == ends
    assert declared_ends(str(tmp_path / "none")) == []
    chat = chat_of(TEMPLATE, end_ids=[3, 5])
    assert set(chat.end_ids) == {chat.end_of_turn_id, 3, 5}
    for end in chat.end_ids:
        assert chat.decode([*chat.encode("words"), end]) == "words"
    assert chat.decode([]) == ""


def test_a_turn_that_answers_may_end_otherwise_than_one_that_calls():
    chat = chat_of(LATER)
    names = chat.tokenizer.convert_ids_to_tokens(chat.end_ids)
    assert chat.end_of_turn == "<|tool|>" and sorted(names) == ["<|end|>", "<|tool|>", "<|user|>"]


def test_behind_another_end_token_the_templates_own_follows_untrained():
    other = CHAT.tokenizer.convert_tokens_to_ids("<|user|>")
    chat = chat_of(TEMPLATE, end_ids=[other])

    def write(request_id, turn):
        ids = [*chat.encode([search_turn("Ulm"), answer_turn("x")][turn]), other]
        return Completion(ids, [-0.5] * len(ids), "stop")

    engine = Scripted(write)
    agent = make_agent(engine)
    agent = type(agent)(agent.config, engine, agent.tools, chat)
    trajectory = one(agent)
    assert trajectory.answer == "x" and set(engine.submitted[0][2].stop_token_ids) == set(
        chat.end_ids
    )
    ids, mask = trajectory.token_ids.tolist(), trajectory.sampled_mask.tolist()
    end = trajectory.turns[0].observed[0]
    assert ids[end - 1] == other and mask[end - 1]
    observation = [chat.end_of_turn_id, *chat.observation_ids(trajectory.turns[0].observation)]
    assert ids[end : end + len(observation)] == observation and not any(
        mask[end : end + len(observation)]
    )
    assert (
        ids.count(chat.end_of_turn_id)
        == CHAT.prompt_ids(trajectory.question.text).count(chat.end_of_turn_id) + 2
    )


def test_all_end_tokens_end_a_readers_reply():
    other = CHAT.tokenizer.convert_tokens_to_ids("<|user|>")
    chat = chat_of(TEMPLATE, end_ids=[other])
    tools = make_agent(Scripted(lambda request_id, turn: None)).tools
    engine = Scripted(
        lambda request_id, turn: Completion([*chat.encode("Notes."), other], [-0.5] * 7, "stop")
    )
    tools.chat = chat

    async def read() -> str:
        tools.scheduler = Scheduler(engine, 1)
        pump = asyncio.create_task(tools.scheduler.pump())
        try:
            return await tools.generate_text([{"role": "user", "content": "Take notes."}])
        finally:
            pump.cancel()

    assert asyncio.run(read()) == "Notes." and other in engine.submitted[0][2].stop_token_ids


# --- what a template refuses


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system\n messages') }}" + TALK, "no system messages"),
        ("{{ messages[0].name.first }}" + TALK, "has no attribute"),
        ("{{ 'a' + 1 }}" + TALK, "can only concatenate|must be str"),
        ("{{ messages[0].content | nothing }}" + TALK, "nothing"),
        ("{% if %}" + TALK, "Expected an expression"),
        ("{{ 1 / 0 }}" + TALK, "division by zero"),
        (TALK.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}"), "leaves out"),
        (TALK.replace("{{ m.content }}<|end|>", "{{ m.content }}\n---\n"), "nothing can end it"),
        (
            TALK.replace("{{ m.content }}", "{{ '<|tool|>' if m.role[0] == 'a' }}{{ m.content }}"),
            "generation prompt",
        ),
    ],
)
def test_what_a_template_cannot_carry_is_one_clear_line(template, words):
    with pytest.raises(ValueError, match=words) as refusal:
        chat_of(template)
    assert "template" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "rule", ["{{ raise_exception('no tools') }}", "{% set m = {'content': ''} %}"]
)
def test_results_are_a_users_where_there_are_no_tool_messages(rule):
    chat = chat_of(
        TALK.replace(
            "{{ m.content }}", f"{{% if m.role == 'tool' %}}{rule}{{% endif %}}{{{{ m.content }}}}"
        )
    )
    text = chat.tokenizer.decode(chat.observation_ids("plain"))
    assert text == "<|user|><tool_response>\nplain\n</tool_response><|end|><|assistant|><think>"
    turn = "I look.</think><tool_call>{}</tool_call>"
    assert appended_ids(chat, [turn], ["plain"]) == whole_ids(chat, ["<think>" + turn], ["plain"])


def test_a_template_that_writes_results_as_json_gets_them_so():
    chat = chat_of(
        TALK.replace(
            "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
        )
    )
    text = "[{'a': \"é\n\"}]"
    turn = "I look.</think><tool_call>{}</tool_call>"
    assert chat.tokenizer.decode(chat.observation_ids(text)).startswith(
        "<|tool|>" + json.dumps(text, ensure_ascii=False)
    )
    assert appended_ids(chat, [turn], [text]) == whole_ids(chat, ["<think>" + turn], [text])


def test_a_template_may_write_the_first_result_otherwise():
    first = "{% if loop.index == 4 %}<|user|>first {% endif %}"
    chat = chat_of(TALK.replace("{{ m.content }}", first + "{{ m.content }}"))
    turns = ["I look.</think><tool_call>{}</tool_call>"] * 3
    results = ["one", "two", "three"]
    assert appended_ids(chat, turns, results) == whole_ids(
        chat, ["<think>" + turn for turn in turns], results
    )


# --- the call that the prompt teaches

TOOLS_SHOWN = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}"
    "TAUGHT<|end|>{% endif %}"
)


@pytest.mark.parametrize(
    ("taught", "shown"),
    [
        ("", '{"name": "web_search", "arguments": {"query": ["..."]}}'),
        (
            '{"name": <function-name>, "arguments": <args>}',
            '{"name": "web_search", "arguments": {"query": ["..."]}}',
        ),
        (
            '{"name": name, "parameters": dictionary}',
            '{"name": "web_search", "parameters": {"query": ["..."]}}',
        ),
        (
            '<function=name>{"key": "value"}</function>',
            '<function=web_search>{"query": ["..."]}</function>',
        ),
        (
            "<function=f>\n<parameter=p>\nv\n</parameter>\n</function>",
            '\n<function=web_search>\n<parameter=query>\n["..."]\n</parameter>\n</function>\n',
        ),
        (
            "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>",
            'web_search\n<arg_key>query</arg_key>\n<arg_value>["..."]</arg_value>\n',
        ),
    ],
)
def test_the_prompt_shows_the_syntax_that_the_template_teaches_and_the_parser_reads_it(
    taught, shown
):
    chat = chat_of(TOOLS_SHOWN.replace("TAUGHT", taught) + TALK)
    assert f"<tool_call>{shown}</tool_call>" in chat.system and "{call}" not in chat.system
    assert parse_turn(f"x</think><tool_call>{shown}</tool_call>") == Call("search", ("...",))


# --- the table of families in docs/models.md


def of_family(path: Path) -> str:
    """A row: what a family's template does, on a tokenizer that has the special tokens that the
    template names.
    """
    template = path.read_text()
    tokenizer = byte_tokenizer()
    marks = re.findall(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>", template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(marks)), "bos_token": "<s>"}
    )
    tokenizer.chat_template = template
    try:
        chat = ChatFormat(tokenizer, DATE)
    except ValueError as refusal:
        return f"| {path.stem} | refused: {refusal} | | | |".replace("<|", "<\\|").replace(
            "|>", "\\|>"
        )
    turn = "I look.\n</think>\n\n<tool_call>{}</tool_call>"
    opened = chat.tokenizer.decode(chat.prompt_ids("Who?")).rpartition("<think>")[1:]
    thoughts = "the template's" if "\n" in opened[1] else "ours"
    whole = chat.tokenizer.decode(whole_ids(chat, [turn], ["plain"]))
    assert whole.endswith(chat.end_of_turn + chat.tokenizer.decode(chat.observation_ids("plain")))
    inner = re.search("<tool_call>(.*?)</tool_call>", chat.system, re.DOTALL)[1]
    sign = next(
        sign
        for sign in ("<parameter=", "<arg_key>", '"parameters"', '"arguments"')
        if sign in inner
    )
    return f"| {path.stem} | works | {thoughts} | `{sign}` | {chat.role} |"


def test_the_table_of_families_is_what_the_code_does():
    folder = SHARED / "chat_templates"
    if not folder.is_dir():
        pytest.skip("the chat templates are not here")
    page = (ROOT / "docs/models.md").read_text()
    rows = [of_family(path) for path in sorted(folder.glob("*.jinja"))]
    assert all(row in page for row in rows), "\n".join(rows)


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "llama3_1", "lfm2", "gemma3"]
)
def test_conversations_equal_the_renderings_of_real_templates(name):
    folder = SHARED / "chat_templates"
    if not folder.is_dir():
        pytest.skip("the chat templates are not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-tokenizer")
    template = (folder / f"{name}.jinja").read_text()
    marks = sorted(set(re.findall(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "bos_token": "<|endoftext|>"})
    tokenizer.chat_template = template
    tokenizer.add_tokens(["<think>", "</think>"])
    chat = ChatFormat(tokenizer, DATE)
    opened = chat.tokenizer.decode(chat.prompt_ids("Who?")).rpartition("<think>")[2]
    start = "" if opened else "\n"
    turns = [f"{start}I look.\n</think>\n\n<tool_call>{{}}</tool_call>"] * 2
    results = ["[{'search_query': \"é\\n\", 'web_page_info_list': []}]", "plain words"]
    assert appended_ids(chat, turns, results) == whole_ids(
        chat, ["<think>" + opened + turn for turn in turns], results
    )
    assert TOOLS["browse"].argument in tokenizer.decode(chat.prompt_ids("Who?"))
