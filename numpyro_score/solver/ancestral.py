r"""First-order solvers of the reverse SDE: ancestral sampling and Euler-Maruyama."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.checks import check_kind, is_real
from numpyro_score.sde import SDE, VP
from numpyro_score.sde.tweedie import score_from_denoised
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import Uniform, default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar, Time


@dataclass(frozen=True)
class Ancestral(Solver):
    r"""Ancestral sampling, from DDIM to DDPM (Ho et al. 2020, eq. 7).

    .. math:: \hat x' = D + \sqrt{\sigma'^2 - v}\, \frac{\hat x - D}{\sigma}
              + \sqrt v\, n, \qquad
              v = \eta^2 \sigma'^2 \Bigl(1 - \frac{\sigma'^2}{\sigma^2}\Bigr) .

    With eta = 1 the mean is :math:`D + (\sigma'/\sigma)^2 (\hat x - D)` and the law
    that of :math:`x_{i-1}` given :math:`x_i` and :math:`x_0 = D` in the chain
    :math:`x_i = \sqrt{1 - \beta_i}\, x_{i-1} + \sqrt{\beta_i}\, n`,
    :math:`\alpha_i^2 = \prod_{j \le i} (1 - \beta_j)`, divided by alpha. Eta = 0 is
    DDIM (Song et al. 2021, ICLR, eq. 16). One evaluation per step, order 1.

    Args:
        eta: ratio of the noise's standard deviation to that of DDPM, from 0 to 1.

    Raises:
        ValueError: for eta outside [0, 1].

    Example:
        >>> Ancestral().eta
        1.0
    """

    stochastic: ClassVar[bool] = True

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not is_real(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(
                "`eta` must lie between 0 (DDIM) and 1 (DDPM): it is the share of the "
                f"chain's noise. Got {self.eta}."
            )

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: tuple,
    ) -> tuple[Position, tuple]:
        """Draw from the Gaussian reverse transition."""
        denoised = denoise(x, level)
        variance = level_next**2 * (1 - (level_next / level) ** 2) * self.eta**2
        direction = jnp.sqrt(level_next**2 - variance) * (x - denoised) / level
        noise = jax.random.normal(key, x.shape, x.dtype)
        return denoised + direction + jnp.sqrt(variance) * noise, solver_state

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 200 geometric steps: at 64 it is far from the floor."""
        return default_times(sde, 200)


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""Euler-Maruyama for the reverse SDE (Song et al. 2021, eq. 6), weak order 1.

    .. math:: x' = x - [f(x, t) - g^2 s(x, t)] (t - t') + g \sqrt{t - t'}\, n

    One evaluation per step. A reference for other SDE solvers;
    :class:`~numpyro_score.solver.ancestral.Ancestral` costs the same and is stable at
    every step size.

    Args:
        sde: the process whose reversal is discretized. It may differ from the score's,
            because the denoiser depends on the noise level only.

    Example:
        >>> EulerMaruyama().num_evaluations(500, ())
        500
    """

    stochastic: ClassVar[bool] = True

    sde: SDE = field(default_factory=VP)

    def __post_init__(self) -> None:
        check_kind("sde", self.sde, SDE, "a process, such as VP()")

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: tuple,
    ) -> tuple[Position, tuple]:
        """Take one Euler-Maruyama step of x_t = alpha x in time t."""
        t, t_next = self.sde.time(level), self.sde.time(level_next)
        marginal = self.sde.marginal(t)

        def score_fn(x: Position, t: Time) -> Position:
            denoised = denoise(x / marginal.alpha, level)
            return score_from_denoised(x, denoised, marginal)

        reverse = self.sde.reverse(score_fn)
        x_t = marginal.alpha * x
        noise = jax.random.normal(key, x.shape, x.dtype)
        x_t = x_t - (t - t_next) * reverse.drift(x_t, t)
        x_t = x_t + jnp.sqrt(t - t_next) * reverse.diffusion(t) * noise
        return x_t / self.sde.alpha(t_next), solver_state

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 500 steps, uniform in the time of the process that is discretized."""
        levels = self.sde.noise_level(Uniform()(self.sde, 500))
        return sde.time(jnp.clip(levels, sde.sigma_min, sde.sigma_max))

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        r"""Return where :math:`g^2 (t - t') < 2 \sigma^2`, stable for D = 0."""
        ts = self.sde.time(levels)
        diffusion = jax.vmap(self.sde.diffusion)(ts[:-1])
        rate = diffusion**2 / self.sde.sigma(ts[:-1]) ** 2
        return rate * (ts[:-1] - ts[1:]) < 2
