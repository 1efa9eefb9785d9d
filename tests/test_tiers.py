"""The list of slow tests names tests that exist, and the clock's log is read."""

import ast
from functools import cache

from tests.tiers import TIERS, marks_of, read_tiers, seconds_by_test

ROOT = TIERS.parents[1]


@cache
def names_in(file: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_names_of_the_list_are_those_of_tests():
    lines = [line for line in TIERS.read_text("utf-8").splitlines() if line[:1] != "#"]
    assert lines == sorted(set(lines))
    for name, tier in read_tiers().items():
        assert tier in ("slow", "long")
        file, function = name.split("[", 1)[0].split("::")
        # an example in a docstring has the dotted name of what it is of
        assert function.rsplit(".", 1)[-1] in names_in(file), name


def test_marks_of_a_case_and_of_all_cases():
    tiers = {"a.py::test_x[1]": "long", "a.py::test_y": "slow"}
    assert marks_of("a.py::test_x[1]", tiers) == ("slow", "long")
    assert marks_of("a.py::test_x[2]", tiers) == ()
    assert marks_of("a.py::test_y[2]", tiers) == ("slow",)


def test_seconds_are_those_of_the_call():
    log = """
    ======= slowest durations =======
    2.50s call     a.py::test_x[a b]
    0.25s setup    a.py::test_x[a b]
    1 passed in 3.00s
    """
    assert seconds_by_test(log) == {"a.py::test_x[a b]": 2.5}
