"""Evaluate a model on questions, or let it answer one in the terminal.

  python eval.py                                       the newest run's model on that run's held-out questions
  python eval.py --model=DIR --data=FILE --limit=20    any model on any questions, 20 of each data source
  python eval.py --question="..."                      one question: thoughts, searches, pages, answer

Every key of config.yaml can be given as in train.py. The model of a run brings that run's config with it; any other
model starts from preset wiki for a local search, else from preset paper.
"""

import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from deepresearcher_min import report
from deepresearcher_min.config import Config, ConfigError, describe, load_config, parse_arguments, save_config
from deepresearcher_min.reward import explain, f1_score, judge, summarize
from deepresearcher_min.rollout import Batch, evaluate, roll_out
from deepresearcher_min.run import Clock, Ranks, complete_checkpoints, newest_run
from deepresearcher_min.search import Corpus
from deepresearcher_min.trajectory import Question, Trajectory, load_questions
from train import Task, check_needs, load_task, make_agent, progress, quiet_libraries


def resolve(argv: list[str]) -> Config:
    """The config of an evaluation: of the run that the model belongs to, else a preset; argv over it."""
    typed = parse_arguments(argv)
    folder = Path(typed.get("model") or newest_run())
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    base = None
    if (run / "config.yaml").exists() and (run / "checkpoints").is_dir():
        if folder == run:
            found = complete_checkpoints(run)
            if not found:
                raise ConfigError(f"model={str(run)!r}: this run has no complete checkpoint yet")
            folder = found[-1]
        base = yaml.safe_load((run / "config.yaml").read_text()) | {"run_dir": "", "resume": ""}
    elif "preset" not in typed:
        argv = [f"--preset={'wiki' if typed.get('search') == 'local' else 'paper'}", *argv]
    now = datetime.now(UTC)
    extra = {"run_dir": typed.get("run_dir") or f"runs/eval-{now:%Y%m%d-%H%M%S}", "model": str(folder)}
    extra |= {"date": typed.get("date") or f"{now:%Y-%m-%d}"}
    return load_config([*argv, *(f"--{key}={value}" for key, value in extra.items())], base=base)


def load_examination(config: Config) -> Task:
    """The questions to be asked, at most `limit` of each data source, and the offline web, if there is one."""
    if config.search == "toy":
        task = load_task(config)
    else:
        file = config.eval_data or config.data  # none for a typed question
        corpus = Corpus.from_jsonl(config.corpus) if config.corpus else None
        task = Task(config.model, [], load_questions(file) if file else [], corpus, corpus)
    taken: Counter[str] = Counter()
    kept = []
    for question in task.held_out:
        taken[question.source] += 1
        if not config.limit or taken[question.source] <= config.limit:
            kept.append(question)
    return replace(task, held_out=kept)


def evaluate_all(config: Config, task: Task, ranks: Ranks) -> None:
    """Ask every question once; write trajectories, summary.json and report.html; print a table of data sources."""
    clock = Clock()
    _, examiner = make_agent(config, task, ranks)
    try:
        with progress("evaluation", len(task.held_out) // ranks.world_size, ranks) as on_done:
            trajectories = evaluate(task.held_out, examiner, ranks, on_done)
    finally:
        examiner.tools.close()
        examiner.engine.close()
    if ranks.rank != 0:
        return
    run = Path(config.run_dir)
    by_source: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_source[trajectory.question.source or "all questions"].append(trajectory)
    sources = {name: summarize(found) for name, found in sorted(by_source.items())}
    overall = summarize(trajectories)
    summary: dict[str, Any] = {"seed": config.seed, "model": config.model, "seconds": round(clock.seconds(), 1)}
    summary |= {"sources": sources, "overall": overall}
    (run / "summary.json").write_text(json.dumps(report.jsonable(summary), indent=1))
    groups = [judge(t.question, [t], config, 0) for t in trajectories]
    report.write_trajectories(run / "trajectories" / "eval.jsonl", 0, groups, partial(explain, config=config))
    report.write_html(run)
    print(report.source_table(sources, overall))
    print(
        f"\n{clock.seconds():.0f} s. Every trajectory is in {run / 'report.html'}, the scores in {run / 'summary.json'}"
    )


def ask(config: Config, task: Task, text: str, ranks: Ranks) -> None:
    """Answer one question and print the whole trajectory; a known question is scored, too."""
    known = {question.text: question for question in task.held_out}
    question = known.get(text, Question("typed", text, ("",), "typed"))
    _, examiner = make_agent(config, task, ranks)
    try:
        batch = Batch([question], [0], 1, config.eval_temperature, 1.0, step=0)
        ((trajectory,),) = roll_out(batch, examiner)
    finally:
        examiner.tools.close()
        examiner.engine.close()
    for turn in trajectory.turns:
        print(report.readable_turn(turn))
    print(f"Answer: {trajectory.answer if trajectory.answer is not None else f'none ({trajectory.stop_reason})'}")
    if text in known:
        print(
            f"Gold: {' | '.join(question.answers)} (F1 {f1_score(trajectory.answer or '', list(question.answers)):.2f})"
        )


def main(argv: list[str]) -> int:
    typed = [word for word in argv if word.startswith("--question=")]
    argv = [word for word in argv if word not in typed]
    quiet_libraries()
    ranks = Ranks.start()
    try:
        config = ranks.share(resolve(argv) if ranks.rank == 0 else None)
        check_needs(config, questions=not typed)
        torch.set_num_threads(config.threads)
        task = load_examination(config)
        if typed:
            ask(config, task, typed[-1].partition("=")[2], ranks)
            return 0
        if ranks.rank == 0:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
            save_config(config, Path(config.run_dir) / "config.yaml")
            print(f"What differs from config.yaml:\n{describe(config)}\n", flush=True)
        evaluate_all(config, task, ranks)
    except (ConfigError, ValueError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
