"""What flows, and questions: published files, broken files, and their order over epochs, ranks and restarts."""

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

from deepresearcher_min.trajectory import Question, Recording, Trajectory, load_questions, take_questions

pytestmark = pytest.mark.quick
SHARED = Path(__file__).parents[2] / "shared/data"
SOURCES = ("nq", "tq", "hotpotqa", "2wiki", "musique", "popqa")  # and Bamboogle
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the published data in ../shared")
QUESTIONS = [Question(f"q{i}", f"text {i}", ("a",)) for i in range(10)]


def test_a_recording_becomes_a_trajectory_that_nobody_can_change():
    record = Recording(QUESTIONS[0], [5, 6])
    assert record.append([7, 8], [-0.5, -0.25]) == (2, 4) and record.append([9]) == (4, 5)
    one = record.finish("answer", "a")
    assert one.token_ids.tolist() == [5, 6, 7, 8, 9] and one.token_ids.dtype == np.int32
    assert one.sampled_mask.tolist() == [False, False, True, True, False]
    assert np.isnan(one.logprobs).tolist() == [True, True, False, False, True] and one.logprobs.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        one.token_ids[0] = 1


@pytest.mark.parametrize(
    ("ids", "mask", "logprobs", "stop", "message"),
    [
        ([1, 2], [0, 1], [-1.0], "answer", r"question 'q0': lengths differ: \(2, 2, 1\)"),
        ([1, 2], [0, 1], [-1.0, float("nan")], "answer", "question 'q0': a sampled token has no finite logprob"),
        ([1, 2], [0, 1], [-1.0, float("-inf")], "answer", "question 'q0': a sampled token has no finite logprob"),
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
        ("train/train_mix_2000.parquet", 2000, {"hotpotqa_2wiki": 900, "tq": 400, "nq": 400, "musique": 300}),
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
        assert question.answers == tuple(gold.strip() for gold in golds)  # 40 kB, emoji, newlines and all


@needs_shared
def test_offline_questions_load():
    questions = load_questions(SHARED / "offline_web/questions.jsonl")
    assert len(questions) == 400
    assert questions[0].answers == ("a spirit",)
    assert questions[0].source == "hotpotqa"


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8", "surrogateescape"
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
        ({"answers": ["a"]}, "line 2: the key 'question' is missing"),
        ({"question": "q"}, "line 2: the key 'answers' is missing"),
        ({"question": "  ", "answers": ["a"]}, "line 2: question must be a text that is not empty, not '  '"),
        ({"question": 5, "answers": ["a"]}, "line 2: question must be a text"),
        ({"question": "q", "answers": []}, "line 2: answers must hold a text, or be a list that holds texts"),
        ({"question": "q", "answers": [" "]}, "line 2: answers must hold a text, or be a list that holds texts"),
        ({"question": "q", "answers": [1]}, "line 2: answers must hold a text, or be a list that holds texts"),
        ({"question": "q", "answers": None}, "line 2: answers must hold a text, or be a list that holds texts"),
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
        ({"prompt": None}, "row 1: prompt has 0 user messages, not 1"),
        ({"prompt": [{"role": "user", "content": ""}]}, "row 1: question must be a text"),
        ({"reward_model": None}, "row 1: the key 'ground_truth' is missing"),
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
    with pytest.raises(ValueError, match=r"other\.parquet, row 0: the key 'prompt' is missing"):
        load_questions(tmp_path / "other.parquet")


# --- the order


@settings(deadline=None)  # another process may hold the core
@given(st.lists(st.integers(0, 25), max_size=8), st.integers(0, 5))
def test_every_epoch_asks_every_question_once_however_many_are_taken_at_a_time(sizes, seed):
    starts = itertools.accumulate(sizes, initial=0)
    pieces = [take_questions(QUESTIONS, seed, start, n) for start, n in zip(starts, sizes, strict=False)]
    taken = list(itertools.chain.from_iterable(pieces))
    assert taken == take_questions(QUESTIONS, seed, 0, sum(sizes))
    assert len(taken) == sum(sizes)
    for start in range(0, len(taken) - 9, 10):
        assert sorted(one.id for one in taken[start : start + 10]) == sorted(one.id for one in QUESTIONS)


def test_order_depends_on_seed_and_epoch_only():
    first, second = take_questions(QUESTIONS, 0, 0, 10), take_questions(QUESTIONS, 1, 0, 10)
    assert first != second
    assert take_questions(QUESTIONS, 0, 10, 10) != first  # the next epoch is shuffled anew
