r"""Noise that is spread evenly over particles which are neighbors.

Particles are sorted along the axis in which their denoised points differ most, and
along the first few such axes the noise of the i-th is

.. math:: \Phi^{-1}\big( (i\, s_j + u_j) \bmod 1 \big),

with irrational s and u uniform (Richtmyer 1951; Cranley and Patterson 1976). The noise
of each particle is standard normal as before, so that all weights stay right, but that
of any run of neighbors fills the law evenly. Means over the particles then vary much
less than with independent noise (L'Ecuyer, Lecot and Tuffin 2008; Gerber and Chopin
2015).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int

from numpyro_score.data.covariance import subspace_iteration
from numpyro_score.typing import PRNGKey, SiteValues

# irrational steps, one per axis: the golden ratio is the evenest, then roots of primes
RICHTMYER_STEPS = np.array([0.5 + 0.5 * 5**0.5, 2**0.5, 3**0.5, 7**0.5])
# of the power iteration for axes, which leaves (l_5 / l_4)^4; any are right
NUM_ROUNDS = 4
UNIFORM_CLIP = 1e-6  # keeps float32 from 0 and 1, where quantiles are infinite: 4.75 sd


class ParticleOrder(NamedTuple):
    """Numbers of particles, neighbors beside each other, and axes as columns."""

    rank: Int[Array, " particles"]
    axes: Float[Array, "size axes"]


def sort_particles(
    center: SiteValues, log_weight: Float[Array, " particles"]
) -> ParticleOrder:
    """Sort particles along the first principal axis of their denoised points.

    Args:
        center: denoised points of all particles, in units of the data's sd.
        log_weight: their normalized log weights.
    """
    points = jnp.nan_to_num(jax.vmap(lambda x: ravel_pytree(x)[0])(center))
    weight = jnp.nan_to_num(jnp.exp(log_weight))
    points = points - weight @ points
    size = points.shape[1]
    # any start converges; the order of particles must not depend on their noise
    start = jax.random.normal(
        jax.random.key(0), (size, min(len(RICHTMYER_STEPS), size))
    )
    axes = subspace_iteration(
        lambda axes: points.T @ (weight[:, None] * (points @ axes)), start, NUM_ROUNDS
    )
    return ParticleOrder(jnp.argsort(points @ axes[:, 0]), axes)


def normal_like(key: PRNGKey, like: SiteValues, size: int) -> SiteValues:
    """Return independent standard normal noise for particles.

    Args:
        key: random key.
        like: the sites of one particle.
        size: number of particles.
    """
    names = enumerate(like)
    keys = {name: jax.random.fold_in(key, j) for j, name in names}
    return {k: jax.random.normal(keys[k], (size, *like[k].shape)) for k in like}


def rqmc_normal(key: PRNGKey, like: SiteValues, size: int, axes: Array) -> SiteValues:
    """Return standard normal noise for sorted particles, even along the axes.

    Args:
        key: random key.
        like: the sites of one particle.
        size: number of particles.
        axes: orthonormal columns.

    Example:
        >>> noise = rqmc_normal(jax.random.key(0), {"x": jnp.zeros(1)}, 64, jnp.eye(1))
        >>> any_eight = noise["x"][24:32, 0]
        >>> sorted((any_eight > 0).tolist()) == 4 * [False] + 4 * [True]
        True
    """
    key_free, key_shift = jax.random.split(key)
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])(normal_like(key_free, like, size))
    count = axes.shape[1]
    start = jnp.asarray(
        np.outer(np.arange(size), RICHTMYER_STEPS[:count]) % 1, flat.dtype
    )
    uniform = (start + jax.random.uniform(key_shift, (count,), flat.dtype)) % 1
    even = ndtri(jnp.clip(uniform, UNIFORM_CLIP, 1 - UNIFORM_CLIP))
    flat = flat + (even - flat @ axes) @ axes.T
    return jax.vmap(ravel_pytree(like)[1])(flat)
