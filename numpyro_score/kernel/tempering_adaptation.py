r"""Adaptation of parallel tempering after each round of warm-up, chain by chain.

After a round the inverse temperatures move to equal steps of the barrier, their number
to what the barrier asks for, and each rung takes as mass matrix

.. math:: M_\beta = \mathrm{cov}\, \nabla U_\beta ,

the Fisher information: exact for Gaussians and, unlike the inverse covariance of the
draws, for mixtures of Gaussians far apart, since draws of a rung come from several
modes (python -m tests.benchmarks.tempering). It is linear in the inverse temperature
where its draws are alike, and is interpolated so. Of up to ``MAX_DENSE`` latent numbers
it has those correlations that stand out from the noise of the sample, of more only the
diagonal. Gradients are taken in coordinates that the present metric whitens, so that
each round corrects the metric by a factor. Within a round the step
sizes follow the acceptance by the recursion of Robbins and Monro (Andrieu and Thoms
2008, eq. 20).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.kernel.fisher_metric import spiked_eigenvalues
from numpyro_score.kernel.tempered_potential import TemperedPoint, ravel_rows
from numpyro_score.kernel.tempering_schedule import (
    barrier_steps,
    even_steps,
    interpolate,
    wanted_rungs,
)
from numpyro_score.kernel.whitening import whiten

# Andrieu and Thoms 2008 ask for (1/2, 1]; near 1/2 the start is forgotten soonest
STEP_SIZE_DECAY = 0.6
PRIOR_DRAWS = 5  # draws that the metric before counts for: n / (n + 5), as in Stan
# of the log likelihood before and after the local transitions; measured:
# `python -m tests.benchmarks.constants --only transitions`
MAX_CORRELATION = 0.5
MAX_DENSE = 100  # latent numbers; a matrix per rung and chain, so at most 40 kB each
MIN_CORRELATED = 16  # draws: a correlation then has a standard error below 1/4


Metrics = Array  # (*chains, rungs, d), or (*chains, rungs, d, d)


class TemperingAdaptState(NamedTuple):
    """Quantities that are adapted, of one chain or with a leading axis of chains.

    - **step_size**: of the local transitions at the posterior.
    - **inverse_temperatures**: from 0 to 1; 1 beyond the last rung in use.
    - **num_rungs**: how many are in use.
    - **step_sizes**: of all rungs, in units of the metric.
    - **mass_matrix_sqrt_inv**: metrics of all rungs, the matrix S with
      :math:`M^{-1} = S^T S`, or its diagonal.
    - **num_transitions**: local transitions per iteration of all rungs.
    """

    step_size: Float[Array, "*chains"]
    inverse_temperatures: Float[Array, "*chains rungs"]
    num_rungs: Int[Array, "*chains"]
    step_sizes: Float[Array, "*chains rungs"]
    mass_matrix_sqrt_inv: Metrics
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
        variance = jnp.nanvar(gradients, axis=0)
        sqrt = jnp.where(_is_usable(variance), variance, 1.0) ** -0.5
        sqrt = jnp.diag(sqrt) if 1 < len(sqrt) <= MAX_DENSE else sqrt
        size = len(betas)
        return cls(
            jnp.asarray(step_size, float),
            betas,
            jnp.asarray(num_rungs),
            jnp.full(size, step_size, float),
            jnp.broadcast_to(sqrt, (size, *sqrt.shape)),
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
    - **mean**: of whitened gradients of the potential, at every rung.
    - **scatter**: their summed products, or squares, of deviations.
    - **energy_mean**: of the log likelihood before and after the local transitions.
    - **energy_square**: summed products of the deviations of both.
    - **rejection**: summed rejection probabilities of the pairs.
    """

    num_draws: Int[Array, "*chains"]
    mean: Float[Array, "*chains rungs d"]
    scatter: Metrics
    energy_mean: Float[Array, "*chains rungs 2"]
    energy_square: Float[Array, "*chains rungs 2 2"]
    rejection: Float[Array, "*chains pairs"]

    @classmethod
    def zero(cls, sqrt: Metrics) -> "RoundStatistics":
        """Return the statistics of no iterations, for one chain with these metrics."""
        size = len(sqrt)
        return cls(
            jnp.zeros((), int),
            jnp.zeros_like(sqrt[..., 0] if sqrt.ndim == 3 else sqrt),
            jnp.zeros_like(sqrt),
            jnp.zeros((size, 2)),
            jnp.zeros((size, 2, 2)),
            jnp.zeros(size - 1),
        )

    def add(
        self,
        adapt_state: TemperingAdaptState,
        point: TemperedPoint,
        before: Float[Array, " rungs"],
        rejection: Float[Array, " pairs"],
    ) -> "RoundStatistics":
        """Return the statistics with one iteration of one chain (Welford 1962).

        Args:
            adapt_state: inverse temperatures and metrics.
            point: prior and likelihood after the local transitions.
            before: log likelihood before the local transitions.
            rejection: rejection probability of each pair.
        """
        count = self.num_draws + 1
        betas = adapt_state.inverse_temperatures
        gradient = jax.vmap(TemperedPoint.grad)(point, betas)
        gradient = ravel_rows(gradient, len(betas))
        new = jax.vmap(whiten)(adapt_state.mass_matrix_sqrt_inv, gradient)
        # a draw of the prior may have no likelihood, and its gradient no value
        gap = jnp.where(jnp.isfinite(new), new - self.mean, 0.0)
        energies = jnp.stack([before, point.log_likelihood], axis=-1)
        jump = energies - self.energy_mean
        jump = jnp.where(jnp.isfinite(energies), jump, 0.0)
        keep = 1 - 1 / count
        return RoundStatistics(
            count,
            self.mean + gap / count,
            self.scatter + keep * _product(gap, self.scatter.ndim),
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


def _product(rows: Float[Array, "rungs d"], ndim: int) -> Metrics:
    """Return the squares of each row, or the products of its entries."""
    return jnp.square(rows) if ndim == 2 else rows[:, :, None] * rows[:, None, :]


def _is_usable(variance: Array) -> Array:
    return (variance > 0) & jnp.isfinite(variance)


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
    mass = jax.vmap(_mass_matrix, (0, 0, None))(
        state.mass_matrix_sqrt_inv, statistics.scatter, statistics.num_draws
    )
    nearest = jnp.round(place).astype(int)
    sqrt = jax.vmap(_sqrt_inv)(
        interpolate(mass, place), state.mass_matrix_sqrt_inv[nearest]
    )
    # rung 0 takes no steps, so nothing was learned of them there
    moved = jnp.clip(place, 1.0, None)
    step_sizes = state.step_sizes
    if options.adapt_step_size:
        # steps stay what they are in the units of the latents
        length = jnp.log(step_sizes) + _log_scale(state.mass_matrix_sqrt_inv)
        step_sizes = jnp.exp(interpolate(length, moved) - _log_scale(sqrt))
    wanted = _transitions(state, statistics, options.max_transitions)
    # what rounding leaves above a whole number asks for no further transition
    num = jnp.ceil(interpolate(wanted.astype(float), moved) - 1e-3).astype(int)
    state = TemperingAdaptState(
        step_sizes[num_next - 1], betas, num_next, step_sizes, sqrt, num
    )
    return state, nearest


def _log_scale(sqrt: Metrics) -> Float[Array, " rungs"]:
    """Return the mean log scale of metrics, 0 without coordinates."""
    scale = sqrt if sqrt.ndim == 2 else jnp.diagonal(sqrt, axis1=1, axis2=2)
    return jnp.log(scale).sum(-1) / max(scale.shape[-1], 1)


def _mass_matrix(sqrt: Array, scatter: Array, num_draws: Array) -> Array:
    """Return the covariance of one rung's gradients, or its diagonal.

    The variances are shrunk to those of the round before for few draws; of the
    eigenvalues of the correlations only those count that stand out from the noise.
    """
    variance = (scatter if scatter.ndim == 1 else jnp.diagonal(scatter)) / num_draws
    usable = _is_usable(variance)
    weight = num_draws / (num_draws + PRIOR_DRAWS)
    sd = jnp.sqrt(jnp.where(usable, variance, 1.0))
    shrunk = sd**weight
    if scatter.ndim == 1:
        return jnp.square(shrunk / sqrt)
    correlation = scatter / num_draws / jnp.outer(sd, sd)
    correlation = jnp.where(jnp.outer(usable, usable), correlation, jnp.eye(len(sd)))
    values, vectors = jnp.linalg.eigh(correlation)
    resolution = len(values) * jnp.finfo(values.dtype).eps * values.max()
    spiked = jnp.maximum(spiked_eigenvalues(values, num_draws), resolution)
    factor = vectors * jnp.sqrt(spiked)
    factor = jnp.linalg.solve(sqrt, shrunk[:, None] * factor)
    return factor @ factor.T


def _sqrt_inv(mass: Array, otherwise: Array) -> Array:
    """Return S with S^T S the inverse of a mass matrix, or another if it has none.

    Triangular if dense.
    """
    if mass.ndim == 1:
        sqrt = mass**-0.5
    else:
        lower = jnp.linalg.cholesky(mass)
        unit = jnp.eye(len(mass), dtype=mass.dtype)
        sqrt = jax.scipy.linalg.solve_triangular(lower, unit, lower=True)
    return jnp.where(jnp.isfinite(sqrt).all(), sqrt, otherwise)


def _transitions(
    state: TemperingAdaptState, statistics: RoundStatistics, most: int
) -> Int[Array, " rungs"]:
    """Return the transitions after which the log likelihood keeps little correlation.

    That of one transition is the root of that of all, as in a process of first order.
    """
    if most == 1:
        return state.num_transitions
    # below, one transition is enough; above, more are than any run takes
    correlation = jnp.clip(statistics.correlation, 1e-3, 1 - 1e-3)
    ratio = jnp.log(MAX_CORRELATION) / jnp.log(correlation)
    wanted = jnp.ceil(state.num_transitions * ratio).astype(int)
    known = statistics.num_draws >= MIN_CORRELATED
    return jnp.where(known, jnp.clip(wanted, 1, most), state.num_transitions)
