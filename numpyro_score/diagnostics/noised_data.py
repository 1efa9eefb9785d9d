"""Rows of data seen through noise: what the checks of a score are evaluated on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import Points, check_rows_finite
from numpyro_score.schedule import geometric
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey, Time

Times = Float[Array, " levels"] | None
NUM_LEVELS = 8


class NoisedData(NamedTuple):
    """Rows at one time, and what the score predicts there; numbers on the last axis.

    Each row of data stands in the first half with some noise and in the second with the
    opposite noise. At low levels the noise is far larger than what can be predicted of
    it; in the mean of such a pair it cancels.

    - **t**, **alpha**, **sigma**: time and scales of signal and noise.
    - **x**: rows in physical units, of shape ``rows + event_shape``.
    - **u**: the same standardized, as vectors.
    - **noise**: the noise that was added.
    - **predicted**: the noise that the score predicts: minus sigma times the score in
      standardized coordinates.
    """

    t: Time
    alpha: Array
    sigma: Array
    x: Array
    u: Array
    noise: Array
    predicted: Array


def per_noise_level(
    key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times,
    contexts: Array | None,
    statistic: Callable[[NoisedData], Any],
) -> Any:
    """Return a statistic of the noised rows at every time, in one compiled program.

    Raises:
        ValueError: for data of another shape than the score's, fewer than four rows,
            values that are not finite, or not one context for each row.
    """
    check_data(score, data, contexts)
    ts = default_score_times(score) if ts is None else ts
    score.sde.check_time("ts", ts)
    keys = jax.random.split(key, len(ts))

    def one(inputs: tuple) -> Any:
        key, t = inputs
        return statistic(add_noise(key, score, data, t, contexts))

    return jax.jit(lambda inputs: jax.lax.map(one, inputs))((keys, ts))


def add_noise(
    key: PRNGKey, score: ScoreModel, data: Points, t: Time, contexts: Array | None
) -> NoisedData:
    """Return rows of data at a time, with the noise that the score predicts."""
    alpha, sigma = (jnp.asarray(v) for v in score.sde.marginal(t))
    u0 = jax.vmap(score.standardize.forward)(score.unconstrain(jnp.asarray(data)))
    noise = jax.random.normal(key, u0.shape, u0.dtype)
    u0, noise = jnp.concatenate([u0, u0]), jnp.concatenate([noise, -noise])
    u = alpha * u0 + sigma * noise
    x = jax.vmap(score.standardize.inverse)(u)
    if contexts is None:
        predicted = score.noise(x, t)
    else:
        contexts = jnp.concatenate([contexts, contexts])
        predicted = jax.vmap(lambda x, c: score.noise(x, t, c))(x, contexts)
    flat = (a.reshape(len(a), -1) for a in (u, noise, predicted))
    return NoisedData(t, alpha, sigma, x, *flat)


def default_score_times(score: ScoreModel) -> Float[Array, " levels"]:
    """Return times at eight geometric noise levels, from the highest to the lowest."""
    sde = score.sde
    times = sde.time(geometric(sde.sigma_min, sde.sigma_max, NUM_LEVELS))
    return jnp.clip(times, sde.t_min, sde.t_max)


def check_data(score: ScoreModel, data: Points, contexts: Array | None) -> None:
    """Raise for rows that the score cannot be checked on."""
    if data.shape[1:] != score.data_shape:
        raise ValueError(
            "`data` must hold one point of the score per row. "
            f"Got rows of shape {data.shape[1:]}, the score's are {score.data_shape}."
        )
    if len(data) < 4:
        raise ValueError(
            "`data` must have at least 4 rows: standard errors come from their spread. "
            f"Got {len(data)}."
        )
    check_rows_finite("data", data)
    if contexts is not None and len(contexts) != len(data):
        raise ValueError(
            "`contexts` must have one for each row of `data`. "
            f"Got {len(contexts)} and {len(data)}."
        )


def antithetic_means(values: Array) -> Array:
    """Return the means over pairs of opposite noise, one per row of data."""
    return (values[: len(values) // 2] + values[len(values) // 2 :]) / 2


def mean_and_error(values: Array) -> tuple[Array, Array]:
    """Return the mean over noised rows and its standard error, from pairs."""
    means = antithetic_means(values)
    return means.mean(0), means.std(0, ddof=1) / jnp.sqrt(len(means))


def ratio_and_error(top: Array, bottom: Array) -> tuple[Array, Array]:
    """Return the ratio of two means and its standard error by the delta method."""
    ratio = top.mean() / bottom.mean()
    _, error = mean_and_error((top - ratio * bottom) / bottom.mean())
    return ratio, error
