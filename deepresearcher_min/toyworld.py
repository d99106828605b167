"""The embedded default: a small made-up web, questions about it, and what the agent learned there.

A world is 250 pages about people, cities, companies and books with invented names. A search result
shows a page's first sentence and one of its facts, so that browsing pays in two cases of three;
half of the questions need two pages. Start model and tokenizer come from scripts/; the names must
not change, since the model that ships was trained on them.
"""

import math
import re
from random import Random

from deepresearcher_min.config import ROOT
from deepresearcher_min.search import Corpus
from deepresearcher_min.trajectory import Question, Trajectory

MODEL_DIR = ROOT / "deepresearcher_min/toy_model"
SITE = "https://toy.example/"
# What a question can ask for, by kind of page; the value is the kind of the answer.
RELATIONS = {
    "person": {"birthplace": "city", "employer": "company", "spouse": "person"},
    "company": {"headquarters": "city", "founder": "person"},
    "book": {"author": "person"},
    "city": {"mayor": "person"},
}
# Facts that nobody asks for: they make a search result's one fact less often the right one.
FILLERS = {
    "person": {},
    "company": {"product": "lamps boats clocks paper tea glass"},
    "book": {"genre": "comedy tragedy history travel", "length": "short long medium"},
    "city": {"river": "Aro Bel Cim Dov Elt Fen", "climate": "mild dry wet cold"},
}
# What can be asked about the answer to another question: the first relation, then the second.
TWO_HOP = {
    "person": ("employer headquarters", "employer founder", "birthplace mayor"),
    "company": ("founder birthplace",),
    "book": ("author birthplace", "author employer", "author spouse"),
    "city": ("mayor birthplace", "mayor employer"),
}
PARTS = {"first": 40, "last": 40, "city": 50, "brand": 40, "adjective": 30, "noun": 30}


def invented_names():
    """The same made-up words in every world; which of them pair up to a name, and all facts, differ
    by world.
    """
    rng = Random(7)
    syllables = [one + other for one in "bdfgklmnprstvz" for other in "aeiou"]
    words = set[str]()
    while len(words) < 250:
        word = rng.choice(syllables) + rng.choice(syllables) + rng.choice("lmnrsk")
        words.add(word.capitalize())
    rest = sorted(words)
    rng.shuffle(rest)
    names = {}
    for part, size in PARTS.items():
        names[part] = rest[:size]
        rest = rest[size:]
    names["trade"] = ["Works", "Labs", "Group", "Foods"]
    return names


NAMES = invented_names()


class World:
    """Pages, facts and questions for one purpose (training, held out, warm start ...) and from one
    seed.

    A fifth of all possible two-word names is reserved for "held out". Every fact that is asked for
    has such a name in it (as its subject, or as a city's mayor), so a held-out world shares none
    with the others.
    """

    def __init__(self, purpose: str, seed: object):
        # The order of all draws makes the world: whoever changes it changes what a seed stands for.
        rng = Random(f"{purpose} {seed}")
        held_out = purpose == "held out"

        def draw(first, second, count, article=""):
            """Different two-word names, all of them reserved for held-out worlds or none."""
            ours = []
            for i, one in enumerate(NAMES[first]):
                for j, other in enumerate(NAMES[second]):
                    if held_out == ((i + j) % 5 == 0):
                        ours.append(f"{article}{one} {other}")
            return rng.sample(ours, count)

        names = {
            "person": draw("first", "last", 110),
            "company": draw("brand", "trade", 30 if held_out else 40),
            "book": draw("adjective", "noun", 50, "The "),
            "city": NAMES["city"],
        }
        self.kind: dict = {}  # of page, by name
        self.facts: dict = {}  # by name and relation
        for kind in names:
            for name in names[kind]:
                self.kind[name] = kind
                facts = self.facts[name] = {}
                for relation, answer in RELATIONS[kind].items():
                    facts[relation] = rng.choice(names[answer])
                for relation, values in FILLERS[kind].items():
                    facts[relation] = rng.choice(values.split())
        couples = iter(names["person"])
        for one, other in zip(couples, couples, strict=True):
            self.facts[one]["spouse"] = other
            self.facts[other]["spouse"] = one
        documents = []
        summaries = []
        for name, facts in self.facts.items():
            lead = f"{name} is a {self.kind[name]}."
            sentences = [f"The {relation} is {value}." for relation, value in facts.items()]
            documents.append((name, url_of(name), " ".join([lead, *sentences])))
            summaries.append(f"{lead} {rng.choice(sentences)}")
        self.corpus = Corpus(documents, snippet=summaries.__getitem__)

    def questions(self, count: int, seed: int) -> list:
        """`count` different questions, half of them with one hop and half with two, in random
        order.
        """
        rng = Random(f"questions {seed}")
        questions = []
        half = count // 2
        kinds = ("toy_1hop", RELATIONS, count - half), ("toy_2hop", TWO_HOP, half)
        for source, paths, wanted in kinds:
            chains = []
            for name, kind in self.kind.items():
                for path in paths[kind]:
                    chains.append((name, path.split()))
            for subject, relations in rng.sample(chains, min(wanted, len(chains))):
                text = f"What is the {' of the '.join(reversed(relations))} of {subject}?"
                answer = subject
                for relation in relations:
                    answer = self.facts[answer][relation]
                questions.append(Question(f"{source}:{text}", text, (answer,), source))
        rng.shuffle(questions)
        return questions


def url_of(name: str) -> str:
    return SITE + name.replace(" ", "_")


def chain_of(question: str) -> tuple:
    """'What is the mayor of the birthplace of Ada Vek?' -> ('Ada Vek', ['birthplace', 'mayor'])."""
    chain = question.removeprefix("What is the ").removesuffix("?")
    subject, *relations = reversed(re.split(" of (?:the )?", chain))
    return subject, relations


def behaviour_rates(trajectories: list[Trajectory], world: World) -> dict:
    """How often the three good decisions were taken when there was occasion [share, nan without
    occasion], of the trajectories that begin with a search.

    full_name: the first search of the question's subject used its full name. browse_when_needed:
    the page of the subject was found, its summary lacked the fact, and the page was opened.
    second_hop: a two-hop question whose first fact was seen, and a search or browse went on from
    it.
    """
    taken: dict = {"full_name": [], "browse_when_needed": [], "second_hop": []}
    for trajectory in trajectories:
        turns = trajectory.turns
        if not turns or turns[0].kind != "search":
            continue
        subject, relations = chain_of(trajectory.question.text)
        value = world.facts[subject][relations[0]]
        fact = f"The {relations[0]} is {value}."
        calls = [turn.text.partition("<tool_call>")[2] for turn in turns]
        seen = [turn.observation for turn in turns]
        if " " in subject:
            taken["full_name"].append(subject in calls[0])
        if f"'title': '{subject}'" in seen[0] and fact not in seen[0]:
            taken["browse_when_needed"].append(url_of(subject) in " ".join(calls))
        shown = [fact in observation for observation in seen]
        if len(relations) == 2 and any(shown):
            later = " ".join(calls[shown.index(True) + 1 :])
            taken["second_hop"].append(value.split()[-1] in later)
    rates = {}
    for name, flags in taken.items():
        rates[name] = sum(flags) / len(flags) if flags else math.nan
    return rates
