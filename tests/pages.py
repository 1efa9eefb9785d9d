"""The Python code of Markdown pages, and the output that they show below it.

The blocks of one page run in order and share their names. A block that cannot run
stands below a comment that says why: ``<!-- not run: needs a GPU -->``. A ``text``
fence that follows a Python fence, with nothing but empty lines between them, is what
the block prints.
"""

import contextlib
import io
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>.*?)\s*-->")
FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,})\s*(?P<info>.*)$")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
RELATIVE, ABSOLUTE = 0.1, 0.05  # two digits, of computers that round differently


class Block(NamedTuple):
    """A block of Python code."""

    code: str
    line: int  # of the file, where the code starts
    reason: str = ""  # why it is not run; empty if it is
    output: str | None = None  # that the page shows, if it does


class Fence(NamedTuple):
    """A fenced block, from the index of its first fence to that of its last."""

    start: int
    end: int
    info: str
    text: str


def closing_line(lines: list[str], start: int, ticks: str) -> int:
    """Return the index of the line that closes a fence opened before ``start``."""
    for index in range(start, len(lines)):
        if lines[index].strip() == ticks:
            return index
    raise ValueError(f"The code block that opens on line {start} is never closed.")


def fences(lines: list[str]) -> Iterator[Fence]:
    """Yield the fenced blocks of a page in order."""
    index = 0
    while index < len(lines):
        opening = FENCE.match(lines[index])
        if opening is None:
            index += 1
            continue
        end = closing_line(lines, index + 1, opening["ticks"])
        indent = len(opening["indent"])
        text = "\n".join(line[indent:] for line in lines[index + 1 : end])
        kind = (opening["info"].split() or [""])[0]
        yield Fence(index, end, kind, text)
        index = end + 1


def reason_above(lines: list[str], fence: int) -> str:
    """Return the reason in the comment on the last line with text above ``fence``."""
    above = [line for line in lines[:fence] if line.strip()]
    match = NOT_RUN.fullmatch(above[-1].strip()) if above else None
    return match["reason"] if match else ""


def python_blocks(text: str) -> list[Block]:
    """Return the Python blocks of a page, each with the output shown below it."""
    lines = text.splitlines()
    found = list(fences(lines))
    blocks = []
    for fence, after in itertools.pairwise([*found, None]):
        if fence.info != "python":
            continue
        is_output = (
            after is not None
            and after.info == "text"
            and not any(line.strip() for line in lines[fence.end + 1 : after.start])
        )
        output = after.text if is_output else None
        reason = reason_above(lines, fence.start)
        blocks.append(Block(fence.text, fence.start + 2, reason, output))
    return blocks


def run_block(page: Path, block: Block, names: dict) -> str:
    """Run ``block`` and return what it prints; tracebacks show its lines."""
    padded = "\n" * (block.line - 1) + block.code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(padded, str(page), "exec"), names)
    return printed.getvalue()


def run(page: Path, blocks: list[Block]) -> dict:
    """Run ``blocks`` in one namespace, and compare what they print with the page."""
    names: dict = {"__name__": "__docs__"}
    for block in blocks:
        printed = run_block(page, block, names)
        if block.output is not None:
            wrong = differences(printed, block.output)
            place = f"{page.name}, line {block.line}"
            assert not wrong, f"{place}: {'; '.join(wrong)}\nIt printed:\n{printed}"
    return names


def differences(printed: str, shown: str) -> list[str]:
    """Say where two texts differ: words at all, numbers by more than two digits.

    Numbers agree if they differ by at most 10 % or by at most .05. The width of spaces
    does not count.
    """
    texts = [" ".join(NUMBER.sub(" # ", text).split()) for text in (printed, shown)]
    if texts[0] != texts[1]:
        return [f"the page shows other words, {texts[1]!r}, than {texts[0]!r}"]
    return [
        f"the page shows {b} in place of {a}"
        for a, b in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
        if not math.isclose(float(a), float(b), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    ]
