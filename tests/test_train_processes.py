"""The main job as processes: Ctrl-C, torchrun, several ranks, kills; and the whole toy run of
README.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from small_runs import SMALL, metrics

import train
from deepresearcher_min.config import ROOT

pytestmark = pytest.mark.slow


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},  # a step's line comes at once all the same
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, step: int | str = r"\d+") -> None:
    seen = ""
    for line in process.stdout:
        seen += line
        if re.match(rf"step +{step}/", line):
            return
    raise AssertionError(f"the run ended before step {step}:\n{seen}")


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(tmp_path):
    whole = [*SMALL, f"--run_dir={tmp_path / 'whole'}", "--steps=6"]
    assert processes.run("train.py", *whole, timeout=120).returncode == 0
    whole, folder = metrics(tmp_path / "whole"), tmp_path / "stopped"
    process = start(*SMALL, f"--run_dir={folder}", "--steps=6", "--save_every=100")
    wait_for_step(process, 2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 130 and f"--resume={folder}" in output and "Traceback" not in output
    )
    assert processes.run("train.py", f"--resume={folder}", timeout=120).returncode == 0
    assert metrics(folder) == whole


def torchrun(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["torchrun", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_torchrun_without_arguments_is_the_same_as_python(tmp_path):
    alone = processes.run("train.py", *SMALL, f"--run_dir={tmp_path / 'python'}")
    assert alone.returncode == 0, alone.stderr
    done = torchrun("train.py", *SMALL, f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out questions went from" in done.stdout
    assert metrics(tmp_path / "run") == metrics(tmp_path / "python")


def test_two_ranks_share_the_work_and_one_rank_can_go_on(tmp_path, two_steps):
    """The first rollout is the same trajectories as on one rank, so the first step's metrics agree
    to rounding.
    """
    folder = tmp_path / "run"
    done = torchrun("--standalone", "--nproc_per_node=2", "train.py", *SMALL, f"--run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^step +2/2", done.stdout, re.MULTILINE)) == 1  # only rank 0 prints
    alone, together = metrics(two_steps)[1], metrics(folder)[1]
    for key in ("reward", "f1", "calls", "tokens", "kl", "loss", "grad_norm", "trained_tokens"):
        assert together[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
    assert len(list((folder / "trajectories").glob("step-000002-rank*.jsonl"))) == 2
    assert train.main([f"--resume={folder}", "--steps=3"]) == 0
    assert metrics(folder)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("blow", "words"), [(signal.SIGSTOP, "rank 1 has not been heard of"), (signal.SIGKILL, "rank")]
)
def test_a_rank_that_hangs_or_dies_ends_the_job(blow, words, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [
        "torchrun",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
        *SMALL,
        "--steps=500",
        "--rank_timeout=10",
    ]
    process = subprocess.Popen(
        [*command, f"--run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for_step(process, 1)
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        ranks = {
            Path(f"/proc/{pid}/environ").read_bytes().partition(b"\0RANK=")[2][:1]: int(pid)
            for pid in workers
        }
        os.kill(ranks[b"1"], blow)
        struck = time.monotonic()
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0 and time.monotonic() - struck < 60
        assert words in output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_run_of_one_rank_goes_on_with_two_and_through_vllm_which_then_loads_what_it_exported(
    tmp_path, two_steps
):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    goes_on = ["train.py", f"--resume={folder}", "--engine=vllm", "--steps=3"]
    done = processes.run(*goes_on, ranks=2, imports="vllm")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(folder)
    assert rows[-1]["step"] == 3 and rows[-1]["mismatch"] < 1e-4 and rows[:-1] == metrics(two_steps)
    measures = ["eval.py", f"--model={folder}", "--engine=vllm", f"--run_dir={tmp_path / 'eval'}"]
    done = processes.run(*measures, ranks=2, imports="vllm")
    assert done.returncode == 0, done.stdout + done.stderr
    exported, engine = (
        json.loads((f / "summary.json").read_text()) for f in (tmp_path / "eval", folder)
    )
    # Rounding may turn one of ten.
    assert exported["overall"]["f1"] == pytest.approx(engine["after"]["f1"], abs=0.11)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_end():
    """Four blows here; `python bench/kill.py` deals 20."""
    command = [sys.executable, "bench/kill.py", "--kills=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_main_job_learns_the_toy_web(tmp_path):
    """README's promise: greedy F1 on held-out questions from at most 0.45 to at least 0.95, two
    hops to 0.90.
    """
    done = torchrun("--standalone", "train.py", f"--run_dir={tmp_path / 'run'}", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["n"] == after["n"] == 200
    assert before["f1"] <= 0.45 and before["f1_2hop"] <= 0.20 and before["format_errors"] <= 0.10
    assert after["f1"] >= 0.95 and after["f1_2hop"] >= 0.90
