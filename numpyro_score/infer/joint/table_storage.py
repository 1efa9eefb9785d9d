"""Learned tables in a folder: the score, and beside it the columns and their ends.

As for learned priors (:mod:`numpyro_score.io.prior`): no code is saved or run.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numpyro_score.data.columns import Column
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from numpyro_score.infer.joint.storage import read_verdict
from numpyro_score.io.prior import read_parts
from numpyro_score.io.schema import HeaderCheck

TABLE = "learned table"  # kind in the header
ENTRIES = ("format", "versions", "kind", "columns", "verdict")
ARRAYS = ("loc", "scale", "low", "high")
COLUMN = ("name", "low", "high", "is_integer", "is_coarse")


class TableParts(NamedTuple):
    """Parts of a learned table besides its score."""

    columns: tuple[Column, ...]
    arrays: dict[str, np.ndarray]
    verdict: FitVerdict | None


def describe_table(parts: TableParts) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and header of a learned table but its score."""
    columns = [
        {
            "name": column.name,
            "low": column.low if math.isfinite(column.low) else None,
            "high": column.high if math.isfinite(column.high) else None,
            "is_integer": column.is_integer,
            "is_coarse": column.is_coarse,
        }
        for column in parts.columns
    ]
    verdict = None if parts.verdict is None else parts.verdict.to_config()
    return parts.arrays, {"kind": TABLE, "columns": columns, "verdict": verdict}


def read_table(path: Path) -> TableParts:
    """Return what was saved of a learned table but its score.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered, or is not that of a learned table.
    """
    arrays, header, check = read_parts(path, TABLE, ENTRIES)
    columns = _read_columns(check, header["columns"])
    shapes = {name: array.shape for name, array in sorted(arrays.items())}
    if shapes != dict.fromkeys(sorted(ARRAYS), (len(columns),)):
        check.refuse("columns", "one column for each number of the arrays", shapes)
    if not (arrays["scale"] > 0).all():
        check.refuse("columns", "columns of a positive scale", arrays["scale"])
    if not (arrays["low"] <= arrays["high"]).all():
        ends = arrays["low"], arrays["high"]
        check.refuse("columns", "columns whose lowest value is below the highest", ends)
    return TableParts(columns, arrays, read_verdict(check, header["verdict"]))


def _read_columns(check: HeaderCheck, columns: Any) -> tuple[Column, ...]:
    """Return the columns that a header describes, after checking its entries."""
    if not isinstance(columns, list) or not columns:
        check.refuse("columns", "a list of columns", columns)
    for i, column in enumerate(columns):
        entry = f"columns[{i}]"
        check.keys(entry, column, dict.fromkeys(COLUMN, True))
        check.text(f"{entry}.name", column["name"])
        check.flag(f"{entry}.is_integer", column["is_integer"])
        check.flag(f"{entry}.is_coarse", column["is_coarse"])
        for end in ("low", "high"):
            if column[end] is not None:
                check.number(f"{entry}.{end}", column[end])
        low, high = _ends(column)
        if not low < high:
            check.refuse(entry, "a column whose low end is below its high end", column)
    if len({column["name"] for column in columns}) < len(columns):
        check.refuse("columns", "columns of different names", columns)
    return tuple(
        Column(c["name"], *_ends(c), c["is_integer"], c["is_coarse"]) for c in columns
    )


def _ends(column: dict[str, Any]) -> tuple[float, float]:
    """Return the ends of a column, infinite where the header has null."""
    low, high = column["low"], column["high"]
    return -math.inf if low is None else low, math.inf if high is None else high
