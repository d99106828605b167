"""Evaluate a model on questions, or let it answer one in the terminal.

  python eval.py                                       the newest run's model on that run's held-out
  questions python eval.py --model=DIR                           any model on the official test set
  (fetched once), live search python eval.py --model=DIR --data=FILE --limit=20    any model on any
  questions, 20 of each data source python eval.py --method=cot                          the paper's
  baselines: no tools (rag: one search, in the prompt) python eval.py --repeats=4
  --eval_temperature=1      four runs: deviation, pass@4, answer by majority python eval.py --resume
                               goes on with the newest evaluation, killed or stopped python eval.py
                               --question="..."                      one question: thoughts,
                               searches, pages, answer, sources

Every key of config.yaml can be given as in train.py. The model of a run brings that run's config
with it; any other model starts from preset wiki for a local search, else from preset paper.
"""

import asyncio
import csv
import hashlib
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from tqdm import tqdm

from deepresearcher_min import report
from deepresearcher_min.config import (
    ROOT,
    Config,
    ConfigError,
    named,
    parse_arguments,
    read_config,
    replace_file,
    require_environment,
)
from deepresearcher_min.evaluation import (
    Task,
    Verdicts,
    begin,
    check_budget,
    check_services,
    load_task,
    make_agent,
    open_web,
    publish,
    run_program,
    scores_over_runs,
    usable,
)
from deepresearcher_min.protocol import ChatFormat, Entry
from deepresearcher_min.reward import ask_judge, explain, judge, judge_rules, measures
from deepresearcher_min.rollout import EVALUATION, Agent, Batch, roll_out
from deepresearcher_min.run import (
    RUNS,
    Ranks,
    complete_checkpoints,
    fetch_model,
    newest_run,
    open_run,
    starting,
)
from deepresearcher_min.search import INDEX_CACHE
from deepresearcher_min.trajectory import Question, Recording, Trajectory
from deepresearcher_min.web import RunStopped, Web, WebFailure, raise_if_down

# The revision is the one at which a public copy of the official repository has the file; never
# fetched by us (there is no internet here). What decides is the checksum, which is that of the
# published file, 3,197 questions.
OFFICIAL = "https://raw.githubusercontent.com/GAIR-NLP/DeepResearcher"
TEST_SET_URL = f"{OFFICIAL}/b576f0cc08e1ca39027f29a56a99548b743bfd3b/data/test.parquet"
TEST_SET_SHA256 = "30c21c7da1872af08d7db1aacb5f45a57d0a7f038dd7f7baed51231bf6c5e10e"
BILLS = "judge.jsonl"  # in a run folder: what each judging cost
ENOUGH = 50  # calls to a service after which an evaluation stops where most of them failed
CAPTION = """\
Method {method}, model {model}, search {search} (cot: none), temperature {eval_temperature:g}. F1, EM: official scorer;
no answer is 0; interval: 2,000 bootstraps of questions. MBE: {judge}. Ended by the harness, left out: {lost}.
Met by a failed service, left out: {spoilt}; --resume asks both again.
"plans" to "admits": words in thoughts, see report.behaviours. "paper": F1/MBE of 7B models as published in tables 1
and 2 of arXiv 2504.03160: whole sets, the web of then, judge gpt-4o-mini."""

REPEATED = """
Means over {repeats} runs; pass@k: share of questions right (EM, or MBE where judged) in one of them at least; majority:
the commonest answer. Each run has seeds, reader and judge replies of its own; searches and pages are shared."""


def resolve(argv: list[str]) -> Config:
    """The config of a stopped evaluation, or of the run that the model belongs to, or a preset;
    argv over it.

    Its blocked hosts are spelled out. ConfigError for several runs that would be the same.
    """
    typed, base = parse_arguments(argv), None
    if typed.get("resume") == "newest":
        argv = [*argv, f"--resume={newest_run('evaluation', 'eval-*/config.yaml')}"]
    if "resume" not in typed:
        folder = Path(typed.get("model") or newest_run())
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        if os.path.isfile(run / "config.yaml") and os.path.isdir(run / "checkpoints"):
            if folder == run:
                found = complete_checkpoints(run)
                if not found:
                    raise ConfigError(
                        f"model={str(run)!r}: this run has no complete checkpoint yet"
                    )
                folder = found[-1]
            base = read_config("model", run) | {"resume": "", "question": ""}
        now = datetime.now(UTC)
        begin = [
            f"--run_dir={RUNS}/eval-{now:%Y%m%d-%H%M%S}",
            f"--date={now:%Y-%m-%d}",
            "--engine_memory=0.9",
        ]
        if base is None:
            begin.append("--preset=wiki" if typed.get("search") == "local" else "--preset=paper")
        argv = [*begin, *argv, f"--model={folder}"]
        if "data" in typed:
            argv.append(f"--eval_data={typed['data']}")
    config = open_run(argv, base)
    if config.repeats > 1 and config.eval_temperature == 0:
        raise ConfigError(
            f"repeats={config.repeats}: at eval_temperature=0 every run gives the same answers; add "
            "--eval_temperature=1 (or --repeats=1)"
        )
    if config.blocked_hosts == "auto":
        listed = (ROOT / "deepresearcher_min/blocked_hosts.txt").read_text(encoding="utf-8")
        config = replace(
            config, blocked_hosts=" ".join(re.findall(r"^[^#\s]+", listed, re.MULTILINE))
        )
    if config.method == "agent":
        return config
    # cot never searches: wikipedia stands there because it needs neither a key nor a corpus.
    search = "wikipedia" if config.method == "cot" and config.search != "toy" else config.search
    prompt = config.system_prompt_file or str(ROOT / "prompts/baseline.txt")
    return replace(config, max_tool_calls=0, search=search, system_prompt_file=prompt)


def test_set(config: Config) -> str:
    """The official test set, fetched once and kept under ~/.cache; ConfigError if it cannot be had
    or is not that.
    """
    path = INDEX_CACHE / f"test-{TEST_SET_SHA256[:12]}.parquet"
    kept = path.read_bytes() if os.path.isfile(path) else b""
    if hashlib.sha256(kept).hexdigest() != TEST_SET_SHA256:
        with closing(Web(replace(config, cassette_mode="live"), ":memory:")) as web:
            try:
                body, _ = web.fetch(TEST_SET_URL, Counter(), time.monotonic() + 120, own=True)
            except WebFailure as failure:
                raise ConfigError(
                    f"the official test set: {failure.words} ({TEST_SET_URL}) Or name --data=FILE"
                ) from None
        found = hashlib.sha256(body).hexdigest()
        if found != TEST_SET_SHA256:
            raise ConfigError(
                f"{TEST_SET_URL} sent another file: sha256 {found}, not {TEST_SET_SHA256}"
            )
        try:
            replace_file(path, body)
        except OSError:  # a home that cannot be written: fetched again next time
            path = Path(mkdtemp()) / path.name
            replace_file(path, body)
    return str(path)


def load_examination(config: Config, ranks: Ranks) -> Task:
    """The questions, at most `limit` of each data source, and the offline web, if there is one.

    They are those of eval_data (or --data), else those that the model's run set aside, else the
    official test set.
    """
    wanted = config
    if config.search != "toy":
        file = config.eval_data
        if not file and not config.data and not config.question:
            file = ranks.share(test_set(config) if ranks.rank == 0 else None)
        if file:  # all of it, and no training data
            wanted = replace(config, data="", eval_data=file, eval_questions=0)
    task = load_task(wanted, "data")
    taken, kept = Counter[str](), []
    for question in task.held_out:
        taken[question.source] += 1
        if config.limit == 0 or taken[question.source] <= config.limit:
            kept.append(question)
    return replace(task, held_out=kept)


class PlainChat(ChatFormat):
    """The prompt of the baselines: rules and question, no tools, and for rag what a search for the
    question found.
    """

    def __init__(self, chat: ChatFormat, found: Mapping[str, str]) -> None:
        vars(self).update(vars(chat))
        self.tools, self.found = None, found

    def prompt_ids(self, question: str) -> list[int]:
        return super().prompt_ids(
            "\n\nSearch results: ".join(filter(None, (question, self.found.get(question))))
        )


def search_once(
    questions: Sequence[Question], agent: Agent
) -> tuple[dict[str, str], dict[str, Counter]]:
    """For rag: what a search for each question finds, as the agent would see it, by its text; and
    the costs by id.
    """
    records = [Recording(question, []) for question in questions]

    async def search() -> list[Entry]:
        agent.tools.slots = asyncio.Semaphore(agent.config.tool_threads or 1)
        return await asyncio.gather(
            *(agent.tools.entry("search", one.question.text, one) for one in records)
        )

    most = agent.config.max_observation_tokens
    texts = {
        entry.key: agent.chat.fit("search", [entry], most)[0] for entry in asyncio.run(search())
    }
    return texts, {one.question.id: one.cost for one in records}


def written(config: Config, task: Task) -> list[list[Trajectory]]:
    """The trajectories of each run so far, also those that will be asked again; none of what the
    harness ended.
    """
    asked = {question.id for question in task.held_out}
    runs: list[list[Trajectory]] = [[] for _ in range(config.repeats)]
    for file in sorted((Path(config.run_dir) / "trajectories").glob("eval*.jsonl")):
        for row in report.read_json_lines(file):
            if row["id"] in asked and row["index"] < config.repeats:
                runs[row["index"]].append(report.read_trajectory(row))
    return runs


def ask_all(
    config: Config, task: Task, agent: Agent, done: Sequence[Mapping[str, Trajectory]], ranks: Ranks
) -> None:
    """Ask what has no usable result yet; `done` are those of each run.

    Each trajectory is written as it ends, so that no kill loses or repeats one.
    """
    path = (
        Path(config.run_dir)
        / "trajectories"
        / ("eval" + f"-rank{ranks.rank}" * (ranks.world_size > 1) + ".jsonl")
    )
    mine = ranks.deal(range(len(task.held_out)))
    missing = [
        [number for number in mine if task.held_out[number].id not in known] for known in done
    ]
    web = agent.tools.browser.web or Web(config, ":memory:")
    web.enough = ENOUGH
    bar = tqdm(total=sum(map(len, missing)), desc=config.method, disable=ranks.rank > 0 or None)
    before, sums = spent(config, done), Counter[str]()

    def on_done(run: int, prepaid: Mapping[str, Counter], one: Trajectory) -> None:
        one = replace(one, cost={**prepaid.get(one.question.id, {}), **one.cost})
        group = judge(one.question, [one], config, 0)  # empty for what the harness ended
        report.write_trajectories(path, 0, [group], partial(explain, config=config), run)
        sums.update(measures(one) | {"n": len(group.trajectories)})
        bar.update()
        bar.set_postfix_str(f"F1 {sums['f1'] / max(1, sums['n']):.3f}, ${sums['usd']:.2f}")
        check_budget(
            config, before + sums["usd"] * ranks.world_size
        )  # the others pay about as much

    try:
        for run, numbers in enumerate(
            missing
        ):  # one after the other: alone, the first is what it is without repeats
            questions = [task.held_out[number] for number in numbers]
            web.run = run
            found, prepaid = search_once(questions, agent) if config.method == "rag" else ({}, {})
            if config.method != "agent":
                agent = replace(agent, chat=PlainChat(agent.chat, found))
            batch = Batch(questions, numbers, 1, config.eval_temperature, EVALUATION, run)
            roll_out(batch, agent, partial(on_done, run, prepaid))
        # Every rank's file is complete; vLLM's end is that of the process group.
        raise_if_down(config, ranks.total(web.totals))
    finally:
        bar.close()
        agent.tools.close()
        agent.engine.close()


def spent(config: Config, runs: Sequence[Mapping[str, Trajectory]]) -> float:
    """Dollars for these trajectories and for the judge so far."""
    costs = [one.cost for found in runs for one in found.values()]
    costs += report.read_json_lines(Path(config.run_dir) / BILLS)
    return sum(cost.get("usd", 0.0) for cost in costs)


def ask_judge_all(
    config: Config, runs: Sequence[Mapping[str, Trajectory]]
) -> tuple[list[Verdicts], str, float]:
    """MBE by question in each run, a sentence on who judged and what stayed without a verdict, and
    dollars so far.

    Empty without a judge. RunStopped at max_cost, after which only --resume with a higher one goes
    on.
    """
    paid = spent(config, runs)
    if not config.judge_url:
        return [{} for _ in runs], "not measured (judge_url is empty)", paid
    web, counts, verdicts = open_web(config, Ranks()), Counter[str](), list[Verdicts]()
    web.enough = ENOUGH

    def ask_one(one: Trajectory) -> float | None:
        if config.price_judge_token:
            check_budget(config, paid + counts["usd"])
        return ask_judge(one, config, web, counts)

    try:
        for web.run, found in enumerate(runs):
            with ThreadPoolExecutor(max(1, config.tool_threads)) as pool:
                asked = tqdm(pool.map(ask_one, found.values()), "judge", len(found), disable=None)
                verdicts.append(dict(zip(found, asked, strict=True)))
    finally:
        report.append_json_line(Path(config.run_dir) / BILLS, {"usd": counts["usd"]})
        web.close()
    raise_if_down(config, web.totals)
    silent = sum(list(each.values()).count(None) for each in verdicts)
    causes = ", ".join(
        f"{amount} {name}" for name, amount in counts.items() if name.startswith("fail_judge_")
    )
    sentence = f"by {config.judge_model}; without a verdict, left out: {silent} ({causes or '-'})"
    return verdicts, sentence, paid + counts["usd"]


def conclude(config: Config, task: Task, started: float) -> None:
    """Judge the answers; write summary.json, results.md and report.html from the files; print the
    table.
    """
    folder, runs = Path(config.run_dir), written(config, task)
    kept = [usable(tried, config) for tried in runs]
    if not any(kept):
        raise RunStopped(
            f"not one of {len(task.held_out)} questions has a result; see trajectory_timeout and failures"
        )
    lost, spoilt = len(task.held_out) * config.repeats, 0
    for tried, known in zip(runs, kept, strict=True):
        met = {one.question.id for one in tried}
        lost -= len(met)
        spoilt += len(met - known.keys())
    verdicts, sentence, usd = ask_judge_all(config, kept)
    sources = {}
    for name in sorted({one.question.source for known in kept for one in known.values()}):
        part = [[one for one in tried if one.question.source == name] for tried in runs]
        sources[name or "no source"], _ = scores_over_runs(part, verdicts, config)
    overall, each = scores_over_runs(runs, verdicts, config)
    overall["usd"] = usd / config.repeats  # the judge's, too
    table = report.score_rows({**sources, "all": overall})
    published = csv.DictReader((ROOT / "docs/paper.csv").read_text(encoding="utf-8").splitlines())
    for row in published:
        if sources.keys() & row.keys():
            table.append(
                [f"paper: {row['method']}", *(row.get(name, "-") for name in table[0][1:])]
            )
    seconds = time.monotonic() - started
    caption = CAPTION + REPEATED * (config.repeats > 1)
    caption = textwrap.fill(
        caption.format(**asdict(config), judge=sentence, lost=lost, spoilt=spoilt), 118
    )
    summary = {
        "seed": config.seed,
        "model": config.model,
        "method": config.method,
        "seconds": seconds,
        "usd": usd,
    }
    summary |= {
        "sources": sources,
        "overall": overall,
        "runs": each,
        "table": table,
        "caption": caption,
    }
    publish(folder, summary)
    markdown = report.text_table(table, markdown=True)
    (folder / "results.md").write_text(f"{markdown}\n\n{caption}\n", encoding="utf-8")
    print(f"{report.text_table(table)}\n\n{caption}\n")
    print(
        f"{seconds:.0f} s, ${usd:.2f}. Every trajectory is in {folder}/report.html, the table in {folder}/results.md"
    )


def ask(config: Config, task: Task, agent: Agent) -> None:
    """Answer one question and print the whole trajectory; a known question is scored, too."""
    typed = Question("typed", config.question, ("",))
    question = next((each for each in task.held_out if each.text == typed.text), typed)
    try:
        ((one,),) = roll_out(Batch([question], [0], 1, config.eval_temperature, step=0), agent)
    finally:
        agent.tools.close()
        agent.engine.close()
    print(report.readable(one, explain(one, config) if question is not typed else ""))
    seen = [turn.observation for turn in one.turns if turn.kind == "browse"] or [
        turn.observation for turn in one.turns
    ]
    print(
        "\n  ".join(["Sources:", *dict.fromkeys(re.findall(r"'url': '([^']+)'", " ".join(seen)))])
    )


def start(config: Config, ranks: Ranks, notes: Sequence[str]) -> int:
    """The whole evaluation, or the one question; its exit code."""
    started = time.monotonic()
    if config.judge_url:
        require_environment(
            "JUDGE_API_KEY", "judge_url needs it (any word, if the server asks for none)"
        )
        judge_rules(config)
        if not config.judge_model:
            raise ConfigError(f"judge_url={config.judge_url!r}: needs --judge_model=NAME, too")
    with starting(config, ranks.rank):
        task = load_examination(config, ranks)
        with named("resume", config.run_dir, "its trajectories are not what eval.py wrote"):
            done = ranks.share([usable(tried, config) for tried in written(config, task)])
        fetch_model(task.model_dir, ranks)
        _, agent = make_agent(config, task, ranks)
        unasked = config.question or any(len(known) < len(task.held_out) for known in done)
        check_services(config, ranks, unasked, judge=config.judge_url and not config.question)
        if not config.question:
            begin(config, task, ranks, notes)
    if config.question:
        ask(config, task, agent)
        return 0
    try:
        ask_all(config, task, agent, done, ranks)
        if ranks.rank == 0:
            conclude(config, task, started)
    except (KeyboardInterrupt, RunStopped) as stopped:
        print(f"{stopped}\nStopped. Go on with: python eval.py --resume={config.run_dir}".strip())
        return 3 if isinstance(stopped, RunStopped) else 130
    return 0


def main(argv: list[str]) -> int:
    return run_program("eval.py", __doc__, resolve, start, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
