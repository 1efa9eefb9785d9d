"""The Python code in README.md and docs/ runs, and prints what the page shows.

:mod:`tests.pages` says how blocks and outputs are marked.
"""

import re
from pathlib import Path

import pytest

from tests.pages import Block, differences, python_blocks, run

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "docs" / "_build"
PACKAGE = ROOT / "numpyro_score"


def pages(root: Path) -> list[Path]:
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in found if BUILD not in page.parents]


def cases() -> list:
    """One test for each page with code to run, and one skip for each block without."""
    found = []
    for page in pages(ROOT):
        name = str(page.relative_to(ROOT))
        blocks = python_blocks(page.read_text(encoding="utf-8"))
        runnable = [block for block in blocks if not block.reason]
        if runnable:
            found.append(pytest.param(page, runnable, id=name, marks=pytest.mark.slow))
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

A table:

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
        Block("first = 1", 4),
        Block("raise RuntimeError", 9, "needs a GPU"),
        Block("second = first + 1", 21),
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


def test_output_is_the_text_right_below_a_block():
    page = "```python\nprint(2 / 3)\n```\n\n```text\n0.65\n```\n"
    (block,) = python_blocks(page)
    assert block == Block("print(2 / 3)", 2, "", "0.65")
    assert run(Path("page.md"), [block])
    with pytest.raises(AssertionError, match=r"line 2: the page shows 0.9 in place of"):
        run(Path("page.md"), [block._replace(output="0.9")])
    apart = page.replace("```text", "It prints:\n\n```text")
    assert python_blocks(apart)[0].output is None


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("mean   1.00\n", "mean 1.04", True),
        ("mean 0.02", "mean -0.02", True),
        ("mean 0.0", "mean -0.1", False),
        ("draws 1000", "draws 1090", True),
        ("draws 1000", "draws 1200", False),
        ("x[0] 1.0", "x[1] 1.0", False),
        ("x 1e-03", "x 1e-03", True),
        ("x nan", "x 1.0", False),
        ("mean 1.0", "sd 1.0", False),
        ("1.0 2.0", "1.0", False),
    ],
)
def test_outputs_agree_up_to_two_digits(printed, shown, same):
    assert (not differences(printed, shown)) is same


def test_readme_shows_what_every_block_prints():
    blocks = python_blocks(pages(ROOT)[0].read_text(encoding="utf-8"))
    assert all(block.output for block in blocks)


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
