"""Services that fail in the middle of a run: counted, and where most calls fail, a stop that can be
resumed.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from loopback import CONFIG, Server
from service_world import World, arguments, keys, training  # noqa: F401
from small_runs import metrics
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from deepresearcher_min import corpus, report

TRAFFIC = ("requests", "bytes", "cache_hits")  # what a cassette saves the second time

# --- in the middle of training


def without_traffic(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in row if not key.endswith(TRAFFIC)} for row in rows]


def die_after_step(step: int, calls: int, server: World, monkeypatch) -> None:
    """That step over, the server answers so many more searches."""
    real = train.report.step_line

    def reported(row):
        if row["step"] == step:
            last = server.calls["search"] + calls
            server.fails = lambda role, number: number > last
        return real(row)

    monkeypatch.setattr(train.report, "step_line", reported)


@pytest.mark.slow
def test_a_step_without_search_is_not_trained_on_and_a_resumed_run_repeats_it(
    tmp_path, monkeypatch, capsys
):
    with World() as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        assert train.main(training(server, whole)) == 0
        die_after_step(1, 1, server, monkeypatch)
        assert train.main(training(server, tmp_path, "--save_every=100")) == 3
        shown = capsys.readouterr().out
        assert re.search(
            r"\d+ of \d+ calls to the search service failed. .*maintenance until noon", shown
        )
        assert f"--resume={tmp_path / 'run'}" in shown and "| failed   0% |" in shown
        assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
        assert train.main([f"--resume={tmp_path / 'run'}"]) == 2  # it is still down
        monkeypatch.undo()
        server.fails = lambda role, number: False
        assert train.main([f"--resume={tmp_path / 'run'}"]) == 0
    assert without_traffic(metrics(tmp_path / "run")) == without_traffic(metrics(whole / "run"))
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder / "run/checkpoints/step-000003")
        for folder in (whole, tmp_path)
    )
    for name, tensor in one.named_parameters():
        assert torch.equal(tensor, dict(other.named_parameters())[name])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["before", "step-000001", "after"])
def test_a_measurement_without_search_is_repeated_too(tmp_path, monkeypatch, name):
    with World() as server:
        real = train.evaluate

        def dies(*given):
            server.fails = lambda role, number: True
            found = real(*given)
            server.fails = lambda role, number: False
            return found

        names = iter(["before", "step-000001", "after"])
        monkeypatch.setattr(
            train, "evaluate", lambda *given: (dies if next(names) == name else real)(*given)
        )
        more = ["--steps=1", "--eval_every=1", "--search_ttl=0"]
        assert train.main(training(server, tmp_path, *more)) == 3
        monkeypatch.setattr(train, "evaluate", real)
        assert not (tmp_path / "run/summary.json").exists()
        assert train.main([f"--resume={tmp_path / 'run'}"]) == 0
        rows = metrics(tmp_path / "run")
    assert [(row["step"], "eval" in row) for row in rows] == [(0, True), (1, False), (1, True)]
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.quick
def test_a_half_dead_search_is_shown_and_the_run_goes_on(tmp_path, capsys):
    with World(lambda role, number: number > 1 and number % 3 == 0) as server:
        assert train.main(training(server, tmp_path, "--steps=1")) == 0
    (row,) = [row for row in metrics(tmp_path / "run") if "reward" in row]
    assert (
        0 < row["failed"] < 0.5
        and row["cost_search_failed"] == row["cost_fail_search_http_503"] > 0
    )
    assert row["failed"] == row["cost_search_failed"] / row["cost_search_calls"]
    assert re.search(r"\| failed +[1-4]\d% \|", capsys.readouterr().out)


@pytest.mark.quick
def test_failures_of_pages_never_stop_a_run_and_a_replay_never_stops(tmp_path):
    row = {
        "cost_page_calls": 9,
        "cost_page_failed": 9,
        "cost_search_calls": 9,
        "cost_search_failed": 4,
    }
    train.raise_if_down(CONFIG, row)
    with pytest.raises(train.RunStopped):
        train.raise_if_down(CONFIG, row | {"cost_search_failed": 5})
    train.raise_if_down(replace(CONFIG, cassette_mode="replay"), row | {"cost_search_failed": 5})


@pytest.mark.quick
def test_a_reader_that_dies_stops_the_run(tmp_path, monkeypatch, capsys):
    with World() as server:
        readers = ["--reader=openai", f"--reader_url={server.url}/reader", "--reader_model=m"]
        real = train.evaluate
        monkeypatch.setattr(train, "evaluate", lambda *given: die() or real(*given))

        def die():
            server.fails = lambda role, number: role == "reader"

        code = train.main(training(server, tmp_path, *readers, "--eval_questions=20", "--steps=1"))
    assert code == 3 and "calls to the reader service failed" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_stop_and_go_on_together(tmp_path):
    def run(*more: str) -> str:
        done = processes.run("train.py", *more, ranks=2)
        return done.stdout + done.stderr

    with World(lambda role, number: True) as server:
        said = run(*training(server, tmp_path))
        assert (
            said.count("the search service at") == 1
            and "exitcode  : 2" in said
            and "Preset" not in said
        )
        # Two trials, the first measurement, and not much more.
        server.fails = lambda role, number: number > 12
        said = run(*training(server, tmp_path))
        assert said.count("calls to the search service failed") == 1 and "exitcode  : 3" in said
        server.fails = lambda role, number: False
        assert "held-out questions went from" in run(f"--resume={tmp_path / 'run'}")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3]


# --- evaluations


def evaluate(server: Server, folder: Path, *more: str) -> int:
    given = arguments(
        server,
        folder,
        f"--model={corpus.MODEL_DIR}",
        "--eval_temperature=0",
        f"--run_dir={folder / 'run'}",
        *more,
    )
    return evaluation.main(given)


def table(folder: Path) -> dict[str, list[str]]:
    summary = json.loads((folder / "run/summary.json").read_text())
    return {row[0]: row[1:] for row in summary["table"]}


def answers(folder: Path) -> dict[str, str | None]:
    rows = report.read_json_lines(folder / "run/trajectories/eval.jsonl")
    return {row["id"]: row["answer"] for row in rows}


@pytest.mark.quick
@pytest.mark.parametrize("method", ["agent", "rag"])
def test_an_evaluation_stops_when_search_dies_and_asks_again_what_it_spoilt(
    tmp_path, method, capsys
):
    with World() as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        assert evaluate(server, whole, f"--method={method}", "--limit=60") == 0
        server.calls.clear()
        server.fails = lambda role, number: number > 10
        assert evaluate(server, tmp_path, f"--method={method}", "--max_in_flight=99") == 3
        shown = capsys.readouterr().out
        assert (
            "calls to the search service failed" in shown
            and f"--resume={tmp_path / 'run'}" in shown
        )
        assert not (tmp_path / "run/summary.json").exists() and server.calls["search"] < 60
        server.fails = lambda role, number: False
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
    assert answers(tmp_path) == answers(whole) and len(answers(whole)) == 60
    one, other = table(tmp_path), table(whole)
    assert one["F1"] == other["F1"] and other["failed calls"] == ["0.0%", "0.0%"]


@pytest.mark.quick
def test_a_small_or_half_dead_evaluation(tmp_path, capsys):
    with World(lambda role, number: number > 1) as server:
        # Fewer than 50 calls, and all of them failed.
        assert evaluate(server, tmp_path, "--limit=6") == 3
        server.fails = lambda role, number: number % 3 == 0
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        spoilt = int(re.search(r"Met by a failed service, left out: (\d)", shown)[1])
        assert 0 < spoilt < 6 and table(tmp_path)["questions"] == [str(6 - spoilt)] * 2
        assert table(tmp_path)["failed calls"] != ["0.0%", "0.0%"]
        server.fails = lambda role, number: False
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        assert table(tmp_path)["questions"] == ["6", "6"]


@pytest.mark.quick
def test_a_dead_judge_makes_no_table(tmp_path, capsys):
    with World(lambda role, number: role == "judge") as server:
        judged = [f"--judge_url={server.url}/judge", "--judge_model=m", "--tool_threads=0"]
        assert evaluate(server, tmp_path, *judged) == 2
        assert "the judge service at" in capsys.readouterr().err
        server.fails = lambda role, number: role == "judge" and number > 4
        assert evaluate(server, tmp_path, *judged) == 3
        shown = capsys.readouterr().out
        assert "calls to the judge service failed" in shown and "maintenance until noon" in shown
        assert not (tmp_path / "run/summary.json").exists()
        searches = server.calls["search"]
        server.fails = lambda role, number: role == "search"  # which nobody needs any more
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        assert server.calls["search"] == searches and "MBE" in table(tmp_path)
        verdicts = server.calls["judge"]
        # Verdicts come from the cassette.
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        assert server.calls["judge"] == verdicts + 1  # the trial
