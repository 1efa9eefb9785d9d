"""Exponential Adams-Bashforth: multistep integration of the probability flow."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.solver.base import Solver
from numpyro_score.solver.multistep import History, adams_step, append, empty_history
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar

# Largest step h of log sigma at which the rule is stable on D = a x for 0 <= a <= 1
# (largest root of its characteristic polynomial at most 1), found by scanning a and h.
STABILITY_LIMIT = {1: jnp.inf, 2: jnp.inf, 3: 6.3, 4: 2.1}


@dataclass(frozen=True)
class AdamsBashforth(Solver):
    r"""Exponential Adams-Bashforth in :math:`\log\sigma`, of order 1 to 4.

    The denoiser is replaced by the polynomial through its last ``order`` values and the
    rest is integrated exactly (Zhang and Chen 2023, "DEIS", eq. 14, here for the
    denoiser). Order 1 is DDIM. One evaluation per step. The first steps have a shorter
    history and lower order, which is harmless where sigma is far above the data's
    scale, since the denoiser hardly changes there.

    Args:
        order: 1 to 4. Order 4 wants about 16 steps or more.

    Raises:
        ValueError: for another order.

    Example:
        >>> AdamsBashforth(order=3).num_evaluations(20, ())
        20
    """

    order: int = 3

    def __post_init__(self) -> None:
        if self.order not in STABILITY_LIMIT:
            raise ValueError(
                "`order` must be 1, 2, 3 or 4: higher multistep rules are unstable at "
                f"the steps that are used. Got {self.order}."
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
        """Take one step with an extrapolated denoiser."""
        history = append(memory, denoise(x, level), level)
        return adams_step(x, history, level, level_next, order=self.order), history

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Steps of log sigma within the rule's stability on linear denoisers."""
        return jnp.abs(jnp.diff(jnp.log(levels))) < STABILITY_LIMIT[self.order]
