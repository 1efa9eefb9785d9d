"""Heun's rule for the probability flow: the deterministic sampler of EDM."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import Karras
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


def heun_step(
    x: Position, level: Scalar, level_next: Scalar, denoise: DenoiseFn
) -> Position:
    """Average the slope dx/dsigma = (x - D)/sigma over both ends of the step."""
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
        """Take one predicted and averaged step."""
        return heun_step(x, level, level_next, denoise), memory

    def times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 24 steps of the Karras grid."""
        return Karras()(sde, 24)
