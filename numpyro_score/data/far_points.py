"""Rows that stand for data, and points that lie far from all of them, or between."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from numpyro_score.data.rows import evenly_spaced

# rows that are kept; of the 99.9 % quantile of their law two are beyond; 512 KiB
MAX_ROWS, MAX_NUMBERS = 2048, 2**17
MIN_KEPT_ROWS = 32  # of fewer nothing is told; not tuned

# of the farthest of 2048 rows; with exponential tails a new row has probability
# 2048^-1.5 = 1e-5 of being beyond
MAX_DISTANCE = 1.5
EIGENVALUE_FLOOR = 1e-6  # of the largest; float32 resolves 1e-7
# for each number: of fewer, the farthest is nearer than a new one; not tuned
MIN_ROWS = 10
GAP_BLOCK = 64  # rows compared with all others at a time; not tuned
ROUNDING = 1e-14  # of squared distances from products in float64

Point = Float[np.ndarray, " numbers"]
Points = Float[np.ndarray, "rows numbers"]


def choose_rows(u: Float[Array, "rows *event"]) -> Float[Array, "chosen *event"] | None:
    """Return at most 2,048 rows, evenly spaced, or None for too few.

    Args:
        u: standardized data.

    Example:
        >>> import jax.numpy as jnp
        >>> choose_rows(jnp.zeros((5000, 3))).shape
        (2048, 3)
    """
    most = min(MAX_ROWS, MAX_NUMBERS // max(1, u[:1].size), len(u))
    if most < MIN_KEPT_ROWS:
        return None
    return u[evenly_spaced(len(u), most)]


class Remoteness(NamedTuple):
    """Distances of a point and of rows, in whitened coordinates.

    - **from_mean**: Mahalanobis distance of the point from the mean of the rows; for
      fewer than ten rows per number, the largest distance of a number by itself.
    - **farthest**: the same of the farthest row.
    - **to_row**: distance of the point to the nearest row.
    - **loneliest**: the largest distance of a row to the nearest other one, or one that
      shows the point to be near.
    - **num_rows**: number of rows.
    """

    from_mean: float
    farthest: float
    to_row: float
    loneliest: float
    num_rows: int

    @property
    def words(self) -> str:
        """The points that are far, in words with numbers; empty if none is.

        A point of the rows' law has the largest of either distance with probability
        1 / (n + 1). What exceeds it by half is far. Beyond the farthest row, where rows
        are sparse, the distance from the mean alone decides.
        """
        if self.from_mean > MAX_DISTANCE * self.farthest:
            return (
                f"a distance of {self.from_mean:.3g} sd from their mean; the farthest "
                f"of {self.num_rows} rows has {self.farthest:.3g}"
            )
        is_between = self.from_mean <= self.farthest
        if is_between and self.to_row > MAX_DISTANCE * self.loneliest:
            return (
                f"a distance of {self.to_row:.3g} sd to the nearest of "
                f"{self.num_rows} rows; no two neighbors are more than "
                f"{self.loneliest:.3g} apart"
            )
        return ""


def remoteness(point: Point, rows: Points) -> Remoteness:
    """Return how far a point is from the mean of rows, and from the nearest row.

    The second sees points in a hole of the data, such as the center of a ring.

    Args:
        point: numbers on about the unit scale.
        rows: data, two at least.

    Example:
        >>> angles = np.linspace(0.0, 6.28, 100)
        >>> ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        >>> remoteness(np.array([0.0, 0.0]), ring).words[:46]
        'a distance of 1.4 sd to the nearest of 100 row'
        >>> remoteness(np.array([0.0, 1.0]), ring).words
        ''
    """
    mean = rows.mean(0)
    centered = np.concatenate([point[None], rows]) - mean
    if len(rows) < MIN_ROWS * rows.shape[1]:
        values, order = rows.var(0), np.inf
    else:
        covariance = np.atleast_2d(np.cov(rows, rowvar=False))
        values, vectors = np.linalg.eigh(covariance)
        centered, order = centered @ vectors, 2
    scale = np.sqrt(np.maximum(values, EIGENVALUE_FLOOR * values.max()))
    white = centered / np.where(scale > 0, scale, 1.0)
    of_point, *of_rows = np.linalg.norm(white, ord=order, axis=-1)
    to_row = np.linalg.norm(white[1:] - white[0], axis=-1).min()
    farthest_first = white[1:][np.argsort(of_rows)[::-1]]
    loneliest = largest_gap(farthest_first, enough=to_row / MAX_DISTANCE)
    return Remoteness(
        float(of_point), float(max(of_rows)), float(to_row), loneliest, len(rows)
    )


def largest_gap(rows: Points, enough: float = np.inf) -> float:
    """Return the largest distance of a row to the nearest other, or one that is enough.

    Equal rows, as of counts or of repeated data, are one. Lonely rows that come first
    save the time of all others.

    Args:
        rows: points.
        enough: a distance beyond which no larger one is sought.

    Example:
        >>> largest_gap(np.array([[5.0], [0.0], [0.0], [1.0]]))
        4.0
    """
    norms, largest = np.square(rows).sum(1), 0.0
    for start in range(0, len(rows), GAP_BLOCK):
        block = slice(start, start + GAP_BLOCK)
        square = norms[block, None] - 2 * rows[block] @ rows.T + norms
        square[square <= ROUNDING * norms.max()] = np.inf  # itself and its equals
        nearest = square.min(1)
        largest = max(largest, np.sqrt(nearest[np.isfinite(nearest)].max(initial=0.0)))
        if largest >= enough:
            break
    return float(largest)
