"""The map between latent sites of a model and one vector in unconstrained space."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import check_kind, check_numbers
from numpyro_score.data.support import Support

Values = Mapping[str, Any]  # constrained values by site


@dataclass(frozen=True)
class LatentSite:
    """One latent site: its name, support and shape, plates included."""

    name: str
    support: Support
    shape: tuple[int, ...]

    @property
    def unconstrained_shape(self) -> tuple[int, ...]:
        """Shape in unconstrained space."""
        return self.support.unconstrained_shape(self.shape)

    def batch(self, value: Array) -> tuple[int, ...]:
        """Return the batch shape of values of this site.

        Raises:
            ValueError: if the shape does not end with the site's.
        """
        rank = jnp.ndim(value) - len(self.shape)
        if rank < 0 or jnp.shape(value)[rank:] != self.shape:
            raise ValueError(
                f"`samples` of site '{self.name}' must end with the shape that the "
                f"site has in the model. Got {jnp.shape(value)}, expected "
                f"(..., *{self.shape})."
            )
        return jnp.shape(value)[:rank]


@dataclass(frozen=True)
class LatentLayout:
    """The map from latent sites to one vector z in unconstrained space.

    Each site is mapped by the bijection of its support and flattened; z is their
    concatenation in order. Hashable and comparable by value.

    Example:
        >>> from numpyro.distributions import constraints
        >>> scale = LatentSite("s", Support.of(constraints.positive, (2,)), (2,))
        >>> latents = LatentLayout((scale,))
        >>> z = latents.flatten({"s": jnp.array([1.0, 2.0])})
        >>> [round(float(v), 3) for v in latents.unflatten(z)["s"]]
        [1.0, 2.0]
    """

    sites: tuple[LatentSite, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites, in order."""
        return tuple(site.name for site in self.sites)

    @property
    def size(self) -> int:
        """The dimension of z."""
        return sum(prod(site.unconstrained_shape) for site in self.sites)

    def flatten(self, values: Values) -> Float[Array, "*batch size"]:
        """Return z for constrained values of the sites with equal batch shapes.

        Raises:
            ValueError: for missing or unknown sites, or other shapes.
        """
        if set(values) != set(self.names):
            raise ValueError(
                "`samples` must hold exactly the sites whose posterior was learned. "
                f"Got {sorted(values)}, expected {sorted(self.names)}."
            )
        arrays = {site.name: jnp.asarray(values[site.name]) for site in self.sites}
        batches = {site.name: site.batch(arrays[site.name]) for site in self.sites}
        if len(set(batches.values())) > 1:
            raise ValueError(
                "`samples` must have as many draws of every site. "
                f"Got batches of shapes {batches}."
            )
        parts = []
        for site in self.sites:
            z = site.support.unconstrain(arrays[site.name])
            parts.append(z.reshape(*batches[site.name], -1))
        return jnp.concatenate(parts, -1)

    def unconstrained(self, z: Float[Array, "*batch size"]) -> dict[str, Array]:
        """Return the unconstrained value of every site, the parts of z."""
        sizes = [prod(site.unconstrained_shape) for site in self.sites]
        parts = jnp.split(z, np.cumsum(sizes)[:-1], axis=-1)
        return {
            site.name: part.reshape(*z.shape[:-1], *site.unconstrained_shape)
            for site, part in zip(self.sites, parts, strict=True)
        }

    def unflatten(self, z: Float[Array, "*batch size"]) -> dict[str, Array]:
        """Return the constrained value of every site."""
        parts = self.unconstrained(z)
        return {site.name: site.support.constrain(parts[site.name]) for site in self}

    def log_abs_det_jacobian(
        self, z: Float[Array, "*batch size"]
    ) -> Float[Array, "*batch"]:
        """Return ``log |d values / d z|``, in nats."""
        parts = self.unconstrained(z)
        terms = []
        for site in self.sites:
            part = parts[site.name]
            terms.append(
                site.support.log_abs_det_jacobian(part, site.support.constrain(part))
            )
        return sum(terms, jnp.zeros(z.shape[:-1]))

    def in_support(self, values: Values) -> Array:
        """Return for each point whether all sites are in their supports."""
        checks = [site.support.constraint(values[site.name]) for site in self.sites]
        return jnp.stack(checks).all(0)

    def __iter__(self) -> Any:
        return iter(self.sites)


def as_values(name: str, values: Mapping[str, Any]) -> Values:
    """Return values of sites as arrays, after checking that they are numbers.

    Args:
        name: the argument's name, for the error.
        values: values by site.

    Raises:
        TypeError: for anything but a dict.
        ValueError: for values that are no real numbers, or behind a mask.

    Example:
        >>> as_values("samples", {"x": [1.0, 2.0]})["x"].shape
        (2,)
    """
    check_kind(name, values, Mapping, "a dict of arrays by site")
    for site, value in values.items():
        check_numbers(f"{name}['{site}']", value, "values of a site")
    return {site: jnp.asarray(value) for site, value in values.items()}


def site_index(name: str, index: tuple[int, ...]) -> str:
    """Return the name of one number of a site.

    Example:
        >>> site_index("y", (0, 2)), site_index("s", ())
        ('y[0, 2]', 's')
    """
    return f"{name}[{', '.join(map(str, index))}]" if index else name
