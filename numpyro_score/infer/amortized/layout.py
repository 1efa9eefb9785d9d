"""Maps between the sites of a model and vectors: latents z and observations y."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from numpyro_score.checks import check_unmasked
from numpyro_score.data.support import Support
from numpyro_score.io.config import to_config

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
        parts = []
        for site in self.sites:
            value = jnp.asarray(values[site.name])
            batch = site.batch(value)
            parts.append(site.support.unconstrain(value).reshape(*batch, -1))
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
        """Return log |d values / d z|, in nats."""
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

    def to_config(self) -> list[dict[str, Any]]:
        """Return a JSON description."""
        return [
            {
                "name": site.name,
                "shape": list(site.shape),
                **to_config(site.support),
            }
            for site in self.sites
        ]

    def __iter__(self) -> Any:
        return iter(self.sites)


@dataclass(frozen=True)
class ObservedSite:
    """One observed site: its name, shape and dtype, and its support if it has one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    support: Any = field(default=None, compare=False)  # a constraint of NumPyro


@dataclass(frozen=True)
class ObservationLayout:
    """The map from observed sites to one array, the context of the score.

    A single site keeps its shape, for nets of images or sets; several sites are
    flattened and concatenated.

    Example:
        >>> observed = ObservationLayout((ObservedSite("y", (2,), "float32"),))
        >>> observed.parse([1, 2]).tolist()
        [1.0, 2.0]
    """

    sites: tuple[ObservedSite, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites, in order."""
        return tuple(site.name for site in self.sites)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the context."""
        if len(self.sites) == 1:
            return self.sites[0].shape
        return (sum(prod(site.shape) for site in self.sites),)

    def flatten(self, values: Values) -> Float[Array, "..."]:
        """Return the context of one value per site."""
        floats = [jnp.asarray(values[name], float) for name in self.names]
        if len(floats) == 1:
            return floats[0]
        return jnp.concatenate([value.ravel() for value in floats])

    def unflatten(self, context: Float[Array, "..."]) -> dict[str, Array]:
        """Return the value of every site from one context."""
        sizes = [prod(site.shape) for site in self.sites]
        parts = jnp.split(jnp.ravel(context), np.cumsum(sizes)[:-1])
        return {
            site.name: part.reshape(site.shape).astype(site.dtype)
            for site, part in zip(self.sites, parts, strict=True)
        }

    def split(self, context: ArrayLike, batch_ndims: int = 0) -> dict[str, np.ndarray]:
        """Return the part of every site of a context, or of numbers shaped like one.

        Args:
            context: an array of the shape of the context.
            batch_ndims: number of batch dimensions before that.
        """
        array = np.asarray(context)
        batch = array.shape[:batch_ndims]
        ends = np.cumsum([prod(site.shape) for site in self.sites])[:-1]
        parts = np.split(array.reshape((*batch, prod(self.shape))), ends, axis=-1)
        return {
            site.name: part.reshape((*batch, *site.shape))
            for site, part in zip(self.sites, parts, strict=True)
        }

    def parse(
        self, observation: ArrayLike | Values | list, *, batch_ndims: int = 0
    ) -> Float[Array, "..."]:
        """Return the context of an observation after checking it.

        Args:
            observation: an array for one observed site, or a dict of arrays by site.
            batch_ndims: number of batch dimensions before the sites' shapes.

        Raises:
            ValueError: for unknown or missing sites, other shapes than in the model,
                or values that are not finite.
        """
        if not isinstance(observation, Mapping):
            self._check_single_site()
            observation = {self.names[0]: observation}
        if set(observation) != set(self.names):
            raise ValueError(
                "`observation` must hold exactly the observed sites. "
                f"Got {sorted(observation)}, expected {sorted(self.names)}."
            )
        values = {
            site.name: _check_observation(site, observation[site.name], batch_ndims)
            for site in self.sites
        }
        if len(self.sites) == 1:
            return values[self.names[0]]
        flat = [v.reshape(*v.shape[:batch_ndims], -1) for v in values.values()]
        return jnp.concatenate(flat, -1)

    def to_config(self) -> list[dict[str, Any]]:
        """Return a JSON description."""
        return [
            {"name": site.name, "shape": list(site.shape), "dtype": site.dtype}
            for site in self.sites
        ]

    def _check_single_site(self) -> None:
        if len(self.sites) > 1:
            raise ValueError(
                "`observation` must be a dict of arrays by site, because several sites "
                f"are observed: {sorted(self.names)}. Got an array."
            )


def _check_observation(site: ObservedSite, observation: Any, batch_ndims: int) -> Array:
    """Return one site's observation as floats after checking it."""
    name = f"observation['{site.name}']"
    check_unmasked(name, observation)
    kind: Any = getattr(observation, "dtype", np.asarray(observation).dtype)
    if not any(jnp.issubdtype(kind, k) for k in (jnp.floating, jnp.integer, jnp.bool_)):
        raise ValueError(
            f"`{name}` must be real numbers: it is what the model simulates. "
            f"Got {kind}."
        )
    value = jnp.asarray(observation, float)
    if value.ndim < batch_ndims or value.shape[batch_ndims:] != site.shape:
        leading = "" if batch_ndims == 0 else "one observation per row, each "
        raise ValueError(
            f"`observation` of site '{site.name}' must be {leading}of the shape that "
            f"the model simulates. Got {value.shape}, expected "
            f"{'(rows, *)' if batch_ndims else ''}{site.shape}."
        )
    if not jnp.isfinite(value).all():
        bad = int((~jnp.isfinite(value)).sum())
        raise ValueError(
            f"`observation` of site '{site.name}' must be finite: the posterior was "
            "learned from simulations without NaN or inf. To condition on part of an "
            "observation, let the model simulate that part alone. "
            f"Got {bad} of {value.size} numbers that are not finite."
        )
    return value
