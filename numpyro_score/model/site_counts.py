"""Numbers of draws about which something is wrong, for every point of some sites."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool


def no_draws(sites: Sequence[Any]) -> Array:
    """Return a count of 0 for every point, site after site.

    Args:
        sites: objects with a ``size``, which is the number of their points.
    """
    return jnp.zeros(sum(site.size for site in sites), int)


def count_draw(counts: Array, is_wrong: Sequence[Bool[Array, "..."]]) -> Array:
    """Return the counts with one more draw.

    Args:
        counts: the counts before it.
        is_wrong: whether it is, for the points of each site.
    """
    more = jnp.concatenate([part.reshape(-1) for part in is_wrong])
    return counts + more.astype(counts.dtype)


def shares_of_draws(
    counts: Any, sites: Sequence[Any], num_draws: int
) -> list[np.ndarray]:
    """Return which share of the draws was counted, for the points of each site.

    Args:
        counts: the counts; chains come first.
        sites: as in :func:`no_draws`.
        num_draws: of each chain.
    """
    counts = np.asarray(counts)
    shares = counts.reshape(-1, counts.shape[-1]).mean(0) / num_draws
    return np.split(shares, np.cumsum([site.size for site in sites])[:-1])
