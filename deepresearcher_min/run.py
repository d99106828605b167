"""A run on disk and in the operating system: its folder, its checkpoints, its ranks, and how it is
stopped.

Left out: uploading anywhere, and a run folder shared by two jobs at once.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import CONFIG_NAME

from deepresearcher_min.config import (
    Config,
    ConfigError,
    load_config,
    named,
    parse_arguments,
    read_config,
)

RUNS = Path("runs")
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a model on the hub
HUB_TIMEOUT = 10.0  # for its first answer [s]


def newest_run(kind: str = "run", files: str = "*/metrics.jsonl") -> Path:
    """The folder under runs/ that wrote such a file last; ConfigError if there is none."""
    runs = sorted(RUNS.glob(files), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ConfigError(
            f"there is no {kind} under runs/ yet; train.py makes runs, eval.py evaluations of them"
        )
    return runs[-1].parent


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written to the end, oldest first."""
    return sorted(file.parent for file in run.glob("checkpoints/step-*/state.json"))


def open_run(argv: list[str], base: dict[str, Any] | None = None) -> Config:
    """The resolved config: of a new run (see load_config), or with --resume the one that was saved;
    argv over it.

    run_dir and date are always filled in. Raises ConfigError when a new run would write into an old
    one's folder.
    """
    if resume := parse_arguments(argv).get("resume"):
        folder = newest_run() if resume == "newest" else Path(resume)
        if not os.path.isfile(folder / "config.yaml"):
            raise ConfigError(f"resume={resume!r}: there is no run with a config.yaml in {folder}")
        saved = read_config("resume", folder)
        return replace(load_config(argv, base=saved), run_dir=str(folder), resume=str(folder))
    config, now = load_config(argv, base), datetime.now(UTC)
    run_dir = config.run_dir or str(RUNS / f"{config.preset}-{now:%Y%m%d-%H%M%S}")
    if os.path.exists(f"{run_dir}/config.yaml"):
        raise ConfigError(
            f"run_dir={run_dir!r} holds a run already; continue it with --resume={run_dir}"
        )
    return replace(config, run_dir=run_dir, date=config.date or f"{now:%Y-%m-%d}")


@contextmanager
def starting(config: Config, rank: int = 0) -> Iterator[None]:
    """Everything before the first step: if it fails, a run folder that was not there before is gone
    again.

    Whatever is raised becomes a ConfigError; one that nobody has put into words yet says where it
    comes from.
    """
    run = Path(config.run_dir)
    missing = [folder for folder in (run, *run.parents) if not os.path.exists(folder)]
    try:
        if rank == 0 and not config.question:  # one that is only shown needs no folder
            with named(
                "run_dir", config.run_dir, "name a folder that can be written: --run_dir=DIR"
            ):
                run.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=run).close()
        yield
    except BaseException as error:
        if rank == 0 and run in missing:
            shutil.rmtree(run, ignore_errors=True)
        for folder in missing[1:]:
            with suppress(OSError):  # another run is in it by now
                folder.rmdir()
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        *_, place = traceback.extract_tb(error.__traceback__)
        where = f"{place.filename}:{place.lineno}"
        raise ConfigError(f"the start failed: {type(error).__name__}: {error} ({where})") from error


def fetch_model(model: str, ranks: "Ranks") -> None:
    """Download a hub's model once on each node, with a bar; the other ranks wait, an hour as in any
    collective.

    ConfigError where it cannot be had. Left out: weights in other formats than safetensors.
    """
    if os.path.isfile(f"{model}/{CONFIG_NAME}"):
        return
    if os.path.exists(model):
        raise ConfigError(
            f"model={model!r}: this is not the folder of a model: there is no {CONFIG_NAME} in it"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ConfigError(
            f"model={model!r}: there is no such folder; name a chat model with --model=DIR"
        )
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for problem in ranks.gather([download(model) if first else ""]):
        if problem:
            remedy = "name a chat model with --model=DIR"
            raise ConfigError(
                f"model={model!r}: no folder here, and the hub cannot give it: {problem}; {remedy}"
            )


def download(model: str) -> str:
    """Bring a model's missing files into the hub's cache; what went wrong, unless the cache has the
    model.
    """
    from huggingface_hub import (
        HfApi,
        snapshot_download,
        utils,
    )  # here: it takes a while, and only this needs it

    problem = ""
    try:
        HfApi().model_info(
            model, timeout=HUB_TIMEOUT
        )  # a download waits for a silent hub without end
        utils.enable_progress_bars()
        snapshot_download(model, allow_patterns=MODEL_FILES)
    # its own, those of its HTTP client, of the disk: they have no other class in common
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        with suppress(OSError, ValueError):
            snapshot_download(model, allow_patterns=MODEL_FILES, local_files_only=True)
            problem = ""
    utils.disable_progress_bars()
    return problem


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the processes of the job."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls) -> "Ranks":
        """As torchrun's variables say; joins the process group, if there is one. On GPUs: never run
        by us.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=60))
        return cls(rank, world_size, device)

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self.gather([value])[0]

    def deal(self, items: Sequence[Any]) -> list[Any]:
        """This rank's share of the items, dealt out one by one; gather brings them back into this
        order.
        """
        return list(items[self.rank :: self.world_size])

    def gather(self, items: list[Any]) -> list[Any]:
        """Every rank's items in one list, in the order before they were dealt."""
        shares = [items] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(shares, items)
        return [
            share[i] for i in range(max(map(len, shares))) for share in shares if i < len(share)
        ]

    def total(self, sums: Counter[str]) -> Counter[str]:
        result: Counter[str] = Counter()
        for share in self.gather([sums]):
            result.update(share)  # `+` would drop negative sums
        return result

    def print(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)  # above the progress bar

    def complain(self, program: str, error: Exception) -> None:
        """Print an error; of several ranks only the first to meet one, since torchrun then ends the
        others.
        """
        count = 1
        if self.world_size > 1:
            with suppress(RuntimeError):  # without its store nobody else is there any more
                count = self.store("errors").add("count", 1)
        if count == 1:
            print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    def store(self, name: str) -> dist.Store:
        """Numbers in torchrun's store that all ranks count up together."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore(
            name, dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
        )

    def stop(self) -> None:
        """Leave the process group; to be called last."""
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(
                1
                # gloo's threads free the last collective's tensors late, which aborts an ending
                # interpreter
            )


def watch(ranks: Ranks, limit: float) -> threading.Event:
    """End this process when another rank's has died or hangs, so that nobody waits for it in a
    collective for ever.

    Every process counts up its own number in torchrun's store and looks at the others'. A loop that
    runs wild inside a live process is not seen; the collectives' own timeout ends that. The event
    is to be set after the last collective.
    """
    finished = threading.Event()
    if ranks.world_size > 1:
        threading.Thread(target=listen, args=(ranks, limit, finished), daemon=True).start()
    return finished


def listen(ranks: Ranks, limit: float, finished: threading.Event) -> None:
    store = ranks.store("watch")
    heard = [
        (0, time.monotonic())
    ] * ranks.world_size  # of every rank: its number, and when that was new
    while not finished.wait(limit / 10):
        silent = ""
        try:
            store.add(str(ranks.rank), 1)
            for rank, (known, since) in enumerate(heard):
                number = store.add(str(rank), 0)
                if number != known:
                    heard[rank] = number, time.monotonic()
                elif time.monotonic() - since > limit:
                    silent = f"rank {rank}"
        except (
            RuntimeError
        ):  # the store went with the first node, unless the others were only faster to their end
            silent = "" if finished.wait(limit / 10) else "the first node"
        if silent:
            print(
                f"{silent} has not been heard of for {limit:g} s (rank_timeout): this run ends",
                flush=True,
            )
            os._exit(1)  # torchrun then ends the other ranks


def save_checkpoint(
    config: Config, ranks: Ranks, state: dict[str, Any], write: Callable[[Path], None]
) -> None:
    """checkpoints/step-000020/: what `write(folder)` puts there on every rank, and the state in
    state.json.

    Written aside and renamed, so a kill at any moment leaves the last good one; what is not
    complete is not found. A step that is saved already stays as it is. All but the newest
    `keep_checkpoints` are deleted, also what a kill left half deleted.
    """
    run = Path(config.run_dir)
    final = run / "checkpoints" / f"step-{state['step']:06d}"
    if final in complete_checkpoints(run):
        return
    aside = final.with_name(f".{final.name}.part")
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.share(None)  # nobody writes before the folder is there
    write(aside)
    ranks.gather([None])  # nobody renames before everybody has written
    if ranks.rank == 0:
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in set(final.parent.glob("step-*")) - set(
            complete_checkpoints(run)[-config.keep_checkpoints :]
        ):
            shutil.rmtree(old)
    ranks.share(None)


def add_times(state: dict[str, Any], started: tuple[float, float]) -> dict[str, Any]:
    """The state with wall and CPU time [s] since `started` added to what earlier runs took."""
    wall, cpu = started
    seconds = state["seconds"] + time.monotonic() - wall
    return state | {
        "seconds": seconds,
        "cpu_seconds": state["cpu_seconds"] + time.process_time() - cpu,
    }


class Stop:
    """Ctrl-C and SIGTERM: end a rollout at once, but never in the middle of an update or of saving."""

    def __init__(self) -> None:
        self.asked = self.shielded = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        first, self.asked = not self.asked, True
        if first and not self.shielded:
            raise KeyboardInterrupt

    @contextmanager
    def shield(self) -> Iterator[None]:
        asked_before, self.shielded = (
            self.asked,
            True,
        )  # asked before: this is the saving at the end
        try:
            yield
        finally:
            self.shielded = False
        if self.asked and not asked_before:
            raise KeyboardInterrupt
