"""Which tests are slow, and which of these are left to the weekly run.

The default run has few minutes, so that tests which take longer are marked ``slow``
(for ``make slow``, which continuous integration runs too), and the longest of them also
``long`` (for ``make long``, weekly). Examples in docstrings are tests too. Marks stand
at the tests where they are said of all cases, and in ``tests/tiers.txt`` where the
clock alone decides: a line is a tier and the name of a test, with its case in brackets
unless all cases are meant.

    python -m pytest -n 2 --dist loadfile -m "" --durations=0 -q > durations.log
    python -m tests.tiers durations.log

prints lines for tests that take longer than the list says, slowest first. Those that
are marked where they stand, and the few that should stay where they are, need no line.
"""

import re
import sys
from collections import Counter
from pathlib import Path

TIERS = Path(__file__).with_name("tiers.txt")
SECONDS = {"slow": 2.2, "long": 25.0}  # of the call, on two cores with nothing else
# what a test shares with others of its file, its setup, is not its own
LINE = re.compile(r"\s*([\d.]+)s call\s+(\S.*?)\s*$")


def read_tiers() -> dict[str, str]:
    """Return the tier of each name in the list."""
    lines = TIERS.read_text("utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: tier for tier, name in pairs}


def marks_of(name: str, tiers: dict[str, str]) -> tuple[str, ...]:
    """Return the marks of a test by the list: of its own name, or a whole function."""
    tier = tiers.get(name) or tiers.get(name.split("[", 1)[0])
    return {None: (), "slow": ("slow",), "long": ("slow", "long")}[tier]


def seconds_by_test(log: str) -> Counter[str]:
    """Return the seconds of the call of every test that pytest has timed."""
    seconds: Counter[str] = Counter()
    for line in log.splitlines():
        if found := LINE.match(line):
            seconds[found.group(2)] += float(found.group(1))
    return seconds


def main() -> None:
    """Print a line for every test that takes longer than its tier of the list has."""
    tiers = read_tiers()
    for name, seconds in seconds_by_test(Path(sys.argv[1]).read_text()).most_common():
        marks = marks_of(name, tiers)
        tier = next((t for t in ("long", "slow") if seconds >= SECONDS[t]), None)
        if tier and tier not in marks:
            print(f"{tier} {name}  # {seconds:.0f} s")


if __name__ == "__main__":
    main()
