r"""Ancestral sampling: the discrete chain of DDPM, run backwards."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar


@dataclass(frozen=True)
class Ancestral(Solver):
    r"""Draw x at the next level given x and its denoised point (Ho et al. 2020, eq. 7).

    .. math:: \hat x' = D + \sqrt{\sigma'^2 - v}\, \frac{\hat x - D}{\sigma}
              + \sqrt v\, n, \qquad
              v = \eta^2 \sigma'^2 \Bigl(1 - \frac{\sigma'^2}{\sigma^2}\Bigr) .

    With eta = 1 the mean is :math:`D + (\sigma'/\sigma)^2 (\hat x - D)`: the posterior
    of the chain :math:`x_i = \sqrt{1 - \beta_i}\, x_{i-1} + \sqrt{\beta_i}\, n` with
    :math:`\alpha_i^2 = \prod_{j \le i} (1 - \beta_j)`, divided by alpha. Eta = 0 is
    DDIM (Song et al. 2021, ICLR, eq. 16). One evaluation per step, order 1.

    Args:
        eta: share of the noise, from 0 to 1.

    Raises:
        ValueError: for eta outside [0, 1].

    Example:
        >>> Ancestral().eta
        1.0
    """

    stochastic: ClassVar[bool] = True

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(
                "`eta` must lie between 0 (DDIM) and 1 (DDPM): it is the share of the "
                f"chain's noise. Got {self.eta}."
            )

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
        """Draw from the Gaussian posterior of the chain."""
        denoised = denoise(x, level)
        variance = level_next**2 * (1 - (level_next / level) ** 2) * self.eta**2
        direction = jnp.sqrt(level_next**2 - variance) * (x - denoised) / level
        noise = jax.random.normal(key, x.shape, x.dtype)
        return denoised + direction + jnp.sqrt(variance) * noise, memory

    def times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 200 geometric steps: a first-order rule needs them."""
        return default_times(sde, 200)
