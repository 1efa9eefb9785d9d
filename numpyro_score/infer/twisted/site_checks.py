"""Checks that a model's learned sites can be sampled by a reverse SDE."""

from collections.abc import Callable
from typing import Any

from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.learned_sites import exclude_learned
from numpyro_score.model.trace_checks import (
    is_discrete_latent,
    is_improper,
    is_latent,
    is_weighted,
    trace_anywhere,
)


def check_latents(
    model: Callable, model_args: tuple, model_kwargs: dict
) -> dict[str, ScoreDistribution]:
    """Return the learned sites of a model whose latent sites are continuous.

    Raises:
        ValueError: for discrete latent sites and for a model without learned ones,
            naming the site, and what to use in its place.
    """
    slots = exclude_learned(model)
    sites = trace_anywhere(slots, model_args, model_kwargs)
    for name, site in sites.items():
        if is_discrete_latent(site):
            raise ValueError(
                f"Site '{name}' is a discrete latent site, and a likelihood is "
                "differentiated here. Sum it out in the model, for example by "
                "`MixtureSameFamily`, or use MCMC with a kernel that enumerates."
            )
    if not slots.sites:
        names = [name for name, site in sites.items() if is_latent(site)]
        raise ValueError(
            "`model` must have a latent site with a ScoreDistribution: a reverse SDE "
            "runs on its score. For a model without one use MCMC, with ScoreLangevin "
            f"or NUTS. Got latent sites {names}."
        )
    return slots.sites


def check_ordinary(ordinary: tuple[str, ...]) -> None:
    """Raise for ordinary sites, which guidance alone does not move.

    Raises:
        ValueError: naming the sites.
    """
    if ordinary:
        raise ValueError(
            "`guidance` moves learned sites only, and the model has other latent ones. "
            f"Use `guidance=None`, which moves them too. Got sites {ordinary}."
        )


def check_residuals(gaussian: tuple[str, ...], guidance: Any) -> None:
    """Raise without Normal sites, whose residuals guide.

    Raises:
        ValueError: saying what to use in place of the guidance.
    """
    if not gaussian:
        raise ValueError(
            f"`guidance` by {type(guidance).__name__} needs observed Normal sites, "
            "whose residuals guide. Use MomentMatching or `guidance=None`."
        )


def check_sites(sites: dict[str, Any], learned: dict[str, ScoreDistribution]) -> None:
    """Raise for learned sites that are weighted and ordinary ones without a prior.

    Raises:
        ValueError: naming the site.
    """
    for name, site in sites.items():
        if not is_latent(site):
            continue
        if name in learned and is_weighted(site):
            raise ValueError(
                f"Learned site '{name}' is scaled or masked: noise on it follows its "
                "own law, not a power of it. Take it out of `handlers.scale`, `mask` "
                "and subsampled plates, or use MCMC with ScoreLangevin."
            )
        if is_improper(site):
            raise ValueError(
                f"Site '{name}' has an improper prior: particles start as draws of the "
                "prior. Give it a proper one, or use MCMC with ScoreLangevin."
            )
