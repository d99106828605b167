"""Train the tiny start model of the toy web again: `python -m scripts.warm_start --seed=0`, about
ten minutes.

Scripted beginners know the protocol but choose well less than half of the time; the model imitates
them by plain supervised learning from a random initialisation. It starts reinforcement learning
with the form of the task and without its substance. No script takes part after this. Demonstrations
come from the rollout code itself: the scripts stand behind the engine protocol.
"""

import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deepresearcher_min.config import Config, load_config
from deepresearcher_min.corpus import MODEL_DIR, NAMES, World, behaviour_rates, chain_of
from deepresearcher_min.engine import HFEngine
from deepresearcher_min.evaluation import summarize
from deepresearcher_min.protocol import ChatFormat
from deepresearcher_min.report import score_rows, text_table
from deepresearcher_min.rollout import Agent, Batch, Tools, roll_out
from deepresearcher_min.trajectory import Question, Trajectory
from scripts.scripted import Script, ScriptedEngine, items_of
from scripts.toy_tokenizer import (
    ANSWER,
    ANSWER_END,
    CALL_BROWSE,
    CALL_END,
    CALL_SEARCH,
    build_tokenizer,
)


@dataclass(frozen=True)
class Skill:
    """How often a beginner chooses well, decision by decision [probability]."""

    full_name: float  # searches with the full name, not only its last word
    browse: float  # opens the page when the summary lacks the fact
    second_hop: (
        float  # goes on to the second question instead of answering with the first one's answer
    )
    retry: float  # searches again when the page was not among the results

    @classmethod
    def of(cls, talent: float) -> "Skill":
        """Beginners differ: talent is between 0 and 1. The mean one searches badly more often than
        well.
        """
        return cls(*(low + talent * 0.6 for low in (0.15, 0.15, 0.35, 0.3)))


def beginner(question: str, rng: random.Random, skill: Skill) -> Script:
    """Turns of one trajectory.

    It knows nothing of the world but what it is shown. Its thoughts restate the evidence word for
    word, which is what teaches the tiny model to copy.
    """
    subject, relations = chain_of(question)
    evidence = ""
    for hop, relation in enumerate(relations):
        need, value = f"I need the {relation} of {subject}.", None
        for _ in range(3):
            query = subject if rng.random() < skill.full_name else subject.split()[-1]
            shown = yield f"{evidence}{need}{CALL_SEARCH}{query}{CALL_END}"
            results = items_of(shown)
            page = next((result for result in results if result["title"] == subject), None)
            if page is not None or rng.random() > skill.retry:
                break
            evidence = f"I do not see {subject}. "
        if page is not None:
            value = stated(page["quick_summary"], relation)
            if value is None and rng.random() < skill.browse:
                thought = f"The page of {subject} may say it."
                shown = yield f"{thought}{CALL_BROWSE}{page['url']}{CALL_END}"
                notes = " ".join(note["page_summary"] for note in items_of(shown))
                value = stated(notes, relation)
        if value is None:
            seen = re.findall(
                r"The \w+ is ([^.]+)\.", " ".join(r["quick_summary"] for r in results)
            )
            guess = rng.choice(seen or [subject])
            yield f"I guess that it is {guess}.{ANSWER}{guess}{ANSWER_END}"
            return
        evidence = f"The {relation} is {value}. "
        if hop + 1 == len(relations) or rng.random() > skill.second_hop:
            yield f"{evidence}I know the answer.{ANSWER}{value}{ANSWER_END}"
            return
        subject = value


def stated(text: str, relation: str) -> str | None:
    match = re.search(rf"The {relation} is ([^.]+)\.", text)
    return match.group(1) if match else None


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, config: Config, worlds: int, each: int
) -> list[Trajectory]:
    """`each` beginners' trajectories from every one of `worlds` worlds, none of them a world of
    training.
    """
    chat, found = ChatFormat(tokenizer, date=""), []
    for number in tqdm(range(worlds), desc="demonstrations", unit="world"):
        world = World("warm start", f"{config.seed} {number}")
        questions = world.questions(each, number)
        script_of = partial(begin, questions, config.seed)
        engine = ScriptedEngine(tokenizer, tokenizer.eos_token_id, script_of)
        agent = Agent(config, engine, Tools(config, chat, world.corpus), chat)
        batch = Batch(questions, range(each), 1, 1.0, step=number)
        for (trajectory,) in roll_out(batch, agent):
            found.append(trajectory)
    return found


def begin(questions: Sequence[Question], seed: int, request_id: str) -> Script:
    """A beginner of some talent at one of the questions."""
    question = questions[int(request_id.split("/")[1])].text
    rng = random.Random(f"{seed} {request_id} {question}")
    return beginner(question, rng, Skill.of(rng.random()))


def permute_names(ids: np.ndarray, parts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Swap the names of one kind among themselves, the same way all over a sequence: facts cannot
    be memorised.
    """
    table = np.arange(max(part.max() for part in parts) + 1)
    for part in parts:
        table[part] = rng.permutation(part)
    return np.where(ids < len(table), table[np.minimum(ids, len(table) - 1)], ids)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Half a million random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=384,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def warm_start(
    config: Config, folder: Path, steps: int = 3600, tokens: int = 3000, demos: int = 9000
) -> None:
    """Train the tiny model on demonstrations from plain initialisation, and save it as a Hugging
    Face folder.

    Next-token loss with weight 1 on the beginners' tokens, 0.1 on observations (they repeat names,
    too, but little of them can be known), 0 on the prompt; AdamW, learning rate 2e-3 with linear
    decay. No weight is set by hand.
    """
    started = time.process_time()
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    data = demonstrations(tokenizer, config, worlds=61, each=demos // 60)
    # The last world is for copy_accuracy.
    data, fresh = data[: -(demos // 60)], data[-(demos // 60) :]
    names = [np.array(tokenizer.convert_tokens_to_ids(words)) for words in NAMES.values()]
    rng = np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 50, 1 - step / steps) + 1e-3
    )
    lengths = np.array([len(trajectory.token_ids) for trajectory in data])
    bar = tqdm(range(steps), desc="warm start", unit="step")
    for _ in bar:
        start = rng.integers(len(data))  # neighbours in length share a batch: little padding
        near = np.argsort(np.abs(lengths - lengths[start]), kind="stable")
        chosen = rng.permutation(near[:400])[: max(1, tokens // lengths[start])]
        loss = demonstration_loss(model, [data[i] for i in chosen], names, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = (
        f"seed {config.seed}; {demos:,} demonstrations from 60 worlds, {steps:,} steps of about "
        f"{tokens:,} tokens,\n"
        f"AdamW, learning rate 2e-3 with linear decay, {time.process_time() - started:.0f} s of "
        f"CPU time on one thread"
    )
    write_card(config, folder, recipe, copy_accuracy(model, tokenizer, fresh))


def demonstration_loss(
    model: torch.nn.Module,
    chosen: Sequence[Trajectory],
    names: list[np.ndarray],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Mean weighted next-token loss [nats] of a few trajectories, padded on the right."""
    longest = max(len(trajectory.token_ids) for trajectory in chosen)
    ids_BT = np.zeros((len(chosen), longest), np.int64)
    weights_BT = np.zeros((len(chosen), longest), np.float32)
    for row, trajectory in enumerate(chosen):
        length, first = len(trajectory.token_ids), trajectory.turns[0].sampled[0]
        ids_BT[row, :length] = permute_names(trajectory.token_ids, names, rng)
        weights_BT[row, first:length] = np.where(trajectory.sampled_mask[first:], 1.0, 0.1)
    ids, weights = torch.from_numpy(ids_BT), torch.from_numpy(weights_BT)[:, 1:]
    logits = model(
        input_ids=ids[:, :-1]
    ).logits  # causal and padded on the right: padding is never attended to
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def copy_accuracy(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, data: Sequence[Trajectory]
) -> float:
    """How often the most probable token is right where a thought restates a fact: "The mayor is Ada
    Vek." [share].
    """
    the, verb, *stops = tokenizer.convert_tokens_to_ids(["The", "is", ".", ". "])
    right = total = 0
    for trajectory in data:
        ids = trajectory.token_ids.astype(np.int64)
        best = model(input_ids=torch.from_numpy(ids)[None]).logits[0].argmax(-1).numpy()
        restated = trajectory.sampled_mask[3:] & (ids[2:-1] == verb) & (ids[:-3] == the)
        for start in np.flatnonzero(restated) + 3:
            end = start + int(np.isin(ids[start:], stops).argmax())
            right, total = (
                right + (best[start - 1 : end - 1] == ids[start:end]).sum(),
                total + end - start,
            )
    return float(right / total)


def write_card(config: Config, folder: Path, recipe: str, copying: float) -> None:
    """Measure the new model, greedy and sampled, on a world it has not seen, and write README.md
    beside it.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    world, chat = World("held out", config.seed), ChatFormat(tokenizer, date="")
    agent = Agent(config, HFEngine(config, str(folder)), Tools(config, chat, world.corpus), chat)
    questions, columns = world.questions(200, config.seed), {}
    for name, temperature in (("greedy", 0.0), ("sampled, T = 1", 1.0)):
        batch = Batch(questions, range(len(questions)), 1, temperature, step=0)
        found = [trajectory for (trajectory,) in roll_out(batch, agent)]
        columns[name] = summarize(found) | behaviour_rates(found, world)
    weights = load_file(folder / "model.safetensors").values()
    parameters = sum(tensor.numel() for tensor in weights)
    (folder / "README.md").write_text(
        f"""# The toy web's start model

A Llama-architecture model with {parameters:,} parameters and a word-level tokenizer for the toy
web. It knows the form of the task (thoughts, calls, answers, copying names) and little of its
substance: it imitates scripted beginners. Reinforcement learning starts from here.

No weight was set by hand. Recipe: {recipe}.

Measured on 200 questions of a world with other facts (seed {config.seed}; before any reinforcement
learning):

{text_table(score_rows(columns), markdown=True)}

Where a thought restates a fact ("The mayor is Ada Vek."), the most probable token is the right one
for {copying:.1%} of the words of the value, on demonstrations that the model was not trained on.
Reinforcement learning hardly improves copying, so this share limits where it ends; if it is much
lower with another seed, try one more.

Train it again: `python -m scripts.warm_start --seed={config.seed}` (another seed gives another
model; --model=DIR writes it elsewhere, and `train.py --model=DIR` uses it).
"""
    )


if __name__ == "__main__":
    config = load_config(sys.argv[1:])
    warm_start(config, MODEL_DIR if config.model == "toy" else Path(config.model))
