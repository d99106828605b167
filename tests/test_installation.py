"""requirements.txt, which no machine without a GPU can use, is resolved without installing it, and
picks the versions that docs/gpu.md writes down. By hand: it needs the package index.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")


def table() -> dict[str, list[str]]:
    """Package -> its cells: run on CPUs, then one for each of PYTHONS."""
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", (ROOT / "docs/gpu.md").read_text(), re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.quick
def test_the_table_names_what_the_cpu_requirements_name():
    required = (ROOT / "requirements-cpu.txt").read_text()
    for name in ("torch", "transformers", "safetensors", "peft"):
        version = re.search(rf"^{name}==([\d.]+)", required, re.M)[1]
        assert table()[name][0] == version, name
    assert f"vllm=={table()['vllm'][1]}" in (ROOT / "requirements.txt").read_text()


@pytest.mark.by_hand
@pytest.mark.parametrize("python", PYTHONS)
def test_the_gpu_requirements_resolve_to_the_table(python, tmp_path):
    picked = tmp_path / "picked.txt"
    options = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv==0.13.9"], check=True)
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-config", "--no-annotate"]
    files = [str(ROOT / "requirements.txt"), "-o", str(picked)]
    subprocess.run([*command, *options, *files], check=True, timeout=600)
    versions = dict(re.findall(r"^([\w-]+)==(\S+)$", picked.read_text(), re.M))
    column = 1 + PYTHONS.index(python)
    expected = {name: cells[column] for name, cells in table().items()}
    assert {name: versions[name] for name in expected} == expected
