"""The same suite over both engines, against a plain forward pass of the same weights; vLLM really runs (on CPU)."""

import dataclasses
import importlib.util
import random
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deepresearcher_min import engine as engine_module
from deepresearcher_min.config import Config, ConfigError, load_config
from deepresearcher_min.engine import Completion, Engine, Sampling, make_engine

VOCABULARY = 150
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=12, seed=0, stop_token_ids=())
vllm_installed = importlib.util.find_spec("vllm") is not None
needs_vllm = [pytest.mark.slow, pytest.mark.skipif(not vllm_installed, reason="vllm is not installed")]


def engine_config(**changes) -> Config:
    config = load_config(["--preset=toy"])
    return dataclasses.replace(config, max_model_len=256, max_in_flight=24, kv_tokens=24 * 256, **changes)


def random_model(kind: str, seed: int):
    """Tied Qwen2 (head_dim 32, biases) or untied Llama with grouped keys; large weights, so that nothing is flat."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=96, num_hidden_layers=2)
    torch.manual_seed(seed)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.2) if parameter.dim() == 1 else parameter.normal_(0.0, 0.12)
    return model.eval()


@dataclasses.dataclass
class Setup:
    engine: Engine
    model: torch.nn.Module  # holds the weights that the engine must have
    kind: str
    model_dir: str


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("hf", "qwen2"), marks=pytest.mark.quick, id="hf-qwen2"),
        pytest.param(("hf", "llama"), marks=pytest.mark.quick, id="hf-llama"),
        pytest.param(("vllm", "qwen2"), marks=needs_vllm, id="vllm-qwen2"),
        pytest.param(("vllm", "llama"), marks=needs_vllm, id="vllm-llama"),
    ],
)
def setup(request, tmp_path_factory) -> Iterator[Setup]:
    name, kind = request.param
    if name == "vllm":
        import bm25s  # noqa: F401  as in a run with a corpus; what it loads must not disturb vLLM
    model_dir = str(tmp_path_factory.mktemp(f"{name}-{kind}"))
    model = random_model(kind, seed=1)
    model.save_pretrained(model_dir)
    engine = make_engine(engine_config(engine=name), model_dir)
    yield Setup(engine, model, kind, model_dir)
    engine.close()


def prompts(count: int, seed: int, low: int = 3, high: int = 60) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {f"{seed}/{i}": [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))] for i in range(count)}


def run(engine: Engine, requests: dict[str, list[int]], samplings: dict[str, Sampling] | Sampling):
    """Submit everything, step until all is done."""
    for name, token_ids in requests.items():
        engine.submit(name, token_ids, samplings if isinstance(samplings, Sampling) else samplings[name])
    return drain(engine, len(requests))


def tokens(done: dict[str, Completion]) -> dict[str, list[int]]:
    return {name: completion.token_ids for name, completion in done.items()}


def drain(engine: Engine, count: int) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    for _ in range(1000):
        if len(done) == count:
            return done
        done.update(engine.step())
    raise AssertionError(f"{len(done)} of {count} requests finished in 1000 steps")


@torch.no_grad()
def reference_logprobs(model, prompt: list[int], sampled: list[int], temperature=1.0, top_p=1.0) -> torch.Tensor:
    """[len(sampled), V] log-probabilities by one plain forward pass, after temperature and top_p."""
    logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1] / temperature
    for row in logits if top_p < 1 else []:
        kept, total = [], 0.0
        for token in row.argsort(descending=True).tolist():
            if total >= top_p:
                break
            kept.append(token)
            total += row.softmax(-1)[token].item()
        mask = torch.ones(VOCABULARY, dtype=torch.bool)
        mask[kept] = False
        row[mask] = float("-inf")
    return logits.log_softmax(-1)


def check_against_model(model, requests, done, sampling: Sampling) -> None:
    for name, prompt in requests.items():
        completion = done[name]
        temperature, top_p = (sampling.temperature, sampling.top_p) if sampling.temperature else (1.0, 1.0)
        expected = reference_logprobs(model, prompt, completion.token_ids, temperature, top_p)
        if not sampling.temperature:
            assert completion.token_ids == expected.argmax(-1).tolist()
        own = expected[range(len(completion.token_ids)), completion.token_ids]
        assert torch.allclose(torch.tensor(completion.logprobs), own, atol=1e-3)


def test_greedy_equals_plain_forward(setup):
    """Mixed lengths, more requests than slots; the reported log-probability is that of temperature 1."""
    requests = prompts(40, seed=10)
    done = run(setup.engine, requests, GREEDY)
    check_against_model(setup.model, requests, done, GREEDY)
    assert {c.finish_reason for c in done.values()} == {"length"}
    assert len({t for c in done.values() for t in c.token_ids}) > 20, "the test model is degenerate"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_logprobs_are_those_of_the_sampling_distribution(setup, temperature, top_p):
    requests = prompts(12, seed=20)
    sampling = Sampling(temperature, top_p, 15, seed=5, stop_token_ids=())
    check_against_model(setup.model, requests, run(setup.engine, requests, sampling), sampling)


def test_settings_may_differ_within_a_batch(setup):
    requests = prompts(9, seed=21)
    kinds = [GREEDY, Sampling(1.0, 1.0, 12, 3, ()), Sampling(0.5, 0.7, 7, 4, ())]
    samplings = {name: kinds[i % 3] for i, name in enumerate(requests)}
    done = run(setup.engine, requests, samplings)
    for name, sampling in samplings.items():
        check_against_model(setup.model, {name: requests[name]}, done, sampling)


def test_sampling_follows_the_distribution(setup):
    """1,200 draws of one token: each frequency within 5 standard errors."""
    (prompt,) = prompts(1, seed=30).values()
    count = 1200
    requests = {str(i): prompt for i in range(count)}
    done = run(setup.engine, requests, {name: Sampling(1.0, 1.0, 1, int(name), ()) for name in requests})
    probability = reference_logprobs(setup.model, prompt, [0])[0].exp()
    drawn = torch.zeros(VOCABULARY).index_add_(
        0, torch.tensor([c.token_ids[0] for c in done.values()]), torch.ones(count)
    )
    error = (probability * (1 - probability) / count).sqrt() + 1 / count
    assert ((drawn / count - probability).abs() < 5 * error).all()


def test_stop_token_is_included_and_length_is_reported(setup):
    requests = prompts(6, seed=40)
    free = run(setup.engine, requests, GREEDY)
    for name, prompt in requests.items():
        ids = free[name].token_ids
        stop = ids[6]
        done = run(setup.engine, {name: prompt}, dataclasses.replace(GREEDY, stop_token_ids=(stop, VOCABULARY - 1)))
        expected = ids[: ids.index(stop) + 1]
        assert (done[name].token_ids, done[name].finish_reason) == (expected, "stop")
        assert len(done[name].logprobs) == len(expected)


def test_a_full_context_ends_with_length(setup):
    (prompt,) = prompts(1, seed=41, low=250, high=250).values()
    done = run(setup.engine, {"full": prompt}, dataclasses.replace(GREEDY, max_tokens=50))
    assert done["full"].finish_reason == "length"
    assert len(prompt) + len(done["full"].token_ids) == 256
    with pytest.raises(ValueError):
        setup.engine.submit("too long", [1] * 257, GREEDY)


def test_seeds_are_honoured_whoever_shares_the_batch(setup):
    """Alone or among others, in any order: a request's tokens depend on its seed only."""
    requests = prompts(10, seed=50)
    samplings = {name: Sampling(1.0, 0.95, 20, seed, ()) for seed, name in enumerate(requests)}
    together = run(setup.engine, requests, samplings)
    backwards = run(setup.engine, dict(reversed(requests.items())), samplings)
    for name, prompt in requests.items():
        alone = run(setup.engine, {name: prompt}, samplings[name])[name]
        assert together[name].token_ids == backwards[name].token_ids == alone.token_ids
    name, prompt = next(iter(requests.items()))
    other = run(setup.engine, {name: prompt}, Sampling(1.0, 0.95, 20, 999, ()))[name]
    assert other.token_ids != together[name].token_ids


def test_weights_are_in_place_after_an_update(setup):
    """The prompts are cached under the old weights: a stale prefix would show, and so would a stale tied head."""
    engine = setup.engine
    requests = prompts(8, seed=60, low=130, high=200)
    before = run(engine, requests, GREEDY)
    new = random_model(setup.kind, seed=2)
    engine.update_weights(new.named_parameters())
    try:
        after = run(engine, requests, GREEDY)
        check_against_model(new, requests, after, GREEDY)
        assert all(after[name].token_ids != before[name].token_ids for name in requests)
    finally:
        engine.update_weights(setup.model.named_parameters())
    assert tokens(run(engine, requests, GREEDY)) == tokens(before)


def test_weights_are_taken_one_at_a_time(setup):
    """Of tensors that nobody else holds, an engine keeps the last one and, vLLM, those of one module."""
    given, most = [], 0

    def copy(parameter: torch.Tensor) -> torch.Tensor:
        nonlocal most
        tensor = parameter.detach().clone()
        given.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in given))
        return tensor

    setup.engine.update_weights((name, copy(parameter)) for name, parameter in setup.model.named_parameters())
    assert len(given) > 20 and most <= (2 if isinstance(setup.engine, engine_module.HFEngine) else 8)
    requests = prompts(3, seed=95)
    check_against_model(setup.model, requests, run(setup.engine, requests, GREEDY), GREEDY)


def test_updates_are_refused_while_requests_run(setup):
    setup.engine.submit("running", [1, 2, 3], GREEDY)
    setup.engine.step()
    with pytest.raises(RuntimeError, match="requests are running"):
        setup.engine.update_weights(setup.model.named_parameters())
    drain(setup.engine, 1)
    setup.engine.update_weights(setup.model.named_parameters())


def test_abort_in_mid_flight_leaves_the_engine_usable(setup):
    engine = setup.engine
    requests = prompts(30, seed=70)  # more than fit: some are aborted while they wait
    expected = run(engine, requests, GREEDY)
    for name, prompt in requests.items():
        engine.submit(name, prompt, GREEDY)
    for _ in range(4):
        assert not engine.step()
    gone = list(requests)[::2]
    engine.abort([*gone, "unknown"])
    done = drain(engine, 15)
    assert set(done) == set(requests) - set(gone)
    done |= run(engine, {name: requests[name] for name in gone}, GREEDY)  # the same ids again
    assert tokens(done) == tokens(expected)
    assert engine.step() == {}


def test_second_turn_computes_only_its_new_tokens(setup):
    """Ids of turn 2 = ids of turn 1 + 10 more. HFEngine finds every token again, vLLM only whole blocks of 32."""
    engine = setup.engine
    requests = prompts(5, seed=80, low=100, high=120)
    done = run(engine, requests, dataclasses.replace(GREEDY, max_tokens=30))
    longer = {name: requests[name] + done[name].token_ids + list(range(10)) for name in requests}
    engine.stats.clear()
    check_against_model(setup.model, longer, run(engine, longer, GREEDY), GREEDY)
    new = 10 + 1  # the last sampled token has never been an input
    slack = 0 if isinstance(engine, engine_module.HFEngine) else 32
    assert 5 * new <= engine.stats["prefill_tokens"] <= 5 * (new + slack)
    assert engine.stats["cached_tokens"] + engine.stats["prefill_tokens"] == sum(map(len, longer.values()))
    assert engine.stats["decode_tokens"] == 5 * 12


def test_weights_survive_sleep_on_a_cpu(setup):
    requests = prompts(3, seed=90)
    before = run(setup.engine, requests, GREEDY)
    setup.engine.sleep()
    setup.engine.wake_up()
    assert tokens(run(setup.engine, requests, GREEDY)) == tokens(before)


# ------------------------------------------------------------------------------------------- HFEngine only


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    random_model("qwen2", seed=1).save_pretrained(path)
    return path


def two_turns(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """40 requests in groups of four with the same prompt; a second turn starts as soon as the first ends."""
    draw = random.Random(7)
    alive = {}
    for name, prompt in prompts(10, seed=100).items():
        alive |= {f"{name}/{i}": prompt for i in range(4)}
    samplings = {n: Sampling(1.0, 1.0, draw.randint(5, 30), i, (3, 4)) for i, n in enumerate(alive)}
    for name, ids in alive.items():
        engine.submit(name, ids, samplings[name])
    history, second = [], set()
    while len(history) < 80:
        for name, completion in engine.step().items():
            history.append((completion.token_ids, completion.logprobs))
            if name not in second:
                second.add(name)
                engine.submit(name, alive[name] + completion.token_ids + [1, 2, 3] * 5, samplings[name])
    return history


@pytest.mark.quick
def test_hf_repeats_bit_for_bit(model_dir):
    config = engine_config()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = two_turns(make_engine(config, model_dir))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    torch.rand(5)
    engine = make_engine(config, model_dir)
    assert two_turns(engine) == first
    engine.update_weights(engine.model.named_parameters())  # forgets all prefixes
    assert two_turns(engine) == first


@pytest.mark.quick
def test_hf_shares_prompts_between_requests(model_dir):
    """Eight requests with one prompt of 50 tokens: it is computed once, then each computes its last token."""
    engine = make_engine(engine_config(), model_dir)
    (prompt,) = prompts(1, seed=110, low=50, high=50).values()
    samplings = {str(i): Sampling(1.0, 1.0, 10, i, ()) for i in range(8)}
    done = run(engine, {name: prompt for name in samplings}, samplings)
    assert engine.stats["prefill_tokens"] == 50 + 7
    for name, completion in done.items():
        fresh = make_engine(engine_config(), model_dir)
        assert run(fresh, {name: prompt}, samplings[name])[name].token_ids == completion.token_ids


@pytest.mark.quick
def test_hf_long_prompts_are_spread_over_steps(model_dir, monkeypatch):
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


@pytest.mark.quick
def test_hf_copies_a_prefix_before_its_row_is_given_away(model_dir):
    """Two rows. In one step, a request copies the prefix that row 0 holds, and an unrelated one takes row 0 over."""
    engine = make_engine(dataclasses.replace(engine_config(), kv_tokens=512), model_dir)
    prompt, unrelated = prompts(2, seed=115, low=50, high=50).values()
    run(engine, {"first": prompt}, GREEDY)
    engine.stats.clear()
    requests = {"copies": [*prompt, 1, 2, 3], "takes over": unrelated}
    check_against_model(random_model("qwen2", seed=1), requests, run(engine, requests, GREEDY), GREEDY)
    assert engine.stats["cached_tokens"] == 50


@pytest.mark.quick
def test_hf_a_next_turn_goes_on_in_its_own_row(model_dir):
    """Two rows, both needed: a turn that took the other row would have to compute its prefix again."""
    engine = make_engine(dataclasses.replace(engine_config(), kv_tokens=512), model_dir)
    requests = prompts(2, seed=116, low=50, high=50)
    done = run(engine, requests, GREEDY)
    engine.stats.clear()
    longer = {name: requests[name] + done[name].token_ids + [1, 2, 3] for name in reversed(requests)}
    check_against_model(random_model("qwen2", seed=1), longer, run(engine, longer, GREEDY), GREEDY)
    assert engine.stats["prefill_tokens"] == 2 * (3 + 1)


@pytest.mark.quick
def test_hf_few_slots_serve_many_requests(model_dir):
    """Two slots and 12 requests in two turns: evicted prefixes are computed again, results stay the same."""
    requests = prompts(12, seed=130)
    small = make_engine(dataclasses.replace(engine_config(), kv_tokens=512), model_dir)
    large = make_engine(engine_config(), model_dir)
    assert small.capacity_tokens == 512
    for _ in range(2):
        done = run(small, requests, GREEDY)
        expected = run(large, requests, GREEDY)
        assert tokens(done) == tokens(expected)
        requests = {name: ids + expected[name].token_ids for name, ids in requests.items()}


@pytest.mark.quick
def test_hf_refuses_what_it_cannot_do(model_dir):
    engine = make_engine(engine_config(), model_dir)
    for ids in ([], [1] * 256):
        with pytest.raises(ValueError):
            engine.submit("a", ids, GREEDY)
    with pytest.raises(KeyError, match="typo"):
        engine.update_weights([("typo", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"no values for .*model\.norm\.weight"):
        engine.update_weights((n, p) for n, p in engine.model.named_parameters() if n != "model.norm.weight")


@pytest.mark.quick
def test_missing_vllm_is_said_clearly(model_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vllm is not installed"):
        make_engine(engine_config(engine="vllm"), model_dir)
    assert isinstance(make_engine(engine_config(engine="auto"), model_dir), engine_module.HFEngine)


@pytest.mark.quick
def test_hf_owns_its_weights(model_dir):
    engine = make_engine(engine_config(), model_dir)
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    engine.update_weights(other.named_parameters())
    before = run(engine, {"a": [1, 2, 3]}, GREEDY)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert tokens(run(engine, {"a": [1, 2, 3]}, GREEDY)) == tokens(before)
