"""The page of guarantees names tests that exist, for every row of the README."""

import ast
import re
from pathlib import Path

import pytest

ROOT = next(path for path in Path(__file__).parents if (path / "README.md").exists())
PAGE = (ROOT / "docs/guarantees.md").read_text("utf-8")
NAMED = re.compile(r"`(test_\w+)`")  # mutants end in dots: `test_mutant...`


def rows(page: str) -> list[list[str]]:
    """Return the cells of the rows of all tables, without their heads."""
    table, found = False, []
    for line in page.splitlines():
        if re.fullmatch(r"\|[-|]+\|", line):
            table = True
        elif not line.startswith("|"):
            table = False
        elif table:
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def functions_of(source: str) -> set[str]:
    nodes = ast.walk(ast.parse(source))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef)}


@pytest.fixture(scope="module")
def defined() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return set().union(*(functions_of(path.read_text("utf-8")) for path in files))


def test_named_tests_exist(defined):
    named = set(NAMED.findall(PAGE))
    assert named
    assert named <= defined


def test_every_guarantee_names_a_test():
    assert [row for row in rows(PAGE) if not NAMED.search(row[-1])] == []


def test_every_row_of_the_readme_is_held():
    readme = (ROOT / "README.md").read_text("utf-8")
    section = re.search(r"## Exact or approximate\n(.*?)\n## ", readme, re.DOTALL)[1]
    held = {row[0] for row in rows(PAGE)}
    steps = [row[0] for row in rows(section)]
    assert len(steps) > 10
    assert [step for step in steps if step not in held] == []


def test_rows_and_tests_are_seen():
    assert rows("| a | b |\n|---|---|\n| `f(x)`, c | `test_d` |\n\ntext\n") == [
        ["`f(x)`, c", "`test_d`"]
    ]
    assert functions_of("class A:\n    def test_a(self): ...\ndef b(): ...\n") == {
        "test_a",
        "b",
    }
