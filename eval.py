"""Evaluate a model on questions, or let it answer one in the terminal.

  python eval.py                    the newest run's model on that run's held-out questions
  python eval.py --model=DIR        any model on the official test set (fetched once), live search
  python eval.py --model=DIR --data=FILE --limit=20    any questions, 20 of each data source
  python eval.py --method=cot       the paper's baselines: no tools (rag: one search, in the prompt)
  python eval.py --repeats=4 --eval_temperature=1      four runs: deviation, pass@4, majority
  python eval.py --resume           goes on with the newest evaluation, killed or stopped
  python eval.py --question="..."   one question: thoughts, searches, pages, answer, sources

Every key of config.yaml can be given as in train.py. The model of a run brings that run's config
with it; any other model starts from preset wiki for a local search, else from preset paper.
"""

import csv
import re
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

from deepresearcher_min import evaluation, report
from deepresearcher_min.config import ROOT, ConfigError, RunStopped, require_environment
from deepresearcher_min.evaluation import ask_all, usable, written
from deepresearcher_min.reward import explain
from deepresearcher_min.rollout import Batch, roll_out
from deepresearcher_min.run import check_needs, open_run, run_program, starting
from deepresearcher_min.search import judge_rules
from deepresearcher_min.trajectory import Question

CAPTION = """\
Method {method}, model {model}, search {search} (cot: none), temperature {eval_temperature:g}.
F1, EM: official scorer; no answer is 0; interval: 2,000 bootstraps of questions. MBE: {judge}.
Ended by the harness, left out: {lost}. Met by a failed service, left out: {spoilt}; --resume asks
both again. "plans" to "admits": words in thoughts, see report.behaviours. "paper": F1/MBE of 7B
models as published in tables 1 and 2 of arXiv 2504.03160: whole sets, the web of then, judge
gpt-4o-mini."""
REPEATED = """
Means over {repeats} runs; pass@k: share of questions right (EM, or MBE where judged) in one of them
at least; majority: the commonest answer. Each run has seeds, reader and judge replies of its own;
searches and pages are shared."""


def resolve(argv):
    """The config of an evaluation (see open_run) with its blocked hosts spelled out, and what the
    baselines change. ConfigError for several runs that would be the same.
    """
    config = open_run(argv, evaluates=True)
    if config.repeats > 1 and config.eval_temperature == 0:
        raise ConfigError(
            f"repeats={config.repeats}: at eval_temperature=0 every run gives the same answers; "
            "add --eval_temperature=1 (or --repeats=1)"
        )
    if config.blocked_hosts == "auto":
        listed = (ROOT / "deepresearcher_min/blocked_hosts.txt").read_text("utf-8")
        hosts = re.findall(r"(?m)^[^#\s]+", listed)
        config = replace(config, blocked_hosts=" ".join(hosts))
    if config.method == "cot" and config.search != "toy":
        config = replace(config, search="wikipedia")  # never asked: it needs no key and no corpus
    if config.method != "agent":
        prompt = config.system_prompt_file or f"{ROOT}/prompts/baseline.txt"
        config = replace(config, max_tool_calls=0, system_prompt_file=prompt)
    return config


def conclude(config, task, started):
    """Judge the answers; write summary.json, results.md and report.html from the files; print the
    table.
    """
    runs = written(config, task)
    kept = [usable(tried, config) for tried in runs]
    if not any(kept):
        raise RunStopped(
            f"not one of {len(task.held_out)} questions has a result; "
            "see trajectory_timeout and failures"
        )
    verdicts, judge, usd = evaluation.ask_judge_all(config, kept)
    overall, each = evaluation.scores_over_runs(runs, verdicts, config)
    overall["usd"] = usd / config.repeats  # the judge's, too
    sources = {}
    for name in sorted({one.question.source for known in kept for one in known.values()}):
        part = [[one for one in tried if one.question.source == name] for tried in runs]
        sources[name or "no source"], _ = evaluation.scores_over_runs(part, verdicts, config)
    table = report.score_rows(sources | {"all": overall})
    with open(ROOT / "docs/paper.csv", encoding="utf-8") as published:
        for row in csv.DictReader(published):
            if sources.keys() & row.keys():
                row[""] = f"paper: {row['method']}"  # the head begins with an empty cell
                table.append([row.get(name, "-") for name in table[0]])
    met = 0
    for tried in runs:
        met += len({one.question.id for one in tried})
    lost = len(task.held_out) * config.repeats - met
    spoilt = met - sum(map(len, kept))
    text = CAPTION + REPEATED * (config.repeats > 1)
    caption = textwrap.fill(text.format(**vars(config), judge=judge, lost=lost, spoilt=spoilt), 118)
    seconds = time.monotonic() - started
    summary = {"seed": config.seed, "model": config.model, "method": config.method, "usd": usd}
    summary |= {"seconds": seconds, "sources": sources, "overall": overall, "runs": each}
    report.publish(config, summary | {"table": table, "caption": caption})
    Path(f"{config.run_dir}/results.md").write_text(
        f"{report.text_table(table, markdown=True)}\n\n{caption}\n", "utf-8"
    )
    print(
        f"{report.text_table(table)}\n\n{caption}\n\n"
        f"{seconds:.0f} s, ${usd:.2f}. Every trajectory is in {config.run_dir}/report.html, "
        f"the table in {config.run_dir}/results.md"
    )


def ask(config, task, agent):
    """Answer one question and print the whole trajectory; a known question is scored, too."""
    known = {question.text: question for question in task.held_out}
    question = known.get(config.question, Question("typed", config.question, ("",)))
    [[one]] = roll_out(Batch([question], [0], 1, config.eval_temperature, 0), agent)
    print(report.readable(one, explain(one, config) if config.question in known else ""))
    seen = [turn for turn in one.turns if turn.kind == "browse"] or one.turns
    urls = re.findall(r"'url': '([^']+)'", " ".join(turn.observation for turn in seen))
    print("Sources:", *dict.fromkeys(urls), sep="\n  ")


def start(config, ranks, notes):
    """The whole evaluation, or the one question."""
    started = time.monotonic()
    with starting(config, ranks.rank):
        check_needs(config, questions=False)
        if config.judge_url:
            require_environment(
                "JUDGE_API_KEY", "judge_url needs it (any word, if none is asked for)"
            )
            judge_rules(config)
            if not config.judge_model:
                raise ConfigError(f"judge_url={config.judge_url!r}: needs --judge_model=NAME, too")
        task = evaluation.load_examination(config, ranks)
        done = ranks.share([usable(tried, config) for tried in written(config, task)])
        _, agent = evaluation.make_agent(config, task, ranks, notes)
        left = len(task.held_out) * config.repeats - sum(map(len, done))  # questions to ask
        asked = config.question
        evaluation.begin(config, ranks, notes, left or asked, config.judge_url and not asked)
    try:
        if config.question:
            ask(config, task, agent)
        else:
            ask_all(config, task, agent, done, left, ranks)
            if ranks.rank == 0:
                conclude(config, task, started)
            ranks.share(None)  # all wait for the table: vLLM's end is that of the process group
    finally:
        agent.tools.close()
        agent.engine.close()


def main(argv):
    return run_program("eval.py", __doc__, resolve, start, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
