r"""Langevin updates of kernels and of moves of SMC: pure, for one point or several.

Vectors may have a second axis, of chains, which numbers per point then have too.
Everything is in whitened coordinates, where the metric is the identity: momentum
p ~ N(0, I), position y. One convention for the step h (Leimkuhler and Matthews 2015):

- B, the kick: :math:`p \leftarrow p - \tfrac h2 \nabla U`;
- A, the drift: :math:`y \leftarrow y + h p` (or half of it);
- O, the refreshment: :math:`p \leftarrow \eta p + \sqrt{1 - \eta^2}\, n` with
  :math:`\eta = e^{-\gamma h}` for friction :math:`\gamma`, and 0 for full refreshment.

With full refreshment the overdamped step is
:math:`y + \tfrac{h^2}{2} s + h n` with the score :math:`s = -\nabla U`, that is
:math:`y + \epsilon s + \sqrt{2\epsilon}\, n` with :math:`\epsilon = h^2/2`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.typing import PRNGKey

Vector = Float[Array, "d *chains"]
PerChain = Float[Array, "*chains"] | float
Rate = Float[Array, ""] | PerChain  # common to all chains, or one for each


class PointState(NamedTuple):
    """A position and what was evaluated there.

    ``aux`` is opaque: whatever ``difference`` needs to compare two places.
    """

    position: Vector
    gradient: Vector
    aux: Any


class IntegratorState(NamedTuple):
    """A place with its momentum."""

    place: PointState
    momentum: Vector


class IntegratorTarget(NamedTuple):
    """The two functions of a target that the updates call.

    ``evaluate(position)`` returns a :class:`PointState`; ``difference(a, b)`` returns
    U(b) - U(a).
    """

    evaluate: Callable[[Vector], PointState]
    difference: Callable[[PointState, PointState], PerChain]


def persistence(step_size: PerChain, friction: Rate | None) -> PerChain:
    """Return eta = exp(-friction step_size), or 0 for full refreshment.

    Example:
        >>> float(persistence(1.0, None))
        0.0
    """
    step_size = jnp.asarray(step_size)
    if friction is None:
        return jnp.zeros_like(step_size)
    return jnp.exp(-friction * step_size)


def refresh(noise: Vector, momentum: Vector, eta: PerChain) -> Vector:
    """O: keep the share eta of the momentum, fill up with standard normal noise."""
    return eta * momentum + jnp.sqrt(1 - jnp.square(eta)) * noise


def kick(momentum: Vector, gradient: Vector, step_size: PerChain) -> Vector:
    """B: push downhill in potential for half a step."""
    return momentum - 0.5 * step_size * gradient


def kinetic_energy(momentum: Vector) -> PerChain:
    """Return half the squared norm of p."""
    return 0.5 * _dot(momentum, momentum)


def _dot(a: Vector, b: Vector) -> PerChain:
    return jnp.sum(a * b, axis=0)


def leapfrog(
    phase: IntegratorState, step_size: PerChain, target: IntegratorTarget
) -> tuple[IntegratorState, PerChain]:
    """BAB: kick, drift, kick; return the new phase and its energy error."""
    place, momentum = phase
    halfway = kick(momentum, place.gradient, step_size)
    place_next = target.evaluate(place.position + step_size * halfway)
    momentum_next = kick(halfway, place_next.gradient, step_size)
    error = target.difference(place, place_next)
    error += kinetic_energy(momentum_next) - kinetic_energy(momentum)
    return IntegratorState(place_next, momentum_next), error


def metropolis_adjusted(
    key: PRNGKey,
    noise: Vector,
    place: PointState,
    step_size: PerChain,
    target: IntegratorTarget,
) -> tuple[PointState, Array, Array]:
    """Return the end of an adjusted step, whether to accept it, and the probability.

    The leapfrog from a new momentum, the noise (Roberts and Tweedie 1996). An energy
    error of NaN is refused.
    """
    end, error = leapfrog(IntegratorState(place, noise), step_size, target)
    error = jnp.nan_to_num(error, nan=jnp.inf)
    accept_prob = jnp.exp(-jnp.maximum(error, 0.0))
    accept = jax.random.uniform(key, accept_prob.shape) < accept_prob
    return end.place, accept, accept_prob


def _displacement_energy_error(
    start: PointState, end: PointState, step_size: PerChain, target: IntegratorTarget
) -> PerChain:
    r"""Return the energy error of the leapfrog that leads from start to end.

    With the displacement d and gradients g, g' it is

    .. math:: U' - U - \tfrac12 (g + g')^\top d + \tfrac{h^2}{8} (|g'|^2 - |g|^2) .
    """
    displacement = end.position - start.position
    work = 0.5 * _dot(start.gradient + end.gradient, displacement)
    squares = _dot(end.gradient, end.gradient)
    squares -= _dot(start.gradient, start.gradient)
    return target.difference(start, end) - work + 0.125 * step_size**2 * squares


def obab(
    noise: Vector,
    phase: IntegratorState,
    step_size: PerChain,
    friction: Rate | None,
    target: IntegratorTarget,
) -> tuple[IntegratorState, PerChain]:
    """OBABO with its two half refreshments between leapfrogs merged into one.

    The energy error is that of the leapfrog alone: O keeps the target and does no work.
    """
    momentum = refresh(noise, phase.momentum, persistence(step_size, friction))
    return leapfrog(phase._replace(momentum=momentum), step_size, target)


def baoab(
    noise: Vector,
    phase: IntegratorState,
    step_size: PerChain,
    friction: Rate | None,
    target: IntegratorTarget,
) -> tuple[IntegratorState, PerChain]:
    """BAOAB: kick, half drift, refreshment, half drift, kick (one new gradient).

    With full refreshment the positions follow Leimkuhler and Matthews 2013: noise
    averaged over two steps, no bias in a Gaussian. The energy error is the one that a
    leapfrog over the same displacement makes, of third order in h.
    """
    place, momentum = phase
    before = kick(momentum, place.gradient, step_size)
    middle = place.position + 0.5 * step_size * before
    after = refresh(noise, before, persistence(step_size, friction))
    place_next = target.evaluate(middle + 0.5 * step_size * after)
    momentum_next = kick(after, place_next.gradient, step_size)
    error = _displacement_energy_error(place, place_next, step_size, target)
    return IntegratorState(place_next, momentum_next), error
