"""bench/gpu_smoke.py, which the first person with GPUs runs, works on CPUs."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# What rented machines may lack, and part one does without.
LATE = """accelerate bm25s trafilatura bs4 lxml lxml_html_clean matplotlib pypdf charset_normalizer
    webencodings cryptography ijson peft vllm tabulate""".split()  # noqa: SIM905


# gpu_smoke.py with torchrun's ranks forked from its own process, but for the first launch.
FORKED = """
import sys
sys.path[:0] = ["bench", "tests"]
import gpu_smoke, processes
real = gpu_smoke.launch
def launch(clock, ranks, *command):
    gpu_smoke.launch = forked
    return real(clock, ranks, *command)
def forked(clock, ranks, *command):
    return processes.run(*command, ranks=ranks, timeout=clock.left(), source=processes.ITSELF)
gpu_smoke.launch = launch
sys.exit(gpu_smoke.main())
"""


def smoke(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FORKED, *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900
    )


@pytest.mark.quick
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "argv", ["bench/gpu_smoke.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path("bench/gpu_smoke.py", run_name="__main__")
    assert "needs a CUDA GPU" in capsys.readouterr().out


@pytest.mark.quick
def test_the_computed_memory_is_that_of_the_document(monkeypatch):
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "bench" / "shapes.py")
    shapes = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shapes", shapes)
    spec.loader.exec_module(shapes)
    counts = {name: shape.parameters / 1e9 for name, shape in shapes.SHAPES.items()}
    assert counts["0.5B"] == pytest.approx(0.494, abs=5e-4)
    assert counts["1.5B"] == pytest.approx(1.544, abs=5e-4)
    assert counts["7B"] == pytest.approx(7.616, abs=5e-4)
    text = (ROOT / "docs" / "memory.md").read_text()
    for name, ranks in (("0.5B", 1), ("1.5B", 1), ("1.5B", 8), ("7B", 8)):
        row = re.search(rf"^\| {name} on {ranks} \|.*$", text, re.MULTILINE)[0]
        update = float(row.split("|")[8].strip(" *"))
        found = shapes.computed(shapes.SHAPES[name], ranks, 32_768)
        assert found["peak of the update (PyTorch's own)"] == pytest.approx(update, abs=0.15), row


def test_part_one_needs_few_packages(tmp_path):
    """Neither this process nor its children can import the others."""
    blocker = f"import sys\nsys.modules.update(dict.fromkeys({LATE!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    report = tmp_path / "smoke.json"
    done = smoke("--cpu", "--part", "1", "--json", str(report), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["passed"] == found["checks"] == 11


def test_part_two_trains_and_goes_on_with_fewer_ranks(tmp_path):
    report = tmp_path / "smoke.json"
    done = smoke("--cpu", "--part", "2", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["passed"] == found["checks"] == 3
