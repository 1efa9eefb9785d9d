"""pyproject.toml, uv.lock and .ci/requirements.txt say the same."""

import importlib.util
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "numpyro-score"


@pytest.fixture(scope="module")
def lock(root: Path) -> dict:
    return tomllib.loads((root / "uv.lock").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(root: Path) -> list[Requirement]:
    lines = (root / ".ci" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements_of(entries: Iterable[dict]) -> set[tuple[str, str]]:
    """Read names and version ranges from one list of requirements in uv.lock."""
    return {(entry["name"], entry.get("specifier", "")) for entry in entries}


def requirements_from(lines: Iterable[str]) -> set[tuple[str, str]]:
    """Read names and version ranges from one list of requirements in pyproject.toml."""
    parsed = [Requirement(line) for line in lines]
    return {(canonicalize_name(r.name), str(r.specifier)) for r in parsed}


def locked_project(lock: dict) -> dict:
    [project] = [p for p in lock["package"] if p["name"] == PROJECT]
    return project


def test_requirements_agree_with_lock(lock, pins):
    locked = {(p["name"], p["version"]) for p in lock["package"]}
    locked = {pin for pin in locked if pin[0] != PROJECT}
    pinned = {(canonicalize_name(r.name), str(r.specifier)) for r in pins}
    assert pinned == {(name, f"=={version}") for name, version in locked}, (
        "run `make requirements` after each change of uv.lock"
    )


def test_lock_comes_from_pypi_alone(lock):
    sources = {p["source"].get("registry") for p in lock["package"]}
    assert sources - {None} == {"https://pypi.org/simple"}


def test_lock_knows_every_dependency(lock, pyproject):
    project = pyproject["project"]
    extras = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for e in extras.values() for line in e)]
    locked = locked_project(lock)["metadata"]["requires-dist"]
    assert requirements_of(locked) == requirements_from(lines), "run `uv lock`"


def test_lock_knows_every_dependency_group(lock, pyproject):
    locked = locked_project(lock)["metadata"]["requires-dev"]
    for name in ("test", "lint", "docs"):
        lines = pyproject["dependency-groups"][name]
        assert requirements_of(locked[name]) == requirements_from(lines), (
            "run `uv lock`"
        )


def test_set_up_accepts_the_supported_pythons(root, pyproject):
    script = (root / ".ci" / "setup").read_text(encoding="utf-8")
    assert pyproject["project"]["requires-python"] == ">=3.12"
    assert re.search(r"\(3, 12\) <= sys.version_info", script)


def test_citation_has_the_version_of_the_package(root, pyproject):
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    version = pyproject["project"]["version"]
    assert f"\nversion: {version}\n" in citation


def test_package_is_imported_from_this_directory(root):
    assert Path(importlib.util.find_spec("numpyro_score").origin).is_relative_to(root)
