"""Base class of the noise processes, and their reversal by a score."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.checks import check_numbers, is_traced
from numpyro_score.typing import Position, Real, ScoreFn, Time


class Marginal(NamedTuple):
    """Coefficients of the law of x_t given x_0, Normal(alpha x_0, sigma).

    - **alpha**: signal scale.
    - **sigma**: standard deviation of the noise.
    """

    alpha: Real | float
    sigma: Real | float


class SDE(ABC):
    """Gaussian noise process of standardized data, t in [``t_min``, ``t_max``].

    Subclasses define ``log_alpha``, ``sigma``, ``time`` and the two ends. ``sigma_min``
    and ``sigma_max`` are the noise levels sigma/alpha at ``t_min`` and ``t_max``;
    samplers and densities integrate between them.

    Example:
        >>> @dataclass(frozen=True)
        ... class LinearVE(SDE):  # sigma = t
        ...     sigma_min: float = 0.01
        ...     sigma_max: float = 20.0
        ...
        ...     def log_alpha(self, t):
        ...         return 0.0 * jnp.asarray(t)
        ...
        ...     def sigma(self, t):
        ...         return jnp.asarray(t)
        ...
        ...     def time(self, noise_level):
        ...         return noise_level
        ...
        ...     t_min = property(lambda self: self.sigma_min)
        ...     t_max = property(lambda self: self.sigma_max)
        >>> round(float(LinearVE().diffusion(0.5)), 3)  # g^2 = 2 sigma sigma'
        1.0
    """

    sigma_min: float

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """Highest noise level, at ``t_max``."""

    @abstractmethod
    def log_alpha(self, t: Time) -> Real:
        """Return log alpha(t), the logarithm of the signal scale."""

    @abstractmethod
    def sigma(self, t: Time) -> Real:
        """Return the standard deviation of the noise."""

    @abstractmethod
    def time(self, noise_level: Time) -> Real:
        """Return the t at which sigma/alpha equals ``noise_level``."""

    @property
    @abstractmethod
    def t_min(self) -> float:
        """Time of the lowest noise level."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """Time of the highest noise level, at which reverse processes start."""

    def check_time(self, name: str, t: Time) -> None:
        """Raise for a time outside [``t_min``, ``t_max``]; traced times pass.

        Args:
            name: name of the argument in the message.
            t: times.

        Raises:
            ValueError: for a time that is not in [``t_min``, ``t_max``], or no number.
        """
        check_numbers(name, t, "times of the noise process")
        if is_traced(t):
            return
        low, high, times = (np.asarray(v) for v in (self.t_min, self.t_max, t))
        slack = 1e-5 * (high - low)  # rounding of times from noise levels
        if not ((low - slack <= times) & (times <= high + slack)).all():
            raise ValueError(
                f"`{name}` must lie between `t_min` and `t_max` of the process: below "
                "there is no noise to remove, above no law was learned. "
                f"Got {t}, {self!r} has [{float(low)}, {float(high)}]."
            )

    def alpha(self, t: Time) -> Real:
        """Return the signal scale alpha."""
        return jnp.exp(self.log_alpha(t))

    def marginal(self, t: Time) -> Marginal:
        """Return alpha(t) and sigma(t), the law of x_t given x_0."""
        return Marginal(self.alpha(t), self.sigma(t))

    def noise_level(self, t: Time) -> Real:
        """Return the noise level sigma(t) / alpha(t)."""
        return self.sigma(t) / self.alpha(t)

    def drift(self, x: Position, t: Time) -> Position:
        """Return f(x, t) = (alpha'/alpha) x."""
        return jax.grad(self.log_alpha)(jnp.asarray(t, float)) * x

    def diffusion(self, t: Time) -> Real:
        """Return g(t), with g^2 = 2 sigma sigma' - 2 (alpha'/alpha) sigma^2."""
        t = jnp.asarray(t, float)
        sigma, sigma_dot = jax.value_and_grad(self.sigma)(t)
        log_alpha_dot = jax.grad(self.log_alpha)(t)
        return jnp.sqrt(2 * sigma * (sigma_dot - log_alpha_dot * sigma))

    def prior_scale(self, t: Time | None = None) -> Real:
        """Return sqrt(alpha^2 + sigma^2), the sd of x_t for unit data.

        Args:
            t: the time; None for ``t_max``.
        """
        alpha, sigma = self.marginal(self.t_max if t is None else t)
        return jnp.sqrt(alpha**2 + sigma**2)

    def reverse(self, score_fn: ScoreFn) -> "ReverseSDE":
        """Return the reverse SDE: drift f - g^2 s, diffusion g, in decreasing t."""
        return ReverseSDE(self, score_fn, weight=1.0)

    def probability_flow(self, score_fn: ScoreFn) -> "ReverseSDE":
        """Return the ODE with the same marginals: drift f - g^2 s / 2, diffusion 0."""
        return ReverseSDE(self, score_fn, weight=0.5)


@dataclass(frozen=True)
class ReverseSDE:
    """Process with drift f - weight g^2 s (Song et al. 2021, eqs. 6 and 13).

    Weight 1 is the reverse SDE and 1/2 the probability flow, which has no noise. Weight
    -1 reverses a reverse SDE: with the same score it is the forward SDE.

    Args:
        process: the process with drift f and diffusion g.
        score_fn: (x, t) -> score s of p_t.
        weight: factor of g^2 s: 1, 1/2, -1/2 or -1.

    Raises:
        ValueError: for another weight, with which the marginals would be others.
    """

    process: "SDE | ReverseSDE"
    score_fn: ScoreFn
    weight: float

    def __post_init__(self) -> None:
        if self.weight not in (1, 0.5, -0.5, -1):
            raise ValueError(
                "`weight` must be 1 (reverse SDE), 1/2 (probability flow), or minus "
                f"one of these, for the opposite direction. Got {self.weight!r}."
            )

    def drift(self, x: Position, t: Time) -> Position:
        """Return f - weight g^2 s."""
        factor = self.weight * self.process.diffusion(t) ** 2
        return self.process.drift(x, t) - factor * self.score_fn(x, t)

    def diffusion(self, t: Time) -> Real:
        """Return g(t), or 0 for the probability flow."""
        return (abs(self.weight) != 0.5) * self.process.diffusion(t)

    def reverse(self, score_fn: ScoreFn) -> "ReverseSDE":
        """Return the process in the opposite direction of time."""
        return ReverseSDE(self, score_fn, weight=-self.weight)
