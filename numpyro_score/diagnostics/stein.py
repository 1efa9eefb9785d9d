r"""Kernel Stein discrepancy (KSD) of draws from a law with a known score.

.. math:: KSD^2 = E_{x, x'}[u(x, x')], \quad
   u = s^\top s' k + s^\top \nabla_{x'} k + s'^\top \nabla_x k
       + tr \nabla_x \nabla_{x'} k

with s the score at x and s' that at x', uses draws and their scores and no draws of the
law (Liu et al. 2016; Chwialkowski et al. 2016). With the inverse multiquadric
kernel :math:`k = (1 + |x - x'|^2)^{-1/2}` on standardized draws it controls weak
convergence (Gorham and Mackey 2017, theorem 8).

It does not detect wrong weights of well separated modes: the score in each mode does
not depend on the weights. No test that uses the score alone at one noise level does.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import Points, check_count, check_key, check_rows_finite
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey


class SteinDiscrepancy(NamedTuple):
    """Result of :func:`kernel_stein_discrepancy`.

    - **statistic**: unbiased estimate of KSD^2 (U-statistic), of mean 0 under the law.
    - **discrepancy**: square root of the biased estimate (V-statistic), in units of the
      standardized score. Positive also under the law: compare samples of one size.
    - **p_value**: bootstrap p-value of the hypothesis that draws follow the law.
    """

    statistic: float
    discrepancy: float
    p_value: float


@renamed(key="rng_key")
def kernel_stein_discrepancy(
    rng_key: PRNGKey,
    draws: Points,
    scores: Points,
    *,
    num_bootstrap: int = 1000,
) -> SteinDiscrepancy:
    """Return the KSD of draws from the law with the given scores, with its test.

    The test assumes independent draws: thin chains until their effective sample size is
    their number. Time and memory are quadratic in the number of draws; a few thousand
    are enough.

    Args:
        rng_key: random key of the bootstrap.
        draws: draws under test, one per row.
        scores: gradient of the log density of the law at each draw, for example
            ``score.score(draws, t)`` or ``jax.vmap(jax.grad(log_density))(draws)``.
        num_bootstrap: number of bootstrap replicates (Liu et al. 2016).

    Raises:
        ValueError: for shapes that differ, fewer than ten draws, draws that do not
            vary, or values that are not finite.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (200, 2))
        >>> kernel_stein_discrepancy(jax.random.key(1), x, -x).p_value > 0.01
        True
        >>> kernel_stein_discrepancy(jax.random.key(1), x + 0.5, -x - 0.5).p_value
        0.000999...
    """
    check_key("rng_key", rng_key)
    check_count("num_bootstrap", num_bootstrap, "a number of repetitions")
    x, s = _check(draws, scores)
    statistic, root, null = _discrepancy(rng_key, x, s, num_bootstrap)
    p_value = (1 + int((null >= statistic).sum())) / (1 + num_bootstrap)
    return SteinDiscrepancy(float(statistic), float(root), p_value)


@partial(jax.jit, static_argnames="num_bootstrap")
def _discrepancy(
    key: PRNGKey, x: Float[Array, "n d"], s: Float[Array, "n d"], num_bootstrap: int
) -> tuple[Array, Array, Array]:
    """Return the U-statistic, the root of the V-statistic, and bootstrap values."""
    number = len(x)
    kernel = _stein_kernel(x, s)
    root = jnp.sqrt(jnp.maximum(kernel.mean(), 0.0))
    kernel = jnp.where(jnp.eye(number, dtype=bool), 0.0, kernel)
    statistic = kernel.sum() / (number * (number - 1))

    def resample(key: PRNGKey) -> Array:
        rows = jax.random.randint(key, (number,), 0, number)
        weights = jnp.zeros(number).at[rows].add(1.0) / number - 1 / number
        return weights @ kernel @ weights

    null = jax.lax.map(resample, jax.random.split(key, num_bootstrap), batch_size=100)
    return statistic, root, null


def _stein_kernel(
    x: Float[Array, "n d"], s: Float[Array, "n d"]
) -> Float[Array, "n n"]:
    """Return u(x, x') for all pairs, from inner products (no n x n x d array)."""
    inner = x @ x.T
    norms = jnp.diagonal(inner)
    square = jnp.maximum(norms[:, None] + norms[None] - 2 * inner, 0.0)
    base = 1 + square
    products = s @ x.T
    diagonal = jnp.diagonal(products)
    # s . (x - x') + s' . (x' - x)
    displacement_terms = (diagonal[:, None] - products) + (diagonal[None] - products.T)
    size = x.shape[1]
    return (
        (s @ s.T) / jnp.sqrt(base)
        + displacement_terms * base**-1.5
        + size * base**-1.5
        - 3 * square * base**-2.5
    )


def _check(draws: Points, scores: Points) -> tuple[Array, Array]:
    """Return standardized draws and scores as matrices."""
    for name, values in {"draws": draws, "scores": scores}.items():
        check_rows_finite(name, values)
    if np.shape(draws) != np.shape(scores):
        raise ValueError(
            "`scores` must have the shape of `draws`: one gradient for each. "
            f"Got {np.shape(scores)} and {np.shape(draws)}."
        )
    x, s = (np.asarray(a).reshape(len(a), -1) for a in (draws, scores))
    if len(x) < 10:  # fewer tell next to nothing; not tuned
        raise ValueError(f"`draws` must have at least 10 rows. Got {len(x)}.")
    scale = x.std(axis=0)
    if (scale == 0).any():
        raise ValueError(
            "`draws` must vary in every number: a constant follows no density. "
            f"Constant numbers: {np.flatnonzero(scale == 0)[:10].tolist()}."
        )
    return jnp.asarray((x - x.mean(axis=0)) / scale), jnp.asarray(s * scale)
