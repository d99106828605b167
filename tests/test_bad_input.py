"""What users get wrong: each mistake ends train.py and eval.py with exit code 2, one line, and
nothing begun.

The tables hold the mistake, and words that must stand in the line; {} is the folder of
bad_inputs.make().
"""

import re
import sys
from pathlib import Path

import pytest
from bad_inputs import LOCAL, arguments
from small_runs import SMALL

import eval as evaluation
import train
from deepresearcher_min.config import ROOT, TYPES

pytestmark = pytest.mark.quick
LIVE = (
    "--preset=wiki --model={}/m --data={}/q.jsonl --max_model_len=1000 --eval_questions=1 "
    "--search=wikipedia --threads=1"
)
VALUES = [  # for both programs
    ("--stepps=1", "unknown key 'stepps' (did you mean 'steps'?)"),
    ("--steps=many", "steps='many': not a whole number"),
    ("--steps=1.5", "steps='1.5': not a whole number"),
    ("--steps", "--steps needs a value"),
    ("-v", "cannot read the argument '-v': write --key=value"),
    ("--lr=quick", "lr='quick': not a number"),
    ("--lr=nan", "lr=nan"),
    ("--lr=-1", "lr=-1.0: must be greater than 0"),
    ("--threads=100000", "threads=100000: must be at most 1024"),
    ("--seed=99999999999999999999", "seed=99999999999999999999: must be at most 2147483647"),
    ("--tool_timeout=1e300", "tool_timeout=1e+300: must be at most"),
    ("--max_in_flight=9999999", "max_in_flight=9999999: must be at most 65536"),
    ("--engine_memory=60", "engine_memory=60.0: must be at most 1"),
    ("--adam_beta2=1", "adam_beta2=1.0: must be at most 0.999999"),
    ("--engine=vlm", "engine='vlm' (did you mean 'vllm'?)"),
    ("--dtype=float64", "dtype='float64'", "allowed: float32, bfloat16"),
    ("--search=", "search=''", "allowed: serper"),
    ("--lr_decay=maybe", "lr_decay='maybe': true or false"),
    ("--max_turn_tokens=9999", "max_turn_tokens=9999: must be less than max_model_len"),
    ("--model={}/mistyped", "model='{}/mistyped'", "there is no such folder"),
    ("--model=~/mistyped", f"model='{Path.home()}/mistyped'", "there is no such folder"),
    (
        "--model=someone/no-such-model",
        "model='someone/no-such-model'",
        "the hub cannot give it",
        "--model=DIR",
    ),
    ("--model={}/file", "model='{}/file'", "no config.json"),
    ("--model={}/loop", "model='{}/loop'"),
    ("--model=" + "x" * 300, "the maximum length is 96"),
    ("--model=a\0b", "--model='a\\x00b': holds characters that are not UTF-8"),
    ("--model=a\udcffb", "--model='a\\udcffb': holds characters that are not UTF-8"),
    ("--corpus={}/none.jsonl", "corpus='{}/none.jsonl'"),
    ("--corpus={}/folder", "corpus='{}/folder'"),
    ("--corpus=", "corpus=''", "needs a corpus.jsonl"),
    ("--corpus={}/empty.jsonl", "corpus='{}/empty.jsonl'", "no documents"),
    ("--corpus={}/c_keys.jsonl", "corpus='{}/c_keys.jsonl': line 1", "title, url"),
    ("--corpus={}/c_latin.jsonl", "corpus='{}/c_latin.jsonl': line 1", "utf-8"),
    ("--corpus={}/c_text.jsonl", "corpus='{}/c_text.jsonl': line 1"),
    ("--corpus={}/c_nested.jsonl", "corpus='{}/c_nested.jsonl'", "RecursionError"),
    ("--data={}/none.jsonl", "data='{}/none.jsonl'", "must be an existing file"),
    ("--data={}/folder", "data='{}/folder'", "must be an existing file"),
    ("--data={}/file", "data='{}/file'", "ends in .parquet or .jsonl"),
    ("--data={}/empty.jsonl", "data='{}/empty.jsonl'", "there are no questions in it"),
    ("--data={}/blank.jsonl", "data='{}/blank.jsonl'", "there are no questions in it"),
    ("--data={}/torn.jsonl", "data='{}/torn.jsonl'", "line 2", "not JSON"),
    ("--data={}/list.jsonl", "data='{}/list.jsonl'", "line 1"),
    ("--data={}/latin.jsonl", "data='{}/latin.jsonl'", "line 1"),
    ("--data={}/keys.jsonl", "data='{}/keys.jsonl'", "line 1"),
    ("--data={}/no_answer.jsonl", "data='{}/no_answer.jsonl'", "line 1"),
    ("--data={}/text.parquet", "data='{}/text.parquet'"),
    ("--data={}/empty.parquet", "data='{}/empty.parquet'"),
    ("--data={}/cut.parquet", "data='{}/cut.parquet'"),
    ("--data=" + "x" * 300 + ".jsonl", "data='xxx"),
    ("--system_prompt_file={}/none.txt", "system_prompt_file='{}/none.txt'", "No such file"),
    ("--system_prompt_file={}/folder", "system_prompt_file='{}/folder'", "Is a directory"),
    ("--system_prompt_file={}/empty", "system_prompt_file='{}/empty'", "no text in it"),
    (
        "--system_prompt_file={}/prompt_latin.txt",
        "system_prompt_file='{}/prompt_latin.txt'",
        "utf-8",
    ),
    ("--max_model_len=5 --max_turn_tokens=4", "max_model_len=5: the prompt alone has"),
    ("--run_dir={}/file/run", "run_dir='{}/file/run'", "--run_dir=DIR"),
    ("--run_dir={}/file", "run_dir='{}/file'", "--run_dir=DIR"),
    ("--run_dir=/proc/none/run", "run_dir='/proc/none/run'", "--run_dir=DIR"),
    ("--run_dir={}/" + "x" * 300, "File name too long", "--run_dir=DIR"),
    ("--reader=openai", "reader='openai': needs reader_url and reader_model"),
    ("--reader_url=localhost:8000", "reader_url='localhost:8000': must begin with http"),
    ("--cassette={}/new.sqlite", "cassette='{}/new.sqlite': this run does not read it"),
    ("--search=serper", "SERPER_API_KEY is not set"),
    ("--search=searxng", "search_url=''"),
    ("--resume={}/none", "resume='{}/none': there is no run"),
    ("--resume={}/file", "resume='{}/file': there is no run"),
    ("--resume={}/r_folder", "resume='{}/r_folder': there is no run"),
    *(
        (f"--resume={{}}/{name}", f"resume='{{}}/{name}'", words)
        for name, words in {
            "r_yaml": "expected",
            "r_list": "no `key: value` lines",
            "r_latin": "utf-8",
            "r_empty": "no `key: value` lines",
            "r_key": "unknown key 'sed' (did you mean 'seed'?)",
            "r_number": "unknown key '7'",
        }.items()
    ),
    ("--resume={}/r_value", "steps='many': not a whole number"),
    ("--resume={}/r_nested", "steps=[1]: not a whole number"),
    ("--resume={}/r_fraction", "steps=1.5: not a whole number"),
]
MODELS = {  # for both programs: what is said of a model folder that bad_inputs.py has broken
    "m_no_config": "no config.json",
    "m_config_torn": "JSON",
    "m_config_list": "",
    "m_config_empty": "JSON",
    "m_config_latin": "JSON",
    "m_unknown_type": "nonesuch",
    "m_no_decoder": "",
    "m_no_weights": "model.safetensors",
    "m_weights_torn": "",
    "m_weights_empty": "",
    "m_weights_pointer": "",
    "m_other_shape": "have other shapes than the model",
    "m_more_layers": "weights are missing",
    "m_no_tokenizer": "tokenizer",
    "m_tokenizer_torn": "",
    "m_tokenizer_other": "",
    "m_tokenizer_config_torn": "",
    "m_no_template": "no chat template",
    "m_template_syntax": "template refuses",
    "m_template_raises": "no system words",
    "m_template_undefined": "template refuses",
    "m_template_types": "template refuses",
    "m_small_vocabulary": "40",
    "m_nested": "weights are missing",
}
LIVE_VALUES = [
    ("--cassette={}/cassette_text", "cassette='{}/cassette_text'", "database"),
    ("--cassette={}/cassette_other", "cassette='{}/cassette_other'"),
    ("--cassette={}/folder", "cassette='{}/folder'"),
    ("--cassette={}/file/c", "cassette='{}/file/c'"),
    ("--cassette={}/none --cassette_mode=replay", "cassette='{}/none'", "needs a recording"),
    ("--search_url=ftp://example.org", "search_url='ftp://example.org'"),
]
TRAIN = [
    ("--data=", "data is empty"),
    ("--eval_questions=2", "eval_questions=2"),
    ("--eval_data={}/none.jsonl", "eval_data='{}/none.jsonl'"),
    ("--eval_data={}/latin.jsonl", "eval_data='{}/latin.jsonl'"),
    ("--group_size=1", "group_size=1"),
    ("--updates_per_rollout=3", "updates_per_rollout=3: must divide questions_per_step=8"),
    ("--question=Who?", "question='Who?'", "eval.py"),
    ("--offload_optimizer", "offload_optimizer=true needs FSDP"),
    ("--dtype=bfloat16", "there is no CUDA GPU"),
    ("--keep_checkpoints=99999999", "keep_checkpoints=99999999", "GB free"),
]
EVAL = [
    ("--method=rga", "method='rga' (did you mean 'rag'?)"),
    ("--limit=all", "limit='all': not a whole number"),
    ("--judge_url=http://127.0.0.1:9", "JUDGE_API_KEY is not set"),
    (
        "--eval_data={}/q.jsonl",
        "eval_data='{}/q.jsonl': this run does not read it",
        "q.jsonl' is read instead",
    ),
    ("--judge_url=localhost", "judge_url='localhost': must begin with http"),
    *(
        (f"--model={{}}/{name}", words)
        for name, words in {
            "r_yaml": "model='{}/r_yaml'",
            "r_list": "model='{}/r_list'",
            "r_latin": "model='{}/r_latin'",
            "r_key": "unknown key 'sed'",
            "r_value": "steps='many'",
        }.items()
    ),
]
TOY = [
    (
        "--data={}/q.jsonl",
        "data='{}/q.jsonl': ",
        "the toy web does not answer it; add --search=local",
    ),
    ("--data={}/none.jsonl", "data='{}/none.jsonl': ", "the toy web does not answer it"),
    ("--eval_data={}/q.jsonl", "eval_data='{}/q.jsonl': ", "the toy web does not answer it"),
    ("--corpus={}/c.jsonl", "corpus='{}/c.jsonl': ", "the toy web has its own pages"),
    ("--cassette={}/c.sqlite", "cassette='{}/c.sqlite': ", "search=toy opens no web"),
    ("--system_prompt_file={}/none.txt", "system_prompt_file='{}/none.txt'"),
    ("--run_dir={}/file/run", "run_dir='{}/file/run'"),
]
SHARED = [(LOCAL, *case) for case in VALUES] + [(LIVE, *case) for case in LIVE_VALUES]
SHARED += [
    (LOCAL, f"--model={{}}/{name}", f"model='{{}}/{name}'", words) for name, words in MODELS.items()
]
TABLES = {
    train: SHARED + [(LOCAL, *case) for case in TRAIN] + [("", *case) for case in TOY],
    evaluation: SHARED
    + [(LOCAL, *case) for case in EVAL]
    + [("--preset=toy --model=toy", *case) for case in TOY],
}
CASES = [(program, *case) for program, cases in TABLES.items() for case in cases]


@pytest.mark.parametrize(
    ("program", "base", "extra", "words"),
    [(program, base, extra, words) for program, base, extra, *words in CASES],
    ids=[f"{program.__name__} {extra[:60]!a}" for program, _, extra, *_ in CASES],
)
def test_a_mistake_is_one_line_that_names_it(
    program, base, extra, words, place, nothing_begun, capfd
):
    assert program.main(arguments(base, extra, place)) == 2
    said = capfd.readouterr()
    line = said.out + said.err
    assert (
        line.count("\n") == 1 and line.startswith(f"{program.__name__}.py: ") and len(line) < 1200
    ), line
    for word in words:
        assert word.replace("{}", str(place)) in line


def test_the_tables_are_long():
    assert all(len(cases) >= 60 for cases in TABLES.values())


def test_help_shows_every_key_with_its_default_and_meaning(capsys):
    for program, word in ((train, "--help"), (train, "-h"), (evaluation, "--help")):
        assert program.main(["--steps=2", word]) == 0
        said = capsys.readouterr()
        lines = [
            line for line in said.out.partition("Keys,")[2].splitlines() if line.startswith("--")
        ]
        assert {line[2:].partition("=")[0] for line in lines} == TYPES.keys() and len(lines) == len(
            TYPES
        )
        assert all(len(line.split(maxsplit=1)[1]) > 5 for line in lines) and not said.err
        assert "--group_size=16 " in said.out and "\nGRPO, train.py only:\n" in said.out


def test_a_package_that_is_needed_at_the_end_is_missed_at_the_start(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train.main([*SMALL, f"--run_dir={tmp_path}/run"]) == 2
    assert (
        "matplotlib.figure cannot be imported" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


def test_every_text_file_is_utf8_whatever_the_machine_says():
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "deepresearcher_min").glob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
    ]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for call in re.findall(r"\.(?:read_text|write_text)\((?:[^()]|\([^()]*\))*\)", text):
            assert "utf-8" in call, f"{file.name}: {call}"
