"""Public names that a package imports at their first use (PEP 562)."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``, which know the lazy names.

    For names whose modules need a library that takes long to import and that few
    programs use. After the first use a name is an attribute like any other.

    Args:
        package: the package's ``__name__``.
        modules: for each lazy name the module that defines it.

    Example:
        >>> find, _ = lazy_names(__name__, {"Heun": "numpyro_score.solver.runge_kutta"})
        >>> find("Heun")()
        Heun()
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return find, listed
