"""The toy web behind services that can be made to fail, for the tests of services."""

import json
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from loopback import Server

from deepresearcher_min import corpus

WORLD = corpus.World("training", 0)
KEY = "sk-0123456789abcdef"
DOWN = (
    503,
    {},
    b"<html><title>x</title><h1>Service Unavailable</h1><p>maintenance until noon</p></html>",
)


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
    """Of a run of the toy model on questions and pages of files, with this server's search."""
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
