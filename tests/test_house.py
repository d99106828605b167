"""The rules of the house that a machine can check: sizes, and imports that point downwards only."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent
# Each may import those before it: first what knows nothing of the others' business, last what ties
# everything together.
ORDER = """config architecture trajectory grpo protocol web reward search
    run browse engine policy rollout toyworld report evaluation""".split()  # noqa: SIM905
MODULES = {
    path.stem: path
    for path in (ROOT / "deepresearcher_min").glob("*.py")
    if path.stem != "__init__"
}


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "deepresearcher_min"
        ):
            inner = node.module.partition(".")[2]
            found |= {inner} if inner else {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_imports_point_downwards():
    assert MODULES.keys() == set(ORDER)
    for name, path in MODULES.items():
        assert not {other for other in imports(path) if ORDER.index(other) >= ORDER.index(name)}, (
            name
        )


def test_only_train_and_eval_stand_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {"train.py", "eval.py"}


def test_the_package_has_few_modules():
    assert len(MODULES) <= 16


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")], ids=lambda path: path.name
)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 420
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
