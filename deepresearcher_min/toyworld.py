"""The embedded default: a small made-up web, questions about it, and the tokenizer of the tiny model.

A world is 250 pages about people, cities, companies and books with invented names. A page states its facts in
plain sentences; a search result shows the page's first sentence and one of its facts, so that browsing pays
in two cases of three; half of the questions need two pages ("the mayor of the birthplace of ...").

Only world, tokenizer, chat template, reader and sizes are toys: all else is as in every other run. The start model
comes from scripts/warm_start.py. Vocabulary and names must not change: the model that ships was trained on them.
"""

import math
import random
import re
from collections.abc import Sequence
from itertools import chain, islice, product
from pathlib import Path

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
    shuffled = sorted(words)
    rng.shuffle(shuffled)
    rest = iter(shuffled)
    sizes = {"first": 40, "last": 40, "city": 50, "brand": 40, "adjective": 30, "noun": 30}
    names = {part: list(islice(rest, size)) for part, size in sizes.items()}
    return names | {"trade": ["Works", "Labs", "Group", "Foods"]}


NAMES = invented_names()


class World:
    """Pages, facts and questions from one seed.

    A fifth of all possible two-word names is reserved for `held_out` worlds. Every fact has such a name in it (as its
    subject, or as a city's mayor), so a held-out world shares no fact with the worlds of warm start and training.
    """

    def __init__(self, seed: str, held_out: bool = False) -> None:
        rng = random.Random(seed)

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
            facts = {relation: rng.choice(names[answer]) for relation, answer in RELATIONS[kind].items()}
            self.facts[name] = facts | {filler: rng.choice(values) for filler, values in FILLERS.get(kind, {}).items()}
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
        """`count` different questions, half of them with one hop and half with two, in random order."""
        rng = random.Random(f"questions {seed}")
        one_hop = [(name, relation) for name, kind in self.kind.items() for relation in RELATIONS[kind]]
        two_hop = [(name, *path) for name, kind in self.kind.items() for start, *path in TWO_HOP if start == kind]
        questions = []
        for source, chains, wanted in (("toy_1hop", one_hop, count - count // 2), ("toy_2hop", two_hop, count // 2)):
            for subject, *relations in rng.sample(chains, min(wanted, len(chains))):
                text = f"What is the {' of the '.join(reversed(relations))} of {subject}?"
                answer = subject
                for relation in relations:
                    answer = self.facts[answer][relation]
                questions.append(Question(f"{source}:{text}", text, (answer,), source))
        rng.shuffle(questions)
        return questions


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
WORDS = """
What is The the of a I need do not see page may say guess that it know answer person company book city Nothing was
found for this query says nothing about No search has shown address so cannot be opened result too long to 0 1 2
""".split()  # noqa: SIM905 (as a list of strings it could not be read)
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
    words = [*WORDS, *chain(*NAMES.values(), *RELATIONS.values(), *FILLERS.values())]  # of dicts, the keys
    values = [value for facts in FILLERS.values() for value in chain(*facts.values())]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *PIECES, *words, *values]))}
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
            later = [turn for turn in turns[shown.index(True) + 1 :] if turn.kind in ("search", "browse")]
            calls = [turn.text.partition("<tool_call>")[2] for turn in later]
            seen["second_hop"].append(any(value.split()[-1] in call for call in calls))
    return {name: sum(flags) / len(flags) if flags else math.nan for name, flags in seen.items()}
