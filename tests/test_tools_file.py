"""tools_file: schemas of one's own, passed to the chat template as they stand."""

import json
import re

import pytest
from test_chat_templates import TALK, TOOLS_SHOWN, chat_of

from deepresearcher_min.config import ConfigError
from deepresearcher_min.protocol import read_tools

pytestmark = pytest.mark.quick


def test_schemas_of_ones_own_reach_the_template_verbatim(tmp_path):
    found = [{"function": each["function"], "type": "function"} for each in reversed(read_tools())]
    found[0]["function"]["description"] = ' Öffne "Seiten".\n'
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(found))
    chat = chat_of(
        TOOLS_SHOWN.replace(", indent=2", "").replace("(indent=2)", "").replace("TAUGHT", "")
        + TALK,
        tools=read_tools(str(path)),
    )
    shown = "".join(json.dumps(each, ensure_ascii=False) for each in found)
    assert chat.template(chat.opening("x"), chat.tools).startswith(f"<|system|>{shown}<|end|>")
    assert json.dumps(found[0]) in chat_of(TALK, tools=found).system  # a template that shows none
    with pytest.raises(ValueError, match="tools_file"):
        chat_of(TALK, tools=found, system_prompt="mine")


def changed(name: str, value) -> str:
    found = read_tools()
    if name == "argument":
        found[0]["function"]["parameters"]["properties"] = {value: {}}
    else:
        found[0]["function"][name] = value
    return json.dumps(found)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        "[" * 10_000,
        "3",
        "[]",
        "{}",
        "[3]",
        '[{"type": "function"}]',
        json.dumps(read_tools()[:1]),
        json.dumps(read_tools() + read_tools()[:1]),
        changed("name", "search"),
        changed("name", ["web_search"]),
        changed("argument", "queries"),
        changed("parameters", None),
        "\udc80",
    ],
)
def test_schemas_of_other_tools_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "tools.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=re.escape(f"tools_file={str(path)!r}")) as refusal:
        read_tools(str(path))
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="tools_file"):
        read_tools(str(tmp_path / "none.json"))
