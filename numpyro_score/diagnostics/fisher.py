r"""Relative Fisher divergence of a learned score at each noise level.

.. math:: F_t = \frac{E |s(x_t, t) - s^*(x_t, t)|^2}{E |s^*(x_t, t)|^2}

over noised data, in standardized coordinates. For a known score :math:`s^*` it is a
sample mean. For an unknown one, the difference of the numerators of two scores equals
that of their denoising losses (Vincent 2011). As no numerator is negative, the
reduction of the held-out denoising loss by a correction of s is a lower bound of the
numerator of s.
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
    predict_noise,
    ratio_and_error,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey, ScoreFn

RIDGE = 1e-5  # of the trace: about 100 float32 roundings, for collinear features


class NoiseLevelEstimates(NamedTuple):
    """Estimates at several noise levels.

    - **levels**: noise levels sigma/alpha, in units of the data's standard deviation.
    - **value**: the estimates.
    - **standard_error**: their Monte Carlo standard errors over the rows of data.
    """

    levels: Float[Array, " levels"]
    value: Float[Array, " levels"]
    standard_error: Float[Array, " levels"]


@renamed(key="rng_key")
def fisher_divergence(
    rng_key: PRNGKey,
    score: ScoreModel,
    exact: ScoreFn,
    data: Points,
    ts: Times = None,
) -> NoiseLevelEstimates:
    """Return the relative Fisher divergence F_t from a known score at each time.

    Args:
        rng_key: random key of the noise.
        score: the learned score.
        exact: (x, t) -> the true score of p_t at one point, in data units; for example
            another model's ``score``.
        data: draws of the true law, one per row.
        ts: times; None for eight levels from the highest to the lowest.

    Raises:
        ValueError: for data of another shape than the score's, or not finite.

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

    return NoiseLevelEstimates(
        *per_noise_level(rng_key, score, data, ts, None, statistic)
    )


@renamed(key="rng_key", contexts="context")
def denoising_loss(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    reference: ScoreModel | None = None,
    context: Array | None = None,
) -> NoiseLevelEstimates:
    """Return the mean squared error of the predicted noise per coordinate.

    The loss of the true score is unknown and above 0, so that a single loss does not
    measure the error of a score; differences do. With a ``reference`` on the same
    process the value is the loss minus that of the reference with the same noise, which
    estimates sigma^2 times the difference of their E|s - s*|^2, per coordinate.

    Args:
        rng_key: random key of the noise.
        score: the learned score.
        data: held-out data, one datum per row.
        ts: times; None for eight levels from the highest to the lowest.
        reference: another score of the same law with the same standardization.
        context: what the score is conditioned on, one per row.

    Raises:
        ValueError: for data of another shape than the score's, or not finite.

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
            other = predict_noise(reference, rows.x, rows.t, context)
            loss -= jnp.square(other - rows.noise).mean(1)
        return rows.sigma / rows.alpha, *mean_and_error(loss)

    return NoiseLevelEstimates(
        *per_noise_level(rng_key, score, data, ts, context, statistic)
    )


@renamed(key="rng_key", contexts="context")
def fisher_lower_bound(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    context: Array | None = None,
) -> NoiseLevelEstimates:
    r"""Return an estimated lower bound of the relative Fisher divergence.

    Each coordinate of the predicted noise is corrected by a linear function of itself,
    of the noised coordinate and of 1, fitted on one half of the data. The reduction of
    the denoising loss on the other half, over :math:`\sigma^2 E|s|^2`, estimates a
    lower bound. It detects scores of wrong scale, location or variance. Other errors
    leave it near 0: a small value is no evidence that the score is right.

    Args:
        rng_key: random key of the noise.
        score: the learned score.
        data: held-out data, one datum per row.
        ts: times; None for eight levels from the highest to the lowest.
        context: what the score is conditioned on, one per row.

    Raises:
        ValueError: for data of another shape than the score's, or not finite.

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
        *per_noise_level(rng_key, score, data, ts, context, statistic)
    )


def _loss_reduction(
    features: Float[Array, "n d k"], residual: Float[Array, "n d"], fitted: Array
) -> Float[Array, " n"]:
    """Return each row's reduction of |residual|^2 by a fit to the rows ``fitted``."""
    weight = fitted / fitted.sum()
    gram = jnp.einsum("n,ndj,ndk->djk", weight, features, features)
    ridge = RIDGE * jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    moment = jnp.einsum("n,ndk,nd->dk", weight, features, residual)
    gram += ridge * jnp.eye(gram.shape[-1])
    coefficients = jnp.linalg.solve(gram, moment[..., None])[..., 0]
    correction = jnp.einsum("ndk,dk->nd", features, coefficients)
    return (2 * residual * correction - jnp.square(correction)).sum(1)
