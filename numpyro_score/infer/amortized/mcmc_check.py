r"""Check of draws by a few exact MCMC steps from each of them.

A draw z of p and the end z' of a chain of reversible steps that starts at z are
exchangeable, :math:`(z, z') \sim (z', z)`, whatever p is and however short the chain.
Where the two differ beyond chance the draws are not those of p, and z', which is nearer
to p, tells by how much. Steps are Barker's (Livingstone and Zanella 2022), whose moves
stay bounded where gradients are steep; their sizes are drawn anew each time, over three
decades, as draws may be far wider than p. Errors are those of a jackknife over groups
of draws. Where a few wild draws decide an sd, and its error, swapping pairs at random
tells whether it is chance.

Densities may jump: they are exact steps for them as well. What chains do not reach
stays unseen: another mode, its share, and part of the error of far draws.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.infer.amortized.rank_regression import normal_scores
from numpyro_score.typing import PRNGKey, Scalar

# what they see of an error: `python -m tests.benchmarks.constants --only barker`
NUM_STEPS = 50
# in sd of the draws, about the best of one coordinate (2.4: Gelman, Roberts and Gilks
# 1996); sizes are uniform in their logarithm
MAX_STEP = 2.0
# of sizes, to .002 sd: draws that are a hundred times too wide still move
DECADES = 3.0
# of correlations, for a root where coordinates are equal: 8 float32 roundings
SHRINKAGE = 1e-6
WITHIN_ONE_SD = np.array([0.16, 0.84])  # Phi(-1) and Phi(1)
# sd from the median; beyond counts as there: 1 % change a variance by 1 at most
FAR = 10.0

# all are smaller with probability .005, as that of four standard errors of a jackknife
NUM_SWAPS = 199

Points = Float[np.ndarray, "rows size"]
Numbers = Float[np.ndarray, " size"]


def is_collapsed(z: Points) -> bool:
    """Return whether some number is the same in most of the draws.

    Example:
        >>> is_collapsed(np.zeros((9, 1))), is_collapsed(np.eye(2))
        (True, False)
    """
    return not _sd(z).all()


def scale_root(z: Points) -> Float[np.ndarray, "size size"]:
    """Return L with L L^T about the covariance of draws, of which a few are far off.

    Standard deviations are those of the central 68 %, correlations those of ranks; the
    draws must not be collapsed.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(4000, 1))
        >>> scale_root(z).round(1).tolist()
        [[1.0]]
    """
    scores = normal_scores(z, z)
    size = z.shape[1]
    correlation = np.corrcoef(scores, rowvar=False).reshape(size, size)
    shrunk = (1 - SHRINKAGE) * correlation + SHRINKAGE * np.eye(size)
    return _sd(z)[:, None] * np.linalg.cholesky(shrunk)


def barker_moves(
    log_density: Callable[..., Scalar],
    rng_key: PRNGKey,
    z: Float[Array, "rows size"],
    root: Float[Array, "size size"],
    *args: Array,
) -> Float[Array, "rows size"]:
    """Return where 50 of Barker's steps take every point.

    Points of density zero, or NaN, move to the first that has one. Where the gradient
    is not finite, steps are those of a random walk.

    Args:
        log_density: log p of a point and its row of ``args``, up to a constant.
        rng_key: a JAX random key.
        z: where the chains start.
        root: L of the draws' covariance; steps are isotropic in u with z = L u.
        args: what log p depends on, one row for each point.
    """

    def of_whitened(u: Array, *args: Array) -> Scalar:
        return log_density(root @ u, *args)

    def evaluate(u: Array) -> tuple[Array, Array]:
        value, slope = jax.vmap(jax.value_and_grad(of_whitened))(u, *args)
        is_known = jnp.isfinite(value) & jnp.isfinite(slope).all(-1)
        slope = jnp.where(is_known[:, None], slope, 0)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf), slope

    def step(state: tuple[Array, ...], rng_key: PRNGKey) -> tuple[Any, None]:
        u, value, slope = state
        key_size, key_move, key_side, key_accept = jax.random.split(rng_key, 4)
        decades = DECADES * jax.random.uniform(key_size, (len(u), 1))
        move = MAX_STEP * 10**-decades * jax.random.normal(key_move, u.shape)
        is_kept = jax.random.uniform(key_side, u.shape) < jax.nn.sigmoid(move * slope)
        move = jnp.where(is_kept, move, -move)
        new = u + move, *evaluate(u + move)
        back = jax.nn.log_sigmoid(-move * new[2]) - jax.nn.log_sigmoid(move * slope)
        log_ratio = new[1] - value + back.sum(-1)
        accepted = jnp.log(jax.random.uniform(key_accept, value.shape)) < log_ratio
        return jax.tree.map(jax.vmap(jnp.where), (accepted,) * 3, new, state), None

    u = jnp.linalg.solve(root, z.T).T
    keys = jax.random.split(rng_key, NUM_STEPS)
    (u, _, _), _ = jax.lax.scan(step, (u, *evaluate(u)), keys)
    return u @ root.T


def differences(before: Points, after: Points) -> Float[np.ndarray, "2 size"]:
    """Return by how much draws differ from where steps take them.

    The difference of the means in sd of the latter, and the log of the ratio of sd.
    Values beyond 10 sd from the median count as 10, so no draw says much by itself.

    Args:
        before: the draws.
        after: where the steps took them.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(400, 1))
        >>> differences(1 + 2 * z, z).round(1).tolist()
        [[1.0], [0.7]]
    """
    middle, reach = np.median(after, axis=0), FAR * _sd(after)
    near = [np.clip(z, middle - reach, middle + reach) for z in (before, after)]
    (mean, moved_mean), (sd, moved_sd) = np.mean(near, axis=1), np.std(near, axis=1)
    return np.stack([(mean - moved_mean) / moved_sd, np.log(sd / moved_sd)])


def swapped_differences(before: Points, after: Points) -> Float[np.ndarray, "2"]:
    """Return the largest differences over 199 copies with pairs swapped at random.

    Those of draws of p are larger than all of them with probability .005 or less: the
    laws of pairs and of swapped pairs are equal, whatever p is (Fisher 1935).

    Args:
        before: the draws, which are independent.
        after: where the steps took them.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(2, 400, 1))
        >>> offset, log_ratio = swapped_differences(*z)
        >>> 0.1 < offset < 0.5, 0.1 < log_ratio < 0.5
        (np.True_, np.True_)
    """
    rng = np.random.default_rng(0)  # one set of draws has one verdict
    largest = np.zeros(2)
    for _ in range(NUM_SWAPS):
        swapped = rng.random((len(before), 1)) < 0.5
        pair = np.where(swapped, after, before), np.where(swapped, before, after)
        largest = np.maximum(largest, np.abs(differences(*pair)).max(axis=1))
    return largest


def _sd(z: Points) -> Numbers:
    """Return half the width of the central 68 %: the sd of a normal law."""
    low, high = np.quantile(z, WITHIN_ONE_SD, axis=0)
    return (high - low) / 2
