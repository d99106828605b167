"""GRPO on a research agent: measure; then act, judge, learn and report at every step; measure
again.

`torchrun train.py` trains the tiny model on the built-in toy web. Every key of config.yaml can be
given as
--key=value; --preset=wiki|paper are other starting points; --resume continues the newest run.
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deepresearcher_min import report, toyworld
from deepresearcher_min.config import Config, ConfigError, named
from deepresearcher_min.evaluation import (
    Task,
    begin,
    check_budget,
    check_services,
    evaluate,
    load_task,
    make_agent,
    publish,
    run_program,
)
from deepresearcher_min.policy import Policy
from deepresearcher_min.reward import explain, judge, step_means, step_sums, summarize
from deepresearcher_min.rollout import Agent, Batch, roll_out
from deepresearcher_min.run import (
    Ranks,
    Stop,
    add_times,
    complete_checkpoints,
    fetch_model,
    open_run,
    save_checkpoint,
    starting,
    watch,
)
from deepresearcher_min.trajectory import Group, take_questions
from deepresearcher_min.web import RunStopped, raise_if_down


def train(config: Config, ranks: Ranks, stop: Stop, notes: Sequence[str]) -> int:
    """The whole run; its exit code: 3, max_cost or a dead service; 130, Ctrl-C or SIGTERM (saved by
    one rank only).
    """
    started = time.monotonic(), time.process_time()
    task, agent, examinee, policy, state, evaluations = prepare(config, ranks, notes)
    save = partial(save_policy, config, policy, agent, ranks, stop)
    try:
        agent.engine.update_weights(
            policy.named_weights()
        )  # resumed or not: these weights, and no cached prefixes
        while True:
            # 0 measure
            step = state["step"]
            due = config.eval_every and step % config.eval_every == 0
            if (due or step == 0) and step not in evaluations:
                name = f"step-{step:06d}" if step else "before"
                evaluations[step] = measure(name, state, task, examinee, ranks)
                agent.engine.update_weights(policy.named_weights())  # as before the first step
            if step and (step % config.save_every == 0 or step >= config.steps):
                save(add_times(state, started))
            if step >= config.steps:
                break
            step, lap = step + 1, time.monotonic()
            asked = take_questions(
                task.questions, config.seed, state["asked"], config.questions_per_step
            )
            questions, numbers = ranks.deal(asked), ranks.deal(range(len(asked)))
            # 1 act: G trajectories for each question
            batch = Batch(questions, numbers, config.group_size, config.temperature, step)
            with progress(f"step {step}", len(questions) * config.group_size, ranks) as bar:
                rollouts = roll_out(batch, agent, lambda _: bar.update())
            # 2 judge: rewards, and advantages inside each group
            groups = [
                judge(question, found, config, step)
                for question, found in zip(questions, rollouts, strict=True)
            ]
            row = {"step": step, "steps": config.steps, "roll_s": time.monotonic() - lap}
            row |= step_means(ranks.total(step_sums(groups, rollouts)))
            raise_if_down(config, row)
            # 3 learn: GRPO on the groups, then the new weights go to the engine
            with stop.shield():
                agent.engine.sleep()
                row |= policy.update(groups, type(agent.engine).__name__)
                agent.engine.wake_up()
                agent.engine.update_weights(policy.named_weights())
                state |= {
                    "step": step,
                    "asked": state["asked"] + len(asked),
                    "usd": state["usd"] + row["cost_usd"],
                }
                # 4 report
                row |= {"update_s": time.monotonic() - lap - row["roll_s"], "usd": state["usd"]}
                report_step(config, ranks, row, groups)
            check_budget(config, state["usd"])
        after = measure("after", state, task, examinee, ranks)
        if ranks.rank == 0:
            conclude(config, add_times(state, started), evaluations[0], after)
        ranks.share(None)  # all wait for the report: vLLM's end is that of the process group
    except RunStopped as stopped:  # on all ranks, which saw the same figures
        ranks.print(str(stopped))
        save(add_times(state, started))
        return 3
    except KeyboardInterrupt:
        stop.asked = (
            True  # a rollout has caught the signal itself; the next one must not spoil the saving
        )
        if ranks.world_size == 1:  # several cannot save together now
            save(add_times(state, started))
        return 130
    finally:
        for part in (agent.tools, examinee.tools, agent.engine):
            part.close()
    return 0


def prepare(config: Config, ranks: Ranks, notes: Sequence[str]) -> tuple[Any, ...]:
    """All that the run needs, tried once; only then is the run described. ConfigError for what does
    not work.
    """
    with starting(config, ranks.rank):
        task = load_task(config)
        fetch_model(task.model_dir, ranks)
        agent, examinee = make_agent(config, task, ranks)
        with named("model", config.model):
            policy = Policy(config, task.model_dir, ranks)
        state, evaluations = restore(config, policy, ranks, len(task.questions))
        policy.check_saving(agent.chat.tokenizer)
        check_services(config, ranks)
        begin(config, task, ranks, notes)
    return task, agent, examinee, policy, state, evaluations


def report_step(config: Config, ranks: Ranks, row: dict[str, Any], groups: Sequence[Group]) -> None:
    """The console line, the row of metrics.jsonl and, every `log_every` steps, the trajectories."""
    step = row["step"]
    if ranks.rank == 0:
        report.append_json_line(Path(config.run_dir) / "metrics.jsonl", row)
    ranks.print(report.step_line(row))
    if step % config.log_every == 0:
        write_groups(
            config, f"step-{step:06d}" + f"-rank{ranks.rank}" * (ranks.world_size > 1), step, groups
        )


def restore(
    config: Config, policy: Policy, ranks: Ranks, count: int
) -> tuple[dict[str, Any], dict[int, Any]]:
    """The newest checkpoint's state, or that of step 0, and the scores of the evaluations so far by
    step.

    The policy and metrics.jsonl are set back to the end of that step. ConfigError where the run had
    another order of questions, which depends on the seed and their number.
    """
    run, order = Path(config.run_dir), {"seed": config.seed, "questions": count}
    state: dict[str, Any] = {
        "step": 0,
        "asked": 0,
        "usd": 0.0,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        **order,
    }
    if found := ranks.share(complete_checkpoints(run)[-1:]):
        with named("resume", str(found[0]), "delete this checkpoint to go on from the one before"):
            policy.load(found[0] / "state")
            state = json.loads((found[0] / "state.json").read_text(encoding="utf-8"))
            saved = {key: state.get(key) for key in order}
        if saved != order:
            raise ConfigError(
                f"{found[0]} belongs to a run with {saved}, not with {order}: begin a new one"
            )
    with named("resume", config.run_dir, "metrics.jsonl is not what train.py wrote"):
        rows = (
            report.resume_metrics(run / "metrics.jsonl", state["step"]) if ranks.rank == 0 else []
        )
    return state, ranks.share({row["step"]: row["eval"] for row in rows if "eval" in row})


def measure(
    name: str, state: dict[str, Any], task: Task, examinee: Agent, ranks: Ranks
) -> dict[str, float]:
    """Evaluate on the held-out questions, write trajectories and scores, add the cost to the state;
    the scores.
    """
    with progress(f"evaluation {name}", len(task.held_out) // ranks.world_size, ranks) as bar:
        trajectories = evaluate(task.held_out, examinee, ranks, lambda _: bar.update())
    raise_if_down(examinee.config, step_sums([], [trajectories]))
    scores, step = summarize(trajectories), state["step"]
    state["usd"] += sum(one.cost.get("usd", 0.0) for one in trajectories)
    if task.world is not None:
        scores |= toyworld.behaviour_rates(trajectories, task.world)
    if ranks.rank == 0:
        groups = [judge(t.question, [t], examinee.config, 0) for t in trajectories]
        write_groups(examinee.config, f"eval-{name}", step, groups)
        if (
            name != "after"
        ):  # the last evaluation is no row: a run that is continued later has another last one
            report.append_json_line(
                Path(examinee.config.run_dir) / "metrics.jsonl", {"step": step, "eval": scores}
            )
        tqdm.write(f"{name}: " + "  ".join(f"{key} {value:.3g}" for key, value in scores.items()))
    return scores


def write_groups(config: Config, name: str, step: int, groups: Sequence[Group]) -> None:
    """All trajectories as JSON lines, and the best and the worst as text."""
    path, why = Path(config.run_dir) / f"trajectories/{name}.jsonl", partial(explain, config=config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a step that was run before a kill, and runs again
    report.write_trajectories(path, step, groups, why)
    report.write_readable(path.with_suffix(".txt"), groups, why)


def save_policy(
    config: Config, policy: Policy, agent: Agent, ranks: Ranks, stop: Stop, state: dict[str, Any]
) -> None:
    def write(folder: Path) -> None:
        policy.save(folder / "state")
        policy.export(folder, agent.chat.tokenizer)

    with stop.shield():
        save_checkpoint(config, ranks, state, write)


def progress(name: str, total: int, ranks: Ranks) -> tqdm:
    """A bar over trajectories, on rank 0's terminal only; it leaves nothing behind."""
    return tqdm(
        total=total, desc=name, unit="trajectory", leave=False, disable=ranks.rank > 0 or None
    )


def conclude(config: Config, state: dict[str, Any], before: dict, after: dict) -> None:
    """summary.json, the curve, the report page and the table; ends with a sentence on what was
    learned.
    """
    run = Path(config.run_dir)
    steps = [row for row in report.read_json_lines(run / "metrics.jsonl") if "reward" in row]
    report.curve_png(steps, run / "curve.png", before, after)
    times = {name: state[name] for name in ("seconds", "cpu_seconds")}
    publish(
        run,
        {"seed": config.seed, "steps": state["step"], **times, "before": before, "after": after},
    )
    print(f"\n{report.text_table(report.score_rows({'before': before, 'after': after}))}\n")
    print(
        f"F1 on {before['n']} held-out questions went from {before['f1']:.2f} to {after['f1']:.2f} in "
        f"{state['step']} steps of GRPO ({state['seconds']:.0f} s). The curve is in {run / 'curve.png'}, the "
        f"logged trajectories in {run / 'report.html'}, the model in {run / 'checkpoints'}. Run folder: {run}"
    )


def start(config: Config, ranks: Ranks, notes: Sequence[str]) -> int:
    finished = watch(ranks, config.rank_timeout)
    torch.manual_seed(config.seed)
    code = train(config, ranks, Stop(), notes)
    if code:
        ranks.print(f"Stopped. Continue with: python train.py --resume={config.run_dir}")
    else:
        finished.set()
    return code


def main(argv: list[str]) -> int:
    return run_program("train.py", __doc__, open_run, start, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
