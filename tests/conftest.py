"""Environment of the whole test suite, which must stand before torch and vllm are imported, and
shared fixtures.
"""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

# More threads only fight over the cores of a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

gc.disable()  # what is imported stays: looking for garbage in it takes a fifth of the imports' time


def pytest_xdist_auto_num_workers(config):
    """Two workers for the whole suite or a part of it by marks, none for single files; more would
    be too much for 24 GB.
    """
    whole = all(Path(argument).is_dir() for argument in config.args)
    return min(2, os.cpu_count() or 1) if whole else 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with long tests come first, then those with many, so that no worker ends long before
    the other.
    """
    weights = Counter()
    for item in items:
        weights[item.path] += 1 if item.get_closest_marker("quick") else 1000
    items.sort(key=lambda item: -weights[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """From here on only what tests make is looked through."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Programs set torch's threads for the whole process, and two workers with two threads each
    wait for one another on two cores: some tests took ten times as long.
    """
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def no_authorities(request):
    """Quick tests reach nothing that a public authority vouches for, and to read the machine's list
    of them takes each Web 40 ms.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("quick"):
            patch.setenv("SSL_CERT_FILE", os.devnull)
        yield


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory) -> Path:
    """The folder of a small run on the toy web."""
    from small_runs import run_small

    folder = tmp_path_factory.mktemp("train") / "run"
    run_small(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """The folder of the small models of policies.py."""
    from policies import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def open_web(tmp_path):
    """open_web(file, rank, world_size, **config) -> a Web that may reach loopback; closed after the
    test.
    """
    from dataclasses import replace

    from loopback import CONFIG

    from deepresearcher_min.web import Web

    opened = []

    def open_one(file="cassette.sqlite", rank=0, world_size=1, **changes):
        opened.append(Web(replace(CONFIG, **changes), tmp_path / file, rank, world_size))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """The folder of the broken inputs of bad_inputs.py."""
    from bad_inputs import make

    folder = tmp_path_factory.mktemp("bad")
    make(folder)
    return folder


@pytest.fixture
def nothing_begun(place, monkeypatch):
    """No keys, an empty cache and home, no run folder before and after, and no folder between."""
    import shutil

    from deepresearcher_min import search

    for name in ("SERPER_API_KEY", "JUDGE_API_KEY", "READER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(search, "CACHE", place / "cache")
    before = {path: path.stat().st_mtime_ns for path in place.glob("r_*/*")}
    shutil.rmtree(place / "new", ignore_errors=True)
    yield
    assert not (place / "new").exists()
    assert {path: path.stat().st_mtime_ns for path in place.glob("r_*/*")} == before
