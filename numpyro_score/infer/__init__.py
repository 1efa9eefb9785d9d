"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

from numpyro_score.infer.amortized import AmortizedPosterior
from numpyro_score.infer.calibration import Calibration
from numpyro_score.infer.composition import Composition, Gauss, Jac
from numpyro_score.infer.importance import ImportanceResult
from numpyro_score.infer.npse import NPSE
from numpyro_score.infer.one_step import OneStepPosterior, distill_posterior
from numpyro_score.infer.score_sde import ScoreSDE

__all__ = [
    "NPSE",
    "AmortizedPosterior",
    "Calibration",
    "Composition",
    "Gauss",
    "ImportanceResult",
    "Jac",
    "OneStepPosterior",
    "ScoreSDE",
    "distill_posterior",
]
