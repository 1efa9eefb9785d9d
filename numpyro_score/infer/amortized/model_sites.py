"""Classification of a model's sites as learned, observed or nuisance sites."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to

from numpyro_score.data.support import Support, constraint_key
from numpyro_score.model.distribution import is_masked
from numpyro_score.model.latents import LatentSite
from numpyro_score.model.trace_checks import is_latent

Site = dict[str, Any]
ROUNDING = 1e-5  # of a value, 100 units of float32: accelerators add in varying order


class ModelSites(NamedTuple):
    """The sites of a model by their role.

    - **latents**: latent sites whose posterior is learned.
    - **observed**: sites that will be observed.
    - **supports**: supports of the observed sample sites that do not vary.
    - **nuisance**: names of the other latent sites, marginalized by simulation.
    - **intractable**: the reason why the joint density of latents and observed sites
      is unknown; "" if it is known.
    """

    latents: dict[str, Site]
    observed: dict[str, Site]
    supports: dict[str, Any]
    nuisance: tuple[str, ...]
    intractable: str

    def all(self) -> dict[str, Site]:
        """Return latents and observed sites."""
        return self.latents | self.observed


def classify_sites(
    run: Callable[[jax.Array], dict[str, Site]],
    observed: Sequence[str],
    latents: Sequence[str] | None,
) -> ModelSites:
    """Return the sites of a model by role, after checking that it can be simulated.

    Args:
        run: random key -> trace of the model without observations.
        observed: names of the observed sites.
        latents: names of the sites to learn; None for all latent sites.

    Raises:
        ValueError: see :meth:`~numpyro_score.infer.amortized.simulator.Simulator.of`.
    """
    keys = jax.random.split(jax.random.key(0))  # shapes and supports only
    sites, again = run(keys[0]), run(keys[1])
    for key, first in zip(keys, (sites, again), strict=True):
        _check_repeatable(first, run(key))
    _check_observed(sites, observed)
    latent = [name for name, site in sites.items() if is_latent(site)]
    random = tuple(name for name in latent if name not in observed)
    chosen = random if latents is None else tuple(latents)
    _check_latents(sites, random, chosen)
    _check_continuous(sites, chosen)
    for name in chosen:
        fixed_site(name, sites[name], again[name])
    _check_others(sites, observed)
    nuisance = tuple(name for name in random if name not in chosen)
    return ModelSites(
        {name: sites[name] for name in chosen},
        {name: sites[name] for name in observed},
        _fixed_supports(sites, again, observed),
        nuisance,
        _why_intractable(sites, observed, nuisance),
    )


def _check_repeatable(first: dict[str, Site], second: dict[str, Site]) -> None:
    """Raise if two runs of the model with one key differ."""
    odd = sorted(
        name
        for name in first.keys() | second.keys()
        if not same_value(first.get(name), second.get(name))
    )
    if odd:
        raise ValueError(
            "`model` must be a function of its random key: it is compiled once, so "
            "that noise from anywhere else, such as numpy.random, would be the same in "
            "every simulation. Draw it by `numpyro.sample`, or by jax.random with a "
            "key of `numpyro.prng_key()`. Two runs with one key differ at the sites "
            f"{odd}."
        )


def same_value(first: Site | None, second: Site | None) -> bool:
    """Return whether a site's value is the same in two runs, up to rounding."""
    if first is None or second is None:
        return False
    if first["type"] not in ("sample", "deterministic"):
        return True
    a, b = (np.asarray(site["value"]) for site in (first, second))
    if a.shape != b.shape:
        return False
    return np.allclose(a, b, rtol=ROUNDING, atol=0.0, equal_nan=True)


def _check_observed(sites: dict[str, Site], observed: Sequence[str]) -> None:
    kinds = ("sample", "deterministic")
    known = [name for name, site in sites.items() if site["type"] in kinds]
    missing = [name for name in observed if name not in known]
    if missing or not observed:
        raise ValueError(
            "`observed` must name the sites that the model's simulator produces: "
            "sample sites, or deterministic ones. "
            f"Got {list(observed)}; the model has {known}."
        )
    for name in observed:
        dtype = jnp.result_type(sites[name]["value"])
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"Observed site '{name}' must hold real numbers. Observe the real and "
                f"imaginary parts, by `numpyro.deterministic`. Got {dtype}."
            )


def _check_latents(
    sites: dict[str, Site], random: Sequence[str], chosen: Sequence[str]
) -> None:
    if not random:
        raise ValueError(
            "The model must have a latent site: there is nothing to infer. Every "
            "unknown needs a `numpyro.sample` without `obs`. "
            f"Got only {sorted(sites)}."
        )
    unknown = [name for name in chosen if name not in random]
    if unknown or not chosen:
        raise ValueError(
            "`latents` must name latent sample sites of the model. "
            f"Got {list(chosen)}; the model has {list(random)}."
        )


def _check_continuous(sites: dict[str, Site], chosen: Sequence[str]) -> None:
    """Raise for discrete sites among those to learn."""
    discrete = [name for name in chosen if sites[name]["fn"].support.is_discrete]
    if discrete:
        others = [name for name in chosen if name not in discrete]
        raise ValueError(
            "A score exists only for continuous latents. Pass `latents` without the "
            "discrete sites, which are then integrated out by simulation, or replace "
            f"them by continuous ones. Got discrete {discrete}; continuous are "
            f"{others}."
        )


def fixed_site(name: str, site: Site, again: Site) -> LatentSite:
    """Return a site whose support and shape do not change between two runs.

    Args:
        name: of the site.
        site: in the first run.
        again: in the second run.

    Raises:
        TypeError: if there is no bijection from the real numbers to the support.
        ValueError: if they change.
    """
    first, second = (_as_latent_site(name, run) for run in (site, again))
    if first != second:
        raise ValueError(
            f"Site '{name}' must have the same support and shape in every run: it is "
            "learned in unconstrained space and mapped back without a run. Draw a site "
            "of fixed support, such as Uniform(0, 1), and scale it by "
            "`numpyro.deterministic`, or leave it out of what is learned. Got "
            f"{site['fn'].support} and {again['fn'].support}."
        )
    return first


def _as_latent_site(name: str, site: Site) -> LatentSite:
    """Return the layout of a site; raise if it has no unconstrained space."""
    support, shape = site["fn"].support, jnp.shape(site["value"])
    try:
        biject_to(support)
    except NotImplementedError:
        raise TypeError(
            f"Site '{name}' must have a support with a bijection from the real "
            "numbers, in which it is learned. Reparametrize it, such as directions by "
            "`numpyro.infer.reparam.ProjectedNormalReparam`, or leave it out of what "
            f"is learned. Got {support}, of {type(site['fn']).__name__}."
        ) from None
    return LatentSite(name, Support.of(support, shape), shape)


def _check_others(sites: dict[str, Site], observed: Sequence[str]) -> None:
    """Raise for sites whose density simulations do not represent."""
    for name, site in sites.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"] and name not in observed:
            kind = "a factor" if isinstance(site["fn"], dist.Unit) else "observed"
            raise ValueError(
                f"Site '{name}' is {kind} but not named in `observed`: simulations "
                "would not take its density into account. Name it in `observed`, or "
                f"take it out of the model. Got observed={list(observed)}."
            )
        if is_masked(site["fn"]) or site.get("scale") is not None:
            raise ValueError(
                f"Site '{name}' is masked or scaled (subsampled): that changes its "
                "density, which simulations do not see. Let the model simulate exactly "
                f"what will be observed. Got {type(site['fn']).__name__}, scale "
                f"{site.get('scale')}."
            )


def _fixed_supports(
    sites: dict[str, Site], again: dict[str, Site], observed: Sequence[str]
) -> dict[str, Any]:
    """Return the supports of observed sample sites that are equal in two runs."""
    supports = {}
    for name in observed:
        if sites[name]["type"] == "sample":
            support, other = (run[name]["fn"].support for run in (sites, again))
            if constraint_key(support) == constraint_key(other):
                supports[name] = support
    return supports


def _why_intractable(
    sites: dict[str, Site], observed: Sequence[str], nuisance: Sequence[str]
) -> str:
    """Return the reason why log p(latents, observed) is unknown; "" if it is known."""
    computed = [name for name in observed if sites[name]["type"] != "sample"]
    if computed:
        return f"{computed} are deterministic sites, whose density is not known"
    if nuisance:
        return f"{list(nuisance)} are latent too and would have to be integrated out"
    return ""
