r"""Leapfrogs whose step is halved until they keep the energy, reversibly.

Where the curvature of a posterior changes over orders of magnitude, no step size fits
all of it. A step of length h is here :math:`2^j` leapfrogs of :math:`h / 2^j`, with the
smallest j at which the energy varies by no more than δ along them (WALNUTS,
Bou-Rabee et al. 2025, arXiv 2506.18746, section 3). From its end, with the momentum
turned round, the same number must be the smallest: where a coarser step would do on the
way back, the trajectory is rejected, or the chain would not keep its target. Each step
preserves volume, so that a trajectory is accepted by its energy error as without.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.langevin import (
    IntegratorState,
    IntegratorTarget,
    PerChain,
    kinetic_energy,
    leapfrog,
)

# nats of energy along one step: e^-.5 = .6 is accepted of it at least
MAX_VARIATION = 0.5


class HalvingRecord(NamedTuple):
    """Outcome of the halved steps of a trajectory; arrays are numbers per chain.

    - **max_halvings**: the largest number of halvings of a step.
    - **irreversible**: whether the trajectory is rejected because the way back would
      have taken coarser steps.
    - **insufficient**: whether it is because the finest steps were too coarse.
    - **num_gradients**: evaluations, with those of attempts and of the way back.
    """

    max_halvings: Array
    irreversible: Array
    insufficient: Array
    num_gradients: Array

    @classmethod
    def zero(cls, shape: tuple[int, ...] = ()) -> "HalvingRecord":
        """Return the record of no steps."""
        none, no = jnp.zeros(shape, int), jnp.zeros(shape, bool)
        return cls(none, no, no, none)

    @property
    def failed(self) -> Array:
        """True if the trajectory is rejected as a whole."""
        return self.irreversible | self.insufficient

    def then(self, later: "HalvingRecord") -> "HalvingRecord":
        """Return the record of these steps and later ones."""
        return HalvingRecord(
            jnp.maximum(self.max_halvings, later.max_halvings),
            self.irreversible | later.irreversible,
            self.insufficient | later.insufficient,
            self.num_gradients + later.num_gradients,
        )


class _Path(NamedTuple):
    """Leapfrogs up to now: where they ended, and the energy relative to the start."""

    phase: IntegratorState
    energy: PerChain
    lowest: PerChain
    highest: PerChain

    @classmethod
    def at(cls, phase: IntegratorState) -> "_Path":
        zero = jnp.zeros_like(kinetic_energy(phase.momentum))
        return cls(phase, zero, zero, zero)

    @property
    def keeps_energy(self) -> Array:
        # false for NaN
        return jnp.less_equal(self.highest - self.lowest, MAX_VARIATION)

    def extend(self, step_size: PerChain, target: IntegratorTarget) -> "_Path":
        phase, error = leapfrog(self.phase, step_size, target)
        energy = self.energy + error
        return _Path(
            phase,
            energy,
            jnp.minimum(self.lowest, energy),
            jnp.maximum(self.highest, energy),
        )


class _Search(NamedTuple):
    """The search for the smallest number of halvings, chain by chain."""

    path: _Path
    halvings: Array
    found: Array
    num_gradients: Array

    @classmethod
    def begin(cls, phase: IntegratorState) -> "_Search":
        path = _Path.at(phase)
        none = jnp.zeros(jnp.shape(path.energy), int)
        return cls(path, none, jnp.zeros(none.shape, bool), none)


def halved_step(
    phase: IntegratorState,
    step_size: PerChain,
    target: IntegratorTarget,
    max_halvings: int,
    active: Array,
) -> tuple[IntegratorState, PerChain, HalvingRecord]:
    """Return the phase after a step in as few parts as keep the energy, and its error.

    The error is infinite for a step that is not to be taken. All chains pay for the one
    that needs most.

    Args:
        phase: of one chain, or with chains in the last axis.
        step_size: of the whole step.
        target: of the leapfrogs.
        max_halvings: the largest number of halvings.
        active: chains that move; the others stay where they are.
    """
    forth = _fewest_halvings(phase, step_size, target, max_halvings, active)
    end, moved = forth.path.phase, active & forth.found
    back = _coarser_way_back(end, step_size, target, forth.halvings, moved)
    record = HalvingRecord(
        jnp.where(active, forth.halvings, 0),
        irreversible=back.found,
        insufficient=active & ~forth.found,
        num_gradients=forth.num_gradients + back.num_gradients,
    )
    return end, jnp.where(record.failed, jnp.inf, forth.path.energy), record


def _coarser_way_back(
    end: IntegratorState,
    step_size: PerChain,
    target: IntegratorTarget,
    halvings: Array,
    active: Array,
) -> _Search:
    """Search for fewer halvings that keep the energy from the end, turned round."""
    turned = end._replace(momentum=-end.momentum)
    return _fewest_halvings(turned, step_size, target, halvings - 1, active)


def _fewest_halvings(
    phase: IntegratorState,
    step_size: PerChain,
    target: IntegratorTarget,
    most: Any,
    active: Array,
) -> _Search:
    """Try 0, 1, ... ``most`` halvings until the energy is kept, in every active chain.

    Where none keeps it, the chain stays where it is.
    """
    first = _Search.begin(phase)

    def searching(level: Array, search: _Search) -> Array:
        return active & ~search.found & (level <= most)

    def proceed(carry: tuple[Array, _Search]) -> Array:
        return searching(*carry).any()

    def attempt(carry: tuple[Array, _Search]) -> tuple[Array, _Search]:
        level, search = carry
        tried = searching(level, search)
        path, count = _take_parts(first.path, step_size, target, 2**level, tried)
        fits = tried & path.keeps_energy
        chosen = jax.tree.map(lambda a, b: jnp.where(fits, a, b), path, search.path)
        return level + 1, _Search(
            chosen,
            jnp.where(tried, level, search.halvings),
            search.found | fits,
            search.num_gradients + count,
        )

    return jax.lax.while_loop(proceed, attempt, (jnp.zeros((), int), first))[1]


def _take_parts(
    start: _Path,
    step_size: PerChain,
    target: IntegratorTarget,
    num_parts: Array,
    tried: Array,
) -> tuple[_Path, Array]:
    """Return the path of so many equal leapfrogs, and its evaluations.

    It ends early where no chain that is tried has kept its energy.
    """

    def proceed(carry: tuple[Array, _Path, Array]) -> Array:
        k, path, _ = carry
        return (k < num_parts) & (tried & path.keeps_energy).any()

    def extend(carry: tuple[Array, _Path, Array]) -> tuple[Array, _Path, Array]:
        k, path, count = carry
        count = count + (tried & path.keeps_energy)
        return k + 1, path.extend(step_size / num_parts, target), count

    zero = jnp.zeros((), int)
    carry = zero, start, jnp.zeros(tried.shape, int)
    return jax.lax.while_loop(proceed, extend, carry)[1:]
