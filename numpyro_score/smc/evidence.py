"""Errors of an estimated evidence, within one SMC run and between several."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

MIN_ANCESTORS = 10  # the share of a mode of mass 1/2 has then the error (1/4 / 10)^1/2


def eve_weights(
    eve: Int[Array, " particles"], weights: Float[Array, " particles"]
) -> Float[Array, " particles"]:
    """Return the total weight of the descendants of each particle of the first level.

    The sum of their squared differences from 1/N estimates the variance of the log
    evidence from one run (Chan and Lai 2013; Lee and Whiteley 2018).

    Args:
        eve: for each particle its ancestor at the first level.
        weights: normalized weights.

    Example:
        >>> eve, weights = jnp.array([0, 0, 2]), jnp.array([0.25, 0.25, 0.5])
        >>> eve_weights(eve, weights).tolist()
        [0.5, 0.0, 0.5]
    """
    return jax.ops.segment_sum(weights, eve, len(weights))


def fewest_ancestors(num_particles: int) -> int:
    """Return the effective number of first ancestors below which they are few."""
    return min(MIN_ANCESTORS, num_particles // 4)


def has_few_ancestors(effective: Array, num_particles: int) -> Bool[Array, "..."]:
    """Return whether the effective number of first ancestors is below 10.

    Or below a quarter of the particles, where there are fewer than 40.

    Args:
        effective: 1 / sum of squared :func:`eve_weights`.
        num_particles: number of particles.

    Example:
        >>> bool(has_few_ancestors(jnp.array(9.5), 1000))
        True
    """
    return jnp.asarray(effective) < fewest_ancestors(num_particles)


def combine_evidence(
    log_evidence: Float[Array, " runs"], variance: Float[Array, " runs"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Return :math:`\log \frac1R \sum_r \hat Z_r` and its standard error, in nats.

    The error is the larger of two: from the variances within runs, which a run that has
    lost most of its particles understates, and from the differences between runs.

    Args:
        log_evidence: log evidence of independent runs.
        variance: variance of each.

    Example:
        >>> value, error = combine_evidence(jnp.zeros(4), jnp.full(4, 0.04))
        >>> float(value), round(float(error), 3)
        (0.0, 0.1)
    """
    count, share = len(log_evidence), jax.nn.softmax(log_evidence)
    combined = logsumexp(log_evidence) - jnp.log(count)
    within = jnp.sum(jnp.square(share) * variance)
    between = count / max(1, count - 1) * jnp.sum(jnp.square(share - 1 / count))
    return combined, jnp.sqrt(jnp.maximum(within, between))


class RatioOfMeans(NamedTuple):
    r"""Sums for :math:`\log(\bar a / \bar b)` of independent pairs, and its error.

    By the delta method the variance is
    :math:`\frac{1}{n(n-1)} \sum_i (a_i / \bar a - b_i / \bar b)^2`.

    - **num_pairs**: number of pairs.
    - **shift**: logarithms of the first pair, by which all are divided.
    - **log_sums**: logarithms of the sums of a, b, aa, bb and ab.

    Example:
        >>> sums = RatioOfMeans.zero().add(jnp.log(1.0), jnp.log(2.0))
        >>> sums = sums.add(jnp.log(3.0), jnp.log(2.0))
        >>> round(float(sums.value), 3), round(float(sums.error), 3)
        (0.0, 0.5)
    """

    num_pairs: Int[Array, "*chains"]
    shift: Float[Array, "*chains 2"]
    log_sums: Float[Array, "*chains 5"]

    @classmethod
    def zero(cls) -> "RatioOfMeans":
        """Return the sums of no pair."""
        return cls(jnp.zeros((), int), jnp.zeros(2), jnp.full(5, -jnp.inf))

    def add(self, log_a: Float[Array, ""], log_b: Float[Array, ""]) -> "RatioOfMeans":
        """Return the sums with one more pair; a may be 0."""
        pair = jnp.stack([log_a, log_b])
        first = jnp.where(jnp.isfinite(pair), pair, 0.0)
        shift = jnp.where(self.num_pairs == 0, first, self.shift)
        a, b = pair - shift
        terms = jnp.stack([a, b, 2 * a, 2 * b, a + b])
        return RatioOfMeans(
            self.num_pairs + 1, shift, jnp.logaddexp(self.log_sums, terms)
        )

    @property
    def value(self) -> Float[Array, "*chains"]:
        """The logarithm of the ratio; NaN without a pair."""
        change = self.log_sums[..., 0] - self.log_sums[..., 1]
        return change + self.shift[..., 0] - self.shift[..., 1]

    @property
    def error(self) -> Float[Array, "*chains"]:
        """The standard error of the value; infinite for fewer than two pairs."""
        a, b, aa, bb, ab = jnp.moveaxis(self.log_sums, -1, 0)
        squares = jnp.exp(aa - 2 * a) + jnp.exp(bb - 2 * b) - 2 * jnp.exp(ab - a - b)
        scale = self.num_pairs / jnp.maximum(1, self.num_pairs - 1)
        error = jnp.sqrt(scale * jnp.maximum(squares, 0.0))
        known = (self.num_pairs > 1) & jnp.isfinite(error)
        return jnp.where(known, error, jnp.inf)
