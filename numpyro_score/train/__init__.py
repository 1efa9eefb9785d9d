"""Training of scores on samples, with the interface of ``numpyro.infer.SVI``."""

from numpyro_score.train.checkpoint import Checkpoints
from numpyro_score.train.score_matching import ScoreMatching
from numpyro_score.train.state import Progress

__all__ = [
    "Checkpoints",
    "Progress",
    "ScoreMatching",
]
