"""A run in the operating system: its command, folder, checkpoints and ranks, and how it is stopped.

Left out: a run folder shared by two jobs at once.
"""

import importlib
import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from os.path import exists, getmtime, isfile
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, signal
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from deepresearcher_min.architecture import missing_gpu
from deepresearcher_min.config import (
    Config,
    ConfigError,
    RunStopped,
    check_inputs,
    help_text,
    load_config,
    named,
    parse_arguments,
    read_config,
    searches_web,
)
from deepresearcher_min.search import check_search

RUNS = Path("runs")
LATE = ["matplotlib.figure", "bm25s"]  # packages that are imported where they are used
LATE_ON_THE_WEB = ["matplotlib.figure", "trafilatura", "bs4", "lxml", "pypdf"]


def run_program(program, about, resolve, body, argv):
    """What train.py and eval.py do around their own work, body(config, ranks, notes).

    The exit code is 0, or 2: the command, a file or a service is wrong, 3: stopped by max_cost or a
    dead service, 130: by Ctrl-C; --resume goes on. `about` begins --help.
    """
    quiet_libraries()
    if {"-h", "--help"} & set(argv):
        print(f"{about}\n{help_text()}")
        return 0
    ranks = Ranks.start()
    run_dir = ""
    try:
        config = ranks.share(resolve(argv) if ranks.rank == 0 else None)  # one clock names the run
        run_dir = config.run_dir
        notes = check_inputs(config, argv, "eval.py" if program == "train.py" else "train.py")
        torch.set_num_threads(config.threads)
        finished = threading.Event()
        if ranks.world_size > 1:
            limits = ranks, config.rank_timeout, finished
            threading.Thread(target=watch, args=limits, daemon=True).start()
        body(config, ranks, notes)
        finished.set()
    except (ValueError, FloatingPointError) as error:
        ranks.say_once(f"{program}: {' '.join(str(error).split())}", sys.stderr)
        return 2
    except (RunStopped, KeyboardInterrupt) as stopped:
        if exists(f"{run_dir}/config.yaml"):  # else nothing is begun
            ranks.say_once(
                f"{stopped}\nStopped. Go on with: python {program} --resume={run_dir}", sys.stdout
            )
        return 3 if isinstance(stopped, RunStopped) else 130
    finally:
        signal(SIGINT, default_int_handler)  # in place of Stop's
        signal(SIGTERM, SIG_DFL)
        ranks.stop()
    return 0


def quiet_libraries():
    """No bars and warnings of libraries between the run's own lines; any console will do."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's
            # what a console lacks must not end a run
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def open_run(argv, evaluates=False) -> Config:
    """The resolved config: of a new run, or with --resume the one that was saved; argv over it.

    An evaluation starts from the config of the run that its model belongs to, else from a preset.
    run_dir and date are always filled in. ConfigError for a folder that holds another run.
    """
    typed = parse_arguments(argv)
    base = None
    now = datetime.now(UTC)
    if resume := typed.get("resume"):
        folder = newest_run(evaluates) if resume == "newest" else Path(resume)
        if not isfile(f"{folder}/config.yaml"):
            raise ConfigError(f"resume={resume!r}: there is no run with a config.yaml in {folder}")
        base = read_config("resume", folder)
        config = load_config([*argv, f"--run_dir={folder}", f"--resume={folder}"], base)
        begun = base.get("lora_rank", 0)
        if config.lora_rank != begun:
            raise ConfigError(
                f"lora_rank={config.lora_rank}: the checkpoints in {folder} were written with "
                f"{begun}; go on with that, or begin a new run"
            )
        return config
    if evaluates:
        model = Path(typed.get("model") or newest_run())
        run = model.parent.parent if model.parent.name == "checkpoints" else model
        if isfile(f"{run}/config.yaml") and exists(f"{run}/checkpoints"):
            base = read_config("model", run)
            base |= {"resume": "", "question": "", "run_dir": "", "date": ""}
            if model == run:
                complete = complete_checkpoints(run)
                if not complete:
                    raise ConfigError(f"model={str(run)!r}: it has no complete checkpoint yet")
                model = complete[-1]
        else:
            preset = "wiki" if typed.get("search") == "local" else "paper"
            argv = [f"--preset={preset}", *argv]
        argv = ["--engine_memory=0.9", *argv, f"--model={model}"]  # no optimizer shares it
        if "data" in typed:
            argv.append(f"--eval_data={typed['data']}")
    config = load_config(argv, base)
    name = "eval" if evaluates else config.preset
    run_dir = config.run_dir or f"{RUNS}/{name}-{now:%Y%m%d-%H%M%S}"
    if exists(f"{run_dir}/config.yaml"):
        raise ConfigError(
            f"run_dir={run_dir!r} holds a run already; continue it with --resume={run_dir}"
        )
    return replace(config, run_dir=run_dir, date=config.date or f"{now:%Y-%m-%d}")


def newest_run(evaluates=False):
    """The folder under runs/ of the newest run or evaluation; ConfigError if there is none."""
    kind, files = "run", "*/metrics.jsonl"
    if evaluates:
        kind, files = "evaluation", "eval-*/config.yaml"
    found = sorted(RUNS.glob(files), key=getmtime)
    if not found:
        raise ConfigError(
            f"there is no {kind} under runs/ yet; train.py makes runs, eval.py evaluations of them"
        )
    return found[-1].parent


def check_needs(config, questions=True):
    """One ConfigError that lists everything that is missing, before anything is loaded."""
    missing = []
    try:
        check_search(config)
    except ConfigError as error:
        missing.append(str(error))
    for package in LATE_ON_THE_WEB if searches_web(config) else LATE:
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken one may raise anything
            missing.append(
                f"{package} cannot be imported ({error}); pip install -r requirements-cpu.txt"
            )
    no_gpu = missing_gpu()
    if config.dtype == "bfloat16" and no_gpu:
        missing.append(f"dtype=bfloat16: {no_gpu}; on a CPU use --dtype=float32")
    processes = torchrun_says("LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count()
    if processes > gpus > 0:
        missing.append(f"{processes} processes for {gpus} GPUs: give --nproc_per_node={gpus}")
    if questions and config.search != "toy" and not config.data:
        missing.append("data is empty: name a .parquet or .jsonl of questions with --data=FILE")
    if missing:
        raise ConfigError("; ".join(missing))


@contextmanager
def starting(config, rank):
    """Everything before the first step: if it fails, a run folder that was not there is gone again.
    Whatever is raised becomes a ConfigError, which says where it comes from, if nothing else.
    """
    run = Path(config.run_dir)
    missing = [folder for folder in (run, *run.parents) if not exists(folder)]
    try:
        if rank == 0 and not config.question:  # one that is only shown needs no folder
            with named("run_dir", config.run_dir, "name one that can be written: --run_dir=DIR"):
                run.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=run).close()
        yield
    except BaseException as error:
        if rank == 0 and missing:
            shutil.rmtree(run, ignore_errors=True)
        for folder in missing[1:]:
            with suppress(OSError):  # another run is in it by now
                folder.rmdir()
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        *_, place = traceback.extract_tb(error.__traceback__)
        raise ConfigError(
            f"the start failed: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error


def torchrun_says(name, default=0):
    """A number in the environment; the default where torchrun has not started this process."""
    return int(os.environ.get(name, default))


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the processes of the job."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls):
        """As torchrun's variables say; joins their group. On GPUs: never run by us."""
        rank = torchrun_says("RANK")
        world_size = torchrun_says("WORLD_SIZE", 1)
        device = cls.device
        if torch.cuda.is_available():
            # Where there are more processes than GPUs, check_needs says so.
            number = torchrun_says("LOCAL_RANK") % torch.cuda.device_count()
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        if world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=60))
        return cls(rank, world_size, device)

    def share(self, value):
        """Rank 0's value on every rank."""
        return self.gather([value])[0]

    def deal(self, items):
        """This rank's share of the items, dealt out one by one; gather brings them back."""
        return items[self.rank :: self.world_size]

    def gather(self, items):
        """Every rank's items in one list, in the order before they were dealt."""
        shares = [items] * self.world_size
        found = []
        if self.world_size > 1:
            dist.all_gather_object(shares, items)
        for i in range(max(map(len, shares))):
            for share in shares:
                found += share[i : i + 1]
        return found

    def total(self, sums):
        result = Counter()
        for share in self.gather([sums]):
            result.update(share)  # `+` would drop negative sums
        return result

    def own(self, name):
        """A name for a file that only this rank writes."""
        return f"{name}-rank{self.rank}" if self.world_size > 1 else name

    def progress(self, name, total):
        """A bar over trajectories, on rank 0's terminal only; it leaves nothing behind."""
        # disable=None: where there is no terminal
        return tqdm(
            total=total, desc=name, unit="trajectory", leave=False, disable=self.rank > 0 or None
        )

    def say_once(self, text, stream):
        """Print how this ends; of several ranks only the first: torchrun then ends the others."""
        count = 1
        if self.world_size > 1:
            with suppress(RuntimeError):  # without its store nobody else is there any more
                count = self.store("ends").add("count", 1)
        if count == 1:
            print(text.strip(), file=stream, flush=True)

    def store(self, name):
        """Numbers in torchrun's store that all ranks count up together."""
        host = os.environ["MASTER_ADDR"]
        port = torchrun_says("MASTER_PORT")
        server = dist.TCPStore(host, port, timeout=timedelta(seconds=30))
        return dist.PrefixStore(name, server)

    def stop(self):
        """Leave the process group; to be called last."""
        if dist.is_initialized():
            dist.destroy_process_group()
            # gloo's threads free the last collective's tensors late, which aborts an ending
            # interpreter.
            time.sleep(1)


def watch(ranks, limit, finished):
    """End this process when another rank's has died or hangs, so that none waits for it for ever.

    Every process counts up its own number in torchrun's store and looks at the others'. The event
    `finished` is to be set after the last collective; `limit` in seconds.
    """
    store = ranks.store("watch")
    silent = ""
    seen = {}  # the number of each rank, and when it was new
    while not silent:
        if finished.wait(limit / 10):
            return
        try:
            store.add(str(ranks.rank), 1)
            for rank in range(ranks.world_size):
                number = store.add(str(rank), 0)
                now = time.monotonic()
                last, since = seen.get(rank, (None, now))
                if number != last:
                    seen[rank] = number, now
                elif now - since > limit:
                    silent = f"rank {rank}"
        # The store went with the first node, unless the others were only faster to their end.
        except RuntimeError:
            if not finished.wait(limit / 10):
                silent = "the first node"
    print(
        f"{silent} has not been heard of for {limit:g} s (rank_timeout): this run ends", flush=True
    )
    os._exit(1)  # torchrun then ends the other ranks


def complete_checkpoints(run):
    """The folders of a run's checkpoints that were written to the end, oldest first."""
    return sorted(file.parent for file in Path(run).glob("checkpoints/step-*/state.json"))


def save_checkpoint(config, ranks, state, write):
    """checkpoints/step-000020/: what write(folder) puts there on every rank, and state.json.

    Written aside and renamed, so a kill at any moment leaves the last good one; what is not
    complete is not found. A step that is saved already stays as it is. All but the newest
    `keep_checkpoints` are deleted, also what a kill left half deleted.
    """
    final = Path(f"{config.run_dir}/checkpoints/step-{state['step']:06d}")
    if final in complete_checkpoints(config.run_dir):
        return
    aside = final.with_name(f".{final.name}.part")
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.share(None)  # nobody writes before the folder is there
    write(aside)
    ranks.share(None)  # nobody renames before everybody has written
    if ranks.rank == 0:
        (aside / "state.json").write_text(json.dumps(state), "utf-8")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        kept = complete_checkpoints(config.run_dir)[-config.keep_checkpoints :]
        for old in set(final.parent.glob("step-*")) - set(kept):
            shutil.rmtree(old)
    ranks.share(None)


def load_checkpoint(config, ranks, state, read):
    """The state in the newest checkpoint, which every rank read(folder)s; without one, `state`."""
    for folder in ranks.share(complete_checkpoints(config.run_dir)[-1:]):  # one, or none
        order = state["order"]  # what the order of the questions follows from
        with named("resume", str(folder), "delete this checkpoint to go on from the one before"):
            read(folder)
            state = json.loads((folder / "state.json").read_text("utf-8"))
            saved = state.get("order")
        if saved != order:
            raise ConfigError(
                f"{folder} belongs to a run with {saved}, not {order}: begin a new one"
            )
    return state


class Stop:
    """Ctrl-C and SIGTERM. A rollout hears them itself and ends at once; all else is finished first,
    since half an update or half a checkpoint is of no use.
    """

    asked = False

    def __init__(self):
        for number in (SIGINT, SIGTERM):
            signal(number, self.handle)

    def handle(self, *_):
        self.asked = True

    def check(self):
        if self.asked:
            raise KeyboardInterrupt


def check_budget(config, usd):
    """RunStopped where the estimated cost of a run has reached max_cost."""
    if 0 < config.max_cost <= usd:
        raise RunStopped(f"The estimated cost, ${usd:.2f}, has reached max_cost={config.max_cost}.")
