"""Processes that begin with everything imported: forked from a server that has imported train.py
and eval.py once and computed nothing, which saves each of them the seconds of importing.

`run("train.py", ...)` is `python train.py ...`, and with ranks=2 `torchrun --standalone
--nproc_per_node=2 train.py ...`: own process group, environment, arguments, output and exit code,
nothing of the test's own state. That the commands themselves work, tests of each kind show that
start a new interpreter.
"""

import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "train", "eval", "policies", "torch.distributed.run"])
ITSELF = multiprocessing.get_context("fork")  # of a program that has computed nothing


def as_program(*words: str) -> None:
    """What the interpreter does with `python FILE ARGUMENTS...`."""
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def as_torchrun(options: list[str], words: list[str]) -> None:
    """torchrun itself, whose agent forks the ranks from this process."""
    from torch.distributed import run as torchrun

    parsed = torchrun.config_from_args

    def forking(given):
        config, _, _ = parsed(given)
        config.start_method = "fork"
        return config, as_program, words

    torchrun.config_from_args = forking
    torchrun.main([*options, *words])


def begin(
    words: list[str],
    torchrun: list[str],
    imports: str,
    folder: str,
    out: str,
    environment: dict[str, str],
) -> None:
    """In the new process."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if imports:  # once for all ranks
        importlib.import_module(imports)
    as_torchrun(torchrun, words) if torchrun else as_program(*words)


@contextmanager
def started(
    *words: str,
    ranks: int = 0,
    torchrun: Sequence[str] = (),
    imports: str = "",
    cwd: Path = ROOT,
    source=SERVER,
    **environment: str,
) -> Iterator[multiprocessing.Process]:
    """The process, killed with all that it started when the block ends; `.out` is the folder of
    its stdout and stderr.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path} | environment
    options = ["--standalone", f"--nproc_per_node={ranks}"] if ranks else torchrun
    with tempfile.TemporaryDirectory() as out:
        given = (list(map(str, words)), list(options), imports, str(cwd), out, environment)
        process = source.Process(target=begin, args=given)
        process.out = Path(out)
        if source is SERVER:
            start_server()
        process.start()
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may not have a group yet
            process.join()


@functools.cache
def start_server() -> None:
    """Returns when it has imported everything, from where this process imports."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before
    first = SERVER.Process(target=int)  # it does nothing
    first.start()
    first.join()


def run(*words: str, timeout: float = 300, **options) -> subprocess.CompletedProcess[str]:
    """Until it ends; see `started` for the options."""
    with started(*words, **options) as process:
        process.join(timeout)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(words, timeout)
        said = [(process.out / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, process.exitcode, *said)
