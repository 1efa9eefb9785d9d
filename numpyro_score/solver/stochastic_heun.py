"""The stochastic sampler of EDM: noise is added before each Heun step."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import is_real
from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import Karras
from numpyro_score.solver.runge_kutta import heun_step
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


@dataclass(frozen=True)
class StochasticHeun(Solver):
    r"""Heun steps from a raised noise level (Karras et al. 2022, algorithm 2).

    .. math:: \hat\sigma = \sigma \min(e^{c h}, \sqrt 2), \qquad
              \hat x = x + \sqrt{\hat\sigma^2 - \sigma^2}\, n,

    with h the step of log sigma, then Heun from :math:`\hat\sigma` to the next level.
    The churn c is per unit of log sigma; in the paper it is per step, and its effect
    depends on the grid. In the limit of many steps this solves the SDE of noise rate
    :math:`\tau^2 = c`. Two evaluations per step. The paper's noise inflation
    (S_noise) is 1, its limits (S_tmin, S_tmax) are left out.

    Args:
        churn: c; 0 is the deterministic Heun.

    Raises:
        ValueError: for negative churn.

    Example:
        >>> StochasticHeun().num_evaluations(20, ())
        40
    """

    stochastic: ClassVar[bool] = True

    churn: float = 0.5

    def __post_init__(self) -> None:
        if not is_real(self.churn) or not 0 <= self.churn < float("inf"):
            raise ValueError(
                "`churn` must not be negative, and finite: it is the rate at which "
                f"noise is added. Got {self.churn}."
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
        """Add noise, then take a Heun step from the raised level."""
        raised = level * jnp.minimum((level / level_next) ** self.churn, 2**0.5)
        noise = jax.random.normal(key, x.shape, x.dtype)
        x = x + jnp.sqrt(jnp.maximum(raised**2 - level**2, 0.0)) * noise
        return heun_step(x, raised, level_next, denoise), solver_state

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 40 steps of the Karras grid; 32 are near the floor."""
        return Karras()(sde, 40)
