"""Every bench script starts on a fresh machine, and what it needs is installed before it measures
anything.
"""

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from bench.ablate import NO_MASK, VARIANTS, fallen, moved, run

ROOT = Path(__file__).resolve().parent.parent
BENCHES = sorted((ROOT / "bench").glob("*.py"))
OWN = {"deepresearcher_min", "scripts", "train", "eval", *(path.stem for path in BENCHES)}
PEERS = {"trl", "datasets"}  # in the environment of update.py's own
OPTIONAL = {"vllm"}  # on GPUs


def imported(path: Path) -> set[str]:
    """Names of all packages that a script imports anywhere, its functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found - OWN - PEERS - OPTIONAL


HELP = """
import contextlib, io, runpy, sys
from pathlib import Path

for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], str(Path(path).parent)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    print(path, said.getvalue().partition(" ")[0])
"""


def test_every_bench_says_how_it_is_called():
    """In one process, which imports torch once."""
    programs = [str(path) for path in BENCHES if "argparse" in imported(path)]
    assert len(programs) >= 6
    done = subprocess.run(
        [sys.executable, "-c", HELP, *programs], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{path} usage:" for path in programs]


@pytest.mark.by_hand
def test_benches_start_in_a_fresh_environment(tmp_path):
    """Takes about five minutes of CPU time, most of it installation."""
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh/bin/python"
    requirements = ROOT / "requirements-cpu.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    for path in BENCHES:
        modules = ", ".join(sorted(imported(path)))
        subprocess.run([python, "-c", f"import {modules}"], check=True)
        if "argparse" in modules:
            done = subprocess.run(
                [python, path, "--help"], check=True, capture_output=True, text=True
            )
            assert "usage" in done.stdout, path.name
    peers = "from pathlib import Path; import update; update.peers_python(Path(r'%s'))" % (
        tmp_path / "peers"
    )
    subprocess.run([python, "-c", peers], check=True, cwd=ROOT / "bench")


@pytest.mark.quick
def test_the_rules_by_which_a_collapse_is_dated():
    assert fallen([0.2, 0.4, 0.6, 0.5, 0.3, 0.1, 0.1]) == 6  # best mean of three: 0.5
    assert fallen([0.5, 0.5, 0.5, 0.0, 0.5, 0.1, 0.1]) == 6  # one bad step is noise
    assert fallen([0.5, 0.5, 0.5, 0.3, 0.3]) is None
    assert moved([0.0, 9.0, 0.0, -9.0, 9.0], -1.0, 1.0) == 5
    assert moved([9.0, None, 9.0, 0.0], 0.0, 1.0) is None  # nothing was measured in between


@pytest.mark.slow
def test_the_variant_without_a_mask_trains(tmp_path, monkeypatch):
    small = ["--eval_questions=4", "--questions_per_step=4", "--lr_warmup=1"]
    monkeypatch.setitem(VARIANTS, NO_MASK, [*VARIANTS[NO_MASK], *small])
    result = run(NO_MASK, 0, 1, tmp_path / "run")
    assert "error" not in result and 0 <= result["f1"] <= 1
