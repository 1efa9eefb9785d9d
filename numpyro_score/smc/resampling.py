"""Resampling of weighted particles, where few of them carry the weight."""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Int

from numpyro_score.smc.weights import LogWeights, ParticleWeights
from numpyro_score.typing import PRNGKey

Ancestors = Int[Array, " particles"]


def systematic(
    key: PRNGKey, log_weight: LogWeights, num: int | None = None
) -> Int[Array, " num"]:
    """Return the ancestors of systematic resampling (Kitagawa 1996).

    Every particle has its expected number of offspring, rounded up or down.

    Args:
        key: random key.
        log_weight: log weights, not necessarily normalized.
        num: the number of offspring; None for that of the particles.

    Example:
        >>> weights = jnp.log(jnp.array([0.0, 1.0, 0.0]))
        >>> systematic(jax.random.key(0), weights).tolist()
        [1, 1, 1]
    """
    size = len(log_weight)
    num = size if num is None else num
    cumulative = jnp.cumsum(jnp.exp(log_weight - logsumexp(log_weight)))
    points = (jnp.arange(num) + jax.random.uniform(key)) / num
    # the last sum may fall short of one by rounding
    ancestors = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    return jnp.minimum(ancestors, size - 1)


def resample(
    key: PRNGKey,
    weights: ParticleWeights,
    *,
    ess_threshold: float,
    order: Ancestors | None = None,
    force: Bool[Array, ""] | bool = False,
) -> tuple[Ancestors, ParticleWeights]:
    """Return the ancestor of every particle, and the weights after resampling.

    Particles are resampled by :func:`systematic` where the effective sample size lies
    below a share of N, and stay otherwise. The weights carry the first ancestors on.

    Args:
        key: random key.
        weights: weights of N particles.
        ess_threshold: share of N below which particles are resampled.
        order: numbers of the particles, neighbors beside each other: resampled in that
            order, every region keeps its share but for one particle. The result is in
            that order. None for the order as it is.
        force: whether to resample in any case.

    Example:
        >>> weights = ParticleWeights.uniform(4, proper=True)
        >>> ancestors, _ = resample(jax.random.key(0), weights, ess_threshold=0.5)
        >>> ancestors.tolist()
        [0, 1, 2, 3]
    """
    size = len(weights.log_weight)
    order = jnp.arange(size) if order is None else order
    sorted_weights = weights._replace(log_weight=weights.log_weight[order])
    low = force | (weights.ess < ess_threshold * size)
    offspring = order[systematic(key, sorted_weights.log_weight)]
    ancestors = jnp.where(low, offspring, order)
    weights = jax.tree.map(
        lambda a, b: jnp.where(low, a, b), sorted_weights.reset(), sorted_weights
    )
    return ancestors, weights._replace(eve=weights.eve[ancestors])
