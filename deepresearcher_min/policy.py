"""The model under training: its token log-probabilities, the optimizer step, checkpoints, and
weights for the engine.

Sequences are joined without padding, and what a group's have in common is computed once; the head
runs only where a sampled token is predicted (grpo.HeadLoss). With several ranks, FSDP2 shards
everything, and all compute one plan: the work is balanced, whoever sampled what. Never run by us,
for want of a GPU: FSDP over NCCL, offload to CPU memory. Omitted: tensor, pipeline and sequence
parallelism; biased heads, logit scaling and soft-capping: refused (architecture.py).
"""

import copy
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from deepresearcher_min import grpo
from deepresearcher_min.architecture import attend, check_architecture, load_model
from deepresearcher_min.config import Config, ConfigError, named
from deepresearcher_min.grpo import PackedBatch, TrainingRow, training_rows
from deepresearcher_min.run import Ranks, complete_checkpoints
from deepresearcher_min.trajectory import Group

LOSS_KEYS = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "importance_cap")  # of the config
METRICS = ("kl", "mismatch", "entropy", "clip_fraction", "capped_fraction", "rare_share")
# Between engine and policy, on average, before the first update [nats]: more is another model.
MISMATCH_LIMITS = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1}


class TokenScorer(nn.Module):
    """Backbone and head in one module. FSDP wraps this: calling parts of a wrapped module goes
    around its hooks.
    """

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model = model
        self.config = config
        self.dtype = getattr(torch, config.dtype)

    def forward(self, batch: PackedBatch, loss: grpo.Loss | None = None) -> tuple:
        """The sum of the losses of all chunks (grpo.HeadLoss), and log-probabilities_S."""
        device = batch.token_ids_T.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype == torch.bfloat16):
            output = self.model.base_model(
                input_ids=batch.token_ids_T[None],
                position_ids=batch.position_ids_T[None],
                lengths=batch.lengths,
                prefix_of=batch.prefix_of,
                use_cache=False,
            )
        hidden_SD = output.last_hidden_state[0, batch.predict_S].to(self.dtype)
        hidden_SD = hidden_SD / self.config.temperature
        weight_VD = self.model.get_output_embeddings().weight
        chunk = self.config.logprob_chunk
        return grpo.HeadLoss.apply(hidden_SD, weight_VD, batch.targets_S, chunk, loss)


class Policy:
    """The model under training. With several ranks all call every method together."""

    def __init__(self, config: Config, model_dir: str, ranks: Ranks, tried: bool = False):
        """float32 master weights, compute in config.dtype, reduction in float32; a frozen reference
        if kl_coef > 0.

        ValueError for an architecture that the update does not compute exactly, unless that was
        `tried`.
        """
        if not tried:
            check_architecture("the update", trial, model_dir, config.max_model_len)
        if config.offload_optimizer and ranks.world_size == 1:
            raise ValueError(
                "offload_optimizer=true needs FSDP: start with torchrun and at least 2 processes"
            )
        self.config = config
        self.ranks = ranks
        self.scorer = self.load_model(model_dir)
        self.model = self.scorer.model
        self.reference = None
        if config.kl_coef > 0:
            # Loaded exactly like the policy, so that the KL of the first step is exactly zero.
            self.reference = self.load_model(model_dir).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        # AdamW would make these in its first step only: too late for a checkpoint to load into.
        for p in self.model.parameters():
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.rollouts = 0  # update() calls so far, for warm-up and decay
        self.compared = False  # with the engine, in this process

    def load_model(self, model_dir: str) -> TokenScorer:
        # transformers builds no [T, T] mask for an attention that it does not know
        AttentionInterface.register("packed", attend)
        compute = getattr(torch, self.config.dtype)
        master = torch.promote_types(compute, torch.float32)
        model = load_model(model_dir, master, "packed")
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in layers:
                layer.training = True  # it checkpoints only then; the dropouts in it stay off
        scorer = TokenScorer(model, self.config)
        if self.ranks.world_size == 1:
            return scorer.to(self.ranks.device)
        device = self.ranks.device.type
        shard = partial(
            fully_shard,
            mesh=dist.init_device_mesh(device, (self.ranks.world_size,)),
            mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master),
            reshard_after_forward=True,
        )
        if self.config.offload_optimizer:
            # Gathered and reduced on the GPU all the same; only the gradient's norm is summed on
            # the CPU, by the gloo of "cpu:gloo,cuda:nccl".
            shard = partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=device == "cuda"))
        for layer in layers:
            shard(layer)
        return shard(scorer)

    def update(self, groups: list[Group], engine: str = "") -> dict:
        """Take config.updates_per_rollout optimizer steps on all ranks' groups, of which these are
        ours; their metrics.

        Raises FloatingPointError naming the question whose reward, log-probability or gradient is
        not finite, before that step touches the weights. The first update is held against the
        engine that sampled, if it is named (compare_with).
        """
        try:
            return self.learn(groups, engine)
        except FloatingPointError as error:
            if self.ranks.world_size == 1:
                raise
            # The others wait for this rank in a collective, and to leave the process group in
            # order would be to wait for them. torchrun ends them when this process has ended.
            self.ranks.say_once(f"FloatingPointError: {error}", sys.stderr)
            sys.stdout.flush()
            os._exit(2)

    def learn(self, groups: list[Group], engine: str) -> dict:
        sums, norms, trained, weights = Counter[str](), [], 0, [-math.inf]
        for rows, batches, total in self.prepare(groups):
            for batch, old_S in batches:
                sums.update(self.backward(batch, old_S, total, weights))
            if engine and not self.compared:
                self.compare_with(engine, sums)
            norms.append(self.optimizer_step(rows))
            trained += total
        self.rollouts += 1
        sums = self.ranks.total(sums)
        # Means over the tokens that were computed, without the skipped trajectories'; but the loss
        # over all.
        means = {name: sums[name] / max(1, sums["tokens"]) for name in METRICS}
        means["loss"] = sums["loss"] / max(1, trained)
        means["logprob_good"] = sums["logprob_good"] / (sums["good_tokens"] or math.nan)
        largest = max(self.ranks.gather(weights))
        means["weight_max"] = math.exp(min(largest, grpo.EXPONENT_LIMIT))
        means["grad_norm"] = sum(norms) / max(1, len(norms))
        rate = self.optimizer.param_groups[0]["lr"]
        return means | {"lr": rate, "updates": len(norms), "trained_tokens": trained}

    def prepare(self, groups: list[Group]) -> list[tuple]:
        """What each optimizer step needs, made before the first: each takes its share of the
        questions.

        A trajectory without advantage is skipped only if it would get no gradient at all (kl_coef
        and entropy_coef 0); its tokens stay in N.
        """
        questions = self.ranks.gather([training_rows(group) for group in groups])
        count = self.config.updates_per_rollout
        always = self.config.kl_coef > 0 or self.config.entropy_coef > 0
        steps = []
        for u in range(count):
            share = slice(len(questions) * u // count, len(questions) * (u + 1) // count)
            rows = list(chain.from_iterable(questions[share]))
            total = sum(len(row.sampled) for row in rows)
            rows = [row for row in rows if always or row.advantage]
            batches = self.plan(rows)
            # In the first step old is new; later ones need it from before the weights move.
            old = [self.score(self.scorer, batch) if u else None for batch in batches]
            if total:
                steps.append((rows, list(zip(batches, old, strict=True)), total))
        return steps

    def compare_with(self, engine: str, sums: Counter):
        """ValueError if the engine's log-probabilities are further from ours than rounding
        explains: another model.
        """
        found = self.ranks.total(sums)
        mismatch = found["mismatch"] / max(1, found["tokens"])
        limit = MISMATCH_LIMITS[self.config.dtype]
        if not mismatch <= limit:
            raise ValueError(
                f"engine={engine}: its log-probabilities differ from the policy's by "
                f"{mismatch:.2g} nats a token on average (mismatch; limit {limit:g} for "
                f"dtype={self.config.dtype}): it computes another model"
            )
        self.compared = bool(found["tokens"])

    def plan(self, rows: list[TrainingRow]) -> list[PackedBatch]:
        """This rank's micro-batches of the given rows, which are the same on all ranks."""
        plan = grpo.plan_microbatches(
            [len(row.token_ids) - 1 for row in rows],
            self.config.microbatch_tokens,
            self.ranks.world_size,
            self.model.config.get_text_config().hidden_size,
            grpo.families(rows),
        )
        batches = []
        for indices in plan[self.ranks.rank]:
            mine = [rows[i] for i in indices]
            batches.append(grpo.pack(mine, self.ranks.device))
        return batches

    @torch.no_grad()
    def score(self, scorer: TokenScorer, batch: PackedBatch) -> Tensor:
        """log-probabilities_S of a micro-batch."""
        _, logprobs_S = scorer(batch)
        check_finite(logprobs_S, batch)
        return logprobs_S

    def backward(
        self, batch: PackedBatch, old_S: Tensor | None, total: int, weights: list
    ) -> Counter:
        """Add one micro-batch's gradient to the others'; returns its sums of metrics. total: N.
        weights: gets the trajectories' log importance weights, too.
        """
        ref_S = None
        if self.reference is not None:
            ref_S = self.score(self.reference, batch)
        sums = Counter[str]()
        loss = self.loss_of(batch, old_S, ref_S, total, sums)
        value, logprobs_S = self.scorer(batch, loss)
        check_finite(logprobs_S, batch)
        value.backward()
        weights += grpo.sequence_weights(logprobs_S if old_S is None else old_S, batch).tolist()
        return Counter({name: float(value) for name, value in sums.items()})

    def loss_of(self, batch: PackedBatch, old_S, ref_S, total: int, sums: Counter) -> grpo.Loss:
        """The loss of one chunk of a micro-batch; its metrics are added to sums. old_S, ref_S:
        log-probabilities, None where they are the new ones or there is no reference.
        """
        options = {key: getattr(self.config, key) for key in LOSS_KEYS}

        def loss(new_C: Tensor, entropy_C: Tensor, part: slice) -> Tensor:
            old_C = new_C.detach() if old_S is None else old_S[part]
            ref_C = None if ref_S is None else ref_S[part]
            known = (batch.rollout_S[part], ref_C, batch.advantages_S[part])
            losses_C, metrics = grpo.token_losses(new_C, old_C, *known, entropy_C, **options)
            sums.update(metrics)
            return losses_C.sum() * (self.ranks.world_size / total)  # FSDP averages over ranks

        return loss

    def optimizer_step(self, rows: list[TrainingRow]) -> float:
        """Clip and step, unless the gradient is not finite; its norm before, over all ranks."""
        norm = self.clip_gradient()
        if not np.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm {norm} {self.blame(rows)}; this update changed no weights"
            )
        self.step()
        return norm

    def clip_gradient(self) -> float:
        """To max_grad_norm; its norm before that."""
        limit = self.config.max_grad_norm
        return float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit)))

    def step(self):
        config = self.config
        rate = config.lr * min(1.0, (self.rollouts + 1) / max(1, config.lr_warmup))
        if config.lr_decay:
            rate *= max(0.0, 1 - self.rollouts / config.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def blame(self, rows: list[TrainingRow]) -> str:
        """Whose gradient alone is not finite; takes time, but only on the way to an error."""
        for row in rows:
            self.optimizer.zero_grad()
            self.backward(grpo.pack([row], self.ranks.device), None, 1, [])
            if not np.isfinite(self.clip_gradient()):
                return f"from {row.name}"
        return "from all trajectories together, from none alone"

    def named_weights(self) -> Iterator[tuple]:
        """Full weights under their Hugging Face names in config.dtype, one by one: copy them;
        exhaust on every rank.
        """
        for name, parameter in self.model.named_parameters():
            # a shard is cast before it is gathered
            yield name, whole(parameter.detach().to(self.ranks.device, self.scorer.dtype))

    def save(self, folder: str | Path):
        """Write model, optimizer and warm-up position into a new folder; any number of ranks can
        load it.
        """
        dcp.save(self.state(), checkpoint_id=folder, no_dist=self.ranks.world_size == 1)

    def load(self, folder: str | Path):
        state = self.state()  # the tensors themselves: they are loaded in place
        dcp.load(state, checkpoint_id=folder, no_dist=self.ranks.world_size == 1)
        self.rollouts = int(state["rollouts"])

    def state(self) -> dict:
        return {
            "model": dict(self.model.named_parameters()),
            "optimizer": self.optimizer.state_dict()["state"],
            "rollouts": torch.tensor(self.rollouts),
        }

    def export(self, folder: str | Path, tokenizer):
        """Write a plain Hugging Face folder (rank 0 writes), which transformers and vLLM load."""
        weights = {}
        for name, tensor in self.named_weights():
            if self.ranks.rank == 0:
                weights[name] = tensor.cpu().contiguous()
        if self.ranks.rank == 0:
            self.export_settings(folder, tokenizer)
            save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})

    def check_saving(self, tokenizer):
        """ConfigError for an export that fails, or checkpoints without room: the weights and
        AdamW's two moments in float32, and the exported weights; one more than are kept.
        """
        if self.ranks.rank:
            return
        config = self.config
        run = Path(config.run_dir)
        remedy = "a checkpoint cannot hold its settings"
        with named("model", config.model, remedy), TemporaryDirectory(dir=run) as folder:
            self.export_settings(folder, tokenizer)
        count = config.keep_checkpoints + 1 - len(complete_checkpoints(run))
        parameters = sum(p.numel() for p in self.model.parameters())
        size = parameters * (3 * 4 + self.scorer.dtype.itemsize)
        free = shutil.disk_usage(run).free
        if count * size > free:
            raise ConfigError(
                f"keep_checkpoints={config.keep_checkpoints}: {count} more of {size / 1e9:,.3f} GB "
                f"are needed, and run_dir={config.run_dir} has {free / 1e9:,.3f} GB free; "
                "keep fewer, or name another folder"
            )

    def export_settings(self, folder: str | Path, tokenizer):
        """All of an exported folder but the weights; of sampling values that contradict each other,
        none.
        """
        config = copy.copy(self.model.config)
        config.dtype = self.scorer.dtype
        generation = self.model.generation_config
        try:
            generation.validate(strict=True)
        except ValueError:  # many published ones; save_pretrained would refuse them
            values = generation.to_dict().items()
            ids = {key: value for key, value in values if key.endswith("_token_id")}
            generation = GenerationConfig(**ids)
        for part in (config, generation, tokenizer):
            part.save_pretrained(folder)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which FSDP keeps a shard on each rank; any other stays as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_finite(logprobs_S: Tensor, batch: PackedBatch):
    """FloatingPointError naming the first trajectory of which one is nan or infinite."""
    bad = (~torch.isfinite(logprobs_S)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise FloatingPointError(
            f"{batch.names_S[first]}: log-probability {float(logprobs_S[first])}"
        )


def trial(config: Config, folder: str, prompts: list) -> list[tuple]:
    """The update's log-probabilities of all tokens but the first (architecture.difference)."""
    policy = Policy(config, folder, Ranks(), tried=True)
    rows = []
    for ids in prompts:
        sampled = np.arange(1, len(ids))
        rows.append(TrainingRow("trial", np.array(ids), sampled, 0.0 * sampled, 0.0, "trial"))
    logprobs_S = policy.score(policy.scorer, grpo.pack(rows))
    counts = [len(row.sampled) for row in rows]
    return list(zip(prompts, logprobs_S.split(counts), strict=True))
