"""Numbers of draws about which something is wrong, for every point of some sites."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool


@dataclass(frozen=True)
class SiteCounts:
    """Number of draws about which something is wrong, for every point of every site.

    Methods return objects of the subclass.

    Args:
        counts: one number for each point, site after site; chains come first.
        sites: objects with a ``size``, which is the number of their points.
    """

    counts: Any
    sites: tuple[Any, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, sites: tuple[Any, ...]) -> Any:
        """Return counts of no draws; None if there are no sites.

        Args:
            sites: as in the class.
        """
        if not sites:
            return None
        return cls(jnp.zeros(sum(site.size for site in sites), int), sites)

    def restart(self, due: Bool[Array, ""]) -> Any:
        """Return no draws if due, else the same."""
        return replace(self, counts=jnp.where(due, 0, self.counts))

    def count(self, is_wrong: Sequence[Bool[Array, "..."]]) -> Any:
        """Return the counts with one more draw.

        Args:
            is_wrong: whether it is, for the points of each site.
        """
        more = jnp.concatenate([part.reshape(-1) for part in is_wrong])
        return replace(self, counts=self.counts + more.astype(self.counts.dtype))

    def shares(self, num_draws: int) -> list[np.ndarray]:
        """Return which share of the draws was counted, for the points of each site.

        Args:
            num_draws: of each chain.
        """
        counts = np.asarray(self.counts)
        shares = counts.reshape(-1, counts.shape[-1]).mean(0) / num_draws
        return np.split(shares, np.cumsum([site.size for site in self.sites])[:-1])
