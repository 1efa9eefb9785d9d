"""Draws in one step or a few: consistency models and reflow."""

from numpyro_score.consistency.distillation import (
    ConsistencyResult,
    distill,
    distill_by_steps,
    train_consistency,
)
from numpyro_score.consistency.model import ConsistencyModel
from numpyro_score.consistency.reflow import reflow

__all__ = [
    "ConsistencyModel",
    "ConsistencyResult",
    "distill",
    "distill_by_steps",
    "reflow",
    "train_consistency",
]
