r"""Conservativeness: is a learned score the gradient of anything?

A field is a gradient where its Jacobian J is symmetric. With random directions v of
unit covariance, :math:`E|Jv - J^\top v|^2 = |J - J^\top|^2` (Hutchinson 1990), for one
forward and one reverse derivative each.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.checks import Points
from numpyro_score.diagnostics.fisher import NoiseLevelEstimates
from numpyro_score.diagnostics.noised_data import (
    NoisedData,
    Times,
    per_noise_level,
    ratio_and_error,
)
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey


def asymmetry(
    key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    num_probes: int = 4,
) -> NoiseLevelEstimates:
    r"""Return the share of the score's Jacobian that is not symmetric.

    .. math:: \frac{E |J - J^\top|^2}{4\, E |J|^2} \in [0, 1]

    over noised data, in standardized coordinates: 0 for a gradient, 1 for a pure
    rotation. An energy net is a gradient by construction. At a learned site the
    Metropolis ratio is a line integral of the score, which depends on the way where
    this share is not small.

    Args:
        key: random key of noise and directions.
        score: the learned score.
        data: rows of data.
        ts: times; None for eight levels from the highest to the lowest.
        num_probes: directions per row.

    Raises:
        ValueError: for data that do not fit the score or are not finite, or fewer than
            one direction.

    Example:
        >>> from numpyro_score import VE
        >>> turn = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -turn @ x / (1 + VE().sigma(t) ** 2), VE(), (2,)
        ... )
        >>> data = jax.random.normal(jax.random.key(0), (50, 2))
        >>> found = asymmetry(jax.random.key(1), score, data)
        >>> bool(jnp.allclose(found.value, 0.2, atol=1e-3))  # 0.25 / (1 + 0.25)
        True
    """
    if num_probes < 1:
        raise ValueError(
            f"`num_probes` must be at least 1: it counts directions. Got {num_probes}."
        )
    key_noise, key_probe = jax.random.split(key)
    scale = score.standardize.scale

    def statistic(rows: NoisedData) -> tuple[Array, Array, Array]:
        def field(x: Array) -> Array:
            return score.score(x, rows.t)

        def one(x: Array, v: Array) -> tuple[Array, Array]:
            forward = scale * jax.jvp(field, (x,), (scale * v,))[1]
            backward = scale * jax.vjp(field, x)[1](scale * v)[0]
            skew = jnp.square(forward - backward).sum() / 4
            whole = (jnp.square(forward) + jnp.square(backward)).sum() / 2
            return skew, whole

        shape = (num_probes, *rows.x.shape)
        probes = jax.random.rademacher(key_probe, shape, rows.x.dtype)
        skew, whole = (
            a.mean(0) for a in jax.vmap(jax.vmap(one), (None, 0))(rows.x, probes)
        )
        return rows.sigma / rows.alpha, *ratio_and_error(skew, whole)

    return NoiseLevelEstimates(
        *per_noise_level(key_noise, score, data, ts, None, statistic)
    )
