r"""Memorization of training data, by distances to nearest training rows.

Two statistics: the distances of draws to their nearest training row, compared with
those of held-out rows (Meehan et al. 2020), and the fraction of draws whose nearest
training row is less than a third as far as the second nearest (Yoon et al. 2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

from numpyro_score.checks import Points, check_rows_finite
from numpyro_score.renamed_arguments import renamed

COPY_RATIO = 1 / 3  # Yoon et al. 2023

MIN_DISTANCE = np.finfo(np.float32).tiny  # where held-out rows are training rows


class MemorizationResult(NamedTuple):
    """Result of :func:`memorization`.

    - **distances**: of each draw to its nearest training row, standardized.
    - **held_out_distances**: the same for each held-out row.
    - **distance_ratio**: median of ``distances`` over that of ``held_out_distances``;
      near 1 without memorization, near 0 for copies.
    - **copied**: fraction of draws below a third of their second distance.
    - **held_out_copied**: the same fraction of held-out rows, a baseline.
    - **p_value**: one-sided Mann-Whitney test; small if draws are nearer to training
      rows than held-out rows are.
    """

    distances: np.ndarray
    held_out_distances: np.ndarray
    distance_ratio: float
    copied: float
    held_out_copied: float
    p_value: float


@renamed(held_out="validation")
def memorization(
    draws: Points, training: Points, validation: Points
) -> MemorizationResult:
    """Return distances of draws and of held-out rows to the training rows.

    Distances are Euclidean, each coordinate in units of its standard deviation in the
    training rows. For images pass features: pixel distances do not recognize a shifted
    or rescaled copy.

    Args:
        draws: draws of the learned law, one per row.
        training: its training data; at least two rows.
        validation: data of the same law that were not used in training.

    Raises:
        ValueError: for rows of different shapes or values that are not finite.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(3, 100, 4))
        >>> memorization(rows[0], rows[1], rows[2]).p_value > 0.01
        True
        >>> memorization(rows[1] + 0.01, rows[1], rows[2]).copied
        1.0
    """
    rows = {"draws": draws, "training": training, "validation": validation}
    for name, values in rows.items():
        check_rows_finite(name, values)
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
    """Return each point's distances to its nearest and second nearest row."""

    def one(point: Float[Array, " d"]) -> Float[Array, " 2"]:
        squares = jnp.square(rows - point).sum(-1)
        return jnp.sqrt(-jax.lax.top_k(-squares, 2)[0])

    return jax.lax.map(one, points, batch_size=16)


def _check(flat: dict[str, np.ndarray]) -> None:
    sizes = {name: rows.shape[1] for name, rows in flat.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "`draws`, `training` and `validation` must have one event shape. "
            f"Got {sizes} numbers per row."
        )
    if len(flat["training"]) < 2:
        raise ValueError(
            "`training` must have at least 2 rows: a copy is nearer to one than to any "
            f"other. Got {len(flat['training'])}."
        )
    for name, rows in flat.items():
        check_rows_finite(name, rows)
