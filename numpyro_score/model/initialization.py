"""Initial values of chains, and checks that potential and gradient are finite there."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_sample, init_to_uniform
from numpyro.infer.util import initialize_model
from numpyro.util import is_prng_key

from numpyro_score.checks import call_when_known, check_unmasked, is_traced
from numpyro_score.model.distribution import base_distribution
from numpyro_score.model.learned_sites import _ExcludedDensity, exclude_learned
from numpyro_score.model.potential import Evaluation, Potential
from numpyro_score.model.trace_checks import (
    is_latent,
    observed_as_arrays,
    sites_without_density,
    without_own_keys,
)
from numpyro_score.model.tracing_errors import explain_tracing
from numpyro_score.typing import PRNGKey

MAX_ROUNDING = 1.0  # nats between neighboring potentials: chance then accepts
NUM_REDRAWS = 20  # of initial values: 1 % have none that is good if only 1 in 5 is


def init_to_learned(site: dict | None = None) -> Any:
    """Return a draw of the law at learned sites, ``init_to_uniform`` at others.

    An initialization strategy for ``init_strategy``. Learned sites have the scale of
    their data, which the interval (-2, 2) of ``init_to_uniform`` ignores.

    Example:
        >>> callable(init_to_learned())
        True
    """
    if site is None:
        return partial(init_to_learned)
    learned = isinstance(base_distribution(site.get("fn")), _ExcludedDensity)
    return init_to_sample(site) if learned else init_to_uniform(site)


def initialize_latents(
    rng_key: PRNGKey,
    model: Callable | None,
    potential: Potential,
    init_strategy: Callable | None,
    model_args: tuple,
    model_kwargs: dict,
) -> dict[str, Array]:
    """Return unconstrained initial values with a finite known potential, per key.

    Where rounding hides differences of a nat (:func:`is_resolved`), no step size makes
    a chain move: such values are replaced by the first of some other draws of the
    strategy that are not of this kind, if there is one. Without a strategy draws of the
    prior are tried last: they have the scale of the latents, which the interval (-2, 2)
    of ``init_to_uniform`` may miss by orders of magnitude.

    Raises:
        ValueError: for a potential function, which does not say where its domain is,
            and for a strategy that starts outside of a site's support.
        RuntimeError: where no value tried has a finite potential and gradient, with
            the sites that have none.
    """
    if model is None:
        raise ValueError(
            "`init_params` must be given with `potential_fn`: a function does not say "
            "where its domain is. Got None."
        )
    usual = init_to_learned if potential.learned else init_to_uniform
    given = init_strategy is not None
    strategies = [init_strategy] if given else [usual, init_to_sample]

    def draw(init_strategy: Any, rng_key: PRNGKey) -> tuple[Any, Array]:
        rest = without_own_keys(observed_as_arrays(model))
        rest = exclude_learned(rest) if potential.learned else rest
        try:
            with explain_tracing():
                info = initialize_model(
                    rng_key,
                    rest,
                    dynamic_args=True,
                    init_strategy=init_strategy,
                    model_args=model_args,
                    model_kwargs=model_kwargs,
                )
        except (ValueError, RuntimeError) as error:  # NumPyro's, which name no site
            arguments = model_args, model_kwargs
            check_strategy(rng_key, rest, init_strategy, *arguments)
            if isinstance(error, ValueError):
                raise
            sites = sites_without_density(rest, model_args, model_kwargs)
            raise RuntimeError(f"{error} {sites}".rstrip()) from error
        # `init_to_value` may return Python numbers
        z = jax.tree.map(
            lambda z, like: jnp.asarray(z, like.dtype),
            info.param_info.z,
            potential.prototype,
        )
        return z, is_resolved(jnp.asarray(info.param_info.potential_energy, float))

    return _first_resolved(rng_key, [partial(draw, each) for each in strategies])


def check_strategy(
    rng_key: PRNGKey,
    model: Callable,
    init_strategy: Callable,
    model_args: tuple,
    model_kwargs: dict,
) -> None:
    """Raise for a strategy that starts a latent site outside of its support.

    Args:
        rng_key: random key, or one per chain, of which the first is used.
        model: a model without learned densities.
        init_strategy: as in NumPyro.
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.

    Raises:
        ValueError: naming the site.
    """
    key = rng_key if is_prng_key(rng_key) else rng_key[0]
    started = substitute(seed(model, key), substitute_fn=init_strategy)
    with validation_enabled(False):  # which would speak of what follows from it
        sites = trace(started).get_trace(*model_args, **model_kwargs)
    for name, site in sites.items():
        if not is_latent(site) or is_traced(site["value"], site["fn"].support):
            continue
        value = np.asarray(site["value"])
        with jax.ensure_compile_time_eval():
            inside = np.asarray(site["fn"].support(value))
        if not inside.all():
            raise ValueError(
                f"`init_strategy` must start site '{name}' within its support: outside "
                "of it there is no density. "
                f"Got {np.array2string(value, threshold=6)} outside of "
                f"{site['fn'].support}."
            )


def is_resolved(potential: Array) -> Array:
    """Return whether neighboring floating-point numbers are less than a nat apart."""
    return jnp.finfo(potential.dtype).eps * jnp.abs(potential) < MAX_ROUNDING


Draw = Callable[[PRNGKey], tuple[Any, Array]]


def _first_resolved(rng_key: PRNGKey, draws: Sequence[Draw]) -> Any:
    """Return draws for the keys, others where rounding hides the potential.

    Args:
        rng_key: random key, or one per chain.
        draws: functions from keys to draws and whether the potential is resolved there,
            the later ones for where the first ones fail.
    """
    found, resolved = _draw_first(rng_key, draws)
    if not is_traced(resolved) and resolved.all():
        return found
    single = is_prng_key(rng_key)
    keys = rng_key[None] if single else rng_key
    if single:
        found, resolved = jax.tree.map(lambda leaf: leaf[None], (found, resolved))
    for number, draw in enumerate(draws):
        fresh = jax.vmap(partial(jax.random.split, num=NUM_REDRAWS))(keys)
        found, resolved = _redraw(fresh, draw, found, resolved)
        if not is_traced(resolved) and resolved.all():
            break
        keys = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
    return jax.tree.map(lambda leaf: leaf[0], found) if single else found


def _draw_first(rng_key: PRNGKey, draws: Sequence[Draw]) -> tuple[Any, Array]:
    """Return the draws of the first function that has some; the first error if none."""
    try:
        return draws[0](rng_key)
    except RuntimeError:
        for draw in draws[1:]:
            with suppress(RuntimeError):
                return draw(rng_key)
        raise


def _redraw(
    keys: PRNGKey, draw: Draw, first: Any, resolved: Array
) -> tuple[Any, Array]:
    """Return the draws, those that are not resolved replaced by one that is, if any."""
    try:
        candidates, good = draw(keys.reshape(-1, *keys.shape[2:]))
    except RuntimeError:  # none of them has a density
        return first, resolved
    good = good.reshape(keys.shape[:2])
    chosen, use = jnp.argmax(good, axis=1), ~resolved & good.any(1)

    def choose(old: Array, new: Array) -> Array:
        new = new.reshape(*good.shape, *old.shape[1:])
        new = new[jnp.arange(len(keys)), chosen]
        return jnp.where(use.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, first, candidates), resolved | use


def check_init_params(init_params: Any, prototype: Any, batch: tuple[int, ...]) -> Any:
    """Return initial values after checking structure, shapes and finiteness.

    Raises:
        ValueError: for other sites, other shapes, or values that are not finite.
    """
    for value in jax.tree.leaves(init_params):
        check_unmasked("init_params", value)
    if prototype is not None:
        _check_shapes(init_params, prototype, batch)
    for path, value in jax.tree_util.tree_leaves_with_path(init_params):
        kind = jnp.result_type(value)
        if not any(jnp.issubdtype(kind, k) for k in (jnp.floating, jnp.integer)):
            raise ValueError(
                "`init_params` must be real numbers: a chain moves in a real space. "
                f"Got {kind} at {jax.tree_util.keystr(path) or 'the position'}."
            )
        if is_traced(value):
            continue
        bad = int((~jnp.isfinite(value)).sum())
        if bad:
            raise ValueError(
                "`init_params` must be finite: a chain cannot leave a point without a "
                f"potential. Got {bad} numbers that are NaN or infinite at "
                f"{jax.tree_util.keystr(path) or 'the position'}."
            )
    if prototype is not None:
        return jax.tree.map(
            lambda x, z: jnp.asarray(x, z.dtype), init_params, prototype
        )
    return jax.tree.map(_at_least_single, init_params)


def _at_least_single(value: Any) -> Array:
    """Return a start in single precision or better: a chain keeps its start's type."""
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _check_shapes(init_params: Any, prototype: Any, batch: tuple[int, ...]) -> None:
    expected = jax.tree.map(lambda x: batch + jnp.shape(x), prototype)
    got = jax.tree.map(jnp.shape, init_params)
    if got != expected:
        raise ValueError(
            "`init_params` must hold one unconstrained value per latent site, with the "
            "number of chains in front if there are several. "
            f"Got shapes {got}, expected {expected}."
        )


def check_finite_potential(evaluation: Evaluation) -> None:
    """Raise if the potential or its gradient at a start is not finite.

    For traced values, as with parallel chains, the check runs in a host callback.

    Raises:
        ValueError: with the names of the sites whose gradient is not finite.
    """
    value, grad, _ = evaluation
    call_when_known(_check_finite, value, grad)


def _check_finite(value: Any, grad: Any) -> None:
    if not np.isfinite(value).all():
        raise ValueError(
            "The potential is not finite at the initial values: a chain would never "
            "move. Pass other `init_params`, or check the model's data and parameters. "
            f"Got {value}."
        )
    bad = [
        jax.tree_util.keystr(path) or "the position"
        for path, leaf in jax.tree_util.tree_leaves_with_path(grad)
        if not np.isfinite(leaf).all()
    ]
    if bad:
        raise ValueError(
            "The gradient is not finite at the initial values: the score or the model "
            "returns NaN or inf there. Check the learned score on a draw of its data. "
            f"Sites: {', '.join(bad)}."
        )
