"""Short reprs: a title, then one line for each thing that a person asks for.

They never show arrays, so they cost nothing and fit on a screen; inside of ``jit`` they
say so instead of numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import jax
import numpy as np

WIDTH = 88  # of a line, as in the code


def repr_lines(title: str, rows: Mapping[str, str]) -> str:
    """Return a title and one line for each row, cut off at 88 characters.

    Example:
        >>> print(repr_lines("Thing", {"shape": "(2,)", "weights": "30"}))
        Thing
          shape    (2,)
          weights  30
    """
    width = max(map(len, rows), default=0)
    lines = [f"  {name:<{width}}  {' '.join(rows[name].split())}" for name in rows]
    cut = (f"{x[: WIDTH - 3]}..." if len(x) > WIDTH else x for x in lines)
    return "\n".join([title, *cut])


def short_repr(value: Any) -> str:
    """Return one line: of an array its shape, of a dataclass what is not the default.

    Example:
        >>> from numpyro_score.sde import VE
        >>> short_repr(VE(sigma_max=10.0)), short_repr(np.zeros(3))
        ('VE(sigma_max=10.0)', 'array(3,)')
    """
    if isinstance(value, jax.Array | np.ndarray):
        return f"array{value.shape}"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(short_repr, value)) + "," * (len(value) == 1)
        return f"({inside})"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(_chosen(value))})"
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)


def count_weights(params: Any) -> int:
    """Return how many numbers a tree of arrays holds.

    Example:
        >>> count_weights({"kernel": np.zeros((3, 2)), "bias": np.zeros(2)})
        8
    """
    shapes = (getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(params))
    return sum(prod(shape) for shape in shapes)


def join_first(texts: Sequence[str], most: int) -> str:
    """Return the first of some texts, and how many more there are.

    Args:
        texts: the texts.
        most: how many of them are shown.

    Example:
        >>> join_first(["a", "b", "c"], 2)
        'a; b; and 1 more'
    """
    rest = len(texts) - most
    return "; ".join(texts[:most]) + (f"; and {rest} more" if rest > 0 else "")


def short_number(value: Any) -> str:
    """Return four digits of a number; of a traced one that it is traced.

    Example:
        >>> short_number(2 / 3)
        '0.6667'
    """
    return "traced" if isinstance(value, jax.core.Tracer) else f"{float(value):.4g}"


def _chosen(value: Any) -> list[str]:
    """Return the fields of a dataclass that differ from their defaults."""
    shown = [(f.name, getattr(value, f.name), f.default) for f in fields(value)]
    return [f"{n}={short_repr(v)}" for n, v, default in shown if not _same(v, default)]


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and short_repr(value) == short_repr(default)
