"""Identity of a run: its settings as JSON, its programs as digests.

A program is told from others by its jaxpr: primitives, shapes, parameters and the
values of all constants. Names of variables and addresses in memory have no part in it,
so that two processes agree.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]

from numpyro_score.checkpoint import key_data

ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")  # differs between processes
IGNORED = ("name", "ctx_mesh")  # parameters of jit that do not change what it computes


def describe(value: Any) -> Any:
    """Return settings as JSON: numbers as they are, arrays by digest, code by name.

    Args:
        value: numbers, strings, arrays, functions, dataclasses, NumPyro's constraints,
            and containers of them.

    Example:
        >>> describe({"steps": 3, "metric": np.ones(2), "strategy": len})
        {'steps': 3, 'metric': 'float64(2,) 5f07eef034c5', 'strategy': 'builtins.len'}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _describe_array(value)
    if isinstance(value, Mapping):
        return {str(k): describe(value[k]) for k in value}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    return _describe_object(value)


def digest(value: Any) -> str:
    """Return a digest of a tree: its structure, and its leaves bit for bit.

    Example:
        >>> digest({"a": np.ones(2)}) == digest({"a": np.ones(2, "float32")})
        False
    """
    leaves, structure = jax.tree.flatten(value)
    parts = [_without_addresses(structure), *map(describe, leaves)]
    return _hash("\n".join(map(str, parts)))


def digest_program(fn: Callable, *args: Any) -> str:
    """Return a digest of what a function computes at arguments of these shapes.

    Args:
        fn: a function that JAX can trace.
        args: its arguments, or their shapes; their values do not count.

    Example:
        >>> digest_program(lambda x: x + 1, 0.0) == digest_program(lambda x: 1 + x, 0.0)
        False
    """
    return _digest_jaxpr(jax.make_jaxpr(fn)(*args))


def _digest_jaxpr(jaxpr: ClosedJaxpr | Jaxpr) -> str:
    """Return a digest of a program: what it computes, with its constants' values."""
    consts, inner = [], jaxpr
    if isinstance(jaxpr, ClosedJaxpr):
        consts, inner = [describe(c) for c in jaxpr.consts], jaxpr.jaxpr
    places: dict[Any, int] = {}

    def place(var: Any) -> str:
        if isinstance(var, Literal):
            return f"{describe(var.val)}:{var.aval}"
        return f"{places.setdefault(var, len(places))}:{var.aval}"

    lines = [*consts, *map(place, (*inner.constvars, *inner.invars))]
    for eqn in inner.eqns:
        names = [*map(place, eqn.invars), "->", *map(place, eqn.outvars)]
        lines.append(f"{eqn.primitive} {names} {_describe_params(eqn.params)}")
    return _hash("\n".join(map(str, [*lines, *map(place, inner.outvars)])))


def _describe_params(params: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (k, _describe_param(v)) for k, v in sorted(params.items()) if k not in IGNORED
    ]


def _describe_param(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _digest_jaxpr(value)
    if isinstance(value, list | tuple):
        return [_describe_param(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_without_addresses, value))
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return describe(value)
    value = getattr(value, "callback_func", value)  # what jax.pure_callback calls
    if hasattr(value, "__code__"):
        return _describe_code(value)
    return _without_addresses(value)


def _describe_code(fn: Any) -> Any:
    """Return a function's name, byte code, constants and closed-over numbers."""
    code, cells = fn.__code__, fn.__closure__ or ()
    closed = [describe(cell.cell_contents) for cell in cells]
    return _name(fn), code.co_code.hex(), _without_addresses(code.co_consts), closed


def _describe_array(value: Any) -> str:
    bare = np.asarray(key_data(value))
    content = hashlib.sha256(np.ascontiguousarray(bare).tobytes()).hexdigest()
    return f"{value.dtype}{value.shape} {content[:12]}"


def _describe_object(value: Any) -> Any:
    """Return the description of what is no number, array or container."""
    if isinstance(value, functools.partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": _name(type(value)), "fields": describe(fields)}
    if callable(getattr(value, "tree_flatten", None)):
        parts, _ = value.tree_flatten()
        return {"class": _name(type(value)), "parts": describe(list(parts))}
    named = hasattr(value, "__qualname__")
    return _name(value) if named else _name(type(value))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _without_addresses(value: Any) -> str:
    return ADDRESS.sub("", str(value))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
