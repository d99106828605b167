"""reward.py against the published scorer's outputs, numbers worked by hand, and the meaning of
every stop reason.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepresearcher_min.config import WORDS, load_config
from deepresearcher_min.evaluation import measures, step_means, step_sums, summarize
from deepresearcher_min.reward import (
    exact_match,
    explain,
    f1_score,
    judge,
    reward,
)
from deepresearcher_min.trajectory import HARNESS_STOPS, POLICY_STOPS, Question, Trajectory, Turn

pytestmark = pytest.mark.quick
ORACLE = Path(__file__).parents[2] / "shared/data/transcripts/score_oracle.jsonl"
CONFIG = load_config(["--format_reward=-0.75"])


def trajectory(
    stop_reason: str, answer: str | None = None, answers: tuple[str, ...] = ("Paris",)
) -> Trajectory:
    question = Question("q1", "Where?", answers)
    return Trajectory(
        question, [1, 2], [False, True], [float("nan"), -0.5], (), answer, stop_reason
    )


@pytest.mark.skipif(not ORACLE.exists(), reason="needs the recorded scores in ../shared")
def test_equals_the_official_scorer():
    rows = [json.loads(line) for line in ORACLE.read_text().splitlines()]
    # -1: tags missing or out of balance, no answer to score.
    scored = [row for row in rows if row["official_f1"] != -1]
    assert len(scored) == 138
    for row in scored:
        answer = re.search(r"<answer>(.*?)</answer>", row["response"], re.DOTALL).group(1)
        golds = row["ground_truth"].split("<|answer_split|>")
        assert f1_score(answer, golds) == row["official_f1"], row["id"]
        assert exact_match(answer, golds) == row["official_em"], row["id"]


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "em"),
    [
        ("downtown diner", ["A DINER"], 0.5, 0.0),  # articles count: 1 of 2 given, 1 of 2 wanted
        # Sets for F1, the whole text for exact match.
        ("the the the diner", ["the diner"], 1.0, 0.0),
        ("born 1976 in Oslo", ["Oslo", "Oslo 1976"], 2 / 3, 0.0),  # 2 of 4 and 2 of 2
        ("U.S.", ["u s"], 1.0, 1.0),
        ("don't", ["don t"], 1.0, 1.0),
        ("Bangladesh–India", ["Bangladesh India"], 0.0, 0.0),  # an en dash is not ASCII punctuation
        ("  Ünïcode\n", ["ÜNÏCODE"], 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0),
        ("!?", ["Paris"], 0.0, 0.0),
        ("🙂", ["🙂"], 1.0, 1.0),
        ("no", ["yes", "no"], 1.0, 1.0),
    ],
)
def test_scores_worked_by_hand(prediction, answers, f1, em):
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert exact_match(prediction, answers) == em


@settings(max_examples=50, deadline=None)  # another process may hold the core
@given(st.text(max_size=40), st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_scores_are_bounded_and_more_golds_never_hurt(prediction, answers):
    f1 = f1_score(prediction, answers)
    assert 0 <= f1 <= 1
    assert f1 == max(f1_score(prediction, [gold]) for gold in answers)
    assert f1_score(prediction, list(reversed(answers))) == f1
    if re.search(r"[a-z0-9]", prediction):
        assert f1_score(prediction, [prediction, *answers]) == 1
        assert exact_match(prediction, [*answers, prediction]) == 1


@pytest.mark.parametrize("score", [f1_score, exact_match])
def test_unusable_answers_are_errors(score):
    with pytest.raises(ValueError, match="at least one gold answer"):
        score("Paris", [])
    with pytest.raises(TypeError, match="not one string 'Paris'"):
        score("Paris", "Paris")


def test_every_stop_reason_has_its_reward():
    assert reward(trajectory("answer", "Paris, France"), CONFIG) == pytest.approx(2 / 3)
    # An empty answer is wrong, not malformed.
    assert reward(trajectory("answer", ""), CONFIG) == 0.0
    for stop_reason in set(POLICY_STOPS) - {"answer"}:
        assert reward(trajectory(stop_reason), CONFIG) == -0.75
        assert WORDS[stop_reason] in explain(trajectory(stop_reason), CONFIG)
        assert "-0.75" in explain(trajectory(stop_reason), CONFIG)
    for stop_reason in HARNESS_STOPS:
        with pytest.raises(ValueError, match=f"'q1': a {stop_reason} trajectory has no reward"):
            reward(trajectory(stop_reason), CONFIG)
        assert f"the harness ended this trajectory ({stop_reason})" in explain(
            trajectory(stop_reason), CONFIG
        )
    with pytest.raises(AssertionError, match="there is none"):
        reward(trajectory("answer", None), CONFIG)


def test_explanations_name_gold_precision_and_recall():
    text = explain(trajectory("answer", "born 1976 in Oslo", ("Bergen", "Oslo 1976")), CONFIG)
    assert text == (
        "reward 0.667: against 'Oslo 1976', 2 of the 4 words given are right (precision 0.50), "
        "2 of the 2 wanted are there (recall 1.00)"
    )
    assert "(exact match)" in explain(trajectory("answer", "paris!"), CONFIG)
    nothing = explain(trajectory("answer", "Rome", ("Paris", "x" * 40_000)), CONFIG)
    assert nothing.startswith("reward 0: 'Rome' shares no word with the gold answers (Paris / xxx")
    assert len(nothing) < 250


def test_judge_leaves_out_what_the_harness_ended():
    stops = ("deadline", "malformed", "cancelled")
    trajectories = [trajectory("answer", "Paris"), *(trajectory(stop) for stop in stops)]
    group = judge(trajectories[0].question, trajectories, CONFIG, step=0)
    assert list(group.rewards) == [1.0, -0.75]
    assert group.advantages == pytest.approx([0.7071, -0.7071], abs=1e-3)  # +-0.875 / std 1.2374
    assert group.trajectories == [trajectories[0], trajectories[2]]
    nothing = judge(trajectories[0].question, [trajectory("deadline")], CONFIG, step=0)
    assert (list(nothing.rewards), list(nothing.advantages)) == ([], [])


def test_shuffled_rewards_stay_in_their_group_and_follow_the_seed():
    config = load_config(["--shuffle_rewards"])
    trajectories = [trajectory("answer", "Paris")] * 2 + [trajectory("answer", "Rome")] * 6
    groups = [
        judge(trajectories[0].question, trajectories, config, step=step) for step in range(20)
    ]
    assert all(sorted(group.rewards) == [0.0] * 6 + [1.0] * 2 for group in groups)
    assert len({tuple(group.rewards) for group in groups}) > 5
    assert (
        judge(trajectories[0].question, trajectories, config, step=3).rewards == groups[3].rewards
    )


def test_summaries_are_means_over_what_the_policy_did():
    answers = [trajectory("answer", "Paris"), trajectory("answer", "in Paris")]
    rollout = [*answers, trajectory("length"), trajectory("deadline")]
    scores = summarize(rollout)
    assert (scores["n"], scores["em"], scores["format_errors"]) == pytest.approx((3, 1 / 3, 1 / 3))
    assert scores["f1"] == pytest.approx((1 + 2 / 3) / 3)
    group = judge(rollout[0].question, rollout, CONFIG, step=0)
    halves = step_sums(rollout[:2], [group]), step_sums(rollout[2:])
    means = step_means(halves[0] + halves[1])
    assert means["reward"] == pytest.approx((1 + 2 / 3 - 0.75) / 3)
    assert means["f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert (means["bad_format"], means["tied"], means["lost"]) == pytest.approx((1 / 3, 0, 1))


def test_a_call_too_many_is_not_counted_and_a_replaced_reward_is_what_is_explained(monkeypatch):
    turns = [Turn((1, 2), (2, 3), "", "search", "[]"), Turn((3, 4), (4, 4), "", "search")]
    one = Trajectory(
        trajectory("malformed").question,
        [0] * 4,
        [False] * 4,
        [0.0] * 4,
        tuple(turns),
        None,
        "tool_budget",
    )
    assert measures(one)["calls"] == 1
    monkeypatch.setattr("deepresearcher_min.reward.reward", lambda trajectory, config: 0.25)
    assert explain(trajectory("answer", "Rome"), CONFIG).startswith(
        "reward 0.25: 'Rome' shares no word"
    )
