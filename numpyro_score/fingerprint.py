"""Identity of a run: its settings as JSON, its programs as digests.

A program is told from others by its jaxpr: primitives, shapes, parameters, the values
of all constants, and the names in the trees that go in and come out. A function that is
not traced is told by its byte code, its defaults and what it closes over. Names of
variables, lines of files and addresses in memory have no part in it, so that two
processes agree.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]
from jaxtyping import Array, UInt32

from numpyro_score.checkpoint import key_data
from numpyro_score.typing import PRNGKey

ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")  # differs between processes
PRIME = np.uint32(2654435761)  # near 2^32 over the golden ratio (Knuth 1973, 6.4)
IGNORED = ("name", "ctx_mesh")  # parameters of jit that do not change what it computes


def describe(value: Any) -> Any:
    """Return settings as JSON: numbers as they are, arrays and functions by digest.

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


def checksum(tree: Any) -> UInt32[Array, ""]:
    """Return a number of the bits of all numbers in a tree, also where it is traced.

    It tells the data of two runs apart inside a program; other leaves do not count.

    Example:
        >>> int(checksum(1.0)) == int(checksum(2.0))
        False
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_numeric(leaf)]
    total = jnp.zeros((), jnp.uint32)
    with jax.ensure_compile_time_eval():  # known data are no part of the program
        for leaf in leaves:
            total = total * PRIME + _sum_of_bits(jnp.asarray(leaf)) + 1
    return total


def _is_numeric(leaf: Any) -> bool:
    if isinstance(leaf, bool | int | float | complex):
        return True
    dtype = getattr(leaf, "dtype", None)
    kinds = jnp.number, jnp.bool_
    return dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _sum_of_bits(x: Array) -> UInt32[Array, ""]:
    """Return the sum of the words of an array, each times a number of its place."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    elif jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    words = x.ravel().astype(jnp.uint32)
    place = jnp.arange(words.size, dtype=jnp.uint32) * PRIME
    return (words * (2 * (place ^ place >> 15) + 1)).sum(dtype=jnp.uint32)


def digest_program(fn: Callable, *args: Any) -> str:
    """Return a digest of what a function computes at arguments of these shapes.

    Names in the trees of arguments and results count: they say which number is whose.

    Args:
        fn: a function that JAX can trace.
        args: its arguments, or their shapes; their values do not count.

    Example:
        >>> digest_program(lambda x: x + 1, 0.0) == digest_program(lambda x: 1 + x, 0.0)
        False
    """
    trees = [jax.tree.structure(args)]

    def keep_tree(*args: Any) -> Any:
        result = fn(*args)
        trees.append(jax.tree.structure(result))
        return result

    jaxpr = jax.make_jaxpr(keep_tree)(*args)
    return _hash("\n".join([_digest_jaxpr(jaxpr), *map(_without_addresses, trees)]))


def digest_host_values(fn: Callable, *args: Any) -> str | None:
    """Return a digest of a function's values if some come from the host, else None.

    No program shows what a callback computes, such as a net of another library. The
    values count to three digits: hosts differ in the last ones.

    Args:
        fn: a function that JAX can trace.
        args: its arguments.

    Example:
        >>> digest_host_values(lambda x: x + 1, 0.0) is None
        True
    """
    if "pure_callback" not in str(jax.make_jaxpr(fn)(*args)):
        return None
    values = [np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(fn)(*args))]
    return _hash(" ".join(f"{value:.2e}" for value in np.concatenate(values)))


def describe_key(key: PRNGKey) -> dict[str, Any]:
    """Return the numbers of a key, and the generator that they are for.

    Example:
        >>> describe_key(jax.random.key(3))
        {'numbers': [0, 3], 'generator': 'threefry2x32'}
    """
    generator = str(jax.random.key_impl(key))
    return {"numbers": np.asarray(key_data(key)).tolist(), "generator": generator}


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
    if isinstance(value, FunctionType | MethodType):
        return _describe_function(value)
    return _without_addresses(value)


def _describe_function(fn: Any, outer: tuple = ()) -> Any:
    """Return a function's name, and a digest of its code and of what it is bound to.

    Args:
        fn: a function or a method.
        outer: functions that it is defined in or closed over by, for those that call
            themselves.
    """
    bare = getattr(fn, "__func__", fn)
    if bare in outer:
        return _name(bare)
    cells = [cell.cell_contents for cell in bare.__closure__ or () if _is_filled(cell)]
    bound = [
        _describe_function(value, (*outer, bare))
        if isinstance(value, FunctionType | MethodType)
        else describe(value)
        for value in (*cells, bare.__defaults__, bare.__kwdefaults__)
    ]
    bound.append(describe(getattr(fn, "__self__", None)))
    return f"{_name(bare)} {_hash(str([_describe_code(bare.__code__), bound]))[:12]}"


def _describe_code(code: CodeType) -> Any:
    """Return the byte code, names and constants of a function and of those inside."""
    constants = [
        _describe_code(c) if isinstance(c, CodeType) else _describe_param(c)
        for c in code.co_consts
    ]
    return code.co_code.hex(), code.co_names, constants


def _is_filled(cell: Any) -> bool:
    """Return whether a cell of a closure has a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


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
    if isinstance(value, FunctionType | MethodType):
        return _describe_function(value)
    named = hasattr(value, "__qualname__")
    return _name(value) if named else _name(type(value))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _without_addresses(value: Any) -> str:
    return ADDRESS.sub("", str(value))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
