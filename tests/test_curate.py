"""scripts/curate.py: three filters and a mix, with a scripted model and a judge on loopback."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from loopback import Server
from scripted import CHAT, Scripted, answer_turn, make_agent

from deepresearcher_min.corpus import MODEL_DIR
from deepresearcher_min.evaluation import PlainChat
from deepresearcher_min.trajectory import Question, load_questions
from deepresearcher_min.web import Web
from scripts import curate

pytestmark = pytest.mark.quick
# 4 nq, 3 tq, 8 hotpotqa, 9 2wiki, and one of a source that is not in the mix
SOURCES = ["nq"] * 4 + ["tq"] * 3 + ["hotpotqa"] * 8 + ["2wiki"] * 9 + ["other"]
QUESTIONS = [
    Question(f"q{i}", f"Question {i}?", ("Velden",), source) for i, source in enumerate(SOURCES)
]


def reply(content):
    return 200, {}, {"choices": [{"message": {"content": content}}]}


def judge(says):
    """A judge that says `says(text of the question)`."""
    server = Server()
    texts = (json.loads(server.sent[-1][2])["messages"][1]["content"] for _ in iter(int, 1))
    server.pages["/v1/chat/completions"] = lambda _: reply(says(next(texts)))
    return server


def agent_for(server, answer=lambda number, sample: "Bern", **changes):
    """An agent without tools, whose model writes answer(number of the question, number of the
    sample).
    """

    def write(request_id, turn):
        return answer_turn(answer(*map(int, request_id.split("/")[1:])))

    options = {
        "group_size": 3,
        "max_tool_calls": 0,
        "tool_threads": 1,
        "max_retries": 0,
        "tool_timeout": 5.0,
    }
    options |= {"judge_url": server.url + "/v1", "judge_model": "m"}
    agent = make_agent(Scripted(write), **(options | changes))
    return replace(agent, chat=PlainChat(CHAT, {}))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")


def test_what_the_model_knows_once_in_k_samples_is_left_out():
    with Server() as server:
        right = {(0, 0), (4, 2), (7, 0), (7, 1)}  # question, sample
        agent = agent_for(
            server,
            lambda number, sample: "velden." if (number, sample) in right else "Velden or Bern",
        )
        assert [one.id for one in curate.unknown(QUESTIONS, agent)] == [
            f"q{i}" for i in range(25) if i not in (0, 4, 7)
        ]
        asked = Counter(request_id.split("/")[1] for request_id, _, _ in agent.engine.submitted)
        assert set(asked.values()) == {3} and len(asked) == 25
        assert {sampling.temperature for _, _, sampling in agent.engine.submitted} == {1.0}


def test_what_a_judge_objects_to_and_what_it_does_not_judge_is_left_out(tmp_path, capsys):
    said = {
        1: "It changes.\n**Time-bound**",
        5: "Taste.\nSUBJECTIVE.",
        9: "HARMFUL",
        16: "FINE, I think",
        17: "",
    }
    with judge(lambda text: said.get(int(text[9:-1]), "A plain fact.\nFINE")) as server:
        agent = agent_for(server, lambda number, sample: "Velden" if number == 0 else "Bern")
        web = Web(agent.config, tmp_path / "cassette.sqlite")
        chosen = curate.curate(QUESTIONS, agent, web)
        assert Counter(one.source for one in chosen) == {
            "nq": 2,
            "tq": 2,
            "hotpotqa": 6,
            "2wiki": 6,
        }
        assert not {"q0", "q1", "q5", "q9", "q16", "q17", "q24"} & {one.id for one in chosen}
        printed = capsys.readouterr().out
        assert "25 questions, 1 known to the model (pass@3)" in printed
        assert "judged: 19 fine, 2 no_verdict, 1 time-bound, 1 subjective, 1 harmful" in printed
        sent = len(server.sent)
        assert curate.curate(QUESTIONS, agent, web) == chosen
        # Verdicts come from the cassette, for a minute even missing ones.
        assert len(server.sent) <= sent + 2
        web.close()


def test_the_mix_keeps_its_ratio_and_says_what_is_too_little():
    for limit, parts in ((0, 2), (8, 1), (15, 1), (100, 2)):
        mixed = curate.mix(QUESTIONS, limit, seed=0)
        assert Counter(one.source for one in mixed) == {
            name: parts * share for name, share in curate.MIX.items()
        }
    assert curate.mix(QUESTIONS, 8, 0) == curate.mix(QUESTIONS, 8, 0) != curate.mix(QUESTIONS, 8, 1)
    for questions, limit in ((QUESTIONS[4:], 0), (QUESTIONS, 7)):
        with pytest.raises(
            ValueError,
            match=r"too few questions are left for a mix of 1:1:3:3 .* hotpotqa 8, 2wiki 9",
        ):
            curate.mix(questions, limit, 0)


def test_the_command_writes_questions_that_can_be_trained_on(tmp_path, capsys):
    """With the tiny model itself, which knows none of them."""
    rows = [
        {"id": one.id, "question": one.text, "answers": one.answers, "source": one.source}
        for one in QUESTIONS
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with judge(lambda text: "FINE") as server:
        arguments = [
            "--preset=wiki",
            f"--model={MODEL_DIR}",
            f"--data={tmp_path}/all.jsonl",
            "--judge_model=m",
        ]
        arguments += [
            f"--judge_url={server.url}/v1",
            f"--run_dir={tmp_path}/out",
            "--max_model_len=1024",
        ]
        arguments += ["--group_size=2", "--max_turn_tokens=8"]
        assert curate.main([*arguments, "--limit=8"]) == 0
        chosen = load_questions(tmp_path / "out/questions.jsonl")
        assert len(chosen) == 8 and set(chosen) < set(QUESTIONS)
        assert curate.main([*arguments, "--limit=7"]) == 2  # too few for the mix
        assert load_questions(tmp_path / "out/questions.jsonl") == chosen


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "curation needs judge_url and judge_model"),
        (["--judge_url=http://127.0.0.1:9/v1"], "curation needs judge_url and judge_model"),
        (["--judge_url=http://127.0.0.1:9/v1", "--judge_model=m"], "data is empty"),
        (
            ["--judge_url=http://127.0.0.1:9/v1", "--judge_model=m", "--data=nowhere.jsonl"],
            "nowhere.jsonl",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, capsys, arguments, words):
    fixed = ["--preset=wiki", f"--model={MODEL_DIR}", f"--run_dir={tmp_path}"]
    assert curate.main([*fixed, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("curate.py: ") and words in said and "Traceback" not in said
