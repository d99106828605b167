"""The rules of the house that a machine can check: sizes, and imports that point downwards only."""

import ast
import tokenize
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent
# Each may import those before it: first what knows nothing of the others' business, last what ties
# everything together.
ORDER = """config architecture trajectory grpo protocol web corpus search reward
    run browse engine policy rollout report evaluation""".split()  # noqa: SIM905
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


PYTHON = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= (160 if path.parent == ROOT else 420)
    most = 60 if path.parent.name in ("tests", "bench", "scripts") else 50
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= most, node.name


# --- what a reader pays

TOKENS = 36_000
TOKENS_A_STATEMENT = 11.0
FOLDS_A_STATEMENT = 0.08
FOLDS = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
    ast.IfExp,
    ast.NamedExpr,
)
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, described) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def cost(path: Path) -> tuple[int, int, int]:
    """(tokens, statements, folds) of a file: what a reader pays; docstrings and comments not."""
    tree = ast.parse(path.read_text())
    described = docstring_lines(tree)
    tokens = statements = 0
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.start[0] in described or token.type == tokenize.ENCODING:
                continue
            statements += token.type == tokenize.NEWLINE
            tokens += token.type not in LAYOUT
    folds = sum(isinstance(node, FOLDS) for node in ast.walk(tree))
    return tokens, statements, folds


HOUSE = [*MODULES.values(), ROOT / "train.py", ROOT / "eval.py"]


def test_the_house_is_read_in_one_sitting():
    tokens, statements, folds = map(sum, zip(*map(cost, HOUSE), strict=True))
    assert tokens <= TOKENS
    assert tokens / statements <= TOKENS_A_STATEMENT
    assert folds / statements <= FOLDS_A_STATEMENT


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: path.name)
def test_no_file_is_denser_than_the_rest(path):
    tokens, statements, folds = cost(path)
    assert tokens / statements <= 12.5
    assert folds / statements <= 0.12
