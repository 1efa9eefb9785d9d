"""Particles: weights, their effective sample size, and systematic resampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from numpyro_score.typing import PRNGKey

LogWeights = Float[Array, " particles"]


class ParticleWeights(NamedTuple):
    """What a cloud of weighted particles knows besides their positions.

    - **log_weight**: normalized log weights.
    - **log_evidence**: estimate of the log normalizing constant so far.
    - **log_evidence_variance**: its variance, to first order.
    - **ess**: effective sample size of the weights at the last level.
    """

    log_weight: LogWeights
    log_evidence: Float[Array, ""]
    log_evidence_variance: Float[Array, ""]
    ess: Float[Array, ""]

    @classmethod
    def uniform(cls, size: int, *, proper: bool) -> "ParticleWeights":
        """Return equal weights; NaN as evidence unless drawn from a proper prior."""
        evidence = jnp.asarray(0.0 if proper else jnp.nan)
        log_weight = jnp.full(size, -jnp.log(size))
        return cls(log_weight, evidence, 0 * evidence, jnp.asarray(size, float))

    def reweight(self, log_increment: LogWeights) -> "ParticleWeights":
        """Return the cloud after multiplying the weights; NaN counts as zero."""
        log_weight = self.log_weight + nan_to_zero_weight(log_increment)
        total = logsumexp(log_weight)
        log_weight = log_weight - total
        return self._replace(
            log_weight=log_weight,
            log_evidence=self.log_evidence + total,
            ess=effective_sample_size(log_weight),
        )

    def reset(self) -> "ParticleWeights":
        """Return the cloud with equal weights, as after resampling.

        The relative variance of a mean of N weights is (N/ESS - 1)/N; those of the
        stages between resamplings add up.
        """
        size = len(self.log_weight)
        variance = self.log_evidence_variance + (1 / self.ess - 1 / size)
        return self._replace(
            log_weight=jnp.full(size, -jnp.log(size)), log_evidence_variance=variance
        )


def nan_to_zero_weight(log_weight: LogWeights) -> LogWeights:
    """Return log weights with NaN and positive infinity taken for zero weight."""
    bad = jnp.isnan(log_weight) | (log_weight == jnp.inf)
    return jnp.where(bad, -jnp.inf, log_weight)


def effective_sample_size(log_weight: LogWeights) -> Float[Array, ""]:
    """Return 1 / sum of squared normalized weights (Kong et al. 1994).

    Example:
        >>> float(effective_sample_size(jnp.zeros(4)))
        4.0
    """
    log_weight = log_weight - logsumexp(log_weight)
    return jnp.exp(-logsumexp(2 * log_weight))


def systematic(
    key: PRNGKey, log_weight: LogWeights, num: int | None = None
) -> Int[Array, " num"]:
    """Return the ancestors of systematic resampling (Kitagawa 1996).

    Every particle has its expected number of offspring, rounded up or down.

    Args:
        key: random key.
        log_weight: log weights, not necessarily normalized.
        num: the number of offspring; None for that of the particles.

    Example:
        >>> weights = jnp.log(jnp.array([0.0, 1.0, 0.0]))
        >>> systematic(jax.random.key(0), weights).tolist()
        [1, 1, 1]
    """
    size = len(log_weight)
    num = size if num is None else num
    cumulative = jnp.cumsum(jnp.exp(log_weight - logsumexp(log_weight)))
    points = (jnp.arange(num) + jax.random.uniform(key)) / num
    # the last sum may fall short of one by rounding
    ancestors = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    return jnp.minimum(ancestors, size - 1)


def next_tempering_param(
    log_increment: Callable[[Array], LogWeights],
    log_weight: LogWeights,
    lowest: Array,
    highest: Array,
    ess: Array | float,
) -> Float[Array, ""]:
    """Return the largest beta whose weights keep an effective sample size.

    Bisection between ``lowest`` and ``highest`` (Jasra et al. 2011); ``highest`` if it
    keeps it itself, ``lowest`` if nothing does.

    Args:
        log_increment: log incremental weights as a function of beta.
        log_weight: log weights before.
        lowest: smallest beta.
        highest: largest beta.
        ess: what the effective sample size may not fall below.
    """

    def keeps(beta: Array) -> Array:
        return (
            effective_sample_size(log_weight + nan_to_zero_weight(log_increment(beta)))
            >= ess
        )

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        good = keeps(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (lowest, highest))
    return jnp.where(keeps(highest), highest, low)
