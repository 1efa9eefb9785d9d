"""Solver, grid and number of steps for a goal."""

from enum import Enum
from typing import NamedTuple

from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_kind
from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import Geometric, Grid
from numpyro_score.solver.multistep import DPMSolverPP, DPMSolverSDE, UniPC


class Goal(Enum):
    """Property of draws to optimize.

    Example:
        >>> from numpyro_score import VE
        >>> choose(Goal.DETERMINISTIC, VE()).solver.stochastic
        False
    """

    SPEED = "fewest evaluations, with an error near that of a few thousand exact draws"
    BALANCED = "an error below that of ten thousand exact draws"
    QUALITY = "an error far below Monte Carlo error"
    DETERMINISTIC = "draws are a smooth function of their noise and can be encoded"
    DIVERSE = "noise at each step, which damps errors made at higher noise levels"


class Choice(NamedTuple):
    """A solver and its times, for :func:`~numpyro_score.solver.sample`."""

    solver: Solver
    ts: Float[Array, " ts"]


def choose(goal: Goal, sde: SDE, num_evaluations: int | None = None) -> Choice:
    """Return a solver and its times for a goal.

    The table is that of ``tests/benchmarks/solvers.py``: the solvers that reach the
    floor, the distance between two exact samples, with the fewest evaluations. For a
    learned score, compare solvers by
    :func:`~numpyro_score.diagnostics.work_precision.work_precision`.

    Args:
        goal: the property to optimize.
        sde: the process of the score.
        num_evaluations: denoiser evaluations per draw; None for the goal's default.

    Raises:
        TypeError: if ``goal`` is not a :class:`Goal`.
        ValueError: for fewer than one evaluation.

    Example:
        >>> from numpyro_score import VE
        >>> solver, ts = choose(Goal.SPEED, VE())
        >>> solver, len(ts) - 1
        (UniPC(order=2), 12)
    """
    if not isinstance(goal, Goal):
        raise TypeError(
            f"`goal` must be one of {', '.join(map(str, Goal))}. Got {goal!r}."
        )
    check_kind("sde", sde, SDE, "a process, such as VE()")
    if num_evaluations is not None:
        check_count("num_evaluations", num_evaluations, "the cost of a draw")
    solver, grid, default = _CHOICES[goal]
    budget = default if num_evaluations is None else num_evaluations
    return Choice(solver, grid(sde, budget))  # all of them: one evaluation per step


# solver, grid and number of evaluations for each goal
_CHOICES: dict[Goal, tuple[Solver, Grid, int]] = {
    Goal.SPEED: (UniPC(2), Geometric(), 12),
    Goal.BALANCED: (UniPC(3), Geometric(), 20),
    Goal.QUALITY: (UniPC(3), Geometric(), 64),
    Goal.DETERMINISTIC: (DPMSolverPP(2), Geometric(), 32),
    Goal.DIVERSE: (DPMSolverSDE(3), Geometric(), 40),
}
