"""Score-matching objectives, minimal at the true score.

An objective is a callable ``loss(key, denoise, x0, sde)`` of standardized data ``x0``
and a denoiser D(x, level) of x_0 + level n. An objective with ``batch_coupled`` treats
the rows of a batch as draws of one law, so it cannot be used with contexts. One with
the argument ``data_score`` uses the known score at each row.
"""

from numpyro_score.loss.denoising import DenoisingScoreMatching
from numpyro_score.loss.flow_matching import FlowMatching
from numpyro_score.loss.implicit import (
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from numpyro_score.loss.noise_levels import GeometricLevels, SingleLevel, UniformTime
from numpyro_score.loss.per_coordinate import PerCoordinate
from numpyro_score.loss.projection import Gaussian, Rademacher, Sphere
from numpyro_score.loss.target import DataTarget, StableTargetField, TargetScore
from numpyro_score.loss.weighting import (
    EDMWeight,
    FlowMatchingWeight,
    LikelihoodWeight,
    SigmaSquaredWeight,
)

__all__ = [
    "DataTarget",
    "DenoisingScoreMatching",
    "EDMWeight",
    "FiniteDifferenceScoreMatching",
    "FlowMatching",
    "FlowMatchingWeight",
    "Gaussian",
    "GeometricLevels",
    "ImplicitScoreMatching",
    "LikelihoodWeight",
    "PerCoordinate",
    "Rademacher",
    "SigmaSquaredWeight",
    "SingleLevel",
    "SlicedScoreMatching",
    "Sphere",
    "StableTargetField",
    "TargetScore",
    "UniformTime",
]
