"""A run in the operating system: dealing out, checkpoints that survive kills, folders, and
what waits for Ctrl-C.

Several ranks, and kills of whole runs: test_train.py.
"""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepresearcher_min import run
from deepresearcher_min.config import ConfigError, load_config
from deepresearcher_min.run import Ranks, Stop, complete_checkpoints, open_run, save_checkpoint

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


@settings(deadline=None)  # another process may hold the core
@given(st.integers(0, 30), st.integers(1, 8))
def test_deal_gives_every_item_to_one_rank(count, world_size):
    shares = [Ranks(rank, world_size, CPU).deal(range(count)) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # What Ranks.gather does: round by round gives the original order.
    rounds = [share[i] for i in range(count) for share in shares if i < len(share)]
    assert rounds == list(range(count)) == Ranks(0, 1, CPU).gather(list(range(count)))


def test_checkpoints_are_whole_the_newest_few_and_written_once(tmp_path):
    config = replace(load_config([]), run_dir=str(tmp_path), keep_checkpoints=2)
    assert complete_checkpoints(tmp_path) == []

    def save(step, text):
        save_checkpoint(
            config, Ranks(), {"step": step}, lambda folder: (folder / "weights").write_text(text)
        )

    def fail(folder):
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    def newest():
        return complete_checkpoints(tmp_path)[-1]

    for step in (1, 2):
        save(step, "good")
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(config, Ranks(), {"step": 3}, fail)
    (tmp_path / "checkpoints/step-000009").mkdir()  # as a kill in the middle of deleting leaves one
    save(2, "a second time")
    assert json.loads((newest() / "state.json").read_text()) == {"step": 2}
    assert (newest() / "weights").read_text() == "good"
    save(3, "good")
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
    ]
    assert json.loads((newest() / "state.json").read_text()) == {"step": 3}


def test_ctrl_c_waits_for_what_would_be_spoilt_and_a_second_one_changes_nothing():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        stop, done = Stop(), []
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("update")
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        done.append("save")
        assert done == ["update", "save"]
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_run_folder_is_never_taken_twice_and_resume_finds_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path)
    with pytest.raises(ConfigError, match="there is no run under runs/ yet"):
        open_run(["--resume"])
    with pytest.raises(ConfigError, match="there is no run with"):
        open_run([f"--resume={tmp_path / 'none'}"])
    config = open_run(["--seed=3"])
    assert config.run_dir.startswith(f"{tmp_path}/toy-20") and len(config.date) == len("2026-01-31")
    for age, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"preset: toy\nseed: {age}\nsteps: 7\n")
        (tmp_path / name / "metrics.jsonl").touch()
        os.utime(tmp_path / name / "metrics.jsonl", (age, age))
    with pytest.raises(ConfigError, match="holds a run already"):
        open_run([f"--run_dir={tmp_path / 'old'}"])
    config = open_run(["--resume", "--steps=9"])
    assert (config.run_dir, config.resume) == (str(tmp_path / "new"),) * 2
    assert (config.seed, config.steps) == (1, 9)


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 processes for 2 GPUs: give --nproc_per_node=2"):
        run.check_needs(load_config([]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run.check_needs(load_config([]))
