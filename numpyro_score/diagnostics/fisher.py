r"""Relative Fisher divergence of a learned score at each noise level.

.. math:: F_t = \frac{E |s(x_t, t) - s^*(x_t, t)|^2}{E |s^*(x_t, t)|^2}

over noised data, in standardized coordinates. Where the true score :math:`s^*` is
known, it is a mean. Where it is not, held-out data still tell the *difference* of two
scores' divergences, which is that of their denoising losses (Vincent 2011), and with it
a lower bound: whatever a correction of the score gains in held-out denoising loss, the
score was at least that far from the truth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import Points
from numpyro_score.diagnostics.noised_data import (
    NoisedData,
    Times,
    mean_and_error,
    per_noise_level,
    ratio_and_error,
)
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey, ScoreFn

RIDGE = 1e-5  # keeps the fit alive where the prediction is a multiple of the point


class NoiseLevelEstimates(NamedTuple):
    """A figure of merit at each noise level, with its standard error.

    - **levels**: noise level sigma/alpha, in units of the data's standard deviation.
    - **value**: the figure.
    - **standard_error**: its Monte Carlo error over the rows of data.
    """

    levels: Float[Array, " levels"]
    value: Float[Array, " levels"]
    standard_error: Float[Array, " levels"]


def fisher_divergence(
    key: PRNGKey,
    score: ScoreModel,
    exact: ScoreFn,
    data: Points,
    ts: Times = None,
) -> NoiseLevelEstimates:
    """Return the relative Fisher divergence from a known score at each time.

    Args:
        key: random key of the noise.
        score: the learned score.
        exact: (x, t) -> the true score of p_t at one point, in physical units; such as
            another model's ``score``.
        data: rows of the true law.
        ts: times; None for eight levels from the highest to the lowest.

    Raises:
        ValueError: for data that do not fit the score or are not finite.

    Example:
        >>> from numpyro_score import VE
        >>> def exact(x, t):
        ...     return -x / (1 + VE().sigma(t) ** 2)
        >>> wrong = ScoreModel.from_fn(lambda x, t: 1.1 * exact(x, t), VE(), (2,))
        >>> data = jax.random.normal(jax.random.key(0), (100, 2))
        >>> found = fisher_divergence(jax.random.key(1), wrong, exact, data)
        >>> bool(jnp.allclose(found.value, 0.01, rtol=1e-2))
        True
    """

    def statistic(rows: NoisedData) -> tuple[Array, ...]:
        truth = jax.vmap(lambda x: exact(x, rows.t) * score.standardize.scale)(rows.x)
        truth = -rows.sigma * truth.reshape(len(truth), -1)
        error = jnp.square(rows.predicted - truth).sum(1)
        return rows.sigma / rows.alpha, *ratio_and_error(
            error, jnp.square(truth).sum(1)
        )

    return NoiseLevelEstimates(*per_noise_level(key, score, data, ts, None, statistic))


def denoising_loss(
    key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    reference: ScoreModel | None = None,
    contexts: Array | None = None,
) -> NoiseLevelEstimates:
    """Return the mean squared error of the predicted noise per number, on data.

    The loss of the true score is not zero and not known: it tells scores apart, it does
    not say how good one is. With a ``reference`` on the same process the value is the
    loss minus that of the reference on the same noise, which is the difference of their
    Fisher divergences, in units of the noise.

    Args:
        key: random key of the noise.
        score: the learned score.
        data: held-out rows.
        ts: times; None for eight levels from the highest to the lowest.
        reference: another score of the same law with the same standardization.
        contexts: what the score is conditioned on, one per row.

    Raises:
        ValueError: for data that do not fit the score or are not finite.

    Example:
        >>> from numpyro_score import VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (2,)
        ... )
        >>> data = jax.random.normal(jax.random.key(0), (100, 2))
        >>> denoising_loss(jax.random.key(1), score, data).value.shape
        (8,)
    """

    def statistic(rows: NoisedData) -> tuple[Array, ...]:
        loss = jnp.square(rows.predicted - rows.noise).mean(1)
        if reference is not None:
            other = _predict(reference, rows, contexts)
            loss -= jnp.square(other - rows.noise).mean(1)
        return rows.sigma / rows.alpha, *mean_and_error(loss)

    return NoiseLevelEstimates(
        *per_noise_level(key, score, data, ts, contexts, statistic)
    )


def fisher_lower_bound(
    key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    contexts: Array | None = None,
) -> NoiseLevelEstimates:
    r"""Return a lower bound of the relative Fisher divergence, without a known score.

    Each predicted number of the noise is corrected by a linear function of itself, of
    the noised number and of one, fitted on one half of the data. What this gains in
    denoising loss on the other half, over :math:`E|s|^2`, bounds the divergence from
    below. It sees scores of the wrong scale, offset or spread, not of the wrong shape:
    near zero says little, far above its standard error says that the score is wrong.

    Args:
        key: random key of the noise.
        score: the learned score.
        data: held-out rows.
        ts: times; None for eight levels from the highest to the lowest.
        contexts: what the score is conditioned on, one per row.

    Raises:
        ValueError: for data that do not fit the score or are not finite.

    Example:
        >>> from numpyro_score import VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -2 * x / (1 + VE().sigma(t) ** 2), VE(), (2,)
        ... )
        >>> data = jax.random.normal(jax.random.key(0), (2000, 2))
        >>> bound = fisher_lower_bound(jax.random.key(1), score, data)
        >>> bool((bound.value > 0.2).all())  # (1 - 1/2)^2
        True
    """

    def statistic(rows: NoisedData) -> tuple[Array, ...]:
        unit = rows.u / jnp.sqrt(jnp.square(rows.alpha) + jnp.square(rows.sigma))
        parts = (jnp.ones_like(unit), rows.predicted, unit)
        features = jnp.stack(parts, axis=-1)
        residual = rows.predicted - rows.noise
        first = jnp.arange(len(residual)) % (len(residual) // 2) % 2 == 0
        reduction = jnp.where(
            first,
            _loss_reduction(features, residual, ~first),
            _loss_reduction(features, residual, first),
        )
        norm = jnp.square(rows.predicted).sum(1)
        return rows.sigma / rows.alpha, *ratio_and_error(reduction, norm)

    return NoiseLevelEstimates(
        *per_noise_level(key, score, data, ts, contexts, statistic)
    )


def _loss_reduction(
    features: Float[Array, "n d k"], residual: Float[Array, "n d"], fitted: Array
) -> Float[Array, " n"]:
    """Return by how much a fit to the rows ``fitted`` lowers the square of each row."""
    weight = fitted / fitted.sum()
    gram = jnp.einsum("n,ndj,ndk->djk", weight, features, features)
    ridge = RIDGE * jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    moment = jnp.einsum("n,ndk,nd->dk", weight, features, residual)
    gram += ridge * jnp.eye(gram.shape[-1])
    coefficients = jnp.linalg.solve(gram, moment[..., None])[..., 0]
    correction = jnp.einsum("ndk,dk->nd", features, coefficients)
    return (2 * residual * correction - jnp.square(correction)).sum(1)


def _predict(
    score: ScoreModel, rows: NoisedData, contexts: Array | None
) -> Float[Array, "n d"]:
    """Return the noise that another score predicts for the same rows."""
    if contexts is None:
        predicted = score.noise(rows.x, rows.t)
    else:
        contexts = jnp.concatenate([contexts, contexts])
        one = lambda x, c: score.noise(x, rows.t, c)  # noqa: E731
        predicted = jax.vmap(one)(rows.x, contexts)
    return predicted.reshape(len(rows.x), -1)
