"""What only HFEngine promises: bitwise repetition, its rows and their prefixes, and what it
refuses.
"""

import dataclasses
import importlib.util
import random

import numpy as np
import pytest
import torch
from engines import (
    GREEDY,
    VOCABULARY,
    check_against_model,
    counted,
    drain,
    engine_config,
    prompts,
    random_model,
    run,
    tokens,
    two_turns,
)
from transformers import AutoModelForCausalLM

from deepresearcher_min import engine as engine_module
from deepresearcher_min.config import ConfigError
from deepresearcher_min.engine import Sampling, make_engine

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    random_model("qwen2", seed=1).save_pretrained(path)
    return path


def test_repeats_bit_for_bit(model_dir):
    config = engine_config()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = two_turns(make_engine(config, model_dir))
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    torch.rand(5)
    engine = make_engine(config, model_dir)
    assert two_turns(engine) == first
    engine.update_weights(engine.model.named_parameters())  # forgets all prefixes
    assert two_turns(engine) == first


def test_shares_prompts_between_requests(model_dir):
    """Eight requests with one prompt of 50 tokens: it is computed once, then each computes its last
    token.
    """
    engine = counted(make_engine(engine_config(), model_dir))
    (prompt,) = prompts(1, seed=110, low=50, high=50).values()
    samplings = {str(i): Sampling(1.0, 10, i, ()) for i in range(8)}
    done = run(engine, {name: prompt for name in samplings}, samplings)
    assert engine.stats["prefill_tokens"] == 50 + 7
    for name, completion in done.items():
        fresh = make_engine(engine_config(), model_dir)
        assert run(fresh, {name: prompt}, samplings[name])[name].token_ids == completion.token_ids


@pytest.mark.parametrize(("kind", "dtype", "limit"), [
    ("llama", "float32", 1e-5), ("qwen2", "float32", 1e-5), ("llama", "bfloat16", 0.3),
])  # fmt: skip
def test_what_all_have_in_common_is_read_once(tmp_path, monkeypatch, kind, dtype, limit):
    """Ten prompts begin with the same 40 tokens, three join later: most keys that a step reads are
    in one call, and nothing changes for those who shared it.
    """
    random_model(kind, seed=3).save_pretrained(tmp_path)
    config = engine_config(dtype=dtype)
    (start,) = prompts(1, seed=140, low=40, high=40).values()
    requests = {name: start + ids for name, ids in prompts(13, seed=141, high=20).items()}
    reads = []  # (query rows, keys) of each call
    attend = engine_module.attend_on_cpu

    def spy(query, keys, *rest, **options):
        reads.append((query.shape[2], keys.shape[2]))
        return attend(query, keys, *rest, **options)

    monkeypatch.setattr(engine_module, "attend_on_cpu", spy)
    engine = make_engine(config, str(tmp_path))
    first = dict(list(requests.items())[:10])
    for name, ids in first.items():
        engine.submit(name, ids, GREEDY)
    done = {}
    for _ in range(4):
        done |= engine.step()
    assert not done
    group = 2 if kind == "llama" else 1
    layer = reads[-11:]
    assert layer[-1] == (10 * group, 40)
    assert all(rows == group and keys <= 20 + 4 for rows, keys in layer[:-1])
    for name in requests.keys() - first:
        engine.submit(name, requests[name], GREEDY)
    done = drain(engine, 13)
    monkeypatch.setattr(engine_module, "attend_on_cpu", None)
    for name, prompt in requests.items():
        alone = run(make_engine(config, str(tmp_path)), {name: prompt}, GREEDY)[name]
        same = [a == b for a, b in zip(alone.token_ids, done[name].token_ids, strict=True)]
        count = len(same) if all(same) else same.index(False)
        assert count == len(same) or dtype == "bfloat16"
        assert np.allclose(alone.logprobs[:count], done[name].logprobs[:count], atol=limit)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_what_the_plain_model_gives(tmp_path, kind, seed):
    """Prompts that share much, little or nothing come, go on, and are given up at any step, in few
    rows or many.
    """
    draw = random.Random(seed)
    model = random_model(kind, seed)
    model.save_pretrained(tmp_path)
    rows = [2, 3, 5, 24][seed]
    engine = make_engine(dataclasses.replace(engine_config(), kv_tokens=rows * 256), str(tmp_path))
    start = tokens_of(draw, [1, 5, 40, 40][seed])
    asked = {}
    finished = 0
    while finished < 40:
        if len(asked) < 12 and draw.random() < 0.5:
            kept = draw.choice([len(start), draw.randint(1, len(start))])
            prompt = start[:kept] + tokens_of(draw, draw.choice([0, 1, 3, 30]))
            sampling = Sampling(draw.choice([0.0, 0.7, 1.0]), draw.randint(1, 12), len(asked), (3,))
            name = f"{finished}/{draw.random()}"
            engine.submit(name, prompt, sampling)
            asked[name] = prompt, sampling
        if asked and draw.random() < 0.05:
            name = draw.choice([*asked])
            engine.abort([name])
            del asked[name]
        for name, turn in engine.step().items():
            prompt, sampling = asked.pop(name)
            finished += 1
            check_against_model(model, {name: prompt}, {name: turn}, sampling, limit=5e-5)
            if draw.random() < 0.6:
                prompt = prompt + turn.token_ids + tokens_of(draw, draw.randint(0, 9))
                if len(prompt) < 180:
                    engine.submit(name, prompt, sampling)
                    asked[name] = prompt, sampling


def tokens_of(draw, count):
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def test_long_prompts_are_spread_over_steps(model_dir, monkeypatch):
    requests = prompts(6, seed=120, low=60, high=100)
    expected = run(make_engine(engine_config(), model_dir), requests, GREEDY)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 32)
    engine = make_engine(engine_config(), model_dir)
    for name, prompt in requests.items():
        engine.submit(name, prompt, GREEDY)
    for running in range(1, 7):
        assert not engine.step()
        assert len(engine.running) == running
    assert tokens(drain(engine, 6)) == tokens(expected)


def test_copies_a_prefix_before_its_row_is_given_away(model_dir):
    """Two rows. In one step, a request copies the prefix that row 0 holds, and an unrelated one
    takes row 0 over.
    """
    engine = counted(make_engine(dataclasses.replace(engine_config(), kv_tokens=512), model_dir))
    prompt, unrelated = prompts(2, seed=115, low=50, high=50).values()
    run(engine, {"first": prompt}, GREEDY)
    engine.stats.clear()
    requests = {"copies": [*prompt, 1, 2, 3], "takes over": unrelated}
    check_against_model(
        random_model("qwen2", seed=1), requests, run(engine, requests, GREEDY), GREEDY
    )
    assert engine.stats["cached_tokens"] == 50


def test_a_next_turn_goes_on_in_its_own_row(model_dir):
    """Two rows, both needed: a turn that took the other row would compute its prefix again."""
    engine = counted(make_engine(dataclasses.replace(engine_config(), kv_tokens=512), model_dir))
    requests = prompts(2, seed=116, low=50, high=50)
    done = run(engine, requests, GREEDY)
    engine.stats.clear()
    longer = {
        name: requests[name] + done[name].token_ids + [1, 2, 3] for name in reversed(requests)
    }
    check_against_model(random_model("qwen2", seed=1), longer, run(engine, longer, GREEDY), GREEDY)
    assert engine.stats["prefill_tokens"] == 2 * (3 + 1)


def test_few_slots_serve_many_requests(model_dir):
    """Two slots and 12 requests in two turns: evicted prefixes are computed again, results stay the
    same.
    """
    requests = prompts(12, seed=130)
    small = make_engine(dataclasses.replace(engine_config(), kv_tokens=512), model_dir)
    large = make_engine(engine_config(), model_dir)
    assert small.capacity_tokens == 512
    for _ in range(2):
        done = run(small, requests, GREEDY)
        expected = run(large, requests, GREEDY)
        assert tokens(done) == tokens(expected)
        requests = {name: ids + expected[name].token_ids for name, ids in requests.items()}


def test_refuses_what_it_cannot_do(model_dir):
    engine = make_engine(engine_config(), model_dir)
    for ids in ([], [1] * 256):
        with pytest.raises(ValueError):
            engine.submit("a", ids, GREEDY)
    with pytest.raises(KeyError, match="typo"):
        engine.update_weights([("typo", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"no values for .*model\.norm\.weight"):
        engine.update_weights(
            (n, p) for n, p in engine.model.named_parameters() if n != "model.norm.weight"
        )


def test_missing_vllm_is_said_clearly(model_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vllm is not installed"):
        make_engine(engine_config(engine="vllm"), model_dir)
    assert isinstance(make_engine(engine_config(engine="auto"), model_dir), engine_module.HFEngine)


def test_owns_its_weights(model_dir):
    engine = make_engine(engine_config(), model_dir)
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    engine.update_weights(other.named_parameters())
    before = run(engine, {"a": [1, 2, 3]}, GREEDY)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert tokens(run(engine, {"a": [1, 2, 3]}, GREEDY)) == tokens(before)
