r"""DPM-Solver++ multistep: exponential integration of the flow in :math:`\log\sigma`.

With :math:`\lambda = -\log\sigma` and step :math:`h = \lambda' - \lambda` the flow is
solved exactly for a denoiser that is linear in :math:`\lambda`:

.. math::

    x' = e^{-h} x + (1 - e^{-h}) \tilde D, \qquad
    \tilde D = D + \frac{h}{2 h_{prev}} (D - D_{prev}).

Order 1 is DDIM. Lu et al. 2022, "DPM-Solver++", algorithm 2. The rule of three values
that is often shipped under this name misses a factor in its second difference and is of
order 2 only; order 3 here is the exact exponential rule.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.solver.adams_bashforth import STABILITY_LIMIT
from numpyro_score.solver.base import Solver
from numpyro_score.solver.multistep import History, adams_step, append, empty_history
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep for the probability flow, one evaluation per step.

    Deterministic given the start. Not for stochastic sampling.

    Args:
        order: 1 (DDIM), 2 (2M) or 3 (3M, with exact coefficients).

    Raises:
        ValueError: for another order.

    Example:
        >>> DPMSolverPP(order=2)
        DPMSolverPP(order=2)
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(
                "`order` must be 1, 2 or 3: these are the multistep rules implemented. "
                f"Got {self.order}."
            )

    def init(self, x: Position) -> History:
        """Start without a history."""
        return empty_history(x, self.order)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        memory: History,
    ) -> tuple[Position, History]:
        """Take one exponential step with an extrapolated denoiser."""
        history = append(memory, denoise(x, level), level)
        if self.order != 2:
            return adams_step(x, history, level, level_next, order=self.order), history
        step = jnp.log(level) - jnp.log(level_next)
        # the first step has no history and is first order
        first = memory.num_points == 0
        previous = jnp.where(first, 1.0, memory.log_levels[0] - jnp.log(level))
        ratio = jnp.where(first, 0.0, step / previous)
        newest, before = history.denoised
        target = newest + 0.5 * ratio * (newest - before)
        return jnp.exp(-step) * x - jnp.expm1(-step) * target, history

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Steps of log sigma within the rule's stability on linear denoisers."""
        return jnp.abs(jnp.diff(jnp.log(levels))) < STABILITY_LIMIT[self.order]
