"""Docstrings are statements in standard English, in the folders that are listed."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "numpyro_score"
FOLDERS = ("diagnostics", "infer/amortized", "kernel", "model", "smc", "solver")
FILES = sorted(path for folder in FOLDERS for path in (PACKAGE / folder).glob("*.py"))
# as first words they make a question or a riddle of a summary
QUESTIONS = ("How", "What", "When", "Where", "Whether", "Which", "Who", "Why")
PHRASES = (
    r"all but",
    r"at hand",
    r"of (one's|your) own",
    r"to be had",
    r"be(en)? told",
    r"\bnets? (believes?|knows?|sees?)\b",
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def docstrings(source: str) -> list[str]:
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, Documented)]
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


def faults(doc: str) -> list[str]:
    """Return what is wrong with a docstring."""
    first = re.split(r"\W", doc, maxsplit=1)[0]
    text = " ".join(doc.split())
    found = [phrase for phrase in PHRASES if re.search(phrase, text, re.IGNORECASE)]
    return found + [first] * (first in QUESTIONS)


def opened_emphasis(doc: str) -> list[str]:
    """Return words before which a star opens what Sphinx takes for emphasis."""
    text = re.split(r"\n\s*(?:Args|Example|Returns):\n", doc)[0]  # what Sphinx escapes
    text = re.sub(
        r"``.+?``|`[^`]*`|\*\*[^*]+\*\*|(?<!\*)\*[^*\s](?:[^*]*[^*\s])?\*", "", text
    )
    return re.findall(r"(?<![\w*\\])\*\w+", text)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_star_opens_emphasis_that_is_never_closed(path: Path):
    for doc in docstrings(path.read_text("utf-8")):
        assert opened_emphasis(doc) == [], doc


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_docstrings_state_what_is_returned(path: Path):
    for doc in docstrings(path.read_text("utf-8")):
        assert faults(doc) == [], doc


def test_faults_are_seen():
    assert faults("What :func:`f` returns.") == ["What"]
    assert faults("Return a step that is all\nbut exact.") == ["all but"]
    assert faults("Return x.") == []
    assert opened_emphasis("Return **one** of ``*x``, *y* or f(*args).") == ["*args"]
    assert docstrings('"""A."""\nclass B:\n    """B."""\n    def f(): """F."""\n') == [
        "A.",
        "B.",
        "F.",
    ]
