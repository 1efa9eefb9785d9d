r"""Langevin updates, shared by kernels and correctors: pure, for one point.

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

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.typing import PRNGKey, Scalar

Vector = Float[Array, " d"]


class Place(NamedTuple):
    """A position and what was evaluated there.

    ``detail`` is opaque: whatever ``change`` needs to compare two places.
    """

    position: Vector
    gradient: Vector
    detail: Any


class Phase(NamedTuple):
    """A place with its momentum."""

    place: Place
    momentum: Vector


class Target(NamedTuple):
    """What the updates need of a target: ``visit`` evaluates, ``change`` compares.

    ``visit(position)`` returns a :class:`Place`; ``change(a, b)`` returns
    U(b) - U(a).
    """

    visit: Callable[[Vector], Place]
    change: Callable[[Place, Place], Scalar]


def persistence(step_size: Scalar, friction: float | None) -> Scalar:
    """Return eta = exp(-friction step_size), or 0 for full refreshment.

    Example:
        >>> float(persistence(1.0, None))
        0.0
    """
    if friction is None:
        return jnp.zeros(())
    return jnp.exp(-friction * jnp.asarray(step_size))


def standard_normal(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
    r"""Return independent N(0, 1) noise by the transform of Box and Muller (1958).

    :math:`\sqrt{-2 \ln u_1}\, (\cos 2\pi u_2, \sin 2\pi u_2)` is a pair of them. The
    inverse error function of ``jax.random.normal`` costs a Langevin step of a small
    model more than all else, and one call for all steps less than one call for each.

    Args:
        key: consumed.
        shape: of the noise.
        dtype: of the noise, a floating one.

    Example:
        >>> noise = standard_normal(jax.random.key(0), (3, 1001), float)
        >>> noise.shape, bool(abs(noise.std() - 1) < 0.05)
        ((3, 1001), True)
    """
    size = math.prod(shape)
    radius, angle = jax.random.uniform(key, (2, (size + 1) // 2), dtype)
    radius = jnp.sqrt(-2 * jnp.log1p(-radius))
    angle = 2 * jnp.pi * angle
    pairs = radius * jnp.cos(angle), radius * jnp.sin(angle)
    return jnp.concatenate(pairs)[:size].reshape(shape)


def refresh(noise: Vector, momentum: Vector, eta: Scalar) -> Vector:
    """O: keep the share eta of the momentum, fill up with standard normal noise."""
    return eta * momentum + jnp.sqrt(1 - jnp.square(eta)) * noise


def kick(momentum: Vector, gradient: Vector, step_size: Scalar) -> Vector:
    """B: push downhill in potential for half a step."""
    return momentum - 0.5 * step_size * gradient


def kinetic_energy(momentum: Vector) -> Scalar:
    """Return half the squared norm of p."""
    return 0.5 * jnp.vdot(momentum, momentum)


def leapfrog(phase: Phase, step_size: Scalar, target: Target) -> tuple[Phase, Scalar]:
    """BAB: kick, drift, kick; return the new phase and its energy error."""
    place, momentum = phase
    halfway = kick(momentum, place.gradient, step_size)
    place_next = target.visit(place.position + step_size * halfway)
    momentum_next = kick(halfway, place_next.gradient, step_size)
    error = target.change(place, place_next)
    error += kinetic_energy(momentum_next) - kinetic_energy(momentum)
    return Phase(place_next, momentum_next), error


def displacement_error(
    start: Place, end: Place, step_size: Scalar, target: Target
) -> Scalar:
    r"""Return the energy error of the leapfrog that leads from start to end.

    With the displacement d and gradients g, g' it is

    .. math:: U' - U - \tfrac12 (g + g')^\top d + \tfrac{h^2}{8} (|g'|^2 - |g|^2) .
    """
    displacement = end.position - start.position
    work = 0.5 * jnp.vdot(start.gradient + end.gradient, displacement)
    squares = jnp.vdot(end.gradient, end.gradient)
    squares -= jnp.vdot(start.gradient, start.gradient)
    return target.change(start, end) - work + 0.125 * step_size**2 * squares


def obab(
    noise: Vector,
    phase: Phase,
    step_size: Scalar,
    friction: float | None,
    target: Target,
) -> tuple[Phase, Scalar]:
    """OBABO with its two half refreshments between leapfrogs merged into one.

    The energy error is that of the leapfrog alone: O keeps the target and does no work.
    """
    momentum = refresh(noise, phase.momentum, persistence(step_size, friction))
    return leapfrog(phase._replace(momentum=momentum), step_size, target)


def baoab(
    noise: Vector,
    phase: Phase,
    step_size: Scalar,
    friction: float | None,
    target: Target,
) -> tuple[Phase, Scalar]:
    """BAOAB: kick, half drift, refreshment, half drift, kick (one new gradient).

    With full refreshment the positions follow Leimkuhler and Matthews 2013: noise
    averaged over two steps, no bias in a Gaussian. The energy error is the one that a
    leapfrog over the same displacement makes, of third order in h.
    """
    place, momentum = phase
    before = kick(momentum, place.gradient, step_size)
    middle = place.position + 0.5 * step_size * before
    after = refresh(noise, before, persistence(step_size, friction))
    place_next = target.visit(middle + 0.5 * step_size * after)
    momentum_next = kick(after, place_next.gradient, step_size)
    error = displacement_error(place, place_next, step_size, target)
    return Phase(place_next, momentum_next), error
