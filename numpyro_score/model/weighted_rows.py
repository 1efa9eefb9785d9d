r"""Rows that a score was learned from, weighted by the likelihood, beside the draws.

Rows :math:`x_i` of the data of a learned law, with the noise of the level in use, are
draws of it. Where a chain has its other latents at :math:`\theta`, weights

.. math:: w_i \propto p(y \mid x_i, \theta)

make them draws of :math:`p(x \mid \theta, y)`, in all modes of the law, visited by the
chain or not: one step of a Gibbs sampler with independent proposals. Such a step leaves
the posterior as it is, so that draws that differ from the weighted rows have lost a
mode, or belong to a score that does not fit its rows. Rows tell nothing where the
likelihood leaves few of them.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.data.rows import evenly_spaced
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.potential import ModelPotential
from numpyro_score.run_verdict import Finding
from numpyro_score.smc.resampling import systematic
from numpyro_score.smc.weights import effective_sample_size
from numpyro_score.typing import PRNGKey

# evaluations of the likelihood: 9 % of the time of 4 chains of 1000 transitions of 8
# steps, if a gradient costs three evaluations
MAX_EVALUATIONS = 2**13
MIN_ROWS = 256  # fewer: the likelihood leaves too few of them
NUM_KEPT = 1024  # of all chains, resampled by their weights
MIN_KEPT = 16  # of one chain
BATCH = 256  # rows whose likelihood is computed at once, for the memory
MIN_SIZE = 50.0  # effective number of rows: a mean is then known within .14 sd
# sd of the draws from their mean: 1 in 10^9 of a normal law, 1/36 at most of any
# (Chebyshev), and 1 in 1000 of a Student law of 3 degrees of freedom
FAR = 6.0
# of the rows that may be far in a coordinate, where the law has heavy tails
MAX_FAR = 0.01
MAX_SHIFT = 0.2  # sd of the draws, of means: what is asked of a posterior
MAX_WIDTH = 0.14  # of the log sd, 15 %: the same
# chance of a finding for each kind of test of a run whose draws are right
FALSE_ALARM = 1e-4
SURELY = 2.0  # standard errors beyond what is tolerated: conventional
TOLERANCE = 1e-3  # of coordinates that are mapped to a site's support and back
REMEDY = (
    "The draws have lost a part of the learned law, or the score does not fit its data "
    "there. Compare with ParallelTempering and ScoreSDE; where these agree with the "
    "draws, train longer or on more rows."
)


class WeightedSite(NamedTuple):
    """Place of a learned site in the vector of all latents; no arrays.

    - **name**: of the site.
    - **start**: number of its first coordinate, in the order of the kernel.
    - **size**: number of coordinates of a point.
    - **alone**: whether the model has no other latent, so that weighted rows are draws
      of the posterior and not of a conditional law.
    """

    name: str
    start: int
    size: int
    alone: bool


class ChainMoments(NamedTuple):
    """Means, standard deviations and effective sample sizes of the draws of a run.

    Of all latents, in the order of the kernel.
    """

    mean: np.ndarray
    sd: np.ndarray
    ess: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightedRows:
    """Rows of learned sites, resampled by their weights; chains come first.

    Args:
        points: of every site, of shape (chains, points of the site, rows, coordinates).
        ess: effective number of rows, of shape (chains, points of the site).
        sites: where they stand.
    """

    points: tuple[Any, ...]
    ess: tuple[Any, ...]
    sites: tuple[WeightedSite, ...] = field(metadata={"static": True})

    def findings(self, draws: ChainMoments) -> list[Finding]:
        """Return findings where draws differ from the weighted rows.

        Args:
            draws: moments of the chains.
        """
        found = []
        for site, points, ess in zip(self.sites, self.points, self.ess, strict=True):
            for i in range(points.shape[1]):
                start = site.start + i * site.size
                part = slice(start, start + site.size)
                own = ChainMoments(*(moment[part] for moment in draws))
                found += _compare(site, points[:, i], ess[:, i], own)[:1]
        return found


def weigh_rows(
    potential: Any,
    starts: dict[str, int],
    num_chains: int,
    z: dict[str, Array],
) -> WeightedRows | None:
    """Return weighted rows of learned sites; None if none can be weighted.

    Args:
        potential: of the model.
        starts: numbers of the first coordinates of the sites whose rows are known, in
            the vector of all latents.
        num_chains: of the run.
        z: the latents of chains, with a first axis.
    """
    sites, weighted = [], []
    for name, start in starts.items():
        law = potential.learned[name]
        batch = z[name].shape[1 : z[name].ndim - law.score.event_dim]
        num_points = math.prod(batch)
        alone = len(z) == 1 and num_points == 1
        shared = 1 if alone else num_chains * num_points
        known = len(law.score.rows) if num_points else 0
        num_rows = min(known, MAX_EVALUATIONS // max(shared, 1))
        if num_rows < MIN_ROWS or z[name].shape[1:] != batch + law.score.event_shape:
            continue
        rows = _noisy_rows(law)[evenly_spaced(known, num_rows)]
        num_kept = max(MIN_KEPT, NUM_KEPT // num_chains)
        weigh = partial(_weigh, potential, name, rows, num_points, num_kept)
        keys = jax.random.split(jax.random.key(0), len(z[name]))
        weighted.append(jax.vmap(weigh)(keys, z))
        sites.append(WeightedSite(name, start, law.score.size, alone))
    if not sites:
        return None
    points, ess = zip(*weighted, strict=True)
    return WeightedRows(points, ess, tuple(sites))


def _noisy_rows(law: ScoreDistribution) -> Array:
    """Return draws of a law at its noise level: unconstrained rows with noise."""
    score, rows = law.score, jnp.asarray(law.score.rows)
    noise = jax.random.normal(jax.random.key(1), rows.shape, rows.dtype)
    noisy = rows + score.sde.noise_level(law.t) * noise
    return jax.vmap(score.standardize.inverse)(score.sde.alpha(law.t) * noisy)


def _weigh(
    potential: ModelPotential,
    name: str,
    rows: Array,
    num_points: int,
    num_kept: int,
    key: PRNGKey,
    z: dict[str, Array],
) -> tuple[Array, Array]:
    """Return rows in the place of each point of a site, and their effective number.

    None are effective where the weights are not those of the learned law alone: under
    masks, scales and transforms.
    """

    def log_likelihood(i: Array, row: Array) -> Array:
        x = z[name].reshape(num_points, -1).at[i].set(row.reshape(-1))
        moved = {**z, name: x.reshape(z[name].shape).astype(z[name].dtype)}
        same = potential.learned_points(moved)[name].reshape(num_points, -1)[i]
        is_same = jnp.isclose(same, row.reshape(-1), TOLERANCE, TOLERANCE).all()
        return jnp.where(is_same, -potential.value(moved), -jnp.inf)

    def weigh(i: Array) -> tuple[Array, Array]:
        log_weight = jax.lax.map(partial(log_likelihood, i), rows, batch_size=BATCH)
        log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
        chosen = systematic(key, log_weight, num_kept)
        is_judged = is_law[i] & jnp.isfinite(log_weight).any()
        ess = jnp.where(is_judged, effective_sample_size(log_weight), 0.0)
        return rows.reshape(len(rows), -1)[chosen], ess

    is_law = potential.learned_weights(z)[name].reshape(-1) == 1
    return jax.lax.map(weigh, jnp.arange(num_points))


def _compare(
    site: WeightedSite, points: np.ndarray, ess: np.ndarray, draws: ChainMoments
) -> list[Finding]:
    """Return findings for one point of a site, the most telling first.

    Args:
        site: the site.
        points: rows, of shape (chains, rows, coordinates).
        ess: effective number of rows of each chain.
        draws: moments of the coordinates.
    """
    size = float(np.median(ess))
    if not size >= MIN_SIZE:
        return []
    sd = np.where(draws.sd > 0, draws.sd, 1.0)
    scaled = (points - draws.mean) / sd
    found = _far(site, scaled, size)
    if site.alone:
        found += _moved(site, scaled.reshape(-1, scaled.shape[-1]), size, draws.ess)
    return found


def _far(site: WeightedSite, scaled: np.ndarray, size: float) -> list[Finding]:
    """Return a finding for rows where no draw is, in most of the chains."""
    share = float(np.median((np.abs(scaled) > FAR).any(-1).mean(-1)))
    # normal limits of a Poisson number's square root
    chance = NormalDist().inv_cdf(1 - FALSE_ALARM)
    limit = (MAX_FAR**0.5 + 0.5 * chance / size**0.5) ** 2
    if share <= limit:
        return []
    what = (
        f"the share of rows of the data of site '{site.name}', weighted by the "
        f"likelihood, more than {FAR:g} sd away from all draws,"
    )
    return [Finding("rows", what, share, limit, REMEDY)]


def _moved(
    site: WeightedSite, scaled: np.ndarray, size: float, ess: np.ndarray
) -> list[Finding]:
    """Return a finding for a mean, or an sd, that is not that of the weighted rows."""
    limit = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * len(ess)))
    variance = 1 / size + 1 / np.maximum(ess, 1.0)  # of a mean, per that of a draw
    center, width = scaled.mean(0), np.maximum(scaled.std(0), TOLERANCE)
    kurtosis = np.square(np.square((scaled - center) / width)).mean(0)
    shift_error = width * np.sqrt(variance)
    width_error = np.sqrt(np.maximum(kurtosis - 1, 0.0) * variance / 4)
    tests = (
        ("mean, in sd", np.abs(center), shift_error, MAX_SHIFT),
        ("log sd", np.abs(np.log(width)), width_error, MAX_WIDTH),
    )
    found = []
    for name, change, error, tolerated in tests:
        most = np.maximum(limit * error, tolerated + SURELY * error)
        worst = int(np.argmax(change / most))
        what = (
            f"the difference in {name}, between the draws of site '{site.name}' and "
            "rows of its data, weighted by the likelihood,"
        )
        if change[worst] > most[worst]:
            pair = float(change[worst]), float(most[worst])
            found.append(Finding("rows", what, *pair, REMEDY))
    return found
