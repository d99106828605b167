"""Scripts in the place of a model: demonstrations are made by the very code that rolls out."""

import ast
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepresearcher_min.engine import Completion, Engine, Sampling

# Yields turns (without the forced <think>) and is sent, for a tool call, the text of its result.
Script = Generator[str, str, None]


class ScriptedEngine(Engine):
    """Scripts behind the engine protocol; script_of(request id) begins one.

    A request's id is step/question/index (rollout.roll_out).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_id: int, script_of: Callable[[str], Script]
    ) -> None:
        self.tokenizer, self.end_id, self.script_of = tokenizer, end_id, script_of
        self.capacity_tokens = 10**9
        self.scripts: dict[str, Script] = {}
        self.turns: dict[str, list[int]] = {}  # that the next step returns
        self.known: dict[str, int] = {}  # tokens of a request that its script has seen

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        if request_id not in self.scripts:
            self.scripts[request_id] = self.script_of(request_id)
            text = next(self.scripts[request_id])
        else:
            shown = self.tokenizer.decode(list(token_ids[self.known[request_id] :]))
            text = self.scripts[request_id].send(shown)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.end_id]
        self.turns[request_id] = ids
        self.known[request_id] = len(token_ids) + len(ids)

    def step(self) -> dict[str, Completion]:
        done = {}
        for request_id, ids in self.turns.items():
            done[request_id] = Completion(ids, [0.0] * len(ids), "stop")
        self.turns = {}
        return done

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.turns.pop(request_id, None)


def items_of(shown: str) -> list[dict[str, Any]]:
    """The items of a one-query search or a one-page browse, from the text around their list."""
    start, end = shown.index("["), shown.rindex("]") + 1
    entry = ast.literal_eval(shown[start:end])[0]
    return entry["information" if "information" in entry else "web_page_info_list"]
