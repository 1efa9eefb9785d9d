"""What a finished run says about itself: errors, and warnings with what to raise."""

import warnings
from typing import Any

import numpy as np

from numpyro_score.infer.twisted.replicates import ChainResult

LOW_ESS = 0.02  # share of effective particles below which a cloud is called poor
MIN_EVIDENCE_ESS = 0.1  # share below which the error of the evidence is understated
MIN_INITIAL_ESS = 0.5  # share below which the highest level does not hide the data
NEGLIGIBLE_SNR = (
    0.7  # sd of the data in units of that noise at which a start is all but exact
)
MIN_EVES = 20  # particles of the first level, below which modes are a lottery


def check_result(result: ChainResult) -> None:
    """Raise if a cloud lost all its weight, since it has no draws.

    Raises:
        ValueError: saying at which level it happened.
    """
    dead = ~np.isfinite(result.log_evidence)
    if not dead.any():
        return
    ess = np.asarray(result.ess)[dead]
    level = int(np.argmax(~np.isfinite(ess[0])))
    raise ValueError(
        "The likelihood is zero or NaN at every particle of a cloud, so that no draw "
        "can be weighted. Check the data for NaN and the model's support; a likelihood "
        "that is zero in most places needs a smoother model or more `num_particles`. "
        f"Got {int(dead.sum())} of {dead.size} clouds, the first at level {level} of "
        f"{ess.shape[-1]}."
    )


def warn_on_degeneracy(result: ChainResult) -> None:
    """Warn where few particles carry a cloud, or few first ones have descendants."""
    num_particles = result.weights.shape[-1]
    ess, ancestors = np.min(result.ess), int(np.min(result.num_ancestors))
    if ess < LOW_ESS * num_particles:
        _warn(
            f"the effective sample size fell to {ess:.1f} of {num_particles} "
            "particles, so that the error of the log evidence is understated",
            "`levels`, so that each step changes the weights less, and `num_particles`",
        )
    start, reach = np.min(result.initial_ess), float(np.max(result.signal_to_noise))
    if start < MIN_INITIAL_ESS * num_particles:
        _warn(
            "the noise of the highest level does not hide the data, which have about "
            f"{reach:.1f} times its standard deviation along their longest axis; the "
            f"weights that make up for it leave {start:.0f} of {num_particles} "
            "particles",
            "`sigma_max` of the learned law's process to about "
            f"{max(2.0, reach / NEGLIGIBLE_SNR):.1f} times its value, and train with "
            "it",
        )
    if ancestors < min(MIN_EVES, num_particles // 2):
        _warn(
            f"all draws of a cloud descend from {ancestors} of {num_particles} "
            "particles of the first level, so that the shares of separate modes are "
            "not to be trusted",
            "`num_particles`",
        )


def _warn(what: str, remedy: str) -> Any:
    warnings.warn(f"ScoreSDE: {what}. Raise {remedy}.", stacklevel=4)
