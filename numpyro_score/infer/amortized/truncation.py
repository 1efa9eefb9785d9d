"""Truncated sequential simulation for one observation.

After each round prior draws are restricted to the highest-density region of the current
posterior. There the truncated prior is proportional to the prior, so that the posterior
needs no correction (Deistler et al. 2022; Sharrock et al. 2022). If the region has
little prior mass, draws of a proposal around the posterior are resampled with weights
prior / proposal, which gives the truncated prior in the limit of many proposals.
Latents that are not learned keep their prior given the others.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.infer.amortized.simulator import BATCH_SIZE, Simulations, Simulator
from numpyro_score.score.density import solver_log_prob
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import DPMSolverPP, Geometric
from numpyro_score.typing import PRNGKey

TAIL_MASS = 1e-3  # posterior mass outside the region, epsilon of Deistler et al. 2022
NUM_DRAWS = 4000  # posterior draws; 4 of them are outside the region
# of the draws' range, on each side; less: faster, may cut a tail; not tuned
BOX_MARGIN = 0.1
# of DPMSolverPP(2) for log q: error below 0.1 nats (test_coarse_densities_are_close)
NUM_STEPS = 64
DENSITY_BATCH_SIZE = 2048  # densities per compiled call; bounds memory
MAX_BATCHES = 200  # of BATCH_SIZE prior draws per round: at most 2 million
# 5 % of the most, after which the number of batches needed is extrapolated
NUM_TRIAL_BATCHES = 10
# kernels of the proposal, as its cost; fewer: uneven weights; not tuned
NUM_CENTERS = 500
# proposals per simulation; the law of those chosen is tested at this value
# (test_resampled_draws_follow_the_truncated_prior_too)
OVERSAMPLING = 20


@dataclass(frozen=True)
class HighestDensityRegion:
    """The set of z with log q(z given one observation) > threshold, within a box.

    - **score**: the learned score; **context**: the observation.
    - **threshold**: log density in nats.
    - **low**, **high**: corners of the box.
    - **draws**: posterior draws of z from which the region was estimated.
    """

    score: ScoreModel
    context: Array
    threshold: float
    low: Float[np.ndarray, " size"]
    high: Float[np.ndarray, " size"]
    draws: Float[np.ndarray, "draws size"]

    def contains(self, z: Float[np.ndarray, "rows size"]) -> Bool[np.ndarray, " rows"]:
        """Return which rows are in the region; densities only inside the box."""
        inside = ((z > self.low) & (z < self.high)).all(1)
        rows = np.flatnonzero(inside)
        for start in range(0, len(rows), DENSITY_BATCH_SIZE):
            part = rows[start : start + DENSITY_BATCH_SIZE]
            padded = np.resize(part, DENSITY_BATCH_SIZE)  # one shape, one compilation
            values = np.asarray(log_density(self.score, z[padded], self.context))
            inside[part] = values[: len(part)] > self.threshold
        return inside


def log_density(score: ScoreModel, z: Any, context: Array) -> Float[Array, " rows"]:
    """Return log q(z given context) of rows of z, in nats, by 64 solver steps."""
    ts = Geometric()(score.sde, NUM_STEPS)
    return solver_log_prob(
        score, jnp.asarray(z), solver=DPMSolverPP(), ts=ts, context=context
    )


def highest_density_region(
    rng_key: PRNGKey, posterior: Any, observation: Any
) -> HighestDensityRegion:
    """Return the highest-density region of posterior mass 1 - ``TAIL_MASS``.

    Args:
        rng_key: random key.
        posterior: an :class:`~numpyro_score.infer.AmortizedPosterior`.
        observation: the observed value.
    """
    context = posterior.simulator.observed.parse(observation)
    draws = posterior.sample(rng_key, observation, NUM_DRAWS)
    z = np.asarray(posterior.latents.flatten(draws))
    values = np.asarray(log_density(posterior.score, z, context))
    threshold = float(np.quantile(values[np.isfinite(values)], TAIL_MASS))
    low, high = z.min(0), z.max(0)
    margin = BOX_MARGIN * (high - low)
    return HighestDensityRegion(
        posterior.score, context, threshold, low - margin, high + margin, z
    )


def simulate_truncated(
    rng_key: PRNGKey,
    simulator: Simulator,
    region: HighestDensityRegion,
    num_simulations: int,
    **options: Any,
) -> Simulations:
    """Return simulations with latents from the prior restricted to a region.

    Args:
        rng_key: random key.
        simulator: the model.
        region: support of the restricted prior.
        num_simulations: number of simulations.
        options: of :meth:`Simulator.run_keys
            <numpyro_score.infer.amortized.simulator.Simulator.run_keys>`.

    Raises:
        ValueError: if the prior has no mass in the region.
    """
    key_reject, key_draw, key_run = jax.random.split(rng_key, 3)
    keys = _rejection_sample(key_reject, simulator, region, num_simulations)
    if len(keys) == num_simulations:
        return simulator.run_keys(keys, **options)
    z = importance_resample(key_draw, simulator, region, num_simulations)
    if len(z) == 0:
        raise ValueError(
            "The prior must reach the region of the current posterior, but neither "
            "prior draws nor draws of the posterior have density there. The posterior "
            "of the last round is wrong: use more simulations per round."
        )
    if len(z) < num_simulations:
        warn_caller(
            f"Only {len(z)} draws lie in the region of the current posterior, fewer "
            f"than the {num_simulations} simulations of this round. The round goes on "
            "with these."
        )
    keys = jax.random.split(key_run, len(z))
    return simulator.run_keys(keys, latents=z, **options)


def _rejection_sample(
    rng_key: PRNGKey, simulator: Simulator, region: HighestDensityRegion, count: int
) -> PRNGKey:
    """Return keys of ``count`` simulations in the region, or no key if too many fail.

    A key determines the latents of its simulation, so that rejected simulations are not
    run further than their latents.
    """
    kept: list[Any] = []
    for i in range(MAX_BATCHES):
        keys = jax.random.split(jax.random.fold_in(rng_key, i), BATCH_SIZE)
        z = np.asarray(simulator.draw_latents(keys))
        kept.append(keys[np.flatnonzero(region.contains(z))])
        found = sum(map(len, kept))
        if found >= count:
            return jnp.concatenate(kept)[:count]
        if (
            i + 1 == NUM_TRIAL_BATCHES
            and found * MAX_BATCHES < count * NUM_TRIAL_BATCHES
        ):
            break
    return keys[:0]


def importance_resample(
    rng_key: PRNGKey, simulator: Simulator, region: HighestDensityRegion, count: int
) -> Float[Array, "rows size"]:
    r"""Return at most ``count`` distinct points of the restricted prior.

    Importance resampling without replacement. The proposal is a mixture of normal laws
    centered at posterior draws with their covariance C, wider than the posterior, so
    that the weights :math:`p(z) / \sum_i N(z; z_i, C)` vary little in the region. The
    points with the largest sums of log weight and Gumbel noise are chosen (Efraimidis
    and Spirakis 2006).
    """
    key_center, key_noise, key_prior, key_choose = jax.random.split(rng_key, 4)
    centers = jax.random.choice(key_center, region.draws, (NUM_CENTERS,))
    loc = centers.mean(0)
    factor = jnp.linalg.cholesky(jnp.atleast_2d(jnp.cov(region.draws.T)))
    noise = jax.random.normal(key_noise, (OVERSAMPLING * count, len(loc)))
    white = jax.scipy.linalg.solve_triangular(factor, (centers - loc).T, lower=True).T
    points = jnp.resize(white, noise.shape) + noise
    z = loc + points @ factor.T
    z, points = (part[region.contains(np.asarray(z))] for part in (z, points))
    if len(z) == 0:
        return z
    log_prior = jax.vmap(simulator.log_prior, (0, None))(z, key_prior)
    order = -log_prior + jax.lax.map(lambda u: _log_mixture(u, white), points)
    order = order - jax.random.gumbel(key_choose, order.shape)
    best = jnp.argsort(order)[: min(count, int(jnp.isfinite(log_prior).sum()))]
    return z[best]


def _log_mixture(u: Array, centers: Float[Array, "centers size"]) -> Array:
    """Return the log density of a mixture of unit normal laws, up to a constant."""
    return jax.nn.logsumexp(-0.5 * jnp.square(u - centers).sum(-1))


def merge_rounds(
    rng_key: PRNGKey,
    region: HighestDensityRegion,
    earlier: Simulations,
    later: Simulations,
) -> Simulations:
    """Return earlier and later simulations inside a region, in random order.

    Earlier rounds had larger regions, so that their simulations inside this one follow
    the same truncated prior.
    """
    inside = region.contains(earlier.z)
    z = np.concatenate([earlier.z[inside], later.z])
    context = np.concatenate([earlier.context[inside], later.context])
    order = np.asarray(jax.random.permutation(rng_key, len(z)))
    dropped = earlier.num_dropped + later.num_dropped
    return Simulations(z[order], context[order], dropped)
