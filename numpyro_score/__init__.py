"""Score-based diffusion for the Bayesian workflow, as a plugin for NumPyro.

Learn a score from samples: :class:`ScoreMatching` (``train``) with a net (``nn``), a
process (``sde``) and an objective (``loss``). Use it as a prior in any NumPyro model:
:class:`ScoreDistribution` (``model``), or in one call a posterior as the prior for new
data: :func:`learn_prior` and ``handlers.with_prior``. Sample the model's posterior:
:class:`ScoreLangevin`, :class:`AnnealedLangevin` and, for many modes,
:class:`ParallelTempering` under ``MCMC`` (``kernel``),
:class:`ScoreSDE` by guided particles, :class:`ParticleMetropolis` by a chain of their
runs, :class:`NPSE` for all observations at once (``infer``). Sample the score itself:
``score.sample``, with any ``solver``, in one step (``consistency``) or guided
(``guidance``). Ask how far to trust the result: ``diagnostics``; :func:`to_datatree`
takes it to ArviZ. Save and load what was learned: ``io``. Every name is imported when
it is first used, and with it what it needs of Flax, diffrax, orbax or ArviZ.
"""

from typing import TYPE_CHECKING

from numpyro_score.lazy_names import lazy_names

if TYPE_CHECKING:
    from numpyro_score.infer import NPSE
    from numpyro_score.infer.datatree import to_datatree
    from numpyro_score.infer.prior.learn_prior import learn_prior
    from numpyro_score.infer.twisted.particle_metropolis import ParticleMetropolis
    from numpyro_score.infer.twisted.score_sde import ScoreSDE
    from numpyro_score.kernel import (
        AnnealedLangevin,
        ParallelTempering,
        ScoreLangevin,
    )
    from numpyro_score.model import handlers
    from numpyro_score.model.distribution import ScoreDistribution
    from numpyro_score.model.reparam import ProbabilityFlowReparam
    from numpyro_score.nn import MLP, UNet
    from numpyro_score.score.model import ScoreModel
    from numpyro_score.sde import SDE, VE, VP, RectifiedFlow, SubVP
    from numpyro_score.solver import DPMSolverPP
    from numpyro_score.train import ScoreMatching

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "NPSE",
    "SDE",
    "VE",
    "VP",
    "AnnealedLangevin",
    "DPMSolverPP",
    "ParallelTempering",
    "ParticleMetropolis",
    "ProbabilityFlowReparam",
    "RectifiedFlow",
    "ScoreDistribution",
    "ScoreLangevin",
    "ScoreMatching",
    "ScoreModel",
    "ScoreSDE",
    "SubVP",
    "UNet",
    "handlers",
    "learn_prior",
    "to_datatree",
]

# every name: a program loads what it uses
_SDE = "numpyro_score.sde"
_TWISTED = "numpyro_score.infer.twisted"
_PACKAGES = (
    "consistency",
    "data",
    "diagnostics",
    "guidance",
    "infer",
    "io",
    "kernel",
    "langevin",
    "loss",
    "model",
    "nn",
    "schedule",
    "score",
    "sde",
    "smc",
    "solver",
    "train",
    "typing",
)
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MLP": "numpyro_score.nn.mlp",
        "NPSE": "numpyro_score.infer.amortized.npse",
        "SDE": _SDE,
        "VE": _SDE,
        "VP": _SDE,
        "AnnealedLangevin": "numpyro_score.kernel",
        "DPMSolverPP": "numpyro_score.solver",
        "ParallelTempering": "numpyro_score.kernel",
        "ParticleMetropolis": f"{_TWISTED}.particle_metropolis",
        "ProbabilityFlowReparam": "numpyro_score.model.reparam",
        "RectifiedFlow": _SDE,
        "ScoreDistribution": "numpyro_score.model.distribution",
        "ScoreLangevin": "numpyro_score.kernel",
        "ScoreMatching": "numpyro_score.train.score_matching",
        "ScoreModel": "numpyro_score.score.model",
        "ScoreSDE": f"{_TWISTED}.score_sde",
        "SubVP": _SDE,
        "UNet": "numpyro_score.nn.unet",
        "learn_prior": "numpyro_score.infer.prior.learn_prior",
        "to_datatree": "numpyro_score.infer.datatree",
    },
    (
        "numpyro_score.model.handlers",
        *(f"numpyro_score.{name}" for name in _PACKAGES),
    ),
)
