"""How far to trust a learned score and what was drawn with it."""

from numpyro_score.diagnostics.c2st import (
    C2STProtocol,
    C2STResult,
    ForestProtocol,
    MLPProtocol,
    c2st,
)
from numpyro_score.solver.quality import energy_distance, sliced_wasserstein

__all__ = [
    "C2STProtocol",
    "C2STResult",
    "ForestProtocol",
    "MLPProtocol",
    "c2st",
    "energy_distance",
    "sliced_wasserstein",
]
