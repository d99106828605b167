"""What users get wrong, as they meet it: whole processes, several ranks, consoles without UTF-8."""

import os
import subprocess
import sys
import time

import pytest
from bad_inputs import LOCAL, arguments
from small_runs import SMALL

from deepresearcher_min.config import ROOT

pytestmark = pytest.mark.slow
RUNS = {  # as a person meets them
    "train.py": [
        f"{LOCAL} --model={{}}/mistyped",
        f"{LOCAL} --model={{}}/m_template_raises",
        f"{LOCAL} --model={{}}/m_weights_torn",
        f"{LOCAL} --system_prompt_file={{}}/none.txt",
        "--data={}/q.jsonl",
    ],
    "eval.py": [
        f"{LOCAL} --model={{}}/mistyped",
        f"{LOCAL} --model={{}}/m_tokenizer_torn",
        f"{LOCAL} --model={{}}/m_other_shape",
        f"{LOCAL} --data={{}}/latin.jsonl",
        "--resume={}/r_yaml",
    ],
}


def run(program: str, words: list[str], **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / program), *words]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize(
    ("program", "base"), [(program, base) for program, each in RUNS.items() for base in each]
)
def test_the_line_is_all_that_a_person_sees(program, base, place, nothing_begun):
    done = run(program, arguments(base, "--seed=1", place))
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count(b"\n") == 1 and said.startswith(program.encode()), (
        said.decode()
    )


def test_several_ranks_say_it_once_and_end_soon(place, nothing_begun):
    for words in (["--model={}/mistyped"], ["--model={}/m_weights_torn"], ["--steps=many"]):
        options = ["--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            *arguments(LOCAL, " ".join(words), place),
        ]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and time.monotonic() - started < 90
        assert (done.stdout + done.stderr).count("train.py: ") == 1, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "utf-16"])
def test_no_console_ends_a_run(encoding, place, tmp_path):
    small = [*SMALL, "--steps=1", f"--run_dir={tmp_path}/run"]
    done = run("train.py", small, PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0 and "held-out questions went from" in done.stdout.decode(
        encoding
    ), done.stderr
    words = ["--preset=toy", "--model=toy", "--limit=2", f"--run_dir={tmp_path}/eval"]
    done = run("eval.py", words, PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0 and "bootstraps" in done.stdout.decode(encoding), done.stderr
    assert "–" in (tmp_path / "eval/results.md").read_text(encoding="utf-8")
