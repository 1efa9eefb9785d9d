r"""Noise levels from data: techniques 1 and 2 of Song and Ermon 2020.

The highest level is the largest distance between two data, so that noise connects all
of them; the ratio of neighboring levels lets the shells on which their noise lies
overlap, which in D dimensions needs levels the closer the higher D.
"""

from math import ceil, erf, log, sqrt

import numpy as np
from jaxtyping import Array, Real

from numpyro_score.checks import check_positive, check_rows_finite

# that a draw of one level lies on the shell of the next: Song and Ermon 2020
OVERLAP = 0.5
# below 18 dimensions the rule gives more; lower: more levels; not tuned
MAX_RATIO = 2.0
CHUNK = 1000  # rows at a time, with their distances to all others: 8 kB for each row


def levels_from_data(data: Real[Array, "n *event"], lowest: float) -> tuple[float, ...]:
    """Return decreasing noise levels for ``AnnealedLangevin(levels=...)``.

    In units of the data's sd, by which every coordinate is divided. The number of
    levels follows: it grows with the square root of the dimension, and is more than
    ``AnnealedLangevin`` takes by default, which adapts its steps.

    Args:
        data: one datum per row, of any event shape.
        lowest: the lowest level, in units of the data's sd.

    Returns:
        The levels, from the largest distance between two data to ``lowest``.

    Raises:
        ValueError: unless ``lowest`` is positive and below the largest distance.

    Example:
        >>> import jax
        >>> data = jax.random.normal(jax.random.key(0), (100, 2))
        >>> levels = levels_from_data(data, 0.1)
        >>> len(levels), levels[-1]
        (7, 0.1)
    """
    check_rows_finite("data", data)
    check_positive("lowest", lowest, "a noise level")
    x = np.asarray(data, np.float64).reshape(len(data), -1)
    x = x - x.mean(axis=0)
    sd = x.std(axis=0)
    x = x / np.where(sd > 0, sd, 1.0)
    highest = largest_distance(x)
    if not 0 < lowest < highest:
        raise ValueError(
            "`lowest` must be positive and below the largest distance between two "
            "data, the highest level, both in units of the data's sd. "
            f"Got {lowest} and a distance of {highest:.3g}."
        )
    number = 1 + ceil(log(highest / lowest) / log(level_ratio(x.shape[1])))
    return (*np.geomspace(highest, lowest, number)[:-1].tolist(), float(lowest))


def largest_distance(x: np.ndarray) -> float:
    """Return the largest distance between two rows (technique 1).

    Example:
        >>> largest_distance(np.array([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]]))
        5.0
    """
    square = np.sum(x**2, axis=1)
    largest = 0.0
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        squares = square[rows, None] + square - 2 * x[rows] @ x.T
        largest = max(largest, float(squares.max()))
    return sqrt(largest)


def level_ratio(dimension: int) -> float:
    r"""Return the ratio of neighboring levels (technique 2).

    The ratio :math:`\gamma` at which :math:`\Phi(\sqrt{2D}(\gamma - 1) + 3\gamma) -
    \Phi(\sqrt{2D}(\gamma - 1) - 3\gamma)` is one half, by bisection; at most 2.

    Args:
        dimension: D, the number of coordinates.

    Example:
        >>> round(level_ratio(32 * 32 * 3), 3)
        1.04
    """

    def overlap(gamma: float) -> float:
        center = sqrt(2 * dimension) * (gamma - 1)
        ends = center + 3 * gamma, center - 3 * gamma
        upper, lower = (0.5 * (1 + erf(end / sqrt(2))) for end in ends)
        return upper - lower

    low, high = 1.0, MAX_RATIO
    if overlap(high) > OVERLAP:
        return high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if overlap(middle) > OVERLAP else (low, middle)
    return low
