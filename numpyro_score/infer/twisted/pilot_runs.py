r"""Pilot runs: what later runs of twisted SMC keep fixed, and how many particles.

A run that adapts powers and scales to its own particles estimates the evidence with a
bias. Pilot runs adapt them once; later runs take their means, and estimate without bias
for any number of particles. With s the standard deviation of :math:`\log \hat Z` a
proposed run is accepted with probability :math:`2 \Phi(-s / \sqrt 2)`, about .5 at
s = 1, which decides how many particles a run needs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.infer.twisted.replicates import raise_zero_weight
from numpyro_score.infer.twisted.run import (
    StaticArguments,
    choose_covariance,
    learned_covariances,
    learned_times,
    model_arguments,
)
from numpyro_score.infer.twisted.sampler import LevelSettings, SMCResult, twisted_smc
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.level_covariance import LevelCovariance
from numpyro_score.model.noise_levels import level_times
from numpyro_score.smc.weights import nan_to_zero_weight
from numpyro_score.typing import PRNGKey, SiteValues

NUM_PILOTS = 4  # whose settings are averaged: their errors are halved, and one may fail
# of a pilot run at least: a mean over them is within 1 / 128^1/2 = 9 % of an sd
PILOT_PARTICLES = 128
NUM_TRIALS = 32  # whose sd has the relative error 1/(2 * 31)^1/2 = .13
MIN_PARTICLES = 16  # that are tried; fewer are seldom enough; not tuned
# that are chosen: bounds the time of a run; more by `num_particles`
MAX_PARTICLES = 2048
MAX_SD = 1.0  # of log evidence: acceptance 2 Phi(-1/2^1/2) = .48
POOR_SD = 1.2  # beyond which acceptance is below .4


class PilotRuns(NamedTuple):
    """Pilot runs, and what later runs take from them.

    - **ts**: decreasing times of the levels.
    - **covariances**: of x_0 given x_t by learned site; None for those of each point.
    - **settings**: means over the pilot runs.
    - **runs**: the pilot runs, along the first axis.
    - **num_particles**: of later runs.
    """

    ts: Float[Array, " ts"]
    covariances: dict[str, LevelCovariance] | None
    settings: LevelSettings
    runs: SMCResult
    num_particles: int

    def draw(self, key: PRNGKey) -> SiteValues:
        """Return one particle of the pilot runs, by weight."""
        log_weight = self.runs.weights.log_weight + log_estimate(self.runs)[:, None]
        log_weight = nan_to_zero_weight(log_weight.reshape(-1))
        index = jax.random.categorical(key, log_weight)
        return jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[index], self.runs.z
        )


def pilot_runs(
    model: Callable,
    args: tuple,
    kwargs: dict,
    levels: int | Sequence[float],
    covariance: str | None,
    num_particles: int | None,
) -> PilotRuns:
    """Return pilot runs, the same for the same model and arguments.

    Args:
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        levels: number of noise levels, or the levels.
        covariance: of x_0 given x_t, as in ``ScoreSDE``.
        num_particles: of later runs; None finds it by trial.

    Raises:
        ValueError: for a model that a reverse SDE cannot sample, or pilot runs that
            have all lost their weight.
    """
    static, arrays = model_arguments(model, args, kwargs)
    ts = jnp.asarray(level_times(levels, learned_times(arrays, model, static)))
    used = covariance or choose_covariance(arrays, model, static)
    fixed = used == "fixed"
    covariances = learned_covariances(arrays, model, static) if fixed else None
    # fixed: settings must not vary with the key of the draws
    key_pilots, key_trials = jax.random.split(jax.random.key(0))
    run = partial(_run_each, ts=ts, arrays=arrays, covariances=covariances, model=model)
    run = partial(run, static=static)
    size = max(num_particles or 0, PILOT_PARTICLES)
    runs = run(jax.random.split(key_pilots, NUM_PILOTS), None, size=size)
    live = np.isfinite(runs.weights.log_evidence)
    if not live.any():
        raise_zero_weight(
            runs.weights.log_evidence, runs.ess, np.asarray(runs.failures)
        )
    settings = jax.tree.map(lambda leaf: leaf[live].mean(0), runs.settings)
    keys = jax.random.split(key_trials, NUM_TRIALS)

    def trial(size: int) -> Array:
        return log_estimate(run(keys, settings, size=size))

    num_particles = num_particles or choose_num_particles(trial)
    return PilotRuns(ts, covariances, settings, runs, num_particles)


def choose_num_particles(trial: Callable[[int], Any]) -> int:
    """Return a number of particles at which the log evidence has an sd of at most 1.

    The variance falls with the number of particles, or more slowly, so that the number
    is multiplied by the variance until that is small enough.

    Args:
        trial: returns the log evidence of several runs with a number of particles.

    Example:
        >>> def trial(size):
        ...     return np.array([-1.0, 1.0]) * (64 / size) ** 0.5
        >>> choose_num_particles(trial)
        64
    """
    size = MIN_PARTICLES
    while True:
        values = np.asarray(trial(size))
        sd = float(np.std(values)) if np.isfinite(values).all() else math.inf
        if sd <= MAX_SD or size == MAX_PARTICLES:
            break
        # sixteenfold at most: few particles say little of many
        factor = 2 ** math.ceil(2 * math.log2(min(sd, 4.0)))
        size = min(MAX_PARTICLES, factor * size)
    if sd > POOR_SD:
        warn_caller(
            f"ParticleMetropolis: with {size} particles the log evidence of runs has "
            f"the standard deviation {sd:.1f}, so that few runs are accepted. Raise "
            "`num_particles` beyond, or `levels`."
        )
    return size


def log_estimate(run: SMCResult) -> Float[Array, "*runs"]:
    """Return the log evidence up to a constant, minus infinity without weight."""
    value = run.weights.log_evidence + run.initial_log_weight
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


@partial(jax.jit, static_argnames=("model", "static", "size"))
def _run_each(
    keys: PRNGKey,
    settings: LevelSettings | None,
    ts: Float[Array, " ts"],
    arrays: list[Array],
    covariances: dict[str, LevelCovariance] | None,
    model: Callable,
    static: StaticArguments,
    size: int,
) -> SMCResult:
    """Return the run of each key, along the first axis."""
    args, kwargs = static.combine(arrays)
    twist = Twist.of(model, args, kwargs, covariances)
    return jax.lax.map(
        lambda key: twisted_smc(key, twist, ts, size, settings=settings), keys
    )
