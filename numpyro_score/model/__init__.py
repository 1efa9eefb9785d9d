"""A NumPyro model as samplers see it: learned sites, potential, start and handlers."""

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.reparam import ProbabilityFlowReparam

__all__ = ["ProbabilityFlowReparam", "ScoreDistribution"]
