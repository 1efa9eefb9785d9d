r"""Runge-Kutta solvers of the probability flow: Euler (DDIM), Heun and RK4.

In coordinates :math:`\hat x = x_t/\alpha` the flow is
:math:`d\hat x/dr = (\hat x - D(\hat x, r))/r` with the noise level
:math:`r = \sigma/\alpha`. For constant D its solutions are straight lines in r.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import Karras, default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


@dataclass(frozen=True)
class Euler(Solver):
    r"""Euler for the flow in the noise level, order 1: DDIM (Song et al. 2021, ICLR).

    .. math:: x' = D + \frac{\sigma'}{\sigma} (x - D)

    One evaluation per step; exact for a denoiser that is constant along the path. A
    baseline: ``UniPC`` reaches with 16 evaluations what ``Euler`` does not with 64
    (docs/choosing-a-sampler.md).

    Example:
        >>> Euler().stochastic
        False
    """

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: tuple,
    ) -> tuple[Position, tuple]:
        """Take one Euler step in the noise level."""
        denoised = denoise(x, level)
        return denoised + level_next / level * (x - denoised), solver_state


def heun_step(
    x: Position, level: Scalar, level_next: Scalar, denoise: DenoiseFn
) -> Position:
    """Return the point after a Heun step of dx/dsigma = (x - D)/sigma."""
    slope = (x - denoise(x, level)) / level
    end = x + (level_next - level) * slope
    slope_next = (end - denoise(end, level_next)) / level_next
    return x + (level_next - level) * 0.5 * (slope + slope_next)


@dataclass(frozen=True)
class Heun(Solver):
    r"""Heun for the flow in the noise level, order 2 (Karras et al. 2022, algorithm 1).

    .. math:: x' = x + (\sigma' - \sigma) \tfrac12 (d + d'), \qquad
              d = \frac{x - D(x, \sigma)}{\sigma}

    with d' at the end of an Euler step and at its own noise level. Two evaluations per
    step.

    Example:
        >>> Heun().num_evaluations(16, ())
        32
    """

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: tuple,
    ) -> tuple[Position, tuple]:
        """Take one Heun step in the noise level."""
        return heun_step(x, level, level_next, denoise), solver_state

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 24 steps of the Karras grid (docs/choosing-a-sampler.md)."""
        return Karras()(sde, 24)


@dataclass(frozen=True)
class RK4(Solver):
    r"""Classical Runge-Kutta in :math:`\lambda = -\log\sigma`, order 4 (Kutta 1901).

    Solves :math:`dx/d\lambda = D - x` with four evaluations per step. For encoding and
    densities with many steps; with few evaluations multistep solvers are more accurate.

    Example:
        >>> RK4().num_evaluations(8, ())
        32
    """

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: tuple,
    ) -> tuple[Position, tuple]:
        """Take one Runge-Kutta step in -log sigma."""
        h = jnp.log(level) - jnp.log(level_next)
        middle = jnp.sqrt(level) * jnp.sqrt(level_next)

        def slope(x: Position, level: Scalar) -> Position:
            return denoise(x, level) - x

        k1 = slope(x, level)
        k2 = slope(x + 0.5 * h * k1, middle)
        k3 = slope(x + 0.5 * h * k2, middle)
        k4 = slope(x + h * k3, level_next)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), solver_state

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 16 geometric steps (docs/choosing-a-sampler.md: at the floor)."""
        return default_times(sde, 16)

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Return which steps of log sigma lie in the rule's real stability interval."""
        # |1 - h + h^2/2 - h^3/6 + h^4/24| < 1 for 0 < h < 2.785
        return jnp.abs(jnp.diff(jnp.log(levels))) < 2.785
