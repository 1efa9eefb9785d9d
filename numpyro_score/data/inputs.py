"""Rows of training data from what users hand in, checked before the cast to float32.

Frames of pandas and datasets of xarray become matrices with one column per number of a
row. Data that float32 cannot resolve are refused; columns without a density are named.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import check_unmasked
from numpyro_score.data.standardize import exact_moments

# Rounding to a grid of spacing h adds noise of sd h / 12^(1/2): with h at most .01 sd
# that is below a third of .01 sd, the lowest noise level of the default processes.
MAX_SPACING = 0.01
# at 50 rows a column of five values is discrete; not tuned
MIN_ROWS, MAX_DISTINCT = 50, 0.1
CHAIN_DIMS = ("chain", "draw")  # of ArviZ
POSTERIOR = "posterior"  # group of ArviZ


def is_table(data: Any) -> bool:
    """Return whether data are a frame, or a dataset or tree of xarray.

    Example:
        >>> is_table(np.zeros((3, 2)))
        False
    """
    return hasattr(data, "columns") or hasattr(data, "data_vars")


def read_rows(name: str, data: Any) -> np.ndarray:
    """Return data as an array of real numbers in their own type, one datum per row.

    Args:
        name: name of the data in error messages.
        data: an array, also one in a file (``np.memmap``); a frame; or a dataset of
            xarray, or a tree with the group ``posterior``, whose variables share their
            dimensions ``chain`` and ``draw``, or the first one.

    Raises:
        ValueError: for masked values, columns that are no numbers, variables without a
            common dimension, and anything that is no array.

    Example:
        >>> import pandas
        >>> read_rows("data", pandas.DataFrame({"a": [1, 2], "b": [0.5, None]}))
        array([[1. , 0.5],
               [2. , nan]])
    """
    check_unmasked(name, data)
    if hasattr(data, "data_vars"):
        rows = np.concatenate(list(_variables(name, data).values()), axis=1)
    elif hasattr(data, "columns"):
        rows = _frame(name, data)
    else:
        rows = np.asarray(data)
    if rows.ndim < 1 or len(rows) == 0 or not is_real_dtype(rows.dtype):
        raise ValueError(
            f"`{name}` must be an array of real numbers with one row per sample. "
            f"Got shape {rows.shape}, dtype {rows.dtype}."
        )
    return rows


def column_names(data: Any, rows: np.ndarray) -> list[str]:
    """Return a name for each number of a row: those of a table, otherwise positions.

    Args:
        data: what the user handed in.
        rows: what :func:`read_rows` made of it.

    Example:
        >>> column_names(np.zeros((2, 3)), np.zeros((2, 3)))
        ['0', '1', '2']
    """
    if hasattr(data, "data_vars"):
        sizes = {k: v.shape[1] for k, v in _variables("data", data).items()}
        return [
            name if size == 1 else f"{name}[{i}]"
            for name, size in sizes.items()
            for i in range(size)
        ]
    if hasattr(data, "columns"):
        return [str(column) for column in data.columns]
    positions = np.ndindex(rows.shape[1:])
    return [",".join(map(str, position)) or "0" for position in positions]


def check_resolution(name: str, rows: np.ndarray, names: list[str]) -> None:
    """Raise unless floating-point numbers resolve every column in its own scale.

    Args:
        name: name of the data in error messages.
        rows: data in their own type.
        names: names of the columns.

    Raises:
        ValueError: for columns whose offset is so large that rounding would leave few
            distinct values.

    Example:
        >>> check_resolution("data", np.array([[1.0], [2.0]]), ["0"])
    """
    dtype = jnp.result_type(float)
    flat = np.asarray(rows).reshape(len(rows), -1)
    lowest, highest = flat.min(0).astype(np.float64), flat.max(0).astype(np.float64)
    sd = exact_moments(flat)[1]
    if rows.ndim > 2:  # numbers of an image share one scale
        sd = np.full_like(sd, sd.max())
    largest = np.maximum(np.abs(lowest), np.abs(highest))
    spacing = largest * float(np.finfo(dtype).eps)
    lost = (highest > lowest) & (spacing > MAX_SPACING * sd)
    if lost.any():
        worst = int(np.flatnonzero(lost)[0])
        middle = lowest[worst] / 2 + highest[worst] / 2
        raise ValueError(
            f"`{name}` must be resolved by {jnp.dtype(dtype).name}, the type of scores "
            "and draws: these columns are narrow and far from zero, so that rounding "
            "would leave few distinct values. Subtract an offset in float64 and add it "
            "to the draws in float64. Columns "
            f"{[names[i] for i in np.flatnonzero(lost)[:10]]}: column "
            f"{names[worst]!r} is near {middle:.10g} with sd {sd[worst]:.3g}, and "
            f"neighboring numbers are {spacing[worst]:.3g} apart."
        )


@contextmanager
def without_density_warnings() -> Iterator[None]:
    """Leave out warnings of training data's columns, which it calls by their numbers.

    For columns that :func:`warn_without_density` was told the names of before.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`data` has (discrete columns|columns that)")
        yield


def warn_without_density(
    rows: np.ndarray, names: Sequence[str], name: str = "data"
) -> None:
    """Warn of discrete columns and of columns that repeat another, by name.

    Images are not looked at: their gray levels are discrete by custom.

    Args:
        rows: data in their own type; NaN are left out.
        names: names of the columns.
        name: of the argument.
    """
    flat = np.asarray(rows).reshape(len(rows), -1)
    if rows.ndim > 2 or len(rows) < MIN_ROWS:
        return
    known = [column[~np.isnan(column)] for column in flat.T]
    discrete = [
        label
        for label, column in zip(names, known, strict=True)
        if len(column) >= MIN_ROWS
        and 1 < len(np.unique(column)) <= MAX_DISTINCT * len(column)
    ]
    if discrete:
        warn_caller(
            f"`{name}` has discrete columns, which have no density: the learned law is "
            "narrow peaks at their values. Add uniform noise of the width of their "
            "steps (dequantize), or leave them out and keep them discrete in the model."
            f" Discrete columns: {discrete[:10]}."
        )
    repeated = _repeated(flat, names)
    if repeated:
        warn_caller(
            f"`{name}` has columns that are equal, so that the law lies in a plane: it "
            "has no density. Leave one of each pair out, to compute it in the model. "
            f"Equal columns: {repeated[:10]}."
        )


def _repeated(flat: np.ndarray, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of names of columns that are equal."""
    first: dict[bytes, str] = {}
    pairs = []
    for label, column in zip(names, flat.T, strict=True):
        key = np.ascontiguousarray(column).tobytes()
        if key in first:
            pairs.append((first[key], label))
        first.setdefault(key, label)
    return pairs


def _frame(name: str, frame: Any) -> np.ndarray:
    """Return the columns of a frame as a matrix in which what is missing is NaN."""
    types = {str(column): frame[column].dtype for column in frame.columns}
    bad = {c: str(t) for c, t in types.items() if getattr(t, "kind", "f") not in "biuf"}
    if bad:
        raise ValueError(
            f"`{name}` must have columns of real numbers: drop or encode the others. "
            f"Got columns of other types {bad}."
        )
    if all(hasattr(t, "kind") for t in types.values()):  # pandas, also nullable types
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.asarray(frame.to_numpy(), np.float64)


def _variables(name: str, data: Any) -> dict[str, np.ndarray]:
    """Return the variables of a dataset as matrices with one row per draw."""
    if not data.data_vars and POSTERIOR in getattr(data, "children", ()):
        data = data[POSTERIOR]
    if not data.data_vars:
        raise ValueError(
            f"`{name}` must have variables, or a group `{POSTERIOR}` with variables. "
            f"Got groups {list(getattr(data, 'children', ()))}."
        )
    variables = dict(data.data_vars)
    dims = [v.dims for v in variables.values()]
    is_chain = all(d[:2] == CHAIN_DIMS for d in dims)
    lead = CHAIN_DIMS if is_chain else dims[0][:1]
    if not lead or any(d[: len(lead)] != lead for d in dims):
        raise ValueError(
            f"`{name}` must have variables that share the dimensions of their draws, "
            f"{CHAIN_DIMS} or the first one: a row is one draw of all of them. Got "
            f"{ {k: v.dims for k, v in variables.items()} }."
        )
    num_rows = int(np.prod([data.sizes[dim] for dim in lead]))
    return {str(k): np.asarray(v).reshape(num_rows, -1) for k, v in variables.items()}


def is_real_dtype(dtype: Any) -> bool:
    """Return whether a dtype is of real numbers, integers or truth values.

    Example:
        >>> is_real_dtype(bool), is_real_dtype(complex), is_real_dtype(object)
        (True, False, False)
    """
    kinds = jnp.floating, jnp.integer, jnp.bool_
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def is_number_dtype(dtype: Any) -> bool:
    """Return whether a dtype is of numbers, also complex ones, or truth values.

    Example:
        >>> is_number_dtype(bool), is_number_dtype(complex), is_number_dtype(object)
        (True, True, False)
    """
    return is_real_dtype(dtype) or jnp.issubdtype(dtype, jnp.complexfloating)
