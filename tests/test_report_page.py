"""The page in a real browser: hostile text stays text, and the filters work."""

import json
import re
import shutil
import subprocess
import time

import pytest
from loopback import Server
from run_folder import WHY, build, page_data, researcher, write_html, write_run

from deepresearcher_min import report
from deepresearcher_min.trajectory import Group, Question

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def browse(path, folder, *arguments):
    """Open a file in headless Chromium; returns the DOM after its scripts ran."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--dump-dom",
    ]
    command += [
        f"--user-data-dir={folder}",
        "--virtual-time-budget=3000",
        *arguments,
        path.resolve().as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def visible(dom):
    """The DOM without the data block and the script, in which every text stands, too."""
    return re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)


@pytest.fixture
def listener():
    """A loopback server that notes every request: (URL, how often each path was asked for)."""
    with Server() as server:
        yield server.url, server.requests


def attacks(url):
    own = "document.title='OWNED';document.documentElement.setAttribute('owned','1')"
    return [
        f"</script><script>{own}</script>",
        f"<!--<script></script><script>{own}</script>",
        f'<img src="{url}/image" onerror="{own}"><svg onload="{own}"></svg>',
        f"'\"><iframe src=\"javascript:parent.{own}\"></iframe><iframe src='{url}/frame'></iframe>",
        f"javascript:{own}",
        f'<link rel=stylesheet href="{url}/style"><style>@import "{url}/import";</style>'
        f'<base href="{url}/">',
        f'<meta http-equiv=refresh content="0;url={url}/moved"><form action={url}>'
        f'<details open ontoggle="{own}">',
        "\u2028\u2029\x00\ud800 ]]> &lt;b&gt; \\u003c/script> {{7*7}} ${7*7} __DATA__ __POLICY__",
    ]


def hostile_run(folder, url):
    """A run in which everything that the web, the model or the data wrote is an attack."""
    (folder / "trajectories").mkdir(parents=True)
    for number, attack in enumerate(attacks(url)):
        question = Question(f"q{attack}", attack, (attack, "gold"), attack)
        strange = [
            ("browse", f"<think>{attack}</think>{attack}", attack),
            ("answer", attack, repr([{"new": attack}])),
        ]
        trajectories = [
            researcher(question, attack, title=attack, note=attack),
            build(question, strange, None, "malformed"),
        ]
        groups = [Group(question, trajectories, [1.0, -1.0], [1.0, -1.0])]
        path = folder / "trajectories" / f"step-{number:06d}.jsonl"
        report.write_trajectories(path, number, groups, WHY)
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "f1": 0.5, "reward": 0.5, "note": attacks(url)})
    )
    (folder / "config.yaml").write_text(
        json.dumps({"model": "".join(attacks(url)[:6]), "search": attacks(url)[2]})
    )
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
@pytest.mark.slow
def test_hostile_text_stays_text(tmp_path, listener):
    url, asked = listener
    path = write_html(hostile_run(tmp_path / "run", url))
    # As it is, and then every trajectory and fold opened without a policy: text nodes alone must be
    # enough.
    for page in (path, unguarded(path, OPEN_ALL)):
        dom = browse(page, tmp_path / "profile")
        assert "<title>run</title>" in dom and " owned=" not in dom
        shown = visible(dom)
        assert (
            "&lt;img src=" in shown
            and "__DATA__ __POLICY__" in shown
            and "<h2>Configuration</h2>" in shown
        )
        assert not re.search(r"<(img|iframe|link|base|form|meta http-equiv=.?refresh)", shown)
    assert not asked


@needs_chromium
@pytest.mark.slow
def test_the_attacks_work_on_a_careless_page(tmp_path, listener):
    """The control: the same browser and detectors on a page that writes texts as they are."""
    url, asked = listener
    careless = tmp_path / "careless.html"
    for attack in (attacks(url)[0], attacks(url)[2]):
        careless.write_text(f"<title>run</title><p>{attack}</p>")
        dom = browse(careless, tmp_path / "profile")
        assert "<title>OWNED</title>" in dom and ' owned="1"' in dom
    assert asked


@needs_chromium
@pytest.mark.slow
def test_the_policy_stops_a_script_that_is_not_ours(tmp_path):
    path = write_html(write_run(tmp_path / "run", steps=1))
    assert "<h2>Trajectories</h2>" in visible(browse(path, tmp_path / "profile"))
    path.write_text(path.read_text().replace('"use strict";', '"use strict" ;'))
    assert "<h2>Trajectories</h2>" not in visible(browse(path, tmp_path / "profile"))


INTERACT = r"""
const lines = [], say = (...parts) => lines.push(parts.join(" | "));
const selects = [...document.querySelectorAll("select")], list = document.querySelector(".list");
const state = () => list.querySelector(".count").textContent;
const buttons = () => list.querySelectorAll("button").length;
const choose = (i, start) => {
  const fits = option => option.textContent.startsWith(start);
  selects[i].value = [...selects[i].options].find(fits).value;
  selects[i].onchange();
};
const box = document.querySelector("input");
const type = text => { box.value = text; box.oninput(); };
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
const titles = [...document.querySelectorAll(".strip span")].map(node => node.title);
say("titles", titles.map(title => title.replaceAll("\n", ", ")).join(" / "));
const folds = [...document.querySelectorAll(".run details")];
say("folds", folds.length, folds.every(node => !node.open));
const out = document.createElement("pre");
out.id = "said"; out.textContent = lines.join("\n"); document.body.append(out);
"""


def interact(folder):
    """What a test's script sees when it uses the page's filters."""
    dom = browse(unguarded(write_html(folder), INTERACT), folder / "profile")
    said = (
        re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)[1]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
    )
    return dict(line.split(" | ", 1) for line in said.splitlines())


@needs_chromium
@pytest.mark.slow
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
        said["behaviour"]
        == count(lambda row: row["id"] == "q3")
        == count(lambda row: row["behaviours"] == ["plans"])
    )
    assert said["lowest"] == "−1.00" and said["highest"] == "1.00"
    assert said["words"] == count(lambda row: row["id"] == "q3") and said["nothing"] == "0 of 100"
    second = [row for row in rows if row["file"] == "step-000002"]
    second = sorted(second, key=lambda row: -row["reward"])[1]
    titles = said["titles"].split(" / ")
    assert [title.split(",")[0] for title in titles[:4]] == [
        "Prompt",
        "<think>",
        "Turn 1: search",
        "Observation",
    ]
    advantage = f"{second['advantage']:+.3f}".replace("-", "−")
    logprob = f"{second['turns'][0]['logprob']:.4f}".replace("-", "−")
    assert f"advantage of each of these tokens: {advantage}" in titles[2]
    assert (
        f"mean log-probability: {logprob}" in titles[2]
        and "mismatch of engine and policy in this step" in titles[2]
    )
    assert said["folds"] == "2 | true"


@needs_chromium
@pytest.mark.slow
def test_4096_trajectories_stay_usable(tmp_path):
    """4,096 of 5,120 trajectories with 8 kB of observations each: what is beyond is cut."""
    note, stops = "He lived in Liverpool. " * 350, ["answer", "malformed"] * 4
    for step in range(1, 6):
        groups = []
        for n in range(128):
            question = Question(
                f"q{n}", f"Where was number {n} born?", ("Liverpool",), f"{n % 2 + 1}wiki"
            )
            trajectories = [
                researcher(question, "Liverpool", note=note, stop_reason=stop) for stop in stops
            ]
            groups.append(Group(question, trajectories, [1.0, -1.0] * 4, [1.0, -1.0] * 4))
        report.write_trajectories(
            tmp_path / "trajectories" / f"step-{step:06d}.jsonl", step, groups, WHY
        )
    start = time.perf_counter()
    path = write_html(tmp_path)
    written = time.perf_counter() - start
    said = interact(tmp_path)
    assert said["all"] == "4096 of 4096 | 101" and said["more"] == "201"
    size = path.stat().st_size
    print(f"report.html with 4,096 trajectories: {size / 1e6:.1f} MB, written in {written:.1f} s")
    assert size < 25e6
