r"""Mean and covariance of x_0 given a noisy point, from the score alone.

Noisy points are in the coordinates of the solvers, :math:`u = (x - \mathrm{loc}) /
(\mathrm{scale}\; \alpha)`, to which :func:`to_solver_units` converts them and from
which :func:`to_physical_units` converts them back. There, by Tweedie's formulas, the
mean is the denoised point D and the covariance :math:`C = r^2\, \partial D / \partial
u` at level r. Here x_0 is the point at the lowest level of a site. C is symmetric for
an exact score; the asymmetry of that of a net measures the error of its entries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.typing import Position, SiteValues, Time

LearnedSites = dict[str, Any]


def to_solver_units(learned: LearnedSites, x: SiteValues, t: Time) -> SiteValues:
    """Return u of learned sites at a time, from physical units."""
    return {
        name: law.score.standardize.forward(x[name])
        / law.score.sde.alpha(jnp.maximum(t, law.t))
        for name, law in learned.items()
    }


def to_physical_units(
    learned: LearnedSites, u: SiteValues, t: Time | None = None
) -> SiteValues:
    """Return x of learned sites at a time, or at the lowest level of each, from u."""
    x = {}
    for name, law in learned.items():
        time = law.t if t is None else jnp.maximum(t, law.t)
        x[name] = law.score.standardize.inverse(law.score.sde.alpha(time) * u[name])
    return x


def denoise(learned: LearnedSites, u: SiteValues, t: Time) -> SiteValues:
    r"""Return learned sites at their expectation at the lowest level.

    With r_0 the lowest level and r that of the time, :math:`E[u_{r_0} | u] = D +
    (r_0 / r)^2 (u - D)` (Ho et al. 2020, eq. 7).
    """
    center = {}
    for name, law in learned.items():
        score, time = law.score, jnp.maximum(t, law.t)
        level = score.sde.noise_level(time)
        share = jnp.square(score.sde.noise_level(law.t) / level)

        def mean(
            u: Position, _: Time, context: Any, score: Any = score, level: Any = level
        ) -> Position:
            return score.denoise_standardized(u, level, context)

        clean = score.map_points(mean, u[name], time, None)
        center[name] = clean + share * (u[name] - clean)
    return center


def covariance_product(
    learned: LearnedSites, u: SiteValues, t: Time, v: SiteValues
) -> SiteValues:
    r"""Return the covariance of x_0, at level zero, given u times a vector.

    One derivative of the denoiser along the vector.
    """
    _, moved = jax.jvp(lambda u: denoise(learned, u, t), (u,), (v,))
    covered = {}
    for name, law in learned.items():
        sde, time = law.score.sde, jnp.maximum(t, law.t)
        level = jnp.square(sde.noise_level(time))
        lowest = jnp.square(sde.noise_level(law.t))
        # E[x_s | x_t] = share x_t + (1 - share) D, share = lowest / level
        share = lowest / level
        rest = jnp.where(share < 1, 1 - share, 1.0)
        covered[name] = level * (moved[name] - share * v[name]) / rest
    return covered


def to_covariance(learned: LearnedSites, t: Time, pulled: SiteValues) -> SiteValues:
    """Return C times vectors, from the vectors pulled back through the denoiser."""
    return {name: _variance_above(learned[name], t) * v for name, v in pulled.items()}


def _variance_above(law: Any, t: Time) -> Array:
    """Return by how much the squared noise level exceeds the lowest of a site."""
    level = law.score.sde.noise_level
    return jnp.square(level(jnp.maximum(t, law.t))) - jnp.square(level(law.t))


def covariance_standard_error(
    learned: LearnedSites, u: SiteValues, t: Time
) -> Float[Array, ""]:
    r"""Return the standard error of the entries of C.

    With errors :math:`\epsilon` of independent entries,
    :math:`|C - C^T|_F^2 = 2 d (d - 1) \epsilon^2`, and the norm is the mean of
    :math:`|(C - C^T) v|^2` over normal v (Hutchinson 1990).

    Args:
        learned: the learned sites.
        u: their values at a batch of noisy points.
        t: time.
    """
    size = sum(leaf[0].size for leaf in u.values())

    def square(key: Array, u: SiteValues) -> Array:
        keys = jax.random.split(key, len(u))
        v = {k: jax.random.normal(keys[j], u[k].shape) for j, k in enumerate(u)}
        moved, pull = jax.vjp(lambda u: denoise(learned, u, t), u)
        there = to_covariance(learned, t, pull(v)[0])
        stretched = to_covariance(learned, t, v)
        _, back = jax.jvp(lambda u: denoise(learned, u, t), (u,), (stretched,))
        parts = [jnp.square(back[k] - there[k]).sum() for k in moved]
        return sum(parts, jnp.zeros(()))

    batch = len(next(iter(u.values())))
    # fixed: the twist that it widens must be one function of x
    squares = jax.vmap(square)(jax.random.split(jax.random.key(0), batch), u)
    return jnp.sqrt(squares.mean() / max(1, 2 * size * (size - 1)))
