"""From the files that people have to a corpus, training questions and held-out ones.

    python -m scripts.question_sets --out=DIR FILE ...

DIR gets corpus.jsonl (title, url, text), train.jsonl and held_out.jsonl (id, question, answers,
source, gold_titles, article), for --corpus, --data and --eval_data. What a file is, its own first
object says:

- SQuAD and XQuAD JSON: an article's paragraphs become the pages "Title (1)", "Title (2)", ...
- HotpotQA (distractor) and 2WikiMultihopQA JSON: the paragraphs of "context"
- MuSiQue, one object a line: its "paragraphs"
- corpora, one passage a line: BEIR (_id, title, text), wiki-18 (id, contents), ours (title, url,
  text)
- questions, one a line: question, answers, and "article" or "gold_titles" or both

No article is in both sets. Which one an article belongs to is decided by a hash of its name and
--seed, so that nothing has to be remembered; a question that needs articles of both sides is left
out, and counted. With --held_out=0.1 a question with two articles is therefore held out with
probability .01 and left out with .18: take more for multi-hop files. Passages that occur twice are
written once, for which 8 bytes each are kept; everything else streams. --short_addresses numbers
the pages (passage:17): an address costs a small model 25 tokens, three times in a trajectory that
opens a page.

The formats follow what their authors published; never run on the published files of SQuAD, XQuAD,
HotpotQA, 2WikiMultihopQA, MuSiQue, BEIR or wiki-18, only on small files of the same form.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ijson
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.corpus import read_passage  # noqa: E402
from deepresearcher_min.report import text_table  # noqa: E402
from deepresearcher_min.trajectory import parse_row  # noqa: E402

WIKIPEDIA = "https://en.wikipedia.org/wiki/"
NAMES = ("corpus", "train", "held_out")
Passage = dict[str, str]


def page(title: str, text: str, number: int = 0) -> Passage:
    """A passage; the number tells an article's paragraphs apart."""
    url = WIKIPEDIA + quote(title.replace(" ", "_"), safe="/:,()'")
    if not number:
        return {"title": title, "url": url, "text": text}
    return {"title": f"{title} ({number})", "url": f"{url}#{number}", "text": text}


def question_row(row: dict[str, Any], source: str, gold: list[str], articles: list[str]) -> dict:
    """A question, checked by the reader that train.py uses; `articles` decide its side."""
    question = parse_row(row)
    return {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "source": question.source or source,
        "gold_titles": list(dict.fromkeys(gold)),
        "article": articles[0],
        "articles": articles,
    }


# --- one reader for each format: (passages, questions) of one object of the file


def read_squad(article: dict[str, Any]) -> tuple[list[Passage], list[dict]]:
    """An article of SQuAD or XQuAD; questions without an answer (SQuAD 2.0) are dropped."""
    title = article["title"].replace("_", " ")
    passages, questions = [], []
    for number, paragraph in enumerate(article["paragraphs"], start=1):
        passage = page(title, paragraph["context"], number)
        passages.append(passage)
        for asked in paragraph["qas"]:
            answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
            if answers:
                row = {"id": asked["id"], "question": asked["question"], "answers": answers}
                questions.append(question_row(row, "squad", [passage["title"]], [title]))
    return passages, questions


def pairs(value: Any) -> list[tuple[str, Any]]:
    """A list of pairs, or the two parallel lists that Hugging Face's data sets make of one."""
    if isinstance(value, dict):
        first, second = value.values()
        return list(zip(first, second, strict=True))
    return value


def read_hotpot(row: dict[str, Any]) -> tuple[list[Passage], list[dict]]:
    """A question of HotpotQA or 2WikiMultihopQA: sentences of several articles."""
    source = "2wiki" if "evidences" in row else "hotpotqa"
    passages = []
    for title, sentences in pairs(row["context"]):
        text = " ".join(sentence.strip() for sentence in sentences)
        passages.append(page(title, text))
    gold = list(dict.fromkeys(title for title, _ in pairs(row["supporting_facts"])))
    return passages, [question_row(row, source, gold, gold)]


def read_musique(row: dict[str, Any]) -> tuple[list[Passage], list[dict]]:
    """A question of MuSiQue; one that cannot be answered gives its passages only."""
    passages, gold = [], []
    for paragraph in row["paragraphs"]:
        passages.append(page(paragraph["title"], paragraph["paragraph_text"]))
        if paragraph["is_supporting"]:
            gold.append(paragraph["title"])
    if not row.get("answerable", True):
        return passages, []
    answers = [row["answer"], *row.get("answer_aliases", ())]
    asked = {"id": row["id"], "question": row["question"], "answers": answers}
    gold = list(dict.fromkeys(gold))
    return passages, [question_row(asked, "musique", gold, gold)]


def read_questions(row: dict[str, Any]) -> tuple[list[Passage], list[dict]]:
    """A question that names its article, or the titles that answer it."""
    gold = row.get("gold_titles") or []
    articles = [row["article"]] if row.get("article") else gold
    if not articles:
        raise ValueError('neither "article" nor "gold_titles" says which article it is about')
    return [], [question_row(row, "", gold, articles)]


def read_corpus(row: dict[str, Any]) -> tuple[list[Passage], list[dict]]:
    title, url, text = read_passage(row)
    return [{"title": title, "url": url, "text": text}], []


# An object that has all these keys is of this format; the first that fits.
FORMATS = {
    read_squad: {"title", "paragraphs"},
    read_musique: {"question", "paragraphs"},
    read_hotpot: {"question", "context", "supporting_facts"},
    read_questions: {"question"},
    read_corpus: {"text"},
}


def format_of(first: dict[str, Any]) -> Any:
    for reader, keys in FORMATS.items():
        if keys <= first.keys():
            return reader
    if "contents" in first:
        return read_corpus
    raise ValueError(f"no format that is read here has the keys {', '.join(first) or 'of nothing'}")


# --- objects of a file


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object), for the lines of a .jsonl or the items of one JSON document."""
    with (
        path.open("rb") as file,
        tqdm(
            total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                bar.update(len(line))
                if line.strip():
                    yield f"line {number}", json.loads(line)
            return
        start = file.read(64).lstrip()
        file.seek(0)
        prefix = "item" if start.startswith(b"[") else "data.item"
        for number, item in enumerate(ijson.items(file, prefix, use_float=True), start=1):
            bar.update(file.tell() - bar.n)
            yield f"object {number}", item


def rows_of(path: Path) -> Iterator[tuple[list[Passage], list[dict]]]:
    """What each object of a file holds. SystemExit names file and place of what is wrong."""
    reader, place = None, "the beginning"
    try:
        for where, item in objects(path):
            place = where
            if not isinstance(item, dict):
                raise ValueError(f"not an object: {str(item)[:60]}")
            if reader is None:
                reader = format_of(item)
            passages, questions = reader(item)
            for passage in passages:
                "".join(passage.values()).encode()  # refuses half of a two-part sign
            yield passages, questions
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    except KeyError as error:
        raise SystemExit(f"{path}, {place}: {error} is missing") from error
    except (ValueError, TypeError, AttributeError, ijson.JSONError) as error:
        reason = str(error).partition("\n")[0].strip()
        raise SystemExit(f"{path}, at or behind {place}: {reason}") from error
    if reader is None:
        raise SystemExit(f"{path} holds no object that is read here")


# --- writing


def side(articles: list[str], held_out: float, seed: int) -> str:
    """train, held_out, or left out where the articles are on both sides."""
    sides = set()
    for article in articles:
        name = article.replace("_", " ").strip().casefold()
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        sides.add("held_out" if share < held_out else "train")
    return sides.pop() if len(sides) == 1 else "left out"


def make_sets(
    files: list[Path], out: Path, held_out: float, seed: int, short: bool = False
) -> dict[str, Counter]:
    """Write the three files; counts of each for each input file. short: see --short_addresses."""
    counts: dict[str, Counter] = {}
    numbers: dict[bytes, int] = {}  # of the addresses, by hash
    written = set()
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        targets = {}
        for name in NAMES:
            part = (out / f"{name}.jsonl.part").open("w", encoding="utf-8")
            targets[name] = stack.enter_context(part)

        def write(name: str, row: dict) -> None:
            line = json.dumps(row, ensure_ascii=False)
            digest = hashlib.sha256(f"{name}{line}".encode()).digest()[:8]
            if digest not in written:
                written.add(digest)
                targets[name].write(line + "\n")
                count[name] += 1

        for path in files:
            count = counts[path.name] = Counter()
            for passages, questions in rows_of(path):
                for passage in passages:
                    if short:
                        digest = hashlib.sha256(passage["url"].encode()).digest()[:8]
                        number = numbers.setdefault(digest, len(numbers) + 1)
                        passage["url"] = f"passage:{number}"
                    write("corpus", passage)
                for question in questions:
                    chosen = side(question.pop("articles"), held_out, seed)
                    if chosen == "left out":
                        count[chosen] += 1
                    else:
                        write(chosen, question)
    for name in NAMES:  # only now: a run that failed leaves what was there
        os.replace(out / f"{name}.jsonl.part", out / f"{name}.jsonl")
    return counts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of articles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short_addresses", action="store_true", help="passage:1, passage:2, ...")
    args = parser.parse_args(argv)
    if not 0 <= args.held_out <= 1:
        parser.error(f"--held_out={args.held_out:g} is not between 0 and 1")
    for path in args.files:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    counts = make_sets(args.files, args.out, args.held_out, args.seed, args.short_addresses)
    columns = [*NAMES, "left out"]
    rows = [["file", *columns]]
    for name, count in counts.items():
        rows.append([name, *(f"{count[column]:,}" for column in columns)])
    print(text_table(rows))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
