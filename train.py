"""GRPO on a research agent: measure; then act, judge, learn and report at every step; measure again.

`torchrun train.py` trains the tiny model on the built-in toy web. Every key of config.yaml can be given as
--key=value; --preset=wiki|paper are other starting points; --resume continues the newest run.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import AutoTokenizer

from deepresearcher_min import report, toyworld
from deepresearcher_min.config import Config, ConfigError, describe, replace_file
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
    fetch_model,
    open_run,
    save_checkpoint,
)
from deepresearcher_min.search import Corpus, check_search
from deepresearcher_min.trajectory import Group, Question, Trajectory, load_questions, take_questions
from deepresearcher_min.web import Web


def train(config: Config, ranks: Ranks, stop: Stop) -> bool:
    """The whole run. False if Ctrl-C, SIGTERM (saved then by one rank only) or max_cost (saved) ended it early."""
    started, task = (time.monotonic(), time.process_time()), load_task(config)
    fetch_model(task.model_dir, ranks)
    agent, examinee = make_agent(config, task, ranks)
    policy = Policy(config, task.model_dir, ranks)
    state, earlier = restore(config, policy, ranks, len(task.questions))
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


def restore(config: Config, policy: Policy, ranks: Ranks, count: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The newest checkpoint's state, or that of step 0, and the scores before training, if known, in a list.

    The policy and metrics.jsonl are set back to the end of that step. ConfigError where the run had another order of
    questions, which depends on the seed and their number.
    """
    run, order = Path(config.run_dir), {"seed": config.seed, "questions": count}
    state: dict[str, Any] = {"step": 0, "asked": 0, "usd": 0.0, "seconds": 0.0, "cpu_seconds": 0.0, **order}
    if found := ranks.share(complete_checkpoints(run)[-1:]):
        policy.load(found[0] / "state")
        state = json.loads((found[0] / "state.json").read_text())
        if (saved := {key: state.get(key) for key in order}) != order:
            raise ConfigError(f"{found[0]} belongs to a run with {saved}, not with {order}: begin a new one")
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
    questions = load_questions(config.data)
    if config.eval_data:
        examination = load_questions(config.eval_data)[: config.eval_questions or None]
    else:  # set aside, and never trained on
        if not 0 < config.eval_questions < len(questions):
            raise ConfigError(
                f"eval_questions={config.eval_questions}: without eval_data, 1 to {len(questions) - 1} of the "
                f"{len(questions)} questions of data={config.data} are set aside"
            )
        examination, questions = questions[: config.eval_questions], questions[config.eval_questions :]
    corpus = Corpus.from_jsonl(config.corpus) if config.corpus else None
    return Task(model_dir, questions, examination, corpus, corpus)


def open_web(config: Config, ranks: Ranks) -> Web:
    """The web through the cassette that the config names, or that of the run folder."""
    cassette = config.cassette or Path(config.run_dir) / "cassette.sqlite"
    return Web(config, cassette, ranks.rank, ranks.world_size)


def make_agent(config: Config, task: Task, ranks: Ranks) -> tuple[Agent, Agent]:
    """The agent in training, and the same one on the held-out web."""
    tokenizer = AutoTokenizer.from_pretrained(task.model_dir)
    prompt = Path(config.system_prompt_file).read_text() if config.system_prompt_file else ""
    chat = ChatFormat(tokenizer, config.date, prompt)
    web = open_web(config, ranks) if config.search not in ("toy", "local") or config.reader == "openai" else None
    tools = Tools(config, chat, task.corpus, web)
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
    (run / "summary.json").write_text(json.dumps(report.jsonable(summary), indent=1))
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
    if config.dtype == "bfloat16" and not torch.cuda.is_available():
        missing.append("dtype=bfloat16: there is no CUDA GPU; on a CPU use --dtype=float32 and a small model")
    if questions and config.search != "toy" and not config.data:
        missing.append("data is empty: name a file of questions (.parquet or .jsonl) with --data=FILE")
    if missing:
        raise ConfigError("this run cannot start:\n  - " + "\n  - ".join(missing))


def quiet_libraries() -> None:
    """Bars and warnings of libraries that would only come between the run's own lines."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: that is meant


def begin(config: Config, ranks: Ranks) -> None:
    """Open the run folder, and say what is special about this run."""
    if ranks.rank == 0:
        replace_file(Path(config.run_dir) / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False).encode())
        print(f"Preset {config.preset}; what differs from config.yaml:\n{describe(config)}\n", flush=True)


def main(argv: list[str]) -> int:
    quiet_libraries()
    ranks = Ranks.start()
    try:
        config = ranks.share(open_run(argv) if ranks.rank == 0 else None)  # one clock names the run
        check_needs(config)
        watch = Watch(ranks, config.rank_timeout)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        begin(config, ranks)
        if not train(config, ranks, Stop()):
            ranks.print(f"Stopped. Continue with: python train.py --resume={config.run_dir}")
            return 130
        watch.finished.set()
    except (ConfigError, ValueError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
