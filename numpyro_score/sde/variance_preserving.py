"""Variance-preserving noise processes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from numpyro_score.checks import is_real
from numpyro_score.schedule import check_levels
from numpyro_score.sde.base import SDE
from numpyro_score.typing import Real, Time


@dataclass(frozen=True)
class _BetaSDE(SDE):
    """Base of VP and sub-VP: alpha = exp(-B/2), B the integral of beta."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        are_real = is_real(self.beta_min) and is_real(self.beta_max)
        if not are_real or not 0 < self.beta_min <= self.beta_max < float("inf"):
            raise ValueError(
                "`beta_min` and `beta_max` must satisfy 0 < beta_min <= beta_max < "
                "inf: they are rates of noise. "
                f"Got beta_min={self.beta_min}, beta_max={self.beta_max}."
            )
        check_levels(self.sigma_min, self.sigma_max)

    def _integral(self, t: Time) -> Real:
        """Return B(t), the integral of beta = beta_min + t (beta_max - beta_min)."""
        t = jnp.asarray(t, float)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def _invert_integral(self, value: Real) -> Real:
        """Return t with B(t) = value, the stable root of the quadratic."""
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2 * slope * value)
        return 2 * value / (self.beta_min + root)

    def log_alpha(self, t: Time) -> Real:
        """Return -B(t)/2."""
        return -0.5 * self._integral(t)

    @property
    def t_min(self) -> float:
        """Time of the lowest noise level ``sigma_min``."""
        with jax.ensure_compile_time_eval():
            return float(self.time(self.sigma_min))

    @property
    def t_max(self) -> float:
        """Time of the highest noise level, 1."""
        return 1.0

    @property
    def sigma_max(self) -> float:
        """Highest noise level, at t = 1."""
        with jax.ensure_compile_time_eval():
            return float(self.noise_level(1.0))


@dataclass(frozen=True)
class VP(_BetaSDE):
    r"""Variance preserving: :math:`\alpha = e^{-B/2}, \sigma^2 = 1 - e^{-B}`.

    B is the integral of :math:`\beta(t) = \beta_{min} + t(\beta_{max} - \beta_{min})`
    (Song et al. 2021, eq. 32).

    Args:
        beta_min: rate of noise at t = 0.
        beta_max: rate of noise at t = 1.
        sigma_min: lowest noise level sigma/alpha, in units of the data's sd.

    Raises:
        ValueError: for rates or levels that are not positive and ordered.

    Example:
        >>> alpha, sigma = VP().marginal(0.5)
        >>> round(float(alpha**2 + sigma**2), 5)
        1.0
    """

    def sigma(self, t: Time) -> Real:
        """Return sqrt(1 - exp(-B)), accurate for small t."""
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def time(self, noise_level: Time) -> Real:
        """Return t with exp(B) - 1 = level^2."""
        return self._invert_integral(jnp.log1p(jnp.square(noise_level)))


@dataclass(frozen=True)
class SubVP(_BetaSDE):
    r"""Sub-variance preserving: VP's alpha, :math:`\sigma = 1 - e^{-B}`.

    The standard deviation is the *square* of VP's (Song et al. 2021, eq. 29).

    Args:
        beta_min: rate of noise at t = 0.
        beta_max: rate of noise at t = 1.
        sigma_min: lowest noise level sigma/alpha, in units of the data's sd.

    Raises:
        ValueError: for rates or levels that are not positive and ordered.

    Example:
        >>> bool(jnp.allclose(SubVP().sigma(0.3), VP().sigma(0.3) ** 2))
        True
    """

    def sigma(self, t: Time) -> Real:
        """Return 1 - exp(-B)."""
        return -jnp.expm1(-self._integral(t))

    def time(self, noise_level: Time) -> Real:
        """Return t with 2 sinh(B/2) = level."""
        return self._invert_integral(2 * jnp.arcsinh(jnp.asarray(noise_level) / 2))
