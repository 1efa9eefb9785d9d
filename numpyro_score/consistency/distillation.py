"""Train consistency models, from a score or from data alone."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.consistency.fitting import NUM_LEVELS, fit, sample_levels
from numpyro_score.consistency.model import ConsistencyModel, init_model
from numpyro_score.data.standardize import Affine
from numpyro_score.schedule import geometric
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.solver import DPMSolverPP, Solver, solve
from numpyro_score.solver.grid import default_times
from numpyro_score.solver.runge_kutta import heun_step
from numpyro_score.typing import Position, PRNGKey, Scalar


class ConsistencyResult(NamedTuple):
    """What a trainer returns.

    - **model**: the one-step map.
    - **losses**: training loss of every step.
    """

    model: ConsistencyModel
    losses: Float[Array, " steps"]


def distill(
    key: PRNGKey,
    score: ScoreModel,
    num_steps: int,
    *,
    net: Callable | None = None,
    num_paths: int = 20_000,
    solver: Solver = DPMSolverPP(),
    batch_size: int = 512,
    contexts: Float[Array, "paths ..."] | None = None,
) -> ConsistencyResult:
    """Learn the ends of paths of a trained score, by regression on whole paths.

    ``num_paths`` paths of the probability flow are solved once and f is fitted to their
    ends at every noise level they pass. The targets are fixed, so nothing drifts;
    :func:`consistency_distillation` needs no stored paths but has moving targets.

    Args:
        key: random key.
        score: the score to distil.
        num_steps: training steps.
        net: a configuration such as :class:`~numpyro_score.nn.MLP`, or what else builds
            a module; None for an MLP.
        num_paths: number of paths kept in memory, 32 points each.
        solver: solver of the probability flow.
        batch_size: paths per step.
        contexts: what the score is conditioned on, one per path; the model then draws
            for any context, and ``num_paths`` is their number.

    Example:
        >>> from numpyro_score import MLP, VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> net = MLP(1, width=8, depth=1)
        >>> result = distill(
        ...     jax.random.key(0), score, 2, net=net, num_paths=16, batch_size=8
        ... )
        >>> result.model.sample(jax.random.key(1), (3,)).shape
        (3, 1)
    """
    key_paths, key_net, key_fit = jax.random.split(key, 3)
    ts = default_times(score.sde, NUM_LEVELS)
    if contexts is None:
        path = solve(
            key_paths, score, (num_paths,), solver=solver, ts=ts, trajectory=True
        ).trajectory
        assert path is not None  # it was asked for
    else:
        path = _paths_given(key_paths, score, ts, contexts, solver=solver)
    u = jax.vmap(jax.vmap(score.standardize.forward))(path)
    scale = score.sde.alpha(ts).reshape(-1, *([1] * (u.ndim - 1)))
    paths = jnp.moveaxis(u / scale, 0, 1)
    levels = score.sde.noise_level(ts)

    def loss(model: ConsistencyModel, key: PRNGKey, batch: tuple) -> Scalar:
        rows, context = batch
        # the highest level counts most: from there one-step draws start
        index = sample_levels(key, len(rows), NUM_LEVELS)
        x = jax.vmap(lambda row, i: row[i])(rows, index)
        ends = jax.vmap(model)(x, levels[index], context)
        return jnp.square(ends - rows[:, -1]).mean()

    model = init_model(
        key_net,
        net,
        score.sde,
        score.standardize,
        score.event_shape,
        getattr(score.denoiser, "standardize_context", None),
        getattr(score.denoiser, "center", None),
    )
    rows = (paths, contexts)
    return ConsistencyResult(*fit(key_fit, model, loss, rows, num_steps, batch_size))


@partial(jax.jit, static_argnames="solver")
def _paths_given(
    key: PRNGKey, score: ScoreModel, ts: Array, contexts: Array, *, solver: Solver
) -> Array:
    """Solve one path per context; return them with times on the first axis."""

    def one(key: PRNGKey, context: Array) -> Array:
        path = solve(
            key, score, (), solver=solver, ts=ts, context=context, trajectory=True
        ).trajectory
        assert path is not None  # it was asked for
        return path

    keys = jax.random.split(key, len(contexts))
    return jax.vmap(one, out_axes=1)(keys, contexts)


def consistency_distillation(
    key: PRNGKey,
    score: ScoreModel,
    data: Float[Array, "rows *event"],
    num_steps: int,
    *,
    net: Callable | None = None,
    batch_size: int = 512,
) -> ConsistencyResult:
    """Consistency distillation: agree with oneself one step of the flow further down.

    Song et al. 2023, algorithm 2, with Heun steps, without a separate target net (Song
    and Dhariwal 2024) and with an average of the weights as result.

    Args:
        key: random key.
        score: the score to distil.
        data: rows that are noised to find points of paths; draws of the score will do.
        num_steps: training steps.
        net: as in :func:`distill`.
        batch_size: rows per step.

    Example:
        >>> from numpyro_score import MLP, VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> net = MLP(1, width=8, depth=1)
        >>> data = jax.random.normal(jax.random.key(1), (16, 1))
        >>> result = consistency_distillation(
        ...     jax.random.key(0), score, data, 2, net=net, batch_size=8
        ... )
        >>> result.losses.shape
        (2,)
    """

    def step_down(
        x: Position, level: Scalar, lower: Scalar, _: Position, __: Position
    ) -> Position:
        return heun_step(
            x, level, lower, lambda x, level: score.denoise_standardized(x, level, None)
        )

    rows = jax.vmap(score.standardize.forward)(jnp.asarray(data, float))
    key_net, key_fit = jax.random.split(key)
    model = init_model(key_net, net, score.sde, score.standardize, score.event_shape)
    loss = _self_consistency(score.sde, step_down)
    return ConsistencyResult(*fit(key_fit, model, loss, rows, num_steps, batch_size))


def consistency_training(
    key: PRNGKey,
    data: Float[Array, "rows *event"],
    sde: SDE,
    num_steps: int,
    *,
    net: Callable | None = None,
    batch_size: int = 512,
) -> ConsistencyResult:
    """Consistency training: the same from data alone, without a score.

    Song et al. 2023, algorithm 3: both points of a pair share their noise, which is
    right on average only, so it needs far more steps than distillation for the same
    quality. Prefer to train a score and :func:`distill` it.

    Args:
        key: random key.
        data: rows of the law.
        sde: the process.
        num_steps: training steps.
        net: as in :func:`distill`.
        batch_size: rows per step.

    Example:
        >>> from numpyro_score import MLP, VE
        >>> data = jax.random.normal(jax.random.key(1), (16, 1))
        >>> net = MLP(1, width=8, depth=1)
        >>> key = jax.random.key(0)
        >>> result = consistency_training(key, data, VE(), 2, net=net, batch_size=8)
        >>> result.losses.shape
        (2,)
    """

    def step_down(
        x: Position, level: Scalar, lower: Scalar, x0: Position, noise: Position
    ) -> Position:
        return x0 + lower * noise

    data = jnp.asarray(data, float)
    standardize = (Affine.per_dimension if data.ndim <= 2 else Affine.shared)(data)
    key_net, key_fit = jax.random.split(key)
    model = init_model(key_net, net, sde, standardize, data.shape[1:])
    rows = jax.vmap(standardize.forward)(data)
    loss = _self_consistency(sde, step_down)
    return ConsistencyResult(*fit(key_fit, model, loss, rows, num_steps, batch_size))


def _self_consistency(sde: SDE, step_down: Callable) -> Callable:
    """Return the loss |f(x, level) - f(x_lower, lower)| with the second held fixed."""
    levels = geometric(sde.sigma_min, sde.sigma_max, NUM_LEVELS + 1)

    def loss(model: ConsistencyModel, key: PRNGKey, rows: Array) -> Scalar:
        key_level, key_noise = jax.random.split(key)
        index = jax.random.randint(key_level, (len(rows),), 0, NUM_LEVELS)
        level, lower = levels[index], levels[index + 1]
        noise = jax.random.normal(key_noise, rows.shape, rows.dtype)
        x = jax.vmap(lambda x0, level, n: x0 + level * n)(rows, level, noise)
        x_lower = jax.vmap(step_down)(x, level, lower, rows, noise)
        target = jax.lax.stop_gradient(jax.vmap(model)(x_lower, lower))
        gap = jnp.square(jax.vmap(model)(x, level) - target)
        # pseudo-Huber (Song and Dhariwal 2024, eq. 8), robust to early targets
        return jnp.sqrt(gap.reshape(len(rows), -1).sum(1) + 0.03**2).mean()

    return loss
