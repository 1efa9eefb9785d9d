r"""The likelihood of a model at one point: whitened residuals, and everything else.

A Normal site with location f(x), scale s and weight w (of masks, plates and handlers)
has the whitened residual :math:`e = \sqrt w\, (y - f(x)) / s`, so that its log
likelihood is :math:`-|e|^2/2 - w \log s` up to a constant. That is all that is needed
to widen it by the uncertainty of x.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

SQUARED_SCALE_PER_VARIANCE = {  # 1 where tails have none
    dist.Normal: 1.0,
    dist.StudentT: 1.0,
    dist.Cauchy: 1.0,
    dist.Laplace: 0.5,
    dist.Logistic: 3 / math.pi**2,
}


class WhitenedResiduals(NamedTuple):
    """Residuals of a site, whitened and not, and its log normalizer but a constant."""

    residual: Float[Array, " m"]
    error: Float[Array, " m"]
    log_scale: Float[Array, ""]


class NormalSite(NamedTuple):
    """The numbers of an observed Normal site, flat; see :func:`normal_site`."""

    loc: Float[Array, " m"]
    scale: Float[Array, " m"]
    weight: Float[Array, " m"]
    value: Float[Array, " m"]


def normal_site(site: dict[str, Any]) -> NormalSite | None:
    """Return location, scale, weight and value of a Normal site; None for others.

    Example:
        >>> site = {"fn": dist.Normal(1.0, 2.0), "value": jnp.array([5.0])}
        >>> normal_site(site).loc.tolist()
        [1.0]
    """
    base, mask = _unwrap(site["fn"])
    if not isinstance(base, dist.Normal):
        return None
    value = jnp.asarray(site["value"], float)
    weight = _weight(site, mask, value)
    parts = (base.loc, base.scale, weight, value)
    return NormalSite(
        *(jnp.broadcast_to(part, value.shape).reshape(-1) for part in parts)
    )


def is_gaussian(site: dict[str, Any]) -> bool:
    """Return whether an observed site is Normal, or is after a logarithm."""
    base, mask = _unwrap(site["fn"])
    if isinstance(base, dist.MultivariateNormal):
        return mask is None and site.get("scale") is None
    return isinstance(base, dist.Normal | dist.LogNormal)


def whitened_residuals(site: dict[str, Any]) -> WhitenedResiduals:
    """Return the residuals of a site for which :func:`is_gaussian` holds.

    Example:
        >>> site = {"fn": dist.Normal(1.0, 2.0), "value": jnp.array([5.0])}
        >>> whitened_residuals(site).residual
        Array([2.], dtype=float32)
    """
    base, mask = _unwrap(site["fn"])
    value = jnp.asarray(site["value"])
    if isinstance(base, dist.MultivariateNormal):
        return _whiten_vector(base, value)
    if isinstance(base, dist.LogNormal):
        value = jnp.log(value)
    scale = jnp.broadcast_to(base.scale, value.shape)
    weight = _weight(site, mask, value)
    used = weight > 0
    # a missing value may be NaN behind its mask
    error = jnp.where(used, value - base.loc, 0.0)
    residual = (error / scale * jnp.sqrt(weight)).reshape(-1)
    return WhitenedResiduals(
        residual, error.reshape(-1), -jnp.sum(weight * jnp.log(scale))
    )


def is_location_scale(site: dict[str, Any]) -> bool:
    """Return whether an observed site has a location and scale that can be widened.

    Student, Cauchy, Laplace and logistic laws, and mixtures of these or of Normal laws.

    Example:
        >>> is_location_scale({"fn": dist.Cauchy(0.0, 1.0)})
        True
    """
    law, _ = _unwrap(site["fn"])
    if isinstance(law, dist.MixtureSameFamily):
        law = law.component_distribution
    return isinstance(law, tuple(SQUARED_SCALE_PER_VARIANCE)) and not is_gaussian(site)


def location(site: dict[str, Any]) -> Float[Array, "..."]:
    """Return the location of each number, or component, of a location-scale site."""
    base, _ = _unwrap(site["fn"])
    if isinstance(base, dist.MixtureSameFamily):
        shape = *jnp.shape(site["value"]), base.mixture_size
        loc = base.component_distribution.loc
    else:
        shape, loc = jnp.shape(site["value"]), base.loc
    return jnp.broadcast_to(jnp.asarray(loc, float), shape)


def widened_log_likelihood(
    site: dict[str, Any],
    variance: Float[Array, "..."],
    shift: Float[Array, "..."] | float = 0.0,
) -> Float[Array, ""]:
    """Return the log likelihood if the location is uncertain by some variance v.

    The scale s becomes :math:`(s^2 + a v)^{1/2}`, where a is such that the variance
    grows by v, and 1 for Student laws. The tails stay.

    Args:
        site: see :func:`is_location_scale`.
        variance: of each :func:`location`.
        shift: of the mean of each.
    """
    base, mask = _unwrap(site["fn"])
    value = jnp.asarray(site["value"], float)
    weight = _weight(site, mask, value)
    # a missing value may be NaN behind its mask
    value = jnp.where(weight > 0, value, 0.0)
    return jnp.sum(weight * _widened_log_prob(base, variance, shift, value))


def log_likelihood(site: dict[str, Any]) -> Float[Array, ""]:
    """Return the log likelihood of any observed site, with its scale."""
    return jnp.sum(log_likelihoods_of(site))


def log_likelihoods_of(site: dict[str, Any]) -> Float[Array, "..."]:
    """Return the log likelihood of each number, or event, of an observed site.

    Example:
        >>> site = {"fn": dist.Poisson(jnp.ones(2)).to_event(1), "value": jnp.zeros(2)}
        >>> log_likelihoods_of(site).tolist()
        [-1.0, -1.0]
    """
    law = site["fn"]
    while isinstance(law, dist.Independent):
        law = law.base_dist
    scale = 1.0 if site.get("scale") is None else site["scale"]
    log_prob = law.log_prob(site["value"])
    return jnp.asarray(_fit(scale, site["fn"].event_dim - law.event_dim) * log_prob)


def _widened_log_prob(
    law: Any, variance: Array, shift: Array | float, value: Array
) -> Array:
    """Return log densities of a location-scale law, or a mixture, of larger scale."""
    if isinstance(law, dist.MixtureSameFamily):
        log_shares = jax.nn.log_softmax(law.mixing_distribution.logits)
        part = law.component_distribution
        parts = _widened_log_prob(part, variance, shift, value[..., None])
        return jax.nn.logsumexp(log_shares + parts, axis=-1)
    share = next(s for k, s in SQUARED_SCALE_PER_VARIANCE.items() if isinstance(law, k))
    scale = jnp.sqrt(jnp.square(law.scale) + share * variance)
    degrees = (law.df,) if isinstance(law, dist.StudentT) else ()
    wider = type(law)(*degrees, law.loc + shift, scale, validate_args=False)
    return wider.log_prob(value)


def _unwrap(fn: Any) -> tuple[Any, Any]:
    """Return the distribution inside expansions, `to_event` and masks, and its mask."""
    mask = None
    while not isinstance(fn, dist.LogNormal):
        if isinstance(fn, dist.MaskedDistribution):
            mine = _fit(fn._mask, fn.base_dist.event_dim)
            mask = mine if mask is None else mask & mine
        elif not isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            break
        fn = fn.base_dist
    return fn, mask


def _fit(value: Any, event_dim: int) -> Array:
    """Give a batch-shaped array the dimensions of an event."""
    value = jnp.asarray(value)
    return value.reshape(*value.shape, *[1] * event_dim)


def _weight(site: dict[str, Any], mask: Any, value: Array) -> Array:
    weight = jnp.ones(value.shape, value.dtype)
    if site.get("scale") is not None:
        weight = weight * _fit(site["scale"], site["fn"].event_dim)
    return weight if mask is None else jnp.where(mask, weight, 0.0)


def _whiten_vector(base: Any, value: Array) -> WhitenedResiduals:
    error = jnp.broadcast_to(value - base.loc, value.shape)
    tril = jnp.broadcast_to(base.scale_tril, (*error.shape, error.shape[-1]))
    residual = jax.scipy.linalg.solve_triangular(tril, error[..., None], lower=True)
    diagonal = jnp.diagonal(tril, axis1=-2, axis2=-1)
    return WhitenedResiduals(
        residual.reshape(-1), error.reshape(-1), -jnp.log(diagonal).sum()
    )
