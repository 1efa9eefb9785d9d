r"""DPM-Solver++ multistep: exponential integration of the flow in :math:`\log\sigma`.

With :math:`\lambda = -\log\sigma` and step :math:`h = \lambda' - \lambda` the flow is
solved exactly for a denoiser that is linear in :math:`\lambda`:

.. math::

    x' = e^{-h} x + (1 - e^{-h}) \tilde D, \qquad
    \tilde D = D + \frac{h}{2 h_{prev}} (D - D_{prev}).

Order 1 is DDIM. Lu et al. 2022, "DPM-Solver++", algorithm 2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from numpyro_score.solver.frame import Solver
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


class Previous(NamedTuple):
    """The denoised point and the step of the step before; step 0 at the start."""

    denoised: Position
    step: Scalar


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep for the probability flow, one evaluation per step.

    Deterministic given the start. Not for stochastic sampling.

    Args:
        order: 1 (DDIM) or 2.

    Raises:
        ValueError: for another order.

    Example:
        >>> DPMSolverPP(order=2)
        DPMSolverPP(order=2)
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(
                "`order` must be 1 or 2: these are the multistep rules implemented. "
                f"Got {self.order}."
            )

    def init(self, x: Position) -> Previous:
        """Start without a previous step."""
        return Previous(jnp.zeros_like(x), jnp.zeros(()))

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        memory: Previous,
    ) -> tuple[Position, Previous]:
        """Take one exponential step with an extrapolated denoiser."""
        denoised = denoise(x, level)
        step = jnp.log(level) - jnp.log(level_next)
        target = denoised
        if self.order == 2:
            # the first step has no history and is first order
            first = memory.step == 0
            ratio = jnp.where(first, 0.0, step / jnp.where(first, 1.0, memory.step))
            target = denoised + 0.5 * ratio * (denoised - memory.denoised)
        x = jnp.exp(-step) * x - jnp.expm1(-step) * target
        return x, Previous(denoised, step)
