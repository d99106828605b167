"""docs/lesson.ipynb runs and prints what is stored in it; its checks know right from wrong.

`python tests/test_lesson.py` runs it and stores its outputs again.
"""

import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from deepresearcher_min.grpo import group_advantages
from deepresearcher_min.trajectory import Question, Recording, Turn

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOK = DOCS / "lesson.ipynb"
FRACTION = re.compile(r"-?\d+\.\d+")
CURVE = re.compile(
    r"^(with|without) the mask: mean reward (\S+) in the first four steps, (\S+) in the last four; "
    r"KL (\S+)$",
    re.M,
)
sys.path.insert(0, str(DOCS))


@pytest.fixture
def checks():
    import lesson_checks

    return lesson_checks


def execute():
    """The notebook, run from a fresh kernel in its folder as Jupyter does."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = {"kernel_name": "python3", "timeout": 1200, "record_timing": False}
    NotebookClient(notebook, resources={"metadata": {"path": str(DOCS)}}, **options).execute()
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(cell):
    """What a cell shows beside text: ["image/png", "text/plain"] for a figure."""
    return [sorted(output.data) for output in cell.outputs if output.output_type != "stream"]


def curves(text):
    """name -> (reward in the first steps, in the last steps, KL)."""
    return {name: tuple(map(float, values)) for name, *values in CURVE.findall(text)}


@pytest.mark.slow
def test_it_prints_again_what_is_stored_in_it():
    stored, fresh = code_cells(nbformat.read(NOTEBOOK, as_version=4)), code_cells(execute())
    for old, new in zip(stored, fresh, strict=True):
        expected, found = printed(old), printed(new)
        assert kinds(new) == kinds(old)
        assert FRACTION.split(found) == FRACTION.split(expected)  # texts and counts
        if "draw(curves)" in old.source:
            check_trend(expected)
            check_trend(found)
            continue
        fractions = [np.array(FRACTION.findall(text), float) for text in (found, expected)]
        np.testing.assert_allclose(*fractions, rtol=0, atol=1e-3)


def check_trend(text):
    found = curves(text)
    first, last, kl = found["with"]
    assert last > first + 0.2
    if "without" in found:
        _, last_without, kl_without = found["without"]
        assert last > last_without + 0.05
        assert kl_without > 2 * kl


@pytest.mark.quick
def test_it_stays_a_lesson():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    before = None
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 15, f"cell {number} is long"
            assert before == "markdown", f"nobody introduces cell {number}"
        before = cell.cell_type
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.quick
def test_its_outputs_are_whole_and_the_same_on_every_machine():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    figures = [output.data for output in outputs if output.output_type == "display_data"]
    assert len(figures) == 3
    assert all(set(figure) == {"image/png", "text/plain"} for figure in figures)
    assert not any("execution" in cell.metadata for cell in cells)  # times
    text = "".join(map(printed, cells))
    assert not re.search(r"/(home|root|tmp|usr|work|Users)\b|0x[0-9a-f]{6}", text)
    assert [line[:19] for line in text.splitlines() if line.startswith("Exercise")] == [
        f"Exercise {number}: not yet" for number in (1, 2, 3)
    ]


def trajectory():
    """Prompt of two tokens, a turn of three, an observation of two, a turn of two."""
    record = Recording(Question("q", "Who?", ("Ada",)), [1, 2])
    first = record.append([3, 4, 5], [-0.1, -0.2, -0.3])
    record.turns.append(Turn(first, record.append([6, 7]), "", "search", "[]"))
    last = record.append([8, 9], [-0.4, -0.5])
    record.turns.append(Turn(last, (9, 9), "", "answer"))
    return record.finish("answer", "Ada")


def advantages(rewards, ddof=1):
    rewards = np.array(rewards)
    if rewards.min() == rewards.max():
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / rewards.std(ddof=ddof)


def mask(one, first=0, last=0):
    marks = [0] * len(one.token_ids)
    for turn in one.turns:
        for i in range(turn.sampled[0] + first, turn.sampled[1] + last):
            marks[i] = 1
    return marks


def loss(new, old, A, epsilon):
    ratio = np.exp(new - old)
    return -min(ratio * A, np.clip(ratio, 1 - epsilon, 1 + epsilon) * A)


def said(capsys, check, *given):
    check(*given)
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    return text


@pytest.mark.quick
def test_unsolved_exercises_are_not_yet_right_and_raise_nothing(checks, capsys):
    for solution in (lambda *given: None, lambda *given: ...):
        assert "Exercise 1: not yet" in said(capsys, checks.check_advantages, solution)
        assert "Exercise 2: not yet" in said(capsys, checks.check_mask, solution, [trajectory()])
        assert "Exercise 3: not yet" in said(capsys, checks.check_loss, solution)


@pytest.mark.quick
@pytest.mark.parametrize(
    "solution",
    [advantages, lambda rewards: list(advantages(rewards)), group_advantages],
    ids=["numpy", "list", "tensor"],
)
def test_right_advantages(checks, capsys, solution):
    assert said(capsys, checks.check_advantages, solution) == "Exercise 1: right!\n"


@pytest.mark.quick
@pytest.mark.parametrize(
    "solution, reason",
    [
        (lambda rewards: rewards, "the rewards themselves"),
        (lambda rewards: np.array(rewards) - np.mean(rewards), "not divided by the deviation"),
        (lambda rewards: advantages(rewards, ddof=0), "with G - 1"),
        (lambda rewards: (np.array(rewards) - np.mean(rewards)) / np.std(rewards, ddof=1), "be 0"),
        (lambda rewards: advantages(rewards)[:2], "there must be 4 advantages"),
        (lambda rewards: -advantages(rewards), "the advantages are"),
        (lambda rewards: rewards.mean(), "raised AttributeError"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_wrong_advantages(checks, capsys, solution, reason):
    text = said(capsys, checks.check_advantages, solution)
    assert text.startswith("Exercise 1: wrong.") and reason in text


@pytest.mark.quick
def test_right_masks(checks, capsys):
    for solution in (mask, lambda one: one.sampled_mask, lambda one: torch.tensor(mask(one))):
        text = said(capsys, checks.check_mask, solution, [trajectory()] * 2)
        assert text == "Exercise 2: right!\n"


@pytest.mark.quick
@pytest.mark.parametrize(
    "solution, reason",
    [
        (lambda one: np.ones(len(one.token_ids)), "token 0 is part of the prompt"),
        (lambda one: np.arange(len(one.token_ids)) > 1, "token 5 was observed"),
        (lambda one: mask(one, last=-1), "token 4 ends a turn"),
        (lambda one: mask(one, first=1), "token 2 was chosen"),
        (lambda one: mask(one)[:-1], "there are 9 tokens"),
        (lambda one: one.token_ids, "other values than 0 and 1"),
        (lambda one: one.sampled, "raised AttributeError"),
    ],
)
def test_wrong_masks(checks, capsys, solution, reason):
    text = said(capsys, checks.check_mask, solution, [trajectory()])
    assert text.startswith("Exercise 2: wrong.") and reason in text


@pytest.mark.quick
def test_right_losses(checks, capsys):
    def in_torch(new, old, A, epsilon):
        ratio = torch.exp(new - old)
        return -torch.min(ratio * A, ratio.clip(1 - epsilon, 1 + epsilon) * A)

    for solution in (loss, in_torch):
        assert said(capsys, checks.check_loss, solution) == "Exercise 3: right!\n"


@pytest.mark.quick
@pytest.mark.parametrize(
    "solution, reason",
    [
        (lambda new, old, A, epsilon: -loss(new, old, A, epsilon), "the sign is wrong"),
        (lambda new, old, A, epsilon: -(new - old) * A, "exp(new - old)"),
        (lambda new, old, A, epsilon: -np.exp(new - old) * A, "must be clipped: 1.2000"),
        (lambda new, old, A, epsilon: -np.clip(np.exp(new - old), 0.8, 1.2) * A, "always clip"),
        (lambda new, old, A, epsilon: [loss(new, old, A, epsilon)], "must be one number"),
        (lambda new, old, A, epsilon: 0.0, "the loss is -1.6578, not 0.0000"),
        (lambda new, old, A: 0.0, "raised TypeError"),
    ],
)
def test_wrong_losses(checks, capsys, solution, reason):
    text = said(capsys, checks.check_loss, solution)
    assert text.startswith("Exercise 3: wrong.") and reason in text


if __name__ == "__main__":
    nbformat.write(execute(), NOTEBOOK)
