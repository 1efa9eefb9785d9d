"""pyproject.toml, uv.lock and .ci/requirements.txt say the same."""

import importlib.util
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
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


def needed_by_default(lock: dict) -> set[str]:
    """Return what the project and its groups need, without its extras."""
    packages: dict[str, list[dict]] = {}
    for package in lock["package"]:
        packages.setdefault(package["name"], []).append(package)
    project = locked_project(lock)
    groups = project["dev-dependencies"].values()
    todo = [*project["dependencies"], *(entry for group in groups for entry in group)]
    found = set()
    while todo:
        entry = todo.pop()
        wanted = (entry["name"], *entry.get("extra", []))
        if wanted in found:
            continue
        found.add(wanted)
        for package in packages[entry["name"]]:
            extras = package.get("optional-dependencies", {})
            todo += package.get("dependencies", [])
            todo += [e for name in wanted[1:] for e in extras.get(name, [])]
    return {wanted[0] for wanted in found} - {PROJECT}


def test_requirements_agree_with_lock(lock, pins):
    needed = needed_by_default(lock)
    locked = {(p["name"], p["version"]) for p in lock["package"] if p["name"] in needed}
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


def test_package_says_its_version(root, pyproject):
    text = (root / "numpyro_score" / "__init__.py").read_text(encoding="utf-8")
    assert f'\n__version__ = "{pyproject["project"]["version"]}"\n' in text


def test_package_is_imported_from_this_directory(root):
    assert Path(importlib.util.find_spec("numpyro_score").origin).is_relative_to(root)


ADDRESS = re.compile(
    r"https://(?:github\.com|raw\.githubusercontent\.com)/([\w-]+/[\w.-]+)"
)
OURS = ("pyproject.toml", "README.md", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md")


def test_address_is_that_of_the_project_everywhere(root, pyproject):
    home = pyproject["project"]["urls"]["Repository"].removeprefix(
        "https://github.com/"
    )
    pages = [root / name for name in OURS]
    pages += [*(root / "docs").glob("*.*"), *(root / ".github").rglob("*.yml")]
    texts = {p.name: p.read_text(encoding="utf-8") for p in pages if p.suffix != ".svg"}
    mine = home.split("/")[1]
    found = {
        (name, address)
        for name, text in texts.items()
        for address in ADDRESS.findall(text)
        if address.split("/")[1] == mine
    }
    assert {address for _, address in found} == {home}


def test_readme_outside_of_the_repository_has_complete_addresses(root, pyproject):
    hook = pyproject["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    [fragment] = hook["fragments"]
    text = (root / fragment["path"]).read_text(encoding="utf-8")
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert any(t.endswith("docs/_static/digits.png") for t in targets)
    assert [t for t in targets if not t.startswith("https://")] == []


def test_readme_links_lead_to_files(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert targets
    assert [t for t in targets if not (root / t).exists()] == []


def test_classifiers_are_the_pythons_that_are_tested(root, pyproject):
    named = {
        line.rpartition(" ")[2]
        for line in pyproject["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    }
    text = (root / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    [tests] = [j for n, j in yaml.safe_load(text)["jobs"].items() if n == "tests"]
    assert set(tests["strategy"]["matrix"]["python"]) == named


def test_workflows_run_targets_that_exist(root):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z]+):.*##", makefile, flags=re.M))
    text = (root / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    used = {
        target
        for job in yaml.safe_load(text)["jobs"].values()
        for step in job["steps"]
        if step.get("run", "").startswith("make ")
        for target in step["run"].split()[1:]
    }
    assert {"test", "slow", "lowest", "latest", "lint", "types", "docs"} <= used
    assert used <= known


def test_release_publishes_without_a_token(root):
    text = (root / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in text


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", ".readthedocs.yaml"])
def test_files_that_a_configuration_names_exist(root, name):
    text = (root / name).read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    named = re.findall(r"(?:docs|\.ci)/[\w./]+", text)
    assert [path for path in named if not (root / path).exists()] == []
