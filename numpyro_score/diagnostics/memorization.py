r"""Memorization: are draws nearer to the training data than new data are?

A generator that copies puts its draws nearer to training rows than fresh rows of the
law lie (Meehan et al. 2020). A copy is also far nearer to one training row
than to any other: below a third of the second distance it counts as copied (Yoon et al.
2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats  # type: ignore[import-untyped]

from numpyro_score.checks import Points, check_rows_finite

COPY_RATIO = 1 / 3  # Yoon et al. 2023

MIN_DISTANCE = np.finfo(np.float32).tiny  # held-out rows that repeat training rows


class MemorizationResult(NamedTuple):
    """What :func:`memorization` returns.

    - **distances**: from each draw to the nearest training row, standardized.
    - **held_out_distances**: the same from each held-out row.
    - **distance_ratio**: median of the first over median of the second; near 1 for
      draws that are as new as held-out data, near 0 for copies.
    - **copied**: share of draws that are copies of a training row.
    - **held_out_copied**: the same share of held-out rows, by chance.
    - **p_value**: that draws lie no nearer than held-out rows, by ranks
      (Mann-Whitney).
    """

    distances: np.ndarray
    held_out_distances: np.ndarray
    distance_ratio: float
    copied: float
    held_out_copied: float
    p_value: float


def memorization(
    draws: Points, training: Points, held_out: Points
) -> MemorizationResult:
    """Compare how near draws and held-out rows lie to the training rows.

    Distances are Euclidean after each number is standardized by the training rows. For
    images pass features instead: pixels that differ can be the same picture.

    Args:
        draws: rows of the learned law.
        training: rows that it was learned from; at least two.
        held_out: rows of the same law that it has not seen.

    Raises:
        ValueError: for rows of different shapes or values that are not finite.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(3, 100, 4))
        >>> memorization(rows[0], rows[1], rows[2]).p_value > 0.01
        True
        >>> memorization(rows[1] + 0.01, rows[1], rows[2]).copied
        1.0
    """
    rows = {"draws": draws, "training": training, "held_out": held_out}
    flat = {name: np.asarray(a).reshape(len(a), -1) for name, a in rows.items()}
    _check(flat)
    scale = flat["training"].std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    fresh, train, held = (jnp.asarray(a / scale) for a in flat.values())
    near, far = (np.asarray(_two_nearest(a, train)) for a in (fresh, held))
    copied, by_chance = ((d[:, 0] < COPY_RATIO * d[:, 1]).mean() for d in (near, far))
    return MemorizationResult(
        near[:, 0],
        far[:, 0],
        float(np.median(near[:, 0]) / max(np.median(far[:, 0]), MIN_DISTANCE)),
        float(copied),
        float(by_chance),
        float(stats.mannwhitneyu(near[:, 0], far[:, 0], alternative="less").pvalue),
    )


@jax.jit
def _two_nearest(
    points: Float[Array, "n d"], rows: Float[Array, "m d"]
) -> Float[Array, "n 2"]:
    """Return the distances to the nearest and the second nearest row."""

    def one(point: Float[Array, " d"]) -> Float[Array, " 2"]:
        squares = jnp.square(rows - point).sum(-1)
        return jnp.sqrt(-jax.lax.top_k(-squares, 2)[0])

    return jax.lax.map(one, points, batch_size=16)


def _check(flat: dict[str, np.ndarray]) -> None:
    sizes = {name: rows.shape[1] for name, rows in flat.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "`draws`, `training` and `held_out` must have one event shape. "
            f"Got {sizes} numbers per row."
        )
    if len(flat["training"]) < 2:
        raise ValueError(
            "`training` must have at least 2 rows: a copy is nearer to one than to any "
            f"other. Got {len(flat['training'])}."
        )
    for name, rows in flat.items():
        check_rows_finite(name, rows)
