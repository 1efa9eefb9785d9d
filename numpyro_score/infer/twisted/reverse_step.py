r"""The reverse step of a learned law from one noise level to the next.

In coordinates x/alpha, from level r to r', with the denoised point D and the covariance
C of x_0 given x_t, and rho = r'^2/r^2, the first two moments of the step are

.. math:: m = D + \rho (x - D), \qquad
    \Sigma = r'^2 (1 - \rho)\, I + (1 - \rho)^2 C .

The usual step (Ho et al. 2020, eq. 7) leaves C out, which loses variance of first order
in the length of the step. Noise is multiplied by the root of Sigma to first order in C,
:math:`\sqrt v\, (I + (1 - \rho)^2 C / 2v)` with :math:`v = r'^2 (1 - \rho)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.data.standardize import Affine
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.typing import Real, Time


class ReverseStep(NamedTuple):
    """Two neighboring levels of one learned site, squared, and their signal scales."""

    level: Real
    level_next: Real
    lowest: Real
    alpha: Real
    alpha_next: Real
    alpha_lowest: Real
    standardize: Affine

    @classmethod
    def of(cls, law: ScoreDistribution, t: Time, t_next: Time) -> "ReverseStep":
        """Return the step from t to t_next, both at least the site's own time."""
        sde, lowest = law.score.sde, jnp.asarray(law.t, float)
        times = jnp.maximum(t, lowest), jnp.maximum(t_next, lowest), lowest
        levels = [jnp.square(sde.noise_level(time)) for time in times]
        alphas = [sde.alpha(time) for time in times]
        level, level_next, bottom = levels
        alpha, alpha_next, alpha_lowest = alphas
        return cls(
            level,
            level_next,
            bottom,
            alpha,
            alpha_next,
            alpha_lowest,
            law.score.standardize,
        )

    @property
    def variance_drop(self) -> Real:
        """By how much the squared level falls."""
        return self.level - self.level_next

    @property
    def variance(self) -> Real:
        """The variance of the step for a known x_0."""
        return self.level_next * self.variance_drop / self.level

    def mean_shift(self, gradient: Array) -> Array:
        r"""Return the shift by a gradient of log p(y | x_t), in units of the noise.

        The mean of the step given y is :math:`m + (r^2 - r'^2) \nabla \log p(y|x)`.
        """
        slope = self.standardize.scale * self.alpha * gradient
        # fall / sqrt(variance), finite where nothing falls
        return jnp.sqrt(self.variance_drop * self.level / self.level_next) * slope

    def sample(self, x: Array, center: Array, noise: Array, cover: Array) -> Array:
        """Return the point at the next level.

        Args:
            x: the point, in physical units.
            center: its expectation at the site's lowest level, in physical units.
            noise: Gaussian noise, with the pull of the data in it.
            cover: C times the noise.
        """
        whole = self.level - self.lowest
        share = jnp.where(
            whole > 0, self.variance_drop / jnp.where(whole > 0, whole, 1.0), 0.0
        )
        u = self.standardize.forward(x) / self.alpha
        end = self.standardize.forward(center) / self.alpha_lowest
        mean = u - share * (u - end)
        # (1 - rho)^2 / v = fall / (level level_next)
        stretched = (
            noise + 0.5 * self.variance_drop / (self.level * self.level_next) * cover
        )
        moved = mean + jnp.sqrt(self.variance) * stretched
        return self.standardize.inverse(self.alpha_next * moved)
