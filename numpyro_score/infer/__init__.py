"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

from numpyro_score.infer.amortized.calibration import Calibration
from numpyro_score.infer.amortized.composition import (
    Composition,
    GaussianComposition,
    JacobianComposition,
)
from numpyro_score.infer.amortized.importance import ImportanceResult
from numpyro_score.infer.amortized.npse import NPSE
from numpyro_score.infer.amortized.one_step import OneStepPosterior, distill_posterior
from numpyro_score.infer.amortized.posterior import AmortizedPosterior
from numpyro_score.infer.twisted.guidance import (
    DPS,
    MomentMatching,
    PseudoinverseGuidance,
)
from numpyro_score.infer.twisted.score_sde import ScoreSDE

__all__ = [
    "DPS",
    "NPSE",
    "AmortizedPosterior",
    "Calibration",
    "Composition",
    "GaussianComposition",
    "ImportanceResult",
    "JacobianComposition",
    "MomentMatching",
    "OneStepPosterior",
    "PseudoinverseGuidance",
    "ScoreSDE",
    "distill_posterior",
]
