"""Score models: a denoiser, its parametrization, and densities along the flow."""

from numpyro_score.score.density import bits_per_dimension, log_prob_by
from numpyro_score.score.flow import ExactDivergence, HutchinsonDivergence
from numpyro_score.score.model import ScoreModel
from numpyro_score.score.preconditioning import (
    EDM,
    Bounded,
    Clean,
    Flow,
    Noise,
    Score,
    V,
)

__all__ = [
    "EDM",
    "Bounded",
    "Clean",
    "ExactDivergence",
    "Flow",
    "HutchinsonDivergence",
    "Noise",
    "Score",
    "ScoreModel",
    "V",
    "bits_per_dimension",
    "log_prob_by",
]
