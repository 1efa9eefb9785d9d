"""Reverse-time integrators: one solver per file, one :func:`sample` for all."""

from numpyro_score.solver.dpm_solver import DPMSolverPP
from numpyro_score.solver.frame import Solver, default_times, sample

__all__ = ["DPMSolverPP", "Solver", "default_times", "sample"]
