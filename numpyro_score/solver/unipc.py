"""UniPC: a predictor and corrector that share one evaluation."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.solver.adams_bashforth import STABILITY_LIMIT
from numpyro_score.solver.base import Solver
from numpyro_score.solver.multistep import History, adams_step, append, empty_history
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


class UniPCState(NamedTuple):
    """The last corrected point, its noise level, and the denoised points."""

    x: Position
    level: Scalar
    history: History


@dataclass(frozen=True)
class UniPC(Solver):
    r"""Unified predictor-corrector of order p + 1 (Zhao et al. 2023, algorithm 1).

    An exponential Adams-Bashforth step of order p predicts the next point; the one
    evaluation there corrects that point by an Adams-Moulton step with p + 1 nodes,
    before the next prediction. Coefficients are exact (their "varying" variant), so p
    + 1 is the order of the whole. One evaluation per step. The last point is predicted
    only, as in the paper.

    Args:
        order: p, the order of the predictor: 1, 2 or 3.

    Raises:
        ValueError: for another order.

    Example:
        >>> UniPC(order=2)
        UniPC(order=2)
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(
                "`order` must be 1, 2 or 3: it is the order of the predictor, one "
                f"below that of the corrector. Got {self.order}."
            )

    def init(self, x: Position) -> UniPCState:
        """Start without a history."""
        history = empty_history(x, self.order + 1)
        return UniPCState(x, jnp.ones((), x.dtype), history)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        memory: UniPCState,
    ) -> tuple[Position, UniPCState]:
        """Correct the point that was predicted, then predict the next."""
        history = append(memory.history, denoise(x, level), level)
        corrected = adams_step(
            memory.x, history, memory.level, level, order=self.order + 1
        )
        x = jnp.where(memory.history.num_points == 0, x, corrected)
        x_next = adams_step(x, history, level, level_next, order=self.order)
        return x_next, UniPCState(x, jnp.asarray(level, x.dtype), history)

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Steps of log sigma within the predictor's stability."""
        return jnp.abs(jnp.diff(jnp.log(levels))) < STABILITY_LIMIT[self.order]
