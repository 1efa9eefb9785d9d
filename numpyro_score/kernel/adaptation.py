"""Warm-up: step size by dual averaging, metric in windows, as NumPyro does it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.infer.hmc_util import HMCAdaptState, warmup_adapter

from numpyro_score.typing import Scalar

Vector = Float[Array, " d"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class WarmupPlan:
    """What warm-up adapts, and for how long; travels inside the state, without leaves.

    NumPyro tells a kernel the length of warm-up only at ``init``; keeping it in the
    state lets kernels stay free of mutable attributes. The step size aims either at
    ``target_accept_prob`` or, for unadjusted chains, at ``energy_variance``.
    """

    num_warmup: int
    adapt_step_size: bool
    adapt_mass_matrix: bool
    dense_mass: bool
    target_accept_prob: float = 0.574
    energy_variance: float | None = None

    def init(
        self, z: Any, step_size: float, inverse_mass_matrix: Array | None
    ) -> HMCAdaptState:
        """Return the state before warm-up."""
        state = self._adapter()[0](
            (z,), jax.random.key(0), step_size, inverse_mass_matrix
        )
        # the key serves only NumPyro's step-size heuristic, which is not used here
        state = state._replace(step_size=jnp.asarray(step_size, float), rng_key=None)
        if self._by_energy:
            state = state._replace(ss_state=EnergyScale(jnp.zeros(()), jnp.zeros(())))
        return state

    def update(
        self, i: Array, energy_error: Scalar, z: Any, state: HMCAdaptState
    ) -> HMCAdaptState:
        """Return the state after step i of warm-up."""
        accept_prob = jnp.exp(
            -jnp.maximum(jnp.nan_to_num(energy_error, nan=jnp.inf), 0)
        )
        state = self._adapter()[1](i, accept_prob, (z,), state)
        if not self._by_energy:
            return state
        assert self.energy_variance is not None
        scale = state.ss_state.update(
            energy_error, state.step_size, self.energy_variance
        )
        return state._replace(ss_state=scale, step_size=scale.step_size())

    @property
    def _by_energy(self) -> bool:
        return self.adapt_step_size and self.energy_variance is not None

    def _adapter(self) -> tuple:
        return warmup_adapter(
            self.num_warmup,
            adapt_step_size=self.adapt_step_size and not self._by_energy,
            adapt_mass_matrix=self.adapt_mass_matrix,
            dense_mass=self.dense_mass,
            target_accept_prob=self.target_accept_prob,
        )


class EnergyScale(NamedTuple):
    r"""Running estimate of the energy-error variance at step 1, in units of its goal.

    The variance of one step's energy error grows as :math:`h^6`; the estimate is a
    weighted mean of :math:`\Delta^2 / (v h^6)`, which forgets after some 50 steps and
    discounts errors far from the goal v (Robnik et al. 2024, section on tuning).
    """

    total: Array
    weight: Array

    def update(
        self, energy_error: Scalar, step_size: Scalar, variance: float
    ) -> "EnergyScale":
        """Return the estimate after one more energy error."""
        ratio = jnp.square(energy_error) / variance
        ratio = jnp.clip(jnp.nan_to_num(ratio, nan=1e6, posinf=1e6), 1e-6, 1e6)
        # a step off by a factor e^1.5 counts exp(-1/2): the power law fails there
        weight = jnp.exp(-0.5 * jnp.square(jnp.log(ratio) / (6 * 1.5)))
        memory = 1 - 1 / 50
        return EnergyScale(
            memory * self.total + weight * ratio / step_size**6,
            memory * self.weight + weight,
        )

    def step_size(self) -> Array:
        """Return the step at which the variance meets its goal."""
        return (self.total / self.weight) ** (-1 / 6)


def whiten(sqrt: Array, gradient: Vector) -> Vector:
    """Return S g, the gradient in coordinates whose covariance is the identity.

    The metric's covariance is S^T S; S is NumPyro's ``mass_matrix_sqrt_inv``.
    """
    return sqrt @ gradient if sqrt.ndim == 2 else sqrt * gradient


def unwhiten(sqrt: Array, y: Vector) -> Vector:
    """Return S^T y, a displacement in the model's unconstrained coordinates."""
    return sqrt.T @ y if sqrt.ndim == 2 else sqrt * y
