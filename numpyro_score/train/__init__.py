"""Learn a score from samples, with the interface of ``numpyro.infer.SVI``."""

from numpyro_score.train.checkpoint import Checkpoints
from numpyro_score.train.optimizer import EMA_EXPONENT, LEARNING_RATE
from numpyro_score.train.score_matching import ScoreMatching
from numpyro_score.train.state import (
    Progress,
    ScoreMatchingRunResult,
    TrainState,
)

__all__ = [
    "EMA_EXPONENT",
    "LEARNING_RATE",
    "Checkpoints",
    "Progress",
    "ScoreMatching",
    "ScoreMatchingRunResult",
    "TrainState",
]
