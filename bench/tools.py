"""The tools, measured: page extraction beside others, the cassette, a step's worth of searches,
stalls of the engine.

    python bench/tools.py [--json PATH] [--pages DIR] [--trajectories 4096]

DIR holds pages.jsonl (file, must_contain, must_not_contain, expected_text) and files/; without it
that part is left out. Everything runs here: the searches go to a server on loopback, in a process
of its own. Takes about three minutes.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deepresearcher_min.browse import Parsers, main_text  # noqa: E402
from deepresearcher_min.config import load_config  # noqa: E402
from deepresearcher_min.search import make_search  # noqa: E402
from deepresearcher_min.web import Web  # noqa: E402

# Log-normal: median 0.8 s, 99th percentile 8 s.
SEARCH_MEDIAN, SEARCH_SIGMA = 0.8, math.log(10) / 2.3263
# Trajectories of a question, queries of each, different ones that occur to them.
GROUP, QUERIES, CANDIDATES = 16, 3, 30
PAPER = load_config(["--preset=paper"])


# --- extraction


def all_text(body: bytes, _: str) -> str:
    import trafilatura

    return trafilatura.html2txt(body)


def trafilatura_mode(**options: bool) -> Callable[[bytes, str], str]:
    import trafilatura

    return lambda body, _: trafilatura.extract(body, **options) or ""


def quality(
    pages: list[tuple[dict, bytes]], extract: Callable[[bytes, str], str]
) -> dict[str, float]:
    """Shares of the wanted strings kept and of the unwanted ones absent, and the mean F1 of words
    to expected texts.
    """
    kept, absent, f1 = [], [], []
    for row, body in pages:
        text = extract(body, "text/html")
        line = " ".join(text.split())
        kept += [" ".join(wanted.split()) in line for wanted in row.get("must_contain", [])]
        absent += [
            " ".join(unwanted.split()) not in line for unwanted in row.get("must_not_contain", [])
        ]
        if "expected_text" in row:
            expected, got = (
                Counter(re.findall(r"\w+", row["expected_text"])),
                Counter(re.findall(r"\w+", text)),
            )
            f1.append(2 * (expected & got).total() / (expected.total() + got.total()))
    return {
        "kept": statistics.mean(kept),
        "absent": statistics.mean(absent),
        "f1": statistics.mean(f1),
    }


def bench_extraction(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "pages.jsonl").read_text().splitlines()]
    pages = [(row, (folder / "files" / row["file"]).read_bytes()) for row in rows]
    extractors = {
        "ours": main_text,
        "trafilatura fast": trafilatura_mode(fast=True),
        "trafilatura no comments": trafilatura_mode(fast=True, include_comments=False),
        "trafilatura fast+recall": trafilatura_mode(fast=True, favor_recall=True),
        "trafilatura": trafilatura_mode(),
        "all text": all_text,
    }
    # The first round warms up.
    scores = {name: quality(pages, extract) for name, extract in extractors.items()}
    times: dict[str, list[list[float]]] = {name: [[] for _ in pages] for name in extractors}
    order = list(extractors.items())
    # Interleaved: a busy neighbour slows all of them; shuffled: the second finds warm caches.
    for _ in range(6):
        for number, (_, body) in enumerate(pages):
            random.shuffle(order)
            for name, extract in order:
                start = time.process_time()
                extract(body, "text/html")
                times[name][number].append(time.process_time() - start)
    best = {name: [min(page) for page in of_pages] for name, of_pages in times.items()}
    print(f"\n{len(pages)} real pages          kept  absent   F1    CPU ms: median   mean")
    for name, score in scores.items():
        milliseconds = [1000 * seconds for seconds in best[name]]
        print(
            f"  {name:24} {score['kept']:.3f}  {score['absent']:.3f}  {score['f1']:.3f}"
            f"  {statistics.median(milliseconds):14.1f} {statistics.mean(milliseconds):6.1f}"
        )
    ratios = [
        mine / theirs for mine, theirs in zip(best["ours"], best["trafilatura fast"], strict=True)
    ]
    return {
        **scores["ours"],
        "ms_vs_trafilatura": statistics.median(ratios),
        "ms_vs_trafilatura_mean": sum(best["ours"]) / sum(best["trafilatura fast"]),
        "ms_median": 1000 * statistics.median(best["ours"]),
    }


# --- cassette


def reply_of(number: int) -> list[list[str]]:
    """Ten results of about the size that a search engine sends."""
    rng = random.Random(number)
    return [
        [
            f"Title {rng.random()}",
            f"https://site.example/{rng.random()}",
            "some words of a snippet " * 8,
        ]
        for _ in range(10)
    ]


def bench_cassette(folder: Path) -> dict[str, float]:
    """CPU of Web.cached: a new reply (key, encoding, write) and a recorded one (key, read,
    decoding).
    """
    web, counts, filled = Web(PAPER, folder / "cassette.sqlite"), Counter(), 0
    figures: dict[str, float] = {}
    print(f"\ncassette, replies of {len(json.dumps(reply_of(0)))} bytes      put ms  get ms (CPU)")
    replies = itertools.cycle([reply_of(number) for number in range(500)])
    for name, entries in (("1k", 1_000), ("100k", 100_000)):
        while filled < entries:
            web.cached("fill", filled, replies.__next__, counts, time.monotonic() + 60)
            filled += 1
        for what in ("put", "get"):  # the second round finds what the first has put
            start = time.process_time()
            for number in range(500):
                web.cached(name, number, replies.__next__, counts, time.monotonic() + 60)
            figures[f"{what}_ms_{name}"] = (time.process_time() - start) / 500 * 1000
        print(
            f"  with {name:>5} entries {figures[f'put_ms_{name}']:24.3f} "
            f"{figures[f'get_ms_{name}']:7.3f}"
        )
    web.close()
    return figures


# --- the searches of a step


def serve(port: multiprocessing.Queue, received: multiprocessing.Value) -> None:
    """A search service as slow as the design's log-normal says, in a process of its own."""
    results = [{"title": t, "link": u, "snippet": s} for t, u, s in reply_of(0)]
    body = json.dumps({"searchParameters": {}, "organic": results}).encode()
    fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.readuntil(b"\r\n\r\n"):
            length = re.search(rb"(?i)content-length: *(\d+)", request)
            query = await reader.readexactly(int(length[1])) if length else b""
            received.value += 1
            luck = random.Random(hashlib.sha256(query).digest()).gauss(0, 1)
            await asyncio.sleep(
                min(PAPER.tool_timeout, SEARCH_MEDIAN * math.exp(SEARCH_SIGMA * luck))
            )
            writer.write(head + body)

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1000)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def bench_searches(folder: Path, trajectories: int, threads: int = 256) -> dict[str, float]:
    """Each trajectory asks three of its question's candidate queries, the r-th likeliest with
    weight 1/r (assumed).
    """
    context = multiprocessing.get_context("spawn")
    port, received = context.Queue(), context.Value("l", 0)
    service = context.Process(target=serve, args=(port, received), daemon=True)
    service.start()
    os.environ["SERPER_API_KEY"] = "none"
    config = replace(
        PAPER,
        search_url=f"http://127.0.0.1:{port.get(timeout=60)}",
        tool_threads=threads,
        read_timeout=30.0,
    )
    web = Web(config, folder / "searches.sqlite")
    search = make_search(config, web, None)
    rng = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(CANDIDATES)]
    asked = [
        f"question {trajectory // GROUP} query {choice}"
        for trajectory in range(trajectories)
        for choice in rng.choices(range(CANDIDATES), weights, k=QUERIES)
    ]
    counts: Counter = Counter()

    def ask(query: str) -> tuple[str, float, float]:
        start = time.monotonic()
        search(query, counts)
        return query, start, time.monotonic()

    start, cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        calls = list(pool.map(ask, asked))
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    first_end: dict[str, float] = {}
    for query, _, end in calls:
        first_end[query] = min(end, first_end.get(query, end))
    under_way = sum(start < first_end[query] for query, start, _ in calls) - len(first_end)
    service.kill()
    web.close()
    figures = {
        "requests_asked": len(asked),
        "requests_sent": received.value,
        "single_flight_saved": under_way,
        "search_seconds": seconds,
        "cpu_ms_per_search": 1000 * cpu / len(asked),
    }
    limit = f"{PAPER.requests_per_second:.0f}/s"
    print(
        f"\nsearches of {trajectories} trajectories, {QUERIES} queries each, {threads} threads, "
        f"{limit}"
    )
    print(
        f"  asked {len(asked)}, sent {received.value}; different {len(first_end)}; saved by "
        f"waiting for one under way"
    )
    print(f"  {under_way}; {seconds:.0f} s, {figures['cpu_ms_per_search']:.2f} ms CPU a search")
    return figures


# --- stalls


def steps_per_second(seconds: float) -> tuple[float, float]:
    """(steps a second, 99th percentile of a step [ms]) of a loop like an engine's: Python and small
    matrix products.
    """
    import torch

    weights, state, taken = [torch.randn(256, 256) / 16 for _ in range(8)], torch.randn(32, 256), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        for weight in weights:
            state = torch.tanh(state @ weight)
        sorted(range(2000), key=lambda i: -i)  # the scheduling, in Python, that every engine does
        taken.append(1000 * (time.perf_counter() - start))
    return len(taken) / seconds, statistics.quantiles(taken, n=100)[98]


def bench_stalls(body: bytes, workers: int = 8) -> dict[str, float]:
    """The loop alone, beside threads that parse pages, and beside threads that wait for parsing
    child processes.
    """
    import torch

    torch.set_num_threads(1)
    parsers, over = Parsers(2), threading.Event()
    parsed: Counter = Counter()

    def keep_parsing(name: str, parse: Callable[[], str]) -> None:
        while not over.is_set():
            parse()
            parsed[name] += 1

    def in_child() -> str:
        return parsers.text(body, "text/html", time.monotonic() + 60)

    main_text(body, "text/html")
    with ThreadPoolExecutor(workers) as pool:  # so many at once that both children are started
        list(pool.map(lambda _: in_child(), range(2 * workers)))
    figures = {}
    print(
        f"\na loop like an engine's beside {workers} tool threads   steps/s   slowest 1 % of "
        f"steps ms   pages/s"
    )
    for name, parse in (
        ("alone", None),
        ("threads", lambda: main_text(body, "text/html")),
        ("children", in_child),
    ):
        over.clear()
        crowd = [
            threading.Thread(target=keep_parsing, args=(name, parse))
            for _ in range(workers if parse else 0)
        ]
        for thread in crowd:
            thread.start()
        rate, slow = steps_per_second(8.0)
        over.set()
        for thread in crowd:
            thread.join()
        figures |= {f"steps_per_s_{name}": rate, f"step_p99_ms_{name}": slow}
        label = "alone" if parse is None else f"pages parsed in {name}"
        print(f"  {label:44} {rate:9.0f} {slow:24.1f} {parsed[name] / 8:10.1f}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pages", type=Path, default=ROOT.parent / "shared/data/html_pages")
    parser.add_argument("--trajectories", type=int, default=4096)
    args = parser.parse_args()
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    figures: dict[str, float] = {"load": os.getloadavg()[0], "cpus": os.cpu_count() or 0}
    body = (
        "<html><body>"
        + "<p>A sentence with <a href=x>a link</a> that is kept.</p>" * 400
        + "</body></html>"
    ).encode()
    if args.pages.is_dir():
        figures |= bench_extraction(args.pages)
    else:
        print(f"no pages in {args.pages}: extraction is left out")
    with tempfile.TemporaryDirectory() as folder:
        figures |= bench_cassette(Path(folder))
        figures |= bench_searches(Path(folder), args.trajectories)
    figures |= bench_stalls(body)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
