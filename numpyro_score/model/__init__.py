"""A NumPyro model as a target: learned sites, potential, initialization, handlers."""

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.reparam import ProbabilityFlowReparam

__all__ = ["ProbabilityFlowReparam", "ScoreDistribution"]
