r"""Weights of N particles and the running estimate of the normalizing constant.

Chopin and Papaspiliopoulos 2020, chapters 8 to 10. Weights are kept as normalized
logarithms; a log weight of NaN or plus infinity counts as zero weight.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

LogWeights = Float[Array, " particles"]


class ParticleWeights(NamedTuple):
    r"""Weights of N particles, and the evidence that they have collected.

    - **log_weight**: shape (N,), normalized: their logsumexp is 0.
    - **log_evidence**: :math:`\log \hat Z` in nats; NaN unless the particles started
      as draws of a proper prior.
    - **log_evidence_variance**: its variance to first order, the sum over resampling
      stages of 1/ESS - 1/N.
    - **ess**: effective sample size before the last reset.
    """

    log_weight: LogWeights
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
        log_weight = jnp.full(size, -jnp.log(size))
        return cls(log_weight, evidence, 0 * evidence, jnp.asarray(size, float))

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
        variance = self.log_evidence_variance + (1 / self.ess - 1 / size)
        return self._replace(
            log_weight=jnp.full(size, -jnp.log(size)), log_evidence_variance=variance
        )


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
