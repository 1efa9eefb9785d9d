"""The map between observed sites of a model and one array, the context of a score."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from numpyro_score.checks import check_unmasked, is_traced
from numpyro_score.data.support import Support
from numpyro_score.model.latents import Values


@dataclass(frozen=True)
class ObservedSite:
    """One observed site: its name, shape and dtype, and its support if it has one.

    With ``unconstrain``, a support, the context holds the site's unconstrained value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    support: Any = field(default=None, compare=False)  # a constraint of NumPyro
    unconstrain: Support | None = None

    @property
    def context_shape(self) -> tuple[int, ...]:
        """The shape of the site's part of the context."""
        if self.unconstrain is None:
            return self.shape
        return self.unconstrain.unconstrained_shape(self.shape)

    def to_context(self, value: Array) -> Array:
        """Return the part of the context of a value."""
        return (
            value if self.unconstrain is None else self.unconstrain.unconstrain(value)
        )

    def to_value(self, context: Array) -> Array:
        """Return the value of a part of the context."""
        if self.unconstrain is None:
            return context
        return self.unconstrain.constrain(context)


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
            return self.sites[0].context_shape
        return (sum(self._sizes),)

    @property
    def _sizes(self) -> list[int]:
        return [prod(site.context_shape) for site in self.sites]

    def flatten(self, values: Values) -> Float[Array, "..."]:
        """Return the context of one value per site."""
        floats = [
            site.to_context(jnp.asarray(values[site.name], float))
            for site in self.sites
        ]
        if len(floats) == 1:
            return floats[0]
        return jnp.concatenate([value.ravel() for value in floats])

    def unflatten(self, context: Float[Array, "..."]) -> dict[str, Array]:
        """Return the value of every site from one context."""
        parts = jnp.split(jnp.ravel(context), np.cumsum(self._sizes)[:-1])
        return {
            site.name: site.to_value(part.reshape(site.context_shape)).astype(
                site.dtype
            )
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
        ends = np.cumsum(self._sizes)[:-1]
        parts = np.split(array.reshape((*batch, prod(self.shape))), ends, axis=-1)
        return {
            site.name: part.reshape((*batch, *site.context_shape))
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
            self.check_single_site()
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
            | ({"unconstrained": True} if site.unconstrain is not None else {})
            for site in self.sites
        ]

    def check_single_site(self) -> None:
        """Raise for an array in the place of observations of several sites."""
        if len(self.sites) > 1:
            raise ValueError(
                "`observation` must be a dict of arrays by site, because several sites "
                f"are observed: {sorted(self.names)}. Got an array."
            )


def _check_observation(site: ObservedSite, observation: Any, batch_ndims: int) -> Array:
    """Return one site's observation as floats after checking it."""
    name = f"observation['{site.name}']"
    check_unmasked(name, observation)
    kind: Any = _dtype(site.name, observation)
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
    if 0 in value.shape[:batch_ndims]:
        raise ValueError(
            f"`observation` of site '{site.name}' must have at least one row: each is "
            f"one observation. Got {value.shape}."
        )
    return site.to_context(value) if is_traced(value) else _finite_context(site, value)


def _finite_context(site: ObservedSite, value: Array) -> Array:
    """Return the context of one site after checking that it is finite."""
    if not jnp.isfinite(value).all():
        bad = int((~jnp.isfinite(value)).sum())
        raise ValueError(
            f"`observation` of site '{site.name}' must be finite: the posterior was "
            "learned from simulations without NaN or inf. To condition on part of an "
            "observation, let the model simulate that part alone. "
            f"Got {bad} of {value.size} numbers that are not finite."
        )
    context = site.to_context(value)
    if not jnp.isfinite(context).all():
        raise ValueError(
            f"`observation` of site '{site.name}' must be inside of the support that "
            f"the site has in the model. Got values from {value.min()} to "
            f"{value.max()}."
        )
    return context


def _dtype(name: str, observation: Any) -> Any:
    """Return the dtype of an observation.

    Raises:
        ValueError: for nested lists of unequal lengths.
    """
    if hasattr(observation, "dtype"):
        return observation.dtype
    try:
        return np.asarray(observation).dtype
    except ValueError as error:
        raise ValueError(
            f"`observation` of site '{name}' must be one array: the posterior is "
            f"learned for the shape that the model simulates. Got {error}"
        ) from error
