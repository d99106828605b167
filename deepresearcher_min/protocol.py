"""The protocol between policy and world: prompt, tool schemas, the grammar of a turn, and observations.

Two directions, one file. Text to action: `parse_turn` reads one assistant turn. World to tokens: `ChatFormat`
turns questions and observations into token ids, with every frame derived from the tokenizer's own chat
template, so that a trajectory built by appending equals the template's rendering of the same conversation.

Left out: other call syntaxes and parallel calls. A turn makes one call, as in the published system.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

THINK = "<think>"  # forced: part of every generation prompt, never sampled, never trained


@dataclass(frozen=True)
class Tool:
    """One tool: how the model calls it, with a list of strings, and the shape of what each of them brings."""

    kind: str  # the name in Turn.kind, and of the method of rollout.Tools that does the work
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


TOOLS = {
    "web_search": Tool(
        "search", "Search the web.", "query", "One to three search queries, answered together.", "max_queries",
        ("search_query", "web_page_info_list"), search_item,
    ),
    "browse_webpage": Tool(
        "browse", "Read web pages and take notes.", "url_list", "URLs that an earlier search showed.", "max_urls",
        ("url", "information"), page_item,
    ),
}  # fmt: skip


def tool_of(kind: str) -> Tool:
    return next(tool for tool in TOOLS.values() if tool.kind == kind)


def schemas() -> list[dict[str, Any]]:
    """The tools as chat templates want them."""
    described = []
    for name, tool in TOOLS.items():
        keys = {"type": "array", "items": {"type": "string"}, "description": tool.meaning}
        parameters = {"type": "object", "properties": {tool.argument: keys}, "required": [tool.argument]}
        function = {"name": name, "description": tool.description, "parameters": parameters}
        described.append({"type": "function", "function": function})
    return described


SYSTEM_PROMPT = """\
Today is {date} (UTC). You are a research agent. You answer a question by finding the facts on the web; do not
rely on memory where a search can tell.

Two tools are yours: web_search takes a list of queries and shows titles, URLs and summaries; browse_webpage takes
a list of URLs from those results and gives notes on the pages.

Work in turns. Every turn starts with your reasoning between <think> and </think> and goes on in one of two ways:

to use a tool:
<think> what you know, what is missing, what to do next </think>
<tool_call>{{"name": "web_search", "arguments": {{"query": ["..."]}}}}</tool_call>

to finish, once the facts support it:
<think> why this is the answer </think>
<answer>the answer</answer>

After a tool call stop; the result comes in the next message. The answer is only words, numbers or a phrase, with no
explanation; for a yes-or-no question it is yes or no."""


@dataclass(frozen=True)
class Call:
    kind: str  # search | browse: Tool.kind
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    text: str


@dataclass(frozen=True)
class Malformed:
    reason: str


Action = Call | Answer | Malformed


def parse_turn(text: str) -> Action:
    """Read one assistant turn; its opening <think> is forced, so it may be present or not.

    The first complete tag pair after </think> counts, an answer wins over a call, and what follows is ignored.

    >>> parse_turn("<think> done </think> <answer> Oslo </answer>")
    Answer(text='Oslo')
    """
    text = text.lstrip().removeprefix(THINK)
    thought, closed, rest = text.partition("</think>")
    if not closed:
        return Malformed("the thought is not closed by </think>")
    if THINK in thought:
        return Malformed("a second <think> opens inside the thought")
    answer = first_pair(rest, "answer")
    if answer is not None:
        return Answer(answer.strip())
    call = first_pair(rest, "tool_call")
    if call is None:
        return Malformed("neither a complete <tool_call> nor a complete <answer> follows the thought")
    return parse_call(call)


def first_pair(text: str, tag: str) -> str | None:
    """What stands between the first <tag> and the first </tag> after it; None if there is no such pair."""
    _, opened, rest = text.partition(f"<{tag}>")
    inner, closed, _ = rest.partition(f"</{tag}>")
    return inner if opened and closed else None


def parse_call(call: str) -> Call | Malformed:
    try:
        # strict=False: models write raw line breaks inside strings. RecursionError: "[[[[..." of some thousand.
        data = json.loads(call, strict=False)
    except (ValueError, RecursionError):
        return Malformed("the tool call is not valid JSON")
    if not isinstance(data, dict) or not isinstance(data.get("arguments"), dict):
        return Malformed('the tool call is not {"name": ..., "arguments": {...}}')
    name, arguments = data.get("name"), data["arguments"]
    tool = TOOLS.get(str(name))
    if tool is None:
        return Malformed(f"there is no tool named {str(name)[:50]!r}")
    values = arguments.get(tool.argument)
    if isinstance(values, str):  # a single string where a list is asked for: the meaning is plain
        values = [values]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return Malformed(f"{name} needs {tool.argument}: a list of strings")
    values = tuple(value.strip() for value in values if value.strip())
    return Call(tool.kind, values) if values else Malformed(f"{name} was called with an empty {tool.argument}")


@dataclass(frozen=True)
class Entry:
    """What one query or one URL brought: `items` are the droppable parts, best first.

    A failure is one item of the same shape with the reason in words where the content would be.
    """

    key: str  # the query or the URL
    items: tuple[dict[str, Any], ...]


def render(kind: str, entries: Sequence[Entry], kept: int | None = None) -> str:
    """The observation: the Python repr of a list of dicts with keys in alphabetical order.

    `kept` limits the number of items over all entries, taken by rank: first every entry's best, then every
    entry's second, and so on.
    """
    ranks = sorted((rank, i) for i, entry in enumerate(entries) for rank in range(len(entry.items)))
    chosen = set(ranks[:kept])
    key_name, items_name = tool_of(kind).shape
    data = []
    for i, entry in enumerate(entries):
        items = [item for rank, item in enumerate(entry.items) if (rank, i) in chosen]
        data.append(dict(sorted({key_name: entry.key, items_name: items}.items())))
    return repr(data)


class ChatFormat:
    """Token ids of prompts and observations for one tokenizer, one system prompt and one date.

    Raises ValueError when the tokenizer has no chat template or the template does not show tool messages.
    """

    def __init__(self, tokenizer: Any, date: str, system_prompt: str = "") -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned (chat) model")
        self.tokenizer = tokenizer
        if system_prompt:
            self.system = system_prompt.replace("{date}", date)
        else:
            self.system = SYSTEM_PROMPT.format(date=date)
            if self._render_prompt("x", schemas()) == self._render_prompt("x", None):  # a template that ignores tools
                self.system += "\n\nTools:\n" + "\n".join(json.dumps(tool) for tool in schemas())
        added = tokenizer.added_tokens_decoder.values()
        specials = sorted((str(token) for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)))
        tags = [f"<{slash}{tag}>" for tag in ("think", "answer", "tool_call", "tool_response") for slash in ("", "/")]
        marks = {str(token) for token in added if token.special or "<" in str(token)}  # not: runs of spaces
        self._unsafe = re.compile("|".join(sorted(map(re.escape, marks | set(tags)))))
        self._derive_frame()

    def _derive_frame(self) -> None:
        """Read off the template what stands between an assistant turn, a tool's words and the next turn."""
        turn, words = "ASSISTANT-TURN", "TOOL-WORDS"
        messages = [*self._messages("x"), {"role": "assistant", "content": turn}, {"role": "tool", "content": words}]
        text = self._template(messages, schemas())
        if turn not in text or words not in text:
            raise ValueError("the chat template leaves out assistant or tool messages; the agent loop needs both")
        between, after = text.split(turn, 1)[1].split(words, 1)
        after += THINK
        end_of_turn = self._special.match(between)
        if not end_of_turn:
            raise ValueError("the chat template puts no special token behind an assistant turn; nothing can end it")
        self.end_of_turn_id: int = self.tokenizer.convert_tokens_to_ids(end_of_turn.group())
        between = between[end_of_turn.end() :]
        # The tool's words are encoded in one go with the ordinary text around them, up to the next special token
        # on either side: there a tokenizer always splits, so the pieces' ids are the whole's ids.
        cut = max((match.end() for match in self._special.finditer(between)), default=0)
        first = self._special.search(after)
        self._frame_before = self._encode(between[:cut])
        self._lead, self._trail = between[cut:], after[: first.start() if first else len(after)]
        self._frame_after = self._encode(after[len(self._trail) :])

    def _messages(self, question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": question}]

    def _template(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)

    def _render_prompt(self, question: str, tools: list[dict[str, Any]] | None) -> str:
        return self._template(self._messages(question), tools) + THINK

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def prompt_ids(self, question: str) -> list[int]:
        """[P] ids of system, question and generation prompt, the forced <think> included."""
        return self._encode(self._render_prompt(self.defuse(question), schemas()))

    def message_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """[P] ids of a plain conversation without tools, ready for the model to go on (readers use it)."""
        safe = [{**message, "content": self.defuse(message["content"])} for message in messages]
        return self._encode(self._template(safe, None))

    def observation_ids(self, text: str) -> list[int]:
        """[E] ids of everything between a sampled end-of-turn token and the next turn's first sampled token."""
        piece = self._lead + self.defuse(text) + self._trail
        words = self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return self._frame_before + words + self._frame_after

    def fit(self, kind: str, entries: Sequence[Entry], max_tokens: int) -> tuple[str, list[int], int]:
        """Render an observation within a token budget: (text, ids, number of items dropped).

        What does not fit is dropped by whole items, worst rank first; if not even one item fits, every entry
        says so in words.
        """
        total = sum(len(entry.items) for entry in entries)
        best: tuple[str, list[int]] | None = None
        fits, too_many, kept = 0, total + 1, total  # bisect for the largest number of items that fits; first try all
        while kept > fits:
            text = render(kind, entries, kept)
            ids = self.observation_ids(text)
            if len(ids) <= max_tokens:
                best, fits = (text, ids), kept
            else:
                too_many = kept
            kept = (fits + too_many) // 2
        if best is None:
            too_long = tool_of(kind).item("The result is too long to be shown.")
            text = render(kind, [Entry(entry.key[:100], (too_long,)) for entry in entries])
            best = text, self.observation_ids(text)
        return *best, total - fits

    def defuse(self, text: str) -> str:
        """Break every protocol tag and every added token of the tokenizer in foreign text by a space.

        split_special_tokens alone does not do it: added tokens that are not "special", such as Qwen's
        <tool_call>, are matched all the same.
        """
        return self._unsafe.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text for parsing and for people; never encoded again."""
        ids = list(token_ids)
        if ids and ids[-1] == self.end_of_turn_id:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
