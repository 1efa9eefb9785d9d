"""Checks of learned scores, of draws, and of the calibration of posteriors."""

from numpyro_score.diagnostics.c2st import (
    ForestProtocol,
    MLPProtocol,
    c2st,
)
from numpyro_score.diagnostics.chain_bias import unadjusted_bias
from numpyro_score.diagnostics.conservativeness import asymmetry
from numpyro_score.diagnostics.denoising_calibration import denoising_calibration
from numpyro_score.diagnostics.exactness import mark_exactness
from numpyro_score.diagnostics.fisher import (
    denoising_loss,
    fisher_divergence,
    fisher_lower_bound,
)
from numpyro_score.diagnostics.lc2st import (
    lc2st,
    lc2st_latent,
)
from numpyro_score.diagnostics.memorization import memorization
from numpyro_score.diagnostics.replicate import replicate
from numpyro_score.diagnostics.sbc import (
    sbc_ranks,
    simulation_based_calibration,
)
from numpyro_score.diagnostics.stein import kernel_stein_discrepancy
from numpyro_score.diagnostics.stein_identities import stein_identities
from numpyro_score.diagnostics.step_size_bias import (
    BAOAB,
    ULA,
    step_size_bias,
)
from numpyro_score.diagnostics.tarp import tarp
from numpyro_score.diagnostics.uniformity import (
    ecdf_band,
    plot_pit,
    uniformity_test,
)
from numpyro_score.diagnostics.verdict import mark_verdict, verdict
from numpyro_score.diagnostics.work_precision import (
    energy_distance,
    plot_work_precision,
    sliced_wasserstein,
    work_precision,
)

__all__ = [
    "BAOAB",
    "ULA",
    "ForestProtocol",
    "MLPProtocol",
    "asymmetry",
    "c2st",
    "denoising_calibration",
    "denoising_loss",
    "ecdf_band",
    "energy_distance",
    "fisher_divergence",
    "fisher_lower_bound",
    "kernel_stein_discrepancy",
    "lc2st",
    "lc2st_latent",
    "mark_exactness",
    "mark_verdict",
    "memorization",
    "plot_pit",
    "plot_work_precision",
    "replicate",
    "sbc_ranks",
    "simulation_based_calibration",
    "sliced_wasserstein",
    "stein_identities",
    "step_size_bias",
    "tarp",
    "unadjusted_bias",
    "uniformity_test",
    "verdict",
    "work_precision",
]
