r"""Evidence of parallel tempering by bridges between neighbors, and its error.

Between neighbors, with :math:`\Delta_k = \beta_{k+1} - \beta_k`,

.. math:: Z_{k+1}/Z_k = E_k[e^{\Delta_k \ell / 2}] / E_{k+1}[e^{-\Delta_k \ell / 2}],

the geometric bridge (Meng and Wong 1996, eq. 2.4), whose two means have variances under
every prior and likelihood, also one that is 0 in places. Stepping stones (Xie et al.
2011) have the means of one side alone: up :math:`E_k[e^{\Delta_k \ell}]`, and down
:math:`1 / E_{k+1}[e^{-\Delta_k \ell}]`, where the variance may be infinite. Their
difference, the gap, shows what no estimate resolves.

The error is that of batch means. Draws between two restarts may all have come from one
mode, and states pass through the rungs together, so only batches of many restarts are
independent: n batches hold n / 2 restarts each, where that is less than one for every
second rung. The correlation that is left is estimated from batches half as long (Vats
and Flegal 2022): :math:`V_b + \max(0, V_b - V_{b/2})`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

# numbers of them, one batch two of the next; 32: error within (1 / 62)^1/2 = 13 %
BATCHES = (4, 8, 16, 32)
NUM_BATCHES = BATCHES[-1]  # 17 to 32 are filled, after the first 32 draws
# or one for every second rung; more: errors known later; not tuned
RESTARTS_PER_BATCH = 4
HIGHER = 1.0  # nats; the best of some thousand draws of one mode vary by less
MAX_LOG = 60.0  # of a number of draws; float32 holds e^88
MIN_BATCHES = 4  # below, Student's t with n - 1 degrees of freedom has no variance
MAX_DOUBLINGS = 26  # batches are doubled at most so often: 2e9 draws


class SteppingStones(NamedTuple):
    """Sums over draws, of one chain or with leading axes of chains.

    - **log_forward**: log sum of exp(step * log likelihood) at the lower rung, of each
      batch.
    - **log_backward**: log sum of exp(-step * log likelihood) at the upper rung.
    - **log_up**, **log_down**: the same of half a step.
    - **num_draws**: draws.
    - **num_possible**: draws of the prior whose likelihood is not 0.
    - **restarts**: states that came from the prior to the posterior.
    - **highest**: largest log likelihood at each rung.
    """

    log_forward: Float[Array, "*chains batches pairs"]
    log_backward: Float[Array, "*chains batches pairs"]
    log_up: Float[Array, "*chains batches pairs"]
    log_down: Float[Array, "*chains batches pairs"]
    num_draws: Int[Array, "*chains"]
    num_possible: Int[Array, "*chains"]
    restarts: Int[Array, "*chains"]
    highest: Float[Array, "*chains rungs"]

    @classmethod
    def zero(cls, num_pairs: int) -> "SteppingStones":
        """Return the sums of no draws."""
        empty = jnp.full((NUM_BATCHES, num_pairs), -jnp.inf)
        none = jnp.zeros((), int)
        highest = jnp.full(num_pairs + 1, -jnp.inf)
        return cls(empty, empty, empty, empty, none, none, none, highest)

    def add(
        self,
        t: Int[Array, ""],
        betas: Float[Array, " rungs"],
        log_likelihood: Float[Array, " rungs"],
        restarts: Int[Array, ""],
    ) -> "SteppingStones":
        """Return the sums with one draw per rung.

        Args:
            t: number of the draw, from 0, common to all chains.
            betas: inverse temperatures.
            log_likelihood: of the states at each.
            restarts: states that have just come from the prior to the posterior.
        """
        steps = jnp.diff(betas)
        lower, upper = log_likelihood[:-1], log_likelihood[1:]
        slot = t // _batch_length(t)

        def add(values: Array, new: Array) -> Array:
            return values.at[slot].set(jnp.logaddexp(values[slot], new))

        return SteppingStones(
            add(self.log_forward, _tempered(steps, lower)),
            add(self.log_backward, _tempered(-steps, upper)),
            add(self.log_up, _tempered(steps / 2, lower)),
            add(self.log_down, _tempered(-steps / 2, upper)),
            self.num_draws + 1,
            self.num_possible + (log_likelihood[0] > -jnp.inf),
            self.restarts + restarts,
            jnp.fmax(self.highest, log_likelihood),
        )

    def halve(self) -> "SteppingStones":
        """Return the sums in half as many batches, each twice as long."""

        def merge(values: Array) -> Array:
            shape = (*values.shape[:-2], NUM_BATCHES // 2, 2, values.shape[-1])
            pairs = values.reshape(shape)
            merged = jnp.logaddexp(pairs[..., 0, :], pairs[..., 1, :])
            empty = jnp.full_like(merged, -jnp.inf)
            return jnp.concatenate([merged, empty], axis=-2)

        return self._replace(
            log_forward=merge(self.log_forward),
            log_backward=merge(self.log_backward),
            log_up=merge(self.log_up),
            log_down=merge(self.log_down),
        )


def _tempered(step: Array, log_likelihood: Array) -> Array:
    """Return step * log likelihood; NaN for a likelihood counts as none."""
    log_likelihood = jnp.where(jnp.isnan(log_likelihood), -jnp.inf, log_likelihood)
    return jnp.where(step == 0, 0.0, step * log_likelihood)


def _batch_length(t: Array) -> Array:
    """Return the length of batches when draw t is added."""
    doublings = (t >= NUM_BATCHES * 2 ** jnp.arange(MAX_DOUBLINGS)).sum()
    return 2**doublings


def is_full(t: Array) -> Bool[Array, ""]:
    """Return whether all batches are full before draw t, so they must be merged."""
    return (t > 0) & (_batch_length(t) > _batch_length(t - 1))


class Evidence(NamedTuple):
    """Log evidence with its standard error, and the gap between both directions."""

    log_evidence: Float[Array, "*chains"]
    error: Float[Array, "*chains"]
    gap: Float[Array, "*chains"]


def estimate_evidence(
    stones: SteppingStones, active: Bool[Array, "*chains pairs"]
) -> Evidence:
    """Return the log evidence, its standard error and the gap of both directions.

    The error is infinite while there are too few restarts to tell, NaN before the first
    draw. It is never below half the gap.

    Args:
        stones: sums over draws.
        active: which pairs are in use.
    """
    log_count = jnp.log(stones.num_draws.astype(float))

    def log_means(values: Array) -> Array:
        means = logsumexp(values, axis=-2) - log_count[..., None]
        return jnp.where(active, means, 0.0).sum(-1)

    # draws of the posterior know nothing of places where the likelihood is 0
    possible = jnp.log(stones.num_possible.astype(float)) - log_count
    backward = possible - log_means(stones.log_backward)
    gap = jnp.abs(log_means(stones.log_forward) - backward)
    sd = jnp.sqrt(_batch_variance(stones, active))
    bridge = log_means(stones.log_up) - log_means(stones.log_down)
    return Evidence(bridge, jnp.maximum(sd, 0.5 * gap), gap)


class TemperingRecord(NamedTuple):
    """Sums over the draws of chains, and what is needed to read them.

    - **stones**: sums over draws.
    - **betas**: inverse temperatures.
    - **active**: which pairs are in use.
    """

    stones: SteppingStones
    betas: Float[Array, "*chains rungs"]
    active: Bool[Array, "*chains pairs"]


class Crossings(NamedTuple):
    """Measures of how chains cross the temperatures, one number for each chain.

    - **restarts**: states that came from the prior to the posterior.
    - **missed**: draws due at a place that was visited at higher temperatures only,
      see :func:`missed_draws`.
    - **gap**: between log evidences from the prior up and from the posterior down.
    """

    restarts: Any
    missed: Any
    gap: Any

    @classmethod
    def of(cls, record: TemperingRecord) -> "Crossings":
        """Return them for the chains of one run."""
        gap = estimate_evidence(record.stones, record.active).gap
        return cls(record.stones.restarts, missed_draws(*record), gap)


def missed_draws(
    stones: SteppingStones,
    betas: Float[Array, "*chains rungs"],
    active: Bool[Array, "*chains pairs"],
) -> Float[Array, "*chains"]:
    r"""Return how many draws the chains should have at a place that one has not seen.

    The density of the log likelihood at inverse temperature 1 is that at
    :math:`\beta` times :math:`e^{(1 - \beta) \ell} Z_\beta / Z_1`: so many draws
    belong to one visit at :math:`\beta` of a place of log likelihood :math:`\ell`. The
    largest of these numbers over rungs whose highest likelihood exceeds that of all
    draws of some chain by a nat; else 0.

    Args:
        stones: sums over draws.
        betas: inverse temperatures.
        active: which pairs are in use.
    """
    count = stones.num_draws[..., None].astype(float)
    steps = logsumexp(stones.log_forward, axis=-2) - jnp.log(count)
    steps = jnp.where(active, steps, 0.0)
    to_end = jnp.cumsum(steps[..., ::-1], axis=-1)[..., ::-1]  # log Z_1 / Z_k
    last = active.sum(-1, keepdims=True)  # rungs beyond are not in use
    top = jnp.take_along_axis(stones.highest, last, axis=-1)
    top = top.min(tuple(range(top.ndim - 1)), keepdims=True)
    hot = stones.highest[..., :-1]
    log_draws = (1 - betas[..., :-1]) * hot - to_end
    unseen = active & (hot > top + HIGHER) & jnp.isfinite(top)
    draws = jnp.where(unseen, jnp.exp(jnp.minimum(log_draws, MAX_LOG)), 0.0)
    return draws.max(-1, initial=0.0)


def _batch_variance(
    stones: SteppingStones, active: Bool[Array, "*chains pairs"]
) -> Float[Array, "*chains"]:
    """Return the variance of the log evidence by batch means, to first order."""
    totals, counts = _influences(stones, active), _batch_counts(stones.num_draws)
    most_needed = jnp.maximum(RESTARTS_PER_BATCH, (active.sum(-1) + 1) / 2)

    def square_and_filled(num_batches: int) -> tuple[Array, Array]:
        shape = (*totals.shape[:-1], num_batches, -1)
        filled = (counts.reshape(shape).sum(-1) > 0).sum(-1)
        square = jnp.square(totals.reshape(shape).sum(-1)).sum(-1)
        return square * filled / jnp.maximum(filled - 1, 1), filled

    variance = jnp.full(stones.num_draws.shape, jnp.inf)
    for (square, filled), (shorter, _) in pairwise(map(square_and_filled, BATCHES)):
        correlated = jnp.maximum(square - shorter, 0.0)
        # the variance of Student's t in place of the normal one's for few batches
        wider = (filled - 1) / jnp.maximum(filled - 3, 1e-9)
        found = wider * (square + correlated) / jnp.square(stones.num_draws * 1.0)
        needed = filled * jnp.minimum(filled / 2, most_needed)
        allowed = (stones.restarts >= needed) & (filled >= MIN_BATCHES)
        variance = jnp.where(allowed, found, variance)
    return variance


def _influences(
    stones: SteppingStones, active: Bool[Array, "*chains pairs"]
) -> Float[Array, "*chains batches"]:
    """Return by how much each batch raises the log evidence, times the draws."""

    def relative(values: Array) -> Array:
        total = logsumexp(values, axis=-2, keepdims=True)
        shares = jnp.exp(values - total) * stones.num_draws[..., None, None]
        return jnp.where(active[..., None, :], shares, 0.0).sum(-1)

    return relative(stones.log_up) - relative(stones.log_down)


def _batch_counts(count: Int[Array, "*chains"]) -> Int[Array, "*chains batches"]:
    """Return how many draws each batch holds."""
    last = jnp.maximum(count - 1, 0)
    length = jax.vmap(_batch_length)(last.reshape(-1)).reshape(count.shape)
    slots = jnp.arange(NUM_BATCHES) * length[..., None]
    return jnp.clip(count[..., None] - slots, 0, length[..., None])


def average_log_evidence(evidence: Evidence) -> Evidence:
    """Return the mean of the log evidences of several chains.

    The error is the larger of that within chains and, from four chains on, that
    between them.

    Args:
        evidence: with one axis of chains, or of one chain.
    """
    estimate, error, gap = map(jnp.atleast_1d, evidence)
    num_chains = len(estimate)
    within = jnp.sqrt(jnp.square(error).sum()) / num_chains
    if num_chains >= MIN_BATCHES:
        wider = (num_chains - 1) / (num_chains - 3)
        between = jnp.sqrt(wider * estimate.var(ddof=1) / num_chains)
        within = jnp.maximum(jnp.where(jnp.isinf(within), 0.0, within), between)
    return Evidence(estimate.mean(), within, gap.max())
