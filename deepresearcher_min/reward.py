"""The reward: word-level F1 of the answer, or a penalty when there is no answer in the right
format. Below it models at an endpoint (the reader of pages, the judge of evaluations), and the sums
that a step or an evaluation is told by.

The scorer follows the published one to the bit: words are sets, so neither order nor repetition
counts, and articles are words (SQuAD's F1 differs in both). Omitted, as in the paper: any reward
for the way (tool use, length, style).
"""

import json
import os
import random
import re
import string
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from deepresearcher_min.config import BAD_REPLY, ROOT, Config, WebFailure, count, named
from deepresearcher_min.grpo import group_advantages
from deepresearcher_min.trajectory import POLICY_STOPS, Group, Question, Trajectory

PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation, " "))
FORMAT_FAILURES = {  # why there is no answer, for people; by stop reason
    "malformed": "its last turn was neither a complete thought with one tool call nor one with an "
    "answer",
    "tool_budget": "it asked for another tool after its last allowed call instead of answering",
    "length": "its last turn reached the limit of tokens for a turn (max_turn_tokens)",
    "context": "it reached the limit of tokens for a whole trajectory (max_model_len)",
}
# In a judge_prompt_file, as in the official prompt.
JUDGE_FIELDS = re.compile(r"\{(question|gt_answer|pred_answer)\}")


def words(text):
    """'The U.S.' -> ['the', 'u', 's']. Only ASCII punctuation separates: an en dash stays part of
    its word.
    """
    return text.lower().translate(PUNCTUATION_TO_SPACE).split()


def f1_score(prediction: str, answers: list | tuple) -> float:
    """Word-level F1, best over the gold answers: 'downtown diner' against ['A DINER'] is 1/2 (the
    official scorer).

    Raises ValueError without gold answers, and TypeError for a single string, whose letters would
    pass as answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, not one string {answers[:50]!r}")
    if not answers:
        raise ValueError("a question needs at least one gold answer")
    best = 0.0
    given = set(words(prediction))
    for gold in answers:
        wanted = set(words(gold))
        common = len(given & wanted)
        if common:  # an empty answer never scores, not even against an empty one
            precision = common / len(given)
            recall = common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def exact_match(prediction: str, answers: list | tuple) -> float:
    """1.0 if the prediction's words equal those of a gold answer, in order, else 0.0 (the official
    scorer).
    """
    f1_score(prediction, answers)  # the same complaints about unusable answers
    return float(words(prediction) in map(words, answers))


def reward(trajectory: Trajectory, config: Config) -> float:
    """F1 of the answer, or config.format_reward when the trajectory ended without one (paper
    section 3.3).

    Raises ValueError for what the harness ended (deadline, cancelled): it says nothing about the
    policy.
    """
    if trajectory.stop_reason not in POLICY_STOPS:
        raise ValueError(
            f"question {trajectory.question.id!r}: a {trajectory.stop_reason} trajectory has no "
            "reward"
        )
    if trajectory.stop_reason != "answer":
        return config.format_reward
    assert trajectory.answer is not None, "stopped with an answer: there is none"
    return f1_score(trajectory.answer, trajectory.question.answers)


def explain(trajectory, config) -> str:
    """The reward in words: which gold answer it was compared with, precision and recall, or what
    went wrong.
    """
    answer = trajectory.answer
    stop_reason = trajectory.stop_reason
    if stop_reason not in POLICY_STOPS:
        return f"no reward: the harness ended this trajectory ({stop_reason}), so it is left out"
    value = reward(trajectory, config)
    if answer is None:
        return f"reward {value:g} for the format: {FORMAT_FAILURES[stop_reason]}"
    golds = trajectory.question.answers
    best = max(golds, key=lambda gold: f1_score(answer, [gold]))
    given = set(words(answer))
    wanted = set(words(best))
    right = len(given & wanted)
    if not right:
        shown = " / ".join(gold[:80] for gold in golds[:3])
        return f"reward {value:g}: {answer[:80]!r} shares no word with the gold answers ({shown})"
    verdict = " (exact match)" if exact_match(answer, golds) else ""
    return (
        f"reward {value:.3g}{verdict}: against {best[:80]!r}, "
        f"{right} of the {len(given)} words given are right (precision {right / len(given):.2f}), "
        f"{right} of the {len(wanted)} wanted are there (recall {right / len(wanted):.2f})"
    )


def judge(question: Question, trajectories, config, step) -> Group:
    """Rewards and advantages of one question's trajectories; what the harness ended is left out."""
    kept = [one for one in trajectories if one.stop_reason in POLICY_STOPS]
    rewards = [reward(one, config) for one in kept]
    if config.shuffle_rewards:  # a control experiment
        random.Random(f"{config.seed} {step} {question.id}").shuffle(rewards)
    return Group(question, kept, rewards, group_advantages(rewards, config.advantage_std).tolist())


# --- models at an endpoint: the reader of pages, and the judge of answers (MBE)

# by endpoint and model: the names of parameters that it refuses
LEFT_OUT = {}
# what a message that refuses a parameter calls it
PARAMETER = (
    r"(?i)\b(?:(?P<temperature>temperature)|(?P<max_tokens>max[_ ]?tokens)"
    r"|(?P<max_completion_tokens>max_completion_tokens))\b"
)


def ask_model(web, url, key, payload, counts, deadline):
    """(text, tokens) of a chat completion; ("", 0) without text. `web` is a web.Web.

    `key`: the environment variable of the key. Parameters that the endpoint refuses by name are
    left out, max_tokens only after it was tried by its newer name.
    """
    headers = {"Authorization": f"Bearer {os.environ.get(key, '').strip()}"}
    known = LEFT_OUT.setdefault((url, payload["model"]), [])
    refused = list(known)
    while True:
        sent = dict(payload)
        for name in refused:
            value = sent.pop(name, None)
            if name == "max_tokens" and value:
                sent["max_completion_tokens"] = value
        try:
            reply = web.fetch_json(url, headers, sent, counts, deadline)
            text = reply["choices"][0]["message"].get("content")
            break
        except WebFailure as failure:
            said = failure.said
            told = [one.lastgroup for one in re.finditer(PARAMETER, said) if one.lastgroup in sent]
            if not told or failure.kind not in ("http_400", "http_422") or "context length" in said:
                raise
            refused.append(told[0])
        except (LookupError, TypeError, AttributeError):
            raise WebFailure(*BAD_REPLY) from None
    if refused != known:
        known[:] = refused
        if web.rank == 0:
            print(
                f"{url} refuses {', '.join(refused)}, and is asked without: {said}", file=sys.stderr
            )
    if not isinstance(text, str):
        return "", 0
    with suppress(LookupError, TypeError):
        return text, reply["usage"]["total_tokens"] + 0
    return text, len(f"{payload['messages']}{text}") // 4  # an estimate


def ask_service(role, config, web, messages, read, unread, counts, deadline):
    """read(the text of a reply) of the reader or the judge, through the cassette.

    `read` gives None for what it cannot read: the third such reply is a WebFailure, `unread`.
    """
    keys = vars(config)
    url = f"{keys[f'{role}_url'].rstrip('/')}/chat/completions"
    payload = {
        "model": keys[f"{role}_model"],
        "messages": messages,
        "temperature": keys[f"{role}_temperature"],
    }
    if role == "reader" and config.reader_tokens:
        payload["max_tokens"] = config.reader_tokens

    def ask():
        for _ in range(3):
            text, tokens = ask_model(web, url, f"{role.upper()}_API_KEY", payload, counts, deadline)
            count(counts, f"{role}_tokens", tokens)
            count(counts, "usd", tokens * keys[f"price_{role}_token"])
            found = read(text)
            if found not in (None, ""):
                return found
        raise WebFailure(*unread)

    return web.cached(role, [url, payload], ask, counts, deadline)


def judge_rules(config) -> str:
    """The text of judge_prompt_file, or ours; ConfigError where it cannot be used."""
    with named("judge_prompt_file", config.judge_prompt_file):
        rules = Path(config.judge_prompt_file or ROOT / "prompts/judge.txt").read_text("utf-8")
        if len(set(JUDGE_FIELDS.findall(rules))) in (1, 2):
            raise ValueError(
                "must hold all of {question}, {gt_answer} and {pred_answer}, or none of them"
            )
    return rules


def parse_verdict(reply) -> float | None:
    """1.0 or 0.0 by {"judgement": word} in the reply, the official form, or else by a word alone on
    its last line.
    """
    reply = reply.rpartition("</think>")[2].strip()
    told = re.findall(r'"judgement"\s*:\s*"(.*?)"', reply) or reply.splitlines()[-1:]
    verdict = re.fullmatch(r"\W*(IN)?CORRECT\W*", "\n".join(told), re.I)
    return None if verdict is None else float(not verdict[1])


def ask_judge(trajectory: Trajectory, config: Config, web, counts) -> float | None:
    """MBE, a language model's verdict on an answer: 1 or 0; None, counted as fail_judge_*, where
    there is no verdict. `web` is a web.Web.

    No answer is wrong and an exact match is right without asking, as in the official code. Rules
    come before the case, or have fields, which are filled in, as the official scorer does.
    """
    answer = trajectory.answer
    golds = list(trajectory.question.answers)
    if answer is None or exact_match(answer, golds):
        return float(answer is not None)
    if config.judge_normalize:
        golds = [*map(str.lower, golds)]
        answer = " ".join(words(answer))
    rules = judge_rules(config)
    question = trajectory.question.text
    case = {"question": question, "accepted": golds, "given": answer}
    asked = json.dumps(case, ensure_ascii=False)
    if JUDGE_FIELDS.search(rules):
        fields = {"question": question, "gt_answer": str(golds), "pred_answer": answer}
        asked = JUDGE_FIELDS.sub(lambda field: fields[field[1]], rules)
        rules = "You are a helpful assistant."
    messages = [{"role": "system", "content": rules}, {"role": "user", "content": asked}]
    unread = "no_verdict", "The judge gave no verdict."
    deadline = time.monotonic() + config.tool_timeout
    try:
        return ask_service("judge", config, web, messages, parse_verdict, unread, counts, deadline)
    except WebFailure:
        return None


# --- measures: what is told about trajectories


def measures(trajectory):
    """What counts about one trajectory: f1 and em (0 without an answer), format_errors (0 or 1),
    calls, tokens.
    """
    answer = trajectory.answer
    golds = trajectory.question.answers
    cost = trajectory.cost
    return {
        "trajectories": 1,
        "tokens": len(trajectory.token_ids),
        "f1": f1_score(answer or "", golds),
        "em": 0.0 if answer is None else exact_match(answer, golds),
        "format_errors": float(trajectory.stop_reason != "answer"),
        # A call too many is not answered.
        "calls": sum(turn.observation != "" for turn in trajectory.turns),
        "searches": cost.get("searches", 0),
        "pages": cost.get("pages", 0),
    }


def step_sums(groups, rollouts):
    """Sums over this rank's share of a step: the measures of what the policy ended, and costs of
    all.
    """
    sums = Counter(groups=len(groups), lost=0, cost_usd=0)
    for rollout in rollouts:
        for trajectory in rollout:
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
    sums = step_sums([], [trajectories])
    scores = {"n": sums["trajectories"]}
    for name in ("f1", "em", "format_errors", "calls", "searches", "pages"):
        scores[name] = mean(sums, name)
    for hops in ("1hop", "2hop"):
        part = [one for one in trajectories if one.question.source.endswith(hops)]
        sums = step_sums([], [part])
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
