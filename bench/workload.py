"""The work of bench/rollout.py: what every trajectory will say, how much of it, and how long its
tools will take.

Importing it sets the environment and the path, so it comes before torch and the package.
"""

import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)  # before torch is imported; see README on threads
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.config import load_config  # noqa: E402
from deepresearcher_min.protocol import Entry  # noqa: E402

PAPER = load_config(["--preset=paper"])
GROUP = PAPER.group_size


@dataclass(frozen=True)
class Plan:
    """A trajectory: the lengths of its turns and observations [tokens], the kinds and latencies of
    its calls [s].
    """

    turns: list[int]
    observations: list[int]
    calls: list[tuple[str, list[float]]]


PROMPT, SHARED = 900, 850  # tokens of a prompt; those that all prompts have in common
# Median of the log-normal latency of one request [s]; 99th percentile: 10 x.
LATENCY = {"search": 0.8, "browse": 4.0}
SIGMA = math.log(10) / 2.3263
MAX_CALLS, CUT = 10, 120.0  # latencies are cut here [s]


def make_plans(count: int, mean_calls: float, seed: int) -> list[Plan]:
    """The workload: a geometric number of calls, first a search of one to three queries, then six
    in ten are searches.

    The order of the draws is part of it: with the same seed these are the trajectories of the
    published simulation.
    """
    draw = random.Random(seed)

    def plan() -> Plan:
        calls = 0
        while calls < MAX_CALLS and draw.random() > 1 / (mean_calls + 1):
            calls += 1
        turns = [max(20, int(180 * math.exp(0.5 * draw.gauss(0, 1)))) for _ in range(calls + 1)]
        observations, made = [], []
        for number in range(calls):
            search = number == 0 or draw.random() < 0.6
            requests = draw.randint(1, 3) if search else 1
            median = LATENCY["search" if search else "browse"]
            latencies = [
                min(CUT, median * math.exp(SIGMA * draw.gauss(0, 1))) for _ in range(requests)
            ]
            made.append(("search" if search else "browse", latencies))
            observations.append(
                600 * requests if search else int(700 * math.exp(0.4 * draw.gauss(0, 1)))
            )
        return Plan(turns, observations, made)

    return [plan() for _ in range(count)]


def plan_of(request_id: str) -> int:
    """Requests are named step/question/index, with GROUP trajectories to a question."""
    _, question, index = map(int, request_id.split("/"))
    return question * GROUP + index


class PlannedChat:
    """Stands for the tokenizer: the last token of a turn is the number of its plan and turn, which
    gives its text.
    """

    end_of_turn_id, end_ids = 0, (0,)

    def __init__(
        self, plans: Sequence[Plan], first_code: int, pages: str = "", scale: int = 1
    ) -> None:
        self.plans, self.first_code, self.pages, self.scale = plans, first_code, pages, scale

    def code(self, plan: int, turn: int) -> int:
        return self.first_code + plan * (MAX_CALLS + 1) + turn

    def read(self, ids: Sequence[int]) -> tuple[int, int]:
        """Plan and turn that a turn's ids belong to."""
        return divmod(ids[-1] - self.first_code, MAX_CALLS + 1)

    def prompt_ids(self, text: str) -> list[int]:
        return [1] * (SHARED // self.scale) + [2 + int(text) % 7] * (
            (PROMPT - SHARED) // self.scale
        )

    def decode(self, ids: Sequence[int]) -> str:
        plan, turn = self.read(ids)
        if turn == len(self.plans[plan].calls):
            return "</think><answer>the answer</answer>"
        kind, latencies = self.plans[plan].calls[turn]
        keys = [f"{plan}/{turn}/{i}" for i in range(len(latencies))]
        name, argument = (
            ("web_search", "query") if kind == "search" else ("browse_webpage", "url_list")
        )
        arguments = {argument: keys if kind == "search" else [self.pages + key for key in keys]}
        return (
            f"</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        )

    def fit(
        self, kind: str, entries: Sequence[Entry], max_tokens: int, earlier: int
    ) -> tuple[str, list[int], int]:
        plan, turn, _ = map(int, entries[0].key.removeprefix(self.pages).split("/"))
        return "", [3] * max(1, self.plans[plan].observations[turn] // self.scale), 0
