"""Reports as files: JSON lines that survive kills, trajectories as text, what the page holds."""

import base64
import copy
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folder import WHY, build, group, page_data, plain, researcher, write_html, write_run

from deepresearcher_min import report
from deepresearcher_min.trajectory import Group, Question, Trajectory, Turn

PAYLOADS = Path(__file__).parents[2] / "shared" / "data" / "transcripts" / "deepresearcher_signal"


# --- files of JSON lines


@pytest.mark.quick
def test_metrics_survive_a_kill_at_every_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "f1": step / 10, "eval": {"em": 0.5}} for step in range(3)]
    for row in rows:
        report.append_json_line(path, row)
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == rows
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = report.resume_metrics(path, step=1)
        complete = whole[:size].count(b"\n") + (size > 0 and whole[size : size + 1] == b"\n")
        assert again == rows[: min(complete, 2)]
        report.append_json_line(path, {"step": 2, "f1": 1.0})
        assert list(report.read_json_lines(path)) == [
            *rows[: min(complete, 2)],
            {"step": 2, "f1": 1.0},
        ]


@pytest.mark.quick
def test_metrics_hold_no_nan_and_take_array_numbers(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    assert report.resume_metrics(path, step=0) == []
    row = {
        "step": np.int64(1),
        "kl": float("nan"),
        "grad_norm": np.float32(0.5),
        "inner": [math.inf],
    }
    report.append_json_line(path, row)
    assert path.read_text() == '{"step": 1, "kl": null, "grad_norm": 0.5, "inner": [null]}\n'


@pytest.mark.quick
def test_trajectory_lines_worked_by_hand(tmp_path):
    question = Question("q", "Who?", ("her",), "nq")
    nan = math.nan
    turns = (
        Turn((1, 3), (3, 4), "<think>a", "search", "[]"),
        Turn((4, 5), (5, 5), "<think>b", "answer"),
    )
    logprobs = [nan, -0.2, -0.4, nan, -1.0]
    one = Trajectory(
        question,
        [5, 6, 7, 8, 9],
        [0, 1, 1, 0, 1],
        logprobs,
        turns,
        "her",
        "answer",
        {"searches": 1},
    )
    before = copy.deepcopy(vars(one.turns[0]))
    path = tmp_path / "trajectories" / "step.jsonl"
    report.write_trajectories(path, 7, [Group(question, [one], [1.0], [nan])], WHY)
    (row,) = report.read_json_lines(path)
    assert {key: row[key] for key in ("step", "index", "reward", "advantage", "why")} == {
        "step": 7,
        "index": 0,
        "reward": 1.0,
        "advantage": None,
        "why": "reward 1 (exact match): against 'her', 1 of the 1 words given are right "
        "(precision 1.00), 1 of the 1 wanted are there (recall 1.00)",
    }
    assert [turn["logprob"] for turn in row["turns"]] == pytest.approx([-0.3, -1.0])
    assert row["behaviours"] == []
    sampled = one.logprobs[one.sampled_mask]
    assert row["logprobs"] == pytest.approx(sampled.tolist(), abs=1e-6)
    assert row["token_ids"] == one.token_ids.tolist() and row["cost"] == one.cost
    assert row["question"] == one.question.text and row["answers"] == list(one.question.answers)
    assert vars(one.turns[0]) == before  # the input is as it was


@pytest.mark.quick
def test_trajectories_are_read_as_they_were_written(tmp_path):
    groups, path = [group(0), group(1)], tmp_path / "eval.jsonl"
    report.write_trajectories(path, 0, groups, WHY)
    written = [one for each in groups for one in each.trajectories]
    questions = [one.question for one in written]
    read = map(report.read_trajectory, report.read_json_lines(path), questions)
    for one, again in zip(written, read, strict=True):
        assert plain(replace(again, logprobs=one.logprobs)) == plain(one)
        assert again.turns == one.turns
        assert np.allclose(again.logprobs, one.logprobs, atol=1e-6, equal_nan=True)


@pytest.mark.quick
def test_a_torn_line_costs_one_trajectory_and_no_other(tmp_path):
    path = tmp_path / "step.jsonl"
    report.write_trajectories(path, 1, [group(0)], WHY)
    path.write_bytes(path.read_bytes()[:-30])
    report.write_trajectories(path, 1, [group(1)], WHY)
    assert [row["id"] for row in report.read_json_lines(path)] == ["q0"] * 3 + ["q1"] * 4


# --- trajectories as text


@pytest.mark.quick
def test_readable_tells_the_whole_story_without_control_characters():
    question = Question("q", "Where?\x1b]0;owned\x07", ("Liverpool", "L'pool"), "nq")
    one = researcher(question, "Liver\x9bpool\ud800", note="\x1b[2J\x08He lived there.")
    text = report.readable(one, "reward 0.5: against 'Liverpool'")
    assert "Where?" in text and "Liverpool | L'pool" in text and "He lived there." in text
    assert text.endswith("reward 0.5: against 'Liverpool'") and "Gold" not in report.readable(one)
    assert (
        "--- turn 2: browse" in text
        and "<think> Known. </think>" in text
        and "--- end: answer" in text
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    text.encode()  # UTF-8 can hold it


@pytest.mark.quick
def test_write_readable_picks_best_and_worst(tmp_path):
    groups = [group(number) for number in range(6)]
    rewards = [reward for each in groups for reward in each.rewards]
    report.write_readable(tmp_path / "step.txt", groups, WHY)
    text = (tmp_path / "step.txt").read_text()
    found = [
        float(value) for value in re.findall(r"est reward: (-?[\d.]+), advantage [+-]\d", text)
    ]
    assert (
        found == [max(rewards), min(rewards)]
        and len(re.findall(r"(?m)^Gold: .*\nreward ", text)) == 2
    )
    report.write_readable(tmp_path / "empty.txt", [], WHY)
    assert (tmp_path / "empty.txt").read_text() == ""


# --- the page


@pytest.mark.quick
def test_page_holds_the_run_and_nothing_from_outside(tmp_path):
    text = write_html(write_run(tmp_path)).read_text()
    data = page_data(tmp_path / "report.html")
    assert (
        len(data["trajectories"]) == 6 * 4 * 4 + 4
        and data["note"] == "100 trajectories from 7 of 7 files"
    )
    assert data["summary"]["table"] == [
        ["", "before", "after"],
        ["F1", "0.260", "0.990"],
        ["EM", "0.200", "0.980"],
    ]
    assert data["config"]["lr"] == 0.0004 and data["metrics"][1]["step"] == 1
    turn = data["trajectories"][0]["turns"][0]
    # Unfolded for the page.
    assert turn["observation"][0]["web_page_info_list"][0]["title"] == "Ray Lake"
    assert "token_ids" not in data["trajectories"][0] and data["trajectories"][0]["tokens"] > 40
    script = text.split("<script>")[1].split("</script>")[0]
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):
        own = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in text
    markup = text.replace(script, "").split('id="data">')[0]
    assert not re.search(r"(src|href)=|url\(|@import|https?:", markup)
    code = re.sub(r"//.*", "", script)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\.href|\.src|fetch|import", code
    )


@pytest.mark.quick
@pytest.mark.skipif(not PAYLOADS.exists(), reason="no shared test data")
def test_real_tool_payloads_unfold(tmp_path):
    files = (("search", "data_search.json"), ("browse", "data_read.json"))
    contents = [json.loads((PAYLOADS / name).read_text())[0]["content"] for _, name in files]
    script = [
        (kind, "<think> x", repr(content))
        for (kind, _), content in zip(files, contents, strict=True)
    ]
    question = Question("ray", "What happened to Ray Lake?", ("suicide",), "nq")
    one = build(
        question,
        [*script, ("answer", "<think> y </think><answer> suicide </answer>", "")],
        "suicide",
    )
    report.write_trajectories(
        tmp_path / "trajectories" / "eval.jsonl", 0, [Group(question, [one], [1.0], [0.0])], WHY
    )
    (row,) = page_data(write_html(tmp_path))["trajectories"]
    assert [turn["observation"] for turn in row["turns"]] == [*contents, ""]


@pytest.mark.quick
def test_page_of_an_evaluation_and_of_a_run_that_was_stopped(tmp_path):
    (tmp_path / "a").mkdir()
    assert page_data(write_html(tmp_path / "a"))["trajectories"] == []
    (tmp_path / "a" / "summary.json").write_text(
        json.dumps({"table": [["", "nq"], ["F1", "0.500"]]})
    )
    data = page_data(write_html(tmp_path / "a"))
    assert data["summary"]["table"][1] == ["F1", "0.500"] and "after" not in data["summary"]


@pytest.mark.quick
def test_a_step_that_ran_twice_is_shown_once(tmp_path):
    path = tmp_path / "trajectories" / "step-000001.jsonl"
    for _ in range(2):
        report.write_trajectories(path, 1, [group(0)], WHY)
    assert len(page_data(write_html(tmp_path))["trajectories"]) == 4


@pytest.mark.quick
def test_a_full_page_keeps_evaluations_and_the_last_steps(tmp_path, monkeypatch):
    write_run(tmp_path, steps=8, questions=2, size=4)
    monkeypatch.setattr(report, "MAX_TRAJECTORIES", 2 + 2 * 8)
    rows = page_data(write_html(tmp_path))["trajectories"]
    assert sorted({row["file"] for row in rows}) == ["eval-before", "step-000007", "step-000008"]
    assert len(rows) == 18 and rows[0]["step"] == 0 and rows[-1]["step"] == 8


@pytest.mark.quick
def test_a_full_page_keeps_observations_by_question(tmp_path, monkeypatch):
    questions = [Question(f"q{number}", "Where?", ("Liverpool",), "nq") for number in range(10, 18)]
    groups = [
        Group(each, [researcher(each, "Liverpool")] * 2, [1.0] * 2, [0.0] * 2) for each in questions
    ]
    for step in (1, 2):
        report.write_trajectories(
            tmp_path / "trajectories" / f"step-{step:06d}.jsonl", step, groups, WHY
        )
    turns = [turn for each in groups for one in each.trajectories for turn in one.turns]
    monkeypatch.setattr(
        report, "MAX_PAGE_TEXT", sum(len(turn.text + turn.observation) for turn in turns)
    )
    monkeypatch.setattr(report, "MAX_TURN", 10)
    data = page_data(write_html(tmp_path))
    cut = [row for row in data["trajectories"] if row["turns"][0]["observation"] is None]
    whole = [row for row in data["trajectories"] if row["turns"][0]["observation"] is not None]
    assert len(cut) == len(whole) == 16 and "; 16 of them without observations" in data["note"]
    assert {row["id"] for row in cut}.isdisjoint({row["id"] for row in whole})
    assert {turn["text"] for row in cut for turn in row["turns"]} <= {
        "<think> Lo",
        "<think> I ",
        "<think> Re",
        "<think> Kn",
    }
    assert all(turn["text"].endswith(">") for row in whole for turn in row["turns"])
