"""GRPO on a research agent: measure; then act, judge, learn and report at every step.

`torchrun train.py` trains the tiny model on the toy web; --preset=wiki|paper start from elsewhere,
every key of config.yaml can be given as --key=value; --resume continues the newest run."""

import sys
import time
from itertools import chain

import torch

from deepresearcher_min import evaluation, report, run
from deepresearcher_min.config import RunStopped, named, raise_if_down
from deepresearcher_min.corpus import behaviour_rates, load_task
from deepresearcher_min.evaluation import evaluate, step_means, step_sums, summarize, write_groups
from deepresearcher_min.policy import Policy
from deepresearcher_min.reward import judge
from deepresearcher_min.rollout import Batch, roll_out
from deepresearcher_min.trajectory import take_questions


def train(task, agent, examinee, policy, state, save):
    """All steps that are left; a RunStopped or KeyboardInterrupt leaves the state of the last."""
    config, engine, ranks, stop = agent.config, agent.engine, policy.ranks, run.Stop()
    while True:
        # 0 measure
        step = state["step"]
        engine.update_weights(policy.named_weights())
        due = step == 0 or (config.eval_every and step % config.eval_every == 0)
        if due and state["measured"] < step:
            measure(f"step-{step:06d}" if step else "before", state, task, examinee, ranks)
            engine.update_weights(policy.named_weights())  # again: forgets what is cached
        if step and (step % config.save_every == 0 or step >= config.steps):
            save()
        run.check_budget(config, state["usd"])
        stop.check()
        if step >= config.steps:
            return
        # 1 act: G trajectories for each question
        lap = time.monotonic()
        step += 1
        count = config.questions_per_step
        asked = take_questions(task.questions, config.seed, state["asked"], count)
        questions, size = ranks.deal(asked), config.group_size
        batch = Batch(questions, ranks.deal(range(count)), size, config.temperature, step)
        with ranks.progress(f"step {step}", len(questions) * size) as bar:
            rollouts = roll_out(batch, agent, lambda _: bar.update())
        # 2 judge: rewards, and advantages inside each group
        groups = [judge(*pair, config, step) for pair in zip(questions, rollouts, strict=True)]
        row = {"step": step, "steps": config.steps, "roll_s": time.monotonic() - lap}
        row |= step_means(ranks.total(step_sums(chain(*rollouts), groups)))
        raise_if_down(config, row)
        # 3 learn: GRPO on the groups
        engine.sleep()
        row |= policy.update(groups, type(engine).__name__)  # the first is held against it
        engine.wake_up()
        # 4 report
        state["usd"] += row["cost_usd"]
        state |= {"step": step, "asked": state["asked"] + count}
        row |= {"update_s": time.monotonic() - lap - row["roll_s"], "usd": state["usd"]}
        if ranks.rank == 0:
            print(report.step_line(row), flush=True)
            report.append_json_line(f"{config.run_dir}/metrics.jsonl", row)
        if step % config.log_every == 0:
            write_groups(config, ranks.own(f"step-{step:06d}"), step, groups)


def measure(name, state, task, examinee, ranks):
    """Scores on the held-out questions, into files and state; their cost is added to the state."""
    config, step = examinee.config, state["step"]
    with ranks.progress(f"evaluation {name}", len(task.held_out) // ranks.world_size) as bar:
        found = ranks.gather(
            evaluate(enumerate(task.held_out), examinee, ranks, lambda _: bar.update())
        )
    sums = step_sums(found)
    scores = summarize(found)
    raise_if_down(config, sums)
    if task.world:
        scores |= behaviour_rates(found, task.world)
    if ranks.rank == 0:
        groups = [judge(one.question, [one], config, 0) for one in found]
        write_groups(config, f"eval-{name}", step, groups)
        print(f"{name}: F1 {scores['f1']:.3f} on {scores['n']} held-out questions", flush=True)
        if name != "after":  # a run that is continued later has another last one
            row = {"step": step, "eval": scores}
            report.append_json_line(f"{config.run_dir}/metrics.jsonl", row)
    state |= {"usd": state["usd"] + sums["cost_usd"], "measured": step, name: scores}


def conclude(config, state):
    """Write summary.json, the curve and the report page; print the table and what was learned."""
    before = state["before"]
    after = state["after"]
    metrics = report.read_json_lines(f"{config.run_dir}/metrics.jsonl")
    steps = [row for row in metrics if "reward" in row]
    report.curve_png(steps, f"{config.run_dir}/curve.png", [before["f1"], after["f1"]])
    table = report.score_rows({"before": before, "after": after})
    summary = {"seed": config.seed, "steps": state["step"], "table": table}
    report.publish(config, state | summary)
    print(
        f"\n{report.text_table(table)}\n\n"
        f"F1 on {before['n']} held-out questions went from {before['f1']:.2f} to {after['f1']:.2f} "
        f"in {state['step']} steps of GRPO ({state['seconds']:.0f} s). The curve is in "
        f"{config.run_dir}/curve.png, trajectories are in report.html, models in checkpoints "
        "beside it."
    )


def start(config, ranks, notes):
    """Prepare all that the run needs, each tried once, before the run is described; then train."""
    torch.manual_seed(config.seed)
    with run.starting(config, ranks.rank):
        run.check_needs(config)
        task = load_task(config)
        agent, examinee = evaluation.make_agent(config, task, ranks, notes)
        with named("model", config.model):
            policy = Policy(config, task.model_dir, ranks)
        begun: dict = dict.fromkeys(["step", "asked", "usd", "seconds", "cpu_seconds"], 0)
        begun |= {"measured": -1, "order": {"seed": config.seed, "questions": len(task.questions)}}
        state = run.load_checkpoint(config, ranks, begun, lambda at: policy.load(at / "state"))
        if ranks.rank == 0:
            last = state["measured"] if state["step"] == 0 else state["step"]  # -1: none
            report.resume_metrics(f"{config.run_dir}/metrics.jsonl", last)
        policy.check_saving(agent.chat.tokenizer)
        evaluation.begin(config, ranks, notes)
    wall = time.monotonic() - state["seconds"]
    cpu = time.process_time() - state["cpu_seconds"]

    def write(folder):
        policy.save(folder / "state")
        policy.export(folder, agent.chat.tokenizer)

    def save():
        state["seconds"] = time.monotonic() - wall
        state["cpu_seconds"] = time.process_time() - cpu
        run.save_checkpoint(config, ranks, state, write)

    try:
        train(task, agent, examinee, policy, state, save)
        measure("after", state, task, examinee, ranks)
        save()  # it is saved, but this brings the times up to date
        if ranks.rank == 0:
            conclude(config, state)
        ranks.share(None)  # all wait for the report: vLLM's end is that of the process group
    except (RunStopped, KeyboardInterrupt) as stopped:
        if ranks.world_size == 1 or isinstance(stopped, RunStopped):
            save()  # after Ctrl-C several ranks cannot
        raise
    finally:
        for part in (agent.tools, examinee.tools, agent.engine):
            part.close()


def main(argv) -> int:
    return run.run_program("train.py", __doc__, run.open_run, start, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
