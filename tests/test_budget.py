"""Functions of the package stay short enough to read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FUNCTION_LINES = 40  # of the body, without the docstring
MAX_NESTING = 3
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}

PACKAGE = Path(__file__).resolve().parents[1] / "numpyro_score"
FILES = sorted(PACKAGE.rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef
Branch = (
    ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith
    | ast.Try | ast.TryStar | ast.Match
)  # fmt: skip


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Count the lines from the first statement after the docstring to the last."""
    documented = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if documented else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def is_elif(parent: ast.AST, child: ast.AST) -> bool:
    return (
        isinstance(parent, ast.If)
        and isinstance(child, ast.If)
        and parent.orelse == [child]
        and child.col_offset == parent.col_offset
    )


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Return how deep control flow goes below ``node``; inner functions start anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            continue
        deeper = isinstance(child, Branch) and not is_elif(node, child)
        deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def excesses(source: str) -> list[str]:
    """Say for each budget that ``source`` exceeds where and by how much."""
    found = []
    for function in functions(ast.parse(source)):
        place = f"{function.name} (line {function.lineno})"
        if (lines := body_lines(function)) > MAX_FUNCTION_LINES:
            found.append(f"{place} has {lines} lines, at most {MAX_FUNCTION_LINES}")
        if (depth := nesting(function)) > MAX_NESTING:
            found.append(f"{place} nests {depth} deep, at most {MAX_NESTING}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_its_budget(path: Path):
    assert path.stem not in FORBIDDEN_NAMES, "name the file after its concept"
    assert excesses(path.read_text(encoding="utf-8")) == []


def test_package_is_found():
    assert PACKAGE / "__init__.py" in FILES


def function_source(num_lines: int, docstring: str = "") -> str:
    return f"def f():\n    {docstring!r}\n" + "    x = 1\n" * num_lines


def test_long_function_is_caught():
    long_docstring = "\n".join(["word"] * 100)
    assert excesses(function_source(MAX_FUNCTION_LINES, long_docstring)) == []
    [message] = excesses(function_source(MAX_FUNCTION_LINES + 1))
    assert message == "f (line 1) has 41 lines, at most 40"


def test_docstring_does_not_count():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'
    [function] = functions(ast.parse(source))
    assert body_lines(function) == 1


def nested_source(depth: int) -> str:
    lines = [f"{'    ' * (i + 1)}if x:" for i in range(depth)]
    return "\n".join(["def f(x):", *lines, "    " * (depth + 1) + "return x"])


def test_deep_nesting_is_caught():
    assert excesses(nested_source(MAX_NESTING)) == []
    [message] = excesses(nested_source(MAX_NESTING + 1))
    assert message == "f (line 1) nests 4 deep, at most 3"


def test_elif_is_not_nested_but_else_if_is():
    chain = "def f(x):\n    if x:\n        pass\n" + "    elif x:\n        pass\n" * 5
    [function] = functions(ast.parse(chain))
    assert nesting(function) == 1
    inner = (
        "def f(x):\n    if x:\n        pass\n    else:\n        if x:\n            1"
    )
    [function] = functions(ast.parse(inner))
    assert nesting(function) == 2


def test_inner_functions_are_counted_on_their_own():
    source = (
        "def f(x):\n    if x:\n        def g(y):\n            if y:\n                1"
    )
    outer, inner = functions(ast.parse(source))
    assert (nesting(outer), nesting(inner)) == (1, 1)
