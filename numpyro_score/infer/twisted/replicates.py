"""One chain: independent SMC runs, combined by their evidence, and draws from them."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_score.infer.twisted.failures import dead_run_message, warn_of_failures
from numpyro_score.infer.twisted.guidance import Guidance
from numpyro_score.infer.twisted.rejuvenation import rejuvenate
from numpyro_score.infer.twisted.sampler import SMCResult, sample_guided, twisted_smc
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.run_verdict import Finding
from numpyro_score.smc.evidence import combine_evidence, fewest_ancestors
from numpyro_score.smc.resampling import systematic
from numpyro_score.smc.weights import ParticleWeights
from numpyro_score.typing import PRNGKey


class ChainResult(NamedTuple):
    """Draws, weights and evidence of one chain.

    - **samples**: values of the sites at the draws, deterministic sites included.
    - **ancestor**: which particle of the first level each draw descends from, counted
      through all SMC runs of the chain.
    - **weights**: normalized weights of the particles at the lowest level.
    - **ess**: effective sample size after each level, before resampling.
    - **power**: power of the twist at each level, 1 but where weights would collapse.
    - **log_evidence**: of each run.
    - **log_evidence_variance**: of each run.
    - **num_ancestors**: particles of the first level with descendants, of each run.
    - **effective_num_ancestors**: how many of equal weight would tell as much.
    - **accept_prob**: mean acceptance of the rejuvenation.
    - **ordinary_accept_prob**: mean acceptance of the moves of ordinary sites, by
      level.
    - **failures**: particles that lost their weight, by level and kind of failure.
    - **initial_ess**: effective sample size of the start of each run.
    - **signal_to_noise**: sd of the data along their longest axis over the sd of the
      noise at the start.
    """

    samples: dict[str, Array]
    ancestor: Int[Array, " draws"]
    weights: Float[Array, "runs particles"]
    ess: Float[Array, "runs levels"]
    power: Float[Array, "runs levels"]
    log_evidence: Float[Array, " runs"]
    log_evidence_variance: Float[Array, " runs"]
    num_ancestors: Int[Array, " runs"]
    effective_num_ancestors: Float[Array, " runs"]
    accept_prob: Float[Array, ""]
    ordinary_accept_prob: Float[Array, "runs levels"]
    failures: Int[Array, "runs levels kinds"]
    initial_ess: Float[Array, " runs"]
    signal_to_noise: Float[Array, " runs"]


class SamplerSizes(NamedTuple):
    """Numbers of draws, SMC runs, particles of each run, and moves of each draw.

    With ``guidance`` particles are guided only, and nothing moves afterwards.
    """

    num_samples: int
    num_smc_runs: int
    num_particles: int
    num_moves: int
    guidance: Guidance | None = None


def run_chain(
    key: PRNGKey,
    twist: Twist,
    ts: Float[Array, " ts"],
    sizes: SamplerSizes,
    report: Callable[[Any], None] | None = None,
) -> ChainResult:
    """Return draws of the posterior from SMC runs, weighted by their evidence.

    Args:
        key: random key.
        twist: what the data say about noisy points.
        ts: decreasing times.
        sizes: sizes.
        report: called on the host with the number of levels done since the last call.
    """
    key_runs, key_select, key_moves = jax.random.split(key, 3)
    keys = jax.random.split(key_runs, sizes.num_smc_runs)
    size, guidance = sizes.num_particles, sizes.guidance

    def one(key: PRNGKey) -> SMCResult:
        if guidance is None:
            result = twisted_smc(key, twist, ts, size, report)
            return result._replace(settings=None)  # of other runs
        return sample_guided(key, twist, ts, size, guidance, report)

    runs = jax.lax.map(one, keys)
    log_evidence = runs.weights.log_evidence
    log_weight = (runs.weights.log_weight + log_evidence[:, None]).reshape(-1)
    offset = sizes.num_particles * jnp.arange(sizes.num_smc_runs)[:, None]
    eve = _merge(runs.weights.eve + offset)
    index = systematic(key_select, log_weight, sizes.num_samples)
    index = index[jnp.argsort(eve[index])]  # particles themselves are sorted in space
    z = jax.tree.map(lambda leaf: _merge(leaf)[index], runs.z)
    num_moves = 0 if guidance else sizes.num_moves
    z, accept_prob = rejuvenate(key_moves, twist, z, num_moves)
    variance, num_ancestors, effective = jax.vmap(_evidence_error)(runs.weights)
    return ChainResult(
        jax.vmap(twist.potential.constrain)(z),
        eve[index],
        jnp.exp(runs.weights.log_weight),
        runs.ess,
        runs.power,
        log_evidence,
        variance,
        num_ancestors,
        effective,
        accept_prob,
        runs.accept_prob,
        runs.failures,
        runs.initial_ess,
        runs.signal_to_noise,
    )


def _evidence_error(weights: ParticleWeights) -> tuple[Array, Array, Array]:
    """Return variance of the log evidence, and number of ancestors both ways."""
    return (
        weights.total_log_evidence_variance,
        weights.num_ancestors,
        weights.effective_num_ancestors,
    )


def _merge(leaf: Array) -> Array:
    """Return runs and particles along one axis."""
    return leaf.reshape(-1, *leaf.shape[2:])


# share of effective particles: weights with an sd of 7 means (1 / .02 - 1 = 7^2)
MIN_ESS = 0.02
# share: weights with an sd of 3 means, too uneven for first-order errors
MIN_EVIDENCE_ESS = 0.1
# nats, of all runs together, a factor of 1.35; beyond, few particles carry the weight,
# and the error does not show those that were not met; not tuned
MAX_EVIDENCE_ERROR = 0.3
MIN_INITIAL_ESS = 0.5  # share: weights with an sd of one mean (1 / .5 - 1 = 1)
# sd of the data over sd of that noise: weights between N(0, 1) and N(0, 1 + .7^2) keep
# an ESS of .87 N (1.49 (2 / 1.49 - 1)^1/2)
NEGLIGIBLE_SNR = 0.7


def check_result(result: ChainResult) -> None:
    """Raise if an SMC run lost all its weight, and warn if some particles failed.

    Raises:
        ValueError: saying at which level it happened, and why.
    """
    failures = np.asarray(result.failures)
    if np.isfinite(result.log_evidence).all():
        return warn_of_failures(failures, result.weights.shape[-1])
    raise_zero_weight(result.log_evidence, result.ess, failures)


def raise_zero_weight(
    log_evidence: Array, ess: Array, failures: np.ndarray
) -> NoReturn:
    """Raise for SMC runs that lost all their weight.

    Args:
        log_evidence: of each run.
        ess: of each run and level.
        failures: of each run and level, by kind.

    Raises:
        ValueError: saying at which level it happened, and why.
    """
    dead = ~np.isfinite(log_evidence)
    lost = ~np.isfinite(np.asarray(ess)[dead][0])
    counts = failures[dead][0]
    # guidance alone has no sample sizes, and there the failures tell the level
    level = int(np.argmax(counts[:, 1:].sum(1) if lost[0] and lost.all() else lost))
    where = f"{level} of {len(lost)}"
    raise ValueError(dead_run_message(counts[level], where, int(dead.sum()), dead.size))


def find_degeneracies(result: ChainResult) -> list[Finding]:
    """Return findings where few particles carry a run.

    ``ess`` for small effective sizes, ``start`` for a highest level that does not hide
    the data, ``ancestors`` for few first particles with descendants, ``evidence`` for
    a large error of the log evidence where nothing else is found.
    """
    found = []
    num_particles = result.weights.shape[-1]
    ess, ancestors = np.min(result.ess), np.min(result.effective_num_ancestors)
    least, fewest = MIN_ESS * num_particles, fewest_ancestors(num_particles)
    if ess < least:
        what = f"the smallest effective sample size of {num_particles} particles"
        remedy = (
            "The error of the log evidence is understated. Raise `levels`, so that "
            "each step changes the weights less, and `num_particles`."
        )
        found.append(Finding("ess", what, float(ess), least, remedy))
    start, reach = np.min(result.initial_ess), float(np.max(result.signal_to_noise))
    least = MIN_INITIAL_ESS * num_particles
    if start < least:
        what = f"the effective number, of {num_particles}, of particles at the start"
        factor = max(2.0, reach / NEGLIGIBLE_SNR)
        remedy = (
            "The noise of the highest level does not hide the data, which have about "
            f"{reach:.1f} times its standard deviation along their longest axis. Raise "
            "`sigma_max` of the learned law's process to about "
            f"{factor:.1f} times its value, and train with it."
        )
        found.append(Finding("start", what, float(start), least, remedy))
    if ancestors < fewest:
        what = (
            "the effective number of particles of the first level, of "
            f"{num_particles}, that the draws of an SMC run descend from"
        )
        remedy = (
            "Shares of separate modes are not to be trusted. Raise `num_particles`."
        )
        found.append(Finding("ancestors", what, float(ancestors), fewest, remedy))
    return found or _find_uncertain_evidence(result)


def pooled_evidence(result: ChainResult) -> tuple[Array, Array]:
    """Return the log of the mean evidence of all runs, and its standard error."""
    runs = result.log_evidence, result.log_evidence_variance
    return combine_evidence(*(jnp.reshape(part, -1) for part in runs))


def _find_uncertain_evidence(result: ChainResult) -> list[Finding]:
    """Return a finding for weights that are known badly."""
    _, error = pooled_evidence(result)
    if not error > MAX_EVIDENCE_ERROR:
        return []
    what = "the standard error of the log evidence, in nats,"
    remedy = (
        "Weights of a few particles decide, and such an error is itself understated: "
        "evidence and shares of modes are not to be trusted. Raise `num_particles` and "
        "`levels`."
    )
    return [Finding("evidence", what, float(error), MAX_EVIDENCE_ERROR, remedy)]
