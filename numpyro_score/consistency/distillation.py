"""Training of consistency models, from a score or from data alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import (
    as_finite_points,
    check_key,
    check_kind,
    check_rows_finite,
)
from numpyro_score.consistency.model import ConsistencyModel, init_model
from numpyro_score.data.rows import Batch
from numpyro_score.data.standardize import Affine
from numpyro_score.loss.noise_levels import add_noise
from numpyro_score.renamed_arguments import renamed
from numpyro_score.reprs import repr_lines
from numpyro_score.schedule import geometric
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.solver import DPMSolverPP, Solver, solve
from numpyro_score.solver.grid import default_times
from numpyro_score.solver.runge_kutta import heun_step
from numpyro_score.train.fit import FitOptions, fit_params
from numpyro_score.train.optimizer import TrainingProblem
from numpyro_score.train.state import loss_trend
from numpyro_score.typing import Params, Position, PRNGKey, Scalar

NUM_LEVELS = 32  # noise levels of a path, the points of the default solver's grid
HUBER_SCALE = 0.03  # 0.00054 sqrt(3072), c of Song and Dhariwal 2024 for CIFAR-10


class ConsistencyResult(NamedTuple):
    """Result of training a consistency model.

    - **model**: the consistency model.
    - **losses**: training loss of every step.
    """

    model: ConsistencyModel
    losses: Float[Array, " steps"]

    def __repr__(self) -> str:
        rows = self.model.summary() | {"losses": loss_trend(self.losses)}
        return repr_lines(type(self).__name__, rows)

    def print_summary(self) -> None:
        """Print the model and its losses, the lines of the repr.

        Draws show how good the model is: compare them with those of the score, for
        example by :func:`numpyro_score.diagnostics.c2st`.
        """
        print(repr(self))


@renamed(key="rng_key", contexts="context")
def distill(
    rng_key: PRNGKey,
    score: ScoreModel,
    num_steps: int,
    *,
    net: Callable | None = None,
    num_paths: int = 20_000,
    solver: Solver = DPMSolverPP(),
    batch_size: int = 512,
    context: Float[Array, "paths ..."] | None = None,
    progress_bar: bool = True,
) -> ConsistencyResult:
    """Return a consistency model fitted to paths of the flow of a score.

    ``num_paths`` paths of the probability flow are solved once, and f is fitted by
    regression to their ends at every noise level. The targets are fixed; those of
    :func:`consistency_distillation`, which stores no paths, change during training.

    Args:
        rng_key: random key.
        score: the score to distil.
        num_steps: training steps.
        net: a configuration such as :class:`~numpyro_score.nn.MLP`, or another callable
            that returns a module; None for an MLP.
        num_paths: number of paths in memory, of 32 points each.
        solver: solver of the probability flow.
        batch_size: paths per step, at most all.
        context: values that the score is conditioned on, one per path, for a model of
            any context; they replace ``num_paths``.
        progress_bar: whether to show steps and loss.

    Raises:
        FloatingPointError: if the loss is not finite in the first block.
        TypeError: for a score of data with a support.
        ValueError: for fewer than one step.

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
    check_key("rng_key", rng_key)
    _check_no_support(score)
    key_paths, key_net, key_fit = jax.random.split(rng_key, 3)
    ts = default_times(score.sde, NUM_LEVELS)
    if context is None:
        path = solve(
            key_paths, score, (num_paths,), solver=solver, ts=ts, trajectory=True
        ).trajectory
        assert path is not None  # by `trajectory=True`
    else:
        path = _paths_given(key_paths, score, ts, context, solver=solver)
    u = jax.vmap(jax.vmap(score.standardize.forward))(path)
    scale = score.sde.alpha(ts).reshape(-1, *([1] * (u.ndim - 1)))
    center = _start_center(score, context)
    paths = jnp.moveaxis(u / scale, 0, 1) - center
    model = init_model(
        key_net,
        net,
        score.sde,
        score.standardize.recentered(center),
        score.event_shape,
        getattr(score.denoiser, "standardize_context", None),
        getattr(score.denoiser, "linear_baseline", None),
    )
    rows = Batch(paths, context)
    options = FitOptions(num_steps, progress_bar=progress_bar)
    return _fit_model(
        key_fit, _DistillationProblem(), model, None, rows, options, batch_size
    )


@jax.jit
def _start_center(score: ScoreModel, contexts: Array | None) -> Position:
    """Return the mean of the law that paths start from, over all contexts."""
    level = jnp.asarray(score.sde.sigma_max)
    if contexts is None:
        return score.start_center(level)
    return jax.vmap(partial(score.start_center, level))(contexts).mean(0)


@partial(jax.jit, static_argnames="solver")
def _paths_given(
    key: PRNGKey, score: ScoreModel, ts: Array, contexts: Array, *, solver: Solver
) -> Array:
    """Return one path per context, with times along the first axis."""

    def one(key: PRNGKey, context: Array) -> Array:
        path = solve(
            key, score, (), solver=solver, ts=ts, context=context, trajectory=True
        ).trajectory
        assert path is not None  # by `trajectory=True`
        return path

    keys = jax.random.split(key, len(contexts))
    return jax.vmap(one, out_axes=1)(keys, contexts)


@renamed(key="rng_key")
def consistency_distillation(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Float[Array, "rows *event"],
    num_steps: int,
    *,
    net: Callable | None = None,
    batch_size: int = 512,
    progress_bar: bool = True,
) -> ConsistencyResult:
    """Return a consistency model with equal values along steps of the flow of a score.

    Consistency distillation of Song et al. 2023, algorithm 2, with Heun steps. The
    target net has the weights of the current step (Song and Dhariwal 2024), and the
    result is an average of the weights.

    Args:
        rng_key: random key.
        score: the score to distil.
        data: rows to which noise is added for the starts of the steps: data, or draws
            of the score.
        num_steps: training steps.
        net: as in :func:`distill`.
        batch_size: rows per step, at most all.
        progress_bar: whether to show steps and loss.

    Raises:
        FloatingPointError: if the loss is not finite in the first block.
        TypeError: for a score of data with a support.
        ValueError: for fewer than one step.

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
    check_key("rng_key", rng_key)
    _check_no_support(score)
    data = as_finite_points("data", data, score.event_shape)
    rows = Batch(jax.vmap(score.standardize.forward)(data))
    key_net, key_fit = jax.random.split(rng_key)
    model = init_model(key_net, net, score.sde, score.standardize, score.event_shape)
    options = FitOptions(num_steps, progress_bar=progress_bar)
    return _fit_model(
        key_fit, _ConsistencyProblem(), model, score, rows, options, batch_size
    )


@renamed(key="rng_key")
def consistency_training(
    rng_key: PRNGKey,
    data: Float[Array, "rows *event"],
    sde: SDE,
    num_steps: int,
    *,
    net: Callable | None = None,
    batch_size: int = 512,
    progress_bar: bool = True,
) -> ConsistencyResult:
    """Return a consistency model trained on data alone, without a score.

    Consistency training of Song et al. 2023, algorithm 3: the two points of a pair
    share their noise, an unbiased estimate of a step of the flow. Its variance makes
    training slower than distillation: prefer to train a score and :func:`distill` it.

    Args:
        rng_key: random key.
        data: rows of the law, in physical units.
        sde: noise process.
        num_steps: training steps.
        net: as in :func:`distill`.
        batch_size: rows per step, at most all.
        progress_bar: whether to show steps and loss.

    Raises:
        FloatingPointError: if the loss is not finite in the first block.
        ValueError: for fewer than one step.

    Example:
        >>> from numpyro_score import MLP, VE
        >>> data = jax.random.normal(jax.random.key(1), (16, 1))
        >>> net = MLP(1, width=8, depth=1)
        >>> key = jax.random.key(0)
        >>> result = consistency_training(key, data, VE(), 2, net=net, batch_size=8)
        >>> result.losses.shape
        (2,)
    """
    check_key("rng_key", rng_key)
    check_kind("sde", sde, SDE, "a noise process such as VE()")
    check_rows_finite("data", data)
    data = jnp.asarray(data, float)
    standardize = (Affine.per_dimension if data.ndim <= 2 else Affine.shared)(data)
    key_net, key_fit = jax.random.split(rng_key)
    model = init_model(key_net, net, sde, standardize, data.shape[1:])
    rows = Batch(jax.vmap(standardize.forward)(data))
    options = FitOptions(num_steps, progress_bar=progress_bar)
    return _fit_model(
        key_fit, _ConsistencyProblem(), model, None, rows, options, batch_size
    )


def _check_no_support(score: ScoreModel) -> None:
    """Raise for a score of data with a support, which a consistency model has not."""
    check_kind("score", score, ScoreModel, "a ScoreModel")
    if score.support is not None:
        raise TypeError(
            "`score` must have no support: a consistency model draws unconstrained "
            "points. Distil `dataclasses.replace(score, support=None)` with "
            "unconstrained data, and map draws back by `score.constrain`. Got support "
            f"{score.support.name}."
        )


def sample_levels(key: PRNGKey, num: int, num_levels: int) -> Array:
    """Return random indices of noise levels.

    0, the highest level, with probability 1/2: one-step draws start from it. Otherwise
    uniform in 0, ..., ``num_levels`` - 1.
    """
    key_first, key_any = jax.random.split(key)
    index = jax.random.randint(key_any, (num,), 0, num_levels)
    return jnp.where(jax.random.bernoulli(key_first, 0.5, (num,)), 0, index)


Fixed = tuple[ConsistencyModel, ScoreModel | None]  # model without weights, teacher


@dataclass(frozen=True)
class _DistillationProblem:
    """Regression of f on the ends of paths: mean of (f(x_i, level_i) - x_end)^2."""

    def loss(self, params: Params, fixed: Fixed, key: PRNGKey, batch: Batch) -> Scalar:
        """Return the loss of a batch of paths."""
        model = replace(fixed[0], params=params)
        levels = model.sde.noise_level(default_times(model.sde, NUM_LEVELS))
        index = sample_levels(key, len(batch.x), NUM_LEVELS)
        x = jax.vmap(lambda path, i: path[i])(batch.x, index)
        ends = jax.vmap(model)(x, levels[index], batch.context)
        return jnp.square(ends - batch.x[:, -1]).mean()


@dataclass(frozen=True)
class _ConsistencyProblem:
    """Distance of f(x, level) from f(x_lower, lower), the second held fixed.

    Both points lie on a path of the teacher's flow, by one Heun step; without a teacher
    they share their noise.
    """

    def loss(self, params: Params, fixed: Fixed, key: PRNGKey, batch: Batch) -> Scalar:
        """Return the loss of a batch of standardized data."""
        model, rows = replace(fixed[0], params=params), batch.x
        levels = geometric(model.sde.sigma_min, model.sde.sigma_max, NUM_LEVELS + 1)
        key_level, key_noise = jax.random.split(key)
        index = jax.random.randint(key_level, (len(rows),), 0, NUM_LEVELS)
        level, lower = levels[index], levels[index + 1]
        noise = jax.random.normal(key_noise, rows.shape, rows.dtype)
        x = add_noise(rows, level, noise)
        x_lower = add_noise(rows, lower, noise)
        if fixed[1] is not None:
            step = partial(heun_step, denoise=fixed[1].denoise_standardized)
            x_lower = jax.vmap(step)(x, level, lower)  # on the path of the flow
        target = jax.lax.stop_gradient(jax.vmap(model)(x_lower, lower))
        gap = jnp.square(jax.vmap(model)(x, level) - target)
        # pseudo-Huber (Song and Dhariwal 2024, eq. 8), robust to the first targets
        return jnp.sqrt(gap.reshape(len(rows), -1).sum(1) + HUBER_SCALE**2).mean()


def _fit_model(
    key: PRNGKey,
    problem: TrainingProblem,
    model: ConsistencyModel,
    teacher: ScoreModel | None,
    rows: Batch,
    options: FitOptions,
    batch_size: int,
) -> ConsistencyResult:
    """Return the trained model and the losses."""
    fixed = replace(model, params=None), teacher
    params, losses = fit_params(
        key, problem, model.params, fixed, rows, options, batch_size=batch_size
    )
    return ConsistencyResult(replace(model, params=params), losses)
