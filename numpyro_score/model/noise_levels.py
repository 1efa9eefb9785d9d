"""Times of the noise levels that annealed samplers go down."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.schedule import geometric


def level_times(
    levels: int | Sequence[float], learned: dict[str, ScoreDistribution]
) -> tuple[float, ...]:
    """Return the times of the levels, from the highest of the learned sites down.

    Raises:
        ValueError: if noise levels do not decrease, or learned sites have different
            processes.
    """
    if not learned:
        return (0.0,) * (1 + (levels if isinstance(levels, int) else len(levels)))
    sites = learned.values()
    sdes = {site.score.sde for site in sites}
    if len(sdes) > 1:
        raise ValueError(
            "Learned sites of one model must share one noise process, so that a time "
            f"means the same noise for all. Got {sorted(map(str, sdes))}."
        )
    sde = sdes.pop()
    lowest = min(float(site.t) for site in sites)
    with jax.ensure_compile_time_eval():
        if isinstance(levels, int):
            end = float(sde.noise_level(lowest))
            grid = geometric(end, sde.sigma_max, levels + 1)[1:-1]
        else:
            grid = jnp.asarray(levels)
        _check_decreasing(grid.tolist())
        inner = [float(t) for t in sde.time(grid)]
    inner = [t for t in inner if lowest < t < sde.t_max]
    return (sde.t_max, *inner, lowest)


def _check_decreasing(grid: list[float]) -> None:
    if any(a <= b for a, b in pairwise(grid)):
        raise ValueError(
            f"`levels` must decrease: they go from much noise to little. Got {grid}."
        )
