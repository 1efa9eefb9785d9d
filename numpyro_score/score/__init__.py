"""Score models, parametrizations of their nets, and densities by the flow."""

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

__all__ = [
    "EDM",
    "BoundedScore",
    "DataPrediction",
    "ExactDivergence",
    "HutchinsonDivergence",
    "NoisePrediction",
    "ScoreModel",
    "ScorePrediction",
    "VPrediction",
    "VelocityPrediction",
    "bits_per_dimension",
    "solver_log_prob",
]
