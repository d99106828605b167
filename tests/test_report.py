"""Reports: lines, files that survive kills, tables, plots, and the page, which a real browser opens."""

import base64
import copy
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deepresearcher_min import report
from deepresearcher_min.protocol import Entry, page_item, render, search_item
from deepresearcher_min.trajectory import Group, Question, Trajectory, Turn

PAYLOADS = Path(__file__).parents[2] / "shared" / "data" / "transcripts" / "deepresearcher_signal"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


WORDS = ("plans", "cross-checks", "reflects", "admits")


def explain(trajectory):
    return f"because {trajectory.stop_reason}"


def build(question, script, answer, stop_reason="answer", seed=0):
    """A trajectory from [(kind, text, observation)]: about four characters to a token, logprobs from a seed."""
    rng = np.random.default_rng(seed)
    mask, turns = [False] * 40, []
    for kind, text, observation in script:
        start, end = len(mask), len(mask) + 2 + len(text) // 4
        seen = end + len(observation) // 4
        mask += [True] * (end - start) + [False] * (seen - end)
        turns.append(Turn((start, end), (end, seen), text, kind, observation))
    logprobs = np.where(mask, -rng.exponential(0.3, len(mask)), np.nan)
    ids = rng.integers(0, 500, len(mask))
    cost = {"searches": sum(kind == "search" for kind, _, _ in script)}
    return Trajectory(question, ids, mask, logprobs, tuple(turns), answer, stop_reason, cost)


def researcher(question, answer, seed=0, title="Ray Lake", note="He lived in Liverpool.", stop_reason="answer"):
    url, look = "https://example.org/lake", "I look first, then I read." if question.id == "q3" else "Look."
    hits = (search_item(f"About {title}", title, url), search_item("b", "B", "u"))
    found = render("search", [Entry(f"ray lake {title}", hits)])
    notes = render("browse", [Entry(url, (page_item(note), page_item("More.", 1)))])
    script = [
        ("search", f'<think> {look} </think>\n<tool_call>{{"name": "web_search"}}</tool_call>', found),
        ("browse", '<think> Read. </think>\n<tool_call>{"name": "browse_webpage"}</tool_call>', notes),
        ("answer", f"<think> Known. </think>\n<answer> {answer} </answer>", ""),
    ]
    if stop_reason == "malformed":
        script[-1] = ("malformed", "<think> the the the", "")
    return build(question, script, answer if stop_reason == "answer" else None, stop_reason, seed)


def group(number, step=1, size=4):
    rng = random.Random(f"{number} {step}")
    question = Question(f"q{number}", f"Where was number {number} born?", ("Liverpool",), ("nq", "2wiki")[number % 2])
    rewards = [rng.choice([1.0, 0.5, 0.0, -1.0]) for _ in range(size)]
    stops = ["malformed" if reward < 0 else "answer" for reward in rewards]
    trajectories = [researcher(question, "Liverpool", i, stop_reason=stop) for i, stop in enumerate(stops)]
    return Group(question, trajectories, rewards, [reward - sum(rewards) / size for reward in rewards])


def write_run(folder, steps=6, questions=4, size=4):
    """A run folder as train.py leaves it; returns its folder."""
    metrics = report.MetricsFile(folder / "metrics.jsonl")
    metrics.append({"step": 0, "eval": {"f1": 0.26}})
    for step in range(1, steps + 1):
        share = step / steps
        numbers = {"reward": share - 0.1, "f1": share, "bad_format": 0.1 - 0.1 * share, "calls": 2.0, "mismatch": 2e-6}
        metrics.append({"step": step, "steps": steps, **numbers, "kl": 0.01, "roll_s": 2.0, "update_s": 1.0})
        groups = [group(number, step, size) for number in range(questions)]
        report.write_trajectories(folder / "trajectories" / f"step-{step:06d}.jsonl", step, groups, explain)
    evaluation = [group(number, 0, 1) for number in range(questions)]
    report.write_trajectories(folder / "trajectories" / "eval-before.jsonl", 0, evaluation, explain)
    summary = {"seed": 0, "seconds": 90.0, "before": {"f1": 0.26, "em": 0.2}, "after": {"f1": 0.99, "em": 0.98}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("preset: toy\nmodel: toy\nlr: 0.0004\n")
    return folder


def page_data(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


# --- console, tables, plots


METRICS = {
    "step": 12, "steps": 200, "reward": 0.414, "f1": 0.45, "bad_format": 0.03, "tied": 0.12, "calls": 3.4,
    "tokens": 2104, "kl": 0.002, "mismatch": 0.0003, "grad_norm": 0.37, "roll_s": 41.0, "update_s": 22.0, "usd": 0.84,
}  # fmt: skip


@pytest.mark.quick
def test_step_line_worked_example():
    assert report.step_line(METRICS) == (
        "step  12/200 | reward   .41 | f1  .45 | bad_format   3% | tied  12% | calls  3.4 | tokens  2.1k | kl  .0020 | "
        "mismatch   .0003 | grad   .37 | roll  41.0s upd  22.0s | $0.84"
    )


@pytest.mark.quick
def test_step_lines_align_and_missing_values_are_dashes():
    other = METRICS | {"step": 3, "reward": -1.0, "f1": 1.0, "bad_format": 1.0, "tied": 0.0, "calls": 10.0, "usd": 12.5}
    bare = {"step": 199, "steps": 200, "reward": float("nan"), "tokens": 142.4}
    lines = [report.step_line(each) for each in (METRICS, other, bare)]
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2]
    assert "reward -1.00" in lines[1] and "f1 1.00" in lines[1] and "bad_format 100%" in lines[1]
    assert "reward   nan" in lines[2] and "tokens   142" in lines[2] and "kl      -" in lines[2]
    assert lines[2].endswith("$-")


@pytest.mark.quick
def test_the_table_before_and_after_has_the_rows_that_exist():
    before = {"f1": 0.26, "f1_2hop": 0.11, "format_errors": 0.085, "calls": 1.4}
    after = {**before, "f1": 0.991, "second_hop": 1.0}
    text = report.text_table(report.score_rows({"before": before, "after": after}))
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "F1", "F1, 2-hop questions", "tool calls", "format errors", "takes the second hop",
    ]  # fmt: skip
    assert lines[2].split() == ["F1", "0.260", "0.991"] and lines[-1].split()[-2:] == ["-", "100.0%"]
    assert "EM" not in text and len({len(line) for line in lines}) == 1


@pytest.mark.quick
def test_table_of_sources_as_text_and_markdown():
    sources = {"nq": {"n": 512, "f1": 0.396, "em": 0.3}, "Bamboogle\x1b[31m": {"n": 125, "f1": 0.71, "mbe": 0.6}}
    rows = report.score_rows({**sources, "all": {"n": 637, "f1": 0.4576, "f1_interval": [0.4, 0.511], "em": None}})
    assert rows[1:] == [
        ["questions", "512", "125", "637"],
        ["F1", "0.396", "0.710", "0.458"],
        ["F1, 95 % interval", "-", "-", "0.40–0.51"],
        ["EM", "0.300", "-", "-"],
        ["MBE", "-", "0.600", "-"],
    ]
    text = report.text_table(rows)
    assert "\x1b" not in text and len({len(line) for line in text.splitlines()[1:]}) == 1
    markdown = report.text_table(rows, markdown=True).splitlines()
    assert re.fullmatch(r"\| -+ \| -+: \| -+: \| -+: \|", markdown[1])
    assert len(markdown) == 7 and all(line.count("|") == 5 for line in markdown)


@pytest.mark.quick
def test_text_plot_worked_example():
    assert report.text_plot([(1, 0.0), (2, 0.25), (3, 0.5), (4, 1.0)], width=8, height=2) == (
        " 1.00 │      ██\n"
        "      │  ▄▄████\n"
        " 0.00 └────────\n"
        "       step 1 4"
    )  # fmt: skip


@pytest.mark.quick
@settings(deadline=None)  # another process may hold the core
@given(
    values=st.lists(st.none() | st.floats(-2, 2) | st.just(float("nan")), max_size=200),
    width=st.integers(10, 90),
    height=st.integers(1, 12),
)
def test_text_plot_always_fits(values, width, height):
    plot = report.text_plot(list(enumerate(values)), width, height)
    if any(value is not None and math.isfinite(value) for value in values):
        lines = plot.splitlines()
        assert len(lines) == height + 2 and {len(line) for line in lines[:-1]} == {width + 7}
    else:
        assert plot == "nothing to plot yet"


@pytest.mark.quick
@pytest.mark.parametrize("rows", [0, 1, 30])
def test_curve_png_is_a_picture(tmp_path, rows):
    metrics = [{"step": i + 1, "f1": i / 30, "reward": None, "calls": 2.0, "bad_format": 0.0} for i in range(rows)]
    report.curve_png(metrics, tmp_path / "curve.png", {"f1": 0.2}, {"f1": 0.9} if rows else {})
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- files of JSON lines


@pytest.mark.quick
def test_metrics_survive_a_kill_at_every_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "f1": step / 10, "eval": {"em": 0.5}} for step in range(4)]
    metrics = report.MetricsFile(path)
    for row in rows:
        metrics.append(row)
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == rows == metrics.rows
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = report.MetricsFile(path, resumed_step=2)
        complete = whole[:size].count(b"\n") + (size > 0 and whole[size : size + 1] == b"\n")
        assert again.rows == rows[: min(complete, 3)]
        again.append({"step": 3, "f1": 1.0})
        assert list(report.read_json_lines(path)) == [*rows[: min(complete, 3)], {"step": 3, "f1": 1.0}]


@pytest.mark.quick
def test_metrics_hold_no_nan_and_take_array_numbers(tmp_path):
    metrics = report.MetricsFile(tmp_path / "new" / "metrics.jsonl")
    metrics.append({"step": np.int64(1), "kl": float("nan"), "grad_norm": np.float32(0.5), "inner": [math.inf]})
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == (
        '{"step": 1, "kl": null, "grad_norm": 0.5, "inner": [null]}\n'
    )


@pytest.mark.quick
def test_trajectory_lines_worked_by_hand(tmp_path):
    question = Question("q", "Who?", ("her",), "nq")
    nan = math.nan
    turns = (Turn((1, 3), (3, 4), "<think>a", "search", "[]"), Turn((4, 5), (5, 5), "<think>b", "answer"))
    logprobs = [nan, -0.2, -0.4, nan, -1.0]
    one = Trajectory(question, [5, 6, 7, 8, 9], [0, 1, 1, 0, 1], logprobs, turns, "her", "answer", {"searches": 1})
    before = copy.deepcopy(vars(one.turns[0]))
    path = tmp_path / "trajectories" / "step.jsonl"
    report.write_trajectories(path, 7, [Group(question, [one], [1.0], [nan])], explain)
    (row,) = report.read_json_lines(path)
    assert {key: row[key] for key in ("step", "index", "reward", "advantage", "why")} == {
        "step": 7, "index": 0, "reward": 1.0, "advantage": None, "why": "because answer",
    }  # fmt: skip
    assert [turn["logprob"] for turn in row["turns"]] == pytest.approx([-0.3, -1.0])
    assert row["behaviours"] == []
    assert {key: value for key, value in one.to_json().items() if key != "turns"}.items() <= row.items()
    assert vars(one.turns[0]) == before  # the input is as it was


@pytest.mark.quick
def test_trajectories_are_read_as_they_were_written(tmp_path):
    groups, path = [group(0), group(1)], tmp_path / "eval.jsonl"
    report.write_trajectories(path, 0, groups, explain)
    written = [one for each in groups for one in each.trajectories]
    for one, again in zip(written, report.read_trajectories(path), strict=True):
        assert json.dumps(again.to_json()) == json.dumps(one.to_json()) and again.turns == one.turns
        assert np.allclose(again.logprobs, one.logprobs, atol=1e-6, equal_nan=True)


@pytest.mark.quick
def test_a_torn_line_costs_one_trajectory_and_no_other(tmp_path):
    path = tmp_path / "step.jsonl"
    report.write_trajectories(path, 1, [group(0)], explain)
    path.write_bytes(path.read_bytes()[:-30])
    report.write_trajectories(path, 1, [group(1)], explain)
    assert [row["id"] for row in report.read_json_lines(path)] == ["q0"] * 3 + ["q1"] * 4


# --- behaviours


def acted(case):
    """A trajectory from the short form of behaviour_cases.yaml; the calls hold words that must not count."""
    turns = []
    for ((kind, text),) in map(dict.items, case["turns"]):
        thought, _, answer = text.partition(" => ")
        end = (
            f"<answer> {answer} </answer>"
            if kind == "answer"
            else '<tool_call>{"query": ["confirm, wrong"]}</tool_call>'
        )
        turns.append(Turn((0, 0), (0, 0), f"<think> {thought} </think>\n{end}", kind))
    return Trajectory(Question("q", "?", ("x",)), [], [], [], tuple(turns), "x", "answer")


@pytest.mark.quick
@pytest.mark.parametrize(("part", "right", "false_alarms"), [("fitted", 48, 0), ("held_out", 43, 0)])
def test_behaviours_on_hand_labelled_trajectories(part, right, false_alarms):
    """12 trajectories x 4 behaviours: all of those fitted; 43 of 48 held out, where 8 of 13 shown are found."""
    cases = yaml.safe_load(Path(__file__).with_name("behaviour_cases.yaml").read_text())[part]
    decisions = [(name in case["shows"], name in report.behaviours(acted(case))) for case in cases for name in WORDS]
    print(f"{part}: {sum(map(lambda pair: pair[0] == pair[1], decisions))} of {len(decisions)} right")
    assert sum(shown == found for shown, found in decisions) == right
    assert sum(found and not shown for shown, found in decisions) == false_alarms


# --- trajectories as text


@pytest.mark.quick
def test_readable_tells_the_whole_story_without_control_characters():
    question = Question("q", "Where?\x1b]0;owned\x07", ("Liverpool", "L'pool"), "nq")
    one = researcher(question, "Liver\x9bpool\ud800", note="\x1b[2J\x08He lived there.")
    text = report.readable(one, "reward 0.5: against 'Liverpool'")
    assert "Where?" in text and "Liverpool | L'pool" in text and "He lived there." in text
    assert text.endswith("reward 0.5: against 'Liverpool'") and "Gold" not in report.readable(one)
    assert "--- turn 2: browse" in text and "<think> Known. </think>" in text and "--- end: answer" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    text.encode()  # UTF-8 can hold it


@pytest.mark.quick
def test_write_readable_picks_best_and_worst(tmp_path):
    groups = [group(number) for number in range(6)]
    rewards = [reward for each in groups for reward in each.rewards]
    report.write_readable(tmp_path / "step.txt", groups, explain)
    text = (tmp_path / "step.txt").read_text()
    found = [float(value) for value in re.findall(r"est reward: (-?[\d.]+), advantage [+-]\d", text)]
    assert found == [max(rewards), min(rewards)] and text.count("because ") == 2
    report.write_readable(tmp_path / "empty.txt", [], explain)
    assert (tmp_path / "empty.txt").read_text() == ""


# --- the page


@pytest.mark.quick
def test_page_holds_the_run_and_nothing_from_outside(tmp_path):
    text = report.write_html(write_run(tmp_path)).read_text()
    data = page_data(tmp_path / "report.html")
    assert len(data["trajectories"]) == 6 * 4 * 4 + 4 and data["note"] == "100 trajectories from 7 of 7 files"
    assert data["compared"] == [["", "before", "after"], ["F1", "0.260", "0.990"], ["EM", "0.200", "0.980"]]
    assert data["config"]["lr"] == 0.0004 and data["metrics"][1]["step"] == 1
    turn = data["trajectories"][0]["turns"][0]
    assert turn["observation"][0]["web_page_info_list"][0]["title"] == "Ray Lake"  # unfolded for the page
    assert "token_ids" not in data["trajectories"][0] and data["trajectories"][0]["tokens"] > 40
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src 'sha256-{digest}'" in text
    markup = text.replace(script, "").split('id="data">')[0]
    assert not re.search(r"(src|href)=|url\(|@import|https?:", markup)
    code = re.sub(r"//.*", "", script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\.href|\.src|fetch|import", code)


@pytest.mark.quick
@pytest.mark.skipif(not PAYLOADS.exists(), reason="no shared test data")
def test_real_tool_payloads_unfold(tmp_path):
    files = (("search", "data_search.json"), ("browse", "data_read.json"))
    contents = [json.loads((PAYLOADS / name).read_text())[0]["content"] for _, name in files]
    script = [(kind, "<think> x", repr(content)) for (kind, _), content in zip(files, contents, strict=True)]
    question = Question("ray", "What happened to Ray Lake?", ("suicide",), "nq")
    one = build(question, [*script, ("answer", "<think> y </think><answer> suicide </answer>", "")], "suicide")
    report.write_trajectories(
        tmp_path / "trajectories" / "eval.jsonl", 0, [Group(question, [one], [1.0], [0.0])], explain
    )
    (row,) = page_data(report.write_html(tmp_path))["trajectories"]
    assert [turn["observation"] for turn in row["turns"]] == [*contents, ""]


@pytest.mark.quick
def test_page_of_an_evaluation_and_of_a_run_that_was_stopped(tmp_path):
    (tmp_path / "a").mkdir()
    assert page_data(report.write_html(tmp_path / "a"))["trajectories"] == []
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"table": [["", "nq"], ["F1", "0.500"]]}))
    data = page_data(report.write_html(tmp_path / "a"))
    assert data["summary"]["table"][1] == ["F1", "0.500"] and data["compared"] == []


@pytest.mark.quick
def test_a_step_that_ran_twice_is_shown_once(tmp_path):
    path = tmp_path / "trajectories" / "step-000001.jsonl"
    for _ in range(2):
        report.write_trajectories(path, 1, [group(0)], explain)
    assert len(page_data(report.write_html(tmp_path))["trajectories"]) == 4


@pytest.mark.quick
def test_a_full_page_keeps_evaluations_and_the_last_steps(tmp_path, monkeypatch):
    write_run(tmp_path, steps=8, questions=2, size=4)
    monkeypatch.setattr(report, "MAX_TRAJECTORIES", 2 + 2 * 8)
    rows = page_data(report.write_html(tmp_path))["trajectories"]
    assert sorted({row["file"] for row in rows}) == ["eval-before", "step-000007", "step-000008"]
    assert len(rows) == 18 and rows[0]["step"] == 0 and rows[-1]["step"] == 8


@pytest.mark.quick
def test_a_full_page_keeps_observations_by_question(tmp_path, monkeypatch):
    questions = [Question(f"q{number}", "Where?", ("Liverpool",), "nq") for number in range(10, 18)]
    groups = [Group(each, [researcher(each, "Liverpool")] * 2, [1.0] * 2, [0.0] * 2) for each in questions]
    for step in (1, 2):
        report.write_trajectories(tmp_path / "trajectories" / f"step-{step:06d}.jsonl", step, groups, explain)
    turns = [turn for each in groups for one in each.trajectories for turn in one.turns]
    monkeypatch.setattr(report, "MAX_PAGE_TEXT", sum(len(turn.text + turn.observation) for turn in turns))
    monkeypatch.setattr(report, "MAX_TURN", 10)
    data = page_data(report.write_html(tmp_path))
    cut = [row for row in data["trajectories"] if row["turns"][0]["observation"] is None]
    whole = [row for row in data["trajectories"] if row["turns"][0]["observation"] is not None]
    assert len(cut) == len(whole) == 16 and "; 16 of them without observations" in data["note"]
    assert {row["id"] for row in cut}.isdisjoint({row["id"] for row in whole})
    assert {turn["text"] for row in cut for turn in row["turns"]} <= {
        "<think> Lo",
        "<think> I ",
        "<think> Re",
        "<think> Kn",
    }
    assert all(turn["text"].endswith(">") for row in whole for turn in row["turns"])


# --- the page in a real browser


def browse(path, folder, *arguments):
    """Open a file in headless Chromium; returns the DOM after its scripts ran."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=3000", *arguments, path.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def visible(dom):
    """The DOM without the data block and the script, in which every text stands, too."""
    return re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)


@pytest.fixture
def listener():
    """A loopback server that notes every request: (URL, list of paths)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def attacks(url):
    own = "document.title='OWNED';document.documentElement.setAttribute('owned','1')"
    return [
        f"</script><script>{own}</script>",
        f"<!--<script></script><script>{own}</script>",
        f'<img src="{url}/image" onerror="{own}"><svg onload="{own}"></svg>',
        f"'\"><iframe src=\"javascript:parent.{own}\"></iframe><iframe src='{url}/frame'></iframe>",
        f"javascript:{own}",
        f'<link rel=stylesheet href="{url}/style"><style>@import "{url}/import";</style><base href="{url}/">',
        f'<meta http-equiv=refresh content="0;url={url}/moved"><form action={url}><details open ontoggle="{own}">',
        "\u2028\u2029\x00\ud800 ]]> &lt;b&gt; \\u003c/script> {{7*7}} ${7*7} __DATA__ __POLICY__",
    ]


def hostile_run(folder, url):
    """A run in which everything that the web, the model or the data wrote is an attack."""
    (folder / "trajectories").mkdir(parents=True)
    for number, attack in enumerate(attacks(url)):
        question = Question(f"q{attack}", attack, (attack, "gold"), attack)
        strange = [("browse", f"<think>{attack}</think>{attack}", attack), ("answer", attack, repr([{"new": attack}]))]
        trajectories = [
            researcher(question, attack, title=attack, note=attack),
            build(question, strange, None, "malformed"),
        ]
        groups = [Group(question, trajectories, [1.0, -1.0], [1.0, -1.0])]
        path = folder / "trajectories" / f"step-{number:06d}.jsonl"
        report.write_trajectories(path, number, groups, lambda one: one.question.text)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "f1": 0.5, "reward": 0.5, "note": attacks(url)}))
    (folder / "config.yaml").write_text(json.dumps({"model": "".join(attacks(url)[:6]), "search": attacks(url)[2]}))
    scores = {attack: {"n": 1, "f1": 0.5} for attack in attacks(url)}
    table = report.score_rows(scores)
    (folder / "summary.json").write_text(
        json.dumps({"overall": {"f1": 0.5}, "table": table, "caption": attacks(url)[2]})
    )
    return folder


def unguarded(path, script):
    """A copy of the page without its policy and with a test's script at its end."""
    text = re.sub(r"<meta http-equiv.*?>", "", path.read_text())
    copy = path.with_name("unguarded.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return copy


OPEN_ALL = """
document.querySelectorAll('.list button').forEach(button => {
  button.click();
  document.querySelectorAll('summary').forEach(fold => fold.click());
});
"""


@needs_chromium
@pytest.mark.quick
def test_hostile_text_stays_text(tmp_path, listener):
    url, asked = listener
    path = report.write_html(hostile_run(tmp_path / "run", url))
    # As it is, and then every trajectory and fold opened without a policy: text nodes alone must be enough.
    for page in (path, unguarded(path, OPEN_ALL)):
        dom = browse(page, tmp_path / "profile")
        assert "<title>run</title>" in dom and " owned=" not in dom
        shown = visible(dom)
        assert "&lt;img src=" in shown and "__DATA__ __POLICY__" in shown and "<h2>Configuration</h2>" in shown
        assert not re.search(r"<(img|iframe|link|base|form|meta http-equiv=.?refresh)", shown)
    assert asked == []


@needs_chromium
@pytest.mark.quick
def test_the_attacks_work_on_a_careless_page(tmp_path, listener):
    """The control: the same browser and the same detectors on a page that writes texts as they are."""
    url, asked = listener
    careless = tmp_path / "careless.html"
    for attack in (attacks(url)[0], attacks(url)[2]):
        careless.write_text(f"<title>run</title><p>{attack}</p>")
        dom = browse(careless, tmp_path / "profile")
        assert "<title>OWNED</title>" in dom and ' owned="1"' in dom
    assert asked


@needs_chromium
@pytest.mark.quick
def test_the_policy_stops_a_script_that_is_not_ours(tmp_path):
    path = report.write_html(write_run(tmp_path / "run", steps=1))
    assert "<h2>Trajectories</h2>" in visible(browse(path, tmp_path / "profile"))
    path.write_text(path.read_text().replace('"use strict";', '"use strict" ;'))
    assert "<h2>Trajectories</h2>" not in visible(browse(path, tmp_path / "profile"))


INTERACT = r"""
const lines = [], say = (...parts) => lines.push(parts.join(" | "));
const selects = [...document.querySelectorAll("select")], list = document.querySelector(".list");
const state = () => list.querySelector(".count").textContent, buttons = () => list.querySelectorAll("button").length;
const choose = (i, start) => {
  selects[i].value = [...selects[i].options].find(option => option.textContent.startsWith(start)).value;
  selects[i].onchange();
};
const type = text => { const box = document.querySelector("input"); box.value = text; box.oninput(); };
say("all", state(), buttons());
if (list.querySelector(".more")) { list.querySelector(".more").click(); say("more", buttons()); }
choose(0, "step-000002"); say("step", state());
choose(0, "all"); choose(1, "2wiki"); say("source", state());
choose(1, "all"); choose(2, "malformed"); say("stop", state());
choose(2, "all"); choose(3, "below 0"); say("reward", state());
choose(3, "all"); choose(4, "plans"); say("behaviour", state());
choose(4, "all"); choose(5, "lowest"); say("lowest", list.querySelector("button b").textContent);
choose(5, "highest"); say("highest", list.querySelector("button b").textContent);
type("NUMBER 3 "); say("words", state());
type("no such words"); say("nothing", state());
type(""); choose(0, "step-000002");
list.querySelectorAll("button")[1].click();
const titles = [...document.querySelectorAll(".strip span")].map(node => node.title.replaceAll("\n", ", "));
say("titles", titles.join(" / "));
const folds = [...document.querySelectorAll(".run details")];
say("folds", folds.length, folds.every(node => !node.open));
const out = document.createElement("pre");
out.id = "said"; out.textContent = lines.join("\n"); document.body.append(out);
"""


def interact(folder):
    """What a test's script sees when it uses the page's filters."""
    dom = browse(unguarded(report.write_html(folder), INTERACT), folder / "profile")
    said = re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)[1].replace("&lt;", "<").replace("&gt;", ">")
    return dict(line.split(" | ", 1) for line in said.splitlines())


@needs_chromium
@pytest.mark.quick
def test_filters_order_and_hover(tmp_path):
    said = interact(write_run(tmp_path, steps=6, questions=4, size=4))
    rows = page_data(tmp_path / "report.html")["trajectories"]

    def count(condition):
        return f"{sum(map(condition, rows))} of 100"

    assert said["all"] == "100 of 100 | 100"
    assert said["step"] == "16 of 100"
    assert said["source"] == count(lambda row: row["source"] == "2wiki")
    assert said["stop"] == count(lambda row: row["stop_reason"] == "malformed")
    assert said["reward"] == count(lambda row: row["reward"] < 0)
    assert (
        said["behaviour"] == count(lambda row: row["id"] == "q3") == count(lambda row: row["behaviours"] == ["plans"])
    )
    assert said["lowest"] == "−1.00" and said["highest"] == "1.00"
    assert said["words"] == count(lambda row: row["id"] == "q3") and said["nothing"] == "0 of 100"
    second = [row for row in rows if row["file"] == "step-000002"]
    second = sorted(second, key=lambda row: -row["reward"])[1]
    titles = said["titles"].split(" / ")
    assert [title.split(",")[0] for title in titles[:4]] == ["Prompt", "<think>", "Turn 1: search", "Observation"]
    advantage = f"{second['advantage']:+.3f}".replace("-", "−")
    logprob = f"{second['turns'][0]['logprob']:.4f}".replace("-", "−")
    assert f"advantage of each of these tokens: {advantage}" in titles[2]
    assert f"mean log-probability: {logprob}" in titles[2] and "mismatch of engine and policy in this step" in titles[2]
    assert said["folds"] == "2 | true"


@needs_chromium
@pytest.mark.slow
def test_4096_trajectories_stay_usable(tmp_path):
    """4,096 of 5,120 trajectories with 8 kB of observations each: what is beyond the limit is cut."""
    note, stops = "He lived in Liverpool. " * 350, ["answer", "malformed"] * 4
    for step in range(1, 6):
        groups = []
        for n in range(128):
            question = Question(f"q{n}", f"Where was number {n} born?", ("Liverpool",), f"{n % 2 + 1}wiki")
            trajectories = [researcher(question, "Liverpool", note=note, stop_reason=stop) for stop in stops]
            groups.append(Group(question, trajectories, [1.0, -1.0] * 4, [1.0, -1.0] * 4))
        report.write_trajectories(tmp_path / "trajectories" / f"step-{step:06d}.jsonl", step, groups, explain)
    start = time.perf_counter()
    path = report.write_html(tmp_path)
    written = time.perf_counter() - start
    said = interact(tmp_path)
    assert said["all"] == "4096 of 4096 | 101" and said["more"] == "201"
    size = path.stat().st_size
    print(f"report.html with 4,096 trajectories: {size / 1e6:.1f} MB, written in {written:.1f} s")
    assert size < 25e6
