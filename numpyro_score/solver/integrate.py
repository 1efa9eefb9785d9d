"""The compiled parts of a run: start from noise, advance along a grid, finish."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_score.data.standardize import Affine
from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver, SolverState, init_state, integrate_steps
from numpyro_score.typing import Position, PRNGKey, Real, Scalar


@runtime_checkable
class DenoisingModel(Protocol):
    """What the frame needs of a score model."""

    @property
    def sde(self) -> SDE:
        """The process."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one point."""

    @property
    def standardize(self) -> Affine:
        """The map to the unit scale."""

    def denoise_standardized(
        self, x: Position, level: Scalar, context: Any
    ) -> Position:
        """Return D(x, level) in standardized coordinates."""


class Solution(NamedTuple):
    """What :func:`~numpyro_score.solver.sample.solve` returns.

    - **draws**: the points at the last time, in physical units.
    - **num_evaluations**: evaluations of the denoiser, one number for all draws or one
      per draw where a solver chooses its steps.
    - **failed_step**: the step at which each draw stopped being finite, or -1.
    - **trajectory**: the points at all times of the grid, stacked in front of the
      draws' shape, each in the scale of its time; None unless asked for.
    """

    draws: Real
    num_evaluations: Int[Array, "..."]
    failed_step: Int[Array, "..."]
    trajectory: Real | None


class DrawKeys(NamedTuple):
    """Keys of the starts and of the steps, and signs of all noise, if any, per draw."""

    starts: PRNGKey
    steps: PRNGKey
    signs: Float[Array, " draws"] | None


@partial(jax.jit, static_argnames=("size", "antithetic"))
def draw_keys(key: PRNGKey, size: int, antithetic: bool) -> DrawKeys:
    """Split a key for ``size`` draws; antithetic ones share keys in pairs."""
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
    """Lay the draws out over devices.

    Raises:
        ValueError: if the devices cannot have equal shares.
    """
    size = len(keys.steps)
    if len(devices) == 0 or size % len(devices):
        raise ValueError(
            "The number of `devices` must divide the number of draws: each device has "
            f"an equal share. Got {len(devices)} devices, {size} draws."
        )
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    layout = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, layout), keys)


@partial(jax.jit, static_argnames="solver")
def draw_prior(
    keys: DrawKeys, score: DenoisingModel, ts: Array, *, solver: Solver
) -> SolverState:
    """Draw the starts from the process's prior, in standardized coordinates."""
    scale = jnp.sqrt(1 + score.sde.noise_level(ts[0]) ** 2)
    noise = jax.vmap(lambda key: jax.random.normal(key, score.event_shape))
    x = scale * noise(keys.starts)
    if keys.signs is not None:
        x = jax.vmap(jnp.multiply)(keys.signs, x)
    return init_state(solver, x)


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
    """Carry the draws along a part of the grid; return the path after each step too."""
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
        xs = jax.vmap(partial(to_data_units, score))(xs, ts[1:])
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
    """Return to physical units and to the shape that was asked for."""
    count: Any = jnp.asarray(solver.num_evaluations(num_steps, state.solver_state))
    if denoise_last:
        level = score.sde.noise_level(t)
        denoise = jax.vmap(lambda x: score.denoise_standardized(x, level, context))
        draws = jax.vmap(score.standardize.inverse)(denoise(state.x))
        count = count + 1
    else:
        draws = to_data_units(score, state.x, t)
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
    """Go from keys to draws; one program per shape, solver and number of times."""
    first = draw_prior(keys, score, ts, solver=solver)
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
    """Put the starts in front of the points after every step."""
    if xs is None:
        return None
    xs = jnp.concatenate([to_data_units(score, first.x, t)[None], xs])
    return xs.reshape(len(xs), *shape, *score.event_shape)


@partial(jax.jit, static_argnames="solver")
def integrate_flow(
    score: DenoisingModel, x: Array, ts: Array, context: Array | None, *, solver: Solver
) -> Array:
    """Carry given points from the first to the last time along the flow."""
    rank = len(score.event_shape)
    batch = x.shape[: x.ndim - rank]
    points = x.reshape(prod(batch), *score.event_shape)
    u = jax.vmap(score.standardize.forward)(points) / score.sde.alpha(ts[0])
    keys = jax.random.split(jax.random.key(0), len(u))  # the flow uses no noise
    state, _ = integrate_steps(
        init_state(solver, u),
        keys,
        lambda x, level: score.denoise_standardized(x, level, context),
        score.sde.noise_level(ts),
        solver,
    )
    return to_data_units(score, state.x, ts[-1]).reshape(x.shape)


def to_data_units(score: DenoisingModel, x: Array, t: Scalar) -> Array:
    """Return loc + scale alpha x for a batch of standardized points."""
    return jax.vmap(score.standardize.inverse)(score.sde.alpha(t) * x)
