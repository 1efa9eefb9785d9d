r"""One covariance of x_0 given x_t for all points of a noise level.

For a Gaussian prior of covariance :math:`\Sigma` it is the same at all points,

.. math:: C = (\Sigma^{-1} + I / \rho^2)^{-1}, \qquad \rho^2 = r_t^2 - r_0^2,

from level r_t to the lowest one r_0, in units of the data's sd. For other priors this
shape is scaled so that its trace is the mean squared error of the denoiser at that
level. Both :math:`\Sigma` and the error are measured once with draws of the score. That
costs some 60,000 evaluations, in the place of one derivative of the net per observed
number, particle and level.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.schedule import geometric
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import DPMSolverPP
from numpyro_score.solver.sample import solve
from numpyro_score.typing import Time

NUM_DRAWS = 1000  # a variance is then known up to (2 / 1000)^1/2, 4 %
NUM_LEVELS = 24  # where errors are measured, linear between: 1.4 apart for VE(0.01, 20)
# principal axes, four draws each; along all others one variance
MAX_AXES = NUM_DRAWS // 4
# of the first level over the lowest; nearer: errors are noise; not tuned
LOWEST_RATIO = 1.05
BATCH = 100  # draws that are denoised together: memory of large nets

Points = Float[Array, "draws size"]


class LevelCovariance(NamedTuple):
    """Covariances of one learned law at all noise levels, in standardized units.

    - **axes**: principal axes of the law at the lowest level, as columns.
    - **variance**: along these axes.
    - **rest**: variance along all other axes.
    - **log_level**: where errors were measured, increasing.
    - **log_ratio**: log of the mean squared error of the denoiser there, over that of a
      Gaussian law with the same variances.
    """

    axes: Float[Array, "size axes"]
    variance: Float[Array, " axes"]
    rest: Float[Array, ""]
    log_level: Float[Array, " levels"]
    log_ratio: Float[Array, " levels"]

    def product(
        self, law: Any, t: Time, v: Float[Array, "..."], *, root: bool = False
    ) -> Float[Array, "..."]:
        """Return C times vectors in units of x/alpha, or a symmetric root of C times.

        From level r_t to that of the site, r_s above r_0, with q the ratio of
        :math:`r_s^2 - r_0^2` to :math:`r_t^2 - r_0^2`, C is
        :math:`(r_s^2 - r_0^2) (1 - q) I + (1 - q)^2 C_0`.

        Args:
            law: the learned site's.
            t: time of x_t.
            v: of shape ``batch + event_shape``.
            root: whether to multiply by the root.
        """
        sde = law.score.sde
        lowest = jnp.square(sde.sigma_min)
        noise_level = sde.noise_level(jnp.maximum(t, law.t))
        above = jnp.maximum(jnp.square(noise_level) - lowest, 0.0)
        end = jnp.maximum(jnp.square(sde.noise_level(law.t)) - lowest, 0.0)
        share = jnp.where(above > 0, end / jnp.where(above > 0, above, 1.0), 1.0)
        ratio = jnp.interp(jnp.log(noise_level), self.log_level, self.log_ratio)

        def spectrum(variance: Array) -> Array:
            clean = jnp.exp(ratio) * _shrink(variance, above)
            value = end * (1 - share) + jnp.square(1 - share) * clean
            return jnp.sqrt(value) if root else value

        along, rest = spectrum(self.variance), spectrum(self.rest)
        flat = v.reshape(-1, law.score.size)
        product = rest * flat + (flat @ self.axes * (along - rest)) @ self.axes.T
        return product.reshape(v.shape)


def measure_covariance(score: ScoreModel) -> LevelCovariance:
    """Return the covariances of a score at all noise levels, from draws of it.

    Draws and denoised points that are not finite are left out. The random key is fixed,
    so that equal scores have equal covariances.

    Args:
        score: any score model.

    Example:
        >>> from numpyro_score.sde import VE
        >>> normal = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> covariance = jax.jit(measure_covariance)(normal)
        >>> bool(jnp.all(jnp.abs(covariance.variance - 1) < 0.15))
        True
        >>> bool(jnp.all(jnp.abs(jnp.exp(covariance.log_ratio) - 1) < 0.15))
        True
    """
    # fixed: measured once for a score, whatever the run
    key_draw, key_noise = jax.random.split(jax.random.key(0))
    sde = score.sde
    x = solve(key_draw, score, (NUM_DRAWS,), solver=DPMSolverPP()).draws
    u = score.standardize.forward(x) / sde.alpha(sde.t_min)
    u = u.reshape(NUM_DRAWS, score.size)
    finite = jnp.isfinite(u).all(1)
    u = jnp.where(finite[:, None], u, 0.0)
    axes, variance, rest = _principal_axes(u, finite)
    levels = geometric(LOWEST_RATIO * sde.sigma_min, sde.sigma_max, NUM_LEVELS)[::-1]
    noise = jax.random.normal(key_noise, u.shape, u.dtype)
    error = jax.lax.map(lambda r: _squared_error(score, r, u, noise, finite), levels)
    above = jnp.square(levels) - jnp.square(sde.sigma_min)
    gaussian = jax.vmap(lambda rise: _trace(variance, rest, rise, score.size))(above)
    ratio = error / jnp.maximum(gaussian, jnp.finfo(u.dtype).tiny)
    usable = jnp.isfinite(ratio) & (ratio > 0)
    log_ratio = jnp.log(jnp.where(usable, ratio, 1.0))
    return LevelCovariance(axes, variance, rest, jnp.log(levels), log_ratio)


def _shrink(variance: Array, rise: Array) -> Array:
    """Return l rho^2 / (l + rho^2), without overflow or 0/0."""
    total = variance + rise
    return variance * (rise / jnp.where(total > 0, total, 1.0))


def _principal_axes(u: Points, finite: Array) -> tuple[Array, Array, Array]:
    """Return leading axes, variances along them, and the mean of all other ones."""
    count = jnp.maximum(finite.sum(), 2)
    centered = jnp.where(finite[:, None], u - u.sum(0) / count, 0.0)
    _, values, rows = jnp.linalg.svd(centered, full_matrices=False)
    variances = jnp.square(values) / (count - 1)
    num = min(MAX_AXES, u.shape[1])
    others = u.shape[1] - num
    rest = variances[num:].sum() / max(1, others)
    return rows[:num].T, variances[:num], rest


def _trace(variance: Array, rest: Array, rise: Array, size: int) -> Array:
    others = size - len(variance)
    return _shrink(variance, rise).sum() + others * _shrink(rest, rise)


def _squared_error(
    score: ScoreModel, level: Array, u: Points, noise: Points, finite: Array
) -> Float[Array, ""]:
    """Return the mean of the squared distance of x_0 from its expectation."""
    sde = score.sde
    t, rise = sde.time(level), jnp.square(level) - jnp.square(sde.sigma_min)

    def one(point: tuple[Array, Array]) -> Array:
        clean, noise = point
        noisy = (clean + jnp.sqrt(rise) * noise).reshape(score.event_shape)
        x = score.standardize.inverse(sde.alpha(t) * noisy)
        mean = score.reverse_transition(x, t, sde.t_min)[0]
        mean = score.standardize.forward(mean).reshape(-1) / sde.alpha(sde.t_min)
        return jnp.square(clean - mean).sum()

    squares = jax.lax.map(one, (u, noise), batch_size=BATCH)
    usable = finite & jnp.isfinite(squares)
    total = jnp.where(usable, squares, 0.0).sum()
    return total / jnp.maximum(usable.sum(), 1)
