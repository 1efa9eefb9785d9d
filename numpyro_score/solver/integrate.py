"""Compiled parts of a solve: draws of the prior, integration, map to data units.

A run without a progress bar is one program, :func:`solve_compiled`; with one, the same
parts are called once per block of steps.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_score.checks import check_devices
from numpyro_score.data.standardize import Affine
from numpyro_score.sde import SDE
from numpyro_score.solver.base import (
    Solver,
    SolverState,
    draw_start,
    init_state,
    integrate_steps,
)
from numpyro_score.typing import Position, PRNGKey, Real, Scalar


@runtime_checkable
class DenoisingModel(Protocol):
    """The part of :class:`~numpyro_score.score.ScoreModel` that solvers use."""

    @property
    def sde(self) -> SDE:
        """The noise process."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one point."""

    @property
    def standardize(self) -> Affine:
        """The map from data units to unit scale."""

    def denoise_standardized(
        self, x: Position, level: Scalar, context: Any
    ) -> Position:
        """Return D(x, level) in standardized coordinates."""

    def start_center(self, level: Scalar, context: Any) -> Position:
        """Return the mean of the law that draws start from at the highest level."""


class Solution(NamedTuple):
    """Result of :func:`~numpyro_score.solver.sample.solve`.

    - **draws**: points at the last time, in data units, of shape
      ``shape + event_shape``.
    - **num_evaluations**: denoiser evaluations; one number, or one per draw for
      adaptive solvers.
    - **failed_step**: index of the first step after which a draw was NaN or inf; -1 for
      none.
    - **trajectory**: x_t at every time of the grid, of shape
      ``(times,) + shape + event_shape``; None unless requested.
    """

    draws: Real
    num_evaluations: Int[Array, "..."]
    failed_step: Int[Array, "..."]
    trajectory: Real | None


class DrawKeys(NamedTuple):
    """Per draw: key of the initial noise, key of the steps, sign of all noise."""

    starts: PRNGKey
    steps: PRNGKey
    signs: Float[Array, " draws"] | None


@partial(jax.jit, static_argnames=("size", "antithetic"))
def draw_keys(key: PRNGKey, size: int, antithetic: bool) -> DrawKeys:
    """Return keys for ``size`` draws; antithetic draws 2k and 2k + 1 share theirs."""
    key_start, key_steps = jax.random.split(key)
    starts = jax.random.split(key_start, size)
    steps = jax.random.split(key_steps, size)
    signs = None
    if antithetic:
        pairs = np.arange(size) // 2
        starts, steps = starts[pairs], steps[pairs]
        signs = jnp.where(jnp.arange(size) % 2 == 0, 1.0, -1.0)
    return DrawKeys(starts, steps, signs)


def shard(keys: DrawKeys, devices: Sequence[jax.Device]) -> DrawKeys:
    """Return the keys sharded over devices, and with them all that follows.

    Raises:
        ValueError: unless the number of devices divides the number of draws.
    """
    check_devices(devices)
    size = len(keys.steps)
    if size % len(devices):
        raise ValueError(
            "The number of `devices` must divide the number of draws: each device has "
            f"an equal share. Got {len(devices)} devices, {size} draws."
        )
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    layout = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, layout), keys)


@partial(jax.jit, static_argnames="solver")
def draw_prior(
    keys: DrawKeys, score: DenoisingModel, ts: Array, context: Any, *, solver: Solver
) -> SolverState:
    """Return draws of N(m, 1 + sigma^2), standardized and divided by alpha.

    m is the score's ``start_center``: 0 for standardized data.
    """
    level = score.sde.noise_level(ts[0])
    x = jax.vmap(lambda key: draw_start(key, score.event_shape, level))(keys.starts)
    if keys.signs is not None:
        x = jax.vmap(jnp.multiply)(keys.signs, x)
    return init_state(solver, x + score.start_center(level, context))


@partial(jax.jit, static_argnames=("solver", "trajectory"))
def integrate_grid(
    state: SolverState,
    keys: DrawKeys,
    score: DenoisingModel,
    ts: Array,
    context: Array | None,
    first_step: Array | int,
    *,
    solver: Solver,
    trajectory: bool,
) -> tuple[SolverState, Array | None]:
    """Return the state at ``ts[-1]``, and x_t after every step if requested."""
    state, xs = integrate_steps(
        state,
        keys.steps,
        lambda x, level: score.denoise_standardized(x, level, context),
        score.sde.noise_level(ts),
        solver,
        signs=keys.signs,
        first_step=first_step,
        trajectory=trajectory,
    )
    if xs is not None:
        xs = jax.vmap(partial(_to_data_units, score))(xs, ts[1:])
    return state, xs


@partial(jax.jit, static_argnames=("shape", "solver", "num_steps", "denoise_last"))
def to_solution(
    state: SolverState,
    score: DenoisingModel,
    t: Array,
    context: Array | None,
    *,
    shape: tuple[int, ...],
    solver: Solver,
    num_steps: int,
    denoise_last: bool,
) -> Solution:
    """Return the solution in data units and the requested shape."""
    count: Any = jnp.asarray(solver.num_evaluations(num_steps, state.solver_state))
    if denoise_last:
        level = score.sde.noise_level(t)
        denoise = jax.vmap(lambda x: score.denoise_standardized(x, level, context))
        draws = jax.vmap(score.standardize.inverse)(denoise(state.x))
        count = count + 1
    else:
        draws = _to_data_units(score, state.x, t)
    return Solution(
        draws.reshape(*shape, *score.event_shape),
        count.reshape(shape) if count.ndim else count,
        state.failed_step.reshape(shape),
        None,
    )


@partial(
    jax.jit,
    static_argnames=("shape", "solver", "denoise_last", "trajectory"),
)
def solve_compiled(
    keys: DrawKeys,
    score: DenoisingModel,
    ts: Array,
    context: Array | None,
    *,
    shape: tuple[int, ...],
    solver: Solver,
    denoise_last: bool,
    trajectory: bool,
) -> Solution:
    """Return the solution from keys; compiled once per shape, solver and len(ts)."""
    first = draw_prior(keys, score, ts, context, solver=solver)
    options: dict[str, Any] = {"solver": solver, "trajectory": trajectory}
    state, xs = integrate_grid(first, keys, score, ts, context, 0, **options)
    solution = to_solution(
        state,
        score,
        ts[-1],
        context,
        shape=shape,
        solver=solver,
        num_steps=len(ts) - 1,
        denoise_last=denoise_last,
    )
    return solution._replace(
        trajectory=stack_trajectory(first, xs, score, ts[0], shape)
    )


def stack_trajectory(
    first: SolverState, xs: Array | None, score: DenoisingModel, t: Array, shape: tuple
) -> Array | None:
    """Return x_t at all times: the initial points, then those after every step."""
    if xs is None:
        return None
    xs = jnp.concatenate([_to_data_units(score, first.x, t)[None], xs])
    return xs.reshape(len(xs), *shape, *score.event_shape)


@partial(jax.jit, static_argnames="solver")
def integrate_flow(
    score: DenoisingModel, x: Array, ts: Array, context: Array | None, *, solver: Solver
) -> Array:
    """Return points at ``ts[-1]`` of the probability flow from points at ``ts[0]``."""
    rank = len(score.event_shape)
    batch = x.shape[: x.ndim - rank]
    points = x.reshape(prod(batch), *score.event_shape)
    u = jax.vmap(score.standardize.forward)(points) / score.sde.alpha(ts[0])
    keys = jax.random.split(jax.random.key(0), len(u))  # unused: the flow has no noise
    state, _ = integrate_steps(
        init_state(solver, u),
        keys,
        lambda x, level: score.denoise_standardized(x, level, context),
        score.sde.noise_level(ts),
        solver,
    )
    return _to_data_units(score, state.x, ts[-1]).reshape(x.shape)


def _to_data_units(score: DenoisingModel, x: Array, t: Scalar) -> Array:
    """Return loc + scale alpha x for a batch of standardized points."""
    return jax.vmap(score.standardize.inverse)(score.sde.alpha(t) * x)
