"""Reverse-time integrators: one solver per file, one :func:`sample` for all."""

from typing import TYPE_CHECKING

from numpyro_score.lazy_names import lazy_names
from numpyro_score.solver.adams_bashforth import AdamsBashforth
from numpyro_score.solver.ancestral import Ancestral
from numpyro_score.solver.base import Solver
from numpyro_score.solver.choose import (
    Goal,
    choose,
)
from numpyro_score.solver.control_variates import expectation
from numpyro_score.solver.dpm_solver import DPMSolverPP
from numpyro_score.solver.dpm_solver_sde import DPMSolverSDE
from numpyro_score.solver.euler import Euler
from numpyro_score.solver.euler_maruyama import EulerMaruyama
from numpyro_score.solver.grid import (
    Cosine,
    Geometric,
    Grid,
    Karras,
    Uniform,
)
from numpyro_score.solver.heun import Heun
from numpyro_score.solver.pilot import pilot_times
from numpyro_score.solver.predictor_corrector import PredictorCorrector
from numpyro_score.solver.runge_kutta import RK4
from numpyro_score.solver.sample import decode, encode, sample, solve
from numpyro_score.solver.stochastic_heun import StochasticHeun
from numpyro_score.solver.unipc import UniPC

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
