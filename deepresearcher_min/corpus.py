"""Webs in memory: a corpus of passages with a BM25 index, and the toy world, the embedded default,
which is one with questions about it. Before them, what a text's words are; between them, what in
the segments of a page belongs to a question; last, what a run asks, on which web.

Left out: an index on disk: making one takes 0.2 s for a thousand passages, and whoever has millions
asks a `retriever` (search.py).
"""

import hashlib
import heapq
import json
import re
import unicodedata
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from random import Random
from textwrap import shorten

import numpy as np

from deepresearcher_min.config import ROOT, ConfigError, named, table
from deepresearcher_min.trajectory import Question, load_questions

# Letters and digits, and the signs that belong to letters from Hindi to Khmer, which are no \w.
WORD = re.compile(
    r"[\w\u0900-\u0963\u0966-\u0eff\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17db-\u17ff]+"
)
# Scripts that put no space between words, or, as Korean, put endings to them.
UNSPACED = r"[\u0e00-\u11ff\u1780-\u17ff\u3005-\uffdc\U00020000-\U0003ffff]"
RUN = (
    r"""(?x) (  # in pairs
      [\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+  # Chinese
    | [\u3041-\u309f\u30fc]+ | [\u30a1-\u30ff\u31f0-\u31ff]+  # Hiragana, Katakana
    | [\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]+ )  # Korean
    | ( [\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+ )  # in triples: Thai, Lao, Myanmar, Khmer
    | [^\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\ud7a3"""
    r"""\uf900-\ufaff\U00020000-\U0003ffff]+ | ."""
)
# No space follows a sentence of Chinese, Japanese, Khmer or Myanmar; Thai and Lao have nothing but
# a space there.
ENDS = "。！？｡।॥។៕။"
SENTENCE_END = re.compile(rf"[{ENDS}]+[」』”’）]*|[\u0e00-\u0eff](?=\s+[\u0e00-\u0eff])")
# Where a segment ends best: at a paragraph's end, or else a line's, a sentence's, a word's.
BORDER = re.compile(rf"(?s).*\n(?=\n)|.*\n|.*(?:\.(?= )|[{ENDS}])|.* ")
SNIPPET_CHARS = 300
SearchResult = namedtuple("SearchResult", "title url snippet")


def words(text):
    """The lower-case words of a text, in order, for searching (reward.words: for scoring).

    Where a script has no spaces, each two neighbouring signs (Chinese, Japanese, Korean) or three
    neighbouring letters (Thai, Lao, Myanmar, Khmer) are a word, and so is a shorter run:
    'iPad平板电脑' -> ipad 平板 板电 电脑.
    """
    text = text.casefold()
    if not re.search(UNSPACED, text):
        return WORD.findall(text)
    found = []
    for word in WORD.findall(unicodedata.normalize("NFKC", text)):
        for run in re.finditer(RUN, word):
            size = (len(word), 2, 3)[run.lastindex or 0]  # none, or one of the groups of RUN
            starts = range(max(1, len(run[0]) - size + 1))
            found += [run[0][start : start + size] for start in starts]
    return found


# Words without content: a query is to match by its names and nouns.
FUNCTION_WORDS = set(
    words("""a an and any are as at be been but by can could did do does for from had has have he
    her him his how i if in into is it its may me my of on or our she should so than that the their
    them then there these they this those to us was we were what when where which who whom whose why
    will with would you your
    什么 哪里 哪个 哪些 哪位 怎么 为什么 多少 是谁 是什么 在哪
    の は が を に で と も か な へ や です ですか ます でした ました ある いる する した して から
    まで とは どこ だれ いつ なに なぜ
    คือ คืออะไร อะไร ที่ไหน เมื่อไร เมื่อไหร่ ใคร เป็น ของ และ ที่""")
)


def content_words(text):
    """The lower-case words of a text without function words; all of its words where nothing else is
    there.
    """
    found = words(text)
    return [word for word in found if word not in FUNCTION_WORDS] or found


def read_passage(row):
    """(title, address, text) of a passage as this package, BEIR, Search-R1 or their servers write
    it.

    A text alone is `contents`, whose first line is the title (Search-R1). Without `url` the address
    is passage:ID, with a hash of the text as ID where there is none. Raises LookupError, TypeError
    or AttributeError without any text.
    """
    if isinstance(row, str):
        row = {"contents": row}
    title = row.get("title")
    text = row.get("text")
    name = row.get("id", row.get("_id"))
    if text is None:
        text = row["contents"]
        first, _, rest = text.partition("\n")
        first = first.strip('" ')
        if rest and title in (None, first):
            title = first
            text = rest
    title = str(title or "")
    text = str(text)
    if name is None:
        name = hashlib.sha256(f"{title}{text}".encode("utf-8", "replace")).hexdigest()[:12]
    return title, str(row.get("url") or f"passage:{name}"), text


class Corpus:
    """Documents (title, url, text) and a BM25 index; a result shows snippet(index of the document).

    `pages`: by url, the texts of all its documents, in their order.
    """

    def __init__(self, documents, snippet=None):
        if not documents:
            raise ConfigError("the corpus has no documents")
        import bm25s  # here, because importing it takes 0.7 s and a live run does not need it

        self.documents = documents
        self.snippet = snippet or self.beginning
        self.index = bm25s.BM25()
        indexed = []
        passages = defaultdict(list)
        for title, url, text in documents:
            indexed.append(words(f"{title}\n{text}"))
            passages[url].append(text)
        self.index.index(indexed, show_progress=False)
        self.pages = {url: "\n\n".join(texts) for url, texts in passages.items()}

    @classmethod
    def from_jsonl(cls, path: str | Path):
        """From lines that read_passage reads; ConfigError names a bad line."""
        documents = []
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                documents.append(read_passage(json.loads(line)))
                "".join(documents[-1]).encode()  # no tokenizer takes a lone surrogate
            except Exception as error:  # whatever is no passage
                raise ConfigError(
                    f"corpus={str(path)!r}: line {number} is not title, url, text: {error!r}"
                ) from error
        return cls(documents)

    def beginning(self, index):
        """The first SNIPPET_CHARS of a text, up to the end of a word where it has words."""
        flat = " ".join(self.documents[index][2].split())
        short = shorten(flat, SNIPPET_CHARS, placeholder=" ...")
        if len(short) < min(len(flat), SNIPPET_CHARS // 2):
            return f"{flat[:SNIPPET_CHARS]} ..."
        return short

    def search(self, query, k):
        """The k best documents, best first, equal scores in corpus order; none that shares no word
        with the query.
        """
        wanted = dict.fromkeys(content_words(query))
        scores = self.index.get_scores_from_ids(self.index.get_tokens_ids(wanted))
        found = np.flatnonzero(scores > 0)
        best = found[np.argsort(-scores[found], kind="stable")[:k]]
        return [
            SearchResult(*self.documents[i][:2], self.snippet(i))  # type: ignore[call-arg]
            for i in best.tolist()
        ]


# --- inside a page


def segments(text, max_chars):
    """Cut a text into pieces of at most `max_chars`, at the best border in the second half."""
    pieces = []
    start = 0
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            border = BORDER.match(text, start + max_chars // 2, end)
            if border:
                end = border.end()
        piece = text[start:end].strip()
        if piece:
            pieces.append(piece)
        start = end
    return pieces


def extract(question, segment):
    """What the reader without a model notes: the ten sentences with most words of the question."""
    wanted = set(content_words(question))
    text = SENTENCE_END.sub(r"\g<0>\n", segment)
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    shared = [len(wanted.intersection(content_words(sentence))) for sentence in sentences]
    best = heapq.nlargest(10, range(len(sentences)), key=shared.__getitem__)
    return " ".join(sentences[place].strip() for place in sorted(best) if shared[place])


# --- the toy world

MODEL_DIR = ROOT / "deepresearcher_min/toy_model"
SITE = "https://toy.example/"
NAMES, RELATIONS, FILLERS, TWO_HOP = table("toyworld").values()


class World:
    """Pages, facts and questions for one purpose (training, held out, warm start ...) and from one
    seed.

    250 pages about people, cities, companies and books with invented names. A search result shows a
    page's first sentence and one of its facts, so that browsing pays in two cases of three; half of
    the questions need two pages. Start model and tokenizer come from scripts/; the names must not
    change, since the model that ships was trained on them.

    A fifth of all possible two-word names is reserved for "held out". Every fact that is asked for
    has such a name in it (as its subject, or as a city's mayor), so a held-out world shares none
    with the others.
    """

    def __init__(self, purpose, seed):
        # The order of all draws makes the world: whoever changes it changes what a seed stands for.
        rng = Random(f"{purpose} {seed}")
        held_out = purpose == "held out"

        def draw(first, second, count, article=""):
            """Different two-word names, all of them reserved for held-out worlds or none."""
            ours = [
                f"{article}{one} {other}"
                for i, one in enumerate(NAMES[first])
                for j, other in enumerate(NAMES[second])
                if held_out == ((i + j) % 5 == 0)
            ]
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
                # values: a kind of page, whose names are drawn from, or the words themselves
                self.facts[name] = {
                    relation: rng.choice(names.get(values) or values.split())
                    for relation, values in (RELATIONS[kind] | FILLERS[kind]).items()
                }
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

    def questions(self, count, seed):
        """`count` different questions, half of them with one hop and half with two, in random
        order.
        """
        rng = Random(f"questions {seed}")
        questions = []
        half = count // 2
        kinds = ("toy_1hop", RELATIONS, count - half), ("toy_2hop", TWO_HOP, half)
        for source, paths, wanted in kinds:
            chains = [
                (name, path.split()) for name, kind in self.kind.items() for path in paths[kind]
            ]
            for subject, relations in rng.sample(chains, min(wanted, len(chains))):
                text = f"What is the {' of the '.join(reversed(relations))} of {subject}?"
                answer = subject
                for relation in relations:
                    answer = self.facts[answer][relation]
                questions.append(Question(f"{source}:{text}", text, (answer,), source))
        rng.shuffle(questions)
        return questions


def url_of(name):
    return SITE + name.replace(" ", "_")


def chain_of(question):
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
            taken["second_hop"].append(value.split()[-1] in later)  # its last name will do
    return {name: float(np.mean(flags or np.nan)) for name, flags in taken.items()}


# --- what is asked


@dataclass(frozen=True)
class Task:
    """What to learn on, and what to be measured on; a corpus is an offline web."""

    model_dir: str
    questions: list[Question]
    held_out: list[Question]
    corpus: Corpus | None = None
    world: World | None = None  # the toy's held-out one: its web, and the behaviour rates


def load_task(config, key="eval_data"):
    """The Task that the config names; ValueError for questions, web or model that are of no use.
    `key` is what messages call eval_data. Without data there is nothing to learn on.
    """
    model_dir = str(MODEL_DIR) if config.model == "toy" else config.model
    seed, count = config.seed, config.eval_questions
    if config.search == "toy":
        world, other = World("training", seed), World("held out", seed)
        questions = world.questions(1000, seed)
        return Task(model_dir, questions, other.questions(count, seed), world.corpus, other)
    questions = read_questions("data", config.data)
    held_out = read_questions(key, config.eval_data)[: count or None]
    if questions and not held_out:  # set aside, and never trained on
        if not 0 < count < len(questions):
            raise ConfigError(
                f"eval_questions={count}: without eval_data, 1 to {len(questions) - 1} of the "
                f"{len(questions)} questions of data={config.data} are set aside"
            )
        held_out, questions = questions[:count], questions[count:]
    corpus = None
    if config.corpus:
        with named("corpus", config.corpus, "it must be a corpus.jsonl (title, url, text)"):
            corpus = Corpus.from_jsonl(config.corpus)
    return Task(model_dir, questions, held_out, corpus)


def read_questions(key, path):
    with named(key, path):
        return load_questions(path) if path else []
