"""The same suite over both engines, against a plain forward pass of the same weights; vLLM really
runs (on CPU).
"""

import dataclasses
import weakref
from collections.abc import Iterator

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
    reference_logprobs,
    run,
    tokens,
    vllm_installed,
)

from deepresearcher_min.engine import Engine, HFEngine, Sampling, make_engine

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_installed, reason="vllm is not installed"),
]


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM ends it for good
        engine = counted(make_engine(engine_config(engine=name), model_dir))
        yield Setup(engine, model, kind, model_dir)
        engine.close()


def test_greedy_equals_plain_forward(setup):
    """Mixed lengths, more requests than slots; the reported log-probability is that of temperature
    1.
    """
    requests = prompts(40, seed=10)
    done = run(setup.engine, requests, GREEDY)
    check_against_model(setup.model, requests, done, GREEDY)
    assert {c.finish_reason for c in done.values()} == {"length"}
    assert len({t for c in done.values() for t in c.token_ids}) > 20, "the test model is degenerate"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_the_sampling_distribution(setup, temperature):
    requests = prompts(12, seed=20)
    sampling = Sampling(temperature, 15, seed=5, stop_token_ids=())
    check_against_model(setup.model, requests, run(setup.engine, requests, sampling), sampling)


def test_settings_may_differ_within_a_batch(setup):
    requests = prompts(9, seed=21)
    kinds = [GREEDY, Sampling(1.0, 12, 3, ()), Sampling(0.5, 7, 4, ())]
    samplings = {name: kinds[i % 3] for i, name in enumerate(requests)}
    done = run(setup.engine, requests, samplings)
    for name, sampling in samplings.items():
        check_against_model(setup.model, {name: requests[name]}, done, sampling)


def test_sampling_follows_the_distribution(setup):
    """1,200 draws of one token: each frequency within 5 standard errors."""
    (prompt,) = prompts(1, seed=30).values()
    count = 1200
    requests = {str(i): prompt for i in range(count)}
    done = run(setup.engine, requests, {name: Sampling(1.0, 1, int(name), ()) for name in requests})
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
        done = run(
            setup.engine,
            {name: prompt},
            dataclasses.replace(GREEDY, stop_token_ids=(stop, VOCABULARY - 1)),
        )
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
    samplings = {name: Sampling(1.0, 20, seed, ()) for seed, name in enumerate(requests)}
    together = run(setup.engine, requests, samplings)
    backwards = run(setup.engine, dict(reversed(requests.items())), samplings)
    for name, prompt in requests.items():
        alone = run(setup.engine, {name: prompt}, samplings[name])[name]
        assert together[name].token_ids == backwards[name].token_ids == alone.token_ids
    name, prompt = next(iter(requests.items()))
    other = run(setup.engine, {name: prompt}, Sampling(1.0, 20, 999, ()))[name]
    assert other.token_ids != together[name].token_ids


def test_weights_are_in_place_after_an_update(setup):
    """The prompts are cached under the old weights: a stale prefix would show, and so would a stale
    tied head.
    """
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
    """Of tensors that nobody else holds, an engine keeps the last one and, vLLM, those of one
    module.
    """
    given, most = [], 0

    def copy(parameter: torch.Tensor) -> torch.Tensor:
        nonlocal most
        tensor = parameter.detach().clone()
        given.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in given))
        return tensor

    setup.engine.update_weights(
        (name, copy(parameter)) for name, parameter in setup.model.named_parameters()
    )
    assert len(given) > 20 and most <= (2 if isinstance(setup.engine, HFEngine) else 8)
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
    """Ids of turn 2 = ids of turn 1 + 10 more. HFEngine finds every token again, vLLM only whole
    blocks of 32.
    """
    engine = setup.engine
    requests = prompts(5, seed=80, low=100, high=120)
    done = run(engine, requests, dataclasses.replace(GREEDY, max_tokens=30))
    longer = {name: requests[name] + done[name].token_ids + list(range(10)) for name in requests}
    engine.stats.clear()
    check_against_model(setup.model, longer, run(engine, longer, GREEDY), GREEDY)
    new = 10 + 1  # the last sampled token has never been an input
    slack = 0 if isinstance(engine, HFEngine) else 32
    assert 5 * new <= engine.stats["prefill_tokens"] <= 5 * (new + slack)
    assert engine.stats["cached_tokens"] + engine.stats["prefill_tokens"] == sum(
        map(len, longer.values())
    )
    assert engine.stats["decode_tokens"] == 5 * 12


def test_weights_survive_sleep_on_a_cpu(setup):
    requests = prompts(3, seed=90)
    before = run(setup.engine, requests, GREEDY)
    setup.engine.sleep()
    setup.engine.wake_up()
    assert tokens(run(setup.engine, requests, GREEDY)) == tokens(before)
