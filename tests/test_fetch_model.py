"""A model of the hub is fetched once, with a bar; a hub that is dead, silent or lacks it is one
clear line.

The real client of the hub against a server on loopback, which speaks as much of its protocol as the
client asks for.
"""

import hashlib
import os
import re
import subprocess
import sys
import time

import processes
import pytest
from loopback import Handler, Server

from deepresearcher_min.architecture import fetch_model
from deepresearcher_min.config import ROOT, ConfigError
from deepresearcher_min.corpus import MODEL_DIR
from deepresearcher_min.run import Ranks

SHA = "a" * 40
FETCH = """
import sys
from deepresearcher_min.architecture import fetch_model
from deepresearcher_min.run import Ranks
fetch_model(sys.argv[1], Ranks())
print("fetched")
"""
# The hub's client reads its address when it is imported; a forked process has it imported.
AGAIN = "import importlib; from huggingface_hub import constants; importlib.reload(constants)"


def fetch(url, cache, real=False, **environment):
    """fetch_model in a process of its own: a new interpreter, or a forked one."""
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"} | environment
    script = cache / "fetch.py"
    if real:
        script.write_text(FETCH)
        command = [sys.executable, str(script), "maker/model"]
        given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    else:
        script.write_text(f"{AGAIN}\n{FETCH}")
        done = processes.run(script, "maker/model", timeout=60, **environment)
    return done.stdout, done.stderr


def head(handler):
    """What a GET would answer, without its body."""
    status, headers, body = handler.site.pages.get(handler.path, (404, {}, b""))
    handler.reply(status, {**headers, "Content-Length": str(len(body))}, b"")


@pytest.fixture
def hub(monkeypatch):
    """A hub with one model: a config, weights, and a file that nobody needs."""
    monkeypatch.setattr(Handler, "do_HEAD", head, raising=False)
    files = {
        "config.json": b"{}",
        "model.safetensors": b"w" * 300_000,
        "extra/pytorch_model.bin": b"never",
    }
    oids = {name: hashlib.sha1(body).hexdigest() for name, body in files.items()}
    info = {"id": "maker/model", "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
    tree = [
        {"type": "file", "path": name, "size": len(body), "oid": oids[name]}
        for name, body in files.items()
    ]
    as_json = {"Content-Type": "application/json"}
    pages = {
        "/api/models/maker/model": (200, as_json, info),
        "/api/models/maker/model/revision/main": (200, as_json, info),
    }
    pages[f"/api/models/maker/model/tree/{SHA}"] = (200, as_json, tree)
    for name, body in files.items():
        headers = {
            "ETag": f'"{oids[name]}"',
            "X-Repo-Commit": SHA,
            "Content-Type": "application/octet-stream",
        }
        pages[f"/maker/model/resolve/{SHA}/{name}"] = (200, headers, body)
    with Server(pages) as server:
        yield server


@pytest.mark.slow
def test_a_model_is_fetched_once_with_a_bar(hub, tmp_path):
    said, shown = fetch(hub.url, tmp_path, real=True)
    assert said == "fetched\n" and re.search(r"\d+%\|.*\d/\d", shown)
    assert (
        tmp_path / f"hub/models--maker--model/snapshots/{SHA}/model.safetensors"
    ).stat().st_size == 300_000
    assert not any("bin" in path for path in hub.requests)
    sent = [path for path, _, _ in hub.sent if "resolve" in path]
    assert fetch(hub.url, tmp_path)[0] == "fetched\n"
    assert [path for path, _, _ in hub.sent if "resolve" in path] == sent  # nothing is sent again
    # What is there needs no hub.
    for options in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert fetch(hub.url, tmp_path, **options)[0] == "fetched\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dead", "offline", "silent", 404, 401, 500, 503])
def test_a_hub_that_does_not_give_it_is_one_line(kind, tmp_path):
    answer = (kind if isinstance(kind, int) else 200, {}, b"no")
    pages = {"/api/models/maker/model": answer}
    with Server(pages, delay=60.0 if kind == "silent" else 0.0) as server:
        url = "http://127.0.0.1:9" if kind == "dead" else server.url
        processes.start_server()
        start = time.monotonic()
        said, shown = fetch(url, tmp_path, HF_HUB_OFFLINE="1" if kind == "offline" else "0")
    assert not said and time.monotonic() - start < 45
    last = shown.strip().splitlines()[-1]
    assert "ConfigError: model='maker/model': no folder here, and the hub cannot give it: " in last


@pytest.mark.quick
def test_a_folder_needs_no_hub_and_a_wrong_name_is_said(monkeypatch):
    fetch_model(str(MODEL_DIR), Ranks())
    with pytest.raises(ConfigError, match="model='/no/such/folder': there is no such folder"):
        fetch_model("/no/such/folder", Ranks())
