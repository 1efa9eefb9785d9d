"""Moves that split draws with a shared ancestor: Metropolis-adjusted Langevin.

Each draw moves by itself; all share one step size, which follows their mean acceptance.
The change of a learned law is the line integral of its score, and a move across which
the integral is not known is refused (see :mod:`numpyro_score.model.potential`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.langevin import IntegratorTarget, PointState, metropolis_adjusted
from numpyro_score.model.potential import MAX_QUADRATURE_ERROR, potential_difference
from numpyro_score.typing import PRNGKey, SiteValues

TARGET_ACCEPT = 0.574  # of Langevin moves (Roberts and Rosenthal 1998)
# acceptance falls by 1.15 per unit of log step at .574: a move turns an error into
# 1 - 1.5 * 1.15 = -.72 of it; the first move from all accepted doubles the step (e^.64)
LOG_STEP_GAIN = 1.5


class Rejuvenated(NamedTuple):
    """Draws after their moves, and the mean acceptance of the last half of them."""

    z: SiteValues
    accept_prob: Float[Array, ""]


def rejuvenate(
    key: PRNGKey, twist: Twist, z: SiteValues, num_moves: int
) -> Rejuvenated:
    """Move draws of the posterior, which stay draws of the posterior.

    Args:
        key: random key.
        twist: of the model, for its potential.
        z: unconstrained latents of all draws.
        num_moves: moves of each draw.
    """
    if num_moves == 0:
        return Rejuvenated(z, jnp.ones(()))
    scales = _scales(twist, z)
    size = len(next(iter(z.values())))

    def body(carry: tuple[SiteValues, Array], key: PRNGKey) -> tuple[tuple, Array]:
        z, log_step = carry
        step = jnp.exp(log_step)
        keys = jax.random.split(key, size)
        z, accept_prob = jax.vmap(lambda k, z: _move(k, z, scales, step, twist))(
            keys, z
        )
        mean = accept_prob.mean()
        return (z, log_step + LOG_STEP_GAIN * (mean - TARGET_ACCEPT)), mean

    keys = jax.random.split(key, num_moves)
    (z, _), accept_prob = jax.lax.scan(body, (z, jnp.zeros(())), keys)
    return Rejuvenated(z, accept_prob[num_moves // 2 :].mean())


def _scales(twist: Twist, z: SiteValues) -> SiteValues:
    """Return a scale for each number: the data's at learned sites, else the draws'."""
    scales = {}
    for name, value in z.items():
        if name in twist.learned:
            scale = twist.learned[name].score.standardize.scale
        else:
            sd = jnp.std(value, 0)
            scale = jnp.where(sd > 0, sd, 1e-6)  # where all draws agree
        scales[name] = jnp.broadcast_to(scale, value.shape[1:])
    return scales


def _move(
    key: PRNGKey, z: SiteValues, scales: SiteValues, step: Array, twist: Twist
) -> tuple[SiteValues, Array]:
    """Return one draw after one move, and its acceptance probability."""
    key_momentum, key_accept = jax.random.split(key)
    scale, unravel = ravel_pytree(scales)
    origin = ravel_pytree(z)[0]

    def visit(y: Array) -> PointState:
        evaluation = twist.potential.evaluate(unravel(origin + scale * y))
        return PointState(y, scale * ravel_pytree(evaluation.grad)[0], evaluation)

    def change(start: PointState, end: PointState) -> Array:
        return potential_difference(
            twist.potential, start.aux, end.aux, MAX_QUADRATURE_ERROR
        )

    noise = jax.random.normal(key_momentum, origin.shape, origin.dtype)
    start, target = visit(jnp.zeros_like(origin)), IntegratorTarget(visit, change)
    end, accept, prob = metropolis_adjusted(key_accept, noise, start, step, target)
    moved = origin + scale * end.position
    return unravel(jnp.where(accept, moved, origin)), prob
