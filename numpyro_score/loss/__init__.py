"""Score-matching objectives: pure functions, minimal at the true score.

An objective is an object ``loss(key, denoise, x0, sde)`` for standardized data ``x0``
and a denoiser D(x, level) of x_0 + level n. Every objective says what it weighs. One
that says ``pools_rows`` takes the rows of a batch for draws of one law, so it cannot be
used with contexts; one that takes ``data_score`` uses the known score at each row.
"""

from numpyro_score.loss.denoising import (
    BatchDenoiseFn,
    DenoisingScoreMatching,
    Loss,
    denoising_error,
)
from numpyro_score.loss.flow_matching import FlowMatching
from numpyro_score.loss.implicit import (
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from numpyro_score.loss.noise_levels import GeometricLevels, OneLevel, UniformTime
from numpyro_score.loss.projection import Gaussian, Rademacher, Sphere
from numpyro_score.loss.target import CleanTarget, KnownScore, StableTarget
from numpyro_score.loss.weighting import (
    EDMWeight,
    FlowWeight,
    LikelihoodWeight,
    SigmaSquared,
)

__all__ = [
    "BatchDenoiseFn",
    "CleanTarget",
    "DenoisingScoreMatching",
    "EDMWeight",
    "FiniteDifferenceScoreMatching",
    "FlowMatching",
    "FlowWeight",
    "Gaussian",
    "GeometricLevels",
    "ImplicitScoreMatching",
    "KnownScore",
    "LikelihoodWeight",
    "Loss",
    "OneLevel",
    "Rademacher",
    "SigmaSquared",
    "SlicedScoreMatching",
    "Sphere",
    "StableTarget",
    "UniformTime",
    "denoising_error",
]
