r"""Grids: at which times a solver stops on its way from noise to data.

A grid is a frozen dataclass that is called with a process and a number of steps and
returns decreasing times. Formulas of the levels are in :mod:`numpyro_score.schedule`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score import schedule
from numpyro_score.sde import SDE

DEFAULT_NUM_STEPS = 32


class Grid(ABC):
    """A rule for the times of a solver's steps."""

    @abstractmethod
    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return ``num_steps`` + 1 decreasing times from ``t_max`` to ``t_min``."""


@dataclass(frozen=True)
class Geometric(Grid):
    r"""Equal steps of log noise level, which is half of minus the log-SNR.

    Example:
        >>> from numpyro_score.sde import VE
        >>> [round(float(t), 3) for t in Geometric()(VE(), 2)]
        [1.0, 0.5, 0.0]
    """

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        levels = schedule.geometric(sde.sigma_min, sde.sigma_max, num_steps + 1)
        return sde.time(levels)


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps of time.

    Song et al. 2021. For the geometric ``VE`` this is the geometric grid.

    Example:
        >>> from numpyro_score.sde import RectifiedFlow
        >>> [round(float(t), 2) for t in Uniform()(RectifiedFlow(), 2)]
        [0.99, 0.5, 0.01]
    """

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        return jnp.linspace(sde.t_max, sde.t_min, num_steps + 1)


@dataclass(frozen=True)
class Karras(Grid):
    r"""Equal steps of :math:`\sigma^{1/\rho}` (Karras et al. 2022, eq. 5).

    Args:
        rho: 7 in the paper; the larger, the more steps at low noise.

    Example:
        >>> from numpyro_score.sde import VE
        >>> ts = Karras()(VE(), 2)
        >>> round(float(VE().sigma(ts[1])), 2)
        1.2
    """

    rho: float = 7.0

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        levels = schedule.karras(
            sde.sigma_min, sde.sigma_max, num_steps + 1, rho=self.rho
        )
        return sde.time(levels)


@dataclass(frozen=True)
class Cosine(Grid):
    """Equal steps of the angle whose tangent is the noise level.

    Nichol and Dhariwal 2021. Few steps at high and at low noise.

    Example:
        >>> from numpyro_score.sde import VE
        >>> ts = Cosine()(VE(0.1, 10.0), 2)
        >>> round(float(VE(0.1, 10.0).sigma(ts[1])), 2)
        1.0
    """

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        levels = schedule.cosine(sde.sigma_min, sde.sigma_max, num_steps + 1)
        return sde.time(levels)


def default_times(sde: SDE, num_steps: int = DEFAULT_NUM_STEPS) -> Float[Array, " ts"]:
    """Return ``num_steps`` + 1 decreasing times whose noise levels are geometric."""
    return Geometric()(sde, num_steps)


def check_times(ts: Array, sde: SDE) -> None:
    """Raise unless ``ts`` lists at least two decreasing times of the process."""
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(
            "`ts` must list at least two decreasing times: one step needs a start and "
            f"an end. Got shape {ts.shape}."
        )
    if isinstance(ts, jax.core.Tracer):
        return
    times = np.asarray(ts)
    if (np.diff(times) > 0).any():
        raise ValueError(
            "`ts` must decrease: the solver runs from noise to data. "
            f"Got {times[0]}, ..., {times[-1]}."
        )
    sde.check_time("ts", float(times[0]))
    sde.check_time("ts", float(times[-1]))
