"""One Langevin transition of one chain: propose, then accept or reject."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.kernel.metric import Metric, displace, whiten
from numpyro_score.kernel.state import ScoreLangevinState
from numpyro_score.langevin import (
    Phase,
    Place,
    Target,
    baoab,
    leapfrog,
    obab,
    persistence,
    refresh,
    standard_normal,
)
from numpyro_score.potential import Potential
from numpyro_score.typing import Scalar

Noise = Float[Array, "steps d"]

MAX_ENERGY_ERROR = 1000.0  # as in the HMC of NumPyro and Stan
MAX_QUADRATURE_ERROR = 1.0  # nats by which the change of a learned law may be unknown


class Dynamics(NamedTuple):
    """Which member of the family: see the table in ``ScoreLangevin``."""

    num_steps: int
    friction: float | None
    adjusted: bool


def transition(
    state: ScoreLangevinState, potential: Potential, dynamics: Dynamics
) -> ScoreLangevinState:
    """Return the state of one chain after one transition, before adaptation."""
    rng_key, key_noise, key_accept = jax.random.split(state.rng_key, 3)
    step_size = state.adapt_state.step_size
    metric_sqrt = state.adapt_state.mass_matrix_sqrt_inv
    limit = MAX_QUADRATURE_ERROR if dynamics.adjusted else jnp.inf
    target = _whitened_target(potential, state.z, metric_sqrt, limit)
    gradient = whiten(metric_sqrt, state.z_grad)
    place = Place(jnp.zeros_like(gradient), gradient, (state.z, state.evaluation))
    start = Phase(place, state.momentum)
    trajectory = _adjusted if dynamics.adjusted else _unadjusted
    shape = dynamics.num_steps, *gradient.shape
    noise = standard_normal(key_noise, shape, gradient.dtype)
    start, end, error = trajectory(noise, start, step_size, target, dynamics)

    diverging = ~jnp.less(error, MAX_ENERGY_ERROR)  # true for NaN
    accept_prob = jnp.where(diverging, 0.0, jnp.exp(-jnp.maximum(error, 0.0)))
    accept = ~diverging
    if dynamics.adjusted:
        accept &= jax.random.uniform(key_accept) < accept_prob
    start = start._replace(momentum=flip(start.momentum))
    chosen = jax.tree.map(lambda a, b: jnp.where(accept, a, b), end, start)
    return state.move(*chosen.place.detail)._replace(
        momentum=chosen.momentum,
        num_steps=jnp.asarray(dynamics.num_steps),
        energy_error=jnp.asarray(error),
        accept_prob=accept_prob,
        diverging=diverging,
        rng_key=rng_key,
    )


def flip(momentum: Array) -> Array:
    """Turn a rejected momentum round, which keeps persistent momentum reversible."""
    return -momentum


def _whitened_target(
    potential: Potential, z: Any, metric_sqrt: Metric, max_doubt: float
) -> Target:
    """Return the target in whitened displacements from z."""

    def visit(y: Array) -> Place:
        moved = displace(metric_sqrt, z, y)
        evaluation = potential.evaluate(moved)
        return Place(y, whiten(metric_sqrt, evaluation.grad), (moved, evaluation))

    def change(start: Place, end: Place) -> Scalar:
        (_, before), (_, after) = start.detail, end.detail
        learned, doubt = potential.learned_work(before.learned, after.learned)
        change = after.value - before.value + learned
        # a flat potential lets positions overflow at a finite value
        good = jnp.isfinite(ravel_pytree(end.detail[0])[0]).all()
        # a symmetric refusal: the way back is refused too
        good &= doubt <= max_doubt
        return jnp.where(good, change, jnp.inf)

    return Target(visit, change)


def _adjusted(
    noise: Noise, start: Phase, step_size: Scalar, target: Target, dynamics: Dynamics
) -> tuple[Phase, Phase, Scalar]:
    """Return start (with its refreshed momentum), end and energy error of OBABO."""
    friction = dynamics.friction
    # trajectories of several steps start afresh; a lone step keeps its persistence
    eta = persistence(step_size, friction if dynamics.num_steps == 1 else None)
    start = start._replace(momentum=refresh(noise[0], start.momentum, eta))
    end, error = leapfrog(start, step_size, target)

    def step(noise: Array, phase: Phase) -> tuple[Phase, Scalar]:
        return obab(noise, phase, step_size, friction, target)

    return start, *_repeat(step, noise[1:], end, error)


def _unadjusted(
    noise: Noise, start: Phase, step_size: Scalar, target: Target, dynamics: Dynamics
) -> tuple[Phase, Phase, Scalar]:
    """Return start, end and energy error of BAOAB; the momentum persists."""

    def step(noise: Array, phase: Phase) -> tuple[Phase, Scalar]:
        return baoab(noise, phase, step_size, dynamics.friction, target)

    end, error = step(noise[0], start)
    return start, *_repeat(step, noise[1:], end, error)


def _repeat(
    step: Callable, noise: Noise, phase: Phase, error: Scalar
) -> tuple[Phase, Scalar]:
    """Take one step per row of noise and add up the energy errors."""

    def body(carry: tuple[Phase, Scalar], noise: Array) -> tuple[Any, None]:
        phase, total = carry
        phase, error = step(noise, phase)
        return (phase, total + error), None

    if not len(noise):
        return phase, error
    (phase, error), _ = jax.lax.scan(body, (phase, error), noise)
    return phase, error
