"""The main job on the toy web, in this process: what it leaves, that it repeats bit for bit,
resumes, and stops.
"""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import SMALL, metrics, run_small
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from deepresearcher_min.config import load_config
from deepresearcher_min.corpus import MODEL_DIR, Task
from deepresearcher_min.engine import HFEngine
from deepresearcher_min.reward import judge
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Question, Trajectory


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / f"step-{step:06d}")
    return dict(model.named_parameters())


@pytest.mark.quick
def test_a_run_folder_holds_what_it_should(two_steps):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "curve.png",
        "checkpoints",
    ):
        assert (two_steps / name).exists(), name
    summary = json.loads((two_steps / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["steps"] == 2
    assert summary["cpu_seconds"] > 0 and summary["seconds"] > 0
    for scores in (summary["before"], summary["after"]):
        assert {
            "f1",
            "em",
            "f1_1hop",
            "f1_2hop",
            "calls",
            "format_errors",
            "full_name",
        } <= scores.keys()
    rows = [json.loads(line) for line in (two_steps / "trajectories" / "step-000002.jsonl").open()]
    assert len(rows) == 16
    for row in rows:
        assert len(row["token_ids"]) == len(row["sampled_mask"])
        assert sum(row["sampled_mask"]) == len(row["logprobs"]) > 0
    text = (two_steps / "trajectories" / "step-000002.txt").read_text()
    assert "Question" in text and "Gold" in text and "<think>" in text


@pytest.mark.quick
def test_the_weights_change_and_checkpoints_are_plain_hugging_face_folders(two_steps):
    start = dict(AutoModelForCausalLM.from_pretrained(MODEL_DIR).named_parameters())
    first, second = weights(two_steps, 1), weights(two_steps, 2)
    assert start.keys() == first.keys()
    assert any(not torch.equal(start[name], first[name]) for name in start)
    assert any(not torch.equal(second[name], first[name]) for name in start)


@pytest.mark.quick
def test_an_engine_that_computes_another_model_ends_the_first_step(tmp_path, monkeypatch, capsys):
    def wrong_weights(engine, named_tensors):
        with torch.no_grad():
            for _, parameter in engine.model.named_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))

    monkeypatch.setattr(HFEngine, "update_weights", wrong_weights)
    argv = [*SMALL, "--eval_questions=1", f"--run_dir={tmp_path / 'run'}"]
    assert train.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "train.py: engine=HFEngine: its log-probabilities differ from the policy's by "
    )
    assert "limit 0.001 for dtype=float32" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_bit_for_bit(two_steps, tmp_path):
    assert run_small(tmp_path / "again") == metrics(two_steps)
    for name, tensor in weights(two_steps, 2).items():
        assert torch.equal(tensor, weights(tmp_path / "again", 2)[name])
    one, other = (
        [
            json.loads(line)["token_ids"]
            for line in (folder / "trajectories" / "step-000002.jsonl").open()
        ]
        for folder in (two_steps, tmp_path / "again")
    )
    assert one == other


@pytest.mark.slow
def test_another_seed_gives_another_run(two_steps, tmp_path):
    assert run_small(tmp_path / "other", "--seed=1") != metrics(two_steps)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(two_steps, tmp_path):
    folder = tmp_path / "resumed"
    run_small(folder, "--steps=1")
    torn = folder / "checkpoints" / ".step-000002.part"
    torn.mkdir()  # as a kill in the middle of saving leaves it
    (torn / "model.safetensors").write_bytes(b"half")
    (
        folder / "checkpoints" / "step-000009"
    ).mkdir()  # without state.json: not a complete checkpoint
    with (folder / "metrics.jsonl").open("a") as file:
        # A step whose checkpoint was never written, and a torn line.
        file.write('{"step": 2, "reward": 9}\n{"step"')
    assert train.main([f"--resume={folder}", "--steps=2"]) == 0
    assert metrics(folder) == metrics(two_steps)
    for name, tensor in weights(two_steps, 2).items():
        assert torch.equal(tensor, weights(folder, 2)[name])
    assert train.main([*SMALL, f"--run_dir={folder}"]) == 2  # a run is never overwritten


@pytest.mark.quick
def test_a_run_is_not_resumed_with_another_order_of_questions(two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "run")
    assert train.main([f"--resume={tmp_path / 'run'}", "--steps=3", "--seed=7"]) == 2
    assert "seed': 0" in (said := capsys.readouterr().err) and "seed': 7" in said


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_small(tmp_path / "run", "--steps=3", "--keep_checkpoints=2")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
    ]


@pytest.mark.quick
def test_a_budget_stops_the_run_after_saving(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train, "step_means", lambda sums: {**REAL_STEP_MEANS(sums), "cost_usd": 0.3}
    )
    assert train.main([*SMALL, f"--run_dir={tmp_path / 'run'}", "--max_cost=0.2"]) == 3
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").exists()
    assert "max_cost=0.2" in capsys.readouterr().out


REAL_STEP_MEANS = train.step_means


@pytest.mark.quick
def test_the_presets_for_files_set_questions_aside_to_be_measured_on(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"q{i}", "answers": ["a"]}) + "\n" for i in range(600))
    )
    for preset in ("wiki", "paper"):
        config = load_config([f"--preset={preset}", f"--data={file}"])
        task = train.load_task(config)
        assert 0 < len(task.held_out) == config.eval_questions
        assert not {one.id for one in task.held_out} & {one.id for one in task.questions}


@pytest.mark.quick
def test_a_step_that_lost_every_trajectory_is_written_too(tmp_path):
    lost = Trajectory(Question("q", "text", ("a",)), [1], [False], [0.0], (), None, "deadline")
    config = load_config([f"--run_dir={tmp_path / 'run'}"])
    train.write_groups(config, "eval-before", 0, [judge(lost.question, [lost], config, 0)])
    assert (tmp_path / "run/trajectories/eval-before.txt").read_text() == ""


@pytest.mark.quick
def test_what_an_evaluation_costs_counts_too(monkeypatch):
    paid = Trajectory(
        Question("q", "text", ("a",)), [1], [False], [0.0], (), None, "deadline", {"usd": 0.5}
    )
    monkeypatch.setattr(train, "evaluate", lambda *_: [paid, paid])
    state, other = {"step": 3, "usd": 1.0}, Ranks(rank=1)
    examinee = SimpleNamespace(config=load_config([]))
    train.measure("before", state, Task("", [], [paid.question]), examinee, other)
    assert state["usd"] == 2.0


@pytest.mark.quick
def test_missing_things_are_listed_at_once_and_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    started = time.monotonic()
    assert train.main(["--preset=paper"]) == 2
    message = capsys.readouterr().err
    assert time.monotonic() - started < 5
    for word in ("SERPER_API_KEY", "GPU", "--data=FILE"):
        assert word in message


@pytest.mark.quick
@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--grup_size=4", "group_size"),
        ("--preset=tyo", "toy"),
        ("--search=serpr", "serper"),
        ("--steps=many", "steps"),
        ("--group_size=1", "group_size=1"),
        ("--lr=-1", "lr=-1"),
        ("--max_turn_tokens=999", "max_model_len=768"),
        ("--updates_per_rollout=3", "questions_per_step"),
        ("steps=3", "--key=value"),
    ],
)
def test_bad_arguments_get_one_clear_line(argument, hint, capsys, tmp_path):
    assert train.main([argument]) == 2
    message = capsys.readouterr().err
    assert hint in message and len(message.splitlines()) == 1


@pytest.mark.quick
def test_eval_measures_a_run_and_answers_a_question(two_steps, tmp_path, capsys):
    assert evaluation.main([f"--model={two_steps}", f"--run_dir={tmp_path / 'eval'}"]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    after = json.loads((two_steps / "summary.json").read_text())["after"]
    assert summary["overall"]["f1"] == after["f1"] and summary["overall"]["n"] == 10
    assert set(summary["sources"]) == {"toy_1hop", "toy_2hop"}
    assert {"n", "f1", "em", "calls", "format_errors"} <= summary["sources"]["toy_1hop"].keys()
    assert "toy_2hop" in capsys.readouterr().out and (tmp_path / "eval" / "report.html").exists()
    question = (
        next(iter((tmp_path / "eval" / "trajectories").glob("*.jsonl"))).read_text().splitlines()[0]
    )
    assert (
        evaluation.main([f"--model={two_steps}", f"--question={json.loads(question)['question']}"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "<think>" in shown and "Answer:" in shown and "Gold:" in shown
    assert evaluation.main([f"--model={two_steps}", "--question", "Who was Napoleon 💡?"]) == 0


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path):
    """The control: with rewards permuted inside each group the same steps do not raise F1."""
    assert train.main([f"--run_dir={tmp_path / 'run'}", "--shuffle_rewards", "--steps=15"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["f1"] <= summary["before"]["f1"] + 0.05
