"""What the tests of the engines share: a config, small models, requests, and what a plain forward
pass says of them.
"""

import dataclasses
import importlib.util
import random
from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deepresearcher_min.config import Config, load_config
from deepresearcher_min.engine import Completion, Engine, HFEngine, Sampling

VOCABULARY = 150
GREEDY = Sampling(temperature=0.0, max_tokens=12, seed=0, stop_token_ids=())
vllm_installed = importlib.util.find_spec("vllm") is not None


def engine_config(**changes) -> Config:
    config = load_config(["--preset=toy"])
    return dataclasses.replace(
        config, max_model_len=256, max_in_flight=24, kv_tokens=24 * 256, **changes
    )


def random_model(kind: str, seed: int):
    """Tied Qwen2 (head_dim 32, biases) or untied Llama with grouped keys; large weights, so that
    nothing is flat.
    """
    sizes = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=96, num_hidden_layers=2)
    torch.manual_seed(seed)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.2) if parameter.dim() == 1 else parameter.normal_(0.0, 0.12)
    return model.eval()


def prompts(count: int, seed: int, low: int = 3, high: int = 60) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {
        f"{seed}/{i}": [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))]
        for i in range(count)
    }


def run(engine: Engine, requests: dict[str, list[int]], samplings: dict[str, Sampling] | Sampling):
    """Submit everything, step until all is done."""
    for name, token_ids in requests.items():
        engine.submit(
            name, token_ids, samplings if isinstance(samplings, Sampling) else samplings[name]
        )
    return drain(engine, len(requests))


def counted(engine: Engine) -> Engine:
    """The engine with `stats`: cached_tokens and prefill_tokens (of prompts: found in the cache, or
    computed), and decode_tokens of the turns that have ended.
    """
    engine.stats = stats = Counter()
    if isinstance(engine, HFEngine):
        admit, step = engine.admit, engine.step

        def counting_admit(name: str) -> int:
            computed = admit(name)
            stats.update(cached_tokens=engine.running[name].past, prefill_tokens=computed)
            return computed

        def counting_step() -> dict[str, Completion]:
            done = step()
            stats["decode_tokens"] += sum(len(turn.token_ids) for turn in done.values())
            return done

        engine.admit, engine.step = counting_admit, counting_step
        return engine
    inner = engine.engine.step

    def counting() -> list:
        results = inner()
        for result in results:
            cached = result.num_cached_tokens or 0
            new = len(result.prompt_token_ids) - cached
            decoded = len(result.outputs[0].token_ids)
            stats.update(cached_tokens=cached, prefill_tokens=new, decode_tokens=decoded)
        return results

    engine.engine.step = counting
    return engine


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
def reference_logprobs(
    model, prompt: list[int], sampled: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """[len(sampled), V] log-probabilities by one plain forward pass, after temperature."""
    logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)


def check_against_model(model, requests, done, sampling: Sampling, limit: float = 1e-3) -> None:
    for name, prompt in requests.items():
        completion = done[name]
        expected = reference_logprobs(
            model, prompt, completion.token_ids, sampling.temperature or 1.0
        )
        if not sampling.temperature:
            assert completion.token_ids == expected.argmax(-1).tolist()
        own = expected[range(len(completion.token_ids)), completion.token_ids]
        assert torch.allclose(torch.tensor(completion.logprobs), own, atol=limit)


def two_turns(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """40 requests in groups of four with the same prompt; a second turn starts as soon as the first
    ends.
    """
    draw = random.Random(7)
    alive = {}
    for name, prompt in prompts(10, seed=100).items():
        alive |= {f"{name}/{i}": prompt for i in range(4)}
    samplings = {n: Sampling(1.0, draw.randint(5, 30), i, (3, 4)) for i, n in enumerate(alive)}
    for name, ids in alive.items():
        engine.submit(name, ids, samplings[name])
    history, second = [], set()
    while len(history) < 80:
        for name, completion in engine.step().items():
            history.append((completion.token_ids, completion.logprobs))
            if name not in second:
                second.add(name)
                engine.submit(
                    name, alive[name] + completion.token_ids + [1, 2, 3] * 5, samplings[name]
                )
    return history
