"""eval.py --repeats: seeds, files, replies of readers and judges, the scores of several runs."""

import json
import time
from collections import Counter
from signal import SIGINT, raise_signal

import pytest
from loopback import Server
from run_folder import WHY, page_data
from test_eval_scores import answered, judging, reply

import eval as evaluation
from deepresearcher_min import report
from deepresearcher_min.config import RunStopped, load_config
from deepresearcher_min.corpus import Task
from deepresearcher_min.evaluation import scores_over_runs
from deepresearcher_min.reward import ask_judge
from deepresearcher_min.trajectory import Group

pytestmark = pytest.mark.quick
TOY = ["--preset=toy", "--model=toy", "--limit=2", "--eval_temperature=1"]
TIMES = ("seconds",)


def rows_of(folder):
    files = sorted((folder / "trajectories").glob("eval*.jsonl"))
    return [row for file in files for row in report.read_json_lines(file)]


def said(rows):
    return {
        (row["index"], row["id"]): (row["token_ids"], row["logprobs"], row["answer"])
        for row in rows
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "eval"
    assert evaluation.main([*TOY, "--repeats=3", f"--run_dir={folder}"]) == 0
    return folder


def test_the_first_run_is_the_single_run_and_the_others_are_their_own(three, tmp_path):
    assert evaluation.main([*TOY, f"--run_dir={tmp_path / 'one'}"]) == 0
    rows, single = said(rows_of(three)), said(rows_of(tmp_path / "one"))
    assert len(single) == 4 and len(rows) == 12
    assert {key: value for key, value in rows.items() if key[0] == 0} == single
    texts = [[rows[run, name][0] for _, name in single] for run in range(3)]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    summary = json.loads((three / "summary.json").read_text())
    alone = json.loads((tmp_path / "one/summary.json").read_text())
    assert len(summary["runs"]) == 3 and summary["runs"][0] == alone["overall"] == alone["runs"][0]
    assert summary["overall"]["n"] == 4 and not any("std" in name for name in alone["overall"])
    for name in ("f1", "em", "calls", "searches"):
        assert summary["overall"][name] == pytest.approx(
            sum(run[name] for run in summary["runs"]) / 3
        )
    names = [row[0] for row in summary["table"]]
    assert {"pass@k", "F1, deviation over runs", "F1 of the majority", "EM of the majority"} <= set(
        names
    )
    caption = " ".join(summary["caption"].split())
    assert "Means over 3 runs" in caption and "searches and pages are shared" in caption
    assert "runs" not in alone["caption"] and "pass@k" not in [row[0] for row in alone["table"]]


def test_the_page_shows_every_run(three):
    shown = page_data(three / "report.html")["trajectories"]
    assert Counter(row["index"] for row in shown) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("method", ["agent", "rag"])
def test_stopped_in_the_second_run_it_goes_on_and_asks_nothing_twice(method, tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    options = [*TOY, f"--method={method}", "--repeats=2", "--limit=2"]
    assert evaluation.main([*options, f"--run_dir={whole}"]) == 0
    real, written = report.write_trajectories, []

    def stop_at_the_sixth(*arguments):
        written.append(real(*arguments))
        if len(written) == 6:
            raise_signal(SIGINT)

    monkeypatch.setattr(report, "write_trajectories", stop_at_the_sixth)
    assert evaluation.main([*options, f"--run_dir={folder}", "--max_in_flight=1"]) == 130
    assert Counter(row["index"] for row in rows_of(folder)) == {0: 4, 1: 2}
    monkeypatch.setattr(report, "write_trajectories", real)
    assert evaluation.main([f"--resume={folder}"]) == 0
    tokens = [
        {key: ids for key, (ids, _, _) in said(rows_of(each)).items()} for each in (folder, whole)
    ]
    assert tokens[0] == tokens[1] and len(rows_of(folder)) == len(tokens[0]) == 8
    if method == "rag":
        assert all(row["cost"]["searches"] == 1 for row in rows_of(folder))


def test_runs_that_would_be_the_same_are_refused(capsys, three):
    for arguments in (
        ["--preset=toy", "--model=toy", "--repeats=2"],
        [f"--resume={three}", "--eval_temperature=0"],
    ):
        assert evaluation.main(arguments) == 2
        said = capsys.readouterr().err
        assert "repeats=" in said and "eval_temperature=0" in said and said.count("\n") == 1
    assert evaluation.main(["--preset=toy", "--model=toy", "--repeats=0"]) == 2
    assert "repeats=0: must be greater than 0" in capsys.readouterr().err


# --- readers and judges


def test_each_run_has_replies_of_its_own_and_old_recordings_stay_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with Server(
        {"/v1/chat/completions": lambda n: reply(["CORRECT", "INCORRECT"][n % 2])}
    ) as server:
        config, web = judging(server, tmp_path)
        one = answered("nq", 1, "Augusta Ada King")
        verdicts = []
        for web.run in (0, 1, 0, 1):
            verdicts.append(ask_judge(one, config, web, Counter()))
        assert verdicts == [0.0, 1.0, 0.0, 1.0] and server.requests["/v1/chat/completions"] == 2
        web.run, made = 1, []

        def count_up():
            made.append(1)
            return len(made)

        for kind, expected in (("search", 1), ("page", 1), ("reader", 2)):
            made.clear()
            for web.run in (0, 2, 0, 2):
                web.cached(kind, ["x"], count_up, Counter(), time.monotonic() + 9)
            assert len(made) == expected, kind
        web.close()


def test_the_judges_tokens_are_paid_and_end_the_judging(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", "any")
    full = {**reply("CORRECT")[2], "usage": {"total_tokens": 100}}
    results = [answered("nq", i, "Augusta") for i in range(5)]
    groups = [Group(one.question, [one], [0.0], [0.0]) for one in results]
    report.write_trajectories(tmp_path / "trajectories/eval.jsonl", 0, groups, WHY)
    task = Task("", [], [one.question for one in results])
    with Server({"/v1/chat/completions": (200, {}, full)}) as server:
        options = [
            f"--run_dir={tmp_path}",
            f"--judge_url={server.url}/v1",
            "--judge_model=j",
            "--tool_threads=0",
        ]
        options += ["--price_judge_token=0.001", "--preset=toy"]
        for _ in range(2):  # what was paid is remembered, so a second try asks nothing
            with pytest.raises(RunStopped, match="max_cost"):
                evaluation.conclude(load_config([*options, "--max_cost=0.25"]), task, 0.0)
            assert server.requests["/v1/chat/completions"] == 3  # $0.10 each
        evaluation.conclude(load_config([*options, "--max_cost=9"]), task, 0.0)
        assert server.requests["/v1/chat/completions"] == 5
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["usd"] == pytest.approx(0.5) == summary["overall"]["usd"]
        and summary["overall"]["mbe"] == 1
    )
    assert "$0.50. Every trajectory" in capsys.readouterr().out


# --- scores


def test_scores_of_three_runs_by_hand():
    """Gold answer: Ada Lovelace. Three questions; the third was lost in the last run."""
    given = [
        ["Ada Lovelace", "Grace", None],  # EM 1 0 0
        ["ada lovelace!", "Ada", "Ada Lovelace"],  # EM 1 0 1
        ["Grace Hopper", "Grace.", ""],  # EM 0 0
    ]
    runs = [
        [
            answered("nq", q, texts[q], "answer" if texts[q] is not None else "malformed")
            for q in range(3)
        ]
        for texts in given
    ]
    runs[2].pop()
    config = load_config(["--repeats=3"])
    scores, each = scores_over_runs(runs, [{}, {}, {}], config)
    assert [row["em"] for row in each] == pytest.approx([1 / 3, 2 / 3, 0])
    assert scores["em"] == pytest.approx(1 / 3) and scores["em_std"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx((1 / 3 + (1 + 2 / 3 + 1) / 3 + 0) / 3)
    assert scores["pass_at_k"] == pytest.approx(2 / 3)  # the first and the third question
    # "ada lovelace" twice of three; "grace" twice of three; the only answer of the third is right.
    assert scores["majority_em"] == pytest.approx(2 / 3) == scores["majority_f1"]
    assert scores["majority_mbe"] is None and scores["mbe"] is None and scores["n"] == 3
    verdicts = [{f"nq {q}": float(q == 1) for q in range(3)}, {}, {"nq 0": None, "nq 1": 1.0}]
    judged, _ = scores_over_runs(runs, verdicts, config)
    assert judged["pass_at_k"] == pytest.approx(1 / 3)  # by the judge, where there is one
    assert judged["mbe"] == pytest.approx((1 / 3 + 1) / 2)  # the second run has no verdict
    assert judged["majority_mbe"] == 0.5  # wrong, right, and the third question's has no verdict


def test_the_earliest_of_equally_common_answers_is_the_majoritys():
    runs = [
        [answered("nq", 1, text)] for text in ("Grace", "Ada Lovelace", "ada lovelace", "GRACE!")
    ]
    config = load_config(["--repeats=4"])
    assert scores_over_runs(runs, [{}] * 4, config)[0]["majority_em"] == 0
    assert scores_over_runs(runs[1:] + runs[:1], [{}] * 4, config)[0]["majority_em"] == 1


def test_dropped_results_are_a_row(tmp_path):
    from dataclasses import replace

    one = replace(answered("nq", 1, "Ada"), cost={"blocked": 3, "fail_page_blocked_host": 2})
    for value, shown in (("none", None), ("sets.example", 5)):
        scores, _ = scores_over_runs([[one]], [{}], load_config([f"--blocked_hosts={value}"]))
        assert scores.get("blocked") == shown
        rows = {row[0]: row[1] for row in report.score_rows({"all": scores})}
        assert rows.get("dropped as blocked") == (None if shown is None else "5")
