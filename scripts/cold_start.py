"""Teach a chat model the form of research before reinforcement learning: rule-made demonstrations,
imitated by the policy's own update.

    python -m scripts.cold_start --model=DIR --corpus=corpus.jsonl --data=train.jsonl \\
        --eval_data=held_out.jsonl --run_dir=OUT

The questions need `gold_titles` (scripts/question_sets.py writes them); those whose gold passage is
not in the corpus, or holds no answer word for word, are passed over. OUT becomes a Hugging Face
folder that `train.py --model=OUT` takes, with the log in cold_start.jsonl. No question is about an
article of --eval_data, but a search may show one. Keys are config.yaml's, with preset wiki; besides
them:

    --reading_steps=N   steps of reading alone, before the `steps` of whole demonstrations
    --made_up=SHARE     of the questions are made from a sentence of the corpus; a reading example
                        has some of its page besides
    --good_query=P      a researcher searches with all content words of the question, else with its
                        first two
    --good_open=P       it opens a page: the paragraph's if it is among the results, else the first
    --reading_share=S   of the examples in the later steps are reading examples still
    --quote=N           words around the answer are quoted in the thought before it
    --log=NAME          of the log in the folder

The model is to read well and research badly: reading is slow to learn by reward, decisions are not.
So a reading example is one page and several questions about it, each with its last turn, which
costs a fifth of a trajectory for each question; and the decisions of whole demonstrations are good
or poor independently of each other, so that among samples of one question some find the answer and
some do not. Where the answer was not shown, only the decision to answer is imitated, and no guess:
what most demonstrations do is what the model will do. Imitation is the policy's update with
advantage 1, no KL term and no importance weight, at temperature 1, whatever these keys say. The
folder is also written every `save_every` steps, but nothing is resumed. What was measured (rate,
steps, sizes, prompt) stands in scripts/real_model.sh, and so does the control of further imitation,
which is the same from a folder that this has made: --reading_steps=0 --reading_share=0 --made_up=0
--log=metrics.jsonl.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.config import Config, ConfigError, load_config, named  # noqa: E402
from deepresearcher_min.corpus import content_words, load_task  # noqa: E402
from deepresearcher_min.evaluation import make_agent  # noqa: E402
from deepresearcher_min.policy import Policy  # noqa: E402
from deepresearcher_min.protocol import ChatFormat, open_thought  # noqa: E402
from deepresearcher_min.reward import reward  # noqa: E402
from deepresearcher_min.rollout import Agent, Batch, roll_out  # noqa: E402
from deepresearcher_min.run import Ranks  # noqa: E402
from deepresearcher_min.trajectory import (  # noqa: E402
    Group,
    Question,
    Recording,
    Trajectory,
    Turn,
)
from scripts.items import (  # noqa: E402
    PATIENCE,
    Draw,
    Item,
    held_out_articles,
    made_up,
    passages_apart,
    quoted,
    read_items,
)
from scripts.scripted import Script, ScriptedEngine, items_of  # noqa: E402

# The shortest form of a call that protocol.parse_turn reads: a third fewer tokens than with
# "name" and "arguments", and half of what a small model samples is this.
CALL = '</think>\n<tool_call>{}{{"{}": [{}]}}</tool_call>'
SAYS = "It says"  # begins every last turn: the decision to answer
QUESTIONS = 10  # of a reading example at most: the page is computed once for all of them
PAGE = 150  # words of a reading example's page at most


@dataclass(frozen=True)
class Recipe:
    """What the demonstrations are made of; see the module's docstring."""

    reading_steps: int = 40
    made_up: float = 0.4
    good_query: float = 0.4
    good_open: float = 0.4
    reading_share: float = 0.2
    quote: int = 0
    log: str = "cold_start.jsonl"


def search_call(query: str) -> str:
    return CALL.format("web_search", "query", json.dumps(query, ensure_ascii=False))


def open_call(url: str) -> str:
    return CALL.format("browse_webpage", "url_list", json.dumps(url, ensure_ascii=False))


def answer_turn(thought: str, answer: str) -> str:
    return f"{thought}</think>\n<answer>{answer}</answer>"


def reading_turn(text: str, question: Question, most: int) -> str:
    """The last turn, with an answer that the text holds; empty where it holds none. most: words of
    the quote before it, or 0.
    """
    for answer in question.answers:
        quote = quoted(text, answer, question.text, most)
        if quote:
            thought = f"{SAYS}: {quote}" if most else f"{SAYS} so."
            return answer_turn(thought, answer)
    return ""


def researcher(item: Item, rng: random.Random, recipe: Recipe) -> Script:
    """Turns of one trajectory: search, perhaps open a page, read or guess."""
    words = content_words(item.question.text)
    query = " ".join(words if rng.random() < recipe.good_query else words[:2])
    opens = rng.random() < recipe.good_open
    shown = yield f"I search.{search_call(query)}"
    results = [result for result in items_of(shown) if result.get("url")]
    right = [result for result in results if result["title"] == item.title]
    seen = " ".join(result["quick_summary"] for result in right)
    if opens and results:
        page = (right or results)[0]
        shown = yield f"I open it.{open_call(page['url'])}"
        seen = " ".join(note["page_summary"] for note in items_of(shown))
    # Else words that are only there to end the trajectory: imitated() leaves them out.
    nothing = answer_turn(f"{SAYS} nothing", "nothing")
    yield reading_turn(seen, item.question, recipe.quote) or nothing


def begin(items: Sequence[Item], seed: int, recipe: Recipe, request_id: str) -> Script:
    item = items[int(request_id.split("/")[1])]
    return researcher(item, random.Random(f"{seed} {request_id}"), recipe)


def whole(items: Sequence[Item], step: int, agent: Agent, recipe: Recipe) -> list[Trajectory]:
    """A demonstration of each item, by the code that rolls out; guesses are not sampled ones."""
    script_of = partial(begin, items, agent.config.seed, recipe)
    chat = agent.chat
    engine = ScriptedEngine(chat.tokenizer, chat.end_of_turn_id, script_of)
    questions = [item.question for item in items]
    batch = Batch(questions, range(len(items)), 1, 1.0, step)
    found = roll_out(batch, replace(agent, engine=engine))
    return [without_guess(one, chat) for (one,) in found]


def without_guess(one: Trajectory, chat: ChatFormat) -> Trajectory:
    """Of a last turn that is wrong only the beginning counts as sampled: the decision to answer."""
    if one.answer in one.question.answers:
        return one
    mask = one.sampled_mask.copy()
    mask[one.turns[-1].sampled[0] + len(chat.encode(SAYS)) :] = False
    return replace(one, sampled_mask=mask)


def reading(items: Sequence[Item], chat: ChatFormat, quote: int = 0) -> Trajectory | None:
    """A given page, and last turns that read the answers of questions about it, asked in turn."""
    text = " ".join(items[0].text.split()[:PAGE])
    turns = [(item.question, reading_turn(text, item.question, quote)) for item in items]
    turns = [(question, turn) for question, turn in turns if turn][:QUESTIONS]
    if not turns:
        return None  # the page holds none of the answers
    first, _ = turns[0]
    record = Recording(first, chat.prompt_ids(first.text))
    call = "I search." + search_call(" ".join(content_words(first.text)))
    record.append([*chat.encode(call), chat.end_of_turn_id])
    found = [{"quick_summary": text, "title": items[0].title}]
    record.append(chat.observation_ids(str([{"web_page_info_list": found}])))
    for number, (question, turn) in enumerate(turns):
        if number:
            record.append(next_question_ids(question.text, chat))
        ids = [*chat.encode(turn), chat.end_of_turn_id]
        sampled = record.append(ids, [0.0] * len(ids))
        record.turns.append(Turn(sampled, (sampled[1], sampled[1]), turn, "answer"))
    return record.finish("answer", first.answers[0])


def next_question_ids(question: str, chat: ChatFormat) -> list[int]:
    """What follows an answer's end token, where the user asks once more."""
    _, _, behind = chat.around_turn({"role": "user", "content": question})
    behind = behind.partition(chat.end_of_turn)[2]
    return chat.encode(chat.end_of_turn + open_thought(behind))[1:]


# --- learning


def imitated(trajectories: Sequence[Trajectory], config: Config) -> list[Group]:
    """Groups of one, each with advantage 1."""
    groups = []
    for one in trajectories:
        groups.append(Group(one.question, [one], [reward(one, config)], [1.0]))
    return groups


def reading_examples(draw: Draw, wanted: int, chat: ChatFormat, quote: int) -> list[Trajectory]:
    """So many; ConfigError where the beginnings of pages hold nothing to be asked."""
    examples: list[Trajectory] = []
    misses = 0
    while len(examples) < wanted and misses < PATIENCE:
        example = reading(draw.of_one_page(), chat, quote)
        if example is None:
            misses += 1
        else:
            misses = 0
            examples.append(example)
    if misses == PATIENCE:
        raise ConfigError(
            f"data, corpus: the first {PAGE} words of {PATIENCE} gold passages in a row hold no "
            "answer; --reading_steps=0 --reading_share=0 does without"
        )
    return examples


def cold_start(config: Config, recipe: Recipe, ranks: Ranks) -> None:
    """Train, and write the folder. One process."""
    task = load_task(config)
    if task.corpus is None:
        raise ConfigError("corpus='': the demonstrations are made of a corpus.jsonl")
    idle, _ = make_agent(config, task, ranks, [])
    chat = idle.chat
    engine = ScriptedEngine(chat.tokenizer, chat.end_of_turn_id, partial(begin, [], 0, recipe))
    agent = replace(idle, engine=engine)
    passages = passages_apart(task.corpus, held_out_articles(config.eval_data))
    real = read_items(config.data, passages)
    invented = made_up(passages, random.Random(config.seed))
    draw = Draw(real, invented, recipe.made_up, config.seed)
    policy = Policy(config, task.model_dir, ranks)
    folder = Path(config.run_dir)
    each = config.questions_per_step * config.group_size
    started = time.process_time()
    with (folder / recipe.log).open("w", encoding="utf-8") as log:
        log.write(json.dumps({"recipe": asdict(recipe)}) + "\n")
        for step in (bar := tqdm(range(config.steps), desc="cold start", unit="step")):
            demonstrations: list[Trajectory] = []
            wanted = max(1, each // 2)  # a reading example is as long as two trajectories
            if step >= recipe.reading_steps:
                items = [draw() for _ in range(each - round(each * recipe.reading_share))]
                demonstrations += whole(items, step, agent, recipe)
                wanted = each
            missing = wanted - len(demonstrations)
            demonstrations += reading_examples(draw, missing, chat, recipe.quote)
            groups = imitated(demonstrations, config)
            metrics = policy.update(groups)
            row: dict[str, Any] = {"step": step + 1, "logprob": metrics["logprob_good"]}
            row["reward"] = sum(group.rewards[0] for group in groups) / len(groups)
            row["trajectories"] = len(groups)
            row["tokens"] = sum(len(one.token_ids) for one in demonstrations)
            row["cpu_seconds"] = time.process_time() - started
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix(logprob=f"{row['logprob']:.3f}")
            if (step + 1) % config.save_every == 0:
                policy.export(folder, chat.tokenizer)
        policy.export(folder, chat.tokenizer)
        log.write(json.dumps({"finished": config.steps}) + "\n")
    agent.tools.close()


def check(config: Config, recipe: Recipe) -> None:
    """ConfigError for keys that do not fit, and a folder that holds something else."""
    for key in ("data", "eval_data", "corpus", "run_dir"):
        if not getattr(config, key):
            raise ConfigError(f"{key}='': cold_start.py needs --{key}")
    if config.resume:
        raise ConfigError(f"resume={config.resume!r}: a cold start cannot be resumed")
    for key in ("made_up", "good_query", "good_open", "reading_share"):
        if not 0 <= getattr(recipe, key) <= 1:
            raise ConfigError(f"{key}={getattr(recipe, key)}: must be between 0 and 1")
    for key in ("reading_steps", "quote"):
        if getattr(recipe, key) < 0:
            raise ConfigError(f"{key}={getattr(recipe, key)}: must be at least 0")
    if Path(recipe.log).name != recipe.log or Path(recipe.log).suffix != ".jsonl":
        raise ConfigError(f"log={recipe.log!r}: must be a file's name that ends in .jsonl")
    folder = Path(config.run_dir)
    finished = any(b'"finished"' in path.read_bytes() for path in folder.glob("*.jsonl"))
    another = (folder / "config.json").exists() and not (folder / recipe.log).is_file()
    if finished or another or (folder / "config.yaml").exists():
        raise ConfigError(f"run_dir={config.run_dir!r} holds another model or run already")


def imitating(config: Config, recipe: Recipe) -> Config:
    """The config with which the policy's update is imitation, of all steps; with a date for prompts
    that name one.
    """
    return replace(
        config,
        temperature=1.0,
        kl_coef=0.0,
        importance_cap=0.0,
        sequence_mask=0.0,
        steps=config.steps + recipe.reading_steps,
        date=config.date or f"{datetime.now(UTC):%Y-%m-%d}",
    )


def main(argv: list[str]) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, value in asdict(Recipe()).items():
        own.add_argument(f"--{name}", type=type(value), default=value)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    given, rest = own.parse_known_args(argv)
    recipe = Recipe(**vars(given))
    folder = ""
    try:
        config = load_config(["--preset=wiki", *rest])
        check(config, recipe)
        folder = config.run_dir
        with named("run_dir", folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / recipe.log).touch()
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads)
        cold_start(imitating(config, recipe), recipe, Ranks.start())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"cold_start.py: {error}") from error
    except KeyboardInterrupt:
        if folder:
            print(f"Stopped; {folder} is unfinished and cannot be resumed.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
