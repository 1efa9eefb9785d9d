"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

from typing import TYPE_CHECKING

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
from numpyro_score.lazy_names import lazy_names

if TYPE_CHECKING:
    from numpyro_score.infer.twisted.arviz_adapter import ScoreSDEAdapter

# it needs arviz_base
__getattr__, __dir__ = lazy_names(
    __name__, {"ScoreSDEAdapter": "numpyro_score.infer.twisted.arviz_adapter"}
)

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
    "ScoreSDEAdapter",
    "distill_posterior",
]
