"""Draws in one or a few steps: consistency models and reflow."""

from numpyro_score.consistency.distillation import (
    consistency_distillation,
    consistency_training,
    distill,
)
from numpyro_score.consistency.model import ConsistencyModel
from numpyro_score.consistency.reflow import reflow

__all__ = [
    "ConsistencyModel",
    "consistency_distillation",
    "consistency_training",
    "distill",
    "reflow",
]
