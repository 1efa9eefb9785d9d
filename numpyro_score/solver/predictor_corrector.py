"""Predictor-corrector sampling: a reverse step, then Langevin steps at its level."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.checks import check_count, check_kind, check_positive
from numpyro_score.sde import SDE
from numpyro_score.solver.ancestral import Ancestral
from numpyro_score.solver.base import BATCH_AXIS, Solver
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    r"""A predictor followed by Langevin steps (Song et al. 2021, algorithm 4).

    .. math:: x \leftarrow x + \varepsilon s + \sqrt{2 \varepsilon}\, n, \qquad
              \varepsilon = 2 \Bigl(r \frac{\|n\|}{\|s\|}\Bigr)^2,

    with r the signal-to-noise ratio and the norms averaged over all draws. Corrections
    move draws toward the marginal law at their level, for one evaluation each. With an
    accurate predictor they only add cost (docs/choosing-a-sampler.md).

    Args:
        predictor: the solver of the reverse step.
        num_corrections: Langevin steps per reverse step.
        signal_to_noise: r, norm of a correction's drift over that of its noise; 0.16
            as in the code of Song et al. for CIFAR-10.

    Raises:
        ValueError: for fewer than one correction or a ratio that is not positive.

    Example:
        >>> PredictorCorrector(num_corrections=2).num_evaluations(100, ())
        300
    """

    stochastic: ClassVar[bool] = True

    predictor: Solver = Ancestral()
    num_corrections: int = 1
    signal_to_noise: float = 0.16

    def __post_init__(self) -> None:
        why = "a number of steps; without corrections use the predictor itself"
        check_count("num_corrections", self.num_corrections, why)
        check_positive("signal_to_noise", self.signal_to_noise, "a ratio of norms")
        what = "a solver, such as Ancestral(): it takes the reverse step"
        check_kind("predictor", self.predictor, Solver, what)

    def init(self, x: Position) -> Any:
        """Return the predictor's state."""
        return self.predictor.init(x)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: Any,
    ) -> tuple[Position, Any]:
        """Predict, then correct."""
        key, *keys = jax.random.split(key, self.num_corrections + 1)
        x, solver_state = self.predictor.step(
            key, x, level, level_next, denoise, solver_state
        )
        for key_correct in keys:
            score = (denoise(x, level_next) - x) / level_next**2
            noise = jax.random.normal(key_correct, x.shape, x.dtype)
            ratio = self.signal_to_noise * _mean_norm(noise) / _mean_norm(score)
            step_size = 2 * ratio**2
            x = x + step_size * score + jnp.sqrt(2 * step_size) * noise
        return x, solver_state

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 200 geometric steps, as for Ancestral."""
        return default_times(sde, 200)

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Return at which steps the predictor is stable."""
        return self.predictor.is_stable(levels)


def _mean_norm(x: Position) -> Scalar:
    """Return the Euclidean norm of x, averaged over draws."""
    return jax.lax.pmean(jnp.sqrt(jnp.sum(jnp.square(x))), BATCH_AXIS)
