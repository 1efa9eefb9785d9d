r"""Detection of discontinuities of a joint density along random line segments.

For smooth :math:`f(z) = \log p(z, y)` the residual of the trapezoidal rule,

.. math:: f(z + h) - f(z) - \tfrac12 h \cdot (\nabla f(z) + \nabla f(z + h))
          = O(|h|^3),

tends to 0 with h. Across a jump it tends to the height of the jump. Every segment is
bisected repeatedly, and the half with the larger residual is kept. Segments start at
simulations and have random directions and lengths from 0.001 to 1 standard deviation
of z.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.infer.amortized.simulator import Simulations, Simulator, finite_rows
from numpyro_score.typing import PRNGKey, Scalar

# a jump that a segment crosses with probability 2 % is missed with 0.98^256 = 0.6 %
NUM_LINES = 256
# 1 sd becomes 6e-5 sd, where the residual h^3 f'''/12 is below float32 rounding
NUM_BISECTIONS = 14
# sd of z: the width of the posterior at most; short for ridges of .001 sd
MIN_LENGTH, MAX_LENGTH = 1e-3, 1.0
# nats; rounding errors of float32, up to 0.1 in long integrations, are below
# (test_smooth_tasks_have_no_jumps)
MIN_JUMP = 0.5
# density at the jump over that at the simulation; the bias of the score's integration
# by parts is proportional to it
MIN_RELATIVE_DENSITY = 0.05


def has_discontinuities(simulator: Simulator, simulations: Simulations) -> bool:
    """Return whether a discontinuity of the joint density is found.

    Args:
        simulator: a model with a tractable joint density.
        simulations: initial points of the segments.
    """
    # fixed: the choice of the loss must not vary between fits of one model
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


@lru_cache(maxsize=32)
def is_discontinuous(simulator: Simulator) -> bool:
    """Return whether a discontinuity is found near simulations that are drawn for it.

    Args:
        simulator: a model with a tractable joint density.
    """
    with warnings.catch_warnings():  # of simulations that fail, as before in `fit`
        warnings.simplefilter("ignore")
        simulations = simulator.simulate(jax.random.key(0), NUM_LINES)
    return len(simulations.z) > 0 and has_discontinuities(simulator, simulations)


def is_discontinuous_near(
    simulator: Simulator,
    z: Float[np.ndarray, "rows size"],
    contexts: Float[np.ndarray, "rows ..."],
) -> bool:
    """Return whether a discontinuity is found near the finite ones of some points.

    Args:
        simulator: a model with a tractable joint density.
        z: latents in unconstrained space.
        contexts: observations, one per row.
    """
    good = finite_rows(z, contexts)
    return has_discontinuities(simulator, Simulations(z[good], contexts[good]))


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
    """Return whether bisection finds a jump of a log density from z to z + step.

    Args:
        log_density: a function of z and ``args``, in nats.
        z: first end of the segment, of finite density.
        step: the segment.
        args: further arguments of ``log_density``.

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
        first = _trapezoid_residual(low, middle) >= _trapezoid_residual(middle, high)
        choose = partial(jnp.where, first)
        ends = jax.tree.map(choose, (low, middle), (middle, high))
        return ends, None

    start = evaluate(jnp.zeros(()))
    (low, high), _ = jax.lax.scan(
        bisect, (start, evaluate(jnp.ones(()))), None, NUM_BISECTIONS
    )
    density = jnp.exp(jnp.fmax(low[1], high[1]) - start[1])
    return (_trapezoid_residual(low, high) > MIN_JUMP) & (
        density > MIN_RELATIVE_DENSITY
    )


def _trapezoid_residual(low: tuple, high: tuple) -> Scalar:
    """Return the trapezoid's error of pairs of (t, f, g); inf if not finite.

    It is ``|f1 - f0 - (t1 - t0) (g0 + g1) / 2|``.
    """
    (s, f, g), (t, f_high, g_high) = low, high
    error = jnp.abs(f_high - f - (t - s) * (g + g_high) / 2)
    return jnp.where(jnp.isfinite(error), error, jnp.inf)
