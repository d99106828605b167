"""The embedded default: a small made-up web, questions about it, and what the agent learned there.

A world is 250 pages about people, cities, companies and books with invented names. A search result
shows a page's first sentence and one of its facts, so that browsing pays in two cases of three;
half of the questions need two pages. Start model and tokenizer come from scripts/; the names must
not change, since the model that ships was trained on them.
"""

import math
import random
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path

from deepresearcher_min.protocol import Call, parse_turn
from deepresearcher_min.search import Corpus
from deepresearcher_min.trajectory import Question, Trajectory

MODEL_DIR = Path(__file__).parent / "toy_model"
SITE = "https://toy.example/"
# What a question can ask for, by kind of page; the value is the kind of the answer.
RELATIONS: dict[str, dict[str, str]] = {
    "person": {"birthplace": "city", "employer": "company", "spouse": "person"},
    "company": {"headquarters": "city", "founder": "person"},
    "book": {"author": "person"},
    "city": {"mayor": "person"},
}
# Facts that nobody asks for: they make a search result's one fact less often the right one.
FILLERS: dict[str, dict[str, tuple[str, ...]]] = {
    "company": {"product": ("lamps", "boats", "clocks", "paper", "tea", "glass")},
    "book": {
        "genre": ("comedy", "tragedy", "history", "travel"),
        "length": ("short", "long", "medium"),
    },
    "city": {
        "river": ("Aro", "Bel", "Cim", "Dov", "Elt", "Fen"),
        "climate": ("mild", "dry", "wet", "cold"),
    },
}
TWO_HOP = (
    ("book", "author", "birthplace"),
    ("book", "author", "employer"),
    ("book", "author", "spouse"),
    ("company", "founder", "birthplace"),
    ("person", "employer", "headquarters"),
    ("person", "employer", "founder"),
    ("person", "birthplace", "mayor"),
    ("city", "mayor", "birthplace"),
    ("city", "mayor", "employer"),
)


def invented_names() -> dict[str, list[str]]:
    """The same made-up words in every world; which of them pair up to a name, and all facts, differ
    by world.
    """
    rng = random.Random(7)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words: set[str] = set()
    while len(words) < 250:
        words.add(
            (rng.choice(syllables) + rng.choice(syllables) + rng.choice("lmnrsk")).capitalize()
        )
    shuffled = sorted(words)
    rng.shuffle(shuffled)
    rest = iter(shuffled)
    sizes = {"first": 40, "last": 40, "city": 50, "brand": 40, "adjective": 30, "noun": 30}
    names = {part: list(islice(rest, size)) for part, size in sizes.items()}
    return names | {"trade": ["Works", "Labs", "Group", "Foods"]}


NAMES = invented_names()


class World:
    """Pages, facts and questions for one purpose (training, held out, warm start ...) and from one
    seed.

    A fifth of all possible two-word names is reserved for "held out". Every fact that is asked for
    has such a name in it (as its subject, or as a city's mayor), so a held-out world shares none
    with the others.
    """

    def __init__(self, purpose: str, seed: int | str) -> None:
        rng, held_out = random.Random(f"{purpose} {seed}"), purpose == "held out"

        def pairs(one: str, other: str, count: int) -> list[str]:
            every = product(enumerate(NAMES[one]), enumerate(NAMES[other]))
            ours = [f"{a} {b}" for (i, a), (j, b) in every if ((i + j) % 5 == 0) == held_out]
            return rng.sample(ours, count)

        names = {
            "person": pairs("first", "last", 110),
            "company": pairs("brand", "trade", 30 if held_out else 40),
            "book": [f"The {name}" for name in pairs("adjective", "noun", 50)],
            "city": NAMES["city"],
        }
        self.kind = {name: kind for kind, found in names.items() for name in found}
        self.facts: dict[str, dict[str, str]] = {}
        for name, kind in self.kind.items():
            facts = {
                relation: rng.choice(names[answer]) for relation, answer in RELATIONS[kind].items()
            }
            self.facts[name] = facts | {
                filler: rng.choice(values) for filler, values in FILLERS.get(kind, {}).items()
            }
        for one, other in zip(names["person"][::2], names["person"][1::2], strict=True):
            self.facts[one]["spouse"], self.facts[other]["spouse"] = other, one
        documents, summaries = [], []
        for name, facts in self.facts.items():
            lead = f"{name} is a {self.kind[name]}."
            sentences = [f"The {relation} is {value}." for relation, value in facts.items()]
            documents.append((name, url_of(name), " ".join([lead, *sentences])))
            summaries.append(f"{lead} {rng.choice(sentences)}")
        self.corpus = Corpus(documents, snippet=summaries.__getitem__)

    def questions(self, count: int, seed: int) -> list[Question]:
        """`count` different questions, half of them with one hop and half with two, in random
        order.
        """
        rng = random.Random(f"questions {seed}")
        one_hop = [
            (name, relation) for name, kind in self.kind.items() for relation in RELATIONS[kind]
        ]
        two_hop = [
            (name, *path)
            for name, kind in self.kind.items()
            for start, *path in TWO_HOP
            if start == kind
        ]
        questions = []
        for source, chains, wanted in (
            ("toy_1hop", one_hop, count - count // 2),
            ("toy_2hop", two_hop, count // 2),
        ):
            for subject, *relations in rng.sample(chains, min(wanted, len(chains))):
                text = f"What is the {' of the '.join(reversed(relations))} of {subject}?"
                answer = subject
                for relation in relations:
                    answer = self.facts[answer][relation]
                questions.append(Question(f"{source}:{text}", text, (answer,), source))
        rng.shuffle(questions)
        return questions


def url_of(name: str) -> str:
    return SITE + name.replace(" ", "_")


def chain_of(question: str) -> tuple[str, list[str]]:
    """'What is the mayor of the birthplace of Ada Vek?' -> ('Ada Vek', ['birthplace', 'mayor'])."""
    *relations, subject = question.removeprefix("What is the ").removesuffix("?").split(" of ")
    return subject, [relation.removeprefix("the ") for relation in reversed(relations)]


def behaviour_rates(trajectories: Sequence[Trajectory], world: World) -> dict[str, float]:
    """How often the three good decisions were taken when there was occasion [share, nan without
    occasion].

    full_name: the first search of the question's subject used its full name. browse_when_needed:
    the page of the subject was found, its summary lacked the fact, and the page was opened.
    second_hop: a two-hop question whose first fact was seen, and a search or browse went on from
    it.
    """
    seen: dict[str, list[bool]] = {"full_name": [], "browse_when_needed": [], "second_hop": []}
    for trajectory in trajectories:
        turns, (subject, relations) = trajectory.turns, chain_of(trajectory.question.text)
        first = parse_turn(turns[0].text) if turns else None
        if not isinstance(first, Call) or first.kind != "search":
            continue
        if " " in subject:
            seen["full_name"].append(subject in first.keys[0])
        value = world.facts[subject][relations[0]]
        fact = f"The {relations[0]} is {value}."
        if f"'title': '{subject}'" in turns[0].observation and fact not in turns[0].observation:
            browsed = any(turn.kind == "browse" and url_of(subject) in turn.text for turn in turns)
            seen["browse_when_needed"].append(browsed)
        shown = [fact in turn.observation for turn in turns]
        if len(relations) == 2 and any(shown):
            later = [
                turn for turn in turns[shown.index(True) + 1 :] if turn.kind in ("search", "browse")
            ]
            calls = [turn.text.partition("<tool_call>")[2] for turn in later]
            seen["second_hop"].append(any(value.split()[-1] in call for call in calls))
    return {name: sum(flags) / len(flags) if flags else math.nan for name, flags in seen.items()}
