"""The texts of the published system, out of a copy of its repository, letter by letter: trailing
spaces count.

`python -m scripts.official_texts DeepResearcher authors` writes authors/system.txt and
authors/tools.json, which the checkpoint was trained with (scrl/llm_agent/generation.py), and
authors/judge.txt, by which its answers were judged (evaluate/cacluate_metrics.py, as it is spelled
there). They are read as data: no line of that repository is run.
"""

import ast
import json
import sys
from pathlib import Path

GENERATION, METRICS = "scrl/llm_agent/generation.py", "evaluate/cacluate_metrics.py"
SEARCH_ENGINE = "online_search"  # of the two system prompts, that for the live web


def assigned(tree: ast.AST, name: str) -> ast.expr:
    """The value that a name or an attribute of this name is given first; LookupError if there is
    none.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).rpartition(".")[2] == name:
            return node.value
    raise LookupError(f"nothing is assigned to {name}")


def branch(tree: ast.AST, word: str) -> ast.AST:
    """What is done where a comparison with this text holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and repr(word) in ast.unparse(node.test):
            return ast.Module(node.body, [])
    raise LookupError(f"nothing depends on {word!r}")


def text_of(value: ast.expr) -> str:
    """A string, or an f-string with {date} in the place of what it computes."""
    if not isinstance(value, ast.JoinedStr):
        return str(ast.literal_eval(value))
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else "{date}" for part in value.values
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m scripts.official_texts REPOSITORY FOLDER", file=sys.stderr)
        return 2
    repository, folder = map(Path, arguments)
    try:
        generation, metrics = (
            ast.parse((repository / name).read_text("utf-8")) for name in (GENERATION, METRICS)
        )
        texts = {
            "system.txt": text_of(assigned(branch(generation, SEARCH_ENGINE), "system_prompt")),
            "tools.json": json.dumps(ast.literal_eval(assigned(generation, "TOOLS"))),
            "judge.txt": text_of(assigned(metrics, "PROMPT")),
        }
    except (OSError, ValueError, SyntaxError, LookupError) as error:
        print(
            f"{repository} is not the official repository as we know it: {error}", file=sys.stderr
        )
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())  # as bytes: no line end is translated
        print(f"{folder / name}: {len(text)} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
