"""What a fork changes first, each in a few lines: a tool, a reward, a dataset, a model (README,
"Change one thing").
"""

import ast
import dataclasses
import json

import pytest
import torch
from scripted import Scripted, answer_turn, batch, call, make_agent, one, turns
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from deepresearcher_min import protocol, reward
from deepresearcher_min.config import load_config
from deepresearcher_min.corpus import MODEL_DIR
from deepresearcher_min.engine import HFEngine
from deepresearcher_min.policy import Policy
from deepresearcher_min.rollout import Agent, Tools, roll_out
from deepresearcher_min.run import Ranks
from train import load_task

pytestmark = pytest.mark.slow


def test_a_new_tool_is_a_schema_a_row_and_a_method(monkeypatch, tmp_path):
    class Calculating(Tools):
        async def calculate(self, expression, record):
            return [protocol.search_item(str(eval(expression, {"__builtins__": {}})))]

    schema = json.dumps(protocol.read_tools()[0])  # one line more in prompts/tools.json
    schema = schema.replace("web_search", "calculator").replace("query", "sums")
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([*protocol.read_tools(), json.loads(schema)]))
    row = protocol.Tool(
        "calculator", "sums", "max_queries", ("sum", "results"), protocol.search_item
    )
    monkeypatch.setitem(protocol.TOOLS, "calculate", row)
    tools = protocol.read_tools(path)
    agent = make_agent(Scripted(turns(call("calculator", sums=["6*7", "6/0"]), answer_turn("42"))))
    agent = dataclasses.replace(
        agent, tools=Calculating(agent.config, agent.chat, agent.tools.browser.corpus)
    )
    trajectory = one(agent)
    chat = protocol.ChatFormat(agent.chat.tokenizer, agent.config.date, tools=tools)
    assert "calculator" in chat.system
    assert trajectory.answer == "42"
    right, wrong = ast.literal_eval(trajectory.turns[0].observation)
    assert right == {"results": [protocol.search_item("42")], "sum": "6*7"}
    assert wrong["results"][0]["quick_summary"] == "The tool failed."


def test_a_new_reward_is_one_function(monkeypatch):
    def short_and_exact(trajectory, config):
        hit = reward.exact_match(trajectory.answer or "", list(trajectory.question.answers))
        return hit - 0.001 * trajectory.sampled_mask.sum()

    monkeypatch.setattr(reward, "reward", short_and_exact)
    agent = make_agent(
        Scripted(lambda request_id, turn: answer_turn("Velden" * (1 + int(request_id[-1]))))
    )
    (trajectories,) = roll_out(batch(1, repeats=2), agent)
    group = reward.judge(trajectories[0].question, trajectories, agent.config, 0)
    assert group.rewards[0] > group.rewards[1] and group.advantages[0] > 0 > group.advantages[1]


def test_a_new_dataset_is_a_file_with_question_and_answers(tmp_path):
    rows = [
        {"question": f"Who wrote book {i}?", "answers": [f"Writer {i}", f"W. {i}"]}
        for i in range(10)
    ]
    pages = [
        {"title": f"Book {i}", "url": f"https://b.example/{i}", "text": f"Writer {i} wrote it."}
        for i in range(10)
    ]
    for name, lines in (("questions", rows), ("corpus", pages)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = [
        "--preset=wiki",
        f"--data={tmp_path}/questions.jsonl",
        f"--corpus={tmp_path}/corpus.jsonl",
    ]
    task = load_task(load_config([*options, "--eval_questions=3"]))
    assert [question.text for question in task.held_out] == [
        "Who wrote book 0?",
        "Who wrote book 1?",
        "Who wrote book 2?",
    ]
    assert (
        len(task.questions) == 7 and task.corpus.search("book 4", 1)[0].url == "https://b.example/4"
    )


def test_a_new_model_is_a_folder_that_transformers_loads(tmp_path):
    tokenizer, size = (
        AutoTokenizer.from_pretrained(MODEL_DIR),
        {"hidden_size": 32, "intermediate_size": 64},
    )
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **size, **heads)).save_pretrained(
        tmp_path
    )
    agent = make_agent(Scripted(turns(answer_turn())))
    config = dataclasses.replace(agent.config, kl_coef=0.0, max_model_len=768, max_turn_tokens=8)
    chat = protocol.ChatFormat(tokenizer, date="")
    policy = Policy(config, str(tmp_path), Ranks())
    agent = Agent(
        config,
        HFEngine(config, str(tmp_path)),
        Tools(config, chat, agent.tools.browser.corpus),
        chat,
    )
    (trajectories,) = roll_out(batch(1, repeats=2), agent)
    rewards = [float(i) for i, _ in enumerate(trajectories)]
    metrics = policy.update(
        [reward.Group(trajectories[0].question, trajectories, rewards, [-1.0, 1.0])]
    )
    assert metrics["mismatch"] < 1e-4 and metrics["grad_norm"] > 0
    policy.export(tmp_path / "trained", tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").config.model_type == "qwen2"
