"""The model under training: its token log-probabilities, the optimizer step, checkpoints, and
weights for the engine.

Sequences are joined without padding, and what those of a group share is computed once; the head
runs only where a sampled token is predicted (grpo.HeadLoss). With several ranks, FSDP2 shards
everything, and all compute one plan: the work is balanced, whoever sampled what. Never run by us,
for want of a GPU: FSDP over NCCL, offload to CPU memory. Omitted: tensor, pipeline and sequence
parallelism; biased heads, logit scaling and soft-capping: refused (architecture.py).
"""

import math
import os
import shutil
import sys
from collections import Counter
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from deepresearcher_min import grpo
from deepresearcher_min.architecture import (
    add_adapters,
    check_architecture,
    full_weights,
    load_model,
    save_settings,
    whole,
)
from deepresearcher_min.config import ConfigError, named
from deepresearcher_min.grpo import TrainingRow, training_rows
from deepresearcher_min.run import Ranks, complete_checkpoints

LOSS_KEYS = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "importance_cap")  # of the config
METRICS = ("kl", "mismatch", "entropy", "clip_fraction", "capped_fraction", "rare_share", "masked")


class TokenScorer(nn.Module):
    """Backbone and head in one module. FSDP wraps this: calling parts of a wrapped module goes
    around its hooks.
    """

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        self.config = config
        self.dtype = getattr(torch, config.dtype)

    def forward(self, batch, loss=None):
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
        hidden_SD = hidden_SD / self.config.temperature  # as if the logits were divided
        weight_VD = self.model.get_output_embeddings().weight
        return grpo.HeadLoss.apply(
            hidden_SD, weight_VD, batch.targets_S, self.config.logprob_chunk, loss
        )


class Policy:
    """The model under training. With several ranks all call every method together."""

    def __init__(self, config, model_dir, ranks, tried=False):
        """float32 master weights, compute in config.dtype, reduction in float32; a frozen reference
        if kl_coef > 0. With lora_rank only adapters are trained, on a model frozen in config.dtype,
        which without them is the reference.

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
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.reference = None
        if config.kl_coef:
            # Loaded exactly like the policy, so that the KL of the first step is exactly zero.
            self.reference = (
                self.without_adapters
                if config.lora_rank
                else self.load_model(model_dir).requires_grad_(False)
            )
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        # AdamW would make these in its first step only: too late for a checkpoint to load into.
        for p in self.trained.values():
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.rollouts = 0  # update() calls so far, for warm-up and decay
        self.compared = False  # with the engine, in this process

    def load_model(self, model_dir):
        compute = getattr(torch, self.config.dtype)
        master = torch.promote_types(compute, torch.float32)
        rank = self.config.lora_rank
        model = load_model(model_dir, compute if rank else master, "packed")
        if rank:
            add_adapters(model, rank, master)
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in layers:
                layer.training = True  # it checkpoints only then; the dropouts in it stay off
        scorer = TokenScorer(model, self.config)
        if self.ranks.world_size == 1:
            return scorer.to(self.ranks.device)
        device = self.ranks.device.type
        options = {
            "mesh": dist.init_device_mesh(device, (self.ranks.world_size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master),
            "reshard_after_forward": True,
        }
        if self.config.offload_optimizer:
            # Gathered and reduced on the GPU all the same; only the gradient's norm is summed on
            # the CPU, by the gloo of "cpu:gloo,cuda:nccl".
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device == "cuda")
        for layer in layers:
            fully_shard(layer, **options)
        return fully_shard(scorer, **options)

    def update(self, groups, engine=""):
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

    def learn(self, groups, engine):
        sums = Counter()
        norms = []
        trained = 0
        log_weights = [-math.inf]  # max needs one
        for rows, batches, total in self.prepare(groups):
            for batch in batches:
                sums.update(self.backward(batch, total))
                log_weights += grpo.sequence_log_weights(batch).tolist()
            if engine and not self.compared:
                self.compare_with(engine, sums)
            norm = self.clip_gradient()
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"gradient norm {norm} {self.blame(rows)}; this update changed no weights"
                )
            self.step()
            norms.append(norm)
            trained += total
        self.rollouts += 1
        sums = self.ranks.total(sums)
        largest = max(self.ranks.gather(log_weights))
        # Means over the computed tokens, those of skipped trajectories excluded; the loss over all.
        return {name: sums[name] / max(1, sums["tokens"]) for name in METRICS} | {
            "loss": sums["loss"] / max(1, trained),
            "logprob_good": sums["logprob_good"] / (sums["good_tokens"] or math.nan),
            "weight_max": math.exp(min(largest, grpo.EXPONENT_LIMIT)),
            "grad_norm": sum(norms) / max(1, len(norms)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "updates": len(norms),
            "trained_tokens": trained,
        }

    def prepare(self, groups):
        """What each optimizer step needs, made before the first: each takes its share of the
        questions.

        A trajectory without advantage is skipped only if it would get no gradient at all (kl_coef
        and entropy_coef 0); its tokens stay in N.
        """
        questions = self.ranks.gather([training_rows(group) for group in groups])
        count = self.config.updates_per_rollout
        always = self.config.kl_coef or self.config.entropy_coef
        steps = []
        for u in range(count):
            share = slice(len(questions) * u // count, len(questions) * (u + 1) // count)
            rows = []
            for question in questions[share]:
                rows += question
            total = sum(len(row.sampled) for row in rows)
            rows = [row for row in rows if always or row.advantage]
            batches = self.plan(rows)
            # Later steps need old_S from before the weights move. In the first, old is new; but
            # sequence_mask judges a whole trajectory, so before its first gradient.
            if u or self.config.sequence_mask:
                for batch in batches:
                    batch.old_S = self.score(self.scorer, batch)
            if total:
                steps.append((rows, batches, total))
        return steps

    def compare_with(self, engine, sums):
        """ValueError if the engine's log-probabilities are further from ours than rounding
        explains: another model.
        """
        found = self.ranks.total(sums)
        mismatch = found["mismatch"] / max(1, found["tokens"])
        limit = 0.1 if self.config.dtype == "bfloat16" else 1e-3  # nats
        if not mismatch <= limit:  # nan, too
            raise ValueError(
                f"engine={engine}: its log-probabilities differ from the policy's by "
                f"{mismatch:.2g} nats a token on average (mismatch; limit {limit:g} for "
                f"dtype={self.config.dtype}): it computes another model"
            )
        self.compared = bool(found["tokens"])

    def plan(self, rows):
        """This rank's micro-batches (PackedBatch) of the given rows, the same on all ranks."""
        plan = grpo.plan_microbatches(
            rows,
            self.config.microbatch_tokens,
            self.ranks.world_size,
            self.model.config.get_text_config().hidden_size,
        )
        return [grpo.pack(batch, self.ranks.device) for batch in plan[self.ranks.rank]]

    @torch.no_grad()
    def score(self, scorer, batch):
        """log-probabilities_S of a micro-batch."""
        _, logprobs_S = scorer(batch)
        check_finite(logprobs_S, batch)
        return logprobs_S

    def without_adapters(self, batch):
        """What TokenScorer gives for the model before LoRA."""
        self.model.disable_adapters()
        for p in self.trained.values():
            # disable_adapters froze them, but FSDP's first pass asks what is trained for its type.
            p.requires_grad_()
        found = self.scorer(batch)
        self.model.enable_adapters()
        return found

    def backward(self, batch, total):
        """Add one micro-batch's gradient to the others'; returns its sums of metrics. total: N."""
        ref_S = self.score(self.reference, batch) if self.reference else None
        sums = Counter()
        value, logprobs_S = self.scorer(batch, self.loss_of(batch, ref_S, total, sums))
        check_finite(logprobs_S, batch)
        value.backward()
        if batch.old_S is None:
            batch.old_S = logprobs_S
        return {name: float(value) for name, value in sums.items()}

    def loss_of(self, batch, ref_S, total, sums):
        """The loss of one chunk of a micro-batch; its metrics are added to sums. ref_S:
        log-probabilities, None where there is no reference.
        """
        options = {key: getattr(self.config, key) for key in LOSS_KEYS}
        old_S = batch.old_S
        kept_S = torch.ones_like(batch.rollout_S)
        if self.config.sequence_mask and old_S is not None:
            kept_S = grpo.kept(batch, self.config.sequence_mask)

        def loss(new_C, entropy_C, part):
            old_C = new_C.detach() if old_S is None else old_S[part]
            ref_C = None if ref_S is None else ref_S[part]
            losses_C, metrics = grpo.token_losses(
                new_C,
                old_C,
                rollout_S=batch.rollout_S[part],
                ref_S=ref_C,
                advantages_S=batch.advantages_S[part],
                entropy_S=entropy_C,
                kept_S=kept_S[part],
                **options,
            )
            sums.update(metrics)
            return losses_C.sum() * (self.ranks.world_size / total)  # FSDP averages over ranks

        return loss

    def clip_gradient(self):
        """To max_grad_norm; its norm before that, over all ranks."""
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

    def blame(self, rows):
        """Whose gradient alone is not finite; takes time, but only on the way to an error."""
        for row in rows:
            self.optimizer.zero_grad()
            self.backward(grpo.pack([row], self.ranks.device), 1)
            if not np.isfinite(self.clip_gradient()):
                return f"from {row.name}"
        return "from all trajectories together, from none alone"

    def named_weights(self):
        """Full weights under their Hugging Face names in config.dtype, one by one: copy them;
        exhaust on every rank.
        """
        return full_weights(self.model, self.ranks.device, self.scorer.dtype)

    def save(self, folder):
        """Write model, optimizer and warm-up position into a new folder; any number of ranks can
        load it.
        """
        dcp.save(self.state(), checkpoint_id=folder, no_dist=self.ranks.world_size == 1)

    def load(self, folder):
        state = self.state()  # the tensors themselves: they are loaded in place
        dcp.load(state, checkpoint_id=folder, no_dist=self.ranks.world_size == 1)
        self.rollouts = int(state["rollouts"])

    def state(self):
        return {
            "model": self.trained,
            "optimizer": self.optimizer.state_dict()["state"],
            "rollouts": torch.tensor(self.rollouts),
        }

    def export(self, folder, tokenizer):
        """Write a plain Hugging Face folder (rank 0 writes), which transformers and vLLM load; in
        it, LoRA's adapter as a folder of peft's.
        """
        writes = self.ranks.rank == 0
        weights = {
            name: tensor.cpu().contiguous() for name, tensor in self.named_weights() if writes
        }
        if writes:
            save_settings(self.model, self.scorer.dtype, tokenizer, folder)
            save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        if self.config.lora_rank:
            # Not beside the weights: transformers would add it to them once more.
            device = self.ranks.device
            factors = {name: whole(p, device).cpu() for name, p in self.trained.items()}
            if writes:
                self.model.save_pretrained(f"{folder}/adapter", state_dict=factors)

    def check_saving(self, tokenizer):
        """ConfigError for an export that fails, or checkpoints without room: the weights and
        AdamW's two moments in float32, and the exported weights; one more than are kept.
        """
        if self.ranks.rank:
            return
        config = self.config
        run = config.run_dir
        remedy = "a checkpoint cannot hold its settings"
        with named("model", config.model, remedy), TemporaryDirectory(dir=run) as folder:
            save_settings(self.model, self.scorer.dtype, tokenizer, folder)
        count = config.keep_checkpoints + 1 - len(complete_checkpoints(run))
        trained = self.model.num_parameters(only_trainable=True)
        exported = self.model.num_parameters()
        size = trained * 3 * 4 + exported * self.scorer.dtype.itemsize
        free = shutil.disk_usage(run).free
        if count * size > free:
            raise ConfigError(
                f"keep_checkpoints={config.keep_checkpoints}: {count} more of {size / 1e9:,.3f} GB "
                f"are needed, and run_dir={run} has {free / 1e9:,.3f} GB free; "
                "keep fewer, or name another folder"
            )


def check_finite(logprobs_S, batch):
    """FloatingPointError naming the first trajectory of which one is nan or infinite."""
    bad = (~torch.isfinite(logprobs_S)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise FloatingPointError(
            f"{batch.names[batch.owner_S[first]]}: log-probability {float(logprobs_S[first])}"
        )


def trial(config, folder, prompts):
    """The update's log-probabilities of all tokens but the first (architecture.difference)."""
    policy = Policy(config, folder, Ranks(), tried=True)
    rows = []  # one group, longest first as pack sorts them; no rollout and no advantage: zeros
    for ids in prompts:
        sampled = np.arange(1, len(ids))
        rows.append(TrainingRow("trial", np.array(ids), sampled, 0.0 * sampled, 0.0, "trial"))
    logprobs_S = policy.score(policy.scorer, grpo.pack(rows))
    return zip(prompts, logprobs_S.split([len(ids) - 1 for ids in prompts]), strict=True)
