r"""Draws whose values are rounded to the end of their support.

A site is sampled as z in unconstrained space, with the value :math:`x = T(z)`. A number
:math:`x = 1 / (1 + e^{-z})` of single precision is 1 beyond z = 16: the model sees no
more of z there, and a density that falls slowly, such as that of a Beta law with a
small parameter, is cut off. The chain is right for what is left, so no other check sees
it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from numpyro.distributions.transforms import IdentityTransform

from numpyro_score.model.site_counts import SiteCounts
from numpyro_score.run_verdict import Finding

# of z: a density that falls by e per unit is off by a tenth, as MAX_ROUNDING_NATS
MAX_ROUNDING = 0.1
# of the draws; a tail e^(-z/10) with 1 % beyond where it is rounded loses about 2 %
MAX_ROUNDED = 0.01
REMEDY = (
    "The density is cut off where values are rounded to the end of their support. Use "
    'double precision, jax.config.update("jax_enable_x64", True), which moves the end '
    "further out, a prior with less mass at the ends, or a site of the logarithm or "
    "logit in its place, with a likelihood that takes it."
)


@dataclass(frozen=True)
class RoundedSite:
    """A latent site with a bounded support; no arrays.

    - **name**: of the site.
    - **size**: number of its latents in unconstrained space.
    """

    name: str
    size: int


def rounded_numbers(transform: Any, z: Array) -> Bool[Array, "..."]:
    r"""Return for which numbers of z the value of the site does not tell what they are.

    They are those with :math:`|T^{-1}(T(z)) - z| > 0.1`, of the shape of z.

    Args:
        transform: T, from unconstrained space to the support.
        z: latents of the site, in unconstrained space.
    """
    back = jnp.reshape(transform.inv(transform(z)), z.shape)
    return ~(jnp.abs(back - z) <= MAX_ROUNDING)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoundedCounts(SiteCounts):
    """Number of draws that are rounded, for every latent of every bounded site."""

    @classmethod
    def zero(cls, potential: Any) -> "RoundedCounts | None":
        """Return no draws of the sites of a potential; None if none is bounded.

        Args:
            potential: of a model.
        """
        transforms = getattr(potential, "transforms", None)
        if not transforms:
            return None
        sites = tuple(
            RoundedSite(name, int(np.size(z)))
            for name, z in potential.prototype.items()
            if name in transforms and _can_round(transforms[name], z)
        )
        return cls.of(sites)

    def add(self, potential: Any, z: Any) -> "RoundedCounts":
        """Return the numbers with one more draw.

        Args:
            potential: of the model.
            z: the draw, in unconstrained space.
        """
        transforms = potential.transforms
        found = [rounded_numbers(transforms[s.name], z[s.name]) for s in self.sites]
        return self.count(found)

    def findings(self, num_draws: int) -> list[Finding]:
        """Return a finding for the site whose values are rounded most often, or none.

        Args:
            num_draws: of each chain.
        """
        worst = [float(part.max(initial=0)) for part in self.shares(num_draws)]
        share, site = max(zip(worst, self.sites, strict=True), key=lambda pair: pair[0])
        if share <= MAX_ROUNDED:
            return []
        what = (
            f"the share of draws of site '{site.name}' that are rounded to the end of "
            "its support"
        )
        return [Finding("rounded", what, share, MAX_ROUNDED, REMEDY)]


def _can_round(transform: Any, z: Any) -> bool:
    """Return whether a transform has an inverse, and is not the identity."""
    base = transform
    while hasattr(base, "base_transform"):
        base = base.base_transform
    if isinstance(base, IdentityTransform):
        return False
    try:
        jax.eval_shape(lambda z: transform.inv(transform(z)), z)
    except NotImplementedError:
        return False
    return True
