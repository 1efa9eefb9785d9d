"""Langevin kernels for ``numpyro.infer.MCMC``: one kernel per file."""

from numpyro_score.kernel.annealed_langevin import AnnealedLangevin
from numpyro_score.kernel.base import AcceptRule
from numpyro_score.kernel.noise_levels import levels_from_data
from numpyro_score.kernel.parallel_tempering import ParallelTempering
from numpyro_score.kernel.resumable_run import run_in_blocks
from numpyro_score.kernel.score_langevin import ScoreLangevin
from numpyro_score.kernel.tempering_summary import (
    print_tempering_summary,
    summarize_tempering,
)

__all__ = [
    "AcceptRule",
    "AnnealedLangevin",
    "ParallelTempering",
    "ScoreLangevin",
    "levels_from_data",
    "print_tempering_summary",
    "run_in_blocks",
    "summarize_tempering",
]
