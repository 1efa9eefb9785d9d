"""What the packages offer: names to call, each with an example that runs.

Doctests run the examples; these tests say that none is missing.
"""

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import numpyro_score

# options without an example of their own, and whose example shows them
OPTIONS = {"Grid": "numpyro_score.solver.Geometric"}


def packages() -> list[str]:
    found = pkgutil.walk_packages(numpyro_score.__path__, "numpyro_score.")
    return ["numpyro_score", *(module.name for module in found if module.ispkg)]


def public_names() -> list[tuple[str, str]]:
    return [
        (package, name)
        for package in packages()
        for name in getattr(importlib.import_module(package), "__all__", ())
    ]


def load(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def has_example(thing: Any) -> bool:
    return ">>>" in (inspect.getdoc(thing) or "")


@pytest.mark.parametrize(("package", "name"), public_names())
def test_public_name_has_an_example(package, name):
    thing = load(package, name)
    if inspect.ismodule(thing):
        return
    assert callable(thing), "a package offers classes and functions"
    if name in OPTIONS:
        thing = load(*OPTIONS[name].rsplit(".", 1))
    assert has_example(thing)


@pytest.mark.parametrize("name", OPTIONS)
def test_exception_is_needed(name):
    [thing] = {load(*public) for public in public_names() if public[1] == name}
    assert not has_example(thing)


@pytest.mark.parametrize(("package", "name"), public_names())
def test_public_name_is_no_result(package, name):
    thing = load(package, name)
    # inputs that are named tuples
    if name in {"Batch", "Progress"}:
        return
    assert not hasattr(thing, "_fields"), "results are importable from their module"
    assert not getattr(thing, "_is_protocol", False)
    assert not name.endswith(("Module", "State", "Result"))


def test_front_door_names_every_package():
    described = inspect.getdoc(numpyro_score)
    private = {"data", "smc", "score"}  # pieces of the others
    parts = {p.split(".")[1] for p in packages()[1:]} - private
    assert all(f"``{part}``" in described for part in parts)


@pytest.mark.parametrize("package", packages())
def test_names_are_in_order_and_listed(package):
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert set(names) <= set(dir(module))
