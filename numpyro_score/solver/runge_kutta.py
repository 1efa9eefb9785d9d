"""The classical Runge-Kutta rule for the probability flow."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


@dataclass(frozen=True)
class RK4(Solver):
    r"""Classical Runge-Kutta in :math:`\lambda = -\log\sigma`, order 4 (Kutta 1901).

    Solves :math:`dx/d\lambda = D - x` with four evaluations per step. Its order pays
    for encoding and for tight tolerances, not for few evaluations.

    Example:
        >>> RK4().num_evaluations(8, ())
        32
    """

    def init(self, x: Position) -> tuple:
        """Remember nothing."""
        return ()

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        memory: tuple,
    ) -> tuple[Position, tuple]:
        """Take one step with four slopes."""
        h = jnp.log(level) - jnp.log(level_next)
        middle = jnp.sqrt(level) * jnp.sqrt(level_next)

        def slope(x: Position, level: Scalar) -> Position:
            return denoise(x, level) - x

        k1 = slope(x, level)
        k2 = slope(x + 0.5 * h * k1, middle)
        k3 = slope(x + 0.5 * h * k2, middle)
        k4 = slope(x + h * k3, level_next)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), memory

    def times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 16 geometric steps, 64 evaluations."""
        return default_times(sde, 16)

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Steps of log sigma up to 2.785, the end of the rule's real stability."""
        return jnp.abs(jnp.diff(jnp.log(levels))) < 2.785
