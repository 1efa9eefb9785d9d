"""Bias of an unadjusted MCMC run from its step size, for every site."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro.infer import MCMC

from numpyro_score.checks import check_count, check_key
from numpyro_score.diagnostics.step_size_bias import (
    BAOAB,
    StepSizeBias,
    extrapolate,
    pair_averages,
)
from numpyro_score.kernel import ScoreLangevin
from numpyro_score.kernel.whitening import RavelledPosition, unwhiten, whiten
from numpyro_score.langevin import Vector
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey


@renamed(key="rng_key")
def unadjusted_bias(
    rng_key: PRNGKey,
    mcmc: MCMC,
    *model_args: Any,
    num_pairs: int = 64,
    num_steps: int = 1000,
    num_warmup: int = 200,
    **model_kwargs: Any,
) -> StepSizeBias:
    """Return estimates of the bias of each site's mean and variance.

    Pairs of chains continue from the last state of the run with its mass matrix, one
    with its step size h and one with h/2, driven by one Brownian path; see
    :mod:`numpyro_score.diagnostics.step_size_bias`. The cost is three gradients per
    step with friction and five without.

    Args:
        rng_key: random key.
        mcmc: a finished MCMC with ``ScoreLangevin(..., adjusted=False)``.
        model_args: positional arguments of the model, as in ``mcmc.run``.
        num_pairs: number of pairs, run in parallel.
        num_steps: steps of size h per pair.
        num_warmup: steps before the averages.
        model_kwargs: keyword arguments of the model, as in ``mcmc.run``.

    Returns:
        Biases and standard errors, as a dict of sites in each field: of means in units
        of the site's standard deviation, of variances relative to its variance.

    Raises:
        TypeError: for another kernel.
        ValueError: for an adjusted kernel, an MCMC that has not run, or a step at which
            chains diverge.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro import sample
        >>> def model():
        ...     sample("x", dist.Normal(3.0, 2.0))
        >>> kernel = ScoreLangevin(model, adjusted=False)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> bias = unadjusted_bias(jax.random.key(1), mcmc, num_steps=100)
        >>> bool(abs(bias.variance["x"]) < 0.1)  # in a Gaussian there is none
        True
    """
    check_key("rng_key", rng_key)
    check_count("num_steps", num_steps, "a number of steps")
    check_count("num_warmup", num_warmup, "a number of steps", least=0)
    kernel, state = _check(mcmc, num_pairs)
    potential = kernel.potential(model_args, model_kwargs)
    scheme = BAOAB(kernel.friction)
    starts, steps, metrics, metric_axis = _pair_inputs(kernel, state, num_pairs)

    def values(z: Any) -> Array:
        sites = jax.tree.map(lambda a: a.astype(float), potential.constrain(z))
        return ravel_pytree(sites)[0]

    center = jax.jit(jax.vmap(values))(starts).mean(0)

    def one(rng_key: PRNGKey, z: Any, step_size: Array, metric: Any) -> tuple:
        coordinates = RavelledPosition.of(metric, z)
        origin = coordinates.ravel(z)

        def position(y: Vector) -> Any:
            return coordinates.unravel(origin + unwhiten(metric, y))

        def score_fn(y: Vector) -> Vector:
            gradient = potential.evaluate(position(y)).grad
            return -whiten(metric, coordinates.ravel(gradient))

        def observe(y: Vector) -> Array:
            return values(position(y)) - center

        start = jnp.zeros_like(origin)
        numbers = (step_size, num_warmup, num_steps)
        return pair_averages(rng_key, score_fn, observe, start, scheme, *numbers)

    keys = jax.random.split(rng_key, num_pairs)
    run = jax.jit(jax.vmap(one, (0, 0, 0, metric_axis)))
    found = extrapolate(run(keys, starts, steps, metrics), scheme.order)
    first = potential.constrain(jax.tree.map(lambda a: a[0], starts))
    sites = jax.tree.map(lambda a: a.astype(float), first)
    return StepSizeBias(*map(ravel_pytree(sites)[1], found))


def _pair_inputs(kernel: ScoreLangevin, state: Any, num_pairs: int) -> tuple:
    """Return initial points, step sizes, metrics and the metrics' vmap axis."""
    adapted = state.adapt_state
    kept = (state.z, adapted.step_size, adapted.mass_matrix_sqrt_inv)
    if state.potential_energy.ndim == 0:
        kept = jax.tree.map(lambda a: a[None], kept)
    z, step_size, metric = kept
    # vectorized chains have one counter i, and with shared adaptation one metric
    shared = kernel.shares_adaptation and state.i.ndim < state.potential_energy.ndim
    index = jnp.arange(num_pairs) % len(step_size)
    take = lambda tree: jax.tree.map(lambda a: a[index], tree)  # noqa: E731
    metrics = metric if shared else take(metric)
    return take(z), take(step_size), metrics, None if shared else 0


def _check(mcmc: MCMC, num_pairs: int) -> tuple[ScoreLangevin, Any]:
    """Return kernel and last state of an unadjusted run, or raise."""
    kernel, state = mcmc.sampler, mcmc.last_state
    if not isinstance(kernel, ScoreLangevin):
        raise TypeError(
            "`mcmc` must have a ScoreLangevin kernel: the check goes on with its "
            f"update. Got {type(kernel).__name__}."
        )
    if kernel.adjusted:
        raise ValueError(
            "`mcmc` must have an unadjusted kernel: adjusted chains have no bias of "
            "the step size. Got ScoreLangevin(adjusted=True)."
        )
    why = "a number of pairs, whose spread tells standard errors"
    check_count("num_pairs", num_pairs, why, least=4)
    if state is None:
        raise ValueError("`mcmc` must have run: its step size is what is checked.")
    return kernel, state
