"""Errors of an estimated evidence, within one SMC run and between several."""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

MIN_ANCESTORS = 10  # the share of a mode of mass 1/2 has then the error (1/4 / 10)^1/2


def eve_weights(
    eve: Int[Array, " particles"], weights: Float[Array, " particles"]
) -> Float[Array, " particles"]:
    """Return the total weight of the descendants of each particle of the first level.

    The sum of their squared differences from 1/N estimates the variance of the log
    evidence from one run (Chan and Lai 2013; Lee and Whiteley 2018).

    Args:
        eve: for each particle its ancestor at the first level.
        weights: normalized weights.

    Example:
        >>> eve, weights = jnp.array([0, 0, 2]), jnp.array([0.25, 0.25, 0.5])
        >>> eve_weights(eve, weights).tolist()
        [0.5, 0.0, 0.5]
    """
    return jax.ops.segment_sum(weights, eve, len(weights))


def has_few_ancestors(effective: Array, num_particles: int) -> Bool[Array, "..."]:
    """Return whether the effective number of first ancestors is below 10.

    Or below a quarter of the particles, where there are fewer than 40.

    Args:
        effective: 1 / sum of squared :func:`eve_weights`.
        num_particles: number of particles.

    Example:
        >>> bool(has_few_ancestors(jnp.array(9.5), 1000))
        True
    """
    return jnp.asarray(effective) < min(MIN_ANCESTORS, num_particles // 4)


def combine_evidence(
    log_evidence: Float[Array, " runs"], variance: Float[Array, " runs"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Return :math:`\log \frac1R \sum_r \hat Z_r` and its standard error, in nats.

    The error is the larger of two: from the variances within runs, which a run that has
    lost most of its particles understates, and from the differences between runs.

    Args:
        log_evidence: log evidence of independent runs.
        variance: variance of each.

    Example:
        >>> value, error = combine_evidence(jnp.zeros(4), jnp.full(4, 0.04))
        >>> float(value), round(float(error), 3)
        (0.0, 0.1)
    """
    count, share = len(log_evidence), jax.nn.softmax(log_evidence)
    combined = logsumexp(log_evidence) - jnp.log(count)
    within = jnp.sum(jnp.square(share) * variance)
    between = count / max(1, count - 1) * jnp.sum(jnp.square(share - 1 / count))
    return combined, jnp.sqrt(jnp.maximum(within, between))
