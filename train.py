"""GRPO on a research agent: measure; then act, judge, learn and report at every step; measure again.

`torchrun train.py` trains the tiny model on the built-in toy web. Every key of config.yaml can be given as
--key=value; --preset=wiki|paper are other starting points; --resume continues the newest run.
"""

import importlib
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import CONFIG_NAME

from deepresearcher_min import report, toyworld
from deepresearcher_min.config import (
    Config,
    ConfigError,
    check_inputs,
    describe,
    help_text,
    named,
    replace_file,
    searches_web,
    uses_web,
)
from deepresearcher_min.engine import make_engine
from deepresearcher_min.policy import Policy
from deepresearcher_min.protocol import ChatFormat
from deepresearcher_min.reward import explain, judge, step_means, step_sums, summarize
from deepresearcher_min.rollout import EVALUATION, Agent, Batch, OnDone, Tools, roll_out
from deepresearcher_min.run import (
    Ranks,
    Stop,
    Watch,
    add_times,
    complete_checkpoints,
    open_run,
    save_checkpoint,
    starting,
)
from deepresearcher_min.search import Corpus, check_search
from deepresearcher_min.trajectory import Group, Question, Trajectory, load_questions, take_questions
from deepresearcher_min.web import Web

PARSING = ["trafilatura", "bs4", "lxml", "pypdf"]  # what reading live pages imports late


def train(config: Config, ranks: Ranks, stop: Stop, notes: Sequence[str] = ()) -> bool:
    """The whole run. False if Ctrl-C, SIGTERM (saved then by one rank only) or max_cost (saved) ended it early."""
    started = time.monotonic(), time.process_time()
    task, agent, examinee, policy, state, earlier = prepare(config, ranks, notes)
    save = partial(save_policy, config, policy, agent, ranks, stop)
    try:
        # 0 measure
        before = earlier[0] if earlier else measure("before", state, task, examinee, ranks)
        agent.engine.update_weights(policy.named_weights())  # resumed or not: these weights, and no cached prefixes
        while state["step"] < config.steps:
            step, lap = state["step"] + 1, time.monotonic()
            asked = take_questions(task.questions, config.seed, state["asked"], config.questions_per_step)
            questions, numbers = ranks.deal(asked), ranks.deal(range(len(asked)))
            # 1 act: G trajectories for each question
            batch = Batch(questions, numbers, config.group_size, config.temperature, step)
            with progress(f"step {step}", len(questions) * config.group_size, ranks) as on_done:
                rollouts = roll_out(batch, agent, on_done)
            # 2 judge: rewards, and advantages inside each group
            groups = [judge(question, found, config, step) for question, found in zip(questions, rollouts, strict=True)]
            row = {"step": step, "steps": config.steps, "roll_s": time.monotonic() - lap}
            row |= step_means(ranks.total(step_sums(groups, rollouts)))
            # 3 learn: GRPO on the groups, then the new weights go to the engine
            with stop.shield():
                agent.engine.sleep()
                row |= policy.update(groups)
                agent.engine.wake_up()
                agent.engine.update_weights(policy.named_weights())
                state |= {"step": step, "asked": state["asked"] + len(asked), "usd": state["usd"] + row["cost_usd"]}
                # 4 report
                row |= {"update_s": time.monotonic() - lap - row["roll_s"], "usd": state["usd"]}
                if ranks.rank == 0:
                    report.append_json_line(Path(config.run_dir) / "metrics.jsonl", row)
                ranks.print(report.step_line(row))
            if step % config.log_every == 0:
                write_groups(config, f"step-{step:06d}" + f"-rank{ranks.rank}" * (ranks.world_size > 1), step, groups)
            if config.eval_every and step % config.eval_every == 0:
                measure(f"step-{step:06d}", state, task, examinee, ranks)
                agent.engine.update_weights(policy.named_weights())  # as before the first step
            if (broke := 0 < config.max_cost <= state["usd"]) or step % config.save_every == 0 or step == config.steps:
                save(add_times(state, started))
            if broke:
                ranks.print(f"The estimated cost, ${state['usd']:.2f}, has reached max_cost={config.max_cost}.")
                return False
        after = measure("after", state, task, examinee, ranks)
        if ranks.rank == 0:
            conclude(config, add_times(state, started), before, after)
        ranks.share(None)  # all wait for the report: vLLM's end is that of the process group
    except KeyboardInterrupt:
        stop.asked = True  # a rollout has caught the signal itself; the next one must not spoil the saving
        if ranks.world_size == 1:  # several cannot save together now
            save(add_times(state, started))
        return False
    finally:
        for part in (agent.tools, examinee.tools, agent.engine):
            part.close()
    return True


def prepare(config: Config, ranks: Ranks, notes: Sequence[str]) -> tuple[Any, ...]:
    """All that the run needs, tried once; only then is the run described. ConfigError for what does not work."""
    with starting(config, ranks.rank):
        task = load_task(config)
        agent, examinee = make_agent(config, task, ranks)
        with named("model", config.model):
            policy = Policy(config, task.model_dir, ranks)
        state, earlier = restore(config, policy, ranks, len(task.questions))
        policy.check_saving(agent.chat.tokenizer)
        # Here everything is loaded and nothing begun: the place to ask outside services once.
        begin(config, ranks, [*notes, *context_notes(config, task)])
    return task, agent, examinee, policy, state, earlier


def restore(config: Config, policy: Policy, ranks: Ranks, count: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The newest checkpoint's state, or that of step 0, and the scores before training, if known, in a list.

    The policy and metrics.jsonl are set back to the end of that step. ConfigError where the run had another order of
    questions, which depends on the seed and their number.
    """
    run, order = Path(config.run_dir), {"seed": config.seed, "questions": count}
    state: dict[str, Any] = {"step": 0, "asked": 0, "usd": 0.0, "seconds": 0.0, "cpu_seconds": 0.0, **order}
    if found := ranks.share(complete_checkpoints(run)[-1:]):
        with named("resume", str(found[0]), "delete this checkpoint to go on from the one before"):
            policy.load(found[0] / "state")
            state = json.loads((found[0] / "state.json").read_text(encoding="utf-8"))
            saved = {key: state.get(key) for key in order}
        if saved != order:
            raise ConfigError(f"{found[0]} belongs to a run with {saved}, not with {order}: begin a new one")
    with named("resume", config.run_dir, "metrics.jsonl is not what train.py wrote"):
        rows = report.resume_metrics(run / "metrics.jsonl", state["step"]) if ranks.rank == 0 else []
    return state, ranks.share([row["eval"] for row in rows if row["step"] == 0])


@dataclass(frozen=True)
class Task:
    """What to learn on, and what to be measured on; a corpus is an offline web."""

    model_dir: str
    questions: list[Question]
    held_out: list[Question]
    corpus: Corpus | None = None
    held_out_corpus: Corpus | None = None
    world: toyworld.World | None = None  # the held-out toy world, for the behaviour rates


def load_task(config: Config) -> Task:
    """Questions, offline web and model that the config names; ConfigError or ValueError for what cannot be used."""
    model_dir = str(toyworld.MODEL_DIR) if config.model == "toy" else config.model
    if config.search == "toy":
        world, held_out = toyworld.World("training", config.seed), toyworld.World("held out", config.seed)
        questions = world.questions(1000, config.seed)
        examination = held_out.questions(config.eval_questions, config.seed)
        return Task(model_dir, questions, examination, world.corpus, held_out.corpus, held_out)
    questions = read_questions("data", config.data)
    if config.eval_data:
        examination = read_questions("eval_data", config.eval_data)[: config.eval_questions or None]
    else:  # set aside, and never trained on
        if not 0 < config.eval_questions < len(questions):
            raise ConfigError(
                f"eval_questions={config.eval_questions}: without eval_data, 1 to {len(questions) - 1} of the "
                f"{len(questions)} questions of data={config.data} are set aside"
            )
        examination, questions = questions[: config.eval_questions], questions[config.eval_questions :]
    corpus = read_corpus(config)
    return Task(model_dir, questions, examination, corpus, corpus)


def read_questions(key: str, path: str) -> list[Question]:
    with named(key, path):
        return load_questions(path)


def read_corpus(config: Config) -> Corpus | None:
    if not config.corpus:
        return None
    with named("corpus", config.corpus, "it must be a corpus.jsonl (title, url, text)"):
        return Corpus.from_jsonl(config.corpus)


def open_web(config: Config, ranks: Ranks) -> Web:
    """The web through the cassette that the config names, or that of the run folder."""
    cassette = config.cassette or Path(config.run_dir) / "cassette.sqlite"
    with named("cassette", str(cassette), "it must be an SQLite file that can be written"):
        web = Web(config, cassette, ranks.rank, ranks.world_size)
        web.db.execute("SELECT key, time, reply FROM replies LIMIT 1")  # or it is another program's
        return web


def check_model(model: str) -> None:
    """OSError for what is neither the folder of a model nor a name that the hub knows."""
    if model == "toy" or os.path.isfile(f"{model}/{CONFIG_NAME}"):
        return
    if os.path.exists(model):
        raise OSError(f"this is not the folder of a model: there is no {CONFIG_NAME} in it")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise OSError("there is no such folder")
    if not isinstance(huggingface_hub.try_to_load_from_cache(model, CONFIG_NAME), str):
        try:  # transformers itself would try for most of a minute
            huggingface_hub.model_info(model, timeout=10)
        except Exception as error:
            raise OSError(f"there is no such folder, and the hub cannot give it ({error})") from error


def context_notes(config: Config, task: Task) -> list[str]:
    """A line if trajectories may grow longer than what the model was made for."""
    model = AutoConfig.from_pretrained(task.model_dir).get_text_config()
    limit = getattr(model, "max_position_embeddings", None) or config.max_model_len
    if config.max_model_len <= limit:
        return []
    return [f"max_model_len={config.max_model_len} is above the model's own limit of {limit} tokens."]


def load_chat(config: Config, task: Task) -> ChatFormat:
    """The tokenizer and its template, tried with the first question; ConfigError for what the agent cannot use."""
    prompt = ""
    if config.system_prompt_file:
        with named("system_prompt_file", config.system_prompt_file):
            prompt = Path(config.system_prompt_file).read_text(encoding="utf-8")
            if not prompt.strip():
                raise ValueError("there is no text in it")
    with named("model", config.model, "name a chat model with --model=DIR"):
        check_model(config.model)
        model = AutoConfig.from_pretrained(task.model_dir).get_text_config()
        chat = ChatFormat(AutoTokenizer.from_pretrained(task.model_dir), config.date, prompt)
        questions = [question.text for question in (task.questions + task.held_out)[:1]]
        for ids in map(chat.prompt_ids, questions or ["Who?"]):
            if max(ids) >= model.vocab_size:
                raise ValueError(f"token {max(ids)} of its tokenizer is none of the model's {model.vocab_size}")
        chat.message_ids(chat.opening("x"))  # as reader: engine asks
    if len(ids) >= config.max_model_len:
        raise ConfigError(f"max_model_len={config.max_model_len}: the prompt alone has {len(ids)} tokens")
    return chat


def make_agent(config: Config, task: Task, ranks: Ranks) -> tuple[Agent, Agent]:
    """The agent in training, and the same one on the held-out web."""
    chat = load_chat(config, task)
    web = open_web(config, ranks) if uses_web(config) else None
    tools = Tools(config, chat, task.corpus, web)
    with named("model", config.model):
        engine = make_engine(config, task.model_dir, ranks.world_size)
    agent = Agent(config, engine, tools, chat)
    if task.held_out_corpus is task.corpus:
        return agent, agent
    return agent, replace(agent, tools=Tools(config, chat, task.held_out_corpus, web))


def evaluate(questions: Sequence[Question], agent: Agent, ranks: Ranks, on_done: OnDone) -> list[Trajectory]:
    """One trajectory for each question at config.eval_temperature; every rank gets all of them, in order."""
    numbers = ranks.deal(range(len(questions)))
    batch = Batch([questions[n] for n in numbers], numbers, 1, agent.config.eval_temperature, step=EVALUATION)
    return ranks.gather([trajectory for (trajectory,) in roll_out(batch, agent, on_done)])


def measure(name: str, state: dict[str, Any], task: Task, examinee: Agent, ranks: Ranks) -> dict[str, float]:
    """Evaluate on the held-out questions, write trajectories and scores, add the cost to the state; the scores."""
    with progress(f"evaluation {name}", len(task.held_out) // ranks.world_size, ranks) as on_done:
        trajectories = evaluate(task.held_out, examinee, ranks, on_done)
    scores, step = summarize(trajectories), state["step"]
    state["usd"] += sum(one.cost.get("usd", 0.0) for one in trajectories)
    if task.world is not None:
        scores |= toyworld.behaviour_rates(trajectories, task.world)
    if ranks.rank == 0:
        groups = [judge(t.question, [t], examinee.config, 0) for t in trajectories]
        write_groups(examinee.config, f"eval-{name}", step, groups)
        if name != "after":  # the last evaluation is no row: a run that is continued later has another last one
            report.append_json_line(Path(examinee.config.run_dir) / "metrics.jsonl", {"step": step, "eval": scores})
        tqdm.write(f"{name}: " + "  ".join(f"{key} {value:.3g}" for key, value in scores.items()))
    return scores


def write_groups(config: Config, name: str, step: int, groups: Sequence[Group]) -> None:
    """All trajectories as JSON lines, and the best and the worst as text."""
    folder = Path(config.run_dir) / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").unlink(missing_ok=True)  # of a step that was run before a kill, and runs again
    report.write_trajectories(folder / f"{name}.jsonl", step, groups, partial(explain, config=config))
    report.write_readable(folder / f"{name}.txt", groups, partial(explain, config=config))


def save_policy(config: Config, policy: Policy, agent: Agent, ranks: Ranks, stop: Stop, state: dict[str, Any]) -> None:
    def write(folder: Path) -> None:
        policy.save(folder / "state")
        policy.export(folder, agent.chat.tokenizer)

    with stop.shield():
        save_checkpoint(config, ranks, state, write)


@contextmanager
def progress(name: str, total: int, ranks: Ranks) -> Iterator[Callable[[Trajectory], Any]]:
    """A bar over trajectories, on rank 0's terminal only; it leaves nothing behind."""
    hidden = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(total=total, desc=name, unit="trajectory", leave=False, disable=hidden) as bar:
        yield lambda trajectory: bar.update()


def conclude(config: Config, state: dict[str, Any], before: dict, after: dict) -> None:
    """summary.json, the table, the curve and the report page; ends with a sentence on what was learned."""
    run = Path(config.run_dir)
    steps = [row for row in report.read_json_lines(run / "metrics.jsonl") if "reward" in row]
    times = {"seconds": round(state["seconds"], 1), "cpu_seconds": round(state["cpu_seconds"], 1)}
    summary = {"seed": config.seed, "steps": state["step"], **times, "before": before, "after": after}
    (run / "summary.json").write_text(json.dumps(report.jsonable(summary), indent=1), encoding="utf-8")
    report.curve_png(steps, run / "curve.png", before, after)
    report.write_html(run)
    print(f"\nF1 of the sampled answers, step by step:\n{report.text_plot([(r['step'], r['f1']) for r in steps])}")
    print(f"\n{report.text_table(report.score_rows({'before': before, 'after': after}))}\n")
    print(
        f"F1 on {before['n']} held-out questions went from {before['f1']:.2f} to {after['f1']:.2f} in "
        f"{state['step']} steps of GRPO ({state['seconds']:.0f} s). The curve is in {run / 'curve.png'}, the "
        f"logged trajectories in {run / 'report.html'}, the model in {run / 'checkpoints'}. Run folder: {run}"
    )


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
    packages = ["matplotlib.figure"] if questions else []
    packages += PARSING if searches_web(config) else ["bm25s"]
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            missing.append(f"{package} cannot be imported ({error}); pip install -r requirements-cpu.txt")
    if config.dtype == "bfloat16" and not torch.cuda.is_available():
        missing.append("dtype=bfloat16: there is no CUDA GPU; on a CPU use --dtype=float32 and a small model")
    if questions and config.search != "toy" and not config.data:
        missing.append("data is empty: name a file of questions (.parquet or .jsonl) with --data=FILE")
    if missing:
        raise ConfigError("; ".join(missing))


def quiet_libraries() -> None:
    """Bars and warnings of libraries that would only come between the run's own lines; any console will do."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: that is meant
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character must not end a run


def begin(config: Config, ranks: Ranks, notes: Sequence[str] = ()) -> None:
    """Write the run's config.yaml, and say what is special about this run."""
    if ranks.rank == 0:
        replace_file(Path(config.run_dir) / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False).encode())
        print(f"Preset {config.preset}; what differs from config.yaml:\n{describe(config)}\n", flush=True)
        print("".join(f"{note}\n" for note in notes), end="", flush=True)


def main(argv: list[str]) -> int:
    quiet_libraries()
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{help_text()}")
        return 0
    ranks = Ranks.start()
    try:
        config = ranks.share(open_run(argv) if ranks.rank == 0 else None)  # one clock names the run
        notes = check_inputs(config, argv, "eval.py")
        check_needs(config)
        watch = Watch(ranks, config.rank_timeout)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        if not train(config, ranks, Stop(), notes):
            ranks.print(f"Stopped. Continue with: python train.py --resume={config.run_dir}")
            return 130
        watch.finished.set()
    except (ConfigError, ValueError, FloatingPointError) as error:
        ranks.complain("train.py", error)
        return 2
    except KeyboardInterrupt:  # before the first step: nothing is begun
        return 130
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
