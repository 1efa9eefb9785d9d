r"""Columns of a table as unconstrained real numbers, and back.

A column with values in an interval (l, h) becomes z = log(x - l), -log(h - x) or their
sum, whichever ends are finite. A column of integers is dequantized first: noise on
[-1/2, 1/2] is added, so that each integer is a cell of width 1 and the density of z
defines a law of integers (Theis et al. 2016, section 3.1); back, cells are rounded. The
noise is uniform where cells are narrow. Where they are wide on the scale of the column
it is the mean of four uniform numbers, which is rarely near the edge of a cell: a
learned density is blurred there, and draws would be rounded to neighboring integers.
All in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpyro.distributions import constraints

from numpyro_score.checks import check_kind

KINDS = (
    "constraints.real, positive, greater_than(l), less_than(h), interval(l, h), "
    "nonnegative_integer, integer_interval(l, h) or boolean"
)
SCALARS = {"_Real": (-np.inf, np.inf), "_Boolean": (0, 1)}  # constraints without ends
CATEGORY = (
    "an unordered category has no density. Replace it by one column of booleans per "
    "level or by integer codes of ordered levels"
)
DATE, TIME = (
    "replace a date by a number of days",
    "replace a time by a number of seconds",
)
NO_NUMBERS = {
    "M": DATE,
    "m": TIME,
    "c": "replace a complex number by two columns",
}  # by kind of the dtype
TEXT = f"read numbers that are text by pandas.to_numeric; of words, {CATEGORY}"
OBJECTS = ((str, TEXT), (date, DATE), (timedelta, TIME))
CELL = 0.5  # half the width of a cell of integers
NUM_UNIFORM = 4  # numbers whose mean is the noise in wide cells, of sd 1 / 48^1/2 = .14
MAX_COARSE_SD = 4.0  # of a column in cells: its peaks are then .036 sd wide or more
# cells between the ends of a support: a uniform law on them has sd 3.5
MAX_COARSE_WIDTH = 12.0
# of the rows that have an atom; lower: rounding passes for one; not tuned
MIN_SHARE = 0.05
MIN_ENDS = 2  # rows with the lowest integer: one alone shows no end
MIN_BEYOND = 5.0  # expected rows beyond an end, of which none is there: by chance e^-5
# equal rows, and times as many as of any other value: rounding gives two; not tuned
MIN_TIES = 5
# values of a column that may be a density beside an atom; fewer are levels; not tuned
MIN_DISTINCT = 10
# of the rows with one value: floats of ten values are integers; not tuned
INTEGER_SHARE = 0.1
Values = Float[np.ndarray, "..."]
# types in columns of objects, by kind of the dtype that they stand for
KINDS_OF_NUMBERS: dict[str, tuple[type, ...]] = {
    "b": (bool, np.bool_),
    "i": (Integral,),
    "f": (Real, Decimal, np.bool_),
}


@dataclass(frozen=True)
class Column:
    """Support of one column of a table.

    Args:
        name: name of the column, for messages.
        low: lower end, not itself a value of real columns; -inf for none.
        high: upper end; inf for none.
        is_integer: whether values are integers from ``low`` to ``high``.
        is_coarse: whether cells of integers are wide on the scale of the column.

    Example:
        >>> age = Column("age", 0, np.inf, is_integer=True)
        >>> z = age.unconstrain(np.array([0.0, 3.0]), noise=np.array([0.0, 0.2]))
        >>> age.constrain(z).tolist()
        [0.0, 3.0]
    """

    name: str
    low: float = -np.inf
    high: float = np.inf
    is_integer: bool = False
    is_coarse: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the interval of real numbers, with the cells of integers."""
        margin = CELL if self.is_integer else 0.0
        return self.low - margin, self.high + margin

    def contains(self, x: Values) -> Bool[np.ndarray, "..."]:
        """Return for each value whether it is finite and inside, not on an end."""
        low, high = self.ends
        inside = (x > low) & (x < high) & np.isfinite(x)
        return inside & (x == np.round(x)) if self.is_integer else inside

    def check(self, x: Values) -> None:
        """Raise unless all values that are not missing lie inside.

        Raises:
            ValueError: for values outside, on an end, infinite, or not integers.
        """
        known = x[~np.isnan(x)]
        inside = self.contains(known)
        if not inside.all():
            kind = "integers" if self.is_integer else "real numbers strictly"
            raise ValueError(
                f"Column '{self.name}' must hold {kind} between {self.low} and "
                f"{self.high}, its support, or missing values. Give another support in "
                f"`supports`: {KINDS}. Got {(~inside).sum()} others, such as "
                f"{known[~inside][:5].tolist()}."
            )

    def unconstrain(self, x: Values, noise: Values | float = 0.0) -> Values:
        """Return z; NaN stays.

        Args:
            x: values inside the support.
            noise: numbers in [-1/2, 1/2], added to integers.
        """
        low, high = self.ends
        x = x + noise if self.is_integer else x
        if np.isinf(low) and np.isinf(high):
            return x
        lower = 0.0 if np.isinf(low) else np.log(x - low)
        upper = 0.0 if np.isinf(high) else np.log(high - x)
        return np.asarray(lower - upper)

    def constrain(self, z: Values) -> Values:
        """Return x in the support, rounded for integers."""
        low, high = self.ends
        if np.isinf(low) and np.isinf(high):
            x = z
        elif np.isinf(high):
            x = low + np.exp(z)
        elif np.isinf(low):
            x = high - np.exp(-z)
        else:
            x = low + (high - low) / (1 + np.exp(-z))
        if not self.is_integer:
            return x
        return np.clip(np.round(x), self.low, self.high) + 0.0  # no -0

    def log_derivative(self, x: Values) -> Values:
        """Return log dz/dx."""
        low, high = self.ends
        if np.isinf(low) and np.isinf(high):
            return np.zeros_like(x)
        lower = 0.0 if np.isinf(low) else 1 / (x - low)
        upper = 0.0 if np.isinf(high) else 1 / (high - x)
        return np.log(lower + upper)


def read_columns(frame: Any, supports: Mapping[str, Any]) -> tuple[Column, ...]:
    """Return the columns of a frame with their supports.

    Columns of floats are real, of booleans 0 and 1, of integers any integers, but none
    beyond a lowest or highest value that many rows have, as codes and counts do, nor
    below 0 for unsigned types.

    Args:
        frame: a frame of pandas.
        supports: constraints of NumPyro by name of the column, instead of these.

    Raises:
        TypeError: for a table of another kind, columns that are no numbers, and
            constraints on more than single numbers.
        ValueError: for repeated names of columns, or supports of unknown ones.

    Example:
        >>> import pandas
        >>> from numpyro.distributions import constraints
        >>> frame = pandas.DataFrame({"a": [0.5, 1.5] * 5, "n": [1, 2, 3, 2, 1] * 2})
        >>> [(c.low, c.high) for c in read_columns(frame, {"a": constraints.positive})]
        [(0.0, inf), (1.0, 3.0)]
    """
    _check_frame(frame)
    what = "a dict of constraints by name of the column"
    check_kind("supports", supports, Mapping, what)
    names = list(frame.columns)
    unknown = [name for name in supports if name not in names]
    if len(set(map(str, names))) < len(names) or unknown or not names:
        raise ValueError(
            "`frame` must have columns of different names, and `supports` name some of "
            f"them. Got columns {names} and supports of {list(supports)}."
        )
    return tuple(_column(frame, name, supports.get(name)) for name in names)


def _check_frame(frame: Any) -> None:
    if not hasattr(frame, "columns") or not hasattr(frame, "index"):
        raise TypeError(
            "`frame` must be a DataFrame of pandas, whose columns have names. "
            f"Got {type(frame).__name__}."
        )


def _column(frame: Any, name: Any, constraint: Any) -> Column:
    """Return one column, by its constraint or by its type."""
    kind, values = _kind_and_values(frame[name], name)
    values = values[~np.isnan(values)]
    if constraint is None:
        codes = kind != "f" or is_integer_valued(values)
        low, high = -np.inf, np.inf
        if kind == "b":
            low, high = 0.0, 1.0
        elif codes:
            low, high = _common_ends(values)
        if kind == "u":  # unsigned
            low = max(low, 0.0)
        return Column(str(name), low, high, codes, codes and _is_coarse(values))
    low, high = _ends_of(name, constraint)
    codes = bool(constraint.is_discrete)
    return Column(str(name), low, high, codes, codes and _is_coarse(values))


def _ends_of(name: Any, constraint: Any) -> tuple[float, float]:
    """Return the ends of the constraint of one column."""
    is_constraint = isinstance(constraint, constraints.Constraint)
    bounds = bounds_of(constraint) if is_constraint else None
    if bounds is None or any(np.ndim(end) for end in bounds):
        raise TypeError(
            f"`supports['{name}']` must be a constraint on single numbers: {KINDS}. "
            f"Got {type(constraint).__name__}."
        )
    if isinstance(constraint, type(constraints.circular)):
        raise TypeError(
            f"`supports['{name}']` must be a constraint on numbers of a line: the ends "
            "of an angle are one point, which would be learned as two far apart. Turn "
            "it so that few rows are near -pi and pi, and give constraints.interval("
            "-pi, pi), or leave it out. Got constraints.circular."
        )
    low, high = bounds
    return float(low), float(high)


def _kind_and_values(series: Any, name: Any) -> tuple[str, Values]:
    """Return the kind of a column's dtype and its values, NaN where missing.

    Objects that are all numbers, such as decimals, or all flags are read as such.
    """
    kind = getattr(series.dtype, "kind", "O")
    if series.dtype == object:
        known = series[~series.isna()]
        fitting = [
            letter
            for letter, types in KINDS_OF_NUMBERS.items()
            if all(isinstance(value, types) for value in known)
        ]
        kind = "f" if known.empty else (*fitting, "O")[0]
    if kind not in "biuf":
        raise _no_numbers(name, series)
    return kind, series.to_numpy(float, na_value=np.nan)


def _no_numbers(name: Any, series: Any) -> TypeError:
    """Return the error of a column that holds no numbers."""
    dtype = series.dtype
    hint, example = NO_NUMBERS.get(getattr(dtype, "kind", "O"), CATEGORY), ""
    if str(dtype).startswith("period"):
        hint = DATE
    types = KINDS_OF_NUMBERS["f"]
    others = [v for v in series[~series.isna()] if not isinstance(v, types)]
    if hint == CATEGORY and others and str(dtype) != "category":
        hints = [words for kind, words in OBJECTS if isinstance(others[0], kind)]
        hint, example = (*hints, CATEGORY)[0], f", such as {others[0]!r:.80}"
    return TypeError(
        f"Column '{name}' must hold numbers: {hint}, or leave it out. Got dtype "
        f"{dtype}{example}."
    )


def _is_coarse(values: Values) -> bool:
    """Return whether cells of width 1 are wide on the scale of known values."""
    return bool(len(values)) and float(values.std()) <= MAX_COARSE_SD


def dequantize(
    rng: np.random.Generator, columns: tuple[Column, ...], num_rows: int
) -> Float[np.ndarray, "rows columns"]:
    """Return the noise within cells that is added to integers.

    Args:
        rng: random generator.
        columns: supports of the numbers of a row.
        num_rows: number of rows.
    """
    noise = rng.uniform(-CELL, CELL, (num_rows, len(columns)))
    is_coarse = np.array([column.is_coarse for column in columns])
    (child,) = rng.spawn(1)  # so that draws of other columns are what they were
    others = child.uniform(-CELL, CELL, (NUM_UNIFORM - 1, *noise.shape))
    narrow = (noise + others.sum(0)) / NUM_UNIFORM
    return np.where(is_coarse, narrow, noise)


def unconstrain_rows(
    rng: np.random.Generator, columns: tuple[Column, ...], x: Values
) -> Values:
    """Return unconstrained rows, integers with noise; not finite on edges of supports.

    Args:
        rng: random generator; dequantizes integers.
        columns: supports of the numbers of a row.
        x: rows.
    """
    return unconstrain_columns(columns, x, dequantize(rng, columns, len(x)))


def unconstrain_columns(
    columns: tuple[Column, ...], x: Values, noise: Values
) -> Values:
    """Return unconstrained rows, integers with given noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [c.unconstrain(x[:, i], noise[:, i]) for i, c in enumerate(columns)]
    return np.stack(parts, axis=1)


def integers_of(columns: tuple[Column, ...], z: Values) -> Values:
    """Return the integers that unconstrained rows stand for, NaN where they are real.

    Example:
        >>> columns = Column("x"), Column("n", is_integer=True)
        >>> integers_of(columns, np.array([[0.2, 1.2]])).tolist()
        [[nan, 1.0]]
    """
    parts = [
        column.constrain(z[..., i]) if column.is_integer else z[..., i] * np.nan
        for i, column in enumerate(columns)
    ]
    return np.stack(parts, axis=-1)


def cell_points(columns: tuple[Column, ...], size: int) -> Values:
    """Return points that fill the cells of coarse columns evenly, 0 in other columns.

    A Latin hypercube (McKay et al. 1979): the mean of a density over them is about that
    over the cells.

    Args:
        columns: supports of the numbers of a row.
        size: number of points.

    Example:
        >>> cell_points((Column("n", is_integer=True, is_coarse=True),), 2).tolist()
        [[-0.25], [0.25]]
    """
    strata = np.tile((np.arange(size)[:, None] + 0.5) / size - CELL, len(columns))
    # fixed: a density is one function
    points = np.random.default_rng(0).permuted(strata, axis=0)
    return np.where([column.is_coarse for column in columns], points, 0.0)


def _common_ends(values: Values) -> tuple[float, float]:
    """Return the lowest and the highest integer, infinite where few rows have it.

    With a share of rows at the highest, none above would hardly be chance; nor where
    counts that fall no faster from there, n_k^2 / n_(k-1), would have some rows above.
    So for the lowest. Zeros and ones are a flag, however rare.
    """
    if not len(values):
        return -np.inf, np.inf
    distinct, counts = np.unique(values, return_counts=True)
    if set(distinct) == {0.0, 1.0}:
        return 0.0, 1.0
    if len(distinct) < 2:
        return -np.inf, np.inf
    least = max(MIN_ENDS, MIN_SHARE * len(values))
    last, before = counts[[0, -1]], counts[[1, -2]]
    beyond = last * np.minimum(last / before, 1)
    is_end = (last >= least) | (beyond >= MIN_BEYOND)
    low, high = np.where(is_end, distinct[[0, -1]], [-np.inf, np.inf])
    return float(low), float(high)


def is_integer_valued(values: Values) -> bool:
    """Return whether floats are all integers, one of them in many rows.

    Example:
        >>> is_integer_valued(np.array([0.0, 1.0, 2.0, 1.0]))
        True
        >>> is_integer_valued(np.arange(100.0)), is_integer_valued(np.array([0.0, 0.5]))
        (False, False)
    """
    if not len(values) or not np.array_equal(values, np.round(values)):
        return False
    counts = np.unique(values, return_counts=True)[1]
    return bool(counts.max() >= max(2, INTEGER_SHARE * len(values)))


def atom_of(values: Values) -> float | None:
    """Return the value of a column of reals that too many rows have; None for none.

    One or two values are atoms if at least a twentieth of the rows and five times as
    many as of any other value have them. Ties of rounded numbers are none.

    Example:
        >>> amounts = np.concatenate([np.zeros(60), np.linspace(1, 2, 40)])
        >>> atom_of(amounts), atom_of(np.round(np.linspace(0, 1, 100), 1))
        (0.0, None)
    """
    distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    if len(distinct) < MIN_DISTINCT:
        return None
    order = np.argsort(-counts)
    least = max(MIN_TIES, MIN_SHARE * counts.sum())
    for more, less in zip(counts[order[:2]], counts[order[1:3]], strict=True):
        if more >= max(least, MIN_TIES * less):
            return float(distinct[order[0]])
    return None


def pandas_column(values: Values, dtype: Any) -> Any:
    """Return values in the type of a column, or as floats where that cannot hold them.

    Example:
        >>> pandas_column(np.array([1.0, 2.0]), np.dtype("int64")).dtype
        dtype('int64')
        >>> pandas_column(np.array([1.0, 2.5]), np.dtype("int64")).dtype
        dtype('float64')
        >>> pandas_column(np.array([1.0, 256.0]), np.dtype("uint8")).dtype
        dtype('float64')
    """
    kind = getattr(dtype, "kind", "f")
    if kind not in "biu" or not _can_hold(kind, dtype.itemsize, values):
        return values
    if isinstance(dtype, np.dtype):
        return values.astype(dtype)
    as_numpy = values.astype(bool if dtype.kind == "b" else np.int64)
    return dtype.construct_array_type()._from_sequence(as_numpy, dtype=dtype)


def _can_hold(kind: str, num_bytes: int, values: Values) -> bool:
    """Return whether a type of integers, or of booleans, has all values."""
    bits = 1 if kind == "b" else 8 * num_bytes
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1))
    if kind != "i":
        low, high = 0.0, 2.0**bits
    inside = (values >= low) & (values < high) & (values == np.round(values))
    return bool(inside.all())


def bounds_of(constraint: Any) -> tuple[Any, Any] | None:
    """Return the ends of a constraint on single numbers, None for any other.

    Example:
        >>> from numpyro.distributions import constraints
        >>> bounds_of(constraints.positive), bounds_of(constraints.simplex)
        ((0.0, inf), None)
    """
    found = type(constraint).__name__
    ends = [getattr(constraint, f"{end}_bound", None) for end in ("lower", "upper")]
    no_ends = all(end is None for end in ends) and found not in SCALARS
    if constraint.event_dim or no_ends:
        return None
    low, high = SCALARS.get(found, (-np.inf, np.inf))
    return low if ends[0] is None else ends[0], high if ends[1] is None else ends[1]


def read_values(
    frame: Any, columns: tuple[Column, ...]
) -> Float[np.ndarray, "rows columns"]:
    """Return the values of a frame in the order of the columns, NaN where missing.

    Raises:
        TypeError: for a table of another kind, or columns that are no numbers.
        ValueError: for other columns, or values outside of their supports.
    """
    _check_frame(frame)
    by_name = {str(name): name for name in frame.columns}
    names = [column.name for column in columns]
    if sorted(by_name) != sorted(names) or len(frame.columns) != len(names):
        raise ValueError(
            "`frame` must have the columns that were learned, in any order. Got "
            f"{list(frame.columns)}, learned {names}."
        )
    rows = np.empty((len(frame), len(columns)))
    for i, column in enumerate(columns):
        rows[:, i] = _as_floats(frame[by_name[column.name]], column.name)
        column.check(rows[:, i])
    return rows


def _as_floats(series: Any, name: str) -> Float[np.ndarray, " rows"]:
    """Return the values of a column, NaN where missing; objects may be numbers."""
    if getattr(series.dtype, "kind", "O") in NO_NUMBERS:
        raise _no_numbers(name, series)
    try:
        return np.asarray(series.to_numpy(float, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise _no_numbers(name, series) from error
