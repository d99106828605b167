"""scripts/question_sets.py: every format that it reads, no article on both sides, clear errors."""

import gzip
import json
import random
import unicodedata
from pathlib import Path

import pytest

from deepresearcher_min.corpus import Corpus
from deepresearcher_min.trajectory import load_questions
from scripts import question_sets
from scripts.question_sets import main, make_sets

pytestmark = pytest.mark.quick
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad_web"

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": f"River_{name}",
            "paragraphs": [
                {
                    "context": f"The {name} is {n} km long.",
                    "qas": [
                        {
                            "id": f"{name}{n}",
                            "question": f"How long is the {name}?",
                            "answers": [
                                {"text": f"{n} km", "answer_start": 9},
                                {"text": f"{n} km", "answer_start": 9},
                            ],
                        },
                        {"id": f"{name}{n}x", "question": "Who?", "answers": []},
                    ],
                }
                for n in (10, 20)
            ],
        }
        for name in ("Aa", "Bee", "Cee", "Dee")
    ],
}
HOTPOT = {
    "_id": "h1",
    "question": "Where was the maker of Plain Song born?",
    "answer": "Ghent",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Plain Song", 0], ["Ann Eck", 1], ["Ann Eck", 0]],
    "context": [
        ["Plain Song", ["Plain Song is a tune by Ann Eck.", " It is short."]],
        ["Ann Eck", ["Ann Eck wrote tunes.", " She was born in Ghent."]],
        ["Café (song)", ["Another tune."]],
    ],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Who rules the town of the mill?",
    "answer": "A mayor",
    "answer_aliases": ["the mayor"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Mill", "paragraph_text": "The mill is in Oss.", "is_supporting": True},
        {"idx": 1, "title": "Oss", "paragraph_text": "A mayor rules Oss.", "is_supporting": True},
        {"idx": 2, "title": "Oss", "paragraph_text": "Oss is old.", "is_supporting": False},
    ],
}

ASKED = '{"question": "Who?", "answers": ["x"], %s}\n'
HOTPOT_LIKE = '[{"question": "?", "answer": "x", "supporting_facts": [["A", 0]], "context": %s}]'


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, name: str, *objects) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    else:
        path.write_text(json.dumps(objects[0]))
    return path


def sets_of(tmp_path: Path, *files: Path, held_out: float = 0.0) -> dict[str, list[dict]]:
    make_sets(list(files), tmp_path / "out", held_out, 0)
    return {
        name: rows(tmp_path / "out" / f"{name}.jsonl") for name in ("corpus", "train", "held_out")
    }


def test_squad_paragraphs_become_pages(tmp_path):
    sets = sets_of(tmp_path, write(tmp_path, "squad.json", SQUAD))
    assert len(sets["corpus"]) == 8 and len(sets["train"]) == 8
    assert sets["corpus"][1] == {
        "title": "River Aa (2)",
        "url": "https://en.wikipedia.org/wiki/River_Aa#2",
        "text": "The Aa is 20 km long.",
    }
    assert sets["train"][1] == {
        "id": "Aa20",
        "question": "How long is the Aa?",
        "answers": ["20 km"],
        "source": "squad",
        "gold_titles": ["River Aa (2)"],
        "article": "River Aa",
    }


@pytest.mark.parametrize("dress", ["published", "parallel lists"])
def test_hotpot(tmp_path, dress):
    row = dict(HOTPOT)
    if dress == "parallel lists":
        titles, sentences = zip(*HOTPOT["context"], strict=True)
        row["context"] = {"title": titles, "sentences": sentences}
        facts, numbers = zip(*HOTPOT["supporting_facts"], strict=True)
        row["supporting_facts"] = {"title": facts, "sent_id": numbers}
    sets = sets_of(tmp_path, write(tmp_path, "hotpot.json", [row]))
    assert sets["train"][0]["gold_titles"] == ["Plain Song", "Ann Eck"]
    assert sets["train"][0]["source"] == "hotpotqa"
    assert sets["corpus"][1]["text"] == "Ann Eck wrote tunes. She was born in Ghent."
    assert sets["corpus"][2]["url"] == "https://en.wikipedia.org/wiki/Caf%C3%A9_(song)"


def test_2wiki_is_told_from_hotpot(tmp_path):
    file = write(tmp_path, "2wiki.json", [HOTPOT | {"evidences": []}])
    assert sets_of(tmp_path, file)["train"][0]["source"] == "2wiki"


def test_musique(tmp_path):
    unanswerable = MUSIQUE | {"id": "no", "answerable": False}
    sets = sets_of(tmp_path, write(tmp_path, "musique.jsonl", MUSIQUE, unanswerable))
    assert [row["id"] for row in sets["train"]] == ["2hop__1_2"]
    assert sets["train"][0]["answers"] == ["A mayor", "the mayor"]
    assert len(sets["corpus"]) == 3  # once, though two questions bring them
    pages = Corpus.from_jsonl(tmp_path / "out" / "corpus.jsonl").pages
    assert len(pages) == 2  # both paragraphs about Oss are one page


def test_corpora_and_questions_of_ones_own(tmp_path):
    beir = write(tmp_path, "beir.jsonl", {"_id": "7", "title": "Oss", "text": "Oss is old."})
    wiki = write(tmp_path, "wiki-18.jsonl", {"id": "0", "contents": '"Mill"\nThe mill is in Oss.'})
    asked = {"question": "Where?", "golden_answers": ["Oss"], "article": "Mill"}
    sets = sets_of(tmp_path, beir, wiki, write(tmp_path, "questions.jsonl", asked))
    assert [row["title"] for row in sets["corpus"]] == ["Oss", "Mill"]
    assert sets["train"][0]["answers"] == ["Oss"] and sets["train"][0]["article"] == "Mill"
    assert load_questions(tmp_path / "out" / "train.jsonl")[0].answers == ("Oss",)


def test_short_addresses_number_the_pages(tmp_path):
    corpus = [
        {"title": "Mill", "url": "https://x.example/mill", "text": "The mill is in Oss."},
        {"title": "Oss", "url": "https://x.example/oss", "text": "Oss is old."},
        {"title": "Oss", "url": "https://x.example/oss", "text": "A mayor rules Oss."},
    ]
    file = write(tmp_path, "corpus.jsonl", *corpus, corpus[0])
    counts = make_sets([file], tmp_path / "out", 0.0, 0, short=True)
    assert counts[file]["corpus"] == 3
    pages = Corpus.from_jsonl(tmp_path / "out" / "corpus.jsonl").pages
    assert pages == {
        "passage:1": "The mill is in Oss.",
        "passage:2": "Oss is old.\n\nA mayor rules Oss.",
    }


def test_no_article_is_on_both_sides(tmp_path):
    rng = random.Random(0)
    names = [f"Article {n}" for n in range(200)]
    objects = []
    for n in range(400):
        gold = rng.sample(names, 2)
        context = [[name, [f"{name} is a thing."]] for name in gold]
        facts = [[name, 0] for name in gold]
        objects.append(HOTPOT | {"_id": str(n), "context": context, "supporting_facts": facts})
    singles = [{"question": "?a", "answer": "x", "article": name} for name in names]
    files = write(tmp_path, "h.json", objects), write(tmp_path, "q.jsonl", *singles)
    counts = make_sets(list(files), tmp_path / "out", 0.3, 1)
    train, held_out = rows(tmp_path / "out/train.jsonl"), rows(tmp_path / "out/held_out.jsonl")
    seen = {title for row in train for title in [*row["gold_titles"], row["article"]]}
    unseen = {title for row in held_out for title in [*row["gold_titles"], row["article"]]}
    assert not seen & unseen
    assert 40 <= counts[files[1]]["held_out"] <= 80
    total = counts[files[0]]
    assert total["train"] + total["held_out"] + total["left out"] == 400
    assert total["left out"] > 100


def test_the_same_articles_are_held_out_whatever_else_is_read(tmp_path):
    both = sets_of(tmp_path, write(tmp_path, "s.json", SQUAD), held_out=0.5)
    some = dict(SQUAD, data=SQUAD["data"][2:])
    again = sets_of(tmp_path, write(tmp_path, "s.json", some), held_out=0.5)
    assert all(row in both["held_out"] for row in again["held_out"])
    assert all(row in both["train"] for row in again["train"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"question": "Who?", "answers": ["x"]}\n', "line 1: neither"),
        ("a.jsonl", '{"text": "x"}\n\n{"title": 1\n', "line 3: not JSON (Expecting ',' delimiter"),
        ("a.json", '{"text": "x"}\n{"text": "y"\n', "line 2: not JSON"),
        ("a.jsonl", '{"question": "Who?", "answers": [], "article": "A"}\n', "line 1: answers"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "line 2: not an object"),
        ("a.jsonl", '{"text": "\\ud800", "title": "T"}\n', "line 1: 'utf-8'"),
        ("a.json", '[{"question": "Who?", "context": [], "supporting_facts": []}]', "object 1"),
        ("a.json", '{"data": [{"title": "A"}]}', "object 1: no format"),
        ("a.json", '{"data": [{"title": "A", "paragraphs": [{}]}]}', "object 1: context is miss"),
        (
            "a.json",
            '{"data": [{"title": "A", "paragraphs": "x"}]}',
            "paragraphs must be a JSON array",
        ),
        ("a.json", '[{"text": "x"}, {"text": ', "after object 1: parse error: premature EOF"),
        ("a.json", '{"rows": []}', "line 1: no format"),
        ("a.json", '{"data": []}', "holds no object"),
        ("a.json", "", "holds no object"),
        ("a.jsonl", "", "holds no object"),
        ("a.json", "query-id\tcorpus-id\tscore\n", "not JSON: b'query-id"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: "),
        ("a.jsonl", '{"_id": "q1", "text": "where is ghent", "metadata": {}}', "a query of BEIR"),
        ("a.jsonl", '{"contents": null}', "line 1: neither text nor contents"),
        ("a.jsonl", '{"text": {"a": 1}}', "text must be a JSON string, not \"{'a': 1}\""),
        ("a.jsonl", ASKED % '"article": 5', "article and each of gold_titles must be"),
        (
            "a.jsonl",
            ASKED % '"gold_titles": "Mill"',
            "gold_titles must be a JSON array, not 'Mill'",
        ),
        ("a.jsonl", ASKED % '"gold_titles": [null]', "each of gold_titles must be a JSON string"),
        ("a.jsonl", ASKED % '"gold_titles": ["\\ud800"]', "line 1: 'utf-8'"),
        ("a.jsonl", ASKED % '"article": "\\ud800"', "line 1: 'utf-8'"),
        ("a.json", HOTPOT_LIKE % '[["A", "B."]]', "context of 'A' must be a JSON array, not 'B.'"),
        (
            "a.json",
            json.dumps([HOTPOT, {"question": "?"}]),
            "object 2: context must be a JSON array",
        ),
        ("a.jsonl", json.dumps(MUSIQUE) + '\n{"paragraphs": []}', "line 2: question is missing"),
        ("a.json", HOTPOT_LIKE % '[["A"]]', "context must hold pairs with a title first"),
        (
            "a.json",
            HOTPOT_LIKE % '{"title": ["A"], "sentences": []}',
            "has 1 titles and 0 sentences",
        ),
        ("a.json", HOTPOT_LIKE % '{"title": ["A"]}', "context must have title and one more list"),
    ],
    ids=lambda value: value[:30],
)
def test_what_does_not_fit_is_named(tmp_path, name, text, said):
    kept = tmp_path / "out"
    kept.mkdir()
    (kept / "corpus.jsonl").write_text("as before")
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=r"a\.json") as error:
        main([f"--out={kept}", str(tmp_path / name)])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert (kept / "corpus.jsonl").read_text() == "as before"
    assert [path.name for path in kept.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("dress", ["lines", "list", "blank list", "packed", "mark", "packed list"])
def test_a_file_may_be_dressed_as_people_do(tmp_path, dress):
    plain = sets_of(tmp_path, write(tmp_path, "musique.jsonl", MUSIQUE))
    file = tmp_path / "dressed.json"
    text = json.dumps([MUSIQUE], indent=1) if "list" in dress else json.dumps(MUSIQUE) + "\n"
    data = {"mark": "\ufeff", "blank list": " \n\n"}.get(dress, "").encode() + text.encode()
    file.write_bytes(gzip.compress(data) if "packed" in dress else data)
    assert sets_of(tmp_path, file) == plain
    if dress == "packed":
        file.write_bytes(file.read_bytes()[:-12])
        with pytest.raises(SystemExit, match=r"dressed\.json, after "):
            sets_of(tmp_path, file)


def test_every_question_is_counted(tmp_path):
    lost = HOTPOT | {"_id": "h2", "context": HOTPOT["context"][1:]}  # as in the fullwiki setting
    none = HOTPOT | {"_id": "h3", "supporting_facts": []}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    files = [
        write(tmp_path, "a/h.json", [HOTPOT, lost, HOTPOT, none]),
        write(tmp_path, "b/h.json", [HOTPOT | {"_id": "h4"}]),
        write(tmp_path, "s.json", SQUAD),
    ]
    counts = make_sets([*files, files[2]], tmp_path / "out", 0.0, 0)
    assert counts[files[0]] == {"corpus": 3, "train": 1, "unanswered": 2, "repeated": 1}
    assert counts[files[1]] == {"train": 1}
    # Named twice, as corpus and as questions: written once.
    assert counts[files[2]] == {"corpus": 8, "train": 8, "unanswered": 16, "repeated": 8}


def test_paragraphs_of_an_article_are_on_one_side(tmp_path):
    asked = []
    for n in range(40):
        for part in (f"River {n}", f"River_{n} (1)", f"River {n} (2)"):
            asked.append({"id": part, "question": "?", "answers": "x", "gold_titles": [part]})
    sets = sets_of(tmp_path, write(tmp_path, "q.jsonl", *asked), held_out=0.5)
    numbers = [
        {row["id"].replace("_", " ").split()[1] for row in sets[name]}
        for name in ("train", "held_out")
    ]
    assert all(numbers) and not numbers[0] & numbers[1]


def test_a_passage_without_a_title_is_no_query(tmp_path):
    plain = {"_id": "1", "text": "The mill is in Oss."}
    linked = plain | {"_id": "2", "metadata": {}, "url": "https://x.example/"}
    for row in (plain, linked):
        assert len(sets_of(tmp_path, write(tmp_path, "c.jsonl", row))["corpus"]) == 1


def test_one_name_in_two_spellings_is_one_article(tmp_path):
    asked = []
    for n in range(40):
        for form in ("NFC", "NFD"):
            name = unicodedata.normalize(form, f"Café_{n}" if form == "NFC" else f"café {n}")
            asked.append({"id": f"{form}{n}", "question": "?", "answers": "x", "article": name})
    sets = sets_of(tmp_path, write(tmp_path, "q.jsonl", *asked), held_out=0.5)
    numbers = [{row["id"][3:] for row in sets[name]} for name in ("train", "held_out")]
    assert all(numbers) and not numbers[0] & numbers[1]


def test_the_command_and_its_table(tmp_path, capsys):
    main([f"--out={tmp_path / 'out'}", "--held_out=0.5", str(write(tmp_path, "s.json", SQUAD))])
    said = capsys.readouterr().out
    assert "left out" in said and "s.json" in said
    with pytest.raises(SystemExit):
        main([f"--out={tmp_path / 'out'}", str(tmp_path / "nothing.json")])
    assert "nothing.json is not a file" in capsys.readouterr().err


def test_nothing_is_overwritten_or_left_half_written(tmp_path, capsys, monkeypatch):
    corpus = write(tmp_path, "corpus.jsonl", {"contents": "Mill\nThe mill is in Oss."})
    before = corpus.read_bytes()
    for out, said in ((tmp_path, f"would overwrite {corpus}"), (corpus, "File exists")):
        with pytest.raises(SystemExit):
            main([f"--out={out}", str(corpus)])
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error and corpus.read_bytes() == before

    def interrupted(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(question_sets, "read_passage", interrupted)
    with pytest.raises(SystemExit) as error:
        main([f"--out={tmp_path / 'new'}", str(corpus)])
    assert error.value.code == 130 and "Stopped" in capsys.readouterr().err
    assert not [*(tmp_path / "new").iterdir()]


def test_real_questions_by_article(tmp_path):
    if not DATA.is_dir():
        pytest.skip("the test data is not beside the project")
    files = [DATA / "corpus.jsonl", DATA / "questions.jsonl"]
    sets = sets_of(tmp_path, *files, held_out=0.3)
    assert len(sets["corpus"]) == 2660
    assert len(sets["train"]) + len(sets["held_out"]) == 802
    articles = {name: {row["article"] for row in sets[name]} for name in ("train", "held_out")}
    assert not articles["train"] & articles["held_out"]
