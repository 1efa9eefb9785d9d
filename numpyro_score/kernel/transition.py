"""One Langevin transition of one chain: propose, then accept or reject."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
)
from numpyro_score.potential import Potential
from numpyro_score.typing import PRNGKey, Scalar

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
    rng_key, key, key_rest, key_accept = jax.random.split(state.rng_key, 4)
    step_size = state.adapt_state.step_size
    metric_sqrt = state.adapt_state.mass_matrix_sqrt_inv
    limit = MAX_QUADRATURE_ERROR if dynamics.adjusted else jnp.inf
    target = _whitened_target(potential, state.z, metric_sqrt, limit)
    gradient = whiten(metric_sqrt, state.z_grad)
    place = Place(jnp.zeros_like(gradient), gradient, (state.z, state.evaluation))
    start = Phase(place, state.momentum)
    trajectory = _adjusted if dynamics.adjusted else _unadjusted
    keys = key, key_rest
    start, end, error = trajectory(keys, start, step_size, target, dynamics)

    diverging = ~jnp.less(error, MAX_ENERGY_ERROR)  # true for NaN
    accept_prob = jnp.where(diverging, 0.0, jnp.exp(-jnp.maximum(error, 0.0)))
    accept = ~diverging
    if dynamics.adjusted:
        accept &= jax.random.uniform(key_accept) < accept_prob
    # a rejected momentum is flipped, which keeps persistent momentum reversible
    start = start._replace(momentum=-start.momentum)
    chosen = jax.tree.map(lambda a, b: jnp.where(accept, a, b), end, start)
    return state.move(*chosen.place.detail)._replace(
        momentum=chosen.momentum,
        num_steps=jnp.asarray(dynamics.num_steps),
        energy_error=jnp.asarray(error),
        accept_prob=accept_prob,
        diverging=diverging,
        rng_key=rng_key,
    )


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
        # a symmetric refusal: the way back is refused too
        return jnp.where(doubt <= max_doubt, change, jnp.inf)

    return Target(visit, change)


def _adjusted(
    keys: tuple, start: Phase, step_size: Scalar, target: Target, dynamics: Dynamics
) -> tuple[Phase, Phase, Scalar]:
    """Return start (with its refreshed momentum), end and energy error of OBABO."""
    key_first, key_rest = keys
    friction = dynamics.friction
    # trajectories of several steps start afresh; a lone step keeps its persistence
    eta = persistence(step_size, friction if dynamics.num_steps == 1 else None)
    start = start._replace(momentum=refresh(key_first, start.momentum, eta))
    end, error = leapfrog(start, step_size, target)

    def body(carry: tuple[Phase, Scalar], key: PRNGKey) -> tuple[Any, None]:
        phase, total = carry
        phase, error = obab(key, phase, step_size, friction, target)
        return (phase, total + error), None

    if dynamics.num_steps > 1:
        rest = jax.random.split(key_rest, dynamics.num_steps - 1)
        (end, error), _ = jax.lax.scan(body, (end, error), rest)
    return start, end, error


def _unadjusted(
    keys: tuple, start: Phase, step_size: Scalar, target: Target, dynamics: Dynamics
) -> tuple[Phase, Phase, Scalar]:
    """Return start, end and energy error of BAOAB; the momentum persists."""

    def body(carry: tuple[Phase, Scalar], key: PRNGKey) -> tuple[Any, None]:
        phase, total = carry
        phase, error = baoab(key, phase, step_size, dynamics.friction, target)
        return (phase, total + error), None

    (end, error), _ = body((start, jnp.zeros(())), keys[0])
    if dynamics.num_steps > 1:
        rest = jax.random.split(keys[1], dynamics.num_steps - 1)
        (end, error), _ = jax.lax.scan(body, (end, error), rest)
    return start, end, error
