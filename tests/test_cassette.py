"""web.Web.cached: the cassette in its three modes, under threads and ranks, and under kill -9."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from loopback import CONFIG

from deepresearcher_min.config import ROOT, ConfigError
from deepresearcher_min.web import Web, WebFailure

pytestmark = pytest.mark.quick


def ask(web, request, produce, counts=None, seconds=5.0):
    return web.cached(
        "test",
        request,
        produce,
        Counter() if counts is None else counts,
        time.monotonic() + seconds,
    )


def never():
    raise AssertionError("this was to come from the cassette")


def fail():
    raise WebFailure("http_404", "Not there.")


def test_identical_requests_at_the_same_time_are_one(open_web):
    web, counts, made = open_web(), Counter(), []

    def slow():
        made.append(1)
        time.sleep(0.1)
        return "reply"

    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda _: ask(web, {"q": 1}, slow, counts), range(16)))
    assert replies == ["reply"] * 16 and len(made) == 1 and counts["cache_hits"] == 15


def test_waiting_for_an_identical_request_has_a_deadline_and_a_crash_frees_the_others(open_web):
    web, asked, over = open_web(), threading.Event(), threading.Event()

    def slow():
        asked.set()
        over.wait(60)
        return "late"

    first = threading.Thread(target=ask, args=(web, 1, slow))
    first.start()
    asked.wait(60)
    with pytest.raises(WebFailure, match="timeout"):
        ask(web, 1, never, seconds=0.1)
    over.set()
    first.join()
    assert ask(web, 1, never) == "late"
    with pytest.raises(ZeroDivisionError):
        ask(web, 2, lambda: 1 / 0)
    assert ask(web, 2, lambda: "fine") == "fine"


def test_modes_live_record_replay(open_web, monkeypatch):
    live = open_web(search_ttl=1000.0)
    assert ask(live, "a", lambda: {"x": "ä\ud800"}) == {"x": "ä\ud800"}
    with pytest.raises(WebFailure):
        ask(live, "b", fail)
    with pytest.raises(WebFailure, match="Not there"):
        ask(live, "b", never)  # a failure is remembered for a short time
    replay, record = (
        open_web(cassette_mode="replay"),
        open_web(cassette_mode="record", search_ttl=1000.0),
    )
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 500)
    assert ask(live, "a", never) == {"x": "ä\ud800"}
    assert ask(live, "b", lambda: "back again") == "back again"
    monkeypatch.setattr(time, "time", lambda: now + 2000)
    with pytest.raises(WebFailure, match="Not there"):
        ask(record, "d", fail)
    with pytest.raises(WebFailure, match="Not there"):
        ask(record, "d", never)  # a failure is remembered for a short time here, too
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 3000)
        with pytest.raises(WebFailure, match="Not there"):
            ask(replay, "d", never)
        assert ask(record, "d", lambda: "back again") == "back again"
    assert ask(record, "a", never) == ask(replay, "a", never) == {"x": "ä\ud800"}
    assert ask(live, "a", lambda: "new") == "new"
    with pytest.raises(WebFailure) as failure:
        ask(replay, "c", never)
    assert failure.value.kind == "replay_miss" and "recording" in failure.value.words


def test_a_replay_repeats_failures_and_a_missing_recording_is_said_at_once(open_web):
    record = open_web(cassette_mode="record")
    with pytest.raises(WebFailure):
        ask(record, "b", fail)
    with pytest.raises(WebFailure, match="Not there"):
        ask(open_web(cassette_mode="replay"), "b", never)
    with pytest.raises(ConfigError, match="replay needs a recording"):
        open_web("elsewhere.sqlite", cassette_mode="replay")


WRITER = """
import sys, time
from collections import Counter
from deepresearcher_min.config import load_config
from deepresearcher_min.web import Web
web = Web(load_config([]), sys.argv[1])
for i in range(100_000):
    reply = {"n": i, "text": "x" * 5000}
    web.cached("test", [sys.argv[2], i], lambda: reply, Counter(), time.monotonic() + 9)
    print(i, flush=True)
"""


def test_ranks_may_open_a_new_cassette_at_the_same_time(tmp_path, open_web):
    other = sqlite3.connect(tmp_path / "new.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # as a rank in the middle of opening it
    threading.Timer(0.2, other.execute, ["COMMIT"]).start()
    assert ask(open_web("new.sqlite"), "a", lambda: "value") == "value"


def test_what_waiting_cannot_mend_is_said_at_once(open_web, monkeypatch):
    class ReadOnly:
        def execute(self, *_):
            raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: ReadOnly())
    started = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        open_web()
    assert time.monotonic() - started < 5


def test_ranks_share_a_cassette_and_kill_minus_nine_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "cassette.sqlite"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for writer in writers:
        for _ in range(200):
            writer.stdout.readline()
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    acknowledged = [200 + len(writer.communicate()[0].splitlines()) for writer in writers]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    web = Web(replace(CONFIG, cassette_mode="replay"), path)
    for name, number in zip("ab", acknowledged, strict=True):
        for i in range(number - 1):
            assert ask(web, [name, i], never)["n"] == i
    web.close()
