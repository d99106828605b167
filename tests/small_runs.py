"""What the tests of whole runs share: a run of two steps on the toy web, and what it left in
metrics.jsonl.
"""

import json
from pathlib import Path

import train

SMALL = [
    "--questions_per_step=4",
    "--group_size=4",
    "--eval_questions=10",
    "--log_every=1",
    "--save_every=1",
    "--steps=2",
    "--lr_decay=no",  # it depends on `steps`, which some tests change
]
TIMES = {"roll_s", "update_s"}  # what no two runs have in common


def run_small(folder: Path, *extra: str) -> list[dict]:
    """Train in this process; returns the rows of metrics.jsonl without the times."""
    assert train.main([*SMALL, f"--run_dir={folder}", *extra]) == 0
    return metrics(folder)


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in TIMES | {"steps"}} for row in rows
    ]
