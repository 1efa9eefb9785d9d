"""Langevin kernels for ``numpyro.infer.MCMC``: one kernel per file."""

from numpyro_score.kernel.accept_rule import AcceptRule
from numpyro_score.kernel.annealed_langevin import AnnealedLangevin
from numpyro_score.kernel.noise_levels import levels_from_data
from numpyro_score.kernel.saved_run import run_in_blocks
from numpyro_score.kernel.score_langevin import ScoreLangevin

__all__ = [
    "AcceptRule",
    "AnnealedLangevin",
    "ScoreLangevin",
    "levels_from_data",
    "run_in_blocks",
]
