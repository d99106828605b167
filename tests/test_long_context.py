"""One step at the paper's full context, 32,768 tokens, through vLLM on a CPU. Half a minute:
`pytest -m by_hand`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from engines import GREEDY, VOCABULARY, engine_config, prompts, run, vllm_installed
from policies import logprobs
from transformers import Qwen2Config, Qwen2ForCausalLM

from deepresearcher_min.config import Config
from deepresearcher_min.engine import Engine, Sampling, make_engine
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Group, Question, Trajectory

QUESTION = Question("q", "text", ("gold",))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def long_config() -> Config:
    config = engine_config(
        engine="vllm",
        updates_per_rollout=1,
        microbatch_tokens=32768,
        gradient_checkpointing=True,
        lr=0.01,
        lr_warmup=0,
    )
    return dataclasses.replace(config, max_model_len=32768, max_in_flight=4, kv_tokens=0)


def act(engine: Engine, prompt: list[int]) -> list[Trajectory]:
    """One by one: vLLM's greedy log-probabilities need a greedy batch."""
    trajectories = []
    for name, sampling in {"greedy": GREEDY, "sampled": Sampling(1.0, 12, 1, ())}.items():
        done = run(engine, {name: prompt}, sampling)[name]
        ids = prompt + done.token_ids
        mask = [False] * len(prompt) + [True] * len(done.token_ids)
        values = [float("nan")] * len(prompt) + done.logprobs
        trajectories.append(Trajectory(QUESTION, ids, mask, values, (), None, "answer"))
    return trajectories


def check(policy: Policy, trajectories: list[Trajectory], prompt: list[int]) -> None:
    for trajectory, own in zip(trajectories, logprobs(policy, trajectories), strict=True):
        assert np.abs(own - trajectory.logprobs[trajectory.sampled_mask]).max() < 1e-3
    ids = torch.tensor(trajectories[0].token_ids)[None]
    options = {"lengths": [ids.shape[1]], "prefix_of": {}, "logits_to_keep": GREEDY.max_tokens + 1}
    with torch.no_grad():
        logits = policy.model(ids, **options).logits[0, :-1]
    assert logits.argmax(-1).tolist() == ids[0, len(prompt) :].tolist()


@pytest.mark.by_hand
@pytest.mark.skipif(not vllm_installed, reason="vllm is not installed")
def test_a_step_at_the_full_context_of_the_paper(tmp_path):
    """32,768 tokens: prompts of 31,000 through vLLM, the policy's log-probabilities, an update, new
    weights, again.
    """
    torch.manual_seed(3)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    config = long_config()
    engine, policy = make_engine(config, str(tmp_path)), Policy(config, str(tmp_path), Ranks())
    (prompt,) = prompts(1, seed=140, low=31_000, high=31_000).values()
    first = act(engine, prompt)
    check(policy, first, prompt)
    metrics = policy.update([Group(QUESTION, first, [1.0, 0.0], [0.7, -0.7])])
    assert np.isfinite(metrics["kl"]) and metrics["grad_norm"] > 0 and metrics["mismatch"] < 1e-3
    engine.update_weights(policy.named_weights())
    second = act(engine, prompt)
    check(policy, second, prompt)
    assert not np.array_equal(first[0].token_ids, second[0].token_ids)
    engine.close()
