"""The embedded default: a small made-up web, questions about it, and what the agent learned there.

A world is 250 pages about people, cities, companies and books with invented names. A search result
shows a page's first sentence and one of its facts, so that browsing pays in two cases of three;
half of the questions need two pages. Start model and tokenizer come from scripts/; the names must
not change, since the model that ships was trained on them. toyworld.yaml has them, and what pages
tell and questions ask.
"""

import re
from random import Random

import numpy as np
import yaml

from deepresearcher_min.config import ROOT
from deepresearcher_min.search import Corpus
from deepresearcher_min.trajectory import Question

MODEL_DIR = ROOT / "deepresearcher_min/toy_model"
SITE = "https://toy.example/"
NAMES, RELATIONS, FILLERS, TWO_HOP = yaml.safe_load(
    (ROOT / "deepresearcher_min/toyworld.yaml").read_bytes()
).values()


class World:
    """Pages, facts and questions for one purpose (training, held out, warm start ...) and from one
    seed.

    A fifth of all possible two-word names is reserved for "held out". Every fact that is asked for
    has such a name in it (as its subject, or as a city's mayor), so a held-out world shares none
    with the others.
    """

    def __init__(self, purpose: str, seed):
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
        self.kind = {}  # of page, by name
        self.facts = {}  # by name and relation
        for kind in names:
            for name in names[kind]:
                self.kind[name] = kind
                facts = self.facts[name] = {}
                for relation, values in (RELATIONS[kind] | FILLERS[kind]).items():
                    facts[relation] = rng.choice(names.get(values) or values.split())
        couples = iter(names["person"])
        for one, other in zip(couples, couples, strict=True):
            self.facts[one]["spouse"] = other
            self.facts[other]["spouse"] = one
        documents = []
        summaries = []
        for name, facts in self.facts.items():
            lead = f"{name} is a {self.kind[name]}."
            sentences = [f"The {relation} is {value}." for relation, value in facts.items()]
            documents.append((name, url_of(name), f"{lead} {' '.join(sentences)}"))
            summaries.append(f"{lead} {rng.choice(sentences)}")
        self.corpus = Corpus(documents, snippet=summaries.__getitem__)

    def questions(self, count, seed: int):
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
                chains += [(name, path.split()) for path in paths[kind]]
            for subject, relations in rng.sample(chains, min(wanted, len(chains))):
                text = f"What is the {' of the '.join(reversed(relations))} of {subject}?"
                answer = subject
                for relation in relations:
                    answer = self.facts[answer][relation]
                questions.append(Question(f"{source}:{text}", text, (answer,), source))
        rng.shuffle(questions)
        return questions


def url_of(name) -> str:
    return SITE + name.replace(" ", "_")


def chain_of(question: str):
    """'What is the mayor of the birthplace of Ada Vek?' -> ('Ada Vek', ['birthplace', 'mayor'])."""
    chain = question.removeprefix("What is the ").removesuffix("?")
    subject, *relations = reversed(re.split(" of (?:the )?", chain))
    return subject, relations


def behaviour_rates(trajectories, world):
    """How often the three good decisions were taken when there was occasion [share, nan without
    occasion], of the trajectories that begin with a search.

    full_name: the first search of the question's subject used its full name. browse_when_needed:
    the page of the subject was found, its summary lacked the fact, and the page was opened.
    second_hop: a two-hop question whose first fact was seen, and a search or browse went on from
    it.
    """
    taken = {"full_name": [], "browse_when_needed": [], "second_hop": []}
    for trajectory in trajectories:
        turns = trajectory.turns
        if not turns or turns[0].kind != "search":
            continue
        subject, relations = chain_of(trajectory.question.text)
        value = world.facts[subject][relations[0]]
        fact = f"The {relations[0]} is {value}."
        calls = [turn.text.partition("<tool_call>")[2] for turn in turns]
        shown = [fact in turn.observation for turn in turns]
        if " " in subject:
            taken["full_name"].append(subject in calls[0])
        if f"'title': '{subject}'" in turns[0].observation and not shown[0]:
            taken["browse_when_needed"].append(url_of(subject) in " ".join(calls))
        if len(relations) == 2 and any(shown):
            later = " ".join(calls[shown.index(True) + 1 :])
            taken["second_hop"].append(value.split()[-1] in later)
    return {name: float(np.mean(flags or np.nan)) for name, flags in taken.items()}
