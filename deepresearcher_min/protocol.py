"""The protocol between policy and world: tools, prompt, the grammar of a turn, and observations.

A trajectory that is built by appending what `ChatFormat` gives equals the chat template's own rendering of the same
conversation. Left out: other call syntaxes, and more than one call a turn, as in the published system.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from deepresearcher_min.config import ROOT

THINK = "<think>"  # forced: part of every generation prompt, never sampled, never trained
SYSTEM_PROMPT = (ROOT / "prompts/agent.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Tool:
    """One tool: how the model calls it, with a list of strings, and the shape of what each of them brings."""

    name: str
    description: str
    argument: str  # of the call: a list of keys (queries, addresses)
    meaning: str
    most: str  # the config key that limits the number of keys
    shape: tuple[str, str]  # in an observation: the name of a key, and that of the list of items that it brought
    item: Callable[[str], dict[str, Any]]  # one item with these words as its content


def search_item(summary: str, title: str = "", url: str = "") -> dict[str, Any]:
    return {"quick_summary": summary, "title": title, "url": url}


def page_item(summary: str, number: int = 0) -> dict[str, Any]:
    return {"page_number": number, "page_summary": summary}


TOOLS = {  # by kind, which is also the name of the method of rollout.Tools that does the work
    "search": Tool(
        "web_search", "Search the web.", "query", "One to three search queries, answered together.", "max_queries",
        ("search_query", "web_page_info_list"), search_item,
    ),
    "browse": Tool(
        "browse_webpage", "Read web pages and take notes.", "url_list", "URLs that an earlier search showed.",
        "max_urls", ("url", "information"), page_item,
    ),
}  # fmt: skip


def schemas() -> list[dict[str, Any]]:
    """The tools as chat templates want them."""
    described = []
    for tool in TOOLS.values():
        keys = {"type": "array", "items": {"type": "string"}, "description": tool.meaning}
        parameters = {"type": "object", "properties": {tool.argument: keys}, "required": [tool.argument]}
        function = {"name": tool.name, "description": tool.description, "parameters": parameters}
        described.append({"type": "function", "function": function})
    return described


@dataclass(frozen=True)
class Call:
    kind: str  # search | browse: a key of TOOLS
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    text: str
    kind = "answer"


@dataclass(frozen=True)
class Malformed:
    reason: str
    kind = "malformed"


def parse_turn(text: str) -> Call | Answer | Malformed:
    """Read one assistant turn, with or without the opening <think>, which is forced.

    After </think> the first complete <answer> counts, else the first complete <tool_call>; the rest is ignored.
    """
    thought, closed, rest = text.lstrip().removeprefix(THINK).partition("</think>")
    if not closed:
        return Malformed("the thought is not closed by </think>")
    if THINK in thought:
        return Malformed("a second <think> opens inside the thought")
    if answer := re.search("<answer>(.*?)</answer>", rest, re.DOTALL):
        return Answer(answer[1].strip())
    if call := re.search("<tool_call>(.*?)</tool_call>", rest, re.DOTALL):
        return parse_call(call[1])
    return Malformed("neither a complete <tool_call> nor a complete <answer> follows the thought")


def parse_call(text: str) -> Call | Malformed:
    try:
        # strict=False: models write raw line breaks inside strings. RecursionError: "[[[[..." of some thousand.
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return Malformed("the tool call is not valid JSON")
    for kind, tool in TOOLS.items():
        match call:
            case {"name": tool.name, "arguments": {tool.argument: found}}:
                values = [found] if isinstance(found, str) else found  # not in a list: the meaning is plain
                if isinstance(values, list) and all(isinstance(value, str) for value in values):
                    keys = tuple(value.strip() for value in values if value.strip())
                    return Call(kind, keys) if keys else Malformed(f"{tool.argument} is empty")
    return Malformed("the tool call does not name a tool and its argument, a list of strings")


@dataclass(frozen=True)
class Entry:
    """What one query or one URL brought; a failure is one item with the reason in words as its content."""

    key: str  # the query or the URL
    items: tuple[dict[str, Any], ...]  # best first


def render(kind: str, entries: Sequence[Entry], kept: int | None = None) -> str:
    """The observation: the Python repr of a list of dicts with keys in alphabetical order.

    `kept` limits the items of all entries together, by rank: every entry's best, then every entry's second, and so on.
    """
    ranks = sorted((rank, i) for i, entry in enumerate(entries) for rank in range(len(entry.items)))
    shown = Counter(i for _, i in ranks[:kept])  # so many items of each entry
    key_name, items_name = TOOLS[kind].shape
    found = [{key_name: entry.key, items_name: list(entry.items[: shown[i]])} for i, entry in enumerate(entries)]
    return repr([dict(sorted(each.items())) for each in found])


class ChatFormat:
    """Token ids of prompts and observations; ValueError where the tokenizer's chat template does not show tools."""

    def __init__(self, tokenizer: Any, date: str, system_prompt: str = "") -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned (chat) model")
        self.tokenizer, self.encode = tokenizer, partial(tokenizer.encode, add_special_tokens=False)
        self.tools: list[dict[str, Any]] | None = schemas()  # None: eval.py's baselines have none
        self.system = (system_prompt or SYSTEM_PROMPT).replace("{date}", date)
        asked = self.opening("x")
        if not system_prompt and self.template(asked, self.tools) == self.template(asked, None):  # it ignores tools
            self.system += "\n\nTools:\n" + "\n".join(map(json.dumps, schemas()))
        added = tokenizer.added_tokens_decoder.values()
        self.derive_frame(sorted((str(token) for token in added if token.special), key=len, reverse=True))
        marks = sorted(str(token) for token in added if token.special or "<" in str(token))  # not: runs of spaces
        tags = "</?(?:think|answer|tool_call|tool_response)>"
        self.unsafe = re.compile("|".join([tags, *map(re.escape, marks)]))

    def opening(self, question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": question}]

    def template(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)

    def derive_frame(self, specials: list[str]) -> None:
        """Read off the template what stands between an assistant turn, a tool's words and the next turn."""
        messages = [{"role": "assistant", "content": "THE-TURN"}, {"role": "tool", "content": "THE-WORDS"}]
        text = self.template([*self.opening("x"), *messages], self.tools) + THINK
        found = re.search("THE-TURN(.*?)THE-WORDS(.*)", text, re.DOTALL)
        if not found:
            raise ValueError("the chat template leaves out assistant or tool messages; the agent loop needs both")
        between, after = found.groups()
        if not between.startswith(tuple(specials)):
            raise ValueError("the chat template puts no special token behind an assistant turn; nothing can end it")
        # The tool's words are encoded in one go with the ordinary text around them, up to the next special token
        # on either side: there a tokenizer always splits, so the pieces' ids are the whole's ids.
        special = re.compile(f"({'|'.join(map(re.escape, specials))})")
        _, end_of_turn, *before, self.lead = special.split(between)
        self.trail, *next_turn = special.split(after)
        self.end_of_turn_id: int = self.tokenizer.convert_tokens_to_ids(end_of_turn)
        self.before, self.after = self.encode("".join(before)), self.encode("".join(next_turn))

    def prompt_ids(self, question: str) -> list[int]:
        """[P] ids of system, question and generation prompt, the forced <think> included."""
        return self.encode(self.template(self.opening(self.defuse(question)), self.tools) + THINK)

    def message_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """[P] ids of a plain conversation without tools, ready for the model to go on (readers use it)."""
        safe = [{**message, "content": self.defuse(message["content"])} for message in messages]
        return self.encode(self.template(safe, None))

    def observation_ids(self, text: str) -> list[int]:
        """[E] ids of everything between a sampled end-of-turn token and the next turn's first sampled token."""
        words = self.encode(self.lead + self.defuse(text) + self.trail, split_special_tokens=True)
        return self.before + words + self.after

    def fit(self, kind: str, entries: Sequence[Entry], max_tokens: int) -> tuple[str, list[int], int]:
        """Render an observation within a token budget: (text, ids, number of items dropped).

        Whole items are dropped, worst rank first; if not even one of them fits, every entry says so in words.
        """

        def size(kept: int) -> int:
            return len(self.observation_ids(render(kind, entries, kept)))

        total = kept = sum(len(entry.items) for entry in entries)
        text = render(kind, entries)
        ids = self.observation_ids(text)
        if len(ids) > max_tokens:
            kept = bisect_right(range(1, total), max_tokens, key=size)
            too_long = (TOOLS[kind].item("The result is too long to be shown."),)
            excuse = [Entry(entry.key[:100], too_long) for entry in entries]
            text = render(kind, entries, kept) if kept else render(kind, excuse)
            ids = self.observation_ids(text)
        return text, ids, total - kept

    def defuse(self, text: str) -> str:
        """Break tags and added tokens in foreign text by a space; split_special_tokens spares Qwen's <tool_call>."""
        return self.unsafe.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text for parsing and for people; never encoded again."""
        ids = list(token_ids)
        if ids[-1:] == [self.end_of_turn_id]:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
