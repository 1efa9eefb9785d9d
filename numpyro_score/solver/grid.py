r"""Time grids: the decreasing times between which a solver takes its steps.

A grid is a frozen dataclass called with a process and a number of steps. The formulas
of the noise levels are those of :mod:`numpyro_score.schedule`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score import schedule
from numpyro_score.checks import check_count, check_kind, check_positive, is_traced
from numpyro_score.sde import SDE

DEFAULT_NUM_STEPS = 32  # DPMSolverPP(2) is at the floor: tests/benchmarks/solvers.py


class Grid(ABC):
    """A rule for the times of a solver's steps; base class of frozen dataclasses."""

    @abstractmethod
    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return ``num_steps`` + 1 decreasing times from ``t_max`` to ``t_min``."""


@dataclass(frozen=True)
class Geometric(Grid):
    r"""Times equally spaced in the log noise level.

    The log noise level is minus half the log signal-to-noise ratio.

    Example:
        >>> from numpyro_score.sde import VE
        >>> [round(float(t), 3) for t in Geometric()(VE(), 2)]
        [1.0, 0.5, 0.0]
    """

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        _check(sde, num_steps)
        levels = schedule.geometric(sde.sigma_min, sde.sigma_max, num_steps + 1)
        return sde.time(levels)


@dataclass(frozen=True)
class Uniform(Grid):
    """Times equally spaced (Song et al. 2021).

    For ``VE``, whose noise level is geometric in time, this is the geometric grid.

    Example:
        >>> from numpyro_score.sde import RectifiedFlow
        >>> [round(float(t), 2) for t in Uniform()(RectifiedFlow(), 2)]
        [0.99, 0.5, 0.01]
    """

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        _check(sde, num_steps)
        return jnp.linspace(sde.t_max, sde.t_min, num_steps + 1)


@dataclass(frozen=True)
class Karras(Grid):
    r"""Times equally spaced in :math:`\sigma^{1/\rho}` (Karras et al. 2022, eq. 5).

    Args:
        rho: 7 in the paper; larger values put more steps at low noise.

    Example:
        >>> from numpyro_score.sde import VE
        >>> ts = Karras()(VE(), 2)
        >>> round(float(VE().sigma(ts[1])), 2)
        1.2
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        check_positive("rho", self.rho, "the root in which steps are equal")

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        _check(sde, num_steps)
        levels = schedule.karras(
            sde.sigma_min, sde.sigma_max, num_steps + 1, rho=self.rho
        )
        return sde.time(levels)


@dataclass(frozen=True)
class Cosine(Grid):
    """Times equally spaced in the angle arctan(sigma) (Nichol and Dhariwal 2021).

    Most steps are at noise levels near 1.

    Example:
        >>> from numpyro_score.sde import VE
        >>> ts = Cosine()(VE(0.1, 10.0), 2)
        >>> round(float(VE(0.1, 10.0).sigma(ts[1])), 2)
        1.0
    """

    def __call__(self, sde: SDE, num_steps: int) -> Float[Array, " ts"]:
        """Return the times."""
        _check(sde, num_steps)
        levels = schedule.cosine(sde.sigma_min, sde.sigma_max, num_steps + 1)
        return sde.time(levels)


def _check(sde: Any, num_steps: Any) -> None:
    check_kind("sde", sde, SDE, "a process, such as VE()")
    check_count("num_steps", num_steps, "a number of steps")


def default_times(sde: SDE, num_steps: int = DEFAULT_NUM_STEPS) -> Float[Array, " ts"]:
    """Return ``num_steps`` + 1 decreasing times whose noise levels are geometric."""
    return Geometric()(sde, num_steps)


def check_times(ts: Array, sde: SDE) -> None:
    """Raise unless ``ts`` holds at least two decreasing times of the process.

    Raises:
        ValueError: for another shape, order or range.
    """
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(
            "`ts` must list at least two decreasing times: one step needs a start and "
            f"an end. Got shape {ts.shape}."
        )
    if is_traced(ts):
        return
    times = np.asarray(ts)
    if not np.isfinite(times).all() or (np.diff(times) > 0).any():
        raise ValueError(
            "`ts` must decrease, and be finite: the solver runs from noise to data. "
            f"Got {times[0]}, ..., {times[-1]}."
        )
    sde.check_time("ts", float(times[0]))
    sde.check_time("ts", float(times[-1]))
