"""The model under training: its token log-probabilities, the optimizer step, checkpoints, and
weights for the engine.

Sequences are joined without padding, and what a group's have in common is computed once; the head
runs only where a sampled token is predicted (grpo.HeadLoss). With
several ranks, FSDP2 shards everything, and all compute one plan: the work is balanced, whoever
sampled what. Never run by us, for want of a GPU: FSDP over NCCL, offload to CPU memory. Omitted:
tensor, pipeline and sequence parallelism; biased heads, logit scaling and soft-capping, which few
architectures have: those are refused (architecture.py).
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from deepresearcher_min import grpo
from deepresearcher_min.architecture import check_architecture
from deepresearcher_min.config import Config, ConfigError, named
from deepresearcher_min.engine import load_model
from deepresearcher_min.grpo import PackedBatch, TrainingRow
from deepresearcher_min.run import Ranks, complete_checkpoints
from deepresearcher_min.trajectory import Group

LOSS_KEYS = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "importance_cap")  # of the config
MISMATCH_LIMITS = {
    "float64": 1e-3,
    "float32": 1e-3,
    "bfloat16": 0.1,
}  # between engine and policy [nats], by dtype
METRICS = (
    "loss",
    "kl",
    "mismatch",
    "entropy",
    "clip_fraction",
    "capped_fraction",
)  # of grpo.token_losses


def attend(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each segment and to its prefix: [1, heads, T, head_dim] -> [1, T,
    heads, head_dim].

    On a GPU, torch.nn.attention.varlen would take one launch for all segments (not tried).
    """
    options = {"scale": given["scaling"], "enable_gqa": query.shape[1] != key.shape[1]}
    # Positions are rotated in float32, and causal_lower_right comes before autocast.
    queries, keys, values = (
        x.to(value.dtype).split(given["lengths"], dim=2) for x in (query, key, value)
    )
    mixed = []
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        if (prefix := given.get("prefix_of", {}).get(i)) is None:
            mixed.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
            continue
        k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        bias = causal_lower_right(q.shape[2], k.shape[2])  # the last query sees the last key
        mixed.append(scaled_dot_product_attention(q, k, v, bias, **options))
    return torch.cat(mixed, dim=2).transpose(1, 2), None


class TokenScorer(nn.Module):
    """Backbone and head in one module. FSDP wraps this: calling parts of a wrapped module goes
    around its hooks.
    """

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.config, self.dtype = model, config, getattr(torch, config.dtype)

    def forward(
        self, batch: PackedBatch, loss: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses of all chunks, and log-probabilities_S; FloatingPointError if one
        is not finite.
        """
        with torch.autocast(
            batch.token_ids_T.device.type, self.dtype, enabled=self.dtype == torch.bfloat16
        ):
            tokens = {
                "input_ids": batch.token_ids_T[None],
                "position_ids": batch.position_ids_T[None],
            }
            segments = {"lengths": batch.lengths, "prefix_of": batch.prefix_of}
            output = self.model.base_model(**tokens, **segments, use_cache=False)
        hidden_SD = (
            output.last_hidden_state[0, batch.predict_S].to(self.dtype) / self.config.temperature
        )
        weight_VD = self.model.get_output_embeddings().weight
        total, logprobs_S = grpo.HeadLoss.apply(
            hidden_SD, weight_VD, batch.targets_S, self.config.logprob_chunk, loss
        )
        if bad := (~torch.isfinite(logprobs_S)).nonzero()[:, 0].tolist():
            raise FloatingPointError(
                f"{batch.names_S[bad[0]]}: log-probability {logprobs_S[bad[0]].item()}"
            )
        return total, logprobs_S


class Policy:
    """The model under training. With several ranks every method is collective: all ranks call it in
    step.
    """

    def __init__(self, config: Config, model_dir: str, ranks: Ranks, tried: bool = False) -> None:
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
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.compute_dtype = getattr(torch, config.dtype)
        self.scorer = self.load_model(model_dir)
        self.model = self.scorer.model
        # Loaded exactly like the policy, so that the KL of the first step is exactly zero.
        self.reference = (
            self.load_model(model_dir).requires_grad_(False) if config.kl_coef > 0 else None
        )
        adam = {
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.weight_decay,
            "fused": True,
        }
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, **adam)
        self.rollouts = 0  # update() calls so far, for warm-up and decay
        self.compared = False  # with the engine, in this process
        # makes the optimizer's state of all parameters: those that no text passes need it in a
        # checkpoint
        self.state()

    def load_model(self, model_dir: str) -> TokenScorer:
        master = torch.promote_types(self.compute_dtype, torch.float32)
        AttentionInterface.register(
            "packed", attend
        )  # transformers builds no [T, T] mask for a strange attention
        model = load_model(model_dir, master, "packed")
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for (
                layer
            ) in model.modules():  # checkpointing is off in eval mode, but dropout must stay so
                layer.training = isinstance(layer, GradientCheckpointingLayer)
        scorer = TokenScorer(model, self.config)
        if self.ranks.world_size == 1:
            return scorer.to(self.device)
        mesh = dist.init_device_mesh(self.device.type, (self.ranks.world_size,))
        precision = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=master)
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": precision,
            "reshard_after_forward": True,
        }
        if (
            self.config.offload_optimizer
        ):  # gradients are then reduced on the CPU, by the gloo of "cpu:gloo,cuda:nccl"
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, **options)
        return fully_shard(scorer, **options)

    def update(self, groups: Sequence[Group], engine: str = "") -> dict[str, float]:
        """Take config.updates_per_rollout optimizer steps on all ranks' groups, of which these are
        ours; their metrics.

        Each step takes its share of the questions. A trajectory without advantage is skipped only
        if it would get no gradient at all (kl_coef and entropy_coef 0); its tokens stay in N.
        Raises FloatingPointError naming the question whose reward, log-probability or gradient is
        not finite, before that step touches the weights. The first update is held against the
        engine that sampled, if it is named (compare_with).
        """
        questions = self.ranks.gather([training_rows(group) for group in groups])
        n, count, updates = len(questions), self.config.updates_per_rollout, []
        for u in range(count):
            rows = [
                row
                for question in questions[n * u // count : n * (u + 1) // count]
                for row in question
            ]
            total = sum(len(row.sampled) for row in rows)  # N
            rows = [
                row
                for row in rows
                if row.advantage or self.config.kl_coef > 0 or self.config.entropy_coef > 0
            ]
            # For the first step old is new itself; for later ones it must be computed before the
            # weights move.
            batches = [
                (batch, self.score(self.scorer, batch) if u else None) for batch in self.plan(rows)
            ]
            updates.append((rows, batches, total))
        sums, norms, trained = Counter[str](), [], 0
        for rows, batches, total in updates:
            if total:
                for batch, old_S in batches:
                    sums.update(self.backward(batch, old_S, total))
                if engine and not self.compared:
                    self.compare_with(engine, sums)
                norms.append(self.optimizer_step(rows))
                trained += total
        self.rollouts += 1
        sums = self.ranks.total(Counter({name: float(value) for name, value in sums.items()}))
        means = {
            name: sums[name] / max(1, sums["tokens"]) for name in METRICS
        }  # without the skipped trajectories
        means |= {
            "loss": sums["loss"] / max(1, trained),
            "grad_norm": sum(norms) / max(1, len(norms)),
        }
        return means | {
            "lr": self.optimizer.param_groups[0]["lr"],
            "updates": len(norms),
            "trained_tokens": trained,
        }

    def compare_with(self, engine: str, sums: Counter[str]) -> None:
        """ValueError if the engine's log-probabilities are further from ours than rounding
        explains: another model.
        """
        found = self.ranks.total(
            Counter({name: float(sums[name]) for name in ("mismatch", "tokens")})
        )
        mismatch, limit = (
            found["mismatch"] / max(1, found["tokens"]),
            MISMATCH_LIMITS[self.config.dtype],
        )
        if not mismatch <= limit:
            raise ValueError(
                f"engine={engine}: its log-probabilities differ from the policy's by {mismatch:.2g} nats a token on "
                f"average (mismatch; limit {limit:g} for dtype={self.config.dtype}): it computes another model"
            )
        self.compared = bool(found["tokens"])

    def plan(self, rows: Sequence[TrainingRow]) -> list[PackedBatch]:
        """This rank's micro-batches of the given rows, which are the same on all ranks."""
        lengths, width = (
            [len(row.token_ids) - 1 for row in rows],
            self.model.config.get_text_config().hidden_size,
        )
        limits = self.config.microbatch_tokens, self.ranks.world_size, width
        plan = grpo.plan_microbatches(lengths, *limits, grpo.families(rows))
        return [
            grpo.pack([rows[i] for i in indices], self.device) for indices in plan[self.ranks.rank]
        ]

    @torch.no_grad()
    def score(self, scorer: TokenScorer, batch: PackedBatch) -> Tensor:
        return scorer(batch)[1]  # log-probabilities_S

    def backward(self, batch: PackedBatch, old_S: Tensor | None, total: int) -> Counter[str]:
        """Add one micro-batch's gradient to the others'; returns its sums of metrics. total is N."""
        ref_S = None if self.reference is None else self.score(self.reference, batch)
        options = {key: getattr(self.config, key) for key in LOSS_KEYS}
        sums = Counter[str]()

        def loss(new: Tensor, entropy: Tensor, part: slice) -> Tensor:
            old = new.detach() if old_S is None else old_S[part]
            ref = None if ref_S is None else ref_S[part]
            tensors = (new, old, batch.rollout_S[part], ref, batch.advantages_S[part], entropy)
            losses, metrics = grpo.token_losses(*tensors, **options)
            sums.update(metrics)
            return losses.sum() * (self.ranks.world_size / total)  # FSDP averages over ranks

        self.scorer(batch, loss)[0].backward()
        return sums

    def optimizer_step(self, rows: Sequence[TrainingRow]) -> float:
        """Clip, set the learning rate, step; returns the gradient norm before clipping, over all
        ranks.
        """
        if not np.isfinite(norm := self.gradient_norm()):
            raise FloatingPointError(
                f"gradient norm {norm} {self.blame(rows)}; this update changed no weights"
            )
        nn.utils.clip_grads_with_norm_(
            self.model.parameters(), self.config.max_grad_norm, torch.tensor(norm)
        )
        warmup = min(1.0, (self.rollouts + 1) / max(1, self.config.lr_warmup))
        decay = (
            max(0.0, 1 - self.rollouts / max(1, self.config.steps)) if self.config.lr_decay else 1.0
        )
        self.optimizer.param_groups[0]["lr"] = self.config.lr * warmup * decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradient_norm(self) -> float:
        # A part of the model that no text passes, as the eyes of one that sees, has no gradients.
        norm = nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def blame(self, rows: Sequence[TrainingRow]) -> str:
        """Whose gradient alone is not finite; takes time, but only on the way to an error."""
        for row in rows:
            self.optimizer.zero_grad()
            self.backward(grpo.pack([row], self.device), None, 1)
            if not np.isfinite(self.gradient_norm()):
                return f"from {row.name}"
        return "from all trajectories together, from none alone"

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full weights under their Hugging Face names in config.dtype, one by one: copy them;
        exhaust on every rank.
        """
        for name, parameter in self.model.named_parameters():
            tensor = parameter.detach().to(
                self.device, self.compute_dtype
            )  # a shard is cast before it is gathered
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def save(self, folder: str | Path) -> None:
        """Write model, optimizer and warm-up position into a new folder; any number of ranks can
        load it.
        """
        dcp.save(self.state(), checkpoint_id=folder, no_dist=self.ranks.world_size == 1)

    def load(self, folder: str | Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=self.ranks.world_size == 1)
        set_state_dict(
            self.scorer,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )
        self.rollouts = int(state["rollouts"])

    def state(self) -> dict[str, Any]:
        untouched = not self.optimizer.state
        model, optim = get_state_dict(self.scorer, self.optimizer)
        if (
            untouched
        ):  # get_state_dict has made the optimizer's state by a step of size zero, and counted it
            for slots in self.optimizer.state.values():
                slots["step"].zero_()
        return {"model": model, "optim": optim, "rollouts": torch.tensor(self.rollouts)}

    def export(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a plain Hugging Face folder (rank 0 writes), which transformers and vLLM load."""
        weights = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.named_weights()
            if self.ranks.rank == 0
        }
        if self.ranks.rank == 0:
            self.export_settings(folder, tokenizer)
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    def check_saving(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """ConfigError for an export that fails, or checkpoints without room: the weights and
        AdamW's two moments in
        float32, and the exported weights; one more than are kept."""
        if self.ranks.rank:
            return
        run, config = Path(self.config.run_dir), self.config
        with (
            named("model", config.model, "a checkpoint cannot hold its settings"),
            TemporaryDirectory(dir=run) as folder,
        ):
            self.export_settings(folder, tokenizer)
        size = sum(p.numel() for p in self.model.parameters()) * (
            3 * 4 + self.compute_dtype.itemsize
        )
        count = config.keep_checkpoints + 1 - len(complete_checkpoints(run))
        free = shutil.disk_usage(run).free
        if count * size > free:
            raise ConfigError(
                f"keep_checkpoints={config.keep_checkpoints}: {count} more of {size / 1e9:,.3f} GB are needed, and "
                f"run_dir={config.run_dir} has {free / 1e9:,.3f} GB free; keep fewer, or name another folder"
            )

    def export_settings(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """All of an exported folder but the weights; of sampling values that contradict each other,
        none.
        """
        config = self.model.config.from_dict(
            self.model.config.to_dict() | {"dtype": self.compute_dtype}
        )
        generation = self.model.generation_config
        try:
            generation.validate(strict=True)
        except ValueError:  # many published ones; save_pretrained would refuse them
            ids = {
                key: value
                for key, value in generation.to_dict().items()
                if key.endswith("_token_id")
            }
            generation = GenerationConfig(**ids)
        for part in (config, generation, tokenizer):
            part.save_pretrained(folder)


def trial(config: Config, folder: str, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Log-probabilities of all tokens but the first ones, as the update computes them
    (architecture.Trial).
    """
    policy = Policy(config, folder, Ranks(), tried=True)
    rows = []
    for ids in prompts:
        sampled = np.arange(1, len(ids))
        rows.append(
            TrainingRow("trial", np.array(ids), sampled, np.zeros(len(sampled)), 0.0, "trial")
        )
    logprobs_S = policy.score(policy.scorer, grpo.pack(rows))
    return list(zip(prompts, logprobs_S.split([len(row.sampled) for row in rows]), strict=True))


def training_rows(group: Group) -> list[TrainingRow]:
    """A group's trajectories that sampled anything; a reward or advantage that is not finite is an
    error.
    """
    rows = []
    for i, (trajectory, advantage) in enumerate(
        zip(group.trajectories, group.advantages, strict=True)
    ):
        name = f"question {group.question.id!r}, trajectory {i}"
        if not np.isfinite([float(group.rewards[i]), float(advantage)]).all():
            raise FloatingPointError(f"{name}: reward {group.rewards[i]}, advantage {advantage}")
        if len(sampled := np.flatnonzero(trajectory.sampled_mask)):
            ids, logprobs = trajectory.token_ids[: sampled[-1] + 1], trajectory.logprobs[sampled]
            rows.append(
                TrainingRow(name, ids, sampled, logprobs, float(advantage), group.question.id)
            )
    return rows
