"""Variance-exploding noise process."""

from dataclasses import dataclass

import jax.numpy as jnp

from numpyro_score.schedule import check_levels
from numpyro_score.sde.base import SDE
from numpyro_score.typing import Real, Time


@dataclass(frozen=True)
class VE(SDE):
    r"""Variance exploding: :math:`\sigma = \sigma_{min}^{1-t} \sigma_{max}^t`.

    alpha is 1 (Song et al. 2021, eq. 31). At the default ``sigma_max`` the noise has
    400 times the variance of standardized data; at the default ``sigma_min`` it adds
    1e-4 of it.

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
        """Return 0, the logarithm of alpha = 1."""
        return 0.0 * jnp.asarray(t, float)

    def sigma(self, t: Time) -> Real:
        """Return sigma_min^(1 - t) sigma_max^t."""
        t = jnp.asarray(t, float)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def time(self, noise_level: Time) -> Real:
        """Return t = log(level / sigma_min) / log(sigma_max / sigma_min)."""
        span = jnp.log(self.sigma_max / self.sigma_min)
        return jnp.log(jnp.asarray(noise_level) / self.sigma_min) / span

    @property
    def t_min(self) -> float:
        """Time of the lowest noise level, 0."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Time of the highest noise level, 1."""
        return 1.0
