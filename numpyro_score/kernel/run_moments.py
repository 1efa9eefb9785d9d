r"""Streaming moments of a run, from which its verdict is made, in O(chains x d).

Draws are thinned to fewer than 2 :data:`NUM_OBSERVED` per chain; counters of rejections
see every transition. What is followed is the vector x of the latents and the potential,
relative to where the run began.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.kernel.whitening import (
    Metric,
    RavelledPosition,
    whiten,
    whiten_displacement,
)
from numpyro_score.model.data_range import OffDataCounts
from numpyro_score.model.rounding import RoundedCounts
from numpyro_score.run_verdict import enclosing_run

# draws of a chain, 14 batches: ESS of 4 chains within (2 / 56)^1/2 = 19 %
NUM_OBSERVED = 200


class Thinning(NamedTuple):
    """Rule that selects the transitions of a run to observe, and groups them.

    - **num_samples**: transitions of the run.
    - **stride**: transitions per observation.
    - **half**: observations in each half of the run.
    - **batch**: observations in one batch, whose means tell the effective sample size.
    """

    num_samples: int
    stride: int
    half: int
    batch: int

    @classmethod
    def of(cls, num_samples: int) -> "Thinning":
        """Return the thinning of a run of so many transitions.

        Example:
            >>> Thinning.of(2000)
            Thinning(num_samples=2000, stride=10, half=100, batch=14)
        """
        stride = max(1, num_samples // NUM_OBSERVED)
        half = num_samples // stride // 2
        return cls(num_samples, stride, half, max(1, int((2 * half) ** 0.5)))


class RunMoments(NamedTuple):
    """Moments of one chain in a run, or of several, whose axes come first.

    What is followed is the vector x of the latents and the potential, n = d + 1 numbers
    that are measured from where the run began. One array holds it all: every array that
    a transition hands on costs a small model as much as its arithmetic.

    - **rows**: named by the properties.
    - **counts**: proposals accepted, divergent ones, rejections in a row up to now,
      the most of them, places with divergent proposals, and these at the present one.
    - **off_data**: draws of learned sites off their data; None where data are unknown.
    - **rounded**: draws at the ends of supports; None where no site has any.
    - **lowest**: the lowest potential of all draws, and of all proposals; None where it
      is not known.
    """

    rows: Float[Array, "*chains 17 n"]
    counts: Array
    off_data: OffDataCounts | None = None
    rounded: RoundedCounts | None = None
    lowest: Array | None = None

    @classmethod
    def zero(cls, origin: Float[Array, " n"]) -> "RunMoments":
        """Return the moments of no draws."""
        rows = jnp.zeros((17, *origin.shape), origin.dtype).at[0].set(origin)
        return cls(rows, jnp.zeros(6, int))

    @property
    def origin(self) -> Any:
        """Latents and potential where the run began."""
        return self.rows[..., 0, :]

    @property
    def mean(self) -> Any:
        """Mean of x in both halves."""
        return self.rows[..., 1:3, :]

    @property
    def scatter(self) -> Any:
        """Sum of squares of x about the mean of its half."""
        return self.rows[..., 3:5, :]

    @property
    def gradient_mean(self) -> Any:
        """Mean gradient of the potential in both halves."""
        return self.rows[..., 5:7, :-1]

    @property
    def increments(self) -> Any:
        """Sums over whitened increments: squared, those of gradients, and products."""
        return self.rows[..., 7:10, :-1]

    @property
    def previous(self) -> Any:
        """The last observation: x, and the gradient."""
        return self.rows[..., 10:12, :]

    @property
    def batch(self) -> Any:
        """Sum of x in the present batch; mean and scatter of the means of batches."""
        return self.rows[..., 12:15, :]

    @property
    def virial(self) -> Any:
        """Mean product of each latent and its gradient in both halves."""
        return self.rows[..., 15:17, :-1]

    def count_proposal(
        self, number: Array, accepted: Array, diverging: Array
    ) -> "RunMoments":
        """Return the moments with one proposal counted, of a number from 1."""
        counts = jnp.where(number <= 1, 0, self.counts)
        moved, diverged, row, longest, places, here = counts
        row = jnp.where(accepted, 0, row + 1)
        longest = jnp.maximum(row, longest)
        places = places + (diverging & (here == 0))
        here = jnp.where(accepted, 0, here + diverging)
        moved, diverged = moved + accepted, diverged + diverging
        counts = jnp.stack([moved, diverged, row, longest, places, here])
        return self._replace(counts=counts.astype(self.counts.dtype))

    def follow_lowest(
        self, number: Array, energy: Array, proposed: Array | None
    ) -> "RunMoments":
        """Return the moments with the potential of a draw and of its proposal seen."""
        if self.lowest is None or proposed is None:
            return self
        before = jnp.where(number <= 1, jnp.inf, self.lowest)
        seen = jnp.stack([energy, proposed]).astype(self.lowest.dtype)
        return self._replace(lowest=jnp.fmin(before, seen))

    def observe(
        self,
        k: Array,
        thinning: Thinning,
        metric: tuple[Metric, Metric],
        x: Float[Array, " n"],
        gradient: Float[Array, " d"],
    ) -> "RunMoments":
        """Return the moments with observation k, counted from 1.

        Args:
            k: number of the observation.
            thinning: of the run.
            metric: the square root S of the metric, and its inverse.
            x: latents and potential.
            gradient: of the potential.
        """
        x = x - self.origin
        # a row of n like the others
        gradient = jnp.concatenate([gradient, jnp.zeros(1, gradient.dtype)])
        in_half = (jnp.arange(2) == (k > thinning.half))[:, None]
        number = k - thinning.half * (k > thinning.half)
        gap = jnp.where(in_half, x - self.mean, 0.0)
        mean = self.mean + gap / number
        gradient_mean = self.rows[5:7]
        gradient_gap = jnp.where(in_half, gradient - gradient_mean, 0.0)
        virial = self.rows[15:17]
        virial_gap = jnp.where(in_half, x * gradient - virial, 0.0)
        rows = [
            self.origin[None],
            mean,
            self.scatter + gap * (x - mean),
            gradient_mean + gradient_gap / number,
            self._next_increments(k, metric, x, gradient),
            jnp.stack([x, gradient]),
            self._next_batch(k, thinning, x),
            virial + virial_gap / number,
        ]
        return self._replace(rows=jnp.concatenate(rows))

    def _next_increments(
        self, k: Array, metric: tuple[Metric, Metric], x: Array, gradient: Array
    ) -> Array:
        sqrt, inverse = metric
        step, change = (jnp.stack([x, gradient]) - self.previous)[:, :-1]
        y, h = whiten_displacement(inverse, step), whiten(sqrt, change)
        products = jnp.stack([y * y, h * h, y * h])
        added = jnp.pad(products, ((0, 0), (0, 1)))
        return self.rows[7:10] + jnp.where(k > 1, added, 0.0)

    def _next_batch(self, k: Array, thinning: Thinning, x: Array) -> Array:
        """Add x to its batch; a full batch adds its mean to those before."""
        before, mean, scatter = self.batch
        total = before + x
        full = k % thinning.batch == 0
        number = jnp.maximum(k // thinning.batch, 1)
        batch = total / thinning.batch
        gap = batch - mean
        mean_next = mean + gap / number
        closed = 0.0 * total, mean_next, scatter + gap * (batch - mean_next)
        return jnp.where(full, jnp.stack(closed), jnp.stack([total, mean, scatter]))


def first_moments(z: Any, potential: Any) -> RunMoments | None:
    """Return the moments of no draws at z, or None outside of a run that is judged.

    Args:
        z: latents, in unconstrained space.
        potential: of the model, with its learned sites.
    """
    if enclosing_run() is None:
        return None
    flat = ravel_pytree(z)[0]
    moments = RunMoments.zero(jnp.zeros(flat.size + 1, flat.dtype))
    off_data = OffDataCounts.zero(potential, by_line_integrals=True)
    rounded = RoundedCounts.zero(potential)
    # of learned sites the potential knows no value
    lowest = None if potential.learned else jnp.full(2, jnp.inf, flat.dtype)
    return moments._replace(off_data=off_data, rounded=rounded, lowest=lowest)


class Point(NamedTuple):
    """Position, gradient of the potential and potential of one chain."""

    z: Any
    gradient: Any
    energy: Array

    def ravel(self, sqrt: Metric) -> tuple[Array, Array]:
        """Return x, and the gradient, in the order of the metric."""
        coordinates = RavelledPosition.of(sqrt, self.z)
        position = coordinates.ravel(self.z)
        energy = self.energy[None].astype(position.dtype)
        x = jnp.concatenate([position, energy])
        return x, coordinates.ravel(self.gradient)

    def differs(self, other: "Point") -> Array:
        """Return whether a latent has another value."""
        return (ravel_pytree(self.z)[0] != ravel_pytree(other.z)[0]).any()


def update_moments(
    number: Array,
    thinning: Thinning,
    moments: RunMoments,
    metric: tuple[Metric, Metric],
    before: Point,
    after: Point,
    diverging: Array,
    proposed: Array | None = None,
    potential: Any = None,
) -> RunMoments:
    """Return the moments of one chain after a transition of a run.

    Args:
        number: of the transition in its run, from 1; 0 in warm-up, where none counts.
        thinning: of the run.
        moments: before it.
        metric: the square root S of the metric, and its inverse.
        before: where the transition began.
        after: where it ended.
        diverging: whether its proposal diverged.
        proposed: the potential at its proposal; None where it is not known.
        potential: of the model, with its learned sites.
    """
    accepted = before.differs(after)
    moments = moments.count_proposal(number, accepted, diverging)
    moments = moments.follow_lowest(number, after.energy, proposed)
    k = number // thinning.stride
    due = (number % thinning.stride == 0) & (k > 0) & (k <= 2 * thinning.half)

    def counted[Counts: (OffDataCounts, RoundedCounts)](
        counts: Counts | None,
    ) -> Counts | None:
        return counts and counts.restart(k == 1).add(potential, after.z)

    def observe() -> RunMoments:
        fresh = RunMoments.zero(before.ravel(metric[0])[0])
        start = moments._replace(
            rows=jnp.where(k == 1, fresh.rows, moments.rows),
            off_data=counted(moments.off_data),
            rounded=counted(moments.rounded),
        )
        return start.observe(k, thinning, metric, *after.ravel(metric[0]))

    return jax.lax.cond(due, observe, lambda: moments)
