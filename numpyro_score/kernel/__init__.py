"""Langevin kernels for ``numpyro.infer.MCMC``: one kernel per file."""

from numpyro_score.kernel.accept_rule import AcceptRule
from numpyro_score.kernel.annealed_langevin import AnnealedLangevin
from numpyro_score.kernel.annealed_smc import AnnealedLangevinState
from numpyro_score.kernel.noise_levels import levels_from_data
from numpyro_score.kernel.saved_run import run_in_blocks
from numpyro_score.kernel.score_langevin import ScoreLangevin
from numpyro_score.kernel.state import ScoreLangevinState

__all__ = [
    "AcceptRule",
    "AnnealedLangevin",
    "AnnealedLangevinState",
    "ScoreLangevin",
    "ScoreLangevinState",
    "levels_from_data",
    "run_in_blocks",
]
