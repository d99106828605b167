"""scripts/real_model.py on made-up runs, and the experiment of docs/real_model.md in small: a cold
start of two random-weight layers, and two steps of GRPO from it.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as evaluate
import train
from deepresearcher_min.config import TYPES, check_inputs, load_config
from scripts import cold_start, question_sets, real_model
from scripts.cold_start import Recipe
from scripts.real_model import behaviour, holds, paired_interval
from tests.scripted import TEMPLATE

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG"


def observed(kind: str, text: str, observation: str) -> dict:
    return {"kind": kind, "text": text, "observation": observation}


def search(query: str, summary: str) -> dict:
    found = {"quick_summary": summary, "title": "Aare (1)", "url": "passage:1"}
    shown = str([{"search_query": query, "web_page_info_list": [found]}])
    return observed("search", f'x</think><tool_call>web_search{{"query": ["{query}"]}}', shown)


PAGE = observed("browse", "y</think>", str([{"information": [], "url": "passage:1"}]) + " 288 km")
END = observed("answer", "z</think><answer>288 km</answer>", "")


def row(name: str, answer: str | None, *turns: dict) -> dict:
    question = {"id": name, "question": "How long is the Aare?", "answers": ["288 km"]}
    return question | {"answer": answer, "index": 0, "turns": turns, "token_ids": [1, 2, 3]}


@pytest.mark.quick
def test_an_answer_is_shown_where_its_words_stand_in_order():
    assert holds("It is 288 KM long.", ["300", "288 km"])
    assert not holds("It is 1288 km long.", ["288 km"])
    assert not holds("km 288", ["288 km"]) and not holds("a", ["the"])


@pytest.mark.quick
def test_what_a_trajectory_did():
    seen = behaviour(row("1", "288", search("aare", "It is long."), PAGE, END), ["Aare (1)"])
    assert seen["opens"] is True and "opens_needlessly" not in seen
    assert seen["covered"] == 0.5 and seen["found"] and seen["shown"]
    assert seen["f1_found"] == seen["f1_shown"] == pytest.approx(2 / 3)
    seen = behaviour(row("1", "288 km", search("long aare", "It has 288 km."), END), ["Reuss"])
    assert seen["opens_needlessly"] is False and "opens" not in seen
    assert seen["covered"] == 1.0 and not seen["found"] and "f1_found" not in seen
    seen = behaviour(row("1", None, observed("malformed", "a", "")), ["Aare (1)"])
    assert seen == {"f1": 0.0, "found": False, "shown": False}


@pytest.mark.quick
def test_the_interval_is_that_of_paired_questions():
    rng = np.random.default_rng(1)
    before = rng.random(200)
    low, high = paired_interval(before + 0.1, before)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    noise = rng.normal(0, 0.2, 200)
    low, high = paired_interval(before + noise, before)
    half = 1.96 * noise.std() / np.sqrt(200)
    assert low == pytest.approx(noise.mean() - half, abs=0.004)
    assert high == pytest.approx(noise.mean() + half, abs=0.004)


def write_run(folder: Path, steps: int, answers: dict[str, str | None]) -> None:
    lines = [{"step": n, "reward": 0.1 * n} for n in range(1, steps + 1)]
    if "imitation" not in folder.name:  # which samples nothing
        lines = [line | {"f1": 0.5, "calls": 1.5, "tied": 0.25} for line in lines]
    (folder / "greedy" / "trajectories").mkdir(parents=True)
    if steps:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    else:
        (folder / "cold_start.jsonl").write_text('{"finished": 1}')
    known = [row(name, one, search("aare", "288 km"), END) for name, one in answers.items()]
    again = row("a", "nothing", search("aare", "288 km"), END)  # asked twice: the last counts
    (folder / "greedy" / "trajectories" / "eval.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [again, *known])
    )
    overall = dict.fromkeys(real_model.SCORES, 0.5)
    (folder / "greedy" / "summary.json").write_text(json.dumps({"overall": overall}))


@pytest.mark.quick
def test_runs_are_collected_drawn_and_compared(tmp_path, capsys):
    asked = [
        {"id": name, "question": "How long is the Aare?", "answers": ["288 km"]} for name in "ab"
    ]
    for line in asked:
        line["gold_titles"] = ["Aare (1)"]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    write_run(tmp_path / "runs" / "cold", 0, {"a": None, "b": "288 km"})
    write_run(tmp_path / "runs" / "grpo_0", 3, {"a": "288 km", "b": "288 km"})
    write_run(tmp_path / "runs" / "grpo_1", 3, {"a": None, "b": "288 km"})
    write_run(tmp_path / "runs" / "imitation_0", 3, {"a": None, "b": None})
    out = tmp_path / "docs" / "runs"
    folders = [str(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    questions = f"--questions={tmp_path}/held_out.jsonl"
    real_model.main(["collect", f"--out={out}", questions, *folders])
    kept = json.loads((out / "grpo_0" / "greedy" / "summary.json").read_text())
    assert kept["f1_by_question"] == {"a": 1.0, "b": 1.0} and kept["tokens"] == 3
    assert kept["behaviours"]["found"] == 1.0 and kept["behaviours"]["f1_shown"] == 1.0
    assert (out / "grpo_1" / "metrics.jsonl").is_file()
    assert not (out / "cold" / "metrics.jsonl").exists()
    assert (out / "cold" / "cold_start.jsonl").is_file()
    capsys.readouterr()
    real_model.main(["draw", str(out)])
    assert (tmp_path / "docs" / "real_model.png").read_bytes().startswith(PNG)
    lines = {line[:9].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "0.500" in lines["cold"] and "1.000" in lines["grpo_0"]
    assert "0.750" in lines["all grpo"] and "+0.250" in lines["all grpo"]
    assert "+0.000 to +0.500" in lines["all grpo"]  # a question is better in one of two runs
    assert lines["all grpo"].endswith("0.25")  # tied groups, in training
    assert "+0.750" in lines["grpo - im"] and "+0.500 to +1.000" in lines["grpo - im"]
    (tmp_path / "held_out.jsonl").write_text(json.dumps(asked[0]) + "\n")
    with pytest.raises(SystemExit, match="question b is not in --questions"):
        real_model.main(["collect", f"--out={out}", questions, *folders])
    with pytest.raises(SystemExit, match="runs holds no evaluation that is complete"):
        real_model.main(["collect", f"--out={out}", questions, str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="have the same name"):
        real_model.main(["collect", f"--out={out}", questions, folders[0], folders[0]])
    with pytest.raises(SystemExit, match="would be overwritten"):
        real_model.main(["collect", f"--out={tmp_path / 'runs'}", questions, folders[0]])
    with pytest.raises(SystemExit, match="is not what `collect` writes"):
        real_model.main(["draw", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match=r"questions=.*nothing\.jsonl"):
        missing = f"--questions={tmp_path}/nothing.jsonl"
        real_model.main(["collect", f"--out={out}", missing, *folders])
    del kept["f1_by_question"]["b"]
    (out / "grpo_0" / "greedy" / "summary.json").write_text(json.dumps(kept))
    (out / "empty" / "empty").mkdir(parents=True)
    for folder, said in ((out, "not asked the same questions"), (out / "empty", "holds no run")):
        with pytest.raises(SystemExit):
            real_model.main(["draw", str(folder)])
        assert said in capsys.readouterr().err


@pytest.mark.quick
def test_the_documents_curve_is_drawn_from_its_runs(tmp_path):
    """Of those that were made."""
    folder = ROOT / "docs" / "runs"
    runs = real_model.read_runs(folder) if folder.is_dir() else {}
    for name, run in runs.items():
        assert name == "cold" or [line["step"] for line in run["steps"]], name
    if runs:
        real_model.draw(runs, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
        assert len(real_model.table(runs)) > 1


# --- the experiment in small


PLACES = ["Aare", "Bern", "Chur", "Davos", "Ems", "Flims", "Genf", "Horgen"]


def write_questions(folder: Path) -> None:
    """A corpus of one sentence a page, and two questions about each; made into sets."""
    pages, asked = [], []
    for number, place in enumerate(PLACES):
        length = 20 + number
        pages.append(
            {"title": place, "text": f"The town {place} has {length} mills and one old lake."}
        )
        for text in (f"How many mills has {place}?", f"Count the mills of town {place}."):
            asked.append({"question": text, "answers": [str(length)], "gold_titles": [place]})
    for name, rows in (("pages", pages), ("asked", asked)):
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder / f"{name}.jsonl").write_text(text)
    question_sets.main(
        [
            f"--out={folder}",
            "--held_out=.3",
            "--seed=3",
            "--short_addresses",
            f"{folder}/pages.jsonl",
            f"{folder}/asked.jsonl",
        ]
    )


def write_model(folder: Path, texts: list[str]) -> None:
    """Two layers of random weights in SmolLM2's form, and a tokenizer for these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|tool|>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(whole), max_position_embeddings=8192, **size, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    whole.save_pretrained(folder)


def test_the_experiment_in_small(tmp_path):
    """Sets, cold start, two steps, an evaluation, and what is collected of them."""
    write_questions(tmp_path)
    turns = [
        "I search." + cold_start.search_call("mills aare"),
        "I open it." + cold_start.open_call("passage:1"),
        cold_start.answer_turn(f"{cold_start.SAYS} The town Aare has 20 mills", "20"),
        "[{'information': [{'page_number': 0, 'page_summary': 'x'}], 'url': 'passage:1'}]",
        "[{'search_query': 'x', 'web_page_info_list': [{'quick_summary': 'x', 'title': 'x', "
        "'url': 'x'}]}]",
    ]
    model, cold, run = (tmp_path / name for name in ("model", "cold", "grpo_0"))
    write_model(model, turns * 3 + (tmp_path / "corpus.jsonl").read_text().splitlines())
    data = [
        f"--corpus={tmp_path}/corpus.jsonl",
        f"--data={tmp_path}/train.jsonl",
        f"--eval_data={tmp_path}/held_out.jsonl",
        f"--system_prompt_file={ROOT}/prompts/wiki.txt",
        "--threads=1",
        "--max_model_len=512",
        "--microbatch_tokens=4096",
    ]
    learning = ["--lr=4e-3", "--lr_warmup=5", "--lr_decay=yes", "--reading_steps=0", "--steps=120"]
    size = ["--questions_per_step=4", "--group_size=4"]
    control = ["--reading_steps=0", "--reading_share=0", "--made_up=0", "--log=metrics.jsonl"]
    cold_start.main([f"--model={model}", f"--run_dir={cold}", *data, *learning, *size])
    _, *rows, _ = [json.loads(line) for line in (cold / "cold_start.jsonl").open()]
    assert rows[-1]["logprob"] > -0.5 > rows[0]["logprob"]
    steps = ["--preset=wiki", "--steps=2", "--eval_questions=2", "--save_every=2", "--log_every=1"]
    assert train.main([f"--model={cold}", f"--run_dir={run}", *data, *steps, *size]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps_made = [line for line in metrics if "reward" in line]
    assert len(steps_made) == 2 and min(line["tied"] for line in steps_made) < 1
    assert max(line["grad_norm"] for line in steps_made) > 0
    imitation = tmp_path / "imitation_0"
    further = [*control, *size, "--steps=2", f"--model={cold}", f"--run_dir={imitation}"]
    cold_start.main([*data, *further])
    _, *rows, _ = [json.loads(line) for line in (imitation / "metrics.jsonl").open()]
    assert [line["trajectories"] for line in rows] == [16, 16]  # as many as GRPO's
    assert evaluate.main([f"--model={run}", f"--run_dir={run}/greedy"]) == 0
    questions = f"--questions={tmp_path}/held_out.jsonl"
    real_model.main(["collect", f"--out={tmp_path}/docs/runs", questions, str(run)])
    kept = json.loads((tmp_path / "docs/runs/grpo_0/greedy/summary.json").read_text())
    assert len(kept["f1_by_question"]) == kept["n"] > 0
    assert sum(kept["f1_by_question"].values()) / kept["n"] == pytest.approx(kept["f1"], abs=1e-4)


# Stands in for Python: notes its arguments, and leaves what the script looks for.
RECORDER = """
import json, pathlib, sys
program, *given = sys.argv[1:] if sys.argv[1] != "-m" else sys.argv[2:]
with open(__file__ + ".log", "a") as log:
    log.write(json.dumps([program, *given]) + "\\n")
if program == "scripts.real_model":
    sys.exit()
values = dict(word[2:].split("=", 1) for word in given if "=" in word)
folder = pathlib.Path(values.get("run_dir") or values.get("resume") or values["out"])
folder.mkdir(parents=True, exist_ok=True)
names = {"train.py": ["config.yaml"], "eval.py": ["summary.json"]}.get(program, [])
if "resume" in values:
    names = ["summary.json"]
if program == "scripts.question_sets":
    names = ["held_out.jsonl"]
if program == "scripts.cold_start":
    names = [values.get("log", "cold_start.jsonl")]
for name in names:
    (folder / name).write_text('{"finished": 1}')
"""


@pytest.mark.quick
def test_all_runs_are_begun_with_keys_that_they_read_and_go_on_where_they_ended(tmp_path):
    recorder = tmp_path / "recorder.py"
    recorder.write_text(RECORDER)
    (tmp_path / "model").mkdir()
    words = ["scripts/real_model.sh", "model", "corpus.jsonl", "questions.jsonl", "runs"]
    command = [str(ROOT / words[0]), *(str(tmp_path / word) for word in words[1:])]
    environment = os.environ | {"PYTHON": f"{sys.executable} {recorder}"}
    for name in ("model/config.json", "corpus.jsonl", "questions.jsonl"):
        refused = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert refused.returncode == 2 and b"MODEL CORPUS QUESTIONS RUNS" in refused.stderr
        (tmp_path / name).write_text("{}")
    assert not (tmp_path / "runs").exists()

    def made() -> list[list[str]]:
        subprocess.run(command, env=environment, check=True, timeout=60)
        lines = (tmp_path / "recorder.py.log").read_text().splitlines()
        (tmp_path / "recorder.py.log").unlink()
        return [json.loads(line) for line in lines]

    first = made()
    programs = [program for program, *_ in first]
    assert programs.count("eval.py") == 12 and programs.count("train.py") == 4
    for program, *given in first:
        if program in ("train.py", "eval.py"):
            config = load_config(["--preset=wiki", *given])
            other = {"train.py": "eval.py", "eval.py": "train.py"}[program]
            assert check_inputs(config, given, other) == []
        else:
            keys = {word[2:].partition("=")[0] for word in given if word.startswith("--")}
            assert keys <= {*TYPES, *asdict(Recipe()), "out", "held_out", "questions"} | {
                "short_addresses"
            }
    # Its four runs have a config by now, and no summary: they go on, and all else is there.
    resumed = [words for words in made() if words[0] == "train.py"]
    assert [words[1].partition("=")[0] for words in resumed] == ["--resume"] * 4
    assert [words[0] for words in made()] == ["scripts.real_model"] * 2
