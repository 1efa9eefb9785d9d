"""The variance-exploding process: noise is added, the signal keeps its scale."""

from dataclasses import dataclass

import jax.numpy as jnp

from numpyro_score.schedule import check_levels
from numpyro_score.sde.base import SDE
from numpyro_score.typing import Real, Time


@dataclass(frozen=True)
class VE(SDE):
    r"""Variance exploding: :math:`\sigma = \sigma_{min}^{1-t}\sigma_{max}^t`.

    The signal keeps its scale (Song et al. 2021, eq. 31). The default range is for
    standardized data: twenty standard deviations hide the data, a hundredth leaves it
    all but untouched.

    Args:
        sigma_min: noise level at t = 0, in units of the data's sd.
        sigma_max: noise level at t = 1, in units of the data's sd.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.

    Example:
        >>> [round(float(VE(0.1, 10.0).sigma(t)), 3) for t in (0.0, 0.5, 1.0)]
        [0.1, 1.0, 10.0]
    """

    sigma_min: float = 0.01
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        check_levels(self.sigma_min, self.sigma_max)

    def log_alpha(self, t: Time) -> Real:
        """Return 0: the signal keeps its scale."""
        return 0.0 * jnp.asarray(t, float)

    def sigma(self, t: Time) -> Real:
        """Return the geometric interpolation of sigma_min and sigma_max."""
        t = jnp.asarray(t, float)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def time(self, noise_level: Time) -> Real:
        """Return t from the logarithm of the level."""
        span = jnp.log(self.sigma_max / self.sigma_min)
        return jnp.log(jnp.asarray(noise_level) / self.sigma_min) / span

    @property
    def t_min(self) -> float:
        """The lowest level is at t = 0."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The highest level is at t = 1."""
        return 1.0
