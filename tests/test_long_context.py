"""One step at the paper's full context, 32,768 tokens, through vLLM on a CPU. Eight minutes:
`pytest -m by_hand`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from engines import GREEDY, VOCABULARY, engine_config, prompts, run, vllm_installed
from policies import logprobs
from transformers import Qwen2Config, Qwen2ForCausalLM

from deepresearcher_min.engine import Sampling, make_engine
from deepresearcher_min.policy import Policy
from deepresearcher_min.run import Ranks
from deepresearcher_min.trajectory import Group, Question, Trajectory


@pytest.mark.by_hand
@pytest.mark.skipif(not vllm_installed, reason="vllm is not installed")
def test_a_step_at_the_full_context_of_the_paper(tmp_path):
    """32,768 tokens: prompts of 31,000 through vLLM, the policy's log-probabilities, an update, new
    weights, again.
    """
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
    )
    more = dict(
        num_key_value_heads=1,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    Qwen2ForCausalLM(Qwen2Config(**sizes, **more)).save_pretrained(tmp_path)
    config = dataclasses.replace(
        engine_config(
            engine="vllm",
            updates_per_rollout=1,
            microbatch_tokens=32768,
            gradient_checkpointing=True,
        ),
        max_model_len=32768,
        max_in_flight=4,
        kv_tokens=0,
        lr=0.01,
        lr_warmup=0,
    )
    engine, policy = make_engine(config, str(tmp_path)), Policy(config, str(tmp_path), Ranks())
    (prompt,) = prompts(1, seed=140, low=31_000, high=31_000).values()
    question, samplings = (
        Question("q", "text", ("gold",)),
        {"greedy": GREEDY, "sampled": Sampling(1.0, 12, 1, ())},
    )

    def act() -> list[Trajectory]:
        trajectories = []
        for (
            name,
            sampling,
        ) in samplings.items():  # one by one: vLLM's greedy log-probabilities need a greedy batch
            done = run(engine, {name: prompt}, sampling)[name]
            mask = [False] * len(prompt) + [True] * len(done.token_ids)
            logprobs = [float("nan")] * len(prompt) + done.logprobs
            trajectories.append(
                Trajectory(question, prompt + done.token_ids, mask, logprobs, (), None, "answer")
            )
        return trajectories

    def check(trajectories: list[Trajectory]) -> None:
        for trajectory, own in zip(trajectories, logprobs(policy, trajectories), strict=True):
            assert np.abs(own - trajectory.logprobs[trajectory.sampled_mask]).max() < 1e-3
        with torch.no_grad():
            ids = torch.tensor(trajectories[0].token_ids)[None]
            logits = policy.model(
                ids, lengths=[ids.shape[1]], logits_to_keep=GREEDY.max_tokens + 1
            ).logits[0, :-1]
        assert logits.argmax(-1).tolist() == ids[0, len(prompt) :].tolist()

    first = act()
    check(first)
    metrics = policy.update([Group(question, first, [1.0, 0.0], [0.7, -0.7])])
    assert np.isfinite(metrics["kl"]) and metrics["grad_norm"] > 0 and metrics["mismatch"] < 1e-3
    engine.update_weights(policy.named_weights())
    second = act()
    check(second)
    assert not np.array_equal(first[0].token_ids, second[0].token_ids)
    engine.close()
