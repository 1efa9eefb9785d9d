"""Times of the noise levels that annealed samplers go down."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import jax
import jax.numpy as jnp

from numpyro_score.checks import count_levels, is_integer, is_traced
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.schedule import geometric
from numpyro_score.score.model import LEVEL_ROUNDING
from numpyro_score.sde import SDE
from numpyro_score.typing import Time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteTime:
    """The time of a learned site, and the process that it is a time of."""

    t: Time
    sde: SDE = field(metadata={"static": True})

    @classmethod
    def of(cls, learned: dict[str, ScoreDistribution]) -> dict[str, "SiteTime"]:
        """Return the times of learned sites, by name."""
        return {name: cls(law.t, law.score.sde) for name, law in learned.items()}


def level_times(
    levels: int | Sequence[float], learned: dict[str, SiteTime]
) -> tuple[float, ...]:
    """Return the times of the levels, from the highest of the learned sites down.

    Raises:
        ValueError: if noise levels do not decrease, or learned sites have different
            processes, or a time is traced.
    """
    if not learned:
        return (0.0,) * (1 + count_levels(levels))
    sites = learned.values()
    sdes = {site.sde for site in sites}
    if len(sdes) > 1:
        raise ValueError(
            "Learned sites of one model must share one noise process, so that a time "
            f"means the same noise for all. Got {sorted(map(str, sdes))}."
        )
    sde = sdes.pop()
    lowest = min(_known_time(name, site) for name, site in learned.items())
    with jax.ensure_compile_time_eval():
        end = float(sde.noise_level(lowest))
        if is_integer(levels):
            count = count_levels(levels)
            grid = geometric(end, sde.sigma_max, count + 1)[1:-1]
        else:
            grid = jnp.asarray(levels, float)
            _check_range(grid.tolist(), end, sde)
        if any(a <= b for a, b in pairwise(grid.tolist())):
            raise ValueError(
                "`levels` must decrease: they go from much noise to little. "
                f"Got {grid.tolist()}."
            )
        inner = [float(t) for t in sde.time(grid)]
    inner = [t for t in inner if lowest < t < sde.t_max]
    return (sde.t_max, *inner, lowest)


def _known_time(name: str, site: SiteTime) -> float:
    """Return the time of a site as a number that is a time of its process."""
    if is_traced(site.t):
        raise ValueError(
            f"`t` of learned site '{name}' must be known before sampling: noise levels "
            "go down to it. Call the sampler outside of `jax.jit` and `jax.vmap`, or "
            f"make `t` a constant there. Got {site.t}."
        )
    site.sde.check_time("t", site.t)
    return float(site.t)


def _check_range(grid: list[float], lowest: float, sde: SDE) -> None:
    """Raise for levels that are all below the site's, or above the highest."""
    if (
        max(grid) > LEVEL_ROUNDING * sde.sigma_max
        or max(grid) < lowest / LEVEL_ROUNDING
    ):
        raise ValueError(
            "`levels` must lie between the level of the learned sites and the highest "
            "of their process, in units of the data's sd: beyond it no law was "
            f"learned. Got {grid}, levels {lowest:.4g} to {sde.sigma_max:.4g}."
        )
