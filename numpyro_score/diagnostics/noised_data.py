"""Noised data and predicted noise at several levels, for checks of a score."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import Points, check_key, check_kind, check_rows_finite
from numpyro_score.schedule import geometric
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey, Time

Times = Float[Array, " levels"] | None
NUM_LEVELS = 8  # a factor of 3 per level for VE(0.01, 20)


class NoisedData(NamedTuple):
    """Noised rows at one time and the score's prediction of their noise.

    Row i of n data rows is at i with noise n_i and at n + i with noise -n_i. At low
    levels most of the noise is unpredictable; in the mean of an antithetic pair it
    cancels.

    - **t**, **alpha**, **sigma**: time, scale of the signal, sd of the noise.
    - **x**: x_t in data units, of shape ``(2n,) + event_shape``.
    - **u**: x_t standardized, of shape ``(2n, size)``.
    - **noise**: the noise, of shape ``(2n, size)``.
    - **predicted**: E[noise given x_t], which is -sigma times the score in standardized
      coordinates.
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
    """Return a statistic of the noised data at every time, in one compiled program.

    Raises:
        ValueError: for data of another shape than the score's, fewer than four rows,
            values that are not finite, or another number of contexts than of rows.
    """
    check_key("rng_key", key)
    data = check_data(score, data, contexts)
    ts = _default_score_times(score) if ts is None else ts
    score.sde.check_time("ts", ts)
    if np.ndim(ts) != 1 or not np.size(ts):
        raise ValueError(
            "`ts` must be one sequence of times, one at least: the score is compared "
            f"at each. Got shape {np.shape(ts)}."
        )
    ts = jnp.asarray(ts)
    keys = jax.random.split(key, len(ts))

    def one(inputs: tuple) -> Any:
        key, t = inputs
        return statistic(_add_noise(key, score, data, t, contexts))

    return jax.jit(lambda inputs: jax.lax.map(one, inputs))((keys, ts))


def _add_noise(
    key: PRNGKey, score: ScoreModel, data: Points, t: Time, contexts: Array | None
) -> NoisedData:
    """Return x_t = alpha x_0 + sigma n in antithetic pairs, with predicted noise."""
    alpha, sigma = (jnp.asarray(v) for v in score.sde.marginal(t))
    u0 = jax.vmap(score.standardize.forward)(score.unconstrain(jnp.asarray(data)))
    noise = jax.random.normal(key, u0.shape, u0.dtype)
    u0, noise = jnp.concatenate([u0, u0]), jnp.concatenate([noise, -noise])
    u = alpha * u0 + sigma * noise
    x = jax.vmap(score.standardize.inverse)(u)
    u, noise = (a.reshape(len(a), -1) for a in (u, noise))
    predicted = predict_noise(score, x, t, contexts)
    return NoisedData(t, alpha, sigma, x, u, noise, predicted)


def predict_noise(
    score: ScoreModel, x: Array, t: Time, contexts: Array | None
) -> Float[Array, "n d"]:
    """Return the noise that a score predicts for antithetic pairs of rows."""
    if contexts is None:
        predicted = score.noise(x, t)
    else:
        contexts = jnp.concatenate([contexts, contexts])
        predicted = jax.vmap(lambda x, c: score.noise(x, t, c))(x, contexts)
    return predicted.reshape(len(x), -1)


def _default_score_times(score: ScoreModel) -> Float[Array, " levels"]:
    """Return the times of eight geometric noise levels, highest first."""
    sde = score.sde
    times = sde.time(geometric(sde.sigma_min, sde.sigma_max, NUM_LEVELS))
    return jnp.clip(times, sde.t_min, sde.t_max)


def check_data(score: ScoreModel, data: Any, contexts: Array | None) -> Points:
    """Return data as an array after checking that they and contexts fit the score."""
    check_kind("score", score, ScoreModel, "a ScoreModel")
    check_rows_finite("data", data)
    data = data if hasattr(data, "shape") else np.asarray(data)
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
    if contexts is not None and len(contexts) != len(data):
        raise ValueError(
            "`context` must have one for each row of `data`. "
            f"Got {len(contexts)} and {len(data)}."
        )
    return data


def mean_and_error(values: Array) -> tuple[Array, Array]:
    """Return the mean over noised rows and its standard error from pair means."""
    # of antithetic pairs, one per row of data
    means = (values[: len(values) // 2] + values[len(values) // 2 :]) / 2
    return means.mean(0), means.std(0, ddof=1) / jnp.sqrt(len(means))


def ratio_and_error(top: Array, bottom: Array) -> tuple[Array, Array]:
    """Return the ratio of two means and its standard error by the delta method."""
    ratio = top.mean() / bottom.mean()
    _, error = mean_and_error((top - ratio * bottom) / bottom.mean())
    return ratio, error
