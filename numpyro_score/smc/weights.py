r"""Weights of N particles, their ancestors, and the running estimate of the evidence.

Chopin and Papaspiliopoulos 2020, chapters 8 to 10. Weights are kept as normalized
logarithms; a log weight of NaN or plus infinity counts as zero weight.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from numpyro_score.smc.evidence import eve_weights

LogWeights = Float[Array, " particles"]


class ParticleWeights(NamedTuple):
    r"""Weights and ancestors of N particles, and the evidence so far.

    - **log_weight**: shape (N,), normalized: their logsumexp is 0.
    - **eve**: shape (N,), for each particle its ancestor among the first N.
    - **log_evidence**: :math:`\log \hat Z` in nats; NaN unless the particles started
      as draws of a proper prior.
    - **log_evidence_variance**: its variance to first order, the sum over resampling
      stages of 1/ESS - 1/N.
    - **ess**: effective sample size before the last reset.
    """

    log_weight: LogWeights
    eve: Int[Array, " particles"]
    log_evidence: Float[Array, ""]
    log_evidence_variance: Float[Array, ""]
    ess: Float[Array, ""]

    @classmethod
    def uniform(cls, size: int, *, proper: bool) -> "ParticleWeights":
        """Return equal weights.

        Args:
            size: number of particles.
            proper: whether they are draws of a proper prior, so that there is an
                evidence.
        """
        evidence = jnp.asarray(0.0 if proper else jnp.nan)
        log_weight, eve = jnp.full(size, -jnp.log(size)), jnp.arange(size)
        return cls(log_weight, eve, evidence, 0 * evidence, jnp.asarray(size, float))

    def reweight(self, log_increment: LogWeights) -> "ParticleWeights":
        """Return the weights multiplied by incremental weights."""
        log_weight = self.log_weight + nan_to_zero_weight(log_increment)
        total = logsumexp(log_weight)
        log_weight = log_weight - total
        return self._replace(
            log_weight=log_weight,
            log_evidence=self.log_evidence + total,
            ess=effective_sample_size(log_weight),
        )

    def reset(self) -> "ParticleWeights":
        """Return equal weights, as after resampling.

        The relative variance of a mean of N weights is (N/ESS - 1)/N; those of the
        stages between resamplings add up.
        """
        size = len(self.log_weight)
        stage = 1 / effective_sample_size(self.log_weight) - 1 / size
        variance = self.log_evidence_variance + stage
        return self._replace(
            log_weight=jnp.full(size, -jnp.log(size)), log_evidence_variance=variance
        )

    @property
    def eve_weights(self) -> Float[Array, " particles"]:
        """The total weight of the descendants of each of the first N particles."""
        return eve_weights(self.eve, jnp.exp(self.log_weight))

    @property
    def num_ancestors(self) -> Int[Array, ""]:
        """Number of the first N particles with descendants of positive weight."""
        return jnp.sum(self.eve_weights > 0)

    @property
    def effective_num_ancestors(self) -> Float[Array, ""]:
        r""":math:`1 / \sum_i W_i^2` of the weights W that descend from each of them.

        So many independent particles would tell the shares of modes as well.
        """
        return 1 / jnp.square(self.eve_weights).sum()

    @property
    def total_log_evidence_variance(self) -> Float[Array, ""]:
        r"""The variance of the log evidence, NaN where there is none.

        The larger of two estimates: the first-order one with the present stage, which
        takes particles for independent at each resampling, and
        :math:`\sum_i (W_i - 1/N)^2` of the weights W that descend from each first
        particle (Lee and Whiteley 2018), which counts what moves have not mixed.
        """
        share = 1 / len(self.log_weight)
        stage = 1 / effective_sample_size(self.log_weight) - share
        by_eves = jnp.square(self.eve_weights - share).sum()
        largest = jnp.maximum(self.log_evidence_variance + stage, by_eves)
        return jnp.where(jnp.isnan(self.log_evidence), jnp.nan, largest)


def nan_to_zero_weight(log_weight: LogWeights) -> LogWeights:
    """Return log weights with NaN and positive infinity replaced by zero weight.

    Example:
        >>> nan_to_zero_weight(jnp.array([0.0, jnp.nan])).tolist()
        [0.0, -inf]
    """
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
