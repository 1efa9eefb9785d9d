"""Score-based diffusion for the Bayesian workflow, as a plugin for NumPyro."""

from numpyro_score.kernel import AnnealedLangevin, ParallelTempering, ScoreLangevin
from numpyro_score.model import handlers
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.reparam import ProbabilityFlowReparam
from numpyro_score.nn import MLP, UNet
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE, VE, VP, RectifiedFlow, SubVP
from numpyro_score.solver import DPMSolverPP
from numpyro_score.train import ScoreMatching

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "SDE",
    "VE",
    "VP",
    "AnnealedLangevin",
    "DPMSolverPP",
    "ParallelTempering",
    "ProbabilityFlowReparam",
    "RectifiedFlow",
    "ScoreDistribution",
    "ScoreLangevin",
    "ScoreMatching",
    "ScoreModel",
    "SubVP",
    "UNet",
    "handlers",
]
