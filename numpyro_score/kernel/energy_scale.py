"""The step size at which unadjusted chains keep a given energy-error variance."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MEMORY = 1 - 1 / 50  # forgets after some fifty steps


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
