r"""The error of denoised held-out data, and the error that a learned score states.

For noise n in :math:`u_t = \alpha u_0 + \sigma n` the predicted noise
:math:`\hat n(u_t) = E[n \mid u_t]` says by its derivative how far it is off (Efron
2011, second order):

.. math:: E\|n - \hat n(u_t)\|^2
    = E\,\mathrm{tr}\Big(I - \sigma \frac{\partial \hat n}{\partial u_t}\Big) .

On held-out data the ratio of both sides is 1 for the true score. Above 1 the score is
sure of too much, as one that is fitted to its training data too closely, and posteriors
under it are too narrow; below 1 they are too wide. On the training data themselves it
is near 1 for any well fitted net.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import Points, check_key
from numpyro_score.diagnostics.noised_data import (
    NoisedData,
    Times,
    per_noise_level,
    predict_noise,
    ratio_and_error,
)
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey


class DenoisingCalibration(NamedTuple):
    """Result of :func:`denoising_calibration`, by noise level.

    - **levels**: noise levels sigma/alpha, in units of the data's standard deviation.
    - **error**: mean squared error of the predicted noise, by coordinate.
    - **stated**: the error that the derivative of the score states.
    - **ratio**: error over stated; its square root is the factor by which the law of
      the clean point given the noised one is too narrow.
    - **ratio_error**: standard error of the ratio.
    """

    levels: Float[Array, " levels"]
    error: Float[Array, " levels"]
    stated: Float[Array, " levels"]
    ratio: Float[Array, " levels"]
    ratio_error: Float[Array, " levels"]


def denoising_calibration(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    context: Array | None = None,
) -> DenoisingCalibration:
    """Return the error of the denoised held-out data over what the score states.

    The trace is estimated with one random direction per row (Hutchinson 1990): a
    derivative along it costs some two evaluations of the net.

    Args:
        rng_key: random key of noise and directions.
        score: the learned score.
        data: held-out data, one datum per row.
        ts: times; None for eight levels from the highest to the lowest.
        context: what the score is conditioned on, one per row.

    Raises:
        ValueError: for data of another shape than the score's, or not finite.

    Example:
        >>> from numpyro_score import VE
        >>> score = ScoreModel.from_fn(  # of N(0, 1)
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (2,)
        ... )
        >>> data = jax.random.normal(jax.random.key(0), (2000, 2))
        >>> ts = VE().time(jnp.array([1.0, 0.3]))
        >>> denoising_calibration(jax.random.key(1), score, data, ts).ratio.round(1)
        Array([1., 1.], dtype=float32)
        >>> denoising_calibration(jax.random.key(1), score, 2 * data, ts).ratio.round(1)
        Array([2.5, 1.2], dtype=float32)
    """
    check_key("rng_key", rng_key)
    key_noise, key_directions = jax.random.split(rng_key)

    def statistic(rows: NoisedData) -> DenoisingCalibration:
        directions = jax.random.rademacher(key_directions, rows.x.shape, rows.u.dtype)
        changes = _changes_along(score, rows, directions, context)
        directions = directions.reshape(rows.u.shape)
        stated = (directions * (directions - rows.sigma * changes)).mean(1)
        error = jnp.square(rows.noise - rows.predicted).mean(1)
        ratio, ratio_error = ratio_and_error(error, stated)
        level = rows.sigma / rows.alpha
        return DenoisingCalibration(
            level, error.mean(), stated.mean(), ratio, ratio_error
        )

    return per_noise_level(key_noise, score, data, ts, context, statistic)


def _changes_along(
    score: ScoreModel, rows: NoisedData, directions: Array, context: Array | None
) -> Float[Array, "n d"]:
    """Return the derivative of the predicted noise along directions of u."""

    def predict(x: Array) -> Array:
        return predict_noise(score, x, rows.t, context)

    origin = score.standardize.inverse(jnp.zeros_like(directions[0]))
    steps = jax.vmap(score.standardize.inverse)(directions) - origin
    return jax.jvp(predict, (rows.x,), (steps,))[1]
