"""Services that fail: seen before a run begins, counted, and where most calls fail, a stop that can
be resumed.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from loopback import CONFIG, Server
from small_runs import metrics
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from deepresearcher_min import report, toyworld
from deepresearcher_min.config import ROOT
from deepresearcher_min.rollout import try_services
from deepresearcher_min.web import WebFailure

WORLD = toyworld.World("training", 0)
KEY = "sk-0123456789abcdef"
DOWN = (
    503,
    {},
    b"<html><title>x</title><h1>Service Unavailable</h1><p>maintenance until noon</p></html>",
)
TRAFFIC = ("requests", "bytes", "cache_hits")  # what a cassette saves the second time


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("SERPER", "READER", "JUDGE"):
        monkeypatch.setenv(f"{name}_API_KEY", KEY)


def completion(text: str) -> tuple:
    return 200, {"Content-Type": "application/json"}, {"choices": [{"message": {"content": text}}]}


class World(Server):
    """The toy web behind a SearXNG, a reader and a judge; `fails(role, number)` decides which calls
    are answered DOWN.

    `number` counts the calls to that role, from 1; `tried` are its requests.
    """

    def __init__(self, fails=lambda role, number: False, broken=DOWN):
        super().__init__()
        self.fails, self.broken, self.calls = fails, broken, Counter()
        self.pages = {"/search": lambda _: self.answer("search", self.results)}
        for role, text in (
            ("reader", "CONTINUE: no\nNOTES: A note."),
            ("judge", "So it is.\nCORRECT"),
        ):
            page = lambda _, role=role, text=text: self.answer(role, lambda: completion(text))  # noqa: E731
            self.pages[f"/{role}/chat/completions"] = page

    def answer(self, role, made):
        with self.lock:
            self.calls[role] += 1
            number = self.calls[role]
        return self.broken if self.fails(role, number) else made()

    def results(self):
        query = parse_qs(urlsplit(self.sent[-1][0]).query)["q"][0]
        found = WORLD.corpus.search(query, 2)
        return (
            200,
            {},
            {"results": [{"title": r.title, "url": r.url, "content": r.snippet} for r in found]},
        )


def arguments(server: Server, folder: Path, *more: str) -> list[str]:
    """Of a small run of the toy model on questions and pages in files, with that server's search."""
    data, corpus = folder / "questions.jsonl", folder / "corpus.jsonl"
    rows = [
        {"question": q.text, "answers": list(q.answers), "id": q.id} for q in WORLD.questions(60, 3)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = [
        {"title": title, "url": url, "text": text} for title, url, text in WORLD.corpus.documents
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in pages))
    return [
        "--preset=toy",
        "--search=searxng",
        f"--search_url={server.url}",
        f"--data={data}",
        f"--corpus={corpus}",
        "--max_retries=0",
        *more,
    ]


def training(server: Server, folder: Path, *more: str) -> list[str]:
    sizes = [
        "--eval_questions=4",
        "--questions_per_step=2",
        "--group_size=4",
        "--steps=3",
        "--lr_decay=no",
    ]
    return arguments(server, folder, *sizes, f"--run_dir={folder / 'run'}", *more)


def serper(server: Server | None, **changes):
    address = server.url if server else "http://127.0.0.1:9"
    return replace(CONFIG, search="serper", search_url=address, tool_timeout=5.0, **changes)


# --- before a run begins

REPLIES = [
    (
        (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}."}}),
        "unauthorized",
        "Incorrect API key",
    ),
    (
        (403, {}, {"message": "Unauthorized.", "statusCode": 403}),
        "unauthorized",
        "It said: Unauthorized.",
    ),
    (
        (403, {}, b"<html><body><h1>Forbidden</h1>json is off</body></html>"),
        "unauthorized",
        "Forbidden json is off",
    ),
    (
        (400, {}, {"message": "Not enough credits", "statusCode": 400}),
        "quota",
        "Not enough credits",
    ),
    ((402, {}, {"detail": "Please pay."}), "quota", "Please pay."),
    (
        (432, {}, {"detail": {"error": "The plan's limit is reached"}}),
        "quota",
        "The plan's limit is reached",
    ),
    (
        (429, {"Retry-After": "900"}, {"error": {"code": "RATE_LIMITED"}}),
        "rate_limited",
        "RATE_LIMITED",
    ),
    ((500, {}, b"\x1b[31mout of memory\x1b[0m"), "http_500", "out of memory"),
    (
        (200, {}, b"<html><script>var x</script><p>Please log in</p></html>"),
        "bad_reply",
        "Please log in",
    ),
    (
        (200, {}, {"error": {"info": "too many requests today"}}),
        "bad_reply",
        "too many requests today",
    ),
    ((200, {}, {"surprise": 1}), "bad_reply", ""),
]


@pytest.mark.quick
@pytest.mark.parametrize(("reply", "kind", "said"), REPLIES)
def test_a_service_that_fails_its_trial_is_named_with_its_own_words(reply, kind, said):
    with Server({"/search": reply}) as server:
        trouble = try_services(serper(server))
    assert (
        f"the search service at {server.url} does not work ({kind}: " in trouble and said in trouble
    )
    assert "SERPER_API_KEY" in trouble and KEY not in trouble and trouble.isprintable()


@pytest.mark.quick
def test_the_trial_of_a_server_that_is_not_there():
    assert "(connection: " in try_services(serper(None))
    nowhere = replace(serper(None), search="retriever", search_url="http://no-such-host.invalid")
    assert "No server with the name no-such-host.invalid can be found" in try_services(nowhere)
    with Server({"/search": None}) as server:
        server.pages["/search"] = lambda _: server.over.wait(20)
        assert "(timeout: " in try_services(replace(serper(server), tool_timeout=0.3))


@pytest.mark.quick
def test_only_what_a_run_will_use_is_tried_and_finding_nothing_passes():
    with Server({"/search": (200, {}, {"organic": []})}) as server:
        assert try_services(serper(server)) == ""
        assert sum(server.requests.values()) == 1
        dead = replace(
            serper(None), reader_url="http://127.0.0.1:9", judge_url="http://127.0.0.1:9"
        )
        assert (
            try_services(dead, agent=False) == try_services(replace(dead, max_tool_calls=0)) == ""
        )
        assert try_services(replace(dead, search="local")) == ""
        assert "the search service" in try_services(replace(dead, max_tool_calls=0, method="rag"))
        assert "the reader service" in try_services(replace(dead, search="local", reader="openai"))
        assert (
            "judge_model and" not in (said := try_services(dead, agent=False, judge=True))
            and "JUDGE_API_KEY" in said
        )


@pytest.mark.quick
def test_a_run_does_not_begin_without_its_services(tmp_path, capsys):
    with World(lambda role, number: True) as server:
        for main, more in (
            (train.main, training(server, tmp_path)),
            (
                evaluation.main,
                arguments(server, tmp_path, "--model=toy", f"--run_dir={tmp_path / 'run'}"),
            ),
        ):
            assert main(more) == 2
            shown = capsys.readouterr()
            assert shown.out == "" and len(shown.err.splitlines()) == 1
            assert "maintenance until noon" in shown.err and server.url in shown.err
        assert not (tmp_path / "run").exists() and server.calls["search"] == 2


# --- endpoints that refuse a parameter

DIALECTS = [  # refused parameter -> message, how it is asked for then, status, body
    (
        "temperature",
        "",
        400,
        {"error": {"message": "temperature: only the default (1) is supported"}},
    ),
    ("temperature", "", 400, {"error": {"message": "Unsupported value", "param": "temperature"}}),
    (
        "temperature",
        "",
        422,
        {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]},
    ),
    (
        "temperature",
        "",
        400,
        {"object": "error", "message": "`temperature` is deprecated for this model."},
    ),
    ("max_tokens", "", 400, b"unknown field maxTokens"),
    (
        "max_tokens",
        "max_completion_tokens",
        400,
        {
            "error": {
                "message": "'max_tokens' is not supported with this "
                "model. Use 'max_completion_tokens' instead.",
                "param": "max_tokens",
            }
        },
    ),
]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "instead", "status", "body"), DIALECTS)
def test_a_refused_parameter_is_left_out_from_then_on(
    open_web, capsys, name, instead, status, body
):
    with Server() as server:

        def answer(_):
            sent = json.loads(server.sent[-1][2])
            return (status, {}, body) if name in sent else completion("Fine.")

        server.pages["/chat/completions"] = answer
        web, payload = (
            open_web(),
            {"model": "m", "messages": [], "temperature": 0, "max_tokens": 600},
        )
        for _ in range(3):
            assert (
                web.chat(
                    server.url + "/chat/completions", "READER_API_KEY", payload, Counter(), 1e9
                )[0]
                == "Fine."
            )
        sent = [json.loads(body) for _, _, body in server.sent]
        assert len(sent) == 4 and [name in each for each in sent] == [True, False, False, False]
        assert not instead or [each.get(instead) for each in sent] == [None, 600, 600, 600]
        other = {"temperature", "max_tokens"} - {name}
        assert all(other <= each.keys() for each in sent)
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and f"refuses {name}" in shown and server.url in shown


@pytest.mark.quick
def test_two_refused_parameters_and_what_is_no_refusal(open_web):
    def both(_):
        sent = json.loads(server.sent[-1][2])
        found = [name for name in ("max_tokens", "temperature") if name in sent]
        return (400, {}, {"error": f"no {found[0]}, please"}) if found else completion("Fine.")

    with Server(
        {"/both": both, "/never": (400, {}, {"error": "temperature, max_tokens: all is wrong"})}
    ) as server:
        web, payload = (
            open_web(),
            {"model": "m", "messages": [], "temperature": 0, "max_tokens": 600},
        )
        assert (
            web.chat(server.url + "/both", "READER_API_KEY", payload, Counter(), 1e9)[0] == "Fine."
        )
        assert len(server.sent) == 3
        with pytest.raises(WebFailure, match="all is wrong"):
            web.chat(server.url + "/never", "READER_API_KEY", payload, Counter(), 1e9)
        assert server.requests["/never"] == 3
        server.pages["/never"] = (400, {}, {"error": "context length: lower max_tokens"})
        server.sent.clear()
        with pytest.raises(WebFailure, match="context length"):
            web.chat(server.url + "/never", "READER_API_KEY", payload, Counter(), 1e9)
        assert [json.loads(body)["max_tokens"] for _, _, body in server.sent] == [
            600
        ]  # nothing was remembered


# --- in the middle of training


def without_traffic(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in row if not key.endswith(TRAFFIC)} for row in rows]


def die_after_step(step: int, calls: int, server: World, monkeypatch) -> None:
    """That step over, the server answers so many more searches."""
    real = train.report_step

    def reported(config, ranks, row, groups):
        real(config, ranks, row, groups)
        if row["step"] == step:
            last = server.calls["search"] + calls
            server.fails = lambda role, number: number > last

    monkeypatch.setattr(train, "report_step", reported)


@pytest.mark.quick
def test_a_step_without_search_is_not_trained_on_and_a_resumed_run_repeats_it(
    tmp_path, monkeypatch, capsys
):
    with World() as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        assert train.main(training(server, whole)) == 0
        die_after_step(1, 1, server, monkeypatch)
        assert train.main(training(server, tmp_path, "--save_every=100")) == 3
        shown = capsys.readouterr().out
        assert re.search(
            r"\d+ of \d+ calls to the search service failed. .*maintenance until noon", shown
        )
        assert f"--resume={tmp_path / 'run'}" in shown and "| failed   0% |" in shown
        assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
        assert train.main([f"--resume={tmp_path / 'run'}"]) == 2  # it is still down
        monkeypatch.undo()
        server.fails = lambda role, number: False
        assert train.main([f"--resume={tmp_path / 'run'}"]) == 0
    assert without_traffic(metrics(tmp_path / "run")) == without_traffic(metrics(whole / "run"))
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder / "run/checkpoints/step-000003")
        for folder in (whole, tmp_path)
    )
    for name, tensor in one.named_parameters():
        assert torch.equal(tensor, dict(other.named_parameters())[name])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["before", "step-000001", "after"])
def test_a_measurement_without_search_is_repeated_too(tmp_path, monkeypatch, name):
    with World() as server:
        real = train.evaluate

        def dies(*given):
            server.fails = lambda role, number: True
            found = real(*given)
            server.fails = lambda role, number: False
            return found

        names = iter(["before", "step-000001", "after"])
        monkeypatch.setattr(
            train, "evaluate", lambda *given: (dies if next(names) == name else real)(*given)
        )
        more = ["--steps=1", "--eval_every=1", "--search_ttl=0"]
        assert train.main(training(server, tmp_path, *more)) == 3
        monkeypatch.setattr(train, "evaluate", real)
        assert not (tmp_path / "run/summary.json").exists()
        assert train.main([f"--resume={tmp_path / 'run'}"]) == 0
        rows = metrics(tmp_path / "run")
    assert [(row["step"], "eval" in row) for row in rows] == [(0, True), (1, False), (1, True)]
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.quick
def test_a_half_dead_search_is_shown_and_the_run_goes_on(tmp_path, capsys):
    with World(lambda role, number: number > 1 and number % 3 == 0) as server:
        assert train.main(training(server, tmp_path, "--steps=1")) == 0
    (row,) = [row for row in metrics(tmp_path / "run") if "reward" in row]
    assert (
        0 < row["failed"] < 0.5
        and row["cost_search_failed"] == row["cost_fail_search_http_503"] > 0
    )
    assert row["failed"] == row["cost_search_failed"] / row["cost_search_calls"]
    assert re.search(r"\| failed +[1-4]\d% \|", capsys.readouterr().out)


@pytest.mark.quick
def test_failures_of_pages_never_stop_a_run_and_a_replay_never_stops(tmp_path):
    row = {
        "cost_page_calls": 9,
        "cost_page_failed": 9,
        "cost_search_calls": 9,
        "cost_search_failed": 4,
    }
    train.raise_if_down(CONFIG, row)
    with pytest.raises(train.RunStopped):
        train.raise_if_down(CONFIG, row | {"cost_search_failed": 5})
    train.raise_if_down(replace(CONFIG, cassette_mode="replay"), row | {"cost_search_failed": 5})


@pytest.mark.quick
def test_a_reader_that_dies_stops_the_run(tmp_path, monkeypatch, capsys):
    with World() as server:
        readers = ["--reader=openai", f"--reader_url={server.url}/reader", "--reader_model=m"]
        real = train.evaluate
        monkeypatch.setattr(train, "evaluate", lambda *given: die() or real(*given))

        def die():
            server.fails = lambda role, number: role == "reader"

        code = train.main(training(server, tmp_path, *readers, "--eval_questions=20", "--steps=1"))
    assert code == 3 and "calls to the reader service failed" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_stop_and_go_on_together(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "train.py"]

    def run(*more: str) -> str:
        done = subprocess.run(
            [*command, *more],
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.stdout + done.stderr

    with World(lambda role, number: True) as server:
        said = run(*training(server, tmp_path))
        assert (
            said.count("the search service at") == 1
            and "exitcode  : 2" in said
            and "Preset" not in said
        )
        server.fails = lambda role, number: (
            number > 12
        )  # two trials, the first measurement, and not much more
        said = run(*training(server, tmp_path))
        assert said.count("calls to the search service failed") == 1 and "exitcode  : 3" in said
        server.fails = lambda role, number: False
        assert "held-out questions went from" in run(f"--resume={tmp_path / 'run'}")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3]


# --- evaluations


def evaluate(server: Server, folder: Path, *more: str) -> int:
    given = arguments(
        server,
        folder,
        f"--model={toyworld.MODEL_DIR}",
        "--eval_temperature=0",
        f"--run_dir={folder / 'run'}",
        *more,
    )
    return evaluation.main(given)


def table(folder: Path) -> dict[str, list[str]]:
    summary = json.loads((folder / "run/summary.json").read_text())
    return {row[0]: row[1:] for row in summary["table"]}


def answers(folder: Path) -> dict[str, str | None]:
    rows = report.read_json_lines(folder / "run/trajectories/eval.jsonl")
    return {row["id"]: row["answer"] for row in rows}


@pytest.mark.quick
@pytest.mark.parametrize("method", ["agent", "rag"])
def test_an_evaluation_stops_when_search_dies_and_asks_again_what_it_spoilt(
    tmp_path, method, capsys
):
    with World() as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        assert evaluate(server, whole, f"--method={method}", "--limit=60") == 0
        server.calls.clear()
        server.fails = lambda role, number: number > 10
        assert evaluate(server, tmp_path, f"--method={method}", "--max_in_flight=99") == 3
        shown = capsys.readouterr().out
        assert (
            "calls to the search service failed" in shown
            and f"--resume={tmp_path / 'run'}" in shown
        )
        assert not (tmp_path / "run/summary.json").exists() and server.calls["search"] < 60
        server.fails = lambda role, number: False
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
    assert answers(tmp_path) == answers(whole) and len(answers(whole)) == 60
    one, other = table(tmp_path), table(whole)
    assert one["F1"] == other["F1"] and other["failed calls"] == ["0.0%", "0.0%"]


@pytest.mark.quick
def test_a_small_or_half_dead_evaluation(tmp_path, capsys):
    with World(lambda role, number: number > 1) as server:
        assert (
            evaluate(server, tmp_path, "--limit=6") == 3
        )  # fewer than 50 calls, and all of them failed
        server.fails = lambda role, number: number % 3 == 0
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        spoilt = int(re.search(r"Met by a failed service, left out: (\d)", shown)[1])
        assert 0 < spoilt < 6 and table(tmp_path)["questions"] == [str(6 - spoilt)] * 2
        assert table(tmp_path)["failed calls"] != ["0.0%", "0.0%"]
        server.fails = lambda role, number: False
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        assert table(tmp_path)["questions"] == ["6", "6"]


@pytest.mark.quick
def test_a_dead_judge_makes_no_table(tmp_path, capsys):
    with World(lambda role, number: role == "judge") as server:
        judged = [f"--judge_url={server.url}/judge", "--judge_model=m", "--tool_threads=0"]
        assert evaluate(server, tmp_path, *judged) == 2
        assert "the judge service at" in capsys.readouterr().err
        server.fails = lambda role, number: role == "judge" and number > 4
        assert evaluate(server, tmp_path, *judged) == 3
        shown = capsys.readouterr().out
        assert "calls to the judge service failed" in shown and "maintenance until noon" in shown
        assert not (tmp_path / "run/summary.json").exists()
        searches = server.calls["search"]
        server.fails = lambda role, number: role == "search"  # which nobody needs any more
        assert evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        assert server.calls["search"] == searches and "MBE" in table(tmp_path)
        verdicts = server.calls["judge"]
        assert (
            evaluation.main([f"--resume={tmp_path / 'run'}"]) == 0
        )  # verdicts come from the cassette
        assert server.calls["judge"] == verdicts + 1  # the trial
