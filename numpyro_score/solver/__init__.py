"""Solvers of the reverse SDE and the probability flow, and :func:`sample` for all."""

from typing import TYPE_CHECKING

from numpyro_score.lazy_names import lazy_names
from numpyro_score.solver.ancestral import Ancestral, EulerMaruyama
from numpyro_score.solver.base import Solver
from numpyro_score.solver.choose import Goal, choose
from numpyro_score.solver.control_variates import expectation
from numpyro_score.solver.grid import (
    Cosine,
    Geometric,
    Grid,
    Karras,
    Uniform,
)
from numpyro_score.solver.multistep import (
    AdamsBashforth,
    DPMSolverPP,
    DPMSolverSDE,
    UniPC,
)
from numpyro_score.solver.pilot import pilot_times
from numpyro_score.solver.predictor_corrector import PredictorCorrector
from numpyro_score.solver.runge_kutta import RK4, Euler, Heun
from numpyro_score.solver.sample import decode, encode, sample, solve
from numpyro_score.solver.stochastic_heun import StochasticHeun

if TYPE_CHECKING:
    from numpyro_score.solver.adaptive import Adaptive, AdaptiveSDE

__all__ = [
    "RK4",
    "AdamsBashforth",
    "Adaptive",
    "AdaptiveSDE",
    "Ancestral",
    "Cosine",
    "DPMSolverPP",
    "DPMSolverSDE",
    "Euler",
    "EulerMaruyama",
    "Geometric",
    "Goal",
    "Grid",
    "Heun",
    "Karras",
    "PredictorCorrector",
    "Solver",
    "StochasticHeun",
    "UniPC",
    "Uniform",
    "choose",
    "decode",
    "encode",
    "expectation",
    "pilot_times",
    "sample",
    "solve",
]

# they need diffrax
_ADAPTIVE = "numpyro_score.solver.adaptive"
__getattr__, __dir__ = lazy_names(
    __name__, {"Adaptive": _ADAPTIVE, "AdaptiveSDE": _ADAPTIVE}
)
