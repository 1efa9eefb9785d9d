"""Warm-up: step size, metric and length, for one chain or pooled over many.

Adjusted chains learn the metric from draws and gradients in windows of growing length
(:mod:`~numpyro_score.kernel.fisher_metric`), and from it the length of a trajectory
and its friction. With Welford's covariance the schedule and the regularization are
those of NumPyro's HMC. The step size follows the acceptance by dual averaging, that of
unadjusted chains an energy-error variance. Vectorized chains may share all of it.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.infer.hmc_util import (
    _initialize_mass_matrix,
    build_adaptation_schedule,
    dual_averaging,
    welford_covariance,
)

from numpyro_score.kernel.fisher_metric import (
    MAX_RANK,
    FisherMoments,
    Snapshots,
    inverse_gradient_sqrt,
)
from numpyro_score.kernel.whitening import (
    LowRankSqrt,
    Metric,
    WelfordState,
    ravel_blocks,
)

init_averaging, update_averaging = dual_averaging()

# draws; later ones grow by GROWTH: 20, 32, 51, 81, ...; Stan has 25 and 2; measured:
# `python -m tests.benchmarks.constants --only window growth`
FIRST_WINDOW = 20
GROWTH = 1.6  # Stan doubles
LAST_SHARE = 0.15  # of warm-up, for the step size alone (as nutpie)
# dimensions up to which a metric may choose to be dense: a product, d^2, costs less
# than one of 2 MAX_RANK directions, 4 d MAX_RANK, as up to 80
MAX_DENSE = 50
# first windows, 103 draws, in which the chain that accepts least counts most; Hoffman
# et al. 2021 use the harmonic mean throughout
HARMONIC_WINDOWS = 3
# not told from 0: a stuck one of C chains leaves a harmonic mean of C %
MIN_CHAIN_ACCEPT = 1e-2
# of a trajectory in the first window, where nothing is known; not tuned
FIRST_STEPS = 8
# fewer steps: forgets less; more: costs gradients that another parametrization would
# save; not tuned
MIN_STEPS, MAX_STEPS = 3, 64
QUARTER_PERIOD = math.pi / 2  # of a unit oscillator, after which it forgets its start
# of the energy-error variance: fifty errors tell it within (2 / 50)^1/2 = 20 %, and the
# step, its sixth root, within 3 %
MEMORY = 1 - 1 / 50


class EnergyVarianceEstimate(NamedTuple):
    r"""Running estimate of the energy-error variance at step 1, in units of its goal.

    The variance of one step's energy error grows as :math:`h^6`; the estimate is a
    weighted mean of :math:`\Delta^2 / (v h^6)`, which forgets after some fifty steps
    and discounts errors far from the goal v (Robnik et al. 2024, section 5).
    """

    total: Array
    weight: Array

    @classmethod
    def zero(cls) -> "EnergyVarianceEstimate":
        """Return the estimate before the first step."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(
        self,
        energy_errors: Float[Array, " chains"],
        step_size: Float[Array, ""],
        variance: float,
        counted: Bool[Array, " chains"] | bool = True,
    ) -> "EnergyVarianceEstimate":
        """Return the estimate after an energy error of every chain that counts."""
        ratio = jnp.square(energy_errors) / variance
        # beyond a step off by a factor 10, the sixth root of 1e6
        ratio = jnp.clip(jnp.nan_to_num(ratio, nan=1e6, posinf=1e6), 1e-6, 1e6)
        # a step off by a factor e^1.5 counts exp(-1/2): the power law fails there
        weight = jnp.exp(-0.5 * jnp.square(jnp.log(ratio) / (6 * 1.5)))
        return EnergyVarianceEstimate(
            MEMORY * self.total
            + jnp.mean(weight * ratio, where=counted) / step_size**6,
            MEMORY * self.weight + jnp.mean(weight, where=counted),
        )

    def step_size(self) -> Float[Array, ""]:
        """Return the step at which the variance meets its goal."""
        return (self.total / self.weight) ** (-1 / 6)


class AdaptationState(NamedTuple):
    """Adapted quantities. The first seven fields are those of NumPyro's HMC.

    - **step_size**: step in units of the metric.
    - **inverse_mass_matrix**: the metric, a covariance.
    - **mass_matrix_sqrt**: inverse of S.
    - **mass_matrix_sqrt_inv**: S, with the covariance S^T S.
    - **ss_state**: averaging of the step size.
    - **mm_state**: moments of the draws of the present window.
    - **window_idx**: number of the window.
    - **num_steps**: steps of the next transition.
    - **friction**: rate of refreshment of the momentum; 0 if refreshed fully.
    - **scale**: square root of the leading eigenvalue of the whitened covariance.
    - **correlated**: whether the metric has correlations, where it may choose.
    """

    step_size: Array
    inverse_mass_matrix: Metric
    mass_matrix_sqrt: Metric
    mass_matrix_sqrt_inv: Metric
    ss_state: Any
    mm_state: Any
    window_idx: Array
    num_steps: Array
    friction: Array
    scale: Array
    correlated: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class AdaptationSettings:
    """Settings of warm-up; a static part of the state, without leaves.

    NumPyro tells a kernel the length of warm-up only at ``init``; keeping it in the
    state lets kernels stay free of mutable attributes. The step size aims either at
    ``target_accept_prob`` or, for unadjusted chains, at ``energy_variance``.

    ``dense_mass`` is that of NumPyro's HMC, or None for a metric that keeps
    correlations where it finds them. ``num_steps`` is None where the length of a
    trajectory is adapted too; ``friction`` is then in units of the inverse square root
    of the leading eigenvalue of the whitened covariance.
    """

    num_warmup: int
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    dense_mass: bool | tuple[tuple[str, ...], ...] | None = False
    target_accept_prob: float = 0.574
    energy_variance: float | None = None
    fisher: bool = False
    num_steps: int | None = 1
    friction: float | None = None

    def init(self, z: Any, step_size: float, inverse_mass: Any) -> AdaptationState:
        """Return the state before warm-up, for one position z.

        Args:
            z: a position, for its structure.
            step_size: initial step size.
            inverse_mass: initial metric as NumPyro's HMC takes it; None for identity.

        Raises:
            ValueError: for a metric of other sites or another size than z.
        """
        check_sites(z, inverse_mass, self.dense_mass)
        covariance, sqrt, sqrt_inv = self._initial_matrices(z, inverse_mass)
        first_step = jnp.asarray(step_size, float)
        return AdaptationState(
            first_step,
            covariance,
            sqrt,
            sqrt_inv,
            ss_state=self.init_step_size_state(first_step),
            mm_state=self._no_moments(z, sqrt_inv),
            window_idx=jnp.zeros((), int),
            num_steps=jnp.asarray(self.num_steps or FIRST_STEPS, int),
            friction=jnp.asarray(self.friction or 0.0, float),
            scale=jnp.ones(()),
            correlated=jnp.asarray(inverse_mass is not None),
        )

    def begin(
        self, state: AdaptationState, z: Any, gradient: Any, *, rescale: bool
    ) -> AdaptationState:
        """Return the state before warm-up, where the chains that share it start.

        Args:
            state: of :meth:`init`.
            z: positions with a leading axis of chains.
            gradient: of the potential, there.
            rescale: whether to begin with the variances ``1/|g|``. A step size that is
                not adapted has the units of the metric that was given: it stays.
        """
        if not jax.tree.leaves(z):
            return state
        moments = self._moments_at(z, state.mm_state)
        state = state._replace(mm_state=moments)
        adapts = self.adapt_mass_matrix and self.adapt_step_size and self.num_warmup
        if not (self.fisher and rescale and adapts):
            return state
        blocks = _by_block(
            lambda sqrt, names: _rescaled(sqrt, _rows(gradient, names)),
            state.mass_matrix_sqrt_inv,
        )
        return with_matrices(state, blocks)

    def windows(self) -> np.ndarray:
        """Return first and last transition of every window.

        Example:
            >>> plan = AdaptationSettings(100, fisher=True)
            >>> plan.windows().tolist()
            [[0, 19], [20, 84], [85, 99]]
        """
        if not self.fisher:
            return np.asarray(build_adaptation_schedule(self.num_warmup))
        end = self.num_warmup - math.ceil(LAST_SHARE * self.num_warmup)
        sizes: list[int] = []
        size = float(FIRST_WINDOW)
        while sum(sizes) + size <= end:
            sizes.append(int(size))
            size *= GROWTH
        if sizes:
            sizes[-1] += end - sum(sizes)
        sizes.append(self.num_warmup - sum(sizes))
        ends = np.cumsum(sizes)
        return np.stack([ends - sizes, ends - 1], axis=1)

    def update(
        self,
        i: Array,
        energy_errors: Float[Array, " chains"],
        diverging: Array,
        z: Any,
        gradient: Any,
        state: AdaptationState,
        resolved: Array,
    ) -> AdaptationState:
        """Return the state after step i of warm-up.

        Args:
            i: the step, from 0.
            energy_errors: of the last proposal, one per chain that shares the state.
            diverging: whether it diverged; such draws are left out of the metric.
            z: positions with a leading axis of chains.
            gradient: of the potential, there.
            state: the state before.
            resolved: chains whose energy errors are more than rounding: no step size
                makes the others accept more.
        """
        windows = jnp.asarray(self.windows())
        state = self._update_step_size(i, energy_errors, resolved, state)
        first = 0 if self.fisher else 1
        inside = (state.window_idx >= first) & (state.window_idx < len(windows) - 1)
        if self.adapt_mass_matrix and jax.tree.leaves(z):
            window = windows[state.window_idx]
            place = (i - window[0]) / (window[1] - window[0] + 1)
            moments = jax.lax.cond(
                inside,
                lambda: self._merge(state, z, gradient, ~diverging, place),
                lambda: state.mm_state,
            )
            state = state._replace(mm_state=moments)
        at_end = i == windows[state.window_idx, 1]
        state = jax.lax.cond(
            at_end & inside, lambda: self._close_window(state, z), lambda: state
        )
        state = state._replace(window_idx=state.window_idx + at_end)
        return self._update_length(state)

    @property
    def chooses_metric(self) -> bool:
        """True if the metric keeps correlations only where it finds them."""
        return self.dense_mass is None

    @property
    def by_energy(self) -> bool:
        """True if the step size aims at an energy-error variance."""
        return self.energy_variance is not None

    def init_step_size_state(self, step_size: Array) -> Any:
        """Return the averaging of step sizes, begun at a step size."""
        if self.by_energy:
            return EnergyVarianceEstimate.zero()
        # drawn towards ten times the step (Hoffman and Gelman 2014, algorithm 5)
        return init_averaging(jnp.log(10) + jnp.log(step_size))

    def _update_step_size(
        self, i: Array, energy_errors: Array, resolved: Array, state: AdaptationState
    ) -> AdaptationState:
        if not self.adapt_step_size:
            return state
        counted = jnp.where(resolved.any(), resolved, True)
        if self.energy_variance is not None:
            scale = state.ss_state.update(
                energy_errors, state.step_size, self.energy_variance, counted
            )
            return state._replace(ss_state=scale, step_size=scale.step_size())
        accept_prob = self._accept_prob(energy_errors, counted, state.window_idx)
        averaging = update_averaging(
            self.target_accept_prob - accept_prob, state.ss_state
        )
        # warm-up ends with the average of the log step sizes of its last window
        log_step, log_step_mean = averaging[:2]
        log_step = jnp.where(i == self.num_warmup - 1, log_step_mean, log_step)
        limits = jnp.finfo(log_step.dtype)
        step_size = jnp.clip(jnp.exp(log_step), limits.tiny, limits.max)
        return state._replace(ss_state=averaging, step_size=step_size)

    def _accept_prob(
        self, energy_errors: Array, counted: Array, window_idx: Array
    ) -> Array:
        """Return the mean acceptance, at first the harmonic one (Hoffman et al. 2021).

        A chain that starts where only small steps are accepted would else be left
        behind by the others. Chains whose errors are rounding do not count.
        """
        errors = jnp.where(jnp.isnan(energy_errors), jnp.inf, energy_errors)
        accept_prob = jnp.exp(-jnp.maximum(errors, 0.0))
        if not self.fisher:
            return accept_prob.mean(where=counted)
        inverse = 1 / jnp.maximum(accept_prob, MIN_CHAIN_ACCEPT)
        early = window_idx < HARMONIC_WINDOWS
        harmonic = 1 / inverse.mean(where=counted)
        return jnp.where(early, harmonic, accept_prob.mean(where=counted))

    def _update_length(self, state: AdaptationState) -> AdaptationState:
        if self.num_steps is not None:
            return state
        length = QUARTER_PERIOD * state.scale
        wanted = jnp.ceil(length / state.step_size)
        num_steps = jnp.clip(wanted, MIN_STEPS, MAX_STEPS).astype(int)
        num_steps = jnp.where(state.window_idx == 0, FIRST_STEPS, num_steps)
        return state._replace(
            num_steps=num_steps, friction=(self.friction or 0.0) / state.scale
        )

    def _initial_matrices(self, z: Any, inverse_mass: Any) -> tuple[Metric, ...]:
        dense, size = self.dense_mass, sum(map(jnp.size, jax.tree.leaves(z)))
        low_rank = dense is None and size > MAX_DENSE
        if dense is None:
            dense = not low_rank
        matrices = _initialize_mass_matrix(
            z,
            dict(inverse_mass) if isinstance(inverse_mass, dict) else inverse_mass,
            [*dense] if isinstance(dense, tuple) else dense,
        )
        matrices = jax.tree.map(lambda m: jnp.asarray(m, float), matrices)
        if low_rank:
            matrices = _low_rank_matrices(matrices[2])
        return tuple(matrices)

    def _no_moments(self, z: Any, sqrt: Metric) -> Any:
        if not jax.tree.leaves(z):
            return ()
        if not self.fisher:
            return jax.tree.map(WelfordState.zero, sqrt)
        return self._moments_at(
            jax.tree.map(lambda z: jnp.zeros_like(z)[None], z), sqrt
        )

    def _moments_at(self, z: Any, like: Any) -> Any:
        """Return the moments of no draws for the chains at z."""
        if not self.fisher:
            num_chains = len(jax.tree.leaves(z)[0])
            return _by_block(lambda block, _: block.for_chains(num_chains), like)
        return _by_block(
            lambda block, names: _new_moments(block, _rows(z, names)), like
        )

    def _merge(
        self, state: AdaptationState, z: Any, gradient: Any, valid: Array, place: Array
    ) -> Any:
        """Return the moments with the draws of all chains taken in."""
        if not self.fisher:
            return _by_block(
                lambda moments, names: moments.merge(_rows(z, names)), state.mm_state
            )

        def merge(moments: Any, names: Any) -> Any:
            sqrts = state.mass_matrix_sqrt, state.mass_matrix_sqrt_inv
            if names is not None:
                sqrts = tuple(sqrt[names] for sqrt in sqrts)
            x, g = _rows(z, names), _rows(gradient, names)
            finite = jnp.isfinite(g).all(-1) & jnp.isfinite(x).all(-1)
            return moments.update(*sqrts, x, g, valid & finite, place)

        return _by_block(merge, state.mm_state)

    def _close_window(self, state: AdaptationState, z: Any) -> AdaptationState:
        """Take over the window's metric; start the step size and moments anew."""
        if self.adapt_mass_matrix and jax.tree.leaves(z):
            state = self._new_metric(state, z)
        if self.adapt_step_size:
            step_state = self.init_step_size_state(state.step_size)
            state = state._replace(ss_state=step_state)
        return state

    def _new_metric(self, state: AdaptationState, z: Any) -> AdaptationState:
        if not self.fisher:
            state = with_matrices(
                state, _by_block(regularized_covariance, state.mm_state)
            )
            zero = jax.tree.map(jnp.zeros_like, state.mm_state)
            return state._replace(mm_state=zero)
        old = state[1:4]
        dense = None if self.dense_mass is None else True

        def adapt(moments: Any, names: Any) -> Any:
            block = old if names is None else tuple(m[names] for m in old)
            return moments.adapted(block, dense).or_else(block)

        found = _by_block(adapt, state.mm_state)
        blocks = found if isinstance(found, dict) else {None: found}
        matrices = {names: metric.matrices for names, metric in blocks.items()}
        state = with_matrices(state, matrices if None not in blocks else matrices[None])
        leading = jnp.stack([metric.leading for metric in blocks.values()]).max()
        correlated = jnp.stack([m.correlated for m in blocks.values()]).any()
        return state._replace(
            mm_state=self._moments_at(z, state.mm_state),
            scale=jnp.sqrt(leading),
            correlated=correlated,
        )


def _by_block(function: Any, blocks: Any) -> Any:
    """Apply ``function(block, names)`` to every block; names None is the whole."""
    if isinstance(blocks, dict):
        return {names: function(block, names) for names, block in blocks.items()}
    return function(blocks, None)


def _rows(z: Any, names: tuple[str, ...] | None) -> Float[Array, "chains d"]:
    return jax.vmap(lambda z: ravel_blocks(z, names))(z)


def _new_moments(like: Any, x: Float[Array, "chains d"]) -> Any:
    """Return no moments at x, of the kind that a metric (or its moments) needs."""
    if isinstance(like, FisherMoments | Snapshots):
        return type(like).zero(x)
    low_rank = isinstance(like, LowRankSqrt)
    long = not low_rank and like.ndim == 1 and x.shape[-1] > MAX_DENSE
    return (Snapshots if low_rank or long else FisherMoments).zero(x)


def _rescaled(sqrt: Any, gradient: Float[Array, "chains d"]) -> tuple[Metric, ...]:
    """Return the metric with the variances ``1/|g|``, in the shape of sqrt."""
    scale = inverse_gradient_sqrt(gradient)
    matrices = jnp.square(scale), 1 / scale, scale
    if isinstance(sqrt, LowRankSqrt):
        return _low_rank_matrices(scale)
    return jax.tree.map(jnp.diag, matrices) if sqrt.ndim == 2 else matrices


def _low_rank_matrices(scale: Array) -> tuple[Metric, ...]:
    k = 2 * min(MAX_RANK, len(scale) // 2)
    sqrt = LowRankSqrt.diagonal(scale, k)
    return sqrt.covariance(), sqrt.inverse(), sqrt


def with_matrices(state: AdaptationState, blocks: Any) -> AdaptationState:
    """Return the state with a metric, given as triples by block."""
    if isinstance(blocks, dict):
        blocks = tuple({k: v[j] for k, v in blocks.items()} for j in range(3))
    covariance, sqrt, sqrt_inv = blocks
    return state._replace(
        inverse_mass_matrix=covariance,
        mass_matrix_sqrt=sqrt,
        mass_matrix_sqrt_inv=sqrt_inv,
    )


def regularized_covariance(moments: WelfordState, _: Any = None) -> tuple[Array, ...]:
    """Return covariance, square root of its inverse, and inverse of that, regularized.

    As Stan and NumPyro do: shrunk towards 0.001 with the weight of five draws.
    """
    final = welford_covariance(diagonal=moments.scatter.ndim == 1)[2]
    return final(moments.total(), regularize=True)


def check_sites(z: Any, inverse_mass: Any, dense: bool | tuple | None) -> None:
    """Raise unless the metric's blocks are of the position's sites and sizes."""
    metrics = inverse_mass if isinstance(inverse_mass, dict) else {}
    blocks = [*(dense if isinstance(dense, tuple) else ()), *metrics]
    known = set(z) if isinstance(z, dict) else set()
    unknown = sorted({str(name) for block in blocks for name in block} - known)
    if unknown:
        raise ValueError(
            "`dense_mass` and `inverse_mass_matrix` must name latent sites, in tuples: "
            f"they form blocks of the metric. Got {unknown}, known are {sorted(known)}."
        )
    for block, metric in (metrics or {None: inverse_mass}).items():
        size = ravel_blocks(z, block).size
        if metric is not None and jnp.shape(metric)[-1] != size:
            raise ValueError(
                "`inverse_mass_matrix` must have one row per number of the position: "
                f"it is its covariance. Got {jnp.shape(metric)} for {size} numbers of "
                f"{block or 'all sites'}."
            )
