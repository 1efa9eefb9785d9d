"""Noise process of rectified flow: straight lines from data to noise."""

from dataclasses import dataclass

import jax.numpy as jnp

from numpyro_score.schedule import check_levels
from numpyro_score.sde.base import SDE
from numpyro_score.typing import Real, Time


@dataclass(frozen=True)
class RectifiedFlow(SDE):
    r"""Process with :math:`\alpha = 1 - t, \sigma = t` (Liu et al. 2023).

    Also the path of flow matching with Gaussian noise (Lipman et al. 2023). sigma/alpha
    is infinite at t = 1, so ``t_max`` is the time of ``sigma_max``.

    Args:
        sigma_min: lowest noise level sigma/alpha, in units of the data's sd.
        sigma_max: highest noise level sigma/alpha, in units of the data's sd.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.

    Example:
        >>> float(RectifiedFlow().noise_level(0.5))
        1.0
    """

    sigma_min: float = 0.01
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_levels(self.sigma_min, self.sigma_max)

    def log_alpha(self, t: Time) -> Real:
        """Return log(1 - t)."""
        return jnp.log1p(-jnp.asarray(t, float))

    def sigma(self, t: Time) -> Real:
        """Return t."""
        return jnp.asarray(t, float)

    def time(self, noise_level: Time) -> Real:
        """Return t = level / (1 + level)."""
        return noise_level / (1 + jnp.asarray(noise_level))

    @property
    def t_min(self) -> float:
        """Time of the lowest noise level."""
        return self.sigma_min / (1 + self.sigma_min)

    @property
    def t_max(self) -> float:
        """Time of the highest noise level."""
        return self.sigma_max / (1 + self.sigma_max)
