"""A recorded evaluation on a live web (of loopback servers), replayed without any server: the same
trajectories.
"""

from collections import Counter
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from loopback import Server
from run_folder import plain
from transformers import AutoTokenizer
from urllib3.util import parse_url

from deepresearcher_min import corpus
from deepresearcher_min import web as web_module
from deepresearcher_min.config import load_config
from deepresearcher_min.engine import HFEngine
from deepresearcher_min.protocol import ChatFormat
from deepresearcher_min.rollout import Agent, Tools
from deepresearcher_min.run import Ranks
from deepresearcher_min.web import Web
from train import evaluate

pytestmark = pytest.mark.slow


class ToyOnline(Server):
    """The toy web behind a SearXNG and a web server; every seventh page is broken."""

    def __init__(self, world):
        super().__init__({"/search": None})
        self.world = world
        for number, (_, url, text) in enumerate(world.corpus.documents):
            page = (200, {}, f"<html><body><p>{text}</p></body></html>".encode())
            self.pages[urlsplit(url).path] = (500, {}, b"") if number % 7 == 0 else page

    def results(self, path):
        query = parse_qs(urlsplit(path).query)["q"][0]
        found = self.world.corpus.search(query, 2)
        return (
            200,
            {},
            {"results": [{"title": r.title, "url": r.url, "content": r.snippet} for r in found]},
        )


def evaluation(config, cassette, questions):
    """Trajectories as the run folder keeps them, and the counters of all of them."""
    web = Web(config, cassette)
    chat = ChatFormat(AutoTokenizer.from_pretrained(corpus.MODEL_DIR), date="2026-01-01")
    engine, tools = HFEngine(config, str(corpus.MODEL_DIR)), Tools(config, chat, None, web)
    done = evaluate(
        enumerate(questions),
        Agent(config, engine, tools, chat),
        Ranks(0, 1, torch.device("cpu")),
        lambda _: None,
    )
    tools.close()
    web.close()
    counts = sum((Counter(trajectory.cost) for trajectory in done), Counter())
    return [{**plain(trajectory), "cost": None} for trajectory in done], counts


def test_a_recorded_evaluation_repeats_exactly_without_the_web(tmp_path, monkeypatch):
    world = corpus.World("held out", 0)
    questions = world.questions(24, 0)
    config = replace(
        load_config(["--preset=toy"]),
        search="searxng",
        cassette_mode="record",
        max_retries=0,
        eval_temperature=1.0,
    )
    with ToyOnline(world) as server:
        monkeypatch.setitem(server.pages, "/search", lambda _: server.results(server.sent[-1][0]))

        def toy_address(url, *_):  # the toy's addresses lead to the server
            return parse_url(url.replace(corpus.SITE.rstrip("/"), server.url)), ["127.0.0.1"]

        monkeypatch.setattr(web_module, "check_url", toy_address)
        config = replace(config, search_url=server.url)
        recorded, counts = evaluation(config, tmp_path / "cassette.sqlite", questions)
        assert counts["searches"] >= 10 and counts["pages"] >= 4 and counts["requests"] > 0
        assert counts["requests"] == sum(server.requests.values())
    monkeypatch.setattr(web_module.socket, "create_connection", None)
    monkeypatch.setattr(
        web_module, "check_url", lambda *_: pytest.fail("a replay opened a connection")
    )
    replayed, counts = evaluation(
        replace(config, cassette_mode="replay"), tmp_path / "cassette.sqlite", questions
    )
    assert replayed == recorded
    assert counts["requests"] == counts["fail_search_replay_miss"] == 0 and counts["cache_hits"] > 0
