r"""The reverse step of a learned law from one noise level to the next.

In standardized units of x/alpha, from level r to r', with the denoised point D, the
covariance C of x_0 given x_t, and rho = r'^2/r^2, the first two moments of the step are

.. math:: m = D + \rho (u - D), \qquad
    \Sigma = r'^2 (1 - \rho)\, I + (1 - \rho)^2 C .

The usual step (Ho et al. 2020, eq. 7) leaves C out, which loses variance of first order
in the length of the step. Noise is multiplied by the root of Sigma to first order in C,
:math:`\sqrt v\, (I + (1 - \rho)^2 C / 2v)` with :math:`v = r'^2 (1 - \rho)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.typing import Real, Time


class ReverseStep(NamedTuple):
    """Two neighboring noise levels of one learned site and its lowest, squared."""

    level: Real
    level_next: Real
    lowest: Real

    @classmethod
    def of(cls, law: ScoreDistribution, t: Time, t_next: Time) -> "ReverseStep":
        """Return the step from t to t_next, both at least the site's own time."""
        sde, lowest = law.score.sde, jnp.asarray(law.t, float)
        times = jnp.maximum(t, lowest), jnp.maximum(t_next, lowest), lowest
        return cls(*(jnp.square(sde.noise_level(time)) for time in times))

    @property
    def variance_drop(self) -> Real:
        """By how much the squared level falls."""
        return self.level - self.level_next

    @property
    def variance(self) -> Real:
        """The variance of the step for a known x_0."""
        return self.level_next * self.variance_drop / self.level

    def mean_shift(self, gradient: Array) -> Array:
        r"""Return the shift by a gradient of log p(y | u), in units of the noise.

        The mean of the step given y is :math:`m + (r^2 - r'^2) \nabla \log p(y|u)`.
        """
        # fall / sqrt(variance), finite where nothing falls
        return jnp.sqrt(self.variance_drop * self.level / self.level_next) * gradient

    def sample(self, u: Array, center: Array, noise: Array, product: Array) -> Array:
        """Return the point at the next level.

        Args:
            u: the point.
            center: its expectation at the site's lowest level.
            noise: Gaussian noise, with the pull of the data in it.
            product: C times the noise.
        """
        whole = self.level - self.lowest
        share = jnp.where(
            whole > 0, self.variance_drop / jnp.where(whole > 0, whole, 1.0), 0.0
        )
        mean = u - share * (u - center)
        # (1 - rho)^2 / v = fall / (level level_next)
        stretched = (
            noise + 0.5 * self.variance_drop / (self.level * self.level_next) * product
        )
        return mean + jnp.sqrt(self.variance) * stretched
