r"""Held-out checks of a learned prior: of its score, and of its draws.

The kernel Stein test compares the score with held-out draws *at the noise level in
use*, and cannot see what that noise has blurred. Therefore draws of the learned prior
are also compared with held-out draws as they are, by two Kolmogorov-Smirnov
statistics, between 0 and 1:

- of each unconstrained coordinate;
- of the distance to the nearest row of the training set, with each coordinate mapped
  to normal scores. Draws that fill the surroundings of a narrow ridge, or of one that
  depends on other coordinates as a funnel does, lie farther from all rows than other
  draws of the same law.

Neither sees a few percent of the draws beyond all rows, which are all that matters
where new data move the posterior there. Their share is compared with that of
independent draws: one exceeds n others at one end with probability 1 / (n + 1).

P-values count held-out draws as their effective sample size says.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.diagnostics import effective_sample_size
from scipy import stats
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.diagnostics.stein import kernel_stein_discrepancy
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.rank_regression import normal_scores
from numpyro_score.model.learned_prior import LearnedPrior, PriorFit
from numpyro_score.score.level import CHANCE, MAX_SHARE
from numpyro_score.train.held_out import equal_rows
from numpyro_score.typing import PRNGKey

NUM_DRAWS = 2000  # of the learned prior, whose sd is then known within 1.6 %
# rows among which neighbors are sought: bounds time; of more, neighbors are nearer
MAX_REFERENCE = 10_000
POOR_FIT = 0.01  # p-value of the kernel Stein test, which finds any error of many rows
# sd in whitened space: a 95 % interval then covers 94 %; means of sites are off by less
MAX_MEAN_ERROR = 0.3
# A distance of .2 moves a fifth of the probability. Exact draws give .2 by chance where
# fewer than some 100 are held out, hence the p-value.
MAX_DISTANCE, FALSE_ALARM = 0.2, 1e-4
NAMED = 3  # coordinates in one warning

Vectors = Float[np.ndarray, "_ size"]


class DrawComparison(NamedTuple):
    """Distances of draws of a learned prior from held-out draws.

    - **marginal**: by unconstrained coordinate.
    - **neighbors**: of distances to the nearest row.
    - **distance_ratio**: median distance of learned draws over that of held-out ones.
    - **critical**: largest distance that is not a finding.
    """

    marginal: Float[np.ndarray, " size"]
    neighbors: float
    distance_ratio: float
    critical: float


def check_prior(
    rng_key: PRNGKey,
    prior: LearnedPrior,
    train: Vectors,
    held_out: Vectors,
    num_effective: float,
) -> PriorFit:
    """Return the checks of a learned prior; warn if one is poor.

    Args:
        rng_key: random key.
        prior: the prior.
        train: whitened rows that it was trained on.
        held_out: whitened rows that it was not trained on.
        num_effective: effective number of the latter.
    """
    fit = stein_check(rng_key, prior, held_out)
    key_draw = jax.random.fold_in(rng_key, 1)  # the test has used the key
    u = np.asarray(prior.sample_whitened(key_draw, (NUM_DRAWS,)), np.float64)
    _warn_if_beyond(
        prior, np.concatenate([train, held_out]), u, num_effective / len(held_out)
    )
    factor = np.asarray(prior.factor, np.float64)
    rows, others, drawn = (x @ factor.T for x in (train, held_out, u))
    compared = compare_draws(rows, others, drawn, num_effective)
    _warn_if_apart(prior, compared, others, drawn)
    return fit._replace(
        marginal=float(compared.marginal.max()), neighbors=compared.neighbors
    )


def stein_check(rng_key: PRNGKey, prior: LearnedPrior, held_out: Vectors) -> PriorFit:
    """Return the Stein check of the score in use on held-out rows; warn if poor.

    Args:
        rng_key: random key of the noise and the bootstrap.
        prior: the prior.
        held_out: whitened rows that it was not trained on.
    """
    key_noise, rng_key = jax.random.split(rng_key)
    score = prior.score
    t = score.sde.time(prior.level)
    alpha, sigma = score.sde.marginal(t)
    u = jnp.asarray(held_out, float)
    u = alpha * u + sigma * jax.random.normal(key_noise, u.shape)
    result = kernel_stein_discrepancy(rng_key, u, score.score(u, t))
    fit = PriorFit(result.discrepancy, result.p_value, len(u))
    size = _mean_error(u, result.statistic)
    if fit.p_value < POOR_FIT and size > MAX_MEAN_ERROR:
        warn_caller(
            "The learned prior differs from held-out draws (kernel Stein discrepancy "
            f"{fit.discrepancy:.3g}, as if its mean were off by {size:.2g} sd, p = "
            f"{fit.p_value:.3g}): posteriors with it may be "
            "wrong. Give more draws, thinned until they are nearly independent, train "
            "for longer, or pass a larger net in `trainer`."
        )
    return fit


def _mean_error(u: Float[Array, "rows size"], statistic: float) -> float:
    """Return the distance of means, in sd, of normal laws with a Stein discrepancy.

    A constant error e of the score has :math:`KSD^2 = e^2 E[k(x, x')]`.
    """
    rows = np.asarray(u, np.float64)
    rows = (rows - rows.mean(0)) / rows.std(0)
    kernel = 1 / np.sqrt(1 + pdist(rows, "sqeuclidean"))
    return float(np.sqrt(max(statistic, 0.0) / kernel.mean()))


def compare_draws(
    train: Vectors, held_out: Vectors, drawn: Vectors, num_effective: float
) -> DrawComparison:
    """Return how far drawn rows are from held-out rows.

    Args:
        train: rows among which neighbors are sought.
        held_out: other rows of their law.
        drawn: rows of the law to judge.
        num_effective: effective number of held-out rows.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.normal(size=3000)  # a ridge of width .1, and one of width .3
        >>> b, blurred = (a + width * rng.normal(size=3000) for width in (0.1, 0.3))
        >>> rows, drawn = np.stack([a, b], 1), np.stack([a, blurred], 1)
        >>> found = compare_draws(rows[:2500], rows[2500:], drawn, 500)
        >>> bool(found.marginal.max() < found.critical < found.neighbors)
        True
    """
    marginal = np.array(
        [
            stats.ks_2samp(x, y).statistic
            for x, y in zip(held_out.T, drawn.T, strict=True)
        ]
    )
    train = train[:MAX_REFERENCE]
    tree = cKDTree(normal_scores(train, train))
    near, far = (
        tree.query(normal_scores(train, rows))[0] for rows in (held_out, drawn)
    )
    chance = FALSE_ALARM / (len(marginal) + 1)
    critical = critical_distance(chance, num_effective, len(drawn))
    tiny = np.finfo(float).tiny
    return DrawComparison(
        marginal,
        float(stats.ks_2samp(near, far).statistic),
        float(np.median(far) / max(np.median(near), tiny)),
        float(max(MAX_DISTANCE, critical)),
    )


def critical_distance(probability: float, first: float, second: float) -> float:
    """Return the two-sample Kolmogorov-Smirnov distance of so small a probability.

    Args:
        probability: of a larger distance between draws of one law.
        first: effective number of draws of one sample.
        second: of the other.

    Example:
        >>> round(critical_distance(0.01, 400, 2000), 3)
        0.089
    """
    count = first * second / (first + second)
    return float(stats.kstwobign.isf(probability) / np.sqrt(count))


def effective_share(z: Vectors) -> float:
    """Return the effective sample size of rows in their order, over their number.

    The smallest of all coordinates and their squares, at most 1, and that of equal rows
    in any order, as of resampling with replacement: n rows of which n_k are equal have
    means as exact as n^2 / sum n_k^2 rows that differ (Kish 1965).

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(20, 1))
        >>> again = np.random.default_rng(1).permutation(np.repeat(rows, 50, axis=0))
        >>> round(1000 * effective_share(again))
        20
    """
    centered = z - z.mean(0)
    values = np.concatenate([centered, centered**2], axis=1)
    sizes = [float(effective_sample_size(x[None])) for x in values.T]
    share = np.nanmin(sizes) / len(z) if np.isfinite(sizes).any() else 1.0
    of_equal = len(z) / (np.bincount(equal_rows(z)) ** 2.0).sum()
    return float(np.clip(np.minimum(share, of_equal), 1 / len(z), 1.0))


def shares_beyond(rows: Vectors, drawn: Vectors) -> Float[np.ndarray, "2 size"]:
    """Return shares of draws below and above all rows, by coordinate.

    Example:
        >>> rows = np.array([[0.0], [1.0]])
        >>> shares_beyond(rows, np.array([[-1.0], [0.5], [0.9], [2.0]])).tolist()
        [[0.25], [0.25]]
    """
    return np.stack([(drawn < rows.min(0)).mean(0), (drawn > rows.max(0)).mean(0)])


def _warn_if_beyond(
    prior: LearnedPrior, rows: Vectors, drawn: Vectors, share: float
) -> None:
    """Warn of draws beyond all rows.

    Args:
        prior: the prior.
        rows: whitened rows that it was learned from.
        drawn: whitened draws of it.
        share: effective number of rows over their number.
    """
    # rows with noise of the level reach about three levels farther
    ends = np.concatenate([rows - 3 * prior.level, rows + 3 * prior.level])
    beyond = shares_beyond(ends, drawn)
    if beyond.max() <= max(MAX_SHARE, CHANCE / (share * len(rows))):
        return
    side, j = np.unravel_index(beyond.argmax(), beyond.shape)
    warn_caller(
        f"The learned prior at noise level {prior.level:.2g} has {beyond.max():.1%} of "
        f"its draws {('below', 'above')[side]} all draws that it was learned from, in "
        f"{coordinate_names(prior.latents)[j]} (unconstrained). Posteriors of new data "
        "that point there may be wrong. Give more draws and steps, or analyze all data "
        "together."
    )


def _warn_if_apart(
    prior: LearnedPrior, compared: DrawComparison, held_out: Vectors, drawn: Vectors
) -> None:
    """Warn of draws that differ from held-out ones, with direction and size."""
    texts = []
    names, loc = coordinate_names(prior.latents), np.asarray(prior.loc, np.float64)
    worst = np.argsort(-compared.marginal)[:NAMED]
    for j in worst[compared.marginal[worst] > compared.critical]:
        ends = [
            " to ".join(f"{q:.3g}" for q in loc[j] + np.quantile(x[:, j], [0.05, 0.95]))
            for x in (drawn, held_out)
        ]
        texts.append(
            f"{names[j]} (unconstrained) has 90 % of its draws from {ends[0]}, those "
            f"that it was learned from {ends[1]}"
        )
    if compared.neighbors > compared.critical:
        texts.append(
            "it fills narrow ridges or modes otherwise: its draws lie at "
            f"{compared.distance_ratio:.2g} times the distance of held-out ones from "
            "the draws that it was learned from (median)"
        )
    if texts:
        warn_caller(
            f"The learned prior at noise level {prior.level:.2g} differs from held-out "
            f"draws: {'; '.join(texts)}. Posteriors with it may be wrong. Learn sites "
            "whose law is smooth (logarithms of skewed ones, groups non-centered), "
            "give more draws and steps, lower `level`, or analyze all data together."
        )
