"""Sequential rounds for one observation, with a truncated prior.

After each round prior draws are kept only where the current posterior has mass: in its
region of highest density. Inside the region the law of the draws is the prior up to a
constant, so nothing has to be corrected (Deistler et al. 2022; Sharrock et al. 2022).
A simulation is decided by its random key, so latents that are not learned keep their
prior given the others.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.density import log_prob_by
from numpyro_score.infer.simulations import Simulations
from numpyro_score.infer.simulator import BATCH_SIZE, Simulator
from numpyro_score.score import ScoreModel
from numpyro_score.solver import DPMSolverPP, Geometric
from numpyro_score.typing import PRNGKey

NUM_DRAWS = 4000  # posterior draws that say where the region is
LEFT_OUT = 1e-3  # share of the posterior outside of the region
MARGIN = 0.1  # of the box of draws that holds the region, per side
NUM_STEPS = 64  # of the density
DENSITIES_AT_ONCE = 2048
MAX_CANDIDATES = 200  # batches of prior draws per round


@dataclass(frozen=True)
class Region:
    """Where the density of z given one observation is above a threshold, in a box."""

    score: ScoreModel
    context: Array
    threshold: float
    low: Float[np.ndarray, " size"]
    high: Float[np.ndarray, " size"]

    def contains(self, z: Float[np.ndarray, "rows size"]) -> Bool[np.ndarray, " rows"]:
        """Return which rows lie in the region; the cheap box is asked first."""
        inside = ((z > self.low) & (z < self.high)).all(1)
        rows = np.flatnonzero(inside)
        for start in range(0, len(rows), DENSITIES_AT_ONCE):
            part = rows[start : start + DENSITIES_AT_ONCE]
            padded = np.resize(part, DENSITIES_AT_ONCE)  # one program for any number
            values = np.asarray(log_density(self.score, z[padded], self.context))
            inside[part] = values[: len(part)] > self.threshold
        return inside


def log_density(score: ScoreModel, z: Any, context: Array) -> Float[Array, " rows"]:
    """Return the log density of rows of z, coarsely."""
    ts = Geometric()(score.sde, NUM_STEPS)
    return log_prob_by(
        score, jnp.asarray(z), solver=DPMSolverPP(), ts=ts, context=context
    )


def highest_density_region(
    rng_key: PRNGKey, posterior: Any, observation: Any
) -> Region:
    """Return the region that leaves out a thousandth of the posterior.

    Args:
        rng_key: random key.
        posterior: an :class:`~numpyro_score.infer.amortized.AmortizedPosterior`.
        observation: what was observed.
    """
    context = posterior.simulator.observed.read(observation)
    draws = posterior.sample(rng_key, observation, NUM_DRAWS)
    z = np.asarray(posterior.latents.flatten(draws))
    values = np.asarray(log_density(posterior.score, z, context))
    threshold = float(np.quantile(values[np.isfinite(values)], LEFT_OUT))
    low, high = z.min(0), z.max(0)
    margin = MARGIN * (high - low)
    return Region(posterior.score, context, threshold, low - margin, high + margin)


def simulate_inside(
    rng_key: PRNGKey,
    simulator: Simulator,
    region: Region,
    num_simulations: int,
    **options: Any,
) -> Simulations:
    """Simulate with latents from the prior restricted to a region, by rejection.

    Args:
        rng_key: random key.
        simulator: the model.
        region: where latents must lie.
        num_simulations: how many simulations are run.
        options: of :meth:`Simulator.run_keys
            <numpyro_score.infer.simulator.Simulator.run_keys>`.

    Raises:
        ValueError: if no prior draw lies in the region.
    """
    kept, count = [], 0
    for i in range(MAX_CANDIDATES):
        keys = jax.random.split(jax.random.fold_in(rng_key, i), BATCH_SIZE)
        z = np.asarray(simulator.draw_latents(keys))
        inside = np.flatnonzero(region.contains(z))
        kept.append(keys[inside])
        count += len(inside)
        if count >= num_simulations:
            break
    if count == 0:
        raise ValueError(
            "The prior must reach the region of the current posterior, but none of "
            f"{MAX_CANDIDATES * BATCH_SIZE} prior draws did. The region is too small "
            "for rejection: use fewer rounds, or more simulations per round."
        )
    if count < num_simulations:
        warnings.warn(
            f"Only {count} of {MAX_CANDIDATES * BATCH_SIZE} prior draws lie in the "
            f"region of the current posterior, fewer than the {num_simulations} "
            "simulations of this round. The round goes on with these.",
            stacklevel=4,
        )
    return simulator.run_keys(jnp.concatenate(kept)[:num_simulations], **options)


def pool(
    rng_key: PRNGKey, region: Region, earlier: Simulations, later: Simulations
) -> Simulations:
    """Return all simulations inside a region, in random order.

    Earlier rounds had larger regions, so theirs follow the same truncated prior there.
    """
    inside = region.contains(earlier.z)
    z = np.concatenate([earlier.z[inside], later.z])
    context = np.concatenate([earlier.context[inside], later.context])
    order = np.asarray(jax.random.permutation(rng_key, len(z)))
    dropped = earlier.num_dropped + later.num_dropped
    return Simulations(z[order], context[order], dropped)
