"""Score models, also of what others trained, parametrizations, and densities."""

from numpyro_score.score.adapters import from_diffusers, from_edm
from numpyro_score.score.density import (
    ExactDivergence,
    HutchinsonDivergence,
    bits_per_dimension,
    solver_log_prob,
)
from numpyro_score.score.model import ScoreModel
from numpyro_score.score.preconditioning import (
    EDM,
    BoundedScore,
    DataPrediction,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
    VPrediction,
)
from numpyro_score.score.prediction import HostFunction

__all__ = [
    "EDM",
    "BoundedScore",
    "DataPrediction",
    "ExactDivergence",
    "HostFunction",
    "HutchinsonDivergence",
    "NoisePrediction",
    "ScoreModel",
    "ScorePrediction",
    "VPrediction",
    "VelocityPrediction",
    "bits_per_dimension",
    "from_diffusers",
    "from_edm",
    "solver_log_prob",
]
