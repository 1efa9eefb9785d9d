r"""The map between latents and observed sites of a model and one standardized vector.

Latents are mapped by the bijections of their supports, observed numbers as columns of a
table (:mod:`numpyro_score.data.columns`), integers dequantized. All are then put on the
unit scale, by asinh where tails are heavy (:mod:`numpyro_score.data.context_scale`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.data.columns import MAX_COARSE_WIDTH, Column, bounds_of, integers_of
from numpyro_score.data.context_scale import ContextScale
from numpyro_score.data.far_points import remoteness
from numpyro_score.data.inputs import is_real_dtype
from numpyro_score.data.support import base_constraint
from numpyro_score.infer.amortized.layout import ObservationLayout, ObservedSite
from numpyro_score.infer.amortized.sampling import check_finite
from numpyro_score.model.latents import LatentLayout, LatentSite, site_index

KINDS = "real, positive, bounded, integer or boolean numbers"
# of the simulations with one value: fewer move a probability by .01 at most
MAX_SHARE = 0.01
MIN_EQUAL = 5  # simulations with one value; two of few may be equal by rounding
MAX_NAMED = 5  # numbers of a site in one warning

Vector = Float[np.ndarray, " size"]
Vectors = Float[np.ndarray, "rows size"]
Values = dict[str, np.ndarray]  # by site, NaN where unknown


@dataclass(frozen=True, eq=False)
class JointLayout:
    """The sites of a joint law, and their map to a vector of unit scale.

    Args:
        latents: latent sites, which come first.
        observed: observed sites.
        columns: supports of all observed numbers, in order.
        scale: map of unconstrained numbers to the unit scale.
    """

    latents: LatentLayout
    observed: ObservationLayout
    columns: tuple[Column, ...]
    scale: ContextScale

    @property
    def size(self) -> int:
        """Number of numbers of the vector."""
        return self.latents.size + len(self.columns)

    @property
    def sites(self) -> tuple[LatentSite | ObservedSite, ...]:
        """All sites, latents first."""
        return (*self.latents.sites, *self.observed.sites)

    @property
    def owners(self) -> tuple[str, ...]:
        """Name of the site of each number of the vector."""
        latents = [(s.name, prod(s.unconstrained_shape)) for s in self.latents.sites]
        observed = [(s.name, prod(s.shape)) for s in self.observed.sites]
        pairs = (*latents, *observed)
        return tuple(name for name, count in pairs for _ in range(count))

    def parse(self, given: Any) -> Values:
        """Return values of all sites as floats, NaN where they are not given.

        Raises:
            TypeError: for anything but real numbers.
            ValueError: for unknown sites, other shapes, or values outside of the
                support of their site, on its edge, or infinite.
        """
        sites = {site.name: site for site in self.sites}
        if not isinstance(given, Mapping) or not set(given) <= set(sites):
            raise ValueError(
                "`given` must be a dict of values of sites that were learned, which "
                "are latent sites and those named in `observed`. Got "
                f"{list(given) if isinstance(given, Mapping) else type(given)}, "
                f"learned {list(sites)}."
            )
        return {
            name: _as_site(site, given[name])
            if name in given
            else np.full(site.shape, np.nan)
            for name, site in sites.items()
        }

    def standardize(self, values: Values) -> Vector:
        """Return the vector of parsed values; integers at the middle of their cells.

        Raises:
            ValueError: for values outside of their supports.
        """
        latents = [_unconstrain_latent(s, values[s.name]) for s in self.latents.sites]
        x = [values[site.name].ravel() for site in self.observed.sites]
        z = np.concatenate([*latents, self._unconstrain_observed(np.concatenate(x))])
        return np.asarray(self.scale.forward(jnp.asarray(z, float)), np.float64)

    def integers(self, u: Float[np.ndarray, "*rows size"]) -> np.ndarray:
        """Return the observed integers of vectors, NaN in place of real numbers."""
        z = np.asarray(self.scale.inverse(jnp.asarray(u, float)))
        return np.concatenate(
            [
                np.full((*z.shape[:-1], self.latents.size), np.nan),
                integers_of(self.columns, z[..., self.latents.size :]),
            ],
            axis=-1,
        )

    def warn_of_far(self, u: Vector, rows: Array | None) -> None:
        """Warn of known numbers of a vector that the simulations do not cover.

        Args:
            u: the vector, NaN where unknown.
            rows: vectors of simulations, None for none.
        """
        z = self.scale.inverse(jnp.asarray(u, float))
        far = np.asarray(self.scale.is_far(z))
        owners = np.array(self.owners)
        for name in dict.fromkeys(owners[far].tolist()):
            worst = np.abs(u[far & (owners == name)]).max()
            warn_caller(
                f"`given['{name}']` is far from all simulations, on which the joint "
                "law was learned: draws given it mean nothing. Compare it with draws "
                "of the prior predictive, and mend the model or its prior. Got "
                f"{worst:.3g} sd of the simulations from their mean."
            )
        known = ~np.isnan(u)
        if rows is None or far.any() or not known.any():
            return
        words = remoteness(u[known], np.asarray(rows, float)[:, known]).words
        if words:
            names = ", ".join(dict.fromkeys(owners[known].tolist()))
            warn_caller(
                f"The numbers in `given` ({names}) are together far from all "
                "simulations, though each alone is not: draws given them mean little. "
                f"Got {words}."
            )

    def constrain(self, u: Vectors, values: Values) -> dict[str, Array]:
        """Return values of all sites of vectors, with known values as they are.

        Args:
            u: vectors, one per row.
            values: from :meth:`parse`.
        """
        z = self.scale.inverse(jnp.asarray(u, float))
        size = self.latents.size
        drawn: dict[str, Any] = self.latents.unflatten(z[:, :size])
        x = np.asarray(z[:, size:], np.float64)
        with np.errstate(over="ignore"):  # infinite numbers are refused below
            parts = [c.constrain(x[:, i]) for i, c in enumerate(self.columns)]
        drawn |= self.observed.split(np.stack(parts, axis=-1), 1)
        return {
            site.name: _completed(site, values[site.name], np.asarray(drawn[site.name]))
            for site in self.sites
        }

    def _unconstrain_observed(self, x: Vector) -> Vector:
        numbers = np.split(x, len(x))  # arrays of one number
        pairs = list(zip(self.columns, numbers, strict=True))
        inside = np.concatenate([column.contains(value) for column, value in pairs])
        bad = ~inside & ~np.isnan(x)
        owners = np.array(self.owners[self.latents.size :])
        for site in self.observed.sites:
            values = x[bad & (owners == site.name)]
            if len(values):
                raise _outside(site.name, values[:MAX_NAMED], site.support)
        return np.concatenate([column.unconstrain(value) for column, value in pairs])


def observed_columns(observed: ObservationLayout) -> tuple[Column, ...]:
    """Return the supports of all numbers of the observed sites.

    Raises:
        TypeError: for constraints on more than single numbers.

    Example:
        >>> site = ObservedSite("y", (2,), "int32")
        >>> observed_columns(ObservationLayout((site,)))[1]
        Column(name='y[1]', low=-inf, high=inf, is_integer=True, is_coarse=False)
    """
    return tuple(column for site in observed.sites for column in _columns(site))


def _columns(site: ObservedSite) -> list[Column]:
    is_integer = not jnp.issubdtype(site.dtype, jnp.floating)
    bounds: Any = (0, 1) if site.dtype == "bool" else (-np.inf, np.inf)
    if site.support is not None:
        base = base_constraint(site.support)
        bounds, is_integer = bounds_of(base), bool(base.is_discrete)
    if bounds is None:
        raise TypeError(
            f"Site '{site.name}' must hold {KINDS}, each with a support of its own. "
            "Leave it out of `observed`, or observe functions of it, by "
            f"`numpyro.deterministic`. Got the support {site.support}."
        )
    low, high = (np.broadcast_to(np.asarray(e, float), site.shape) for e in bounds)
    is_coarse = is_integer & (high - low <= MAX_COARSE_WIDTH)
    return [
        Column(
            site_index(site.name, i),
            float(low[i]),
            float(high[i]),
            is_integer,
            bool(is_coarse[i]),
        )
        for i in np.ndindex(*site.shape)
    ]


def check_densities(names: tuple[str, ...], rows: Vectors) -> None:
    """Raise for numbers with the same value in many simulations.

    Raises:
        ValueError: naming them.
    """
    least = max(MIN_EQUAL, MAX_SHARE * len(rows))
    counts = [np.unique(column, return_counts=True)[1].max() for column in rows.T]
    atoms = [n for n, count in zip(names, counts, strict=True) if count > least]
    if atoms:
        raise ValueError(
            "The sites must have a density, but these numbers have the same value in "
            "many simulations, as constants or cut off numbers have. Leave their sites "
            f"out of the model's latents and of `observed`. Got {atoms[:MAX_NAMED]}, "
            f"in all {len(atoms)} of {len(names)} numbers."
        )


def _as_site(site: LatentSite | ObservedSite, given: Any) -> np.ndarray:
    """Return given values of one site as floats, of its shape."""
    if np.ma.isMaskedArray(given):
        given = np.ma.filled(given.astype(float), np.nan)
    if is_traced(given):
        raise TypeError(
            f"`given['{site.name}']` must be numbers, not traced: which are given is "
            "read before anything is compiled. Call `sample` outside of jit and vmap."
        )
    if not _is_real(given):
        raise TypeError(
            f"`given['{site.name}']` must be real numbers, NaN where unknown. "
            f"Got {given!r:.80}."
        )
    values = np.array(given, float)
    if values.shape != site.shape:
        raise ValueError(
            f"`given['{site.name}']` must have the shape that the site has in the "
            "model, with NaN where it is unknown. "
            f"Got {values.shape}, expected {site.shape}."
        )
    return values


def _is_real(given: Any) -> bool:
    try:
        dtype: Any = getattr(given, "dtype", np.asarray(given).dtype)
    except ValueError:  # lists of unequal lengths
        return False
    return is_real_dtype(dtype)


def _unconstrain_latent(site: LatentSite, value: np.ndarray) -> Vector:
    """Return z of one latent site, NaN where it is unknown."""
    known = ~np.isnan(value)
    event_ndims = base_constraint(site.support.constraint).event_dim
    batch = value.shape[: value.ndim - event_ndims]
    whole = known.reshape(prod(batch), -1)
    if (whole.any(1) != whole.all(1)).any():
        raise ValueError(
            f"`given['{site.name}']` must be known or unknown as a whole: its support, "
            f"{site.support.name}, ties its numbers together. "
            f"Got NaN at {int((~known).sum())} of {value.size} numbers."
        )
    inside = site.support.constrain(jnp.zeros(site.unconstrained_shape))
    filled = jnp.where(known, value, inside)
    z = np.array(site.support.unconstrain(filled), float)
    if not (bool(site.support.constraint(filled)) and np.isfinite(z).all()):
        raise _outside(site.name, value[known][:MAX_NAMED], site.support.constraint)
    flat = z.reshape(prod(batch), -1)
    return np.where(whole.all(1)[:, None], flat, np.nan).ravel()


def _outside(name: str, values: Any, support: Any) -> ValueError:
    return ValueError(
        f"`given['{name}']` must be finite and inside of the support of its site, not "
        "on its edge, or NaN where it is unknown. "
        f"Got {np.asarray(values).tolist()}, support {support}."
    )


def _completed(
    site: LatentSite | ObservedSite, known: np.ndarray, drawn: np.ndarray
) -> Array:
    """Return draws of one site, in its type, with its known values."""
    kept = site.dtype if isinstance(site, ObservedSite) else "float64"
    dtype = jax.dtypes.canonicalize_dtype(kept)  # a file may be of double precision
    values = np.where(np.isnan(known), drawn, known)
    check_finite(jnp.asarray((np.abs(values) <= _largest(dtype)).all()))
    return jnp.asarray(values, dtype)


def _largest(dtype: Any) -> float:
    if jnp.issubdtype(dtype, jnp.bool_):
        return 1.0
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return float((jnp.finfo if is_float else jnp.iinfo)(dtype).max)
