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

Each of them as one JSON document or as one object a line, and packed (.gz) or not.

No article is in both sets. Which one an article belongs to is decided by a hash of its name and
--seed, so that nothing has to be remembered; a question that needs articles of both sides is left
out. With --held_out=0.1 a question with two articles is therefore held out with probability .01 and
left out with .18: take more for multi-hop files. Questions without an answer, or without the
passage that gives it, are dropped. All are counted.

Passages that occur twice are written once, for which a hash of each is kept (some 90 bytes of
memory, twice that with --short_addresses); everything else streams. Passages with one address are
one page: so would be those of two corpora without `url` whose ids are the same numbers.
--short_addresses numbers the pages (passage:17): an address costs a small model 25 tokens, three
times in a trajectory that opens a page.

The formats follow what their authors published; never run on the published files of SQuAD, XQuAD,
HotpotQA, 2WikiMultihopQA, MuSiQue, BEIR or wiki-18, only on small files of the same form.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
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
KINDS = {str: "string", list: "array", dict: "object"}
LONGEST_OBJECT = 2**20  # of a file with an object a line that is not named .jsonl [bytes]
Passage = dict[str, str]
# What a reader makes of an object: passages, and questions (None for one that cannot be answered).
Read = tuple[list[Passage], list[dict | None]]


def page(title: str, text: str, number: int = 0) -> Passage:
    """A passage; the number tells an article's paragraphs apart."""
    url = WIKIPEDIA + quote(title.replace(" ", "_"), safe="/:,()'")
    if not number:
        return {"title": title, "url": url, "text": text}
    return {"title": f"{title} ({number})", "url": f"{url}#{number}", "text": text}


def checked(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a JSON {KINDS[kind]}, not {str(value)[:60]!r}")
    return value


def field(row: Any, key: str, kind: Any = str) -> Any:
    """row[key]; ValueError where there is none, or one of another kind."""
    checked("what holds " + key, row, dict)
    if key not in row:
        raise ValueError(f"{key} is missing; the keys here: {', '.join(row)}")
    return checked(key, row[key], kind)


def question_row(row: dict[str, Any], source: str, gold: list[str], articles: list[str]) -> dict:
    """A question, checked by the reader that train.py uses; `articles` decide its side."""
    question = parse_row(row)
    return {
        "id": question.id,
        "question": question.text,
        "answers": list(question.answers),
        "source": question.source or source,
        "gold_titles": list(dict.fromkeys(gold)),
        "article": articles[0] if articles else "",
        "articles": articles,
    }


# --- one reader for each format


def read_squad(article: dict[str, Any]) -> Read:
    """An article of SQuAD or XQuAD; SQuAD 2.0 has questions without an answer."""
    title = field(article, "title").replace("_", " ")
    passages = []
    questions: list[dict | None] = []
    for number, paragraph in enumerate(field(article, "paragraphs", list), start=1):
        passage = page(title, field(paragraph, "context"), number)
        passages.append(passage)
        for asked in field(paragraph, "qas", list):
            answers = [field(answer, "text") for answer in field(asked, "answers", list)]
            if not answers:
                questions.append(None)
                continue
            row = {"id": asked.get("id"), "question": field(asked, "question")}
            row["answers"] = list(dict.fromkeys(answers))
            questions.append(question_row(row, "squad", [passage["title"]], [title]))
    return passages, questions


def pairs(row: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """(title, value): a list of pairs, or the parallel lists that Hugging Face makes of one."""
    value: Any = row.get(key)
    if isinstance(value, dict):
        columns = [name for name in value if name != "title"]
        if len(columns) != 1:
            raise ValueError(f"{key} must have title and one more list, not {', '.join(value)}")
        titles, others = field(value, "title", list), field(value, columns[0], list)
        if len(titles) != len(others):
            raise ValueError(f"{key} has {len(titles)} titles and {len(others)} {columns[0]}")
        value = zip(titles, others, strict=True)
    else:
        checked(key, value, list)
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{key} must hold pairs with a title first, not {str(pair)[:60]!r}")
        yield checked(f"a title of {key}", pair[0], str), pair[1]


def read_hotpot(row: dict[str, Any]) -> Read:
    """A question of HotpotQA or 2WikiMultihopQA: sentences of several articles."""
    source = "2wiki" if "evidences" in row else "hotpotqa"
    passages = []
    for title, sentences in pairs(row, "context"):
        checked(f"context of {title!r}", sentences, list)
        text = " ".join(checked("a sentence", one, str).strip() for one in sentences)
        passages.append(page(title, text))
    gold = [title for title, _ in pairs(row, "supporting_facts")]
    return passages, [answered_by(passages, gold, row, source)]


def read_musique(row: dict[str, Any]) -> Read:
    """A question of MuSiQue, some of which cannot be answered."""
    passages, gold = [], []
    for paragraph in field(row, "paragraphs", list):
        title = field(paragraph, "title")
        passages.append(page(title, field(paragraph, "paragraph_text")))
        if paragraph.get("is_supporting"):
            gold.append(title)
    if not row.get("answerable", True):
        return passages, [None]
    answers = [row.get("answer"), *(row.get("answer_aliases") or ())]
    asked = {"id": row.get("id"), "question": field(row, "question"), "answers": answers}
    return passages, [answered_by(passages, gold, asked, "musique")]


def answered_by(
    passages: list[Passage], gold: list[str], row: dict[str, Any], source: str
) -> dict | None:
    """A question that these articles answer, if their passages are all there."""
    question = question_row(row, source, gold, list(dict.fromkeys(gold)))
    titles = {passage["title"] for passage in passages}
    return question if gold and titles.issuperset(gold) else None


def read_questions(row: dict[str, Any]) -> Read:
    """A question that names its article, or the titles that answer it."""
    gold = checked("gold_titles", row.get("gold_titles") or [], list)
    articles = [row["article"]] if row.get("article") else gold
    if not articles:
        raise ValueError(
            "neither article nor gold_titles says what it is about; "
            f"the keys here: {', '.join(row)}"
        )
    for name in (*articles, *gold):
        checked("article and each of gold_titles", name, str)
    return [], [question_row(row, "", gold, articles)]


def read_corpus(row: dict[str, Any]) -> Read:
    for key in ("title", "url", "text", "contents"):
        if row.get(key) is not None:
            field(row, key)
    if row.get("text") is None and row.get("contents") is None:
        raise ValueError(f"neither text nor contents is there; the keys here: {', '.join(row)}")
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
    if {"_id", "text", "metadata"} <= first.keys() and not {"title", "url"} & first.keys():
        raise ValueError("a query of BEIR, which has no answer; only BEIR's corpus is read")
    for reader, keys in FORMATS.items():
        if keys <= first.keys():
            return reader
    if "contents" in first:
        return read_corpus
    raise ValueError(f"no format that is read here has the keys {', '.join(first) or 'of nothing'}")


# --- objects of a file


def prefix_of(name: str, file: BinaryIO) -> str:
    """Where ijson finds the objects of a JSON document; empty for a file with one object a line.

    The file then stands behind its byte order mark.
    """
    begin = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(begin)
    line = b"\n"
    while line.isspace():
        line = file.readline(LONGEST_OBJECT)
    file.seek(begin)
    start = line.lstrip()[:1]
    if start == b"[":
        return "item"
    if name.removesuffix(".gz").endswith(".jsonl") or not start:
        return ""
    if start != b"{":
        raise ValueError(f"not JSON: {line[:60]!r}")
    try:
        first = json.loads(line)
    except ValueError:
        return "data.item"
    return "data.item" if isinstance(first.get("data"), list) else ""


def objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, a line or an object), with a progress bar."""
    with (
        path.open("rb") as raw,
        tqdm(
            total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        prefix = prefix_of(path.name, file)
        found = ijson.items(file, prefix, use_float=True) if prefix else file
        name = "object" if prefix else "line"
        for number, one in enumerate(found, start=1):
            bar.update(raw.tell() - bar.n)
            if prefix or one.strip():
                yield f"{name} {number}", one


def parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}): {line[:60]!r}") from error


def rows_of(path: Path) -> Iterator[Read]:
    """What each object of a file holds. SystemExit names file and place of what is wrong."""
    reader, place = None, "the beginning"
    try:
        for where, found in objects(path):
            place = where
            item = parse_line(found) if isinstance(found, bytes) else found
            if not isinstance(item, dict):
                raise ValueError(f"not an object: {str(item)[:60]}")
            if reader is None:
                reader = format_of(item)
            passages, questions = reader(item)
            texts = [text for passage in passages for text in passage.values()]
            for row in filter(None, questions):
                texts += [row["article"], *row["gold_titles"]]
            # Refuses half of a surrogate pair, which no file takes; ijson has put "?" in its place.
            "".join(texts).encode()
            yield passages, questions
    except OSError as error:  # a gzip file may be bad, too
        raise SystemExit(f"{path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, ijson.JSONError) as error:  # found while the next one was read
        reason = error.args[0] if error.args else error
        if isinstance(reason, bytes):
            reason = reason.decode("utf-8", "replace")
        reason = " ".join(str(reason).split())
        raise SystemExit(f"{path}, after {place}: {reason}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).partition("\n")[0].strip()
        raise SystemExit(f"{path}, {place}: {reason}") from error
    if reader is None:
        raise SystemExit(f"{path} holds no object that is read here")


# --- writing


def article_of(title: str) -> str:
    """What tells articles apart: a title without the number of its paragraph, as in "Aare (1)".
    Years are numbers, too: articles that differ in nothing else count as one.
    """
    name = re.sub(r"([ _]\(\d+\))+$", "", title.strip())
    return unicodedata.normalize("NFC", name.replace("_", " ")).casefold()


def side(articles: list[str], held_out: float, seed: int) -> str:
    """train, held_out, or left out where the articles are on both sides."""
    sides = set()
    for article in articles:
        digest = hashlib.sha256(f"{seed}/{article_of(article)}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        sides.add("held_out" if share < held_out else "train")
    return sides.pop() if len(sides) == 1 else "left out"


def make_sets(
    files: list[Path], out: Path, held_out: float, seed: int, short: bool = False
) -> dict[Path, Counter]:
    """Write the three files; counts of each for each input file. short: see --short_addresses."""
    counts: dict[Path, Counter] = {}
    numbers: dict[bytes, int] = {}  # of the addresses, by hash
    written = set()
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        targets = {}
        for name in NAMES:
            part = out / f"{name}.jsonl.part"
            stack.callback(part.unlink, missing_ok=True)
            targets[name] = stack.enter_context(part.open("w", encoding="utf-8"))

        def write(name: str, row: dict) -> None:
            line = json.dumps(row, ensure_ascii=False)
            digest = hashlib.sha256(f"{name}{line}".encode()).digest()[:8]
            if digest not in written:
                written.add(digest)
                targets[name].write(line + "\n")
                count[name] += 1
            elif name != "corpus":
                count["repeated"] += 1

        for path in files:
            count = counts.setdefault(path, Counter())  # a file may be named twice
            for passages, questions in rows_of(path):
                for passage in passages:
                    if short:
                        digest = hashlib.sha256(passage["url"].encode()).digest()[:8]
                        number = numbers.setdefault(digest, len(numbers) + 1)
                        passage["url"] = f"passage:{number}"
                    write("corpus", passage)
                for question in questions:
                    if question is None:
                        count["unanswered"] += 1
                        continue
                    chosen = side(question.pop("articles"), held_out, seed)
                    if chosen == "left out":
                        count[chosen] += 1
                    else:
                        write(chosen, question)
        for name, target in targets.items():  # only now: a run that fails leaves what was there
            target.close()
            os.replace(target.name, out / f"{name}.jsonl")
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
    outputs = {(args.out / f"{name}.jsonl").resolve() for name in NAMES}
    for path in args.files:
        if not path.is_file():
            parser.error(f"{path} is not a file")
        if path.resolve() in outputs:
            parser.error(f"--out={args.out} would overwrite {path}")
    try:
        counts = make_sets(args.files, args.out, args.held_out, args.seed, args.short_addresses)
    except OSError as error:
        parser.error(f"--out={args.out}: {error.strerror}")
    except KeyboardInterrupt:
        parser.exit(130, f"Stopped; {args.out} is as it was.\n")
    columns = [*NAMES, "left out", "unanswered", "repeated"]
    rows = [["file", *columns]]
    for path, count in counts.items():
        rows.append([str(path), *(f"{count[column]:,}" for column in columns)])
    print(text_table(rows))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
