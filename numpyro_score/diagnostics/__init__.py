"""How far to trust a learned score and what was drawn with it."""

from numpyro_score.diagnostics.c2st import (
    C2STProtocol,
    C2STResult,
    ForestProtocol,
    MLPProtocol,
    c2st,
)
from numpyro_score.diagnostics.lc2st import LC2STResult, lc2st, lc2st_latent
from numpyro_score.diagnostics.memorization import MemorizationResult, memorization
from numpyro_score.diagnostics.replicate import Replications, replicate
from numpyro_score.diagnostics.sbc import (
    SBCResult,
    sbc_ranks,
    simulation_based_calibration,
)
from numpyro_score.diagnostics.tarp import TARPResult, tarp
from numpyro_score.diagnostics.uniformity import (
    ECDFBand,
    UniformityTest,
    ecdf_band,
    pit_datatree,
    plot_pit,
    uniformity_test,
)
from numpyro_score.solver.quality import energy_distance, sliced_wasserstein

__all__ = [
    "C2STProtocol",
    "C2STResult",
    "ECDFBand",
    "ForestProtocol",
    "LC2STResult",
    "MLPProtocol",
    "MemorizationResult",
    "Replications",
    "SBCResult",
    "TARPResult",
    "UniformityTest",
    "c2st",
    "ecdf_band",
    "energy_distance",
    "lc2st",
    "lc2st_latent",
    "memorization",
    "pit_datatree",
    "plot_pit",
    "replicate",
    "sbc_ranks",
    "simulation_based_calibration",
    "sliced_wasserstein",
    "tarp",
    "uniformity_test",
]
