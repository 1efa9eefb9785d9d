"""The Python code in README.md and docs/ runs.

The blocks of one page run in order and share their names. A block that cannot run here
stands below a comment that says why: ``<!-- not run: needs a GPU -->``.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "docs" / "_build"
PACKAGE = ROOT / "numpyro_score"
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>.*?)\s*-->")
FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,})\s*(?P<info>.*)$")


class Block(NamedTuple):
    code: str
    line: int  # of the file, where the code starts
    reason: str  # why it is not run; empty if it is


def pages(root: Path) -> list[Path]:
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in found if BUILD not in page.parents]


def is_python(info: str) -> bool:
    return info.split()[:1] == ["python"]


def closing_line(lines: list[str], start: int, ticks: str) -> int:
    """Return the index of the line that closes a fence opened before ``start``."""
    for index in range(start, len(lines)):
        if lines[index].strip() == ticks:
            return index
    raise ValueError(f"The code block that opens on line {start} is never closed.")


def reason_above(lines: list[str], fence: int) -> str:
    """Return the reason in the comment on the last line with text above ``fence``."""
    above = [line for line in lines[:fence] if line.strip()]
    match = NOT_RUN.fullmatch(above[-1].strip()) if above else None
    return match["reason"] if match else ""


def python_blocks(text: str) -> list[Block]:
    lines, blocks, index = text.splitlines(), [], 0
    while index < len(lines):
        fence = FENCE.match(lines[index])
        if fence is None:
            index += 1
            continue
        end = closing_line(lines, index + 1, fence["ticks"])
        if is_python(fence["info"]):
            indent = len(fence["indent"])
            code = "\n".join(line[indent:] for line in lines[index + 1 : end])
            blocks.append(Block(code, index + 2, reason_above(lines, index)))
        index = end + 1
    return blocks


def run(page: Path, blocks: list[Block]) -> dict:
    """Run ``blocks`` in one namespace; tracebacks show the lines of ``page``."""
    names: dict = {"__name__": "__docs__"}
    for block in blocks:
        padded = "\n" * (block.line - 1) + block.code
        exec(compile(padded, str(page), "exec"), names)
    return names


def cases() -> list:
    """One test for each page with code to run, and one skip for each block without."""
    found = []
    for page in pages(ROOT):
        name = str(page.relative_to(ROOT))
        blocks = python_blocks(page.read_text(encoding="utf-8"))
        runnable = [block for block in blocks if not block.reason]
        if runnable:
            # the README is what everyone reads first; CI runs the other pages too
            marks = () if name == "README.md" else pytest.mark.slow
            found.append(pytest.param(page, runnable, id=name, marks=marks))
        for block in (b for b in blocks if b.reason):
            skip = pytest.mark.skip(reason=block.reason)
            case_id = f"{name}:{block.line}"
            found.append(pytest.param(page, [block], id=case_id, marks=skip))
    return found


@pytest.mark.parametrize(("page", "blocks"), cases())
def test_page_runs(page: Path, blocks: list[Block], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes does not stay in the repository
    run(page, blocks)


PAGE = """\
# Title

```python
first = 1
```

<!-- not run: needs a GPU -->
```python
raise RuntimeError
```

```text
no python
```

1. In a list:

   ```python
   second = first + 1
   ```
"""


def test_blocks_are_found_with_their_lines_and_reasons():
    assert python_blocks(PAGE) == [
        Block("first = 1", 4, ""),
        Block("raise RuntimeError", 9, "needs a GPU"),
        Block("second = first + 1", 19, ""),
    ]


def test_blocks_share_names():
    runnable = [block for block in python_blocks(PAGE) if not block.reason]
    assert run(Path("page.md"), runnable)["second"] == 2


def test_failing_block_shows_the_line_of_its_page():
    blocks = python_blocks("text\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run(Path("page.md"), blocks)
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 5)


def test_unclosed_block_is_an_error():
    with pytest.raises(ValueError, match="opens on line 1 is never closed"):
        python_blocks("```python\nx = 1\n")


def test_readme_is_among_the_pages():
    assert pages(ROOT)[0].name == "README.md"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def public_modules() -> list[str]:
    names = [module_name(path) for path in sorted(PACKAGE.rglob("*.py"))]
    return [n for n in names if n != PACKAGE.name and "._" not in n]


def test_every_module_has_a_place_in_the_reference():
    text = "\n".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "docs/api").glob("*")
    )
    documented = set(re.findall(r"automodule:: (\S+)", text))
    assert set(public_modules()) == documented, "docs/api lists each module once"
