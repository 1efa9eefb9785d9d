r"""TARP (Lemos et al. 2023): expected coverage of balls round random points.

For each simulation take a reference point r and the share f of posterior draws that lie
nearer to r than the truth does. If the posterior is right, f is uniform, so the
regions "the share :math:`\alpha` of draws nearest to r" hold the truth with probability
:math:`\alpha`. Unlike ranks of single parameters, this sees the joint law.

Where reference points do not depend on the observation, a "posterior" that returns the
prior passes, as it does in SBC; references that depend on it find this too,
for example a point estimate with noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.diagnostics.replicate import check_draws, flatten
from numpyro_score.diagnostics.uniformity import (
    UniformityTest,
    ecdf_band,
    uniformity_test,
)
from numpyro_score.typing import PRNGKey

NULL_AREA_SD = (1 / 6 - 0.375**2) ** 0.5  # sd of 1 - max(u, 1/2) for uniform u


class TARPResult(NamedTuple):
    r"""What :func:`tarp` returns.

    - **levels**: nominal coverage, from 0 to 1.
    - **coverage**: how often the region of that level held the truth.
    - **lower**, **upper**: what the coverage of a right posterior stays between at all
      levels at once, with the asked probability.
    - **pit**: one value per simulation, uniform if calibrated; for
      :func:`~numpyro_score.diagnostics.plot_pit`.
    - **area**: integral of coverage minus level over levels above 1/2. Negative for a
      posterior that is too narrow, positive for one that is too wide.
    - **area_z**: the area in standard errors.
    - **test**: p-value of uniformity, which sees bias too.
    """

    levels: np.ndarray
    coverage: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    pit: dict[str, np.ndarray]
    area: float
    area_z: float
    test: UniformityTest


def tarp(
    key: PRNGKey,
    truths: Any,
    draws: Any,
    *,
    references: Any = None,
    prob: float = 0.95,
) -> TARPResult:
    """Return the expected coverage of random regions, with its band and tests.

    Args:
        key: random key of the references, and of ties.
        truths: parameters, simulation on axis 0; an array or a dict of arrays.
        draws: posterior draws, simulation on axis 0, draw on axis 1.
        references: points shaped as the truths; they may depend on the observations
            but not on truths or draws. None for uniform points of the box that holds
            all truths.
        prob: probability that a right posterior stays inside the band everywhere.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.

    Example:
        >>> normal = np.random.default_rng(0).normal
        >>> truths, draws = normal(size=(300, 2)), normal(size=(300, 99, 2))
        >>> tarp(jax.random.key(0), truths, draws).test.p_value > 0.05
        True
        >>> tarp(jax.random.key(0), truths, 0.5 * draws).area < -0.05
        True
    """
    key_reference, key_tie = jax.random.split(key)
    first, second = check_draws(truths, draws)
    loc, scale = _loc_and_scale(flatten(first, 1))
    points = (flatten(first, 1) - loc) / scale
    others = (flatten(second, 2) - loc) / scale
    if references is None:
        low, high = points.min(axis=0), points.max(axis=0)
        shape = points.shape
        center = jax.random.uniform(key_reference, shape, minval=low, maxval=high)
    else:
        as_draws = jax.tree.map(lambda a: np.asarray(a)[:, None], references)
        center = (flatten(check_draws(truths, as_draws)[1], 2)[:, 0] - loc) / scale
    pit = np.asarray(_pit_values(key_tie, *map(jnp.asarray, (points, others, center))))
    band = ecdf_band(len(pit), prob)
    coverage = np.searchsorted(np.sort(pit), band.levels, side="right") / len(pit)
    area = float(np.mean(1 - np.maximum(pit, 0.5)) - 0.375)
    return TARPResult(
        band.levels,
        coverage,
        band.lower,
        band.upper,
        {"TARP": pit},
        area,
        area * np.sqrt(len(pit)) / NULL_AREA_SD,
        uniformity_test({"TARP": pit}),
    )


def _loc_and_scale(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = rows.std(axis=0)
    return rows.mean(axis=0), np.where(scale > 0, scale, 1.0)


@jax.jit
def _pit_values(
    key: PRNGKey,
    points: Float[Array, "n d"],
    draws: Float[Array, "n draws d"],
    centers: Float[Array, "n d"],
) -> Float[Array, " n"]:
    """Return the randomized share of draws nearer to the center than the point."""
    radius = jnp.square(points - centers).sum(-1)[:, None]
    distance = jnp.square(draws - centers[:, None]).sum(-1)
    below, ties = (distance < radius).sum(1), (distance == radius).sum(1)
    share = jax.random.uniform(key, below.shape)
    return (below + share * (ties + 1)) / (draws.shape[1] + 1)
