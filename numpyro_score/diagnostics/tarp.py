r"""Tests of accuracy with random points (TARP, Lemos et al. 2023).

For each simulation let r be a reference point and f the fraction of posterior draws
that are nearer to r than the truth is. For an exact posterior f is uniform: the
credible region of the draws nearest to r with mass :math:`\alpha` contains the truth
with probability :math:`\alpha`. Unlike ranks of single parameters, f depends on the
joint law of all parameters.

With reference points independent of the observation, a sampler that returns the prior
passes, as in SBC. References that depend on the observation, for example noisy point
estimates, detect it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import check_key
from numpyro_score.diagnostics.replicate import check_draws, flatten, loc_and_scale
from numpyro_score.diagnostics.uniformity import (
    UniformityTest,
    ecdf_band,
    uniformity_test,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey

NULL_AREA_SD = (1 / 6 - 0.375**2) ** 0.5  # sd of 1 - max(u, 1/2) for uniform u


class TARPResult(NamedTuple):
    r"""Result of :func:`tarp`.

    - **levels**: nominal coverage, from 0 to 1.
    - **coverage**: fraction of simulations whose region of that level contains the
      truth.
    - **lower**, **upper**: simultaneous band of the coverage of an exact posterior.
    - **pit**: f per simulation, uniform if calibrated; for
      :func:`~numpyro_score.diagnostics.plot_pit`.
    - **area**: integral of coverage minus level over levels above 1/2; negative for a
      posterior that is too narrow, positive for one that is too wide.
    - **area_z**: the area in standard errors.
    - **test**: p-value of uniformity, which is sensitive to bias too.
    """

    levels: np.ndarray
    coverage: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    pit: dict[str, np.ndarray]
    area: float
    area_z: float
    test: UniformityTest


@renamed(key="rng_key")
def tarp(
    rng_key: PRNGKey,
    truths: Any,
    draws: Any,
    *,
    references: Any = None,
    prob: float = 0.95,
) -> TARPResult:
    """Return the expected coverage of random credible regions, with band and tests.

    Args:
        rng_key: random key of the references, and of ties.
        truths: parameters, simulation on axis 0; an array or a dict of arrays.
        draws: posterior draws, simulation on axis 0, draw on axis 1.
        references: points shaped as the truths; they may depend on the observations
            but not on truths or draws. None for uniform points in the bounding box of
            the truths.
        prob: probability that the coverage of an exact posterior is in the band at all
            levels.

    Raises:
        ValueError: for shapes that differ or values that are not finite.

    Example:
        >>> normal = np.random.default_rng(0).normal
        >>> truths, draws = normal(size=(300, 2)), normal(size=(300, 99, 2))
        >>> tarp(jax.random.key(0), truths, draws).test.p_value > 0.05
        True
        >>> tarp(jax.random.key(0), truths, 0.5 * draws).area < -0.05
        True
    """
    check_key("rng_key", rng_key)
    key_reference, key_tie = jax.random.split(rng_key)
    first, second = check_draws(truths, draws)
    loc, scale = loc_and_scale(flatten(first, 1))
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


@jax.jit
def _pit_values(
    key: PRNGKey,
    points: Float[Array, "n d"],
    draws: Float[Array, "n draws d"],
    centers: Float[Array, "n d"],
) -> Float[Array, " n"]:
    """Return the fraction of draws nearer to the center than the point, ties random."""
    radius = jnp.square(points - centers).sum(-1)[:, None]
    distance = jnp.square(draws - centers[:, None]).sum(-1)
    below, ties = (distance < radius).sum(1), (distance == radius).sum(1)
    share = jax.random.uniform(key, below.shape)
    return (below + share * (ties + 1)) / (draws.shape[1] + 1)
