r"""Time grids optimized for one score by a pilot run.

A pilot run on a fine grid gives at all its times the points :math:`\hat x_i` and
their denoised points :math:`D_i`. The error of one step from any of its times to any
later one follows without further evaluations,

.. math:: e_{ij} = \sigma_j^{-1/2} \big\| r \hat x_i + (1 - r) D_i
          + (h + 1 - r)\, D'_i - \hat x_j \big\|, \quad
          r = \sigma_j / \sigma_i, \quad h = \log r,

with D' the derivative in :math:`\log\sigma` (the term is left out at order 1). The grid
of least total error is found by dynamic programming (Watson et al. 2021). The exponent
-1/2 of :math:`\sigma_j` is between 0, the error in data units, and -1, the error
relative to the noise; it was chosen by ``python -m tests.benchmarks.solvers --extras``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_key
from numpyro_score.renamed_arguments import renamed
from numpyro_score.solver.base import draw_start, init_state, integrate_steps
from numpyro_score.solver.grid import default_times
from numpyro_score.solver.integrate import DenoisingModel
from numpyro_score.solver.runge_kutta import RK4
from numpyro_score.typing import Position, PRNGKey, Scalar

NUM_PILOT_STEPS = 64  # of RK4, at the floor by then: tests/benchmarks/solvers.py


@renamed(key="rng_key", num_draws="num_samples")
def pilot_times(
    rng_key: PRNGKey,
    score: DenoisingModel,
    num_steps: int,
    *,
    order: int = 2,
    num_samples: int = 256,
    context: Array | None = None,
) -> Float[Array, " ts"]:
    r"""Return the ``num_steps`` + 1 times of least total one-step error for one score.

    Costs 320 evaluations for each of ``num_samples`` points. Reduces the error at up to
    about 12 steps (docs/choosing-a-sampler.md); with more, all grids are at the floor.
    Not for guided scores, whose paths differ from those of the pilot run.

    Args:
        rng_key: random key of the pilot run.
        score: a score model.
        num_steps: steps of the grid, at most 64.
        order: 1 for ``Euler`` and stochastic solvers, 2 for multistep solvers.
        num_samples: points of the pilot run.
        context: what the score is conditioned on.

    Raises:
        ValueError: for more than 64 steps or another order.

    Example:
        >>> from numpyro_score import VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> ts = pilot_times(jax.random.key(0), score, 4, num_samples=8)
        >>> ts.shape, bool(jnp.all(jnp.diff(ts) < 0))
        ((5,), True)
    """
    check_key("rng_key", rng_key)
    check_count("num_steps", num_steps, "a number of steps")
    check_count("order", order, "the order of the solver")
    check_count("num_samples", num_samples, "a number of draws")
    if num_steps > NUM_PILOT_STEPS or order > 2:
        raise ValueError(
            f"`num_steps` must be between 1 and {NUM_PILOT_STEPS}, the steps of the "
            f"pilot run, and `order` 1 or 2. Got {num_steps} and {order}."
        )
    ts = default_times(score.sde, NUM_PILOT_STEPS)
    errors = _errors(rng_key, score, ts, context, num_draws=num_samples, order=order)
    return ts[_shortest_path(np.asarray(errors), num_steps)]


@partial(jax.jit, static_argnames=("num_draws", "order"))
def _errors(
    key: PRNGKey,
    score: DenoisingModel,
    ts: Array,
    context: Array | None,
    *,
    num_draws: int,
    order: int,
) -> Float[Array, "starts ends"]:
    """Return e_ij, the error of one step from time i to time j of a pilot run."""
    levels = score.sde.noise_level(ts)

    def denoise(x: Position, level: Scalar) -> Position:
        return score.denoise_standardized(x, level, context)

    key_start, key_steps = jax.random.split(key)
    x = draw_start(key_start, (num_draws, *score.event_shape), levels[0])
    x = x + score.start_center(levels[0], context)
    keys = jax.random.split(key_steps, num_draws)  # unused: the flow has no noise
    solver = RK4()
    _, xs = integrate_steps(
        init_state(solver, x), keys, denoise, levels, solver, trajectory=True
    )
    assert xs is not None
    xs = jnp.concatenate([x[None], xs])
    denoised = jax.vmap(jax.vmap(denoise, in_axes=(0, None)))(xs, levels)
    slope = jnp.asarray(jnp.gradient(denoised, axis=0))
    slope = slope / jnp.log(levels[1] / levels[0])

    def from_one(x: Array, denoised: Array, slope: Array, level: Array) -> Array:
        def to_one(x_next: Array, level_next: Array) -> Array:
            ratio = level_next / level
            step = ratio * x + (1 - ratio) * denoised
            if order > 1:
                step = step + (jnp.log(ratio) + 1 - ratio) * slope
            return jnp.sqrt(jnp.square(step - x_next).mean() / level_next)

        return jax.lax.map(lambda end: to_one(*end), (xs, levels))

    return jax.lax.map(lambda begin: from_one(*begin), (xs, denoised, slope, levels))


def _shortest_path(errors: np.ndarray, num_steps: int) -> np.ndarray:
    """Return the indices of the path of least total error in ``num_steps`` steps."""
    size = len(errors)
    forward = np.where(np.tri(size, dtype=bool), np.inf, errors)
    total = np.full(size, np.inf)
    total[0] = 0.0
    before = []
    for _ in range(num_steps):
        candidates = total[:, None] + forward
        before.append(candidates.argmin(0))
        total = candidates.min(0)
    path = [size - 1]
    for choice in reversed(before):
        path.append(int(choice[path[-1]]))
    return np.array(path[::-1])
