"""What the demonstrations of scripts/cold_start.py are about: questions with the passage that
answers them, real ones of a file and made-up ones of the corpus's sentences.

For scripts with spaces between the words; questions are made up of English sentences.
"""

import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.config import ConfigError, named  # noqa: E402
from deepresearcher_min.corpus import Corpus, content_words  # noqa: E402
from deepresearcher_min.report import read_json_lines  # noqa: E402
from deepresearcher_min.trajectory import Question, load_questions  # noqa: E402
from scripts.question_sets import article_of  # noqa: E402

NEAR = 12  # words before an answer that tell which of several places is meant
PATIENCE = 1000  # passages in a row of which nothing can be made
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# What a made-up question asks for: a year, a number, a name inside the sentence.
HOLES = {
    "what year": re.compile(r"(?<=\bin )(?:1\d|20)\d\d\b"),
    "how many": re.compile(r"(?<= )(?<! in )\d[\d,]*(?= [a-z])"),
    "what": re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*"),
}


@dataclass(frozen=True)
class Item:
    """A question, with the passage that answers it."""

    question: Question
    title: str
    text: str


def quoted(text: str, answer: str, question: str, limit: int) -> str:
    """At most `limit` words around an answer in the text; empty where it is not.

    Of several places the one whose words are most like the question's.
    """
    wanted = set(content_words(question))
    words = list(re.finditer(r"\S+", text))
    best, most = "", -1
    for place in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
        inside = [n for n, word in enumerate(words) if word.end() > place.start()]
        first = inside[0]
        last = max(n for n, word in enumerate(words) if word.start() < place.end())
        room = max(0, limit - (last - first + 1))
        first = max(0, first - (room + 1) // 2)
        last = min(len(words) - 1, last + room // 2)
        quote = text[words[first].start() : words[last].end()]
        near = text[words[max(0, first - NEAR)].start() : words[last].end()]
        alike = len(wanted.intersection(content_words(near)))
        if alike > most:
            best, most = quote, alike
    return best


# --- what is read of files, and what may be used


def read_rows(key: str, path: str) -> Iterator[tuple[Question, list[str], list[str]]]:
    """(question, gold titles, these and its article) of each row of a file that train.py reads."""
    with named(key, path):
        questions = load_questions(path)
        if Path(path).suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        else:
            rows = list(read_json_lines(path))  # each of them is one, or load_questions had said so
        for question, row in zip(questions, rows, strict=True):
            gold = row.get("gold_titles") or []
            article = row.get("article") or ""
            names = [*gold, article] if isinstance(gold, list) else [None]
            if not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"question {question.id!r}: gold_titles must be a list of texts and article "
                    f"a text, not {gold!r} and {article!r}"
                )
            yield question, gold, list(filter(None, names))


def held_out_articles(path: str) -> set[str]:
    found = {article_of(name) for _, _, names in read_rows("eval_data", path) for name in names}
    if not found:
        raise ConfigError(
            f"eval_data={path!r}: no question has gold_titles or article, which say what to "
            "leave alone"
        )
    return found


def passages_apart(corpus: Corpus, held_out: set[str]) -> list[tuple[str, str]]:
    """Title and text of all passages but those of held-out articles."""
    passages = []
    for title, _, text in corpus.documents:
        if article_of(title) not in held_out:
            passages.append((title, text))
    return passages


# --- real questions


def read_items(path: str, passages: Sequence[tuple[str, str]]) -> list[Item]:
    """The questions of a file with the first of their gold passages that holds an answer, where one
    of these passages does.
    """
    texts: dict[str, list[str]] = {}
    for title, text in passages:
        texts.setdefault(title, []).append(text)
    items = []
    for question, gold, _ in read_rows("data", path):
        golden = [(title, text) for title in gold for text in texts.get(title, ())]
        for title, text in golden:
            if any(quoted(text, answer, question.text, 0) for answer in question.answers):
                items.append(Item(question, title, text))
                break
    if not items:
        raise ConfigError(
            f"data={path!r}: no question has gold_titles that are in the corpus, hold one of its "
            "answers as words between spaces, and are not of eval_data's articles"
        )
    return items


# --- made-up questions


def holes(title: str, text: str, rng: random.Random) -> list[Item]:
    """Questions made of a text's sentences, in random order: a part is replaced by what asks.

    At most one of a sentence, so that none gives another away.
    """
    items = []
    for sentence in SENTENCE.split(text):
        word = rng.choice(list(HOLES))
        found = list(HOLES[word].finditer(sentence))
        if not found or not 6 <= len(sentence.split()) <= 30:
            continue
        hole = rng.choice(found)
        asked = sentence[: hole.start()] + word + sentence[hole.end() :]
        asked = asked.rstrip(" .!") + "?"
        items.append(Item(Question("", asked, (hole.group(),), "made up"), title, text))
    return rng.sample(items, len(items))


def made_up(passages: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[Item]:
    """Made-up questions about these passages, without end."""
    misses = 0
    while passages and misses < PATIENCE:
        title, text = rng.choice(passages)
        found = holes(title, text, rng)[:1]
        misses = 0 if found else misses + 1
        yield from found
    raise ConfigError(
        f"made_up: of {misses} passages of the corpus in a row, outside the articles of eval_data, "
        "no question can be made; --made_up=0 does without"
    )


class Draw:
    """Items in a shuffled order, real ones and made-up ones mixed."""

    def __init__(self, real: list[Item], invented: Iterator[Item], share: float, seed: int):
        self.real, self.invented, self.share = real, invented, share
        self.rng = random.Random(f"items {seed}")
        self.left: list[Item] = []

    def __call__(self) -> Item:
        if self.rng.random() < self.share:
            return next(self.invented)
        if not self.left:
            self.left = self.rng.sample(self.real, len(self.real))
        return self.left.pop()

    def of_one_page(self) -> list[Item]:
        """Real questions about one page if there are, then made-up ones, each once."""
        first = self()
        same = [one for one in self.real if one.title == first.title and one is not first]
        found = [first, *self.rng.sample(same, len(same))]
        for _ in range(2):
            found += holes(first.title, first.text, self.rng)
        return list({one.question.text: one for one in found}.values())
