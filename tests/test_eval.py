"""eval.py from start to end: stopping and resuming, the baselines, one typed question, what it
refuses.
"""

import gc
import io
import json
import logging
import re
import sys
import time
from pathlib import Path
from signal import SIGINT, raise_signal

import processes
import pytest

import eval as evaluation
from deepresearcher_min import evaluation as room
from deepresearcher_min import report
from deepresearcher_min.config import ROOT, ConfigError, load_config
from deepresearcher_min.evaluation import PlainChat, load_examination
from deepresearcher_min.protocol import ChatFormat
from deepresearcher_min.run import Ranks, check_needs

SHARED = Path(__file__).parents[2] / "shared/data"
TOY = ["--preset=toy", "--model=toy", "--limit=4"]


def rows_of(folder):
    return list(report.read_json_lines(Path(folder) / "trajectories/eval.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation of the toy's start model without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "eval"
    assert evaluation.main([*TOY, f"--run_dir={folder}"]) == 0
    return folder


@pytest.mark.quick
def test_stopped_evaluations_repeat_and_lose_nothing(whole, tmp_path, monkeypatch, capsys, caplog):
    folder, path = tmp_path / "eval", tmp_path / "eval/trajectories/eval.jsonl"
    real, written = report.write_trajectories, []

    def stop_at_the_third(*arguments):
        written.append(real(*arguments))
        if len(written) == 3:
            raise_signal(SIGINT)  # raised as an exception here, no task could catch it

    monkeypatch.setattr(report, "write_trajectories", stop_at_the_third)
    assert evaluation.main([*TOY, f"--run_dir={folder}", "--max_in_flight=2"]) == 130
    assert f"--resume={folder}" in capsys.readouterr().out and len(rows_of(folder)) == 3
    gc.collect()  # asyncio would now say what it was left with
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
    monkeypatch.setattr(report, "write_trajectories", real)
    path.write_bytes(path.read_bytes()[:-40])  # as if killed inside the last line
    assert evaluation.main([f"--resume={folder}"]) == 0
    answers = [{row["id"]: row["answer"] for row in rows_of(each)} for each in (whole, folder)]
    assert answers[0] == answers[1] and len(rows_of(folder)) == len(answers[0]) == 8
    tables = [json.loads((each / "summary.json").read_text())["table"] for each in (whole, folder)]
    assert tables[0] == tables[1]
    before = path.read_bytes()
    assert evaluation.main([f"--resume={folder}"]) == 0  # nothing is left to ask
    assert path.read_bytes() == before


@pytest.mark.slow
def test_killed_and_resumed(whole, tmp_path):
    """kill -9 in the middle, twice, and then to the end: every question once, and the answers of
    one go.
    """
    folder, path = tmp_path / "eval", tmp_path / "eval/trajectories/eval.jsonl"
    first = [*TOY, f"--run_dir={folder}", "--max_in_flight=1"]
    for arguments, enough in ((first, 2), ([f"--resume={folder}"], 5)):
        with processes.started("eval.py", *arguments):  # killed where the block ends
            limit = time.monotonic() + 300
            while time.monotonic() < limit and not (
                path.exists() and path.read_bytes().count(b"\n") >= enough
            ):
                time.sleep(0.005)
        assert enough <= len(rows_of(folder)) < 8
    assert processes.run("eval.py", f"--resume={folder}").returncode == 0
    answers = [[(row["id"], row["answer"]) for row in rows_of(each)] for each in (whole, folder)]
    assert sorted(answers[0]) == sorted(answers[1])


@pytest.mark.slow
def test_two_ranks_share_every_run(tmp_path):
    folder = tmp_path / "eval"
    words = ["--preset=toy", "--model=toy", "--limit=2", "--eval_temperature=1", "--repeats=2"]
    done = processes.run("eval.py", *words, f"--run_dir={folder}", ranks=2)
    assert done.returncode == 0, done.stderr
    files = sorted((folder / "trajectories").glob("eval*.jsonl"))
    rows = [row for file in files for row in report.read_json_lines(file)]
    keys = [(row["index"], row["id"]) for row in rows]
    assert len(keys) == len(set(keys)) == 8
    assert [path.stem for path in files] == ["eval-rank0", "eval-rank1"]


@pytest.mark.quick
def test_progress_and_budget(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    real = room.step_sums
    monkeypatch.setattr(room, "step_sums", lambda *given: real(*given) | {"cost_usd": 0.25})
    assert (
        evaluation.main(
            [*TOY, f"--run_dir={tmp_path / 'eval'}", "--max_cost=0.75", "--max_in_flight=1"]
        )
        == 3
    )
    shown = re.findall(r"agent: +\d+%.*? (\d)/8 .*?F1 ([\d.]+), \$([\d.]+)", terminal.getvalue())
    assert shown[-1][0] == "3" and shown[-1][2] == "0.75" and 0 <= float(shown[-1][1]) <= 1
    assert len(rows_of(tmp_path / "eval")) == 3


@pytest.mark.quick
def test_what_cannot_be_done_is_said(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    for arguments, words in (
        ([*TOY, "--method=rga"], "method='rga' (did you mean 'rag'?)"),
        ([*TOY, f"--run_dir={whole}"], f"holds a run already; continue it with --resume={whole}"),
        ([f"--resume={tmp_path}"], "there is no run with a config.yaml"),
        ([*TOY, "--judge_url=http://127.0.0.1:9"], "JUDGE_API_KEY is not set"),
    ):
        assert evaluation.main(arguments) == 2
        assert words in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["--resume"]) == 2
    assert "there is no evaluation under runs/" in capsys.readouterr().err


@pytest.mark.quick
def test_one_question_with_its_sources(capsys):
    (task,) = [load_examination(load_config(TOY), Ranks())]
    question = task.held_out[0]
    assert evaluation.main([*TOY, f"--question={question.text}"]) == 0
    said = capsys.readouterr().out
    assert (
        "--- turn 1: search" in said
        and f"Gold: {question.answers[0]}" in said
        and "reward " in said
    )
    assert re.search(r"Sources:\n  https://toy\.example/\w+", said)


# --- the baselines


@pytest.mark.quick
@pytest.mark.parametrize("method", ["cot", "rag"])
def test_baselines_use_no_tools(method, tmp_path, monkeypatch):
    prompts = []
    real = PlainChat.prompt_ids
    monkeypatch.setattr(
        PlainChat,
        "prompt_ids",
        lambda self, text: prompts.append(self.tokenizer.decode(ids := real(self, text))) or ids,
    )
    assert (
        evaluation.main([*TOY, f"--method={method}", f"--run_dir={tmp_path / 'eval'}", "--limit=2"])
        == 0
    )
    rows = rows_of(tmp_path / "eval")
    assert len(rows) == len(prompts) == 4
    assert {row["cost"].get("searches", 0) for row in rows} == {int(method == "rag")}
    assert all(len(row["turns"]) == 1 and not row["turns"][0]["observation"] for row in rows)
    assert all(("quick_summary" in prompt) == (method == "rag") for prompt in prompts)
    assert all(prompt.replace(" ", "").endswith("<think>") for prompt in prompts)


@pytest.mark.quick
@pytest.mark.skipif(not SHARED.exists(), reason="no shared test data")
def test_the_baselines_prompt_as_the_real_template_shows_it(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-tokenizer")
    rules = (ROOT / "prompts/baseline.txt").read_text()
    chat = PlainChat(
        ChatFormat(tokenizer, "2026-01-02", rules), {"Who?": "<|im_end|> [{'title': 'T'}]"}
    )
    text = tokenizer.decode(chat.prompt_ids("Who?"))
    assert text == (
        f"<|im_start|>system\n{rules.replace('{date}', '2026-01-02')}<|im_end|>\n"
        "<|im_start|>user\nWho?\n\n"
        "Search results: < |im_end|> [{'title': 'T'}]<|im_end|>\n<|im_start|>assistant\n<think>"
    )
    assert "Search results:" not in tokenizer.decode(chat.prompt_ids("Why?")).split("user\n")[1]


@pytest.mark.quick
def test_cot_needs_no_search(monkeypatch, tmp_path):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    arguments = ["--model=nowhere", "--dtype=float32", f"--run_dir={tmp_path / 'eval'}"]
    check_needs(evaluation.resolve([*arguments, "--method=cot"]), questions=False)
    with pytest.raises(ConfigError, match="SERPER_API_KEY"):
        check_needs(evaluation.resolve(arguments), questions=False)


@pytest.mark.quick
def test_the_toy_web_is_not_asked_questions_of_a_file(tmp_path, capsys):
    assert evaluation.main([*TOY, f"--data={tmp_path / 'mine.jsonl'}"]) == 2
    assert "the toy web does not answer it; add --search=local" in capsys.readouterr().err
