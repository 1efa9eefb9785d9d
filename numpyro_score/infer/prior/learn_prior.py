"""Learning a joint prior of a model's sites from posterior draws."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_uniform

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_callable,
    check_key,
    check_keywords,
    check_numbers,
    check_positive,
)
from numpyro_score.data.inputs import (
    is_real_dtype,
    warn_without_density,
    without_density_warnings,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.model_sites import fixed_site
from numpyro_score.infer.amortized.npse import check_names
from numpyro_score.infer.amortized.simulation_check import CIRCULAR, near_ends
from numpyro_score.infer.prior.check import (
    NUM_DRAWS,
    check_prior,
    critical_distance,
    effective_share,
)
from numpyro_score.model.latent_dependence import inputs_of_outputs
from numpyro_score.model.latents import LatentLayout
from numpyro_score.model.learned_prior import LearnedPrior, PriorFit
from numpyro_score.model.trace_checks import is_latent, run_anywhere, trace_anywhere
from numpyro_score.nn import MLP
from numpyro_score.sde import SDE, VE
from numpyro_score.train import ScoreMatching
from numpyro_score.train.held_out import PATIENCE, equal_rows, split_groups
from numpyro_score.train.score_matching import check_trainer
from numpyro_score.typing import PRNGKey

# In whitened coordinates a Gaussian law is exact at every level. Lower levels cost more
# steps, and the score between and beyond the draws is less reliable there.
LEVEL = 0.1
# Kolmogorov-Smirnov distance that matters: a tenth of the draws is elsewhere; and the
# chance of as large a one in right draws
MIN_BLUR, FALSE_ALARM = 0.1, 0.01
# scikit-learn's `validation_fraction`; an sd within 10 % (1 / 100^1/2), and within 2 %,
# beyond which tests only cost time
HELD_OUT, MIN_HELD_OUT, MAX_HELD_OUT = 0.1, 50, 1000
MIN_EFFECTIVE = 100  # a mean within .1 sd; Vehtari et al. 2021 ask for 100 a chain
MIN_ROWS = 200  # 50 held out, and three times as many to learn from
EIGENVALUE_FLOOR = 1e-5  # of the correlation; float32 resolves 1e-7 of the largest


def learn_prior(
    rng_key: PRNGKey,
    draws: Any,
    model: Callable,
    *model_args: Any,
    sites: Sequence[str] | None = None,
    num_steps: int = 2000,
    trainer: ScoreMatching | None = None,
    level: float | None = None,
    progress_bar: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LearnedPrior:
    r"""Return the joint law of sites of a model, learned from draws of them.

    A posterior becomes the prior for new data: put it into the model by
    :class:`~numpyro_score.model.handlers.with_prior`. Draws are mapped to unconstrained
    space and whitened by their covariance, so that the net learns only what is not
    Gaussian; a tenth of them is held out, and training stops when their loss rises.

    Args:
        rng_key: random key.
        draws: an ``MCMC`` that has run, a dict of constrained values by site with
            leading dimensions of draws, or a tree or dataset of ArviZ.
        model: the model whose sites these are.
        *model_args: arguments of the model for these draws.
        sites: names of the sites to learn; None for all continuous latent sites.
        num_steps: largest number of training steps.
        trainer: a trainer of points of shape ``(size,)``; None for a small MLP.
        level: noise level of the law that is used, in standard deviations; None for the
            lowest, from .1, at which the score can be trusted off the draws
            (:mod:`numpyro_score.score.level`).
        progress_bar: whether to show progress.
        model_kwargs: keyword arguments of the model.

    Raises:
        TypeError: for draws, a trainer or keyword arguments of another kind.
        ValueError: for sites that are no continuous latent sites of the model, are not
            in the draws, have a support that changes, do not vary, or have priors that
            depend on latent sites which are not learned; for fewer than 200 draws, and
            a level that the trainer's process does not have.

    Warns:
        UserWarning: if the prior differs from held-out draws, with direction and size
            (:mod:`numpyro_score.infer.prior.check`), for draws whose effective
            sample size is below 100, angles at their ends, discrete or equal sites,
            terms of the model that would count again with new data, and a level above
            .1 that shows in draws of the prior.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> def model(y=None):
        ...     s = numpyro.sample("s", dist.LogNormal(0, 1))
        ...     numpyro.sample("y", dist.Normal(0, s), obs=y)
        >>> draws = {"s": jnp.exp(0.1 * jax.random.normal(jax.random.key(0), (400,)))}
        >>> prior = learn_prior(
        ...     jax.random.key(1), draws, model, 0.5, num_steps=20, progress_bar=False
        ... )
        >>> prior.sample(jax.random.key(2), (3,))["s"].shape
        (3,)
    """
    check_key("rng_key", rng_key)
    check_callable("model", model, "whose sites were drawn")
    check_trainer(trainer)
    check_keywords("model_kwargs", model_kwargs)
    if level is not None:
        _check_level(level, VE() if trainer is None else trainer.sde)
    key_run, key_fit, key_split = jax.random.split(rng_key, 3)
    values = _values(draws)
    kwargs = dict(model_kwargs or {})
    latents = _layout(model, model_args, kwargs, sites)
    _warn_of_repeated_terms(model, model_args, kwargs, latents.names)
    z = _unconstrain(latents, values)
    _warn_of_angles(latents, z)
    warn_without_density(z.astype(np.float32), list(coordinate_names(latents)), "draws")
    loc, factor = _whitening(latents, z)
    u = np.linalg.solve(factor, (z - loc).T).T
    share = effective_share(z)
    _warn_of_few(share * len(z), len(z))
    train, held_out = _split(key_split, u)
    trainer = trainer or ScoreMatching(
        MLP(latents.size, width=128, depth=3),
        standardize=lambda x: Affine.identity(x.shape[1:]),
    )
    with without_density_warnings():
        score = trainer.run(
            key_run,
            num_steps,
            train,
            validation=held_out,
            patience=PATIENCE,
            progress_bar=progress_bar,
        ).score
    found = max(LEVEL, score.level_in_use) if level is None else level
    arrays = jnp.asarray(loc, float), jnp.asarray(factor, float)
    prior = LearnedPrior(score, *arrays, latents, float(found))
    num_effective = min(len(held_out) * share, equal_rows(held_out).max() + 1.0)
    fit = check_prior(key_fit, prior, train, held_out, num_effective)
    if level is None:
        _warn_of_blur(found, fit, num_effective)
    return replace(prior, fit=fit)


def _check_level(level: Any, sde: SDE) -> None:
    """Raise for a level that the prior's process does not have."""
    check_positive("level", level, "a noise level, in sd of the draws")
    if not sde.sigma_min <= level <= sde.sigma_max:
        raise ValueError(
            "`level` must lie between the lowest and highest noise level of the "
            f"process, {sde.sigma_min} and {sde.sigma_max}. Got {level}."
        )


def _warn_of_blur(level: float, fit: PriorFit, num_effective: float) -> None:
    """Warn of a level above the usual one that shows in draws of the prior.

    Args:
        level: of the prior, found by its score.
        fit: distances of its draws from held-out draws.
        num_effective: effective number of the latter.
    """
    distance = max(fit.marginal or 0.0, fit.neighbors or 0.0)
    chance = critical_distance(FALSE_ALARM, num_effective, NUM_DRAWS)
    if level > LEVEL and distance > max(MIN_BLUR, chance):
        warn_caller(
            f"The learned prior uses noise level {level:.2g} in place of {LEVEL}: "
            "below it the score cannot be trusted off the draws, and its draws differ "
            f"from held-out ones by {distance:.2f} (Kolmogorov-Smirnov distance). What "
            "is narrower than that level, in sd of the draws, as separate modes and "
            "ridges are, is blurred, and posteriors there are too wide. Give more "
            "draws and steps, analyze all data together, or pass `level` to choose one."
        )


def _values(draws: Any) -> dict[str, Any]:
    """Return constrained values by site with leading dimensions of draws."""
    if hasattr(draws, "get_samples"):
        if getattr(draws, "last_state", draws) is None:
            raise ValueError("`draws` must be an MCMC that has run. Call `run` first.")
        values = draws.get_samples()
        if not isinstance(values, Mapping):
            raise TypeError(
                "`draws` must be of an MCMC of the model: that of a potential function "
                f"does not name its sites. Got {type(values).__name__}."
            )
        return dict(values)
    if hasattr(draws, "data_vars"):
        group = draws if draws.data_vars else _posterior(draws)
        return {str(name): _draws_first(value) for name, value in group.items()}
    if isinstance(draws, Mapping):
        return dict(draws)
    raise TypeError(
        "`draws` must be an MCMC that has run, a dict of values by site, or a dataset "
        f"or tree of ArviZ. Got {type(draws).__name__}."
    )


def _posterior(tree: Any) -> Any:
    """Return the group of a tree of ArviZ that holds draws of the posterior."""
    groups = sorted(map(str, getattr(tree, "children", ())))
    if "posterior" not in groups:
        raise ValueError(
            "`draws` must have variables, or a group 'posterior' if it is a tree: these"
            f" are the draws. Got a {type(tree).__name__} without, of groups {groups}."
        )
    return tree["posterior"]


def _draws_first(value: Any) -> np.ndarray:
    """Return a variable of ArviZ with its dimensions of draws before all others."""
    # `sample` is that of `arviz.extract`, which stacks the others and puts it last
    dims = [dim for dim in ("chain", "draw", "sample") if dim in value.dims]
    return np.asarray(value.transpose(*dims, ...))


def _layout(
    model: Callable, args: tuple, kwargs: dict, sites: Sequence[str] | None
) -> LatentLayout:
    """Return the sites to learn, from two traces of the model."""
    listed = isinstance(sites, Iterable) and not isinstance(sites, str)
    if sites is not None:
        check_names("sites", tuple(sites) if listed else sites)
    keys = jax.random.split(jax.random.key(0))  # shapes and supports only
    first, second = (trace_anywhere(model, args, kwargs, key) for key in keys)
    latent = {name: site for name, site in first.items() if is_latent(site)}
    smooth = [k for k, site in latent.items() if not site["fn"].support.is_discrete]
    chosen = smooth if sites is None else list(sites)
    unknown = [name for name in chosen if name not in smooth]
    rest = {name: latent[name]["value"] for name in latent if name not in chosen}
    if unknown or not chosen or isinstance(sites, str):
        raise ValueError(
            "`sites` must name continuous latent sites of the model, at least one. "
            f"Got {sites!r}; the model has {smooth}."
        )
    layout = LatentLayout(tuple(fixed_site(n, latent[n], second[n]) for n in chosen))
    _check_parents(lambda: seed(model, keys[0])(*args, **kwargs), chosen, rest)
    return layout


def _check_parents(
    run: Callable[[], Any], chosen: Sequence[str], rest: dict[str, Any]
) -> None:
    """Raise for a learned site whose prior depends on latents that are not learned.

    The learned law of the site alone would take the place of p(site | parent), and the
    parent would lose what the site says of it.

    Args:
        run: the model with its arguments.
        chosen: sites to learn.
        rest: values of the other latent sites.
    """

    def laws(rest: dict[str, Any]) -> dict[str, list[Any]]:
        start = substitute(run, substitute_fn=init_to_uniform)
        fixed = substitute(start, data=rest)
        sites = run_anywhere(lambda: trace(fixed).get_trace())
        return {name: jax.tree.leaves(sites[name]["fn"]) for name in chosen}

    if not rest:
        return
    found = inputs_of_outputs(laws, rest)
    for name in chosen:
        used = found[name]
        parents = [k for k, is_used in zip(sorted(rest), used, strict=True) if is_used]
        if parents:
            raise ValueError(
                f"`sites` must hold what the prior of '{name}' depends on, or leave it "
                f"out: the learned law of '{name}' alone does not depend on them, and "
                "they would be cut off from the data. Got "
                f"{list(chosen)} without {parents}."
            )


def _warn_of_repeated_terms(
    model: Callable, args: tuple, kwargs: dict, names: Sequence[str]
) -> None:
    """Warn of terms that the draws have seen, and that new data would not replace.

    Observed sites and factors that depend on learned sites and on no array among the
    arguments, as the penalty of an intrinsic autoregression or a soft constraint do,
    belong to the prior. Nothing is known where none depends on an argument, or where
    Python needs their values.
    """
    try:
        found = _dependence(model, args, kwargs, names)
    except Exception:  # noqa: BLE001 (of the model's own code, given traced arguments)
        return
    terms = [k for k, (of_data, of_latents) in found.items() if of_latents > of_data]
    if terms and any(of_data for of_data, _ in found.values()):
        warn_caller(
            "`model` has observed sites or factors that depend on the sites to learn "
            "and on no array among its arguments: they are in the draws, and count "
            "again with new data. Give `learn_prior` and `handlers.with_prior` a model "
            f"without them. Got {terms}."
        )


def _dependence(
    model: Callable, args: tuple, kwargs: dict, names: Sequence[str]
) -> dict[str, tuple[bool, bool]]:
    """Return whether each observed site depends on arrays, and on learned sites.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        names: of the learned sites.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if _is_array_of_numbers(x)}
    sites = trace_anywhere(model, args, kwargs) if arrays else {}
    latent = {name: sites[name]["value"] for name in names if sites}
    observed = [
        k for k, s in sites.items() if s["type"] == "sample" and s["is_observed"]
    ]

    def parts(arrays: dict, latent: dict) -> dict[str, Any]:
        given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(tree, given)
        fixed = substitute(seed(model, jax.random.key(0)), data=latent)
        sites = run_anywhere(lambda: trace(fixed).get_trace(*args, **kwargs))
        return {
            k: [jax.tree.leaves(sites[k][part]) for part in ("fn", "value", "scale")]
            for k in observed
        }

    if not observed:
        return {}
    return {
        name: (any(used[: len(arrays)]), any(used[len(arrays) :]))
        for name, used in inputs_of_outputs(parts, arrays, latent).items()
    }


def _is_array_of_numbers(value: Any) -> bool:
    """Return whether an argument of a model may be data."""
    is_array = isinstance(value, np.ndarray | jax.Array) and np.ndim(value) > 0
    return is_array and is_real_dtype(value.dtype)


def _unconstrain(latents: LatentLayout, values: dict[str, Any]) -> np.ndarray:
    """Return one unconstrained row per draw, in float64.

    Raises:
        ValueError: for sites that are missing or outside their support, and for too few
            draws.
    """
    missing = [name for name in latents.names if name not in values]
    if missing:
        raise ValueError(
            "`draws` must hold all sites to learn. Give the model its data, without "
            "which observed sites are latent, or name in `sites` those that `draws` "
            f"has; the others keep their priors. Got {sorted(values)}, missing "
            f"{missing}."
        )
    columns = []
    for site in latents:
        check_numbers(f"draws['{site.name}']", values[site.name], "draws of the site")
        value = jnp.asarray(values[site.name], float)
        batch = site.batch(value)
        rows = value.reshape(-1, *site.shape)
        site.support.check(rows, f"draws['{site.name}']")
        z = site.support.unconstrain(rows)
        columns.append((batch, np.asarray(z, np.float64).reshape(len(rows), -1)))
    if len({batch for batch, _ in columns}) > 1 or len(columns[0][1]) < MIN_ROWS:
        raise ValueError(
            f"`draws` must have the same leading dimensions for all sites, and at least"
            f" {MIN_ROWS} draws: some are held out to check the fit. Got "
            f"{dict(zip(latents.names, (batch for batch, _ in columns), strict=True))}."
        )
    return np.concatenate([z for _, z in columns], axis=1)


def _warn_of_angles(latents: LatentLayout, z: np.ndarray) -> None:
    """Warn of angles with draws around pi, which is far from itself when learned."""
    values = latents.unflatten(jnp.asarray(z, float))
    angles = [site.name for site in latents if site.support.name == CIRCULAR]
    if found := near_ends({k: values[k] for k in angles}):
        warn_caller(
            "Angles are learned as numbers from -pi to pi, whose ends are far apart: "
            "posteriors across them have two modes, between which no chain moves, and "
            "of which the shares may be wrong. Let the model draw two numbers, such as "
            "of a Normal law, and take their angle by `numpyro.deterministic`. Got "
            f"draws within a quarter turn around the ends {found}."
        )


def _whitening(latents: LatentLayout, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and the square root of the covariance, of full rank.

    The root is sd times the symmetric root of the correlation matrix, so that whitened
    coordinates belong to those of z. Its eigenvalues are floored.
    """
    loc, sd = z.mean(0), z.std(0)
    largest = np.abs(z).max(0)
    fixed = sd <= np.finfo(np.float32).eps * largest
    if fixed.any():
        sizes = [int(np.prod(site.unconstrained_shape)) for site in latents]
        owner = np.repeat(latents.names, sizes)
        raise ValueError(
            "`draws` must vary at every site to learn: a constant has no density, nor "
            "have numbers that float32 rounds to a few, far from 0. Leave it out of "
            "`sites`, or subtract a constant in the model. Constant: "
            f"{sorted(set(owner[fixed].tolist()))}."
        )
    correlation = np.atleast_2d(np.corrcoef(z, rowvar=False))
    eigenvalues, vectors = np.linalg.eigh(correlation)
    root = np.sqrt(np.maximum(eigenvalues, EIGENVALUE_FLOOR))
    return loc, sd[:, None] * (vectors * root) @ vectors.T


def _split(key: PRNGKey, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to train on and held-out rows, at random; equal ones stay together.

    Blocks of a chain would hold out draws that depend on each other, of which the
    check of the fit knows too little.
    """
    count = int(np.clip(HELD_OUT * len(rows), MIN_HELD_OUT, MAX_HELD_OUT))
    groups = equal_rows(rows)
    order = np.asarray(jax.random.permutation(key, int(groups.max()) + 1))
    held_out, train = split_groups(groups, order, count)
    return rows[train], rows[held_out]


def _warn_of_few(num_effective: float, num_draws: int) -> None:
    """Warn of draws that say as little as a few independent ones."""
    if num_effective < MIN_EFFECTIVE:
        warn_caller(
            f"`draws` count as {num_effective:.0f} independent ones, of {num_draws} "
            "draws, since they depend on each other or are equal: the learned prior "
            f"has their errors, a mean off by {num_effective**-0.5:.1g} sd, and "
            "structure that is chance. See R-hat and the effective sample size "
            "(`numpyro.diagnostics.print_summary`), and run longer, for draws that "
            f"count as {MIN_EFFECTIVE} or more."
        )
