"""Which particles go on from one level, and at what power of the twist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_score.smc.weights import (
    ParticleWeights,
    effective_sample_size,
    nan_to_zero_weight,
    next_tempering_param,
    systematic,
)
from numpyro_score.typing import PRNGKey

RESAMPLE_ESS = 0.5  # share of effective particles below which a cloud is resampled
KEEP_ESS = 0.75  # share of the effective particles that one level must leave

Numbers = Int[Array, " particles"]


def resample(
    key: PRNGKey, cloud: ParticleWeights, rank: Numbers
) -> tuple[Numbers, ParticleWeights]:
    """Return the numbers of the particles that go on, in order, and their weights.

    All do, unless few weights carry the cloud: then their offspring. Resampled in the
    order of neighbors, all regions keep their shares but for one particle.

    Args:
        key: random key.
        cloud: weights.
        rank: particles by number, neighbors beside each other.
    """
    cloud = cloud._replace(log_weight=cloud.log_weight[rank])
    low = cloud.ess < RESAMPLE_ESS * len(rank)
    offspring = rank[systematic(key, cloud.log_weight)]
    equal = cloud.reset()
    cloud = jax.tree.map(lambda a, b: jnp.where(low, a, b), equal, cloud)
    return jnp.where(low, offspring, rank), cloud


def next_twist_power(
    log_increment: Callable[[Array], Array], cloud: ParticleWeights, power: Array
) -> Float[Array, ""]:
    """Return the largest power that keeps most effective particles.

    Where none does, because not the twist but the step has changed the weights, it is
    the best of three: a power far from the last one would change all weights at once.
    """

    def ess(power: Array) -> Array:
        return effective_sample_size(
            cloud.log_weight + nan_to_zero_weight(log_increment(power))
        )

    one, least = jnp.ones(()), KEEP_ESS * cloud.ess
    largest = next_tempering_param(
        log_increment, cloud.log_weight, 0.5 * power, one, least
    )
    choices = jnp.stack([largest, power, one])
    best = choices[jnp.argmax(jax.vmap(ess)(choices))]
    return jnp.where(ess(largest) >= least, largest, best)
