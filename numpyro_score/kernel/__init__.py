"""Langevin kernels for ``numpyro.infer.MCMC``: one kernel per file."""

from numpyro_score.kernel.annealed_langevin import AnnealedLangevin
from numpyro_score.kernel.annealed_state import AnnealedLangevinState
from numpyro_score.kernel.score_langevin import ScoreLangevin
from numpyro_score.kernel.state import ScoreLangevinState

__all__ = [
    "AnnealedLangevin",
    "AnnealedLangevinState",
    "ScoreLangevin",
    "ScoreLangevinState",
]
