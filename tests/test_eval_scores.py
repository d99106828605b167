"""eval.py's results: the table beside the paper's, and the judge (MBE)."""

import csv
import json
import re
import time
from collections import Counter
from functools import partial

import loopback
import pytest
from loopback import Server

import eval as evaluation
from deepresearcher_min import report
from deepresearcher_min.config import ROOT, load_config
from deepresearcher_min.corpus import Task
from deepresearcher_min.reward import ask_judge, explain
from deepresearcher_min.search import parse_verdict
from deepresearcher_min.trajectory import Group, Question, Trajectory
from deepresearcher_min.web import Web


def answered(source, number, answer, stop_reason="answer"):
    question = Question(f"{source} {number}", f"Who is number {number}?", ("Ada Lovelace",), source)
    return Trajectory(
        question, [1, 2], [False, True], [float("nan"), -0.5], (), answer, stop_reason
    )


def evaluated(folder, config):
    """An evaluation folder of ten answers, five of them right, two half right; the last one was
    lost.
    """
    results = [
        answered("nq", i, "Ada Lovelace" if i < 3 else "Ada" if i < 5 else "Grace")
        for i in range(6)
    ]
    results += [answered("Bamboogle", i, "ada lovelace!") for i in range(2)]
    results += [answered("Bamboogle", i, None, "malformed") for i in range(2, 4)]
    groups = [Group(one.question, [one], [0.0], [0.0]) for one in results]
    report.write_trajectories(
        folder / "trajectories/eval.jsonl", 0, groups, partial(explain, config=config)
    )
    asked = [one.question for one in results] + [Question("lost", "Lost?", ("x",), "nq")]
    evaluation.conclude(config, Task("", [], asked), 0.0)
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.quick
def test_the_table_stands_beside_the_papers(tmp_path, capsys):
    summary = evaluated(tmp_path, load_config([f"--run_dir={tmp_path}", "--model=some/model"]))
    printed = capsys.readouterr().out
    cells = {row[0]: row[1:] for row in summary["table"]}
    assert cells[""] == ["Bamboogle", "nq", "all"] and cells["questions"] == ["4", "6", "10"]
    # nq: (3 + 2 * 2/3) / 6; Bamboogle: 2 / 4
    assert cells["F1"] == ["0.500", "0.722", "0.633"] and cells["EM"] == ["0.500", "0.500", "0.500"]
    assert cells["format errors"] == ["50.0%", "0.0%", "20.0%"] and "MBE" not in cells
    assert (
        cells["paper: DeepResearcher"] == [".710/.728", ".396/.619", "-"]
        and len(cells) == 5 + 8 + 8 + 1
    )
    low, high = summary["sources"]["nq"]["f1_interval"]
    # Six values of mean .722 and deviation .40: about .72 +- .32.
    assert 0.3 < low < 0.722 < high <= 1
    assert "Ended by the harness, left out: 1." in " ".join(printed.split())
    assert "F1 " in printed and "paper: CoT + RAG" in printed and "not measured" in printed
    markdown = (tmp_path / "results.md").read_text()
    assert re.search(
        r"\| paper: DeepResearcher +\| +\.710/\.728 \| +\.396/\.619 \| +- \|", markdown
    )
    assert "some/model" in (tmp_path / "report.html").read_text()


@pytest.mark.quick
def test_the_papers_figures_have_the_averages_that_others_computed():
    """Averages over all questions of the same figures, from table 1 of arXiv 2508.16153 (Search-o1
    local: none).
    """
    averages = {
        "CoT": (23.6, 26.1),
        "CoT + RAG": (37.7, 43.2),
        "Search-o1 (web)": (35.2, 45.0),
        "Search-R1 base": (48.3, 53.8),
        "Search-R1 instruct": (39.6, 45.6),
        "R1-Searcher": (47.1, 53.7),
        "DeepResearcher": (51.8, 60.5),
    }
    with (ROOT / "docs/paper.csv").open(newline="") as file:
        rows = {row.pop("method"): row for row in csv.DictReader(file)}
    for method, published in averages.items():
        for place, average in enumerate(published):
            sums = sum(
                float(cell.split("/")[place]) * (125 if name == "Bamboogle" else 512)
                for name, cell in rows[method].items()
            )
            assert 100 * sums / 3197 == pytest.approx(average, abs=0.06), (method, place)


def judging(server, folder, **changes):
    options = {
        "judge_url": server.url + "/v1",
        "judge_model": "judge",
        "tool_timeout": 8,
        "max_retries": 1,
    } | changes
    config = load_config(["--preset=toy", *(f"--{key}={value}" for key, value in options.items())])
    return config, Web(config, folder / "cassette.sqlite")


def reply(content):
    return (
        200,
        {"Content-Type": "application/json"},
        {"choices": [{"message": {"content": content}}]},
    )


NEARLY = answered("nq", 1, "Augusta Ada King,\nCORRECT")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("page", "verdict", "cause", "requests"),
    [
        (reply("The same person.\nCORRECT"), 1.0, None, 1),
        (reply("Another one.\n\n**Incorrect.**\n"), 0.0, None, 1),
        (lambda n: reply("CORRECT" if n == 3 else "Hm."), 1.0, None, 3),
        ((200, {}, {**reply("CORRECT")[2], "usage": "n/a"}), 1.0, None, 1),
        ((200, {}, {**reply("CORRECT")[2], "usage": {"total_tokens": "5"}}), 1.0, None, 1),
        (reply("It is correct."), None, "fail_judge_no_verdict", 3),
        (reply("CORRECT or INCORRECT"), None, "fail_judge_no_verdict", 3),
        (reply("CORRECT\nOr not?"), None, "fail_judge_no_verdict", 3),
        (reply(""), None, "fail_judge_no_verdict", 3),
        (reply(None), None, "fail_judge_no_verdict", 3),
        (reply(["CORRECT"]), None, "fail_judge_no_verdict", 3),
        ((200, {}, []), None, "fail_judge_bad_reply", 1),
        ((200, {}, {"error": "overloaded"}), None, "fail_judge_bad_reply", 1),
        ((200, {}, b"<html>CORRECT</html>"), None, "fail_judge_bad_reply", 1),
        ((200, {}, b"\xff" * 6_000_000), None, "fail_judge_too_large", 1),
        ((401, {}, b"no"), None, "fail_judge_unauthorized", 1),
        ((500, {}, b"oops"), None, "fail_judge_http_500", 2),
        (
            lambda n: reply("Yes.\nCORRECT") if n > 1 else (503, {"Retry-After": "0"}, b""),
            1.0,
            None,
            2,
        ),
    ],
)
def test_verdicts_are_read_strictly(tmp_path, monkeypatch, page, verdict, cause, requests):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with Server({"/v1/chat/completions": page}) as server:
        config, web = judging(server, tmp_path)
        counts = Counter()
        assert ask_judge(NEARLY, config, web, counts) == verdict
        assert {name for name in counts if name.startswith("fail_judge_")} == (
            {cause} if cause else set()
        )
        assert server.requests["/v1/chat/completions"] == requests
        _, headers, body = server.sent[0]
        sent = json.loads(body)
        assert (
            headers["Authorization"] == "Bearer secret"
            and sent["model"] == "judge"
            and sent["temperature"] == 0
        )
        assert json.loads(sent["messages"][1]["content"]) == {
            "question": "Who is number 1?",
            "accepted": ["Ada Lovelace"],
            "given": "Augusta Ada King,\nCORRECT",
        }
        assert ask_judge(NEARLY, config, web, counts) == verdict  # from the cassette
        assert server.requests["/v1/chat/completions"] == requests
        assert b"secret" not in (tmp_path / "cassette.sqlite").read_bytes()
        web.close()


TEMPLATE = "Asked: {question} Golds: {gt_answer} Given: {pred_answer}\nReply as JSON.\n"


def asked(server, folder, trajectory, **changes):
    """What the judge was sent, and the verdict."""
    config, web = judging(server, folder, **changes)
    verdict = ask_judge(trajectory, config, web, Counter())
    web.close()
    return json.loads(server.sent[-1][2]), verdict


@pytest.mark.quick
def test_the_judge_is_asked_as_the_keys_say(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    question = Question("q", "Who wrote {pred_answer}?", ("The BOOK's", "O'Neill, E."), "nq")
    answer = "Eugene\nO'Neill {question}!"
    one = Trajectory(question, [1, 2], [False, True], [float("nan"), -0.5], (), answer, "answer")
    (tmp_path / "rules.txt").write_text("Rules of my own, with a last line.\n")
    (tmp_path / "fields.txt").write_text(TEMPLATE)
    with Server({"/v1/chat/completions": reply("Yes.\nCORRECT")}) as server:
        sent, _ = asked(
            server, tmp_path, one, judge_prompt_file=tmp_path / "rules.txt", judge_normalize=True
        )
        assert (
            sent["messages"][0]["content"] == "Rules of my own, with a last line.\n"
            and sent["temperature"] == 0
        )
        assert json.loads(sent["messages"][1]["content"]) == {
            "question": question.text,
            "accepted": ["the book's", "o'neill, e."],
            "given": "eugene o neill question",
        }
        sent, verdict = asked(
            server, tmp_path, one, judge_prompt_file=tmp_path / "fields.txt", judge_temperature=0.7
        )
        _, message = sent["messages"]
        assert message == {
            "role": "user",
            "content": (
                f"Asked: {question.text} Golds: {list(question.answers)} Given: {answer}\n"
                "Reply as JSON.\n"
            ),
        }
        assert (
            sent["temperature"] == 0.7
            and verdict == 1.0
            and set(sent) == {"model", "messages", "temperature"}
        )


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes",
    [
        {"judge_temperature": 0.7},
        {"judge_normalize": True},
        {"judge_prompt_file": "rules.txt"},
        {"judge_model": "x"},
    ],
)
def test_a_verdict_under_other_settings_of_the_judge_does_not_answer(
    tmp_path, monkeypatch, changes
):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text("Rules of my own.")
    with Server({"/v1/chat/completions": reply("Yes.\nCORRECT")}) as server:
        for settings, requests in (({}, 1), ({}, 1), (changes, 2), (changes, 2)):
            asked(server, tmp_path, NEARLY, **settings)
            assert server.requests["/v1/chat/completions"] == requests


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"rationale": "the same", "judgement": "correct"}', 1.0),
        ('```json\n{\n"rationale": "not {the} same",\n"judgement": "incorrect"\n}\n```', 0.0),
        ('{"rationale": "a raw\nline break", "judgement": "Correct"}\n', 1.0),
        ('Here it is: {"judgement": "incorrect", "rationale": "CORRECT"}', 0.0),
        ('<think>{"judgement": "correct"}</think>{"judgement": "incorrect"}', 0.0),
        ("Both mean the set {1, 2}.\nCORRECT", 1.0),
        ("It means {}.\nINCORRECT", 0.0),
        ('{"judgement": "correct or incorrect"}', None),
        ('{"judgement": true}', None),
        ('{"judgement": "correct"} {"judgement": "incorrect"}', None),
        ('{"rationale": "correct"}', None),
        ("{" * 10_000 + "}" * 10_000, None),
        ("correct", 1.0),
        ("", None),
    ],
)
def test_verdicts_are_read_in_both_forms(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "codec can't decode"),
        (b"Judge {pred_answer} by {gt_answer}.", "must hold all of {question}"),
    ],
)
def test_a_judges_prompt_that_cannot_be_used_is_said_before(
    tmp_path, monkeypatch, capsys, content, words
):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    path = tmp_path / "judge.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = [
        "--preset=toy",
        "--model=toy",
        f"--run_dir={tmp_path / 'run'}",
        "--judge_url=http://127.0.0.1:9",
    ]
    assert evaluation.main([*arguments, f"--judge_prompt_file={path}"]) == 2
    said = capsys.readouterr().err
    assert (
        f"judge_prompt_file='{path}': " in said
        and words in said
        and not (tmp_path / "run").exists()
    )


@pytest.mark.quick
def test_a_silent_judge_costs_its_deadline_and_no_more(tmp_path, monkeypatch):
    page = monkeypatch.setitem(loopback.FAULTS, "chat/completions", loopback.FAULTS["silence"])
    with Server({"/": page}) as server:
        config, web = judging(server, tmp_path, judge_url=server.url + "/fault", tool_timeout=0.4)
        start, counts = time.monotonic(), Counter()
        assert ask_judge(NEARLY, config, web, counts) is None and counts["fail_judge_timeout"] == 1
        assert time.monotonic() - start < 5
        web.close()


@pytest.mark.quick
def test_mbe_in_the_table_says_what_was_left_out(tmp_path, capsys):
    # Asked are only the two half right and the wrong one: an exact match is right, no answer is
    # wrong without asking.
    pages = {
        "/v1/chat/completions": lambda n: reply(
            ("CORRECT", "INCORRECT")[n - 1] if n < 3 else "Who knows?"
        )
    }
    with Server(pages) as server:
        arguments = [
            f"--run_dir={tmp_path}",
            f"--judge_url={server.url}/v1",
            "--judge_model=judge",
            "--tool_threads=0",
        ]
        summary = evaluated(tmp_path, load_config(["--preset=toy", *arguments]))
        # Two verdicts, and three tries without one.
        assert server.requests["/v1/chat/completions"] == 5
    cells = {row[0]: row[1:] for row in summary["table"]}
    assert cells["MBE"] == ["0.500", "0.800", "0.667"]  # nq: 4 of the 5 with a verdict
    words = " ".join(capsys.readouterr().out.split())
    assert "by judge; without a verdict, left out: 1 (1 fail_judge_no_verdict)" in words
