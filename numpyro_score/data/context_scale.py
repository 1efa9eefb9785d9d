r"""Map of contexts with heavy tails or strong skew to the unit scale.

A context number of heavy tails, such as a count of log-normal rate, has a standard
deviation that a few rows determine: on that scale all others are equal. The map

.. math:: u = (v - loc) / scale, \qquad v = \operatorname{asinh}((x - center) / width)

is linear within ``width`` of ``center`` and logarithmic beyond (inverse hyperbolic sine
transformation, Burbidge et al. 1988). Center and width are those of a grid for which v
is closest to normal, by the correlation of its order statistics with those of a normal
law (Filliben 1975). Numbers that are nearly normal, or have lighter tails than a normal
law, stay as they are: v = x.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

from numpyro_score.data.far_points import Remoteness, choose_rows, remoteness
from numpyro_score.data.standardize import Affine, widths
from numpyro_score.typing import Position

MAX_ROWS = 5000  # for the choice of center and width: error of r^2 below 0.05
# r^2 with normal order statistics below which a map is sought; for many rows 0.95 of a
# uniform law, 0.81 of an exponential one, 0.58 of a log-normal one of sd 1
MIN_NORMALITY = 0.75
NORMAL_KURTOSIS = 3.0  # laws of several modes have less, and no heavy tails
# quantiles of |x - center|, a coarse grid; finer: slower; not tuned
WIDTH_LEVELS = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75)
NUM_EXTREMES = 20  # order statistics of a tail: mean excess within 1 / 20^1/2 = 22 %
# of a row beyond `low` or `high`; higher: more false alarms; not tuned
FAR_PROBABILITY = 1e-4
ROUNDING = 1e-5  # of a value; about 100 units of float32

Column = Float[np.ndarray, " rows"]
Columns = Float[np.ndarray, "rows numbers"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextScale:
    """Map to the unit scale, and the range of the rows that it was made for.

    Args:
        loc: mean of v, of the shape of the context.
        scale: sd of v; 1 where it is 0.
        center: center of asinh, in units of the context.
        width: width of asinh, in units of the context; 0 for v = x.
        low: value below which rows are not expected, in units of the context.
        high: value above which rows are not expected, in units of the context.
        rows: at most 2,048 of the rows on the unit scale; None where they are unknown.

    Example:
        >>> counts = jnp.exp(3 * jax.random.normal(jax.random.key(0), (1000, 2)))
        >>> u = ContextScale.fit(counts).forward(counts)
        >>> bool(jnp.abs(u).max() < 6)
        True
    """

    loc: Float[Array, "*event"]
    scale: Float[Array, "*event"]
    center: Float[Array, "*event"]
    width: Float[Array, "*event"]
    low: Float[Array, "*event"]
    high: Float[Array, "*event"]
    rows: Float[Array, "rows *event"] | None = None

    @classmethod
    def fit(cls, rows: Float[Array, "rows *event"]) -> "ContextScale":
        """Return the map for rows of contexts."""
        shape = rows.shape[1:]
        columns = np.asarray(rows, np.float64).reshape(len(rows), -1)
        choices = [_center_and_width(column) for column in columns[:MAX_ROWS].T]
        center, width = np.reshape(choices, (-1, 2)).T
        affine = Affine.context(jnp.asarray(_to_v(columns, center, width), rows.dtype))
        low, high = _expected_range(columns, center, width)
        parts = (affine.loc, affine.scale, center, width, low, high)
        scale = cls(*(jnp.asarray(part, rows.dtype).reshape(shape) for part in parts))
        chosen = choose_rows(rows)
        if chosen is None:
            return scale
        return replace(scale, rows=jax.vmap(scale.forward)(chosen))

    def forward(self, x: Position) -> Position:
        """Return u."""
        curved = self.width > 0
        bent = jnp.arcsinh((x - self.center) / jnp.where(curved, self.width, 1.0))
        return (jnp.where(curved, bent, x) - self.loc) / self.scale

    def inverse(self, u: Position) -> Position:
        """Return x with u = forward(x)."""
        v = self.loc + self.scale * u
        curved = self.width > 0
        bent = self.center + self.width * jnp.sinh(jnp.where(curved, v, 0.0))
        return jnp.where(curved, bent, v)

    def is_far(self, x: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Return for each number whether it is outside of the range of the rows."""
        slack = ROUNDING * jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))
        return (x < self.low - slack) | (x > self.high + slack)

    def remoteness(self, x: Float[Array, "*event"]) -> Remoteness | None:
        """Return how far one context is from the rows; None where they are unknown."""
        if self.rows is None:
            return None
        u = np.asarray(self.forward(x), np.float64)
        rows = np.asarray(self.rows, np.float64)
        return remoteness(u.ravel(), rows.reshape(len(rows), -1))

    def check(self, name: str) -> None:
        """Raise unless float32 holds the unit scale; see :meth:`Affine.check`."""
        Affine(self.loc, self.scale).check(name)


ContextMap = Affine | ContextScale


def _center_and_width(column: Column) -> tuple[float, float]:
    """Return the center and the width of one number's map; width 0 for v = x."""
    if widths(column) == 0:
        return 0.0, 0.0
    scores = _normal_scores(column)
    is_normal = _squared_correlation(column, scores) >= MIN_NORMALITY
    if is_normal or _kurtosis(column) <= NORMAL_KURTOSIS:
        return 0.0, 0.0
    best, choice = 0.0, (0.0, 0.0)
    for center in (np.median(column), column.min(), column.max()):
        distance = np.abs(column - center)
        for width in np.quantile(distance[distance > 0], WIDTH_LEVELS):
            v = np.arcsinh((column - center) / width)
            found = _squared_correlation(v, scores)
            if found > best:
                best, choice = found, (float(center), float(width))
    return choice


def _normal_scores(column: Column) -> Column:
    """Return expected normal order statistics of the ranks, those of ties averaged."""
    _, place, count = np.unique(column, return_inverse=True, return_counts=True)
    # Blom 1958: E[order statistic i] is about ndtri((i - 3/8) / (n + 1/4))
    levels = (np.arange(len(column)) + 0.625) / (len(column) + 0.25)
    scores = np.asarray(ndtri(levels), np.float64)
    ends = np.cumsum(count)
    sums = np.diff(np.concatenate([[0.0], np.cumsum(scores)])[[0, *ends]])
    return (sums / count)[place]


def _squared_correlation(first: Column, second: Column) -> float:
    a, b = (part - part.mean() for part in (first, second))
    a = a / np.abs(a).max()  # squares of large numbers overflow
    return float((a @ b) ** 2 / ((a @ a) * (b @ b)))


def _kurtosis(column: Column) -> float:
    """Return the fourth central moment in units of the squared variance."""
    a = column - column.mean()
    a = a / np.abs(a).max()  # powers of large numbers overflow
    return float((a**4).mean() / (a**2).mean() ** 2)


def _to_v(
    columns: Columns,
    center: Float[np.ndarray, " numbers"],
    width: Float[np.ndarray, " numbers"],
) -> Columns:
    curved = width > 0
    bent = np.arcsinh((columns - center) / np.where(curved, width, 1.0))
    return np.where(curved, bent, columns)


def _expected_range(
    columns: Columns,
    center: Float[np.ndarray, " numbers"],
    width: Float[np.ndarray, " numbers"],
) -> tuple[Float[np.ndarray, " numbers"], Float[np.ndarray, " numbers"]]:
    """Return values beyond which a new row is not expected in any number.

    Beyond the largest of n values of v the tail is taken as exponential with the mean
    excess e of the k largest: the predictive probability of a value that exceeds the
    largest by m is (1 + m / (k e))^-k / n.
    """
    v = np.sort(_to_v(columns, center, width), axis=0)
    rows, numbers = v.shape
    k = min(NUM_EXTREMES, rows // 10)
    share = min(1.0, FAR_PROBABILITY * rows / (2 * numbers))
    factor = 0.0 if k < 1 else k * (share ** (-1 / k) - 1)
    k = max(k, 1)
    low = v[0] - factor * (v[k] - v[:k]).mean(0)
    high = v[-1] + factor * (v[-k:] - v[-k - 1]).mean(0)
    largest, curved = float(np.finfo(np.float32).max), width > 0
    ends = np.stack([low, high])
    with np.errstate(over="ignore"):
        outside = center + width * np.sinh(np.where(curved, ends, 0.0))
    low, high = np.clip(np.where(curved, outside, ends), -largest, largest)
    return low, high
