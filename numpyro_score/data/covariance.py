"""The covariance of rows: shrunk as held-out rows ask, and its leading axes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NUM_FOLDS = 5  # Hastie et al. 2009, section 7.10: five or ten, as a compromise
# Rows per column beyond which nothing is shrunk: the smallest eigenvalue of so many is
# .74 of the law's (Marchenko and Pastur 1967: the square of 1 - sqrt(1 / 50)).
MANY_ROWS = 50
# from the smallest to 1, evenly spaced in their logarithm: 1.8 apart, (1e6)^(1/24)
NUM_SHARES = 25


def shrunk_covariance(
    rows: Float[np.ndarray, "rows size"], min_share: float = 1e-6
) -> Float[np.ndarray, "size size"]:
    r"""Return :math:`(1 - a) S + a \,\mathrm{diag}(S)`, S the covariance about 0.

    The share a is the one at which held-out rows are most likely under the normal law
    of that covariance, by cross-validation (Friedman 1989). The share of least square
    error (Ledoit and Wolf 2004) would fill the narrow directions of smooth curves.

    Args:
        rows: data of mean 0 and about unit scale.
        min_share: smallest share, which keeps equal columns apart.

    Example:
        >>> rows = np.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> shrunk_covariance(rows).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    covariance = rows.T @ rows / len(rows)
    variance = np.diag(covariance)
    share = min_share
    if len(rows) < MANY_ROWS * rows.shape[1]:
        share = _best_share(rows / np.sqrt(np.where(variance > 0, variance, 1)), share)
    return (1 - share) * covariance + share * np.diag(variance)


def subspace_iteration(
    apply: Callable[[Float[Array, "size k"]], Float[Array, "size k"]],
    start: Float[Array, "size k"],
    num_iterations: int,
) -> Float[Array, "size k"]:
    """Return an orthonormal basis of the leading eigenvectors of a covariance.

    What is left of the others falls by the ratio of their eigenvalues to the leading
    ones in each iteration (Golub and Van Loan 2013, section 8.2).

    Args:
        apply: product of the covariance with vectors, which are columns.
        start: independent columns; any that are not orthogonal to the leading
            eigenvectors.
        num_iterations: number of products.

    Example:
        >>> variances = jnp.array([1.0, 4.0, 9.0])[:, None]
        >>> axes = subspace_iteration(lambda v: variances * v, jnp.ones((3, 1)), 20)
        >>> jnp.abs(axes[:, 0]).round(3).tolist()
        [0.0, 0.0, 1.0]
    """

    def step(_: Array, basis: Array) -> Array:
        return jnp.linalg.qr(apply(basis))[0]

    return jax.lax.fori_loop(0, num_iterations, step, start)


def _best_share(rows: Float[np.ndarray, "rows size"], min_share: float) -> float:
    """Return the share under which held-out rows are most likely."""
    shares = np.geomspace(1.0, min_share, NUM_SHARES)
    log_prob = np.zeros(NUM_SHARES)
    fold = np.random.default_rng(0).permutation(len(rows)) % NUM_FOLDS
    for k in range(min(NUM_FOLDS, len(rows)) if len(rows) > 1 else 0):
        kept, out = rows[fold != k], rows[fold == k]
        values, vectors = np.linalg.eigh(kept.T @ kept / len(kept))
        square = np.square(out @ vectors).sum(0)
        variance = shares[:, None] + np.outer(1 - shares, np.maximum(values, 0.0))
        log_prob -= 0.5 * (len(out) * np.log(variance) + square / variance).sum(1)
    return float(shares[log_prob.argmax()])
