"""What train.py and eval.py share: the task, the agent, how a run begins, and the scores of an
evaluation.

Everything that a run needs is loaded and tried here, before its first step: a mistake is one
ConfigError. Left out: tests of significance; the interval and the deviation over runs say what a
difference is worth.
"""

import importlib
import io
import json
import logging
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoTokenizer

from deepresearcher_min import report, toyworld
from deepresearcher_min.config import (
    Config,
    ConfigError,
    check_inputs,
    describe,
    help_text,
    host_list,
    named,
    replace_file,
    searches_web,
    uses_web,
)
from deepresearcher_min.engine import make_engine, missing_gpu
from deepresearcher_min.protocol import ChatFormat, declared_ends, read_tools
from deepresearcher_min.reward import measures, step_means, step_sums, summarize, words
from deepresearcher_min.rollout import (
    EVALUATION,
    Agent,
    Batch,
    OnDone,
    Tools,
    roll_out,
    try_services,
)
from deepresearcher_min.run import Ranks
from deepresearcher_min.search import Corpus, check_search
from deepresearcher_min.trajectory import Question, Trajectory, load_questions
from deepresearcher_min.web import ROLES, RunStopped, Web

PARSING = [
    "matplotlib.figure",
    "trafilatura",
    "bs4",
    "lxml",
    "pypdf",
]  # imported late: curves, live pages
Scores = dict[str, Any]
Verdicts = Mapping[str, float | None]  # of the judge, by question


@dataclass(frozen=True)
class Task:
    """What to learn on, and what to be measured on; a corpus is an offline web."""

    model_dir: str
    questions: list[Question]
    held_out: list[Question]
    corpus: Corpus | None = None
    held_out_corpus: Corpus | None = None
    world: toyworld.World | None = None  # the held-out toy world, for the behaviour rates


def load_task(config: Config, key: str = "eval_data") -> Task:
    """Questions, offline web and model that the config names; ConfigError or ValueError for what
    cannot be used.

    `key` is what messages call eval_data. Without data there is nothing to learn on, or to set
    aside.
    """
    model_dir = str(toyworld.MODEL_DIR) if config.model == "toy" else config.model
    if config.search == "toy":
        world, held_out = (
            toyworld.World("training", config.seed),
            toyworld.World("held out", config.seed),
        )
        questions = world.questions(1000, config.seed)
        examination = held_out.questions(config.eval_questions, config.seed)
        return Task(model_dir, questions, examination, world.corpus, held_out.corpus, held_out)
    questions = read_questions("data", config.data)
    examination = read_questions(key, config.eval_data)[: config.eval_questions or None]
    if config.data and not config.eval_data:  # set aside, and never trained on
        if not 0 < config.eval_questions < len(questions):
            raise ConfigError(
                f"eval_questions={config.eval_questions}: without eval_data, 1 to {len(questions) - 1} of the "
                f"{len(questions)} questions of data={config.data} are set aside"
            )
        examination, questions = (
            questions[: config.eval_questions],
            questions[config.eval_questions :],
        )
    corpus = None
    if config.corpus:
        with named("corpus", config.corpus, "it must be a corpus.jsonl (title, url, text)"):
            corpus = Corpus.from_jsonl(config.corpus)
    return Task(model_dir, questions, examination, corpus, corpus)


def read_questions(key: str, path: str) -> list[Question]:
    with named(key, path):
        return load_questions(path) if path else []


def open_web(config: Config, ranks: Ranks) -> Web:
    """The web through the cassette that the config names, or that of the run folder."""
    cassette = config.cassette or Path(config.run_dir) / "cassette.sqlite"
    with named("cassette", str(cassette), "it must be an SQLite file that can be written"):
        web = Web(config, cassette, ranks.rank, ranks.world_size)
        web.db.execute("SELECT key, time, reply FROM replies LIMIT 1")  # or it is another program's
        return web


def load_chat(config: Config, task: Task) -> ChatFormat:
    """The tokenizer and its template, tried with the first question; ConfigError for what the agent
    cannot use.
    """
    prompt = ""
    if config.system_prompt_file:
        with named("system_prompt_file", config.system_prompt_file):
            prompt = Path(config.system_prompt_file).read_text(encoding="utf-8")
            if not prompt.strip():
                raise ValueError("there is no text in it")
    with named("tools_file", config.tools_file):
        schemas = read_tools(config.tools_file)
    with named("model", config.model, "name a chat model with --model=DIR"):
        model = AutoConfig.from_pretrained(task.model_dir).get_text_config()
        tokenizer, ends = (
            AutoTokenizer.from_pretrained(task.model_dir),
            declared_ends(task.model_dir),
        )
        chat = ChatFormat(tokenizer, config.date, prompt, schemas, ends)
        questions = task.questions + task.held_out
        ids = chat.prompt_ids(questions[0].text if questions else "Who?")
        if max(ids) >= model.vocab_size:
            raise ValueError(
                f"token {max(ids)} of its tokenizer is none of the model's {model.vocab_size}"
            )
        chat.message_ids(chat.opening("x"))  # as reader: engine asks
    if len(ids) >= config.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len}: the prompt alone has {len(ids)} tokens"
        )
    return chat


def make_agent(config: Config, task: Task, ranks: Ranks) -> tuple[Agent, Agent]:
    """The agent in training, and the same one on the held-out web."""
    chat = load_chat(config, task)
    web = open_web(config, ranks) if uses_web(config) else None
    tools = Tools(config, chat, task.corpus, web)
    with named("model", config.model):
        engine = make_engine(config, task.model_dir, ranks.world_size)
    agent = Agent(config, engine, tools, chat)
    return agent, replace(agent, tools=Tools(config, chat, task.held_out_corpus, web))


def run_program(
    program: str,
    about: str | None,
    resolve: Callable[[list[str]], Config],
    body: Callable[[Config, Ranks, list[str]], int],
    argv: list[str],
) -> int:
    """What train.py and eval.py do around their own work, `body`; the exit code. `about` is what
    --help says first.
    """
    quiet_libraries()
    if {"-h", "--help"} & set(argv):
        print(f"{about}\n{help_text()}")
        return 0
    ranks, learns = Ranks.start(), program == "train.py"
    try:
        config = ranks.share(resolve(argv) if ranks.rank == 0 else None)  # one clock names the run
        notes = check_inputs(config, argv, "eval.py" if learns else "train.py")
        check_needs(config, questions=learns)
        torch.set_num_threads(config.threads)
        return body(config, ranks, notes)
    except (ValueError, FloatingPointError) as error:
        ranks.complain(program, error)
        return 2
    except KeyboardInterrupt:  # before the first step: nothing is begun
        return 130
    finally:
        ranks.stop()


def evaluate(
    questions: Sequence[Question], agent: Agent, ranks: Ranks, on_done: OnDone
) -> list[Trajectory]:
    """One trajectory for each question at config.eval_temperature; every rank gets all of them, in
    order.
    """
    mine, numbers = ranks.deal(questions), ranks.deal(range(len(questions)))
    batch = Batch(mine, numbers, 1, agent.config.eval_temperature, step=EVALUATION)
    return ranks.gather([trajectory for (trajectory,) in roll_out(batch, agent, on_done)])


def check_needs(config: Config, questions: bool = True) -> None:
    """One ConfigError that lists everything that is missing, before anything is loaded."""
    missing = []
    try:
        check_search(config)
    except ConfigError as error:
        missing.append(str(error))
    for key in ("reader_url", "judge_url"):
        if not re.match("(https?://|$)", url := getattr(config, key)):
            missing.append(f"{key}={url!r}: must begin with http:// or https://")
    for package in PARSING if searches_web(config) else ["matplotlib.figure", "bm25s"]:
        try:
            importlib.import_module(package)
        except Exception as error:
            missing.append(
                f"{package} cannot be imported ({error}); pip install -r requirements-cpu.txt"
            )
    no_gpu = missing_gpu()
    if config.dtype == "bfloat16" and no_gpu:
        missing.append(f"dtype=bfloat16: {no_gpu}; on a CPU use --dtype=float32 and a small model")
    if questions and config.search != "toy" and not config.data:
        missing.append(
            "data is empty: name a file of questions (.parquet or .jsonl) with --data=FILE"
        )
    if missing:
        raise ConfigError("; ".join(missing))


def quiet_libraries() -> None:
    """Bars and warnings of libraries that would only come between the run's own lines; any console
    will do.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", "torch.distributed is disabled", UserWarning
    )  # one process: that is meant
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a console that lacks a character must not end a run


def check_services(config: Config, ranks: Ranks, agent: bool = True, judge: bool = False) -> None:
    """Try the services that the run will use, on rank 0; ConfigError on all ranks."""
    ask = ranks.rank == 0 and config.cassette_mode != "replay"
    trouble = ranks.share(try_services(config, agent, judge) if ask else "")
    if trouble:
        raise ConfigError(trouble)


def check_budget(config: Config, usd: float) -> None:
    """RunStopped where the estimated cost of a run has reached max_cost."""
    if 0 < config.max_cost <= usd:
        raise RunStopped(f"The estimated cost, ${usd:.2f}, has reached max_cost={config.max_cost}.")


def publish(run: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json and report.html."""
    (run / "summary.json").write_text(
        json.dumps(report.jsonable(summary), indent=1), encoding="utf-8"
    )
    report.write_html(run)


def begin(config: Config, task: Task, ranks: Ranks, notes: Sequence[str]) -> None:
    """Write the run's config.yaml, and say what is special about this run."""
    if ranks.rank > 0:
        return
    replace_file(
        Path(config.run_dir) / "config.yaml",
        yaml.safe_dump(asdict(config), sort_keys=False).encode(),
    )
    print(
        f"Preset {config.preset}; what differs from config.yaml:\n{describe(config)}\n",
        *notes,
        sep="\n",
    )
    model = AutoConfig.from_pretrained(task.model_dir).get_text_config()
    limit = getattr(model, "max_position_embeddings", None) or config.max_model_len
    if config.max_model_len > limit:
        print(
            f"max_model_len={config.max_model_len} is above the model's own limit of {limit} tokens."
        )
    sys.stdout.flush()


def usable(tried: Sequence[Trajectory], config: Config) -> dict[str, Trajectory]:
    """The last trajectory of each question, by its id, that met no failed service; the others are
    asked again.

    A replay, which would repeat the failures, keeps them.
    """
    known = {}
    for one in sorted(tried, key=lambda one: one.question.id):
        met = any(f"{role}_failed" in one.cost for role in ROLES)
        if not met or config.cassette_mode == "replay":
            known[one.question.id] = one
    return known


def scores_of(tried: Sequence[Trajectory], rows: Sequence[Scores], config: Config) -> Scores:
    """summarize(), and F1's interval, MBE over the answers with a verdict, behaviours, dollars,
    what was blocked.

    Of those that are usable, whose measures are the rows; but all that were tried count in the
    share of failed calls.
    """
    found = list(usable(tried, config).values())
    shown = Counter(name for one in found for name in report.behaviours(one))
    costs = step_sums([], [found])
    f1 = [row["f1"] for row in rows]
    scores: Scores = {name: shown[name] / len(found) for name in report.BEHAVIOURS}
    scores |= {"f1_interval": interval(f1), "mbe": mean(rows, "mbe"), "usd": costs["cost_usd"]}
    scores["failed"] = step_means(step_sums([], [tried]))["failed"]
    if host_list(config):
        scores["blocked"] = costs["cost_blocked"] + costs["cost_fail_page_blocked_host"]
    return {**summarize(found), **scores}


def interval(values: Sequence[Any]) -> list[float]:
    """The 95 % interval of the mean of a score of questions, from 2,000 draws of as many."""
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).round(3).tolist()


def mean(rows: Sequence[Scores], name: str) -> float | None:
    """The mean of a score over the rows that have it."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None


def scores_over_runs(
    runs: Sequence[Sequence[Trajectory]], verdicts: Sequence[Verdicts], config: Config
) -> tuple[Scores, list[Scores]]:
    """(means over the runs, scores_of each run). Several have deviations, pass@k and the majority's
    scores, too.

    Their interval draws questions, with the mean F1 of each. What has no result or no verdict is
    left out.
    """
    each, answers = list[Scores](), defaultdict[str, list[Scores]](list)
    for tried, judged in zip(runs, verdicts, strict=True):
        rows = []
        for key, one in usable(tried, config).items():
            text = None if one.answer is None else " ".join(words(one.answer))
            rows.append({**measures(one), "mbe": judged.get(key), "text": text})
            answers[key].append(rows[-1])
        if rows:
            each.append(scores_of(tried, rows, config))
    if config.repeats == 1:
        return each[0], each
    scores: Scores = {name: mean(each, name) for name in each[0] if name != "f1_interval"}
    averages = [mean(rows, "f1") for rows in answers.values()]
    scores |= {"n": len(answers), "f1_interval": interval(averages)}
    chosen = [majority(rows) for rows in answers.values()]
    for name in ("f1", "em", "mbe"):
        values = [row[name] for row in each if row[name] is not None]
        scores[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        scores[f"majority_{name}"] = mean(chosen, name)
    right = "em" if scores["mbe"] is None else "mbe"
    best = [max(rows, key=lambda row: row[right] or 0.0) for rows in answers.values()]
    return {**scores, "pass_at_k": mean(best, right)}, each


def majority(rows: Sequence[Scores]) -> Scores:
    """The run with the commonest answer, as the scorer reads it; the earliest of equally common
    ones.
    """
    texts = [row["text"] for row in rows if row["text"] is not None]
    commonest = mode(texts) if texts else None
    return next(row for row in rows if row["text"] == commonest)
