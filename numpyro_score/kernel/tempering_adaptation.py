r"""Adaptation of parallel tempering after each round of warm-up, chain by chain.

After a round the inverse temperatures move to equal steps of the barrier, their number
to what the barrier asks for, and each rung takes the metric

.. math:: s_i^2 = 1 / \mathrm{var}\, \partial_i U_\beta

of its gradients: the Fisher information, exact for Gaussians and, unlike
the variance of the draws, for mixtures of Gaussians far apart, since draws of a rung
come from several modes (python -m tests.benchmarks.tempering). Within a round the step
sizes follow the acceptance by the recursion of Robbins and Monro (Andrieu and Thoms
2008, eq. 20).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.kernel.tempered_potential import TemperedPoint, ravel_rows
from numpyro_score.kernel.tempering_schedule import (
    barrier_steps,
    even_steps,
    interpolate,
    wanted_rungs,
)

STEP_SIZE_DECAY = 0.6  # of the gain; Andrieu and Thoms 2008 ask for one in (1/2, 1]
PRIOR_DRAWS = 5  # draws that the metric before counts for, as in Stan
MAX_CORRELATION = 0.5  # of the log likelihood before and after the local transitions
FEWEST_FOR_CORRELATION = 16  # draws: a correlation then has a standard error below 1/4


class TemperingAdaptState(NamedTuple):
    """Quantities that are adapted, of one chain or with a leading axis of chains.

    - **step_size**: of the local transitions at the posterior.
    - **inverse_temperatures**: from 0 to 1; 1 beyond the last rung in use.
    - **num_rungs**: how many are in use.
    - **step_sizes**: of all rungs, in units of ``scale``.
    - **scale**: diagonal metrics of all rungs, as standard deviations.
    - **num_transitions**: local transitions per iteration of all rungs.
    """

    step_size: Float[Array, "*chains"]
    inverse_temperatures: Float[Array, "*chains rungs"]
    num_rungs: Int[Array, "*chains"]
    step_sizes: Float[Array, "*chains rungs"]
    scale: Float[Array, "*chains rungs d"]
    num_transitions: Int[Array, "*chains rungs"]

    @classmethod
    def first(
        cls,
        betas: Float[Array, " rungs"],
        num_rungs: int,
        point: TemperedPoint,
        step_size: float,
    ) -> "TemperingAdaptState":
        """Return what warm-up starts with.

        Args:
            betas: inverse temperatures.
            num_rungs: how many are in use.
            point: prior and likelihood at draws of the prior.
            step_size: the first step size of all rungs.
        """
        gradients = ravel_rows(point.prior.grad, len(point.log_likelihood))
        scale = _fisher_scale(jnp.nanvar(gradients, axis=0), jnp.ones(()))
        size = len(betas)
        return cls(
            jnp.asarray(step_size, float),
            betas,
            jnp.asarray(num_rungs),
            jnp.full(size, step_size, float),
            jnp.broadcast_to(scale, (size, *scale.shape)),
            jnp.ones(size, int),
        )

    @property
    def active(self) -> Bool[Array, "*chains pairs"]:
        """Mask of the pairs of neighbors in use."""
        pairs = jnp.arange(self.inverse_temperatures.shape[-1] - 1)
        return pairs < self.num_rungs[..., None] - 1


class RoundStatistics(NamedTuple):
    """Statistics of a round, of one chain or with a leading axis of chains.

    - **num_draws**: iterations.
    - **mean**: of gradients of the potential, at every rung.
    - **square**: their summed squared deviations.
    - **energy_mean**: of the log likelihood before and after the local transitions.
    - **energy_square**: summed products of the deviations of both.
    - **rejection**: summed rejection probabilities of the pairs.
    """

    num_draws: Int[Array, "*chains"]
    mean: Float[Array, "*chains rungs d"]
    square: Float[Array, "*chains rungs d"]
    energy_mean: Float[Array, "*chains rungs 2"]
    energy_square: Float[Array, "*chains rungs 2 2"]
    rejection: Float[Array, "*chains pairs"]

    @classmethod
    def zero(cls, scale: Float[Array, "rungs d"]) -> "RoundStatistics":
        """Return the statistics of no iterations, for one chain with these metrics."""
        size = len(scale)
        return cls(
            jnp.zeros((), int),
            jnp.zeros_like(scale),
            jnp.zeros_like(scale),
            jnp.zeros((size, 2)),
            jnp.zeros((size, 2, 2)),
            jnp.zeros(size - 1),
        )

    def add(
        self,
        betas: Float[Array, " rungs"],
        point: TemperedPoint,
        before: Float[Array, " rungs"],
        rejection: Float[Array, " pairs"],
    ) -> "RoundStatistics":
        """Return the statistics with one iteration of one chain (Welford 1962).

        Args:
            betas: inverse temperatures.
            point: prior and likelihood after the local transitions.
            before: log likelihood before the local transitions.
            rejection: rejection probability of each pair.
        """
        count = self.num_draws + 1
        gradient = jax.vmap(TemperedPoint.grad)(point, betas)
        new = ravel_rows(gradient, len(betas))
        # a draw of the prior may have no likelihood, and its gradient no value
        gap = jnp.where(jnp.isfinite(new), new - self.mean, 0.0)
        energies = jnp.stack([before, point.log_likelihood], axis=-1)
        jump = energies - self.energy_mean
        jump = jnp.where(jnp.isfinite(energies), jump, 0.0)
        keep = 1 - 1 / count
        return RoundStatistics(
            count,
            self.mean + gap / count,
            self.square + keep * jnp.square(gap),
            self.energy_mean + jump / count,
            self.energy_square + keep * jump[:, :, None] * jump[:, None, :],
            self.rejection + rejection,
        )

    def add_rejection(self, rejection: Array) -> "RoundStatistics":
        """Return the statistics with the rejections of one iteration alone."""
        return self._replace(
            num_draws=self.num_draws + 1, rejection=self.rejection + rejection
        )

    @property
    def rejection_rate(self) -> Float[Array, "*chains pairs"]:
        """Rejection rates of swaps between neighbors; NaN before the first."""
        return self.rejection / self.num_draws[..., None]

    @property
    def correlation(self) -> Float[Array, " rungs"]:
        """Correlation of the log likelihood before and after the transitions."""
        square = self.energy_square
        sds = jnp.sqrt(square[:, 0, 0] * square[:, 1, 1])
        return jnp.where(sds > 0, square[:, 0, 1] / jnp.maximum(sds, 1e-30), 0.0)


def _fisher_scale(gradient_variance: Array, otherwise: Array) -> Array:
    """Return one over the sd of gradients, where that makes sense."""
    valid = (gradient_variance > 0) & jnp.isfinite(gradient_variance)
    return jnp.where(valid, jnp.where(valid, gradient_variance, 1.0) ** -0.5, otherwise)


def adapt_step_sizes(
    state: TemperingAdaptState,
    accept_prob: Float[Array, "chains rungs"],
    count: Int[Array, " chains"],
    target: float,
) -> TemperingAdaptState:
    """Return a batch of chains' state with step sizes moved towards the target.

    Args:
        state: of a batch of chains.
        accept_prob: mean acceptance probability of the last transitions.
        count: iterations in this round.
        target: the acceptance probability that is wanted.
    """
    gain = jnp.asarray(count, float)[:, None] ** -STEP_SIZE_DECAY
    rung = jnp.arange(accept_prob.shape[1])
    moved = (rung > 0) & (rung < state.num_rungs[:, None])
    change = jnp.where(moved, gain * (accept_prob - target), 0.0)
    step_sizes = state.step_sizes * jnp.exp(change)
    last = (state.num_rungs - 1)[:, None]
    step_size = jnp.take_along_axis(step_sizes, last, axis=1)[:, 0]
    return state._replace(step_sizes=step_sizes, step_size=step_size)


class RoundOptions(NamedTuple):
    """Options of the adaptation at the end of a round.

    - **block**: rungs that explore together; None keeps the number of rungs.
    - **most_rungs**: the largest number of rungs.
    - **adapt_step_size**: whether step sizes move with the temperatures.
    - **max_transitions**: the largest number of local transitions.
    """

    block: int | None
    most_rungs: int
    adapt_step_size: bool
    max_transitions: int


def next_round(
    state: TemperingAdaptState, statistics: RoundStatistics, options: RoundOptions
) -> tuple[TemperingAdaptState, Int[Array, " rungs"]]:
    """Return what one chain's next round starts with, and which rungs' states it takes.

    Args:
        state: of the round that ends.
        statistics: of the round.
        options: what may change.
    """
    steps = barrier_steps(statistics.rejection_rate, state.active)
    num_next = state.num_rungs
    if options.block is not None:
        num_next = wanted_rungs(steps.sum(), options.block, options.most_rungs)
    betas, place = even_steps(
        state.inverse_temperatures, steps, state.num_rungs, num_next
    )
    log_scale = jnp.log(_metrics(state, statistics))
    scale = jnp.exp(interpolate(log_scale, place))
    # rung 0 takes no steps, so nothing was learned of them there
    moved = jnp.clip(place, 1.0, None)
    step_sizes = state.step_sizes
    if options.adapt_step_size:
        # steps stay what they are in the units of the latents
        change = log_scale - jnp.log(state.scale)
        step_sizes = step_sizes * jnp.exp(-_mean(change))
        step_sizes = jnp.exp(interpolate(jnp.log(step_sizes), moved))
    wanted = _transitions(state, statistics, options.max_transitions)
    num = jnp.ceil(interpolate(wanted.astype(float), moved) - 1e-3).astype(int)
    state = TemperingAdaptState(
        step_sizes[num_next - 1], betas, num_next, step_sizes, scale, num
    )
    return state, jnp.round(place).astype(int)


def _mean(values: Float[Array, "rungs d"]) -> Float[Array, " rungs"]:
    """Return the mean over coordinates, 0 where there are none."""
    return values.sum(-1) / max(values.shape[-1], 1)


def _metrics(state: TemperingAdaptState, statistics: RoundStatistics) -> Array:
    """Return the metrics of the round, shrunk to those before for few draws."""
    scale = _fisher_scale(statistics.square / statistics.num_draws, state.scale)
    weight = statistics.num_draws / (statistics.num_draws + PRIOR_DRAWS)
    mixed = weight * jnp.log(scale) + (1 - weight) * jnp.log(state.scale)
    return jnp.exp(mixed)


def _transitions(
    state: TemperingAdaptState, statistics: RoundStatistics, most: int
) -> Int[Array, " rungs"]:
    """Return the transitions after which the log likelihood keeps little correlation.

    That of one transition is the root of that of all, as in a process of first order.
    """
    if most == 1:
        return state.num_transitions
    correlation = jnp.clip(statistics.correlation, 1e-3, 1 - 1e-3)
    ratio = jnp.log(MAX_CORRELATION) / jnp.log(correlation)
    wanted = jnp.ceil(state.num_transitions * ratio).astype(int)
    known = statistics.num_draws >= FEWEST_FOR_CORRELATION
    return jnp.where(known, jnp.clip(wanted, 1, most), state.num_transitions)
