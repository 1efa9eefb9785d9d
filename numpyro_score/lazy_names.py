"""Public names that a package imports at their first use (PEP 562)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], whole: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``, which know the lazy names.

    For names whose modules need a library that takes long to import and that few
    programs use. After the first use a name is an attribute like any other.

    Args:
        package: the package's ``__name__``.
        modules: for each lazy name the module that defines it.
        whole: modules that are themselves the values, of the last part of their names.

    Example:
        >>> find, _ = lazy_names(__name__, {"Heun": "numpyro_score.solver.runge_kutta"})
        >>> find("Heun")()
        Heun()
    """
    places = {module.rpartition(".")[2]: module for module in whole}

    def find(name: str) -> Any:
        if name in places:
            value = import_module(places[name])
        elif name in modules:
            value = getattr(import_module(modules[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *places})

    return find, listed
