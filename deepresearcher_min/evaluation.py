"""What is asked, who answers, and how well: for train.py's measuring and for eval.py.

The parts of a run are tried before its first step, so that a mistake is one ConfigError. Left out:
tests of significance; the interval and the deviation over runs say what a difference is worth.
"""

import asyncio
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import stdev

import numpy as np
import yaml
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from deepresearcher_min import report, reward, rollout
from deepresearcher_min.architecture import declared_ends, fetch_model
from deepresearcher_min.config import (
    ConfigError,
    describe,
    host_list,
    named,
    raise_if_down,
    replace_file,
    uses_web,
)
from deepresearcher_min.corpus import load_task
from deepresearcher_min.engine import make_engine
from deepresearcher_min.protocol import ChatFormat, read_tools
from deepresearcher_min.rollout import Agent, Batch, Tools, roll_out
from deepresearcher_min.run import Ranks, check_budget
from deepresearcher_min.search import test_set
from deepresearcher_min.trajectory import POLICY_STOPS, Recording
from deepresearcher_min.web import open_web

ENOUGH = 50  # calls to a service after which an evaluation stops where most of them failed


def load_examination(config, ranks):
    """eval.py's task: at most `limit` questions of each data source, of eval_data (or --data), else
    of those that the model's run set aside, else of the official test set.
    """
    file = config.eval_data
    if config.search != "toy" and not (file or config.data or config.question):
        file = ranks.share(test_set(config) if ranks.rank == 0 else None)
    if file:  # all of it, and no training data
        config = replace(config, data="", eval_data=file, eval_questions=0)
    task, taken, kept = load_task(config, "data"), Counter(), []
    for question in task.held_out:
        taken[question.source] += 1
        if config.limit == 0 or taken[question.source] <= config.limit:
            kept.append(question)
    return replace(task, held_out=kept)


def make_agent(config, task, ranks, notes):
    """The agent in training, and the same one on the held-out web; all parts are tried. A context
    above the model's own is a line more in `notes`.
    """
    folder = task.model_dir
    fetch_model(folder, ranks)
    prompt = ""
    asked = config.max_model_len
    if config.system_prompt_file:
        with named("system_prompt_file", config.system_prompt_file):
            prompt = Path(config.system_prompt_file).read_text("utf-8")
            if not prompt.strip():
                raise ValueError("there is no text in it")
    schemas = read_tools(config.tools_file) if config.tools_file else None
    with named("model", config.model, "name a chat model with --model=DIR"):
        model = AutoConfig.from_pretrained(folder).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = ChatFormat(tokenizer, config.date, prompt, schemas, declared_ends(folder))
        ids = chat.prompt_ids("Who?")
        if max(ids) >= model.vocab_size:
            raise ValueError(
                f"token {max(ids)} of its tokenizer is none of the model's {model.vocab_size}"
            )
        chat.message_ids(chat.opening("x"))  # as reader: engine asks
    if len(ids) >= asked:
        raise ConfigError(f"max_model_len={asked}: the prompt alone has {len(ids)} tokens")
    limit = getattr(model, "max_position_embeddings", None) or asked
    if asked > limit:
        notes.append(f"max_model_len={asked} is above the model's own limit of {limit} tokens.")
    web = open_web(config, ranks) if uses_web(config) else None
    with named("model", config.model):
        engine = make_engine(config, folder, ranks.world_size)
    return [
        Agent(config, engine, Tools(config, chat, one.corpus, web), chat)
        for one in (task, task.world or task)
    ]


def begin(config, ranks, notes, asks=True, judges=False):
    """Try the services that the run will use (ConfigError on all ranks); then write its config.yaml
    and say what is special about it, unless it is for one typed question.
    """
    tries = ranks.rank == 0 and config.cassette_mode != "replay"
    trouble = ranks.share(tries and rollout.try_services(config, asks, judges))
    if trouble:
        raise ConfigError(trouble)
    if ranks.rank == 0 and not config.question:
        text = yaml.safe_dump(vars(config), sort_keys=False)
        replace_file(f"{config.run_dir}/config.yaml", text.encode())
        print(f"Preset {config.preset}; what differs from config.yaml:\n{describe(config)}\n")
        print(*notes, sep="\n", flush=True)


# --- measures: what is told about trajectories


def measures(trajectory):
    """What counts about one trajectory: f1 and em (0 without an answer), format_errors (0 or 1),
    calls, tokens.
    """
    answer = trajectory.answer
    golds = trajectory.question.answers
    cost = Counter(trajectory.cost)
    return {
        "trajectories": 1,
        "tokens": len(trajectory.token_ids),
        "f1": reward.f1_score(answer or "", golds),
        "em": 0.0 if answer is None else reward.exact_match(answer, golds),
        "format_errors": trajectory.stop_reason != "answer",
        # A call too many is not answered.
        "calls": sum(turn.observation != "" for turn in trajectory.turns),
        "searches": cost["searches"],
        "pages": cost["pages"],
    }


def step_sums(trajectories, groups=()):
    """Sums over this rank's share of a step: the measures of what the policy ended, and costs of
    all.
    """
    sums = Counter(groups=len(groups), lost=0, cost_usd=0)
    for trajectory in trajectories:
        for name, amount in trajectory.cost.items():
            sums[f"cost_{name}"] += amount
        if trajectory.stop_reason in POLICY_STOPS:
            sums.update(measures(trajectory))
        else:
            sums["lost"] += 1
    for group in groups:
        sums["tied_groups"] += not any(group.advantages)
        for value in group.rewards:
            sums["reward"] += value
    return sums


def mean(sums, name):
    return sums[name] / max(1, sums["trajectories"])


def summarize(trajectories):
    """Means of `measures` over the trajectories that the policy ended; n, their number; F1 by hops
    on the toy.
    """
    sums = step_sums(trajectories)
    scores = {"n": sums["trajectories"]}
    for name in ("f1", "em", "format_errors", "calls", "searches", "pages"):
        scores[name] = mean(sums, name)
    for hops in ("1hop", "2hop"):
        part = [one for one in trajectories if one.question.source.endswith(hops)]
        sums = step_sums(part)
        if sums["trajectories"]:
            scores[f"f1_{hops}"] = mean(sums, "f1")
    return scores


def step_means(sums):
    """Means over the trajectories of all ranks; lost and cost_... stay totals.

    `tied` is the share of groups, `failed` that of the calls to pages and services.
    """
    means = {name: mean(sums, name) for name in ("reward", "f1", "calls", "tokens")}
    means["bad_format"] = mean(sums, "format_errors")
    means["tied"] = sums["tied_groups"] / max(1, sums["groups"])
    asked = failed = 0
    for name, total in sums.items():
        if name.startswith(("cost_", "lost")):
            means[name] = total
        if name.endswith("_calls"):  # cost_search_calls, cost_page_calls, ...
            asked += total
        if name.endswith("_failed"):
            failed += total
    means["failed"] = failed / max(1, asked)
    return means


# --- a set of questions, by the agent or a baseline


class PlainChat(ChatFormat):
    """The prompt of the baselines: no tools, and for rag what a search for the question found."""

    def __init__(self, chat, found):
        vars(self).update(vars(chat))  # all that its __init__ found out, without trying again
        self.tools, self.found = None, found

    def prompt_ids(self, question):
        if question in self.found:
            question = f"{question}\n\nSearch results: {self.found[question]}"
        return super().prompt_ids(question)


async def search_once(questions, agent):
    """For rag, what a search for each question finds, by its text, and what it costs, by its id."""
    texts, costs = {}, {}

    async def search(question):
        record = Recording(question, [])
        entry = await agent.tools.entry("search", question.text, record)
        texts[question.text], *_ = agent.chat.fit(
            "search", [entry], agent.config.max_observation_tokens
        )
        costs[question.id] = record.cost

    agent.tools.slots = asyncio.Semaphore(agent.config.tool_threads or 1)
    await asyncio.gather(*map(search, questions))
    return texts, costs


def evaluate(numbered, agent, ranks, on_done, run=0):
    """Ask each of (number among all, question) once; the trajectories of this rank's share,
    for ranks.gather(). Seeds come of the numbers and of the `run` of the repeats.
    """
    share = dict(ranks.deal([*numbered]))
    batch = Batch(
        [*share.values()], [*share], 1, agent.config.eval_temperature, rollout.EVALUATION, run
    )
    return [trajectory for (trajectory,) in roll_out(batch, agent, on_done)]


def write_groups(config, name, step, groups):
    """All trajectories as JSON lines, and the best and the worst as text."""
    path = Path(f"{config.run_dir}/trajectories/{name}.jsonl")
    path.unlink(missing_ok=True)  # of a step that was run before a kill, and runs again
    explain = partial(reward.explain, config=config)
    report.write_trajectories(path, step, groups, explain)
    report.write_readable(path.with_suffix(".txt"), groups, explain)


def written(config, task):
    """What eval.py has written of each run, usable or not (never what the harness ended)."""
    asked = {question.id: question for question in task.held_out}
    runs = [[] for _ in range(config.repeats)]
    for file in sorted(Path(config.run_dir).glob("trajectories/eval*.jsonl")):
        for row in report.read_json_lines(file):
            if row["id"] in asked and row["index"] < config.repeats:
                runs[row["index"]].append(report.read_trajectory(row, asked[row["id"]]))
    return runs


def usable(tried, config):
    """The last trajectory of each question, by its id, that met no failed service; the others are
    asked again (but in a replay, which would repeat the failures).
    """
    replay = config.cassette_mode == "replay"
    known = {
        one.question.id: one
        for one in tried
        if replay or not {"search_failed", "reader_failed"} & one.cost.keys()
    }
    return dict(sorted(known.items()))


def ask_all(config, task, agent, done, left, ranks):
    """Ask what is not `done` yet in each run, `left` in all; a trajectory is written as it ends, so
    that no kill loses or repeats one.
    """
    path = f"{config.run_dir}/trajectories/{ranks.own('eval')}.jsonl"
    web = agent.tools.browser.web
    sums = Counter()
    paid = spent(config, done)
    found, prepaid = {}, {}
    explain = partial(reward.explain, config=config)

    def on_done(one):  # bar, run and prepaid: those of the loop below at the moment
        one = replace(one, cost=prepaid.get(one.question.id, {}) | one.cost)
        group = reward.judge(one.question, [one], config, 0)  # empty for what the harness ended
        report.write_trajectories(path, 0, [group], explain, run)
        sums.update(step_sums([one], [group]))
        usd = sums["cost_usd"]
        bar.update()
        bar.set_postfix_str(f"F1 {mean(sums, 'f1'):.3f}, ${usd:.2f}")
        check_budget(config, paid + usd * ranks.world_size)  # the others pay about as much

    # One run after the other, so that the first is the same as without repeats.
    with ranks.progress(config.method, left // ranks.world_size) as bar:
        for run, known in enumerate(done):
            missing = {n: one for n, one in enumerate(task.held_out) if one.id not in known}
            if web:
                web.run, web.enough = run, ENOUGH
            if config.method == "rag":
                asked = ranks.deal([*missing.values()])
                found, prepaid = asyncio.run(search_once(asked, agent))
            if config.method != "agent":
                agent = replace(agent, chat=PlainChat(agent.chat, found))
            evaluate(missing.items(), agent, ranks, on_done, run)
    raise_if_down(config, ranks.total(sums))  # now that every rank's file is complete


def spent(config, runs):
    """Dollars for these trajectories and for the judge so far."""
    costs = [one.cost for known in runs for one in known.values()]
    costs += report.read_json_lines(f"{config.run_dir}/judge.jsonl")
    return sum(cost.get("usd", 0.0) for cost in costs)


def ask_judge_all(config, runs):
    """MBE by question in each run (empty without a judge), a sentence on who judged and what stayed
    without a verdict, and dollars so far. RunStopped at max_cost.
    """
    paid = spent(config, runs)
    if not config.judge_url:
        return [{} for _ in runs], "not measured (judge_url is empty)", paid
    web = open_web(config, Ranks())
    counts = Counter()
    verdicts = []
    web.enough = ENOUGH

    def ask_one(one):
        if config.price_judge_token:
            check_budget(config, paid + counts["usd"])
        return reward.ask_judge(one, config, web, counts)

    try:
        for run, known in enumerate(runs):
            web.run = run
            with ThreadPoolExecutor(config.tool_threads or 1) as pool:
                asked = tqdm(pool.map(ask_one, known.values()), "judge", len(known), disable=None)
                verdicts.append(dict(zip(known, asked, strict=True)))
    finally:
        report.append_json_line(f"{config.run_dir}/judge.jsonl", {"usd": counts["usd"]})
        web.close()
    raise_if_down(config, web.totals)
    silent = {name: number for name, number in counts.items() if "fail_judge_" in name}
    causes = ", ".join(f"{number} {name}" for name, number in silent.items()) or "-"
    words = f"by {config.judge_model}; without a verdict, left out: {sum(silent.values())}"
    return verdicts, f"{words} ({causes})", paid + counts["usd"]


def scores_of(tried, known, judged, answers, config):
    """What `summarize` says of the usable trajectories, `known`, and more; but all that were
    `tried` cost, and count in `failed` and `blocked`. Their measures are added to `answers`.
    """
    rows, shown = [], Counter()
    sums = step_sums(tried)
    for key, one in known.items():
        text = one.answer and " ".join(reward.words(one.answer))
        rows.append(measures(one) | {"mbe": judged.get(key), "answer": text})
        answers[key].append(rows[-1])
        shown.update(report.behaviours(one))
    scores = summarize(known.values())
    for name in report.BEHAVIOURS:
        scores[name] = shown[name] / len(rows)
    scores |= {
        "mbe": mean_of(rows, "mbe"),
        "f1_interval": interval([row["f1"] for row in rows]),
        "usd": sums["cost_usd"],
        "failed": step_means(sums)["failed"],
    }
    if host_list(config):
        scores["blocked"] = sums["cost_blocked"] + sums["cost_fail_page_blocked_host"]
    return scores


def scores_over_runs(runs, verdicts, config):
    """(means over the runs, scores_of each run). Several have deviations, pass@k and the majority's
    scores, too; their interval draws questions, with the mean F1 of each.
    """
    each = []
    answers = defaultdict(list)  # by question: the measures of its trajectory in each run
    for tried, judged in zip(runs, verdicts, strict=True):
        known = usable(tried, config)
        if known:
            each.append(scores_of(tried, known, judged, answers, config))
    if config.repeats == 1:
        return each[0], each
    scores = {name: mean_of(each, name) for name in each[0] if name != "f1_interval"}
    right = "em" if scores["mbe"] is None else "mbe"
    averages, best, chosen = [], [], []
    for rows in answers.values():
        averages.append(mean_of(rows, "f1"))
        best.append(max(rows, key=lambda row: row[right] or 0.0))
        votes = Counter(row["answer"] for row in rows)
        del votes[None]  # who did not answer has no vote
        # The earliest of equals.
        chosen.append(max(rows, key=lambda row: votes[row["answer"]]))
    scores |= {
        "n": len(answers),
        "f1_interval": interval(averages),
        "pass_at_k": mean_of(best, right),
    }
    for name in ("f1", "em", "mbe"):
        values = [row[name] for row in each if row[name] is not None]
        scores[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        scores[f"majority_{name}"] = mean_of(chosen, name)
    return scores, each


def interval(f1):
    """The 95 % interval of the mean F1 of questions, from 2,000 draws of as many."""
    draws = np.random.default_rng(0).choice(f1, (2000, len(f1)))
    return np.quantile(draws.mean(1), (0.025, 0.975)).round(3)


def mean_of(rows, name):
    """The mean of a score over the rows that have it, None where none has it."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None
