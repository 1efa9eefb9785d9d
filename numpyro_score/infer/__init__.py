"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

from numpyro_score.infer.amortized import AmortizedPosterior
from numpyro_score.infer.npse import NPSE
from numpyro_score.infer.score_sde import ScoreSDE

__all__ = ["NPSE", "AmortizedPosterior", "ScoreSDE"]
