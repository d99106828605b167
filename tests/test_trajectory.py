"""What flows, and questions: published files, broken files, and their order over epochs, ranks and
restarts.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepresearcher_min.trajectory import (
    Question,
    Recording,
    Trajectory,
    load_questions,
    take_questions,
)

pytestmark = pytest.mark.quick
SHARED = Path(__file__).parents[2] / "shared/data"
SOURCES = ("nq", "tq", "hotpotqa", "2wiki", "musique", "popqa")  # and Bamboogle
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the published data in ../shared"
)
QUESTIONS = [Question(f"q{i}", f"text {i}", ("a",)) for i in range(10)]


def test_a_recording_becomes_a_trajectory_that_nobody_can_change():
    record = Recording(QUESTIONS[0], [5, 6])
    assert record.append([7, 8], [-0.5, -0.25]) == (2, 4) and record.append([9]) == (4, 5)
    one = record.finish("answer", "a")
    assert one.token_ids.tolist() == [5, 6, 7, 8, 9] and one.token_ids.dtype == np.int32
    assert one.sampled_mask.tolist() == [False, False, True, True, False]
    assert (
        np.isnan(one.logprobs).tolist() == [True, True, False, False, True]
        and one.logprobs.dtype == np.float32
    )
    with pytest.raises(ValueError, match="read-only"):
        one.token_ids[0] = 1


@pytest.mark.parametrize(
    ("ids", "mask", "logprobs", "stop", "message"),
    [
        ([1, 2], [0, 1], [-1.0], "answer", r"question 'q0': lengths differ: \(2, 2, 1\)"),
        (
            [1, 2],
            [0, 1],
            [-1.0, float("nan")],
            "answer",
            "question 'q0': a sampled token has no finite logprob",
        ),
        (
            [1, 2],
            [0, 1],
            [-1.0, float("-inf")],
            "answer",
            "question 'q0': a sampled token has no finite logprob",
        ),
        ([1, 2], [0, 1], [float("nan"), -1.0], "tired", "unknown stop reason 'tired'"),
    ],
)
def test_a_trajectory_refuses_what_cannot_be(ids, mask, logprobs, stop, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(QUESTIONS[0], ids, mask, logprobs, (), None, stop)


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "sources"),
    [
        ("official/dev.parquet", 875, {**dict.fromkeys(SOURCES, 125), "Bamboogle": 125}),
        ("official/test.parquet", 3197, {**dict.fromkeys(SOURCES, 512), "Bamboogle": 125}),
        (
            "train/train_mix_2000.parquet",
            2000,
            {"hotpotqa_2wiki": 900, "tq": 400, "nq": 400, "musique": 300},
        ),
    ],
)
def test_published_files_load_completely(name, count, sources):
    questions = load_questions(SHARED / name)
    rows = pq.read_table(SHARED / name).to_pylist()
    assert len(questions) == count
    assert Counter(question.source for question in questions) == sources
    assert len({question.id for question in questions}) == count
    for question, row in zip(questions, rows, strict=True):
        assert question.text == row["prompt"][0]["content"]
        assert question.id == row["extra_info"]["index"]
        golds = row["reward_model"]["ground_truth"].split("<|answer_split|>")
        # 40 kB, emoji, newlines and all.
        assert question.answers == tuple(gold.strip() for gold in golds)


@needs_shared
def test_offline_questions_load():
    questions = load_questions(SHARED / "offline_web/questions.jsonl")
    assert len(questions) == 400
    assert questions[0].answers == ("a spirit",)
    assert questions[0].source == "hotpotqa"


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows),
        "utf-8",
        "surrogateescape",
    )
    return path


def test_jsonl_fills_in_what_is_missing(tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"question": " who? \n", "answers": [" me ", ""], "id": 7, "source": "own"},
        "",
        {"question": "line\u2028separator", "answers": "x<|answer_split|>y", "extra": 1},
        {"question": "again?", "answers": ["z"], "id": "7"},
        {"question": "first?", "answers": ["z"], "id": 0},
    )
    assert load_questions(path) == [
        Question("7", " who? \n", ("me",), "own"),
        Question("mine, line 3", "line\u2028separator", ("x", "y")),
        Question("7, line 4", "again?", ("z",)),
        Question("0", "first?", ("z",)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ('{"question": "\udcff"}', "line 2: not JSON"),  # not UTF-8
        ([1], "line 2: not an object"),
        (
            {"answers": ["a"]},
            "line 2: question must be a text that is not empty, not None; the columns here: "
            "answers",
        ),
        ({"question": "q", "gold": "a"}, "not 'None'; the columns here: question, gold"),
        (
            {"question": "  ", "answers": ["a"]},
            "line 2: question must be a text that is not empty, not '  '",
        ),
        ({"question": 5, "answers": ["a"]}, "line 2: question must be a text"),
        (
            {"question": "q", "answers": []},
            "line 2: answers must hold a text, or be a list that holds texts",
        ),
        (
            {"question": "q", "answers": [" "]},
            "line 2: answers must hold a text, or be a list that holds texts",
        ),
        (
            {"question": "q", "answers": [["a"]]},
            "line 2: answers must hold a text, or be a list that holds texts",
        ),
        (
            {"question": "q", "answers": None},
            "line 2: answers must hold a text, or be a list that holds texts",
        ),
        (
            {"question": "q", "answers": {"value": "a"}},
            "not \"{'value': 'a'}\"; the columns here: question, answers",
        ),
        (
            '{"question": "q", "answers": NaN}',
            "line 2: answers must hold a text, or be a list that holds texts",
        ),
        (
            '{"question": "half \\ud83d?", "answers": "a"}',
            "line 2: 'utf-8' codec can't encode character",
        ),
        (
            '{"question": "q", "answers": ["a", "\\udc00"]}',
            "line 2: 'utf-8' codec can't encode character",
        ),
        (
            '{"question": "q", "answers": "[\\"\\\\ud83d\\"]"}',
            "line 2: 'utf-8' codec can't encode character",
        ),
        (
            '{"question": "q", "answers": "a", "id": "\\ud83d"}',
            "line 2: 'utf-8' codec can't encode character",
        ),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_bad_jsonl_rows_name_file_and_line(tmp_path, row, message):
    path = write_jsonl(tmp_path / "bad.jsonl", {"question": "q", "answers": ["a"]}, row)
    with pytest.raises(ValueError, match=r"bad\.jsonl") as caught:
        load_questions(path)
    assert message in str(caught.value)


def official_row(**changes: object) -> dict:
    row = {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "who?"}],
        "reward_model": {"ground_truth": "me", "style": "rule"},
        "extra_info": {"index": "nq_1", "split": "dev"},
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "row 1: prompt has 0 user messages, not 1"),
        ({"prompt": None}, "row 1: question must be a text that is not empty, not None"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 1: question must be a text"),
        ({"prompt": [{"role": "user", "content": ""}]}, "row 1: question must be a text"),
        (
            {"reward_model": None},
            "texts, not 'None'; the columns here: data_source, prompt, reward_model, extra_info",
        ),
        (
            {"reward_model": {"ground_truth": "<|answer_split|> ", "style": ""}},
            "row 1: answers must hold a text, or be a list that holds texts",
        ),
    ],
)
def test_bad_parquet_rows_name_file_and_row(tmp_path, changes, message):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([official_row(), official_row(**changes)]), path)
    with pytest.raises(ValueError, match=r"bad\.parquet") as caught:
        load_questions(path)
    assert message in str(caught.value)


def test_bad_files_are_one_clear_error(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    for name, message in (
        ("torn.parquet", r"torn\.parquet: .*not a parquet file"),
        ("missing.jsonl", r"missing\.jsonl: must be an existing file"),
        ("data.csv", r"data\.csv: must be an existing file that ends in \.parquet or \.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            load_questions(tmp_path / name)
    with pytest.raises(ValueError, match="no questions"):
        load_questions(write_jsonl(tmp_path / "empty.jsonl"))
    pq.write_table(pa.table({"question": ["q"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError, match=r"other\.parquet, row 0: answers must .* columns here: question$"
    ):
        load_questions(tmp_path / "other.parquet")


# --- what other people's files look like

TARGETS = [
    "Ulm",
    ["Ulm"],
    ("Ulm", ""),
    {"target": ["Ulm"]},
    {"target": "Ulm"},
    "['Ulm']",
    '["Ulm"]',
    '{"target": ["Ulm"]}',
    "{'target': array(['Ulm'], dtype=object)}",
    {"target": "['Ulm']"},
    ["Ulm", None],
]


@pytest.mark.parametrize("column", ["answers", "answer", "golden_answers", "ground_truth"])
def test_answers_have_other_names_and_are_lists_dicts_or_either_as_text(tmp_path, column):
    path = write_jsonl(
        tmp_path / "mine.jsonl", *({"question": "where?", column: target} for target in TARGETS)
    )
    assert [one.answers for one in load_questions(path)] == [("Ulm",)] * len(TARGETS)


@pytest.mark.parametrize(
    ("stored", "golds"),
    [
        (str(np.array(["it's", "New\nYork", "b c"], dtype=object)), ("it's", "New\nYork", "b c")),
        (repr(np.array(["a (b)", "c, d"])), ("a (b)", "c, d")),
        (str([f"gold {i}" for i in range(40)]), tuple(f"gold {i}" for i in range(40))),
        (str(np.array([f"gold {i}" for i in range(40)])), tuple(f"gold {i}" for i in range(40))),
        ("['x', ' ', 'y']", ("x", "y")),
        ('["caf\\u00e9", "\\ud83d\\ude00"]', ("café", "😀")),
        ("[Verse 1] of {what}", ("[Verse 1] of {what}",)),  # a text that only looks like one
        ("{never closed", ("{never closed",)),
        ("['" + "\\" * 50_000, ("['" + "\\" * 50_000,)),  # in linear time
        (1998, ("1998",)),
        (1998.0, ("1998",)),
        ([3.25, 4], ("3.25", "4")),
        (True, ("yes",)),
        ([False], ("no",)),
        ({"target": ["x<|answer_split|>y", "z"]}, ("x", "y", "z")),
    ],
)
def test_what_a_column_of_answers_may_hold(tmp_path, stored, golds):
    path = write_jsonl(tmp_path / "mine.jsonl", {"question": "q", "answers": stored})
    assert load_questions(path)[0].answers == golds


def test_the_parquet_of_search_r1_loads_with_its_plain_question(tmp_path):
    row = {
        "id": "test_0",
        "question": "who got the first prize?",
        "golden_answers": ["Wilhelm Conrad Röntgen"],
        "data_source": "nq",
        "prompt": [
            {
                "role": "user",
                "content": "Answer the given question. ... Question: who got the first prize?",
            }
        ],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": ["Wilhelm Conrad Röntgen"]}, "style": "rule"},
        "extra_info": {"index": 0, "split": "test"},
    }
    without = {
        key: value for key, value in row.items() if key not in ("id", "question", "golden_answers")
    }
    for number, one in enumerate((row, without)):
        path = tmp_path / f"nq{number}.parquet"
        pq.write_table(pa.Table.from_pylist([one]), path)
        text, name = one.get("question", row["prompt"][0]["content"]), one.get("id", "0")
        assert load_questions(path) == [Question(name, text, ("Wilhelm Conrad Röntgen",), "nq")]


def test_columns_of_a_parquet_may_be_stored_as_text(tmp_path):
    row = official_row()
    stored = {key: json.dumps(value) for key, value in row.items() if key != "data_source"}
    for number, one in enumerate(
        (row, {**row, **stored}, {**row, **{key: str(row[key]) for key in stored}})
    ):
        pq.write_table(pa.Table.from_pylist([one]), tmp_path / f"{number}.parquet")
        assert load_questions(tmp_path / f"{number}.parquet") == [
            Question("nq_1", "who?", ("me",), "nq")
        ]
    pq.write_table(pa.Table.from_pylist([{**row, "extra_info": "-"}]), tmp_path / "mine.parquet")
    assert load_questions(tmp_path / "mine.parquet")[0].id == "mine, row 0"


def test_other_names_and_a_file_from_windows(tmp_path):
    rows = [
        {"_id": "5a", "query": "who?", "answer": "me"},
        {"prompt": "where?", "answers": "here", "id": None},
    ]
    lines = "\r\n".join(map(json.dumps, rows)) + "\r\n"
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    expected = [Question("5a", "who?", ("me",)), Question("mine, line 2", "where?", ("here",))]
    assert load_questions(tmp_path / "mine.jsonl") == expected


# --- the order


@settings(deadline=None)  # another process may hold the core
@given(st.lists(st.integers(0, 25), max_size=8), st.integers(0, 5))
def test_every_epoch_asks_every_question_once_however_many_are_taken_at_a_time(sizes, seed):
    starts = itertools.accumulate(sizes, initial=0)
    pieces = [
        take_questions(QUESTIONS, seed, start, n) for start, n in zip(starts, sizes, strict=False)
    ]
    taken = list(itertools.chain.from_iterable(pieces))
    assert taken == take_questions(QUESTIONS, seed, 0, sum(sizes))
    assert len(taken) == sum(sizes)
    for start in range(0, len(taken) - 9, 10):
        assert sorted(one.id for one in taken[start : start + 10]) == sorted(
            one.id for one in QUESTIONS
        )


def test_order_depends_on_seed_and_epoch_only():
    first, second = take_questions(QUESTIONS, 0, 0, 10), take_questions(QUESTIONS, 1, 0, 10)
    assert first != second
    assert take_questions(QUESTIONS, 0, 10, 10) != first  # the next epoch is shuffled anew
