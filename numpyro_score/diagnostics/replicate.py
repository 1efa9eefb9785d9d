"""Repeated simulation and inference, the input of all checks of calibration."""

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_callable,
    check_count,
    check_flags,
    check_key,
    check_rows_finite,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey


class Replications(NamedTuple):
    """Result of :func:`replicate`; axis 0 of all arrays is the simulation.

    - **truths**: parameters drawn from the prior, an array or a dict of arrays.
    - **observations**: data simulated from them.
    - **draws**: posterior draws given the observation, draw on axis 1.
    """

    truths: Any
    observations: Any
    draws: Any


@renamed(key="rng_key")
def replicate(
    rng_key: PRNGKey,
    simulate: Callable[[PRNGKey], tuple[Any, Any]],
    sample_posterior: Callable[[PRNGKey, Any], Any],
    num_simulations: int,
    *,
    batch_size: int = 100,
    compiled: bool = True,
    progress_bar: bool = True,
) -> Replications:
    """Return parameters, observations and posterior draws of many simulations.

    Ctrl-C returns those of the blocks that have ended, with a warning.

    Args:
        rng_key: random key.
        simulate: key -> (parameters, observation); parameters are an array or a dict.
        sample_posterior: (key, observation) -> posterior draws, shaped as the
            parameters with an axis of draws in front.
        num_simulations: number of simulations.
        batch_size: simulations per compiled call, which are vmapped.
        compiled: whether both functions can be traced by JAX, as amortized posteriors
            and ``MCMC(..., progress_bar=False).run`` can; if False, they are called
            once per simulation.
        progress_bar: whether to show progress.

    Raises:
        ValueError: for numbers below 1, or draws not shaped as the parameters.

    Example:
        >>> out = replicate(
        ...     jax.random.key(0),
        ...     lambda key: (jax.random.normal(key), jax.numpy.zeros(2)),
        ...     lambda key, observation: jax.random.normal(key, (9,)),
        ...     num_simulations=5,
        ... )
        >>> out.truths.shape, out.observations.shape, out.draws.shape
        ((5,), (5, 2), (5, 9))
    """
    check_key("rng_key", rng_key)
    check_count("num_simulations", num_simulations, "a number of simulations")
    check_count("batch_size", batch_size, "a number of simulations")
    check_callable("simulate", simulate, "a function of a key")
    check_callable("sample_posterior", sample_posterior, "a function of key and data")
    check_flags(compiled=compiled, progress_bar=progress_bar)

    def one(rng_key: PRNGKey) -> Replications:
        key_simulate, key_infer = jax.random.split(rng_key)
        truth, observation = simulate(key_simulate)
        return Replications(
            truth, observation, sample_posterior(key_infer, observation)
        )

    size = min(batch_size, num_simulations) if compiled else 1
    run = jax.jit(jax.vmap(one)) if compiled else lambda keys: _stack([one(keys[0])])
    parts = _run_blocks(run, rng_key, num_simulations, size, progress_bar)
    joined = jax.tree.map(lambda *a: np.concatenate(a)[:num_simulations], *parts)
    check_draws(joined.truths, joined.draws)
    return joined


def _run_blocks(
    run: Callable, rng_key: PRNGKey, count: int, size: int, progress_bar: bool
) -> list[Replications]:
    """Return the results of blocks of keys, after Ctrl-C of those that have ended."""
    num_blocks = ceil(count / size)
    keys = jax.random.split(rng_key, num_blocks * size)
    parts: list[Replications] = []
    try:
        with tqdm(total=count, disable=not progress_bar, desc="replicate") as bar:
            for j in range(num_blocks):
                block = run(keys[j * size : (j + 1) * size])
                parts.append(jax.tree.map(np.asarray, block))
                bar.update(min(size, count - j * size))
    except KeyboardInterrupt as interrupt:
        if not parts:
            interrupt.add_note(
                "replicate: interrupted before a block of `batch_size` simulations had "
                "ended, so there are none. Choose a smaller `batch_size`: blocks that "
                "have ended are kept."
            )
            raise
        warn_caller(
            f"replicate: interrupted after {len(parts) * size} of {count} simulations. "
            "Results are those of these simulations."
        )
    return parts


def check_draws(truths: Any, draws: Any) -> tuple[dict, dict]:
    """Return parameters and their posterior draws as dicts of arrays.

    Raises:
        ValueError: for names or shapes that differ, or values that are not finite.
    """
    first, second = as_dict(truths, "truths"), as_dict(draws, "draws")
    if first.keys() != second.keys():
        raise ValueError(
            "`truths` and `draws` must have the same names. "
            f"Got {sorted(first)} and {sorted(second)}."
        )
    for name, truth in first.items():
        shape = second[name].shape
        if shape[:1] + shape[2:] != truth.shape or len(shape) < 2:
            raise ValueError(
                f"`draws` of {name!r} must have the shape of its truths with an axis "
                f"of draws after the first. Got {shape}, truths {truth.shape}."
            )
    return first, second


def as_dict(values: Any, argument: str) -> dict[str, np.ndarray]:
    """Return a dict of arrays of rows; for one array a dict with the key "x".

    Raises:
        ValueError: for values that are not finite numbers.
    """
    values = values if isinstance(values, dict) else {"x": values}
    for name, rows in values.items():
        check_rows_finite(argument, rows, f" in {name!r}: NaN has no rank")
    return {name: np.asarray(value) for name, value in values.items()}


def flatten(values: dict[str, np.ndarray], num_axes: int) -> np.ndarray:
    """Return a dict's arrays, flattened after ``num_axes`` axes and concatenated."""
    return np.concatenate(
        [np.reshape(v, (*v.shape[:num_axes], -1)) for v in values.values()], axis=-1
    )


def _stack(trees: list) -> Any:
    return jax.tree.map(lambda *a: np.stack([np.asarray(v) for v in a]), *trees)


def loc_and_scale(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every column, the latter 1 where it is 0.

    Args:
        rows: one vector per row.
    """
    scale = rows.std(axis=0)
    return rows.mean(axis=0), np.where(scale > 0, scale, 1.0)
