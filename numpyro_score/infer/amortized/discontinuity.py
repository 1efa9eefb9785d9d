r"""Jumps of a joint density in the latents, looked for along straight lines.

Where :math:`f(z) = \log p(z, y)` is smooth, its change over a short step h is that of
its gradient,

.. math:: f(z + h) - f(z) = \tfrac12 h \cdot (\nabla f(z) + \nabla f(z + h)) + O(|h|^3),

and what is left over vanishes as the step shrinks. At a jump it stays. So every line is
halved again and again, and the half is kept where more is left over. Lines start at
simulations, in random directions, with lengths from a thousandth of a standard
deviation of z to one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.infer.amortized.simulator import Simulations, Simulator
from numpyro_score.typing import PRNGKey, Scalar

NUM_LINES = 256
NUM_BISECTIONS = 14
MIN_LENGTH, MAX_LENGTH = 1e-3, 1.0  # standard deviations of z
MIN_JUMP = (
    0.5  # nats; rounding of single precision, .1 in long integrations, stays below
)
MIN_RELATIVE_DENSITY = 0.05  # density at the jump over that at the simulation


def has_discontinuities(simulator: Simulator, simulations: Simulations) -> bool:
    """Return whether the joint density jumps where simulations can feel it.

    The lines are the same at every call.

    Args:
        simulator: a model with a tractable joint density.
        simulations: where lines start.
    """
    key_start, key_line = jax.random.split(jax.random.key(0))
    rows = jax.random.randint(key_start, (NUM_LINES,), 0, len(simulations.z))
    return bool(
        _any_discontinuous(
            simulator,
            key_line,
            jnp.asarray(simulations.z)[rows],
            jnp.asarray(simulations.context)[rows],
            jnp.asarray(simulations.z.std(axis=0)),
        )
    )


@partial(jax.jit, static_argnums=0)
def _any_discontinuous(
    simulator: Simulator,
    key: PRNGKey,
    z: Float[Array, "lines size"],
    context: Float[Array, "lines ..."],
    sd: Float[Array, " size"],
) -> Bool[Array, ""]:
    lengths = jnp.geomspace(MIN_LENGTH, MAX_LENGTH, NUM_LINES)
    steps = jax.random.normal(key, z.shape)
    steps *= sd * (lengths / jnp.linalg.norm(steps, axis=1))[:, None]
    return jax.vmap(partial(is_discontinuous_along, simulator.log_joint))(
        z, steps, context
    ).any()


def is_discontinuous_along(
    log_density: Callable[..., Scalar],
    z: Float[Array, " size"],
    step: Float[Array, " size"],
    *args: Any,
) -> Bool[Array, ""]:
    """Return whether a log density jumps between z and z + step, as far as is found.

    Args:
        log_density: a function of z and ``args``, in nats.
        z: where the line starts, at finite density.
        step: the line.
        args: passed on.

    Example:
        >>> line = jnp.zeros(1), jnp.full(1, 0.3)
        >>> smooth = lambda z: -8.0 * (z**2).sum()
        >>> box = lambda z: jnp.where(z[0] < 0.1, 0.0, -jnp.inf)
        >>> [bool(is_discontinuous_along(f, *line)) for f in (smooth, box)]
        [False, True]
    """

    def evaluate(fraction: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        value, slope = jax.jvp(
            lambda fraction: log_density(z + fraction * step, *args),
            (fraction,),
            (jnp.ones_like(fraction),),
        )
        return fraction, value, slope

    def bisect(ends: tuple, _: None) -> tuple[tuple, None]:
        low, high = ends
        middle = evaluate((low[0] + high[0]) / 2)
        first = trapezoid_residual(low, middle) >= trapezoid_residual(middle, high)
        choose = partial(jnp.where, first)
        ends = jax.tree.map(choose, (low, middle), (middle, high))
        return ends, None

    start = evaluate(jnp.zeros(()))
    (low, high), _ = jax.lax.scan(
        bisect, (start, evaluate(jnp.ones(()))), None, NUM_BISECTIONS
    )
    density = jnp.exp(jnp.fmax(low[1], high[1]) - start[1])
    return (trapezoid_residual(low, high) > MIN_JUMP) & (density > MIN_RELATIVE_DENSITY)


def trapezoid_residual(low: tuple, high: tuple) -> Scalar:
    """Return the change of a value that its slopes do not explain; inf at an edge."""
    (s, f, g), (t, f_high, g_high) = low, high
    error = jnp.abs(f_high - f - (t - s) * (g + g_high) / 2)
    return jnp.where(jnp.isfinite(error), error, jnp.inf)
