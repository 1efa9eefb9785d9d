"""Posteriors by score-based diffusion: guided by a model, or amortized from it."""

from typing import TYPE_CHECKING

from numpyro_score.infer.twisted.guidance import (
    DPS,
    MomentMatching,
    PseudoinverseGuidance,
)
from numpyro_score.infer.twisted.particle_metropolis import ParticleMetropolis
from numpyro_score.infer.twisted.score_sde import ScoreSDE
from numpyro_score.lazy_names import lazy_names

if TYPE_CHECKING:
    from numpyro_score.infer.amortized.composition import (
        GaussianComposition,
        JacobianComposition,
    )
    from numpyro_score.infer.amortized.hierarchical import HierarchicalPosterior
    from numpyro_score.infer.amortized.npse import NPSE
    from numpyro_score.infer.amortized.one_step import (
        OneStepPosterior,
        distill_posterior,
    )
    from numpyro_score.infer.amortized.posterior import AmortizedPosterior
    from numpyro_score.infer.datatree import to_datatree
    from numpyro_score.infer.joint.learn_joint import learn_joint
    from numpyro_score.infer.joint.learn_table import learn_table
    from numpyro_score.infer.prior.learn_prior import learn_prior
    from numpyro_score.infer.twisted.arviz_adapter import ScoreSDEAdapter

__all__ = [
    "DPS",
    "NPSE",
    "AmortizedPosterior",
    "GaussianComposition",
    "HierarchicalPosterior",
    "JacobianComposition",
    "MomentMatching",
    "OneStepPosterior",
    "ParticleMetropolis",
    "PseudoinverseGuidance",
    "ScoreSDE",
    "ScoreSDEAdapter",
    "distill_posterior",
    "learn_joint",
    "learn_prior",
    "learn_table",
    "to_datatree",
]

_AMORTIZED = "numpyro_score.infer.amortized"
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        # amortized posteriors need Flax and optax
        "AmortizedPosterior": f"{_AMORTIZED}.posterior",
        "GaussianComposition": f"{_AMORTIZED}.composition",
        "HierarchicalPosterior": f"{_AMORTIZED}.hierarchical",
        "JacobianComposition": f"{_AMORTIZED}.composition",
        "NPSE": f"{_AMORTIZED}.npse",
        "OneStepPosterior": f"{_AMORTIZED}.one_step",
        "distill_posterior": f"{_AMORTIZED}.one_step",
        "learn_prior": "numpyro_score.infer.prior.learn_prior",
        "learn_joint": "numpyro_score.infer.joint.learn_joint",
        "learn_table": "numpyro_score.infer.joint.learn_table",
        # and these need arviz_base
        "ScoreSDEAdapter": "numpyro_score.infer.twisted.arviz_adapter",
        "to_datatree": "numpyro_score.infer.datatree",
    },
)
