r"""Mean and covariance of x_0 given a noisy point, from the score alone.

By Tweedie's formulas the mean is the denoised point D and the covariance, in units of
:math:`x/\alpha`, is :math:`C = r^2\, \partial D / \partial \hat x` at level r. Here x_0
is the point at the lowest level of a site. C is symmetric for an exact score; by how
much that of a net is not tells the error of its entries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.typing import Time

SiteValues = dict[str, Array]
LearnedSites = dict[str, Any]


def denoise(learned: LearnedSites, x: SiteValues, t: Time) -> SiteValues:
    """Return learned sites at their expectation at the lowest level."""
    return {
        name: law.score.reverse_transition(x[name], jnp.maximum(t, law.t), law.t)[0]
        for name, law in learned.items()
    }


def covariance_product(
    learned: LearnedSites, x: SiteValues, t: Time, noise: SiteValues
) -> SiteValues:
    r"""Return the covariance of x_0 given x_t times a vector, in units of x/alpha.

    One derivative of the denoiser along the vector.
    """
    tangent = {}
    for name, law in learned.items():
        alpha = law.score.sde.alpha(jnp.maximum(t, law.t))
        tangent[name] = law.score.standardize.scale * alpha * noise[name]
    _, moved = jax.jvp(lambda x: denoise(learned, x, t), (x,), (tangent,))
    covered = {}
    for name, law in learned.items():
        sde, time = law.score.sde, jnp.maximum(t, law.t)
        level = jnp.square(sde.noise_level(time))
        lowest = jnp.square(sde.noise_level(law.t))
        unit = moved[name] / (law.score.standardize.scale * sde.alpha(law.t))
        # E[x_s | x_t] = share x_t + (1 - share) D, share = lowest / level
        share = lowest / level
        rest = jnp.where(share < 1, 1 - share, 1.0)
        covered[name] = level * (unit - share * noise[name]) / rest
    return covered


def to_covariance(learned: LearnedSites, t: Time, pulled: SiteValues) -> SiteValues:
    """Return C times vectors, from the vectors pulled back through the denoiser."""
    return {name: covariance_factor(learned[name], t) * v for name, v in pulled.items()}


def covariance_factor(law: Any, t: Time) -> Array:
    """Return what turns the Jacobian of the denoiser into a covariance."""
    sde, t = law.score.sde, jnp.maximum(t, law.t)
    rise = jnp.square(sde.noise_level(t)) - jnp.square(sde.noise_level(law.t))
    scale = jnp.square(law.score.standardize.scale)
    return rise * sde.alpha(t) * sde.alpha(law.t) * scale


def covariance_standard_error(
    learned: LearnedSites, x: SiteValues, t: Time
) -> Float[Array, ""]:
    r"""Return the standard error of the entries of C, in units of the data's sd.

    With errors :math:`\epsilon` of independent entries,
    :math:`|C - C^T|_F^2 = 2 d (d - 1) \epsilon^2`, and the norm is the mean of
    :math:`|(C - C^T) v|^2` over normal v (Hutchinson 1990).

    Args:
        learned: the learned sites.
        x: their values at a batch of noisy points.
        t: time.
    """
    size = sum(leaf[0].size for leaf in x.values())
    scale = {name: law.score.standardize.scale for name, law in learned.items()}

    def square(key: Array, x: SiteValues) -> Array:
        keys = jax.random.split(key, len(x))
        noise = {k: jax.random.normal(keys[j], x[k].shape) for j, k in enumerate(x)}
        v = {k: noise[k] / scale[k] for k in x}
        moved, pull = jax.vjp(lambda x: denoise(learned, x, t), x)
        there = to_covariance(learned, t, pull(v)[0])
        stretched = to_covariance(learned, t, v)
        _, back = jax.jvp(lambda x: denoise(learned, x, t), (x,), (stretched,))
        parts = [jnp.square((back[k] - there[k]) / scale[k]).sum() for k in moved]
        return sum(parts, jnp.zeros(()))

    batch = len(next(iter(x.values())))
    # fixed: the twist that it widens must be one function of x
    squares = jax.vmap(square)(jax.random.split(jax.random.key(0), batch), x)
    return jnp.sqrt(squares.mean() / max(1, 2 * size * (size - 1)))
