"""What users get wrong, as they meet it: whole processes, several ranks, consoles without UTF-8."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from bad_inputs import LOCAL, arguments
from small_runs import SMALL

import eval as evaluation
import train
from deepresearcher_min import search
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


REAL = {"train.py": RUNS["train.py"][0], "eval.py": RUNS["eval.py"][0]}  # not forked


@pytest.mark.parametrize(
    ("program", "base"), [(program, base) for program, each in RUNS.items() for base in each]
)
def test_the_line_is_all_that_a_person_sees(program, base, place, nothing_begun):
    words = arguments(base, "--seed=1", place)
    if base == REAL[program]:
        command = [sys.executable, str(ROOT / program), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    else:
        done = processes.run(program, *words, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("\n") == 1 and said.startswith(program), said


def test_several_ranks_say_it_once_and_end_soon(place, nothing_begun):
    processes.start_server()
    for words in (["--model={}/mistyped"], ["--model={}/m_weights_torn"], ["--steps=many"]):
        started = time.monotonic()
        given = arguments(LOCAL, " ".join(words), place)
        done = processes.run("train.py", *given, ranks=2, timeout=120)
        assert done.returncode != 0 and time.monotonic() - started < 90
        assert (done.stdout + done.stderr).count("train.py: ") == 1, done.stderr


ENCODINGS = ["ascii", "cp1252", "cp932", "utf-16"]
PROGRAMS = """
import os, sys
import eval, train
folder, *encodings = sys.argv[1:]
for encoding in encodings:
    for program, words in ((train, {small}), (eval, {toy})):
        name = program.__name__
        said = os.open(f"{{folder}}/{{encoding}}-{{name}}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding)  # strict, as PYTHONIOENCODING is
        assert program.main([*words, f"--run_dir={{folder}}/{{encoding}}/{{name}}"]) == 0
        sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def consoles(tmp_path_factory) -> Path:
    """The folder of what both programs say on consoles of each encoding, ENCODING-PROGRAM, and of
    their runs; one interpreter, whose files have no UTF-8 by default.
    """
    folder = tmp_path_factory.mktemp("consoles")
    toy = ["--preset=toy", "--model=toy", "--limit=2"]
    script = PROGRAMS.format(small=[*SMALL, "--steps=1"], toy=toy)
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", script, str(folder), *ENCODINGS]
    given = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=given, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_console_ends_a_run(encoding, consoles):
    said = (consoles / f"{encoding}-train").read_bytes().decode(encoding)
    assert "held-out questions went from" in said
    assert "bootstraps" in (consoles / f"{encoding}-eval").read_bytes().decode(encoding)
    assert "–" in (consoles / encoding / "eval/results.md").read_text(encoding="utf-8")


def test_the_corrected_command_starts_and_dies_of_nothing_late(
    place, tmp_path, monkeypatch, capsys
):
    """Sampling values that contradict each other, a home that cannot be written, ~ in a path, a
    long context.
    """
    model = shutil.copytree(place / "m", tmp_path / "m")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(
        json.dumps({**settings, "temperature": 0.6, "top_k": 3})
    )
    monkeypatch.setattr(search, "CACHE", place / "file" / "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = arguments(LOCAL, f"--run_dir={tmp_path}/run", place)
    words += [
        "--model=~/m",
        "--steps=1",
        "--max_turn_tokens=8",
        "--max_model_len=2000",
        "--limit=3",
        "--search_url=http://x",
    ]
    assert train.main([*words, "--data=~/none.jsonl"]) == 2
    assert train.main(words) == 0
    said = capsys.readouterr().out
    assert "max_model_len=2000 is above the model's own limit of 1024 tokens" in said
    assert "Without effect on this run: limit, search_url.\n" in said
    saved = tmp_path / "run/checkpoints/step-000001"
    exported = json.loads((saved / "generation_config.json").read_text())
    assert exported["eos_token_id"] == settings["eos_token_id"] and "temperature" not in exported
    assert evaluation.main([*words, f"--run_dir={tmp_path}/eval"]) == 0
    assert "Without effect on this run: steps, search_url.\n" in capsys.readouterr().out

    for name, content, words in (  # what is broken in the run folder, when it is to go on
        ("state.json", "{", "delete this checkpoint"),
        ("state/.metadata", "", "delete this checkpoint"),
    ):
        whole = (saved / name).read_bytes()
        (saved / name).write_text(content)
        assert train.main([f"--resume={tmp_path}/run", "--steps=2"]) == 2
        said = capsys.readouterr()
        assert (
            not said.out
            and said.err.startswith(f"train.py: resume='{saved}'")
            and words in said.err
        )
        (saved / name).write_bytes(whole)
    assert train.main([f"--resume={tmp_path}/run", "--steps=2"]) == 0
