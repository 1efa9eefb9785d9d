r"""Stein identities as a test of a learned score on held-out data.

For the score s of the law of x, and any constant c,

.. math:: E[s(x)] = 0, \qquad E[(x - c)\, s(x)^\top] = -I ,

by integration by parts. They are necessary conditions: a violation shows that the score
is wrong, their validity does not show that it is right.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from numpyro_score.checks import Points
from numpyro_score.diagnostics.noised_data import (
    NoisedData,
    Times,
    mean_and_error,
    per_noise_level,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey


class SteinIdentities(NamedTuple):
    """Result of :func:`stein_identities`, in standardized coordinates.

    - **levels**: noise levels sigma/alpha, in units of the data's standard deviation.
    - **mean**: noise level times E[s]; 0 for the true score.
    - **mean_error**: its standard errors.
    - **product**: E[(x - c) s^T] + I; 0 for the true score.
    - **product_error**: its standard errors.
    - **p_value**: at each level, of the hypothesis that all entries are 0, by
      Bonferroni's correction.
    """

    levels: Float[Array, " levels"]
    mean: Float[Array, "levels d"]
    mean_error: Float[Array, "levels d"]
    product: Float[Array, "levels d d"]
    product_error: Float[Array, "levels d d"]
    p_value: Float[Array, " levels"]


@renamed(key="rng_key", contexts="context")
def stein_identities(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Points,
    ts: Times = None,
    *,
    context: Array | None = None,
) -> SteinIdentities:
    """Return the residuals of the Stein identities at each time, with standard errors.

    Args:
        rng_key: random key of the noise.
        score: the learned score.
        data: held-out data, one datum per row; a few thousand, as the p-values use the
            normal approximation of means.
        ts: times; None for eight levels from the highest to the lowest.
        context: what the score is conditioned on, one per row.

    Raises:
        ValueError: for data of another shape than the score's, or not finite.

    Example:
        >>> import jax
        >>> from numpyro_score import VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (2,)
        ... )
        >>> data = jax.random.normal(jax.random.key(0), (2000, 2))
        >>> bool(stein_identities(jax.random.key(1), score, data).p_value.min() > 1e-3)
        True
        >>> wrong = stein_identities(jax.random.key(1), score, 1.2 * data)
        >>> bool(wrong.p_value.min() < 1e-6)
        True
    """

    def statistic(rows: NoisedData) -> SteinIdentities:
        level = rows.sigma / rows.alpha
        scaled = -rows.predicted / rows.alpha  # noise level times the score
        centered = rows.u - rows.u.mean(0)
        mean, mean_error = mean_and_error(scaled)
        one = -rows.predicted / rows.sigma
        product, product_error = _outer(centered, one)
        product += jnp.eye(len(product))
        every = jnp.concatenate(
            [(mean / mean_error).ravel(), (product / product_error).ravel()]
        )
        p_value = 2 * norm.sf(jnp.abs(every).max()) * every.size
        return SteinIdentities(
            level, mean, mean_error, product, product_error, jnp.minimum(p_value, 1.0)
        )

    return per_noise_level(rng_key, score, data, ts, context, statistic)


def _outer(a: Float[Array, "n d"], b: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Return the mean of a b^T over rows and its standard error from pair means."""
    number = len(a) // 2
    (a, a_pair), (b, b_pair) = (jnp.split(v, 2) for v in (a, b))
    mean = (a.T @ b + a_pair.T @ b_pair) / (2 * number)
    squares = jnp.square(a).T @ jnp.square(b)
    squares += jnp.square(a_pair).T @ jnp.square(b_pair)
    squares += 2 * (a * a_pair).T @ (b * b_pair)
    variance = squares / (4 * number) - jnp.square(mean)
    return mean, jnp.sqrt(variance / number)
