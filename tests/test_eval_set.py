"""eval.py's questions: the official test set, fetched once over a bad network."""

import hashlib
from collections import Counter
from pathlib import Path

import loopback
import pytest
from loopback import Server

from deepresearcher_min import search
from deepresearcher_min.config import ConfigError, load_config
from deepresearcher_min.trajectory import load_questions
from eval import main, resolve

SHARED = Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A loopback server in the place of the repository, an empty cache, and a small file with its
    checksum.
    """
    body = b"PAR1 small but real" * 1000
    with Server({"/file": (200, {"Content-Type": "application/octet-stream"}, body)}) as server:
        monkeypatch.setattr(search, "CACHE", tmp_path / "cache")
        monkeypatch.setattr(search, "TEST_SET_URL", server.url + "/file")
        monkeypatch.setattr(search, "TEST_SET_SHA256", hashlib.sha256(body).hexdigest())
        server.body = body
        yield server


CONFIG = load_config(["--preset=toy", "--max_retries=1", "--read_timeout=1"])


@pytest.mark.quick
def test_the_test_set_is_fetched_once(published):
    path = search.test_set(CONFIG)
    assert Path(path).read_bytes() == published.body and published.requests["/file"] == 1
    assert search.test_set(CONFIG) == path and published.requests["/file"] == 1
    assert [file.name for file in Path(path).parent.iterdir()] == [Path(path).name]


@pytest.mark.quick
def test_a_kept_file_that_is_not_the_published_one_is_fetched_again(published):
    path = Path(search.test_set(CONFIG))
    for spoiled in (published.body[:1000], b""):
        path.write_bytes(spoiled)
        assert Path(search.test_set(CONFIG)).read_bytes() == published.body
    assert published.requests["/file"] == 3


@pytest.mark.quick
def test_a_broken_download_starts_again(published, monkeypatch):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(published.body)

    def cut_once(handler):
        cut = published.requests[handler.path] == 1
        handler.raw(head + published.body[: 5000 if cut else None])

    monkeypatch.setitem(loopback.FAULTS, "cut_once", cut_once)
    monkeypatch.setattr(search, "TEST_SET_URL", published.url + "/fault/cut_once")
    assert Path(search.test_set(CONFIG)).read_bytes() == published.body
    assert published.requests["/fault/cut_once"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/fault/short_body", "The connection to the server failed"),
        ("/fault/silence", "did not answer in time"),
        ("/fault/missing", "error 404"),
        ("/fault/circle", "error 302"),
        ("/fault/broken", "error 500"),
        ("/fault/forbidden", "refused access"),
        ("/fault/ten_megabytes", "too large"),
    ],
)
def test_a_failed_download_is_one_clear_error(published, monkeypatch, path, words):
    monkeypatch.setattr(search, "TEST_SET_URL", published.url + path)
    with pytest.raises(ConfigError, match=rf"official test set: .*{words}.*{path}.*--data=FILE"):
        search.test_set(CONFIG)
    assert not (search.CACHE).exists()


@pytest.mark.quick
def test_another_file_is_refused_and_a_dead_server_named(published, monkeypatch, capsys):
    published.pages["/file"] = (200, {}, b"another file")
    with pytest.raises(
        ConfigError,
        match=f"another file: sha256 {hashlib.sha256(b'another file').hexdigest()}, not",
    ):
        search.test_set(CONFIG)
    published.http.server_close()
    monkeypatch.setattr(search, "TEST_SET_URL", "http://127.0.0.1:9/file")
    arguments = ["--model=nowhere", "--dtype=float32", "--search=wikipedia", "--max_retries=0"]
    assert main(arguments) == 2  # as a user sees it
    said = capsys.readouterr().err
    assert (
        said.startswith("eval.py: the official test set: The connection to the server failed")
        and said.count("\n") == 1
    )


@pytest.mark.quick
@pytest.mark.skipif(not SHARED.exists(), reason="no shared test data")
def test_the_checksum_is_that_of_the_official_file(tmp_path, monkeypatch):
    body = (SHARED / "official/test.parquet").read_bytes()
    with Server({"/test.parquet": (200, {}, body)}) as server:
        monkeypatch.setattr(search, "CACHE", tmp_path)
        monkeypatch.setattr(search, "TEST_SET_URL", server.url + "/test.parquet")
        questions = load_questions(search.test_set(CONFIG))
    assert Counter(question.source for question in questions) == {
        "nq": 512,
        "tq": 512,
        "hotpotqa": 512,
        "2wiki": 512,
        "musique": 512,
        "popqa": 512,
        "Bamboogle": 125,
    }


@pytest.mark.quick
def test_the_engine_has_the_card_for_itself(two_steps):
    base = ["--model=nowhere", "--dtype=float32", "--search=wikipedia"]
    # A run's own config shared the card with an optimizer.
    for arguments in (base, [f"--model={two_steps}"]):
        assert resolve(arguments).engine_memory == 0.9
        assert resolve([*arguments, "--engine_memory=0.5"]).engine_memory == 0.5
    assert load_config(["--preset=paper"]).engine_memory == 0.6
