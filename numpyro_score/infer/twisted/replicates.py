"""One chain: independent clouds, combined by their evidence, and draws from them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from numpyro_score.infer.twisted.guidance import Guidance
from numpyro_score.infer.twisted.rejuvenation import rejuvenate
from numpyro_score.infer.twisted.sampler import SMCResult, sample_guided, twisted_smc
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.smc.weights import systematic
from numpyro_score.typing import PRNGKey


class ChainResult(NamedTuple):
    """What one chain gives.

    - **samples**: values of the sites at the draws, deterministic sites included.
    - **ancestor**: which particle of the first level each draw descends from, counted
      through all clouds of the chain.
    - **weights**: normalized weights of the particles at the lowest level.
    - **ess**: effective sample size after each level, before resampling.
    - **power**: power of the twist at each level, 1 but where weights would collapse.
    - **log_evidence**: of each cloud.
    - **log_evidence_variance**: of each cloud.
    - **num_ancestors**: particles of the first level with descendants, of each cloud.
    - **accept_prob**: mean acceptance of the rejuvenation.
    - **ordinary_accept_prob**: mean acceptance of the moves of ordinary sites, by
      level.
    - **initial_ess**: effective sample size of the start of each cloud.
    - **signal_to_noise**: sd of the data along their longest axis over the sd of the
      noise at the start.
    """

    samples: dict[str, Array]
    ancestor: Int[Array, " draws"]
    weights: Float[Array, "clouds particles"]
    ess: Float[Array, "clouds levels"]
    power: Float[Array, "clouds levels"]
    log_evidence: Float[Array, " clouds"]
    log_evidence_variance: Float[Array, " clouds"]
    num_ancestors: Int[Array, " clouds"]
    accept_prob: Float[Array, ""]
    ordinary_accept_prob: Float[Array, "clouds levels"]
    initial_ess: Float[Array, " clouds"]
    signal_to_noise: Float[Array, " clouds"]


class SamplerSizes(NamedTuple):
    """How many draws, from how many clouds of what size, and moves of each draw.

    With ``guidance`` clouds are guided only, and nothing moves afterwards.
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
    effort: SamplerSizes,
    report: Callable[[Any], None] | None = None,
) -> ChainResult:
    """Return draws of the posterior from clouds, weighted by their evidence.

    Args:
        key: random key.
        twist: what the data say about noisy points.
        ts: decreasing times.
        effort: sizes.
        report: called on the host with the number of levels done since the last call.
    """
    key_clouds, key_select, key_moves = jax.random.split(key, 3)
    keys = jax.random.split(key_clouds, effort.num_smc_runs)
    size, guidance = effort.num_particles, effort.guidance

    def one(key: PRNGKey) -> SMCResult:
        if guidance is None:
            return twisted_smc(key, twist, ts, size, report)
        return sample_guided(key, twist, ts, size, guidance, report)

    clouds = jax.lax.map(one, keys)
    log_evidence = clouds.cloud.log_evidence
    log_weight = (clouds.cloud.log_weight + log_evidence[:, None]).reshape(-1)
    offset = effort.num_particles * jnp.arange(effort.num_smc_runs)[:, None]
    root = _merge(clouds.eve + offset)
    index = systematic(key_select, log_weight, effort.num_samples)
    index = index[jnp.argsort(root[index])]  # particles themselves are sorted in space
    z = jax.tree.map(lambda leaf: _merge(leaf)[index], clouds.z)
    num_moves = 0 if guidance else effort.num_moves
    z, accept_prob = rejuvenate(key_moves, twist, z, num_moves)
    weights = jnp.exp(clouds.cloud.log_weight)
    mass = jax.vmap(eve_weights)(clouds.eve, weights)
    return ChainResult(
        jax.vmap(twist.potential.constrain)(z),
        root[index],
        weights,
        clouds.ess,
        clouds.power,
        log_evidence,
        jnp.square(mass - 1 / effort.num_particles).sum(1),
        (mass > 0).sum(1),
        accept_prob,
        clouds.accept_prob,
        clouds.initial_ess,
        clouds.signal_to_noise,
    )


def eve_weights(
    root: Int[Array, " particles"], weights: Float[Array, " particles"]
) -> Float[Array, " particles"]:
    """Return the weight of the descendants of each particle of the first level.

    The sum of their squared differences from 1/N estimates the variance of the log
    evidence from one cloud (Chan and Lai 2013; Lee and Whiteley 2018).

    Example:
        >>> root, weights = jnp.array([0, 0, 2]), jnp.array([0.25, 0.25, 0.5])
        >>> eve_weights(root, weights).tolist()
        [0.5, 0.0, 0.5]
    """
    return jax.ops.segment_sum(weights, root, len(weights))


def combine_evidence(
    log_evidence: Float[Array, " clouds"], variance: Float[Array, " clouds"]
) -> tuple[Array, Array]:
    """Return log of the mean evidence of clouds, and its standard error, in nats.

    The error is the larger of two: from the ancestors within clouds, which a cloud that
    has lost most of its particles understates, and from the differences of clouds.
    """
    count, share = len(log_evidence), jax.nn.softmax(log_evidence)
    pooled = logsumexp(log_evidence) - jnp.log(count)
    within = jnp.sum(jnp.square(share) * variance)
    between = count / max(1, count - 1) * jnp.sum(jnp.square(share - 1 / count))
    return pooled, jnp.sqrt(jnp.maximum(within, between))


def _merge(leaf: Array) -> Array:
    """Return clouds and particles along one axis."""
    return leaf.reshape(-1, *leaf.shape[2:])
