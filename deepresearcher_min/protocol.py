"""The protocol between policy and world: tools, prompt, the grammar of a turn, and observations.

A trajectory that is built by appending what `ChatFormat` gives equals the chat template's own
rendering of the same conversation, with the date, the thinking and the end tokens that the run
gives it. No model is known by its name. Left out: more than one call a turn, as in the published
system.
"""

import ast
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from deepresearcher_min.config import ROOT, named

Schemas = list[dict[str, Any]]
Messages = list[dict[str, str]]
THINK = "<think>"  # forced: part of every generation prompt, never sampled, never trained
load_json = partial(json.loads, strict=False)  # models write raw line breaks inside strings
PAIR = re.compile(  # of a name and a value
    r"<(?:parameter=|arg_key>)\s*([^<>]*?)\s*(?:>|</arg_key>\s*<arg_value>)(.*?)</(?:parameter|arg_value)>",
    re.DOTALL,
)
OBSERVATION = "[{'a': \"<b> & \\n é\"}]"  # holds what a template may write otherwise
TURN, WORDS = (
    "THE-TURN",
    "THE-WORDS",
)  # stand for a turn and a tool's words while a template is looked at
EMPTY_THOUGHT = re.compile(
    r"\s*(?:<think>\s*)?(?:</think>\s*)?\Z"
)  # at the end of a generation prompt
SYSTEM_PROMPT = (ROOT / "prompts/agent.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Tool:
    """One tool: how the model calls it, with a list of strings, and the shape of what each of them
    brings.
    """

    name: str
    description: str
    argument: str  # of the call: a list of keys (queries, addresses)
    meaning: str
    most: str  # the config key that limits the number of keys
    shape: tuple[
        str, str
    ]  # in an observation: the name of a key, and that of the list of items that it brought
    item: Callable[[str], dict[str, Any]]  # one item with these words as its content
    # what is said of a key beyond the limit; empty: it is left out, as in the published system
    over: str = ""


def search_item(summary: str, title: str = "", url: str = "") -> dict[str, Any]:
    return {"quick_summary": summary, "title": title, "url": url}


def page_item(summary: str, number: int = 0) -> dict[str, Any]:
    return {"page_number": number, "page_summary": summary}


TOOLS = {  # by kind, which is also the name of the method of rollout.Tools that does the work
    "search": Tool(
        "web_search",
        "Search the web.",
        "query",
        "One to three search queries, answered together.",
        "max_queries",
        ("search_query", "web_page_info_list"),
        search_item,
    ),
    "browse": Tool(
        "browse_webpage",
        "Read web pages and take notes.",
        "url_list",
        "URLs that an earlier search showed.",
        "max_urls",
        ("url", "information"),
        page_item,
        "This page was not opened: one call opens at most {most}.",
    ),
}


def schemas() -> Schemas:
    """The tools as chat templates want them."""
    described = []
    for tool in TOOLS.values():
        keys = {"type": "array", "items": {"type": "string"}, "description": tool.meaning}
        parameters = {
            "type": "object",
            "properties": {tool.argument: keys},
            "required": [tool.argument],
        }
        function = {"name": tool.name, "description": tool.description, "parameters": parameters}
        described.append({"type": "function", "function": function})
    return described


def read_tools(path: str) -> Schemas | None:
    """The schemas of tools_file, as they stand there; ConfigError where they describe other tools
    than these.
    """
    if not path:
        return None
    wanted = sorted([tool.name, tool.argument] for tool in TOOLS.values())
    with named("tools_file", path, "write a JSON list of tool schemas"):
        found = json.loads(Path(path).read_bytes())
        functions = [schema["function"] for schema in found]
        described = sorted([each["name"], *each["parameters"]["properties"]] for each in functions)
        if described != wanted:
            raise ValueError(f"tools and arguments are {described}, but must be {wanted}")
    return found


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

    After </think> the first complete <answer> counts, else the first complete <tool_call>; the rest
    is ignored.
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
    """Read what stands between the tags, in whichever syntax."""
    try:
        name, arguments = read_call(text)
        for kind, tool in TOOLS.items():
            if name == tool.name:
                keys = read_keys(arguments[tool.argument])
                return Call(kind, keys) if keys else Malformed(f"{tool.argument} is empty")
    except Exception:  # a model may write anything: no list, half a list, a list ten thousand deep
        return Malformed(
            "the tool call is not JSON, or tags, with the tool's argument, a list of strings"
        )
    return Malformed("the tool call does not name a tool")


def read_call(text: str) -> tuple[Any, Any]:
    """Name and arguments, neither checked; any error where there are none.

    In tags: <function=NAME> around <parameter=KEY>VALUE</parameter> or JSON; NAME and pairs of
    <arg_key> and <arg_value>. JSON, also fenced: `name` (or `function`) and `arguments` or
    `parameters`, an object or its text.
    """
    text = re.sub(r"\A\s*```\w*(.*)```\s*\Z", r"\1", text, flags=re.DOTALL).strip()
    if tagged := re.match(r"(?:<function=)?([\w.-]+)>?\s*(<parameter=|<arg_key>|\{)", text):
        body = text[tagged.start(2) :].partition("</function>")[0]
        if tagged[2] == "{":
            return tagged[1], load_json(body)
        arguments: Any = defaultdict(list)
        for key, value in PAIR.findall(body):
            arguments[key] += read_keys(value)
        return tagged[1], arguments
    call = load_json(text)
    if isinstance(call, list):
        call = call[0]
    if isinstance(call.get("function"), dict):
        call = call["function"]
    given = call.get("arguments", call.get("parameters"))
    return call.get("name", call.get("function")), load_json(given) if isinstance(
        given, str
    ) else given


def read_keys(value: Any) -> tuple[str, ...]:
    """The strings that an argument's value means: a list, a list's text, or plain text with one on
    each line.
    """
    if isinstance(value, str):
        if not re.match(r"\s*\[\s*[\"'\]]", value):
            value = value.splitlines()
        else:
            try:
                value = load_json(value)
            except ValueError:
                value = ast.literal_eval(value.strip())  # in single quotes
    if not isinstance(value, list):
        raise TypeError("not a list")
    keys = [each.strip() for each in value]
    return tuple(filter(None, keys))


@dataclass(frozen=True)
class Entry:
    """What one query or one URL brought; a failure is one item with the reason in words as its
    content.
    """

    key: str  # the query or the URL
    items: tuple[dict[str, Any], ...]  # best first


def best(entries: Sequence[Entry], kept: int | None) -> list[Entry]:
    """The entries with `kept` items together, by rank: every entry's best, then every entry's
    second, and so on.
    """
    ranks = sorted((rank, i) for i, entry in enumerate(entries) for rank in range(len(entry.items)))
    shown = Counter(i for _, i in ranks[:kept])  # so many items of each entry
    return [Entry(entry.key, entry.items[: shown[i]]) for i, entry in enumerate(entries)]


def render(kind: str, entries: Sequence[Entry], kept: int | None = None) -> str:
    """The observation: the Python repr of a list of dicts with keys in alphabetical order; `kept`
    as in `best`.
    """
    key_name, items_name = TOOLS[kind].shape
    found = [{key_name: entry.key, items_name: list(entry.items)} for entry in best(entries, kept)]
    return repr([dict(sorted(each.items())) for each in found])


def declared_ends(model: str) -> list[int]:
    """The end tokens of a model's generation config; none if it has no such file."""
    try:
        found = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return []
    return [found] if isinstance(found, int) else found or []


def template_inputs(date: str) -> dict[str, Any]:
    """What templates ask for by these names: the run's date, not the clock's, and a thought in
    every turn.
    """

    def strftime_now(form: str) -> str:
        try:
            return datetime.fromisoformat(date).strftime(form)
        except ValueError:  # a date in words, or none
            return date

    dates = {
        "strftime_now": strftime_now,
        "date_string": strftime_now("%d %b %Y"),
    }  # as Llama's write it
    return {**dates, "enable_thinking": True, "add_generation_prompt": True, "tokenize": False}


def open_thought(text: str) -> str:
    """A generation prompt with one open thought at its end: the template's own, or ours for none or
    a closed one.
    """
    if text.rstrip().endswith(THINK):
        return text
    return re.sub(r"<think>\s*</think>\s*\Z|</think>\s*\Z", "", text) + THINK


def example_call(once: str, twice: str) -> str:
    """A call in the syntax that a prompt teaches, else in ours; the prompt with all schemas once,
    and with all twice.

    What comes with each schema, which may hold the same signs, is twice as often in the second.
    """
    name, argument = TOOLS["search"].name, TOOLS["search"].argument
    keys = '["..."]'
    ours = f'{{"name": "{name}", "arguments": {{"{argument}": {keys}}}}}'
    taught = {
        "<parameter=": f"\n<function={name}>\n<parameter={argument}>\n{keys}\n</parameter>\n</function>\n",
        "<function=": f'<function={name}>{{"{argument}": {keys}}}</function>',
        "<arg_key>": f"{name}\n<arg_key>{argument}</arg_key>\n<arg_value>{keys}</arg_value>\n",
        '"arguments"': ours,
        '"parameters"': ours.replace("arguments", "parameters"),
    }
    forms = [form for sign, form in taught.items() if 2 * once.count(sign) > twice.count(sign)]
    return f"<tool_call>{[*forms, ours][0]}</tool_call>"


class ChatFormat:
    """Token ids of prompts and observations, as the tokenizer's chat template and the given date
    make them.

    `tools` are schemas in place of ours. A turn ends with the template's end token, the
    tokenizer's, or any of
    `end_ids`, the model's. ValueError where the template, in its own words, cannot carry the
    agent's conversation, or where the ids that we append would not be those of the conversation as
    a whole.
    """

    tools: Any  # schemas; None in eval.py's baselines
    role = "tool"  # of results; "user" where the template refuses or drops tool messages

    def __init__(
        self,
        tokenizer: Any,
        date: str,
        system_prompt: str = "",
        tools: Schemas | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; use an instruction-tuned (chat) model"
            )
        self.tokenizer, self.encode = tokenizer, partial(tokenizer.encode, add_special_tokens=False)
        self.inputs, self.tools = template_inputs(date), tools or schemas()
        self.frames: dict[int, list[str]] = {}  # around a result, by the number of earlier ones
        self.system = (system_prompt or SYSTEM_PROMPT).replace("{date}", date)
        self.show_tools(bool(system_prompt), tools is not None)
        added = tokenizer.added_tokens_decoder.values()
        marks = [
            str(token) for token in added if token.special or "<" in str(token)
        ]  # not: runs of spaces
        marks.sort(key=len, reverse=True)
        self.mark = "|".join(map(re.escape, marks)) or "(?!)"
        self.unsafe = re.compile(f"</?(?:think|answer|tool_call|tool_response)>|{self.mark}")
        try:
            ends = self.read_frame()
        except ValueError:
            self.role = "user"
            ends = self.read_frame()
        ids = tokenizer.convert_tokens_to_ids(ends)
        self.end_of_turn, self.end_of_turn_id = ends[0], ids[0]
        self.end_ids = tuple({*ids, *end_ids, tokenizer.eos_token_id} - {None})
        whole = self.encode(open_thought(self.talk(self.result(WORDS))))
        appended = [self.end_of_turn_id, *self.observation_ids(WORDS)]
        if whole[-len(appended) :] != appended:
            raise ValueError(
                "the tokenizer splits a conversation otherwise than its parts; use another model"
            )

    def show_tools(self, own_prompt: bool, own_tools: bool) -> None:
        """Put into our system prompt the example of a call, and the schemas if the template leaves
        them out.
        """
        asked = self.opening("x")
        once, twice = self.template(asked, self.tools), self.template(asked, self.tools * 2)
        ignored = once == twice
        if own_prompt and own_tools and ignored:
            raise ValueError(
                "the chat template shows no tools; leave out tools_file, or system_prompt_file"
            )
        if own_prompt:
            return
        self.system = self.system.replace("{call}", example_call(once, twice))
        if ignored:
            self.system += "\n\nTools:\n" + "\n".join(map(json.dumps, self.tools))

    def opening(self, question: str) -> Messages:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": question}]

    def template(self, messages: Messages, tools: Schemas | None, **inputs: Any) -> str:
        """The template's text up to the next assistant turn; ValueError in the template's words."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **self.inputs | inputs)
        except Exception as error:  # a template is a program, and may raise anything
            words = " ".join(str(error).split())
            raise ValueError(
                f"the chat template refuses the agent's conversation: {words}"
            ) from error

    def talk(self, last: dict[str, str], earlier: int = 0) -> str:
        """A conversation that ends with this message behind a turn, and with so many results
        before.
        """
        turn = {"role": "assistant", "content": TURN}
        messages = [turn, self.result(WORDS)] * earlier + [turn, last]
        return self.template(self.opening("x") + messages, self.tools)

    def result(self, text: str) -> dict[str, str]:
        """What a tool says as a message; in a user's turn it is wrapped as Qwen's template wraps
        it.
        """
        if self.role == "user":
            text = f"<tool_response>\n{text}\n</tool_response>"
        return {"role": self.role, "content": text}

    def read_frame(self) -> list[str]:
        """The special tokens behind a turn that a tool, and one that a user answers.

        ValueError unless a turn follows the generation prompt, and something ends it.
        """
        prompt, ends = EMPTY_THOUGHT.sub("", self.template(self.opening("x"), self.tools)), []
        for last in (self.result(WORDS), {"role": "user", "content": WORDS}):
            before, _, behind = self.talk(last).partition(TURN)
            if WORDS not in behind:
                raise ValueError(
                    "the chat template leaves out assistant or tool messages; the agent loop needs both"
                )
            if not EMPTY_THOUGHT.fullmatch(before.removeprefix(prompt)):
                raise ValueError(
                    f"the chat template's generation prompt is not how it begins a turn: {before[-60:]!r}"
                )
            end = re.match(rf"\s*({self.mark})", behind)
            if not end:
                raise ValueError(
                    "the chat template puts no special token behind an assistant turn; nothing can end it"
                )
            ends.append(end[1])
        return ends

    def prompt_ids(self, question: str) -> list[int]:
        """[P] ids of system, question and generation prompt, the forced <think> included."""
        return self.encode(
            open_thought(self.template(self.opening(self.defuse(question)), self.tools))
        )

    def message_ids(self, messages: Messages) -> list[int]:
        """[P] ids of a plain conversation without tools or thoughts, ready for the model to go on
        (readers use it).
        """
        safe = [{**message, "content": self.defuse(message["content"])} for message in messages]
        return self.encode(self.template(safe, None, enable_thinking=False))

    def observation_ids(self, text: str, earlier: int = 0) -> list[int]:
        """[E] ids of everything between a sampled end-of-turn token and the next turn's first
        sampled token.

        They are encoded behind that token, where a tokenizer always splits, so that they are the
        whole's ids. Some templates write the first result otherwise than those with `earlier` ones
        in front.
        """
        if earlier not in self.frames:
            self.frames[earlier] = self.behind_turn(OBSERVATION, earlier).split(OBSERVATION)
        frame, words = self.frames[earlier], self.defuse(text)
        as_it_is = (
            len(frame) == 2 and words == words.strip()
        )  # else the template writes it in its own way
        whole = words.join(frame) if as_it_is else self.behind_turn(words, earlier)
        return self.encode(whole)[1:]

    def behind_turn(self, words: str, earlier: int) -> str:
        """What the template puts behind a turn that a tool answers, its end token and the next
        prompt included.
        """
        talk = self.talk(self.result(words), earlier)
        behind = talk.split(TURN, earlier + 1)[-1].partition(self.end_of_turn)[2]
        return self.end_of_turn + open_thought(behind)

    def fit(
        self, kind: str, entries: Sequence[Entry], max_tokens: int, earlier: int = 0
    ) -> tuple[str, list[int], int]:
        """Render an observation within a token budget: (text, ids, number of items dropped).

        Whole items are dropped, worst rank first; if not even one of them fits, the first ten
        entries say so in words.
        """

        def show(kept: int | None) -> tuple[str, list[int]]:
            text = render(kind, entries, kept)
            return text, self.observation_ids(text, earlier)

        total = kept = sum(len(entry.items) for entry in entries)
        text, ids = show(total)
        if len(ids) > max_tokens:
            kept = bisect_right(range(1, total), max_tokens, key=lambda few: len(show(few)[1]))
            if not kept:
                too_long = (TOOLS[kind].item("The result is too long to be shown."),)
                entries = [Entry(entry.key[:100], too_long) for entry in entries[:10]]
            text, ids = show(kept or None)
        return text, ids, total - kept

    def defuse(self, text: str) -> str:
        """Break tags and added tokens in foreign text by a space; split_special_tokens spares
        Qwen's <tool_call>.
        """
        return self.unsafe.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text for parsing and for people; never encoded again."""
        ids = list(token_ids)
        if ids and ids[-1] in self.end_ids:
            ids.pop()
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
