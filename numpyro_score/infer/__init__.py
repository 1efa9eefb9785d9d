"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

from numpyro_score.infer.amortized import AmortizedPosterior
from numpyro_score.infer.npse import NPSE

__all__ = ["NPSE", "AmortizedPosterior"]
