"""The protocol between policy and world: tools, prompt, the grammar of a turn, and observations.

A trajectory that is built by appending what `ChatFormat` gives equals the chat template's own
rendering of the same conversation, with the date, the thinking and the end tokens that the run
gives it. No model is known by its name. Left out: more than one call a turn, as in the published
system.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from deepresearcher_min.config import ROOT, named
from deepresearcher_min.trajectory import Entry, best, load_json, unpacked

THINK = "<think>"  # forced: part of every generation prompt, never sampled, never trained
SYSTEM_PROMPT = (ROOT / "prompts/agent.txt").read_text("utf-8").strip()
# A call in tags; the groups: its name, all its arguments, and what they begin with.
TAGGED = re.compile(
    r"(?s)(?:<function=)?([\w.-]+)>?\s*((<parameter=|<arg_key>|\{).*?)(?:</function>|\Z)"
)
# One argument in tags; the groups: its name and its value.
PAIR = re.compile(
    r"(?s)<(?:parameter=|arg_key>)\s*([^<>]*?)\s*(?:>|</arg_key>\s*<arg_value>)"
    r"(.*?)</(?:parameter|arg_value)>"
)
# Stand in for real text while a template is looked at: a turn (no page holds a uuid), a tool's
# words, and an observation with signs that a template may escape.
TURN = uuid4().hex
SAID = "THE-SAID"
OBSERVATION = "[{'a': \"<b> & \\n é\"}]"
# An example of a call in each syntax, by a sign in the template's prompt that it teaches this one.
CALLS = {
    "<parameter=": "\n<function=web_search>\n<parameter=query>\n"
    '["..."]\n</parameter>\n</function>\n',
    "<function=": '<function=web_search>{"query": ["..."]}</function>',
    "<arg_key>": 'web_search\n<arg_key>query</arg_key>\n<arg_value>["..."]</arg_value>\n',
    '"arguments"': '{"name": "web_search", "arguments": {"query": ["..."]}}',
    '"parameters"': '{"name": "web_search", "parameters": {"query": ["..."]}}',
}
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>\s*)?(?:</think>\s*)?\Z")  # of a generation prompt
TAGS = "</?(?:think|answer|tool_call|tool_response)>"


@dataclass(frozen=True)
class Tool:
    """One tool: how the model calls it, with a list of strings, and what each of them brings. What
    the model is told of it stands in prompts/tools.json.
    """

    name: str
    argument: str  # of the call: a list of keys (queries, addresses)
    limit_key: str  # the config key that limits the number of keys
    shape: tuple  # in an observation: names of a key and of the items that it brought
    item: Any  # a function: one item with these words as its content
    over: str = ""  # what is said of a key beyond the limit; empty: it is left out, as published


def search_item(summary, title="", url=""):
    return {"quick_summary": summary, "title": title, "url": url}


def page_item(summary, number=0):
    return {"page_number": number, "page_summary": summary}


TOOLS = {  # by kind, which is also the name of the method of rollout.Tools that does the work
    "search": Tool(
        "web_search",
        "query",
        "max_queries",
        ("search_query", "web_page_info_list"),
        search_item,
    ),
    "browse": Tool(
        "browse_webpage",
        "url_list",
        "max_urls",
        ("url", "information"),
        page_item,
        "This page was not opened: one call opens at most {most}.",
    ),
}


def read_tools(path=ROOT / "prompts/tools.json"):
    """The tools as chat templates want them, as a file has them: ours, or tools_file. ConfigError
    where it describes other tools than TOOLS.
    """
    with named("tools_file", path, "write a JSON list of tool schemas"):
        found = json.loads(Path(path).read_bytes())
        functions = [schema["function"] for schema in found]
        described = sorted([each["name"], *each["parameters"]["properties"]] for each in functions)
        wanted = sorted([tool.name, tool.argument] for tool in TOOLS.values())
        if described != wanted:
            raise ValueError(f"tools and arguments are {described}, but must be {wanted}")
    return found


@dataclass(frozen=True)
class Call:
    kind: str  # search | browse: a key of TOOLS
    keys: tuple  # of strings


@dataclass(frozen=True)
class Answer:
    text: str
    kind = "answer"


class Malformed:
    kind = "malformed"


def parse_turn(text: str) -> Call | Answer | Malformed:
    """What a turn says: behind </think>, its first complete <answer>, or else <tool_call>, in
    whichever syntax.
    """
    thought, closed, rest = text.lstrip().removeprefix(THINK).partition("</think>")
    if not closed or THINK in thought:  # not ended, or a second one opens inside
        return Malformed()
    answer = re.search("(?s)<answer>(.*?)</answer>", rest)
    if answer:
        return Answer(answer[1].strip())
    call = re.search("(?s)<tool_call>(.*?)</tool_call>", rest)
    if call:
        # A model may write anything: no list, half a list, a list ten thousand deep.
        with suppress(Exception):
            name, arguments = read_call(call[1])
            for kind, tool in TOOLS.items():
                if name == tool.name:
                    keys = read_keys(arguments[tool.argument])
                    if keys:
                        return Call(kind, keys)
    return Malformed()


def read_call(text):
    """Name and arguments, neither checked; any error where there are none.

    In tags: <function=NAME> around <parameter=KEY>VALUE</parameter> or JSON; NAME and pairs of
    <arg_key> and <arg_value>. JSON, also fenced: `name` (or `function`) and `arguments` or
    `parameters`, an object or its text.
    """
    text = re.sub(r"(?s)\A\s*```\w*(.*)```\s*\Z", r"\1", text).strip()
    tagged = TAGGED.match(text)
    if tagged:
        name, given, sign = tagged.groups()
        if sign != "{":
            arguments = defaultdict(list)
            for key, value in PAIR.findall(given):
                arguments[key] += read_keys(value)
            return name, arguments
    else:
        call = load_json(text)
        if isinstance(call, list):
            call = call[0]
        if isinstance(call.get("function"), dict):
            call = call["function"]
        name = call.get("name", call.get("function"))
        given = call.get("arguments", call.get("parameters"))
    return name, load_json(given) if isinstance(given, str) else given


def read_keys(value):
    """The strings that a value means: a list, a list's text, or plain text, each on a line."""
    if isinstance(value, str):
        listed = re.match(r"\s*\[\s*[\"'\]]", value)
        value = unpacked(value.strip()) if listed else value.splitlines()
    if not isinstance(value, list):
        raise TypeError("not a list")
    return tuple(filter(None, map(str.strip, value)))


def render(kind, entries):
    """The observation: the Python repr of a list of dicts with keys in alphabetical order."""
    key_name, items_name = TOOLS[kind].shape
    found = []
    for entry in entries:
        parts = {key_name: entry.key, items_name: list(entry.items)}
        found.append(dict(sorted(parts.items())))
    return repr(found)


def template_inputs(date):
    """What templates ask for by these names: the run's date, not the clock's, and thoughts."""

    def strftime_now(form):
        try:
            return datetime.fromisoformat(date).strftime(form)
        except ValueError:  # a date in words, or none
            return date

    return {
        "strftime_now": strftime_now,
        "date_string": strftime_now("%d %b %Y"),  # as Llama's write it
        "enable_thinking": True,
        "add_generation_prompt": True,
        "tokenize": False,
    }


def open_thought(text):
    """A generation prompt that ends in one open thought: the template's own, or else ours."""
    if text.rstrip().endswith(THINK):
        return text
    return re.sub(r"<think>\s*</think>\s*\Z|</think>\s*\Z", "", text) + THINK


class ChatFormat:
    """Token ids of prompts and observations, as the tokenizer's chat template makes them.

    `tools` are schemas in place of ours. A turn ends with the template's end token, the
    tokenizer's, or any of `end_ids`, the model's. ValueError where the template, in its own words,
    cannot carry the agent's conversation, or where the ids that we append would not be the whole's.
    """

    tools: Any  # schemas; None in eval.py's baselines
    role = "tool"  # of results; "user" where the template refuses or drops tool messages

    def __init__(self, tokenizer, date, system_prompt="", tools=None, end_ids=()):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model")
        self.tokenizer = tokenizer
        self.encode = partial(tokenizer.encode, add_special_tokens=False)
        self.inputs = template_inputs(date)
        self.tools = tools or read_tools()
        # Before and behind a result, by the number of earlier ones.
        self.frame = cache(
            lambda earlier: self.behind_turn(OBSERVATION, earlier).split(OBSERVATION)
        )
        self.system = (system_prompt or SYSTEM_PROMPT).replace("{date}", date)
        self.show_tools(bool(system_prompt), tools is not None)
        added = tokenizer.added_tokens_decoder.values()
        # Added tokens that are not special and have no bracket are runs of spaces.
        marks = [str(token) for token in added if token.special or "<" in str(token)]
        marks.sort(reverse=True)  # "<ab" before "<a"
        self.mark = "|".join(map(re.escape, marks)) or "(?!)"  # which matches nothing
        self.unsafe = re.compile(f"(?s)(?={TAGS}|{self.mark})(.)")
        try:
            ends = self.read_ends()
        except ValueError:
            self.role = "user"
            ends = self.read_ends()
        ids = tokenizer.convert_tokens_to_ids(ends)
        self.end_of_turn = ends[0]
        self.end_of_turn_id = ids[0]
        self.end_ids = tuple({*ids, *end_ids, tokenizer.eos_token_id} - {None})
        before, _, behind = self.around_turn(self.result(SAID))
        whole = self.encode(before + TURN + open_thought(behind))
        appended = [self.end_of_turn_id, *self.observation_ids(SAID)]
        if whole[-len(appended) :] != appended:
            raise ValueError(
                "the tokenizer splits a conversation otherwise than its parts; use another model"
            )

    def show_tools(self, own_prompt, own_tools):
        """Put into our system prompt an example of a call, and schemas that the template ignores.

        The example is in the syntax that the template teaches, else in ours. A sign that the
        template itself writes is there as often when all schemas are given twice; one that only
        comes with each schema is there twice as often.
        """
        asked = self.opening("x")
        once = self.template(asked, self.tools)
        twice = self.template(asked, self.tools * 2)
        ignored = once == twice
        if own_prompt:
            if own_tools and ignored:
                raise ValueError(
                    "the chat template shows no tools; leave out tools_file, or system_prompt_file"
                )
            return
        taught = [sign for sign in CALLS if 2 * once.count(sign) > twice.count(sign)]
        call = CALLS[[*taught, '"arguments"'][0]]
        self.system = self.system.replace("{call}", f"<tool_call>{call}</tool_call>")
        if ignored:
            self.system += "\n\nTools:\n" + "\n".join(map(json.dumps, self.tools))

    def opening(self, question):
        return [{"role": "system", "content": self.system}, {"role": "user", "content": question}]

    def template(self, messages, tools, **inputs):
        """The template's text up to the next assistant turn; ValueError in the template's words."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **self.inputs | inputs)
        except Exception as error:  # a template is a program, and may raise anything
            words = f"the chat template refuses the agent's conversation: {error}"
            raise ValueError(" ".join(words.split())) from error

    def around_turn(self, answer, earlier=0):
        """What the template writes: before a turn that has this answer, the turn, and behind it."""
        turn = {"role": "assistant", "content": TURN}
        messages = self.opening("x") + [turn, self.result(SAID)] * earlier
        return self.template([*messages, turn, answer], self.tools).rpartition(TURN)

    def result(self, text):
        """What a tool says as a message; a user's turn wraps it as Qwen's template does."""
        if self.role == "user":
            text = f"<tool_response>\n{text}\n</tool_response>"
        return {"role": self.role, "content": text}

    def read_ends(self):
        """The special tokens behind a turn that a tool, and one that a user answers.

        ValueError unless a turn follows the generation prompt, and something ends it.
        """
        prompt = EMPTY_THOUGHT.sub("", self.template(self.opening("x"), self.tools))
        ends = []
        for answer in (self.result(SAID), {"role": "user", "content": SAID}):
            before, _, behind = self.around_turn(answer)
            if not before or SAID not in behind:
                raise ValueError(
                    "the chat template leaves out assistant or tool messages; both are needed"
                )
            if not EMPTY_THOUGHT.fullmatch(before.removeprefix(prompt)):
                raise ValueError(
                    "the chat template's generation prompt is not how it begins a turn: "
                    f"{before[-60:]!r}"
                )
            end = re.match(rf"\s*({self.mark})", behind)
            if not end:
                raise ValueError(
                    "the template puts no special token behind a turn; nothing can end it"
                )
            ends.append(end[1])
        return ends

    def prompt_ids(self, question: str):
        """[P] ids of system, question and generation prompt, the forced <think> included."""
        messages = self.opening(self.defuse(question))
        return self.encode(open_thought(self.template(messages, self.tools)))

    def message_ids(self, messages):
        """[P] ids of a plain conversation without tools or thoughts, as readers use it."""
        safe = [message | {"content": self.defuse(message["content"])} for message in messages]
        return self.encode(self.template(safe, None, enable_thinking=False))

    def observation_ids(self, text, earlier=0):
        """[E] ids of all between a sampled end-of-turn token and the next turn's first token.

        They are encoded behind that token, where a tokenizer always splits, so that they are the
        whole's ids. Templates may write the first result otherwise than one with `earlier` others.
        """
        frame = self.frame(earlier)
        words = self.defuse(text)
        if len(frame) == 2 and words == words.strip():
            whole = words.join(frame)
        else:  # the template writes it in its own way
            whole = self.behind_turn(words, earlier)
        return self.encode(whole)[1:]

    def behind_turn(self, words, earlier):
        """What the template puts behind a turn: its end token, the result, the next prompt."""
        behind = self.around_turn(self.result(words), earlier)[2].partition(self.end_of_turn)[2]
        return self.end_of_turn + open_thought(behind)

    def fit(self, kind, entries, max_tokens, earlier=0):
        """Render an observation within a token budget: (text, ids, number of items dropped).

        The worst ranks are dropped; if no item fits, the first ten entries say so in words.
        """

        def rendered(shown):
            text = render(kind, shown)
            return text, self.observation_ids(text, earlier)

        text, ids = rendered(entries)
        if len(ids) <= max_tokens:
            return text, ids, 0
        total = sum(len(entry.items) for entry in entries)
        # How many items fit: the count of those among 1, 2, ... that are within the budget.
        kept = bisect_right(
            range(1, total), max_tokens, key=lambda kept: len(rendered(best(entries, kept))[1])
        )
        shown = best(entries, kept)
        if not kept:
            too_long = TOOLS[kind].item("The result is too long to be shown.")
            shown = [Entry(entry.key[:100], (too_long,)) for entry in entries[:10]]
        return *rendered(shown), total - kept

    def defuse(self, text):
        """Break tags and added tokens in foreign text by a space behind their first character. The
        tokenizer's own split_special_tokens is not enough: it spares <tool_call>.
        """
        return self.unsafe.sub(r"\1 ", text)

    def decode(self, token_ids):
        """Text for parsing and for people; never encoded again."""
        ids = list(token_ids)
        if ids and ids[-1] in self.end_ids:
            ids.pop()
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
