r"""Asymmetry of the Jacobian of a learned score.

A vector field is the gradient of a function if and only if its Jacobian J is symmetric
everywhere. With random v of unit covariance
:math:`E|Jv - J^\top v|^2 = |J - J^\top|^2` in the Frobenius norm (Hutchinson 1990), at
one forward-mode and one reverse-mode derivative per v.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.checks import Points, check_count, check_key, check_kind
from numpyro_score.diagnostics.fisher import NoiseLevelEstimates
from numpyro_score.diagnostics.noised_data import (
    NoisedData,
    Times,
    per_noise_level,
    ratio_and_error,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey


@renamed(key="rng_key")
def asymmetry(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    num_probes: int = 4,
) -> NoiseLevelEstimates:
    r"""Return the fraction of the squared norm of the Jacobian that is antisymmetric.

    .. math:: \frac{E |J - J^\top|^2}{4\, E |J|^2} \in [0, 1]

    over noised data, in standardized coordinates: 0 for a gradient field, 1 for an
    antisymmetric Jacobian. Energy nets are gradients by construction. The Metropolis
    ratio of a learned site is a line integral of the score, which is independent of the
    path only if this fraction is 0.

    Args:
        rng_key: random key of noise and probe vectors.
        score: the learned score.
        data: one datum per row.
        ts: times; None for eight levels from the highest to the lowest.
        num_probes: random vectors v per row.

    Raises:
        ValueError: for data of another shape or not finite, or ``num_probes`` below 1.

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
    check_key("rng_key", rng_key)
    check_kind("score", score, ScoreModel, "a ScoreModel")
    check_count("num_probes", num_probes, "a number of directions")
    key_noise, key_probe = jax.random.split(rng_key)
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
