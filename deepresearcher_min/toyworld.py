"""The embedded default: a small made-up web, questions about it, a tokenizer, and the tiny model's warm start.

A world is 250 pages about people, cities, companies and books with invented names. A page states its facts in
plain sentences; a search result shows the page's first sentence and one of its facts, so that browsing pays
in two cases of three; half of the questions need two pages ("the mayor of the birthplace of ...").

Only world, tokenizer, chat template, reader and sizes are toys: parser, observations, masks, rollouts, rewards,
loss and checkpoints are those of every other run. The start model comes from scripts/warm_start.py.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepresearcher_min.protocol import THINK, Call, parse_turn
from deepresearcher_min.search import Corpus
from deepresearcher_min.trajectory import Question, Trajectory

TRAINING_QUESTIONS = 1000
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
    "book": {"genre": ("comedy", "tragedy", "history", "travel"), "length": ("short", "long", "medium")},
    "city": {"river": ("Aro", "Bel", "Cim", "Dov", "Elt", "Fen"), "climate": ("mild", "dry", "wet", "cold")},
}
TWO_HOP = (
    ("book", "author", "birthplace"), ("book", "author", "employer"), ("book", "author", "spouse"),
    ("company", "founder", "birthplace"), ("person", "employer", "headquarters"), ("person", "employer", "founder"),
    ("person", "birthplace", "mayor"), ("city", "mayor", "birthplace"), ("city", "mayor", "employer"),
)  # fmt: skip


def invented_names() -> dict[str, list[str]]:
    """The same made-up words in every world; which of them pair up to a name, and all facts, differ by world."""
    rng = random.Random(7)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words: set[str] = set()
    while len(words) < 250:
        words.add((rng.choice(syllables) + rng.choice(syllables) + rng.choice("lmnrsk")).capitalize())
    ordered = sorted(words)
    rng.shuffle(ordered)
    sizes = {"first": 40, "last": 40, "city": 50, "brand": 40, "adjective": 30, "noun": 30}
    names, start = {}, 0
    for part, size in sizes.items():
        names[part] = ordered[start : start + size]
        start += size
    names["trade"] = ["Works", "Labs", "Group", "Foods"]
    return names


NAMES = invented_names()


class World:
    """Pages, facts and questions from one seed.

    Two-word names are split by pairing: a fifth of all possible names is reserved for `held_out` worlds. Every
    fact has such a name in it (as its subject, or as a city's mayor), so a held-out world shares no fact with
    the worlds of warm start and training.
    """

    def __init__(self, seed: str, held_out: bool = False) -> None:
        rng = random.Random(seed)
        self.rng, self.held_out = rng, held_out
        people = self._pairs("first", "last", 110)
        companies = self._pairs("brand", "trade", 40 if not held_out else 30)
        books = [f"The {name}" for name in self._pairs("adjective", "noun", 50)]
        self.kind = {n: "person" for n in people} | {n: "company" for n in companies} | {n: "book" for n in books}
        self.kind |= {n: "city" for n in NAMES["city"]}
        by_kind = {kind: [n for n in self.kind if self.kind[n] == kind] for kind in RELATIONS}
        self.facts: dict[str, dict[str, str]] = {}
        for name, kind in self.kind.items():
            facts = {relation: rng.choice(by_kind[answer]) for relation, answer in RELATIONS[kind].items()}
            self.facts[name] = facts | {relation: rng.choice(v) for relation, v in FILLERS.get(kind, {}).items()}
        for one, other in zip(people[::2], people[1::2], strict=True):
            self.facts[one]["spouse"], self.facts[other]["spouse"] = other, one
        documents, summaries = [], []
        for name, facts in self.facts.items():
            sentences = [f"The {relation} is {value}." for relation, value in facts.items()]
            lead = f"{name} is a {self.kind[name]}."
            documents.append((name, url_of(name), " ".join([lead, *sentences])))
            summaries.append(f"{lead} {rng.choice(sentences)}")
        self.corpus = Corpus(documents, snippet=summaries.__getitem__)

    def _pairs(self, one: str, other: str, count: int) -> list[str]:
        """`count` two-word names out of the share that belongs to this kind of world."""
        ours = [
            f"{a} {b}"
            for i, a in enumerate(NAMES[one])
            for j, b in enumerate(NAMES[other])
            if ((i + j) % 5 == 0) == self.held_out
        ]
        return self.rng.sample(ours, count)

    def questions(self, count: int, seed: int) -> list[Question]:
        """`count` different questions, half of them with one hop and half with two, in random order."""
        rng = random.Random(f"questions {seed}")
        chains: dict[str, list[tuple[str, ...]]] = {"toy_1hop": [], "toy_2hop": []}
        for name, kind in self.kind.items():
            chains["toy_1hop"] += [(name, relation) for relation in RELATIONS[kind]]
            chains["toy_2hop"] += [(name, first, second) for k, first, second in TWO_HOP if k == kind]
        questions = []
        for source, found in chains.items():
            wanted = count // 2 if source == "toy_2hop" else count - count // 2
            for subject, *relations in rng.sample(found, min(wanted, len(found))):
                text = f"What is the {' of the '.join(reversed(relations))} of {subject}?"
                answer = self.follow(subject, relations)
                questions.append(Question(f"{source}:{text}", text, (answer,), source))
        rng.shuffle(questions)
        return questions

    def follow(self, subject: str, relations: Sequence[str]) -> str:
        for relation in relations:
            subject = self.facts[subject][relation]
        return subject


def training_world(seed: int) -> World:
    return World(f"training {seed}")


def held_out_world(seed: int) -> World:
    return World(f"held out {seed}", held_out=True)


def url_of(name: str) -> str:
    return SITE + name.replace(" ", "_")


def chain_of(question: str) -> tuple[str, list[str]]:
    """'What is the mayor of the birthplace of Ada Vek?' -> ('Ada Vek', ['birthplace', 'mayor'])."""
    *relations, subject = question.removeprefix("What is the ").removesuffix("?").split(" of ")
    return subject, [relation.removeprefix("the ") for relation in reversed(relations)]


# --- tokenizer: whole words, and the fixed parts of calls and observations as one token each

CALL_SEARCH = '</think><tool_call>{"name": "web_search", "arguments": {"query": ["'
CALL_BROWSE = '</think><tool_call>{"name": "browse_webpage", "arguments": {"url_list": ["'
CALL_END, ANSWER, ANSWER_END = '"]}}</tool_call>', "</think><answer>", "</answer>"
PIECES = (
    THINK, CALL_SEARCH, CALL_BROWSE, CALL_END, ANSWER, ANSWER_END, '", "',
    "[{'search_query': '", "', 'web_page_info_list': [{'quick_summary': '", "', 'web_page_info_list': []}]",
    ".', 'title': '", "', 'title': '", "', 'url': '", "'}, {'quick_summary': '", "'}]}]", "'}]}, {'search_query': '",
    "[{'information': [{'page_number': ", ", 'page_summary': '", ".'}], 'url': '", "'}], 'url': '", "'}]",
    "'}, {'information': [{'page_number': ", SITE, "_", ". ", ".", "?", ", ", ": ", " ",
)  # fmt: skip
WORDS = (
    "What", "is", "The", "the", "of", "a", "I", "need", "do", "not", "see", "page", "may", "say", "guess", "that", "it",
    "know", "answer", "person", "company", "book", "city", "Nothing", "was", "found", "for", "this", "query", "says",
    "nothing", "about", "No", "search", "has", "shown", "address", "so", "cannot", "be", "opened", "result", "too",
    "long", "to", "0", "1", "2",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that loses nothing of the toy web's text.

    A space between two words is not a token: the pre-tokenizer drops it and the decoder puts it back, so that
    a name is the same token after a space and after a quotation mark, which is what makes copying learnable.
    """
    special = ["<unk>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    words = [*WORDS, *(w for part in NAMES.values() for w in part)]
    words += [r for table in (RELATIONS, FILLERS) for facts in table.values() for r in facts]
    words += [w for facts in FILLERS.values() for values in facts.values() for w in values]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *PIECES, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pieces = "|".join(re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True) if piece != " ")
    word, mark = "[A-Za-z0-9]", "\u241f"  # the mark stands between tokens while decoding
    between_words = f"(?<={word}) (?={word})"
    split = pre_tokenizers.Split(Regex(f"{pieces}|{word}+|{between_words}|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Split(Regex(r"\A \z"), "removed")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(Regex(r"\z"), mark), decoders.Fuse(),
        decoders.Replace(Regex(f"(?<={word}){mark}(?={word})"), " "), decoders.Replace(mark, ""),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>",
        additional_special_tokens=special[3:], chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


# --- what the agent learned, beside F1


def behaviour_rates(trajectories: Sequence[Trajectory], world: World) -> dict[str, float]:
    """How often the three good decisions were taken when there was occasion [share, nan without occasion].

    full_name: the first search of the question's subject used its full name. browse_when_needed: the page of
    the subject was found, its summary lacked the fact, and the page was opened. second_hop: a two-hop question
    whose first fact was seen, and a search or browse went on from it.
    """
    seen: dict[str, list[bool]] = {"full_name": [], "browse_when_needed": [], "second_hop": []}
    for trajectory in trajectories:
        subject, relations = chain_of(trajectory.question.text)
        first = parse_turn(trajectory.turns[0].text) if trajectory.turns else None
        if not isinstance(first, Call) or first.kind != "search":
            continue
        shown = trajectory.turns[0].observation
        if " " in subject:
            seen["full_name"].append(subject in first.keys[0])
        value = world.follow(subject, relations[:1])
        fact = f"The {relations[0]} is {value}."
        if f"'title': '{subject}'" in shown and fact not in shown:
            browsed = [turn for turn in trajectory.turns if turn.kind == "browse" and url_of(subject) in turn.text]
            seen["browse_when_needed"].append(bool(browsed))
        found = [i for i, turn in enumerate(trajectory.turns) if fact in turn.observation]
        if len(relations) == 2 and found:
            later = [turn for turn in trajectory.turns[found[0] + 1 :] if turn.kind in ("search", "browse")]
            tail = value.split()[-1]
            seen["second_hop"].append(any(tail in turn.text.partition("<tool_call>")[2] for turn in later))
    return {name: float(np.mean(flags)) if flags else float("nan") for name, flags in seen.items()}
