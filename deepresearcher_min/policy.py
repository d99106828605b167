"""The policy: the model under training, its token log-probabilities, the optimizer step, checkpoints, and weights.

Place in the loop: train.py hands over the groups of one rollout (`update`), then streams the weights to the engine
(`named_weights`). The mathematics of the loss is in grpo.py; here it meets a model.

How the update stays small and fast:
- sequences are joined without padding, and attention runs once per sequence (`packed_attention`);
- the output head runs only at positions that predict a sampled token, a chunk at a time, and each chunk goes forward
  and backward at once: the loss is a sum over tokens, so the gradient with regard to the hidden states can be
  collected first and sent through the backbone in one piece. No [T, vocabulary] tensor ever exists;
- with several ranks, FSDP2 shards parameters, gradients, optimizer and reference model.

Every rank sees the (light) token arrays of all ranks and computes the same plan, so the work is balanced, and the
gradient does not depend on who sampled what.

Omitted: tensor, pipeline and sequence parallelism, which a 7B model at 32k tokens on one node does not need; logit
scaling or soft-capping of the few architectures that have it. Tested with Qwen2 and Llama.
Never run by us, for want of a GPU: everything that needs one (bfloat16 FSDP over NCCL, CPU offload).
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedTokenizerBase

from deepresearcher_min import grpo
from deepresearcher_min.config import Config
from deepresearcher_min.grpo import PackedBatch, ScoredTrajectory
from deepresearcher_min.trajectory import Group, Trajectory

Loss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]  # (new_S, entropy_S, which of S) -> scalar


def packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    scaling: float | None = None, sliding_window: int | None = None, lengths: Sequence[int] = (), **unused: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention inside each of the joined sequences: [1, heads, T, head width] -> [1, T, heads, head width].

    transformers calls this in every layer and passes `lengths` through from the model's call; for an attention that
    it does not know it builds no mask, so nothing here is [T, T]. On a GPU, SDPA picks its flash kernel for each
    sequence; flash-attention's varlen kernel would do all of them in one launch (not tried: no GPU here).
    """
    if sliding_window and max(lengths) > sliding_window:
        raise ValueError(f"a sequence of {max(lengths)} tokens needs the sliding window of {sliding_window}: not built")
    pieces = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


class TokenScorer(nn.Module):
    """Backbone and head in one module. FSDP wraps this: calling parts of a wrapped module goes around its hooks."""

    def __init__(self, model: nn.Module, temperature: float, chunk: int, entropy_gradient: bool):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.chunk = chunk
        self.entropy_gradient = entropy_gradient

    def forward(
        self, batch: PackedBatch, loss: Loss | None = None, temperature: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy at each sampled token, both [S]; or, given a loss, its gradient.

        With a loss, each chunk's loss goes backward through the head here, and the result is (hidden_SD,
        its gradient): the caller continues with hidden_SD.backward(gradient).
        """
        temperature = temperature or self.temperature
        output = self.model.base_model(
            input_ids=batch.token_ids_T[None],
            position_ids=batch.position_ids_T[None],
            lengths=batch.lengths,
            use_cache=False,
        )
        hidden_SD = output.last_hidden_state[0, batch.predict_S]
        chunks, results = hidden_SD.split(self.chunk), []
        for i, chunk in enumerate(chunks):  # no sampled token: one empty chunk
            part = slice(i * self.chunk, (i + 1) * self.chunk)
            if loss is None:
                results.append(self.head(chunk, batch.targets_S[part], temperature))
                continue
            leaf = chunk.detach().requires_grad_()
            loss(*self.head(leaf, batch.targets_S[part], temperature), part).backward()
            results.append((leaf.grad,))
        if loss is None:
            return tuple(torch.cat(values) for values in zip(*results, strict=True))
        return hidden_SD, torch.cat([gradient for (gradient,) in results])

    def head(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of the targets and entropy of the distribution, in float32 or better, both [chunk]."""
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        all_logprobs = logits.log_softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_gradient):
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        return all_logprobs.gather(-1, targets[:, None])[:, 0], entropy


class Policy:
    """The model under training on this rank; all methods are collective: every rank must call them in step."""

    def __init__(self, config: Config, model_dir: str, device: torch.device | str, world_size: int = 1):
        """Load model_dir as float32 master weights, and once more as the frozen reference if kl_coef > 0.

        world_size > 1 needs an initialised process group. Compute is in config.dtype (autocast on one rank, FSDP's
        mixed precision on several), reduction in float32.
        """
        if config.offload_optimizer and world_size == 1:
            raise ValueError("offload_optimizer=true needs FSDP: start with torchrun and at least 2 processes")
        self.config, self.device, self.world_size = config, torch.device(device), world_size
        self.compute_dtype = getattr(torch, config.dtype)
        self.scorer = self.load_model(model_dir)
        self.model = self.scorer.model
        self.reference = self.load_model(model_dir).requires_grad_(False) if config.kl_coef > 0 else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.rank = dist.get_rank() if world_size > 1 else 0
        self.rollouts = 0  # update() calls so far, for the warm-up

    def load_model(self, model_dir: str) -> TokenScorer:
        # The reference is loaded exactly like the policy, so that the KL of the first step is exactly zero.
        master = torch.promote_types(self.compute_dtype, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=master, attn_implementation="packed")
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # checkpointing is off in eval mode; packed_attention applies no dropout
        config = self.config
        scorer = TokenScorer(model, config.temperature, config.logprob_chunk, config.entropy_coef > 0)
        if self.world_size == 1:
            return scorer.to(self.device)
        options = {
            "mesh": dist.init_device_mesh(self.device.type, (self.world_size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=master),
            "offload_policy": CPUOffloadPolicy() if config.offload_optimizer else OffloadPolicy(),
        }
        for layer in model.base_model.layers:
            fully_shard(layer, **options)
        return fully_shard(scorer, **options)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Take config.updates_per_rollout optimizer steps on this rank's groups and return the step's metrics.

        Each update takes its share of the questions of all ranks. Metrics are means over the sampled tokens of the
        whole rollout, over all ranks. A group without advantages is skipped only if nothing else could move the
        weights (kl_coef and entropy_coef 0); its tokens stay in N. Raises FloatingPointError, before the weights are
        touched, naming the question whose reward, log-probability or gradient is not finite.
        """
        questions = self.gather([score_group(group) for group in groups])
        updates = self.config.updates_per_rollout
        cuts = [len(questions) * u // updates for u in range(updates + 1)]
        parts = [[row for rows in questions[a:b] for row in rows] for a, b in itertools.pairwise(cuts)]
        plans = [self.plan(rows) for rows in parts]
        # For the first update old is new itself; for later ones it must be computed before the weights move.
        old = [[None] * len(plans[0])] + [[self.score(self.scorer, batch) for batch in plan] for plan in plans[1:]]
        sums: Counter[str] = Counter()
        norms = []
        for rows, plan, old_plan in zip(parts, plans, old, strict=True):
            total = sum(int(row.sampled_mask.sum()) for row in rows)  # N
            if total == 0:
                continue
            for batch, old_S in zip(plan, old_plan, strict=True):
                sums.update(self.backward(batch, old_S, total))
            norms.append(self.optimizer_step(rows))
        self.rollouts += 1
        return self.metrics(sums, norms, sum(int(row.sampled_mask.sum()) for rows in parts for row in rows))

    def gather(self, questions: list[list[ScoredTrajectory]]) -> list[list[ScoredTrajectory]]:
        """All ranks' questions, in the order before they were dealt out one by one (data.deal)."""
        if self.world_size == 1:
            return questions
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, questions)
        longest = max(len(share) for share in shares)
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def plan(self, rows: Sequence[ScoredTrajectory]) -> list[PackedBatch]:
        """This rank's micro-batches of the given rows, which are the same on all ranks."""
        moving = self.config.kl_coef > 0 or self.config.entropy_coef > 0
        kept = [row for row in rows if row.num_inputs and (moving or row.advantage != 0)]
        plan = grpo.plan_microbatches(
            [row.num_inputs for row in kept],
            self.config.microbatch_tokens,
            self.world_size,
            self.model.config.hidden_size,
        )
        return [grpo.pack([kept[i] for i in indices], self.device) for indices in plan[self.rank]]

    def autocast(self) -> Any:
        if self.world_size > 1 or self.compute_dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.no_grad()
    def score(self, scorer: TokenScorer, batch: PackedBatch, temperature: float | None = None) -> torch.Tensor:
        """Log-probabilities of the sampled tokens, [S]; not finite ones raise FloatingPointError."""
        with self.autocast():
            logprobs_S, _ = scorer(batch, temperature=temperature)
        check_finite("log-probability", logprobs_S, batch)
        return logprobs_S

    def backward(self, batch: PackedBatch, old_S: torch.Tensor | None, total: int) -> dict[str, float]:
        """Add the gradient of one micro-batch; returns its sums of metrics. total is N."""
        config = self.config
        clips = {name: getattr(config, name) for name in ("clip_low", "clip_high", "importance_cap")}
        ref_S = None if self.reference is None else self.score(self.reference, batch)
        seen = []

        def loss(new: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
            old = new.detach() if old_S is None else old_S[part]
            ref = None if ref_S is None else ref_S[part]
            inputs = (new, old, batch.rollout_S[part], ref, batch.advantages_S[part], entropy)
            losses = grpo.token_losses(*inputs, **clips, kl_coef=config.kl_coef, entropy_coef=config.entropy_coef)
            seen.append((new.detach(), grpo.token_sums(*inputs, losses, **clips)))
            return losses.sum() * (self.world_size / total)  # FSDP averages over ranks

        with self.autocast():
            hidden_SD, gradient_SD = self.scorer(batch, loss)
        check_finite("log-probability", torch.cat([new for new, _ in seen]), batch)
        check_finite("gradient", gradient_SD.sum(-1), batch)
        hidden_SD.backward(gradient_SD)
        sums: Counter[str] = Counter()
        for _, values in seen:
            sums.update({name: value.item() for name, value in values.items()})
        return sums

    def optimizer_step(self, rows: Sequence[ScoredTrajectory]) -> float:
        """Clip, warm up, step; returns the gradient norm before clipping, over all ranks."""
        norm = self.gradient_norm()
        if not np.isfinite(norm):
            raise FloatingPointError(f"gradient norm {norm}: {self.blame(rows)}; the weights are unchanged")
        torch.nn.utils.clip_grads_with_norm_(
            self.model.parameters(), self.config.max_grad_norm, torch.tensor(norm, device=self.device)
        )
        warmup = min(1.0, (self.rollouts + 1) / max(1, self.config.lr_warmup))
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.config.lr * warmup
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradient_norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def blame(self, rows: Sequence[ScoredTrajectory]) -> str:
        """Which trajectories give a gradient that is not finite, each taken alone (only on the way to an error)."""
        plan = grpo.plan_microbatches([row.num_inputs for row in rows], 1, self.world_size)
        for indices in zip(*plan, strict=True):  # one trajectory of each rank at a time
            self.optimizer.zero_grad()
            self.backward(grpo.pack([rows[i] for i in indices[self.rank]], self.device), None, 1)
            if not np.isfinite(self.gradient_norm()):
                return "question " + " or ".join(repr(rows[i].question_id) for group in indices for i in group)
        return "from the sum of all trajectories, none alone"

    def metrics(self, sums: Counter[str], norms: list[float], total: int) -> dict[str, float]:
        """The step's means over all ranks; "loss" is over all N tokens, the others over those not skipped."""
        names = ("loss", "kl", "mismatch", "entropy", "clip_fraction", "capped_fraction", "tokens")
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        reduced = dict(zip(names, values.tolist(), strict=True))
        scored = reduced.pop("tokens")
        means = {name: value / max(1, total if name == "loss" else scored) for name, value in reduced.items()}
        return {
            **means,
            "grad_norm": sum(norms) / max(1, len(norms)),
            "trained_tokens": float(total),
            "updates": float(len(norms)),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def logprobs(self, trajectories: Sequence[Trajectory], temperature: float) -> list[np.ndarray]:
        """The policy's log-probabilities of the sampled tokens of each trajectory, in order, at this temperature.

        With several ranks each rank must pass the same trajectories, and computes all of them.
        """
        rows = [scored(trajectory, 0.0, 0.0) for trajectory in trajectories]
        lengths = [row.num_inputs for row in rows]
        results = [np.zeros(0, np.float32)] * len(rows)
        for indices in grpo.plan_microbatches(lengths, self.config.microbatch_tokens)[0]:
            batch = grpo.pack([rows[i] for i in indices], self.device)
            values = self.score(self.scorer, batch, temperature).float().cpu().numpy()
            ends = np.cumsum([int(rows[i].sampled_mask.sum()) for i in indices])
            for i, piece in zip(indices, np.split(values, ends[:-1]), strict=False):
                results[i] = piece
        return results

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights under their Hugging Face names in config.dtype, one at a time; exhaust it on every rank.

        Shards are cast before they are gathered. A tensor may share memory with the weights: copy, do not keep.
        """
        for name, parameter in self.model.named_parameters():
            tensor = parameter.detach().to(self.device, self.compute_dtype)
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def save(self, folder: str | Path) -> None:
        """Write model, optimizer and warm-up position; any number of ranks can load it again."""
        dcp.save(self.state(), checkpoint_id=folder, no_dist=self.world_size == 1)

    def load(self, folder: str | Path) -> None:
        """Read what save() wrote, also with another number of ranks."""
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=self.world_size == 1)
        set_state_dict(
            self.scorer, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.rollouts = int(state["rollouts"])

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.scorer, self.optimizer)
        return {"model": model, "optimizer": optimizer, "rollouts": torch.tensor(self.rollouts)}

    def export(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a plain Hugging Face folder (rank 0 writes) that transformers and vLLM load."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.named_weights() if self.rank == 0}
        if self.rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.model.config)
        config.dtype = self.compute_dtype
        config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def scored(trajectory: Trajectory, reward: float, advantage: float) -> ScoredTrajectory:
    arrays = (trajectory.token_ids, trajectory.sampled_mask, trajectory.logprobs)
    return ScoredTrajectory(trajectory.question.id, *arrays, float(reward), float(advantage))


def score_group(group: Group) -> list[ScoredTrajectory]:
    """A group's trajectories with their advantages; a reward or advantage that is not finite is an error."""
    for name, values in (("reward", group.rewards), ("advantage", group.advantages)):
        for i, value in enumerate(values):
            if not np.isfinite(float(value)):
                raise FloatingPointError(f"question {group.question.id!r}, trajectory {i}: its {name} is {value}")
    return [scored(*each) for each in zip(group.trajectories, group.rewards, group.advantages, strict=True)]


def check_finite(what: str, values_S: torch.Tensor, batch: PackedBatch) -> None:
    """Stop with the question's name when the model gave something that is not finite at a sampled token."""
    bad = (~torch.isfinite(values_S)).nonzero()
    if len(bad):
        question_id = batch.row_of(int(bad[0])).question_id
        raise FloatingPointError(
            f"question {question_id!r}: {what} {values_S[bad[0]].item()}; the weights are unchanged"
        )
