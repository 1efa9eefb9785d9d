"""Warm-up: step size and metric in windows, for one chain or pooled over many.

The schedule of windows, the dual averaging and the regularized covariances are those
of NumPyro's HMC. Two things are added: the step size of unadjusted chains aims at an
energy-error variance, and vectorized chains may share one step size and one metric.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.infer.hmc_util import (
    HMCAdaptState,
    _initialize_mass_matrix,
    build_adaptation_schedule,
    dual_averaging,
    welford_covariance,
)

from numpyro_score.kernel.energy_scale import EnergyVarianceEstimate
from numpyro_score.kernel.whitening import Metric, WelfordState, ravel_blocks

init_averaging, update_averaging = dual_averaging()


@jax.tree_util.register_static
@dataclass(frozen=True)
class AdaptationSettings:
    """What warm-up adapts, and for how long; travels inside the state, without leaves.

    NumPyro tells a kernel the length of warm-up only at ``init``; keeping it in the
    state lets kernels stay free of mutable attributes. The step size aims either at
    ``target_accept_prob`` or, for unadjusted chains, at ``energy_variance``.
    """

    num_warmup: int
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    dense_mass: bool | tuple[tuple[str, ...], ...] = False
    target_accept_prob: float = 0.574
    energy_variance: float | None = None

    def init(self, z: Any, step_size: float, inverse_mass: Any) -> HMCAdaptState:
        """Return the state before warm-up, for one position z.

        Args:
            z: a position, for its structure.
            step_size: initial step size.
            inverse_mass: initial metric as NumPyro's HMC takes it; None for identity.

        Raises:
            ValueError: for a metric of other sites or another size than z.
        """
        dense = self.dense_mass
        check_sites(z, inverse_mass, dense)
        matrices = _initialize_mass_matrix(
            z,
            dict(inverse_mass) if isinstance(inverse_mass, dict) else inverse_mass,
            [*dense] if isinstance(dense, tuple) else dense,
        )
        matrices = jax.tree.map(lambda m: jnp.asarray(m, float), matrices)
        first_step = jnp.asarray(step_size, float)
        return HMCAdaptState(
            first_step,
            *matrices,
            ss_state=self.init_step_size_state(first_step),
            mm_state=jax.tree.map(WelfordState.zero, matrices[0]),
            window_idx=jnp.zeros((), int),
            rng_key=None,
        )

    def update(
        self, i: Array, energy_errors: Float[Array, " chains"], z: Any, state: Any
    ) -> HMCAdaptState:
        """Return the state after step i of warm-up.

        Args:
            i: the step, from 0.
            energy_errors: of the last proposal, one per chain that shares the state.
            z: positions with a leading axis of chains.
            state: the state before.
        """
        windows = jnp.asarray(build_adaptation_schedule(self.num_warmup))
        state = self._update_step_size(i, energy_errors, state)
        inside = (state.window_idx > 0) & (state.window_idx < len(windows) - 1)
        if self.adapt_mass_matrix:
            moments = jax.lax.cond(
                inside,
                lambda: update_welford(state.mm_state, z),
                lambda: state.mm_state,
            )
            state = state._replace(mm_state=moments)
        at_end = i == windows[state.window_idx, 1]
        state = jax.lax.cond(
            at_end & inside, lambda: self._close_window(state), lambda: state
        )
        return state._replace(window_idx=state.window_idx + at_end)

    @property
    def by_energy(self) -> bool:
        """Whether the step size aims at an energy-error variance."""
        return self.energy_variance is not None

    def init_step_size_state(self, step_size: Array) -> Any:
        """Return the averaging of step sizes, begun at a step size."""
        if self.by_energy:
            return EnergyVarianceEstimate.zero()
        return init_averaging(jnp.log(10) + jnp.log(step_size))

    def _update_step_size(
        self, i: Array, energy_errors: Array, state: HMCAdaptState
    ) -> HMCAdaptState:
        if not self.adapt_step_size:
            return state
        if self.energy_variance is not None:
            scale = state.ss_state.update(
                energy_errors, state.step_size, self.energy_variance
            )
            return state._replace(ss_state=scale, step_size=scale.step_size())
        errors = jnp.where(jnp.isnan(energy_errors), jnp.inf, energy_errors)
        accept_prob = jnp.exp(-jnp.maximum(errors, 0.0)).mean()
        averaging = update_averaging(
            self.target_accept_prob - accept_prob, state.ss_state
        )
        # warm-up ends with the average of the log step sizes of its last window
        log_step, log_step_mean = averaging[:2]
        log_step = jnp.where(i == self.num_warmup - 1, log_step_mean, log_step)
        limits = jnp.finfo(log_step.dtype)
        step_size = jnp.clip(jnp.exp(log_step), limits.tiny, limits.max)
        return state._replace(ss_state=averaging, step_size=step_size)

    def _close_window(self, state: HMCAdaptState) -> HMCAdaptState:
        """Take over the window's covariance; start the step size and moments anew."""
        if self.adapt_mass_matrix:
            covariance, sqrt, sqrt_inv = regularized_covariance(state.mm_state)
            state = state._replace(
                inverse_mass_matrix=covariance,
                mass_matrix_sqrt=sqrt,
                mass_matrix_sqrt_inv=sqrt_inv,
                mm_state=jax.tree.map(jnp.zeros_like, state.mm_state),
            )
        if self.adapt_step_size:
            step_state = self.init_step_size_state(state.step_size)
            state = state._replace(ss_state=step_state)
        return state


def update_welford(moments: Any, z: Any) -> Any:
    """Return the moments with the positions of all chains taken in."""
    if not jax.tree.leaves(z):
        return moments  # a model without latent sites
    if isinstance(moments, WelfordState):
        return moments.merge(jax.vmap(lambda z: ravel_blocks(z, None))(z))
    return {
        names: block.merge(jax.vmap(lambda z, names=names: ravel_blocks(z, names))(z))
        for names, block in moments.items()
    }


def for_chains(state: HMCAdaptState, num_chains: int) -> HMCAdaptState:
    """Return the state before warm-up, of several chains that share it."""
    moments = jax.tree.map(
        lambda block: block.for_chains(num_chains),
        state.mm_state,
        is_leaf=lambda block: isinstance(block, WelfordState),
    )
    return state._replace(mm_state=moments)


def regularized_covariance(moments: Any) -> tuple[Metric, ...]:
    """Return covariance, square root of its inverse, and inverse of that, regularized.

    As Stan and NumPyro do: shrunk towards 0.001 with the weight of five draws.
    """
    if isinstance(moments, WelfordState):
        final = welford_covariance(diagonal=moments.scatter.ndim == 1)[2]
        return final(moments.total(), regularize=True)
    blocks = {names: regularized_covariance(block) for names, block in moments.items()}
    return tuple({k: v[j] for k, v in blocks.items()} for j in range(3))


def check_sites(z: Any, inverse_mass: Any, dense: bool | tuple) -> None:
    """Raise unless the metric's blocks are of the position's sites and sizes."""
    metrics = inverse_mass if isinstance(inverse_mass, dict) else {}
    blocks = [*(() if isinstance(dense, bool) else dense), *metrics]
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
