"""scripts/cold_start.py: what the demonstrations are, and a cold start of two steps that train.py
goes on from.
"""

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import train
from deepresearcher_min.config import ConfigError, load_config
from deepresearcher_min.corpus import Corpus
from deepresearcher_min.protocol import Answer, Call, parse_turn
from deepresearcher_min.reward import f1_score
from deepresearcher_min.trajectory import Question, Recording, Turn
from scripts import cold_start
from scripts.cold_start import Recipe, reading, researcher, without_guess
from scripts.items import (
    Item,
    held_out_articles,
    made_up,
    passages_apart,
    quoted,
    read_items,
)
from tests.scripted import CHAT, byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RIVER = "The Aare is a river. It is 288 km long, and in 1353 Bern joined its neighbours."
TOWN = "Bern is a town. The river Aare flows around the old town of Bern."


def write_data(folder: Path) -> list[str]:
    """Files of a small question set; the arguments that name them."""
    corpus = [
        {"title": title, "url": f"https://x.example/{n}", "text": text}
        for n, (title, text) in enumerate([("Aare (1)", RIVER), ("Bern (1)", TOWN)] * 1)
    ]
    corpus.append(
        {"title": "Oslo (1)", "url": "https://x.example/9", "text": "In Oslo Ibsen died."}
    )
    asked = [
        {"question": "How long is the Aare?", "answers": ["288 km"], "gold_titles": ["Aare (1)"]},
        {"question": "Which river passes Bern?", "answers": ["Aare"], "gold_titles": ["Bern (1)"]},
    ] * 4
    held_out = [{"question": "Who died?", "answers": ["Ibsen"], "gold_titles": ["Oslo (1)"]}]
    arguments = []
    for key, rows in (("corpus", corpus), ("data", asked), ("eval_data", held_out)):
        path = folder / f"{key}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments.append(f"--{key}={path}")
    return arguments


@pytest.mark.quick
def test_a_quote_is_short_and_stands_where_the_question_points():
    text = "The mill is in Oss. " + "word " * 30 + "The old king of Aa was born in Oss, they say."
    quote = quoted(text, "Oss", "Where was the king of Aa born?", 12)
    assert "king of Aa was born in Oss," in quote and len(quote.split()) <= 12
    assert quoted(text, "Os", "Where?", 12) == ""
    long_answer = " ".join(["word"] * 20)
    assert quoted(text, long_answer, "What?", 12).split() == ["word"] * 20
    turn = cold_start.reading_turn("In Oss, they say.", Question("", "Where?", ("Oss",)), 2)
    assert turn == "It says: In Oss,</think>\n<answer>Oss</answer>"


@pytest.mark.quick
def test_made_up_questions_keep_away_from_held_out_articles():
    documents = [
        ("Aare (1)", "u", RIVER),
        ("Oslo (1)", "v", "There in 1906 Henrik Ibsen died once."),
    ]
    passages = passages_apart(Corpus(documents), {"oslo"})
    items = list(islice(made_up(passages, random.Random(0)), 60))
    assert {item.title for item in items} == {"Aare (1)"}
    asked = {item.question.text: item.question.answers for item in items}
    assert asked["It is how many km long, and in 1353 Bern joined its neighbours?"] == ("288",)
    assert asked["It is 288 km long, and in what year Bern joined its neighbours?"] == ("1353",)


@pytest.mark.quick
@pytest.mark.parametrize(
    "row",
    [
        {"gold_titles": ["Old_Oslo_(2)"]},
        {"article": "old Oslo"},
        {"gold_titles": None, "article": "Old_Oslo"},
        {"gold_titles": ["Old Oslo (7)"], "article": None},
        {"article": "Old Oslo (1995)"},
    ],
)
def test_an_article_is_held_out_however_it_is_written(row, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n" + json.dumps({"question": "Who?", "answers": ["Ibsen"], **row}) + "\n\n")
    died = "There in 1906 Ibsen died once."
    documents = [("Aare (1)", "u", RIVER), ("Old Oslo (1)", "v", died)]
    documents.append(("Old Oslo (1995) (1)", "w", died))
    passages = passages_apart(Corpus(documents), held_out_articles(str(path)))
    found = made_up(passages, random.Random(0))
    assert {item.title for item in islice(found, 60)} == {"Aare (1)"}


@pytest.mark.quick
def test_a_question_goes_with_the_gold_passage_that_answers_it(tmp_path):
    documents = [
        ("Bern (1)", "u", TOWN),
        ("Aare", "v", "The Aare is a river."),
        ("Aare", "w", "It is 288 km long."),
    ]
    asked = {"question": "How long?", "answers": ["288 km"], "gold_titles": ["Bern (1)", "Aare"]}
    unanswered = asked | {"answers": ["288 miles"]}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in (unanswered, asked)))
    corpus = Corpus(documents)
    (found,) = read_items(str(path), passages_apart(corpus, {"bern"}))
    assert (found.title, found.text) == ("Aare", "It is 288 km long.")
    with pytest.raises(ConfigError, match="not of eval_data's articles"):
        read_items(str(path), passages_apart(corpus, {"aare"}))


def item() -> Item:
    question = Question("1", "Which river flows around the old town of Bern?", ("Aare",))
    return Item(question, "Bern", TOWN)


@pytest.mark.quick
@pytest.mark.parametrize("opens", [0.0, 1.0])
@pytest.mark.parametrize("good", [0.0, 1.0])
def test_a_researcher_decides_well_or_badly_and_reads_what_it_was_shown(opens, good):
    recipe = Recipe(good_query=good, good_open=opens)
    for summary, page, right in (
        ("The river Aare flows around the old town.", "The Aare it is.", True),
        ("A town.", "The river Aare flows there.", opens == 1.0),
        ("A town.", "Nothing more.", False),
    ):
        script = researcher(item(), random.Random(0), recipe)
        first = parse_turn("<think>" + next(script))
        query = "river flows around old town bern" if good else "river flows"
        assert isinstance(first, Call) and first.keys == (query,)
        found = {"quick_summary": summary, "title": "Bern", "url": "https://x.example/"}
        turn = script.send(str([{"search_query": "x", "web_page_info_list": [found]}]))
        if opens:
            assert parse_turn("<think>" + turn).keys == ("https://x.example/",)
            notes = {"page_number": 0, "page_summary": page}
            turn = script.send(str([{"information": [notes], "url": "https://x.example/"}]))
        last = parse_turn("<think>" + turn)
        assert isinstance(last, Answer) and turn.startswith(cold_start.SAYS)
        assert (f1_score(last.text, ["Aare"]) == 1.0) == right
        with pytest.raises(StopIteration):
            script.send("")


@pytest.mark.quick
def test_of_a_wrong_answer_only_the_decision_to_answer_is_imitated():
    def trained(answer: str) -> str:
        record = Recording(item().question, CHAT.prompt_ids("Which river?"))
        turn = cold_start.answer_turn(f"{cold_start.SAYS} so", answer)
        ids = [*CHAT.encode(turn), CHAT.end_of_turn_id]
        span = record.append(ids, [0.0] * len(ids))
        record.turns.append(Turn(span, (span[1], span[1]), turn, "answer"))
        one = without_guess(record.finish("answer", answer), CHAT)
        return CHAT.decode(one.token_ids[one.sampled_mask].tolist())

    assert trained("nothing") == cold_start.SAYS
    assert trained("Aare").endswith("<answer>Aare</answer>")


@pytest.mark.quick
def test_a_reading_example_asks_several_questions_about_one_page():
    second = replace(item(), question=Question("2", "Which town?", ("Bern",)))
    unknown = replace(item(), question=Question("3", "Who?", ("Ibsen",)))
    example = reading([item(), unknown, second], CHAT)
    text = CHAT.decode(example.token_ids.tolist())
    assert text.index("Which river") < text.index(TOWN) < text.index("Which town?")
    assert "Who?" not in text
    turns = [slice(*turn.sampled) for turn in example.turns]
    trained = [CHAT.decode(example.token_ids[turn].tolist()) for turn in turns]
    assert [turn[turn.index("<answer>") :] for turn in trained] == [
        "<answer>Aare</answer>",
        "<answer>Bern</answer>",
    ]
    assert example.sampled_mask.sum() == sum(turn.stop - turn.start for turn in turns)
    # What stands between the turns is the template's own rendering of the conversation.
    messages = CHAT.opening(item().question.text)
    given = example.token_ids[len(CHAT.prompt_ids(item().question.text)) : turns[0].start]
    first, _, page = CHAT.decode(given.tolist()).partition("</tool_call>")
    page = page[page.index("[") : page.rindex("]") + 1]
    messages += [
        {"role": "assistant", "content": f"<think>{first}</tool_call>"},
        {"role": "tool", "content": page},
        {"role": "assistant", "content": f"<think>{trained[0]}"},
        {"role": "user", "content": "Which town?"},
    ]
    whole = CHAT.encode(CHAT.template(messages, CHAT.tools) + "<think>")
    assert example.token_ids[: turns[1].start].tolist() == whole
    assert reading([replace(item(), text="Oss is old.")], CHAT) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Two layers of random weights in the form of SmolLM2's, for a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, **size, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_cold_start_lowers_the_surprise_and_train_goes_on_from_it(model, tmp_path, capsys):
    data = write_data(tmp_path)
    out, run = tmp_path / "cold", tmp_path / "run"
    limits = ["--max_turn_tokens=200", "--max_observation_tokens=1500", "--threads=1"]
    small = [*limits, f"--system_prompt_file={ROOT / 'prompts' / 'wiki.txt'}"]
    steps = ["--reading_steps=2", "--steps=2", "--questions_per_step=4", "--group_size=2"]
    cold_start.main([f"--model={model}", *data, f"--run_dir={out}", *small, *steps, "--lr=1e-3"])
    recipe, *rows, end = [json.loads(line) for line in (out / "cold_start.jsonl").open()]
    assert recipe["recipe"]["reading_steps"] == 2 and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["reward"] == 1.0  # reading alone
    assert end == {"finished": 4}
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    steps = ["--steps=1", "--questions_per_step=2", "--group_size=2", "--eval_questions=1"]
    code = train.main(
        ["--preset=wiki", f"--model={out}", *data, f"--run_dir={run}", *small, *steps]
    )
    assert code == 0, capsys.readouterr().err


@pytest.mark.quick
def test_what_is_missing_is_named(model, tmp_path):
    data = write_data(tmp_path)
    with pytest.raises(SystemExit, match="run_dir=''"):
        cold_start.main([f"--model={model}", *data])
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "Who?", "answers": ["x"]}\n')
    out = f"--run_dir={tmp_path / 'out'}"
    sizes = ["--max_turn_tokens=200", "--threads=1"]
    arguments = [f"--model={model}", *data, out, *sizes, f"--data={other}"]
    with pytest.raises(SystemExit, match="no question has gold_titles"):
        cold_start.main(arguments)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


LATE = {"title": "Late (1)", "url": "u", "text": "word " * 200 + "Aare"}
MILL = {"question": "Who?", "answers": ["Aare"], "gold_titles": ["Late (1)"]}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        ({}, ["--made_up=2"], "made_up=2.0: must be between 0 and 1"),
        ({}, ["--good_query=nan"], "good_query=nan: must be between"),
        ({}, ["--reading_steps=-5"], "reading_steps=-5: must be at least 0"),
        ({}, ["--log=../x.jsonl"], "log='../x.jsonl': must be a file's name"),
        ({}, ["--log=model.safetensors"], "log='model.safetensors': must be"),
        ({}, ["--resume=x"], "resume='x': a cold start cannot be resumed"),
        (
            {"data": lines(MILL | {"gold_titles": "Late (1)"})},
            [],
            "question 'data, line 1': gold_t",
        ),
        ({"data": lines(MILL | {"gold_titles": 5, "article": "x"})}, [], "question 'data, line 1'"),
        ({"data": lines(MILL | {"answers": ["x"]})}, [], "no question has gold_titles that are in"),
        ({"data": "\n" + lines(MILL) + "{\n"}, [], "line 3: not JSON"),
        ({"eval_data": lines({"question": "?", "answers": ["x"]})}, [], "gold_titles or article"),
        ({"corpus": lines(LATE), "data": lines(MILL)}, ["--made_up=0"], "the first 150 words of"),
        (
            {"corpus": lines(LATE), "data": lines(MILL)},
            [],
            "made_up: of 1000 passages of the corpus in",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_learned_from_is_one_line(model, tmp_path, files, words, said):
    arguments = [f"--model={model}", *write_data(tmp_path), f"--run_dir={tmp_path / 'out'}"]
    for key, text in files.items():
        (tmp_path / f"{key}.jsonl").write_text(text)
    sizes = ["--max_turn_tokens=200", "--threads=1", "--questions_per_step=1", "--group_size=2"]
    with pytest.raises(SystemExit) as error:
        cold_start.main([*arguments, *sizes, *words])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.quick
def test_no_other_folder_is_written_into(model, tmp_path):
    data = write_data(tmp_path)
    for name, content in (("config.yaml", "seed: 1"), ("cold_start.jsonl", '{"finished": 3}')):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(SystemExit, match="holds another model or run already"):
            cold_start.main([f"--model={model}", *data, f"--run_dir={folder}", "--log=x.jsonl"])
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(SystemExit, match="holds another model or run already"):
        cold_start.main([f"--model={model}", *data, f"--run_dir={model}"])
    with pytest.raises(SystemExit, match=r"run_dir=.*corpus.jsonl.*: .*File exists"):
        cold_start.main([f"--model={model}", *data, f"--run_dir={tmp_path / 'corpus.jsonl'}"])


@pytest.mark.quick
def test_ctrl_c_is_one_line(model, tmp_path, monkeypatch, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cold_start.Policy, "update", interrupted)
    sizes = ["--max_turn_tokens=200", "--threads=1", "--questions_per_step=1", "--group_size=2"]
    with pytest.raises(SystemExit) as error:
        cold_start.main(
            [f"--model={model}", *write_data(tmp_path), f"--run_dir={tmp_path / 'out'}", *sizes]
        )
    assert error.value.code == 130
    assert "out is unfinished and cannot be resumed" in capsys.readouterr().err


@pytest.mark.quick
def test_imitation_is_imitation_whatever_is_asked_for():
    given = ["--preset=wiki", "--temperature=.5", "--kl_coef=1", "--sequence_mask=2", "--steps=3"]
    config = cold_start.imitating(load_config(given), Recipe(reading_steps=4))
    assert (config.temperature, config.kl_coef, config.importance_cap) == (1.0, 0.0, 0.0)
    assert config.sequence_mask == 0.0 and config.steps == 7 and config.date.startswith("20")
