r"""Sampling by any solver: from noise to data in one compiled scan, and back.

Draws of the process's prior at ``ts[0]`` are integrated to ``ts[-1]`` by a
:class:`~numpyro_score.solver.base.Solver`. Memory does not grow with the number of
steps unless the trajectory is requested.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    as_points,
    check_flags,
    check_key,
    check_kind,
    check_numbers,
    check_rows_finite,
    check_shape,
    is_traced,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.sde import SDE
from numpyro_score.solver import integrate
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import check_times
from numpyro_score.solver.integrate import DenoisingModel, DrawKeys, Solution
from numpyro_score.typing import PRNGKey, Real

NUM_BLOCKS = 20  # updates of the progress bar: one per 5 % of the steps


@renamed(key="rng_key")
def sample(
    rng_key: PRNGKey,
    score: DenoisingModel,
    shape: tuple[int, ...] = (),
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
    denoise_last: bool = False,
) -> Float[Array, "*batch"]:
    r"""Return draws of :math:`p_t` at t = ``ts[-1]``, in data units.

    The integration starts from draws of the process's prior at ``ts[0]``. The draws
    contain the noise of ``ts[-1]``, by default the lowest level of the process. For
    data with a support they are unconstrained points, as for all functions of this
    module; ``score.sample`` returns data.

    Args:
        rng_key: random key.
        score: a score model.
        shape: batch shape of the draws.
        solver: the integrator.
        ts: decreasing times; None for the solver's own grid.
        context: what the score is conditioned on, one for all draws.
        denoise_last: whether to return E[x_0 given x_t] instead of x_t, for one more
            evaluation. Use it for images only: conditional means have less variance
            than draws.

    Returns:
        Draws of shape ``shape + event_shape``.

    Raises:
        TypeError: if ``solver`` is not a :class:`Solver`.
        ValueError: if ``ts`` has fewer than two times or increases.
        FloatingPointError: if a draw is not finite.

    Example:
        >>> from numpyro_score import VE, DPMSolverPP, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> sample(jax.random.key(0), score, (3,), solver=DPMSolverPP()).shape
        (3, 2)
    """
    draws = solve(
        rng_key,
        score,
        shape,
        solver=solver,
        ts=ts,
        context=context,
        denoise_last=denoise_last,
    ).draws
    if not is_traced(draws) and not jnp.isfinite(draws).all():
        bad = int((~jnp.isfinite(draws)).sum())
        raise FloatingPointError(
            "The draws are not finite: the score returned NaN or inf, or the steps are "
            "too large for the solver. Check the score, or pass more times in `ts`. "
            f"Numbers that are not finite: {bad} of {draws.size}."
        )
    return draws


@renamed(key="rng_key")
def solve(
    rng_key: PRNGKey,
    score: DenoisingModel,
    shape: tuple[int, ...] = (),
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
    denoise_last: bool = False,
    antithetic: bool = False,
    trajectory: bool = False,
    progress_bar: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Solution:
    """Return draws as :func:`sample` does, with evaluations, failures and trajectory.

    A draw that is not finite is recorded in ``failed_step``; no error is raised.

    Args:
        rng_key: random key.
        score: a score model.
        shape: batch shape of the draws.
        solver: the integrator.
        ts: decreasing times; None for the solver's own grid.
        context: what the score is conditioned on, one for all draws.
        denoise_last: whether to return the denoised points, one evaluation more.
        antithetic: whether draw 2k + 1 uses minus the noise of draw 2k.
        trajectory: whether to return the points after every step too.
        progress_bar: whether to show progress over the steps.
        devices: devices over which the draws are sharded; their number must divide that
            of the draws. The draws do not depend on the devices.

    Raises:
        TypeError: if ``solver`` is not a :class:`Solver`.
        ValueError: if ``ts`` has fewer than two times or increases, or the number of
            devices does not divide that of the draws.

    Example:
        >>> from numpyro_score import VE, DPMSolverPP, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> solution = solve(jax.random.key(0), score, (3,), solver=DPMSolverPP())
        >>> solution.draws.shape, int(solution.num_evaluations)
        ((3, 2), 32)
    """
    _check_score(score)
    check_flags(
        denoise_last=denoise_last,
        antithetic=antithetic,
        trajectory=trajectory,
        progress_bar=progress_bar,
    )
    ts = _solver_times(solver, score.sde, ts)
    check_key("rng_key", rng_key)
    shape = check_shape("shape", shape)
    keys = integrate.draw_keys(rng_key, prod(shape), antithetic)
    if devices is not None:
        keys = integrate.shard(keys, devices)
    if progress_bar:
        return _run_in_blocks(
            keys, score, ts, context, shape, solver, denoise_last, trajectory
        )
    return integrate.solve_compiled(
        keys,
        score,
        ts,
        context,
        shape=shape,
        solver=solver,
        denoise_last=denoise_last,
        trajectory=trajectory,
    )


def encode(
    score: DenoisingModel,
    x: Real,
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
) -> Real:
    """Return the noise of data points under the probability flow.

    The inverse of :func:`decode` up to the solver's error.

    Args:
        score: a score model.
        x: points at the lowest time of the grid, shape ``batch + event_shape``.
        solver: a solver of the probability flow.
        ts: decreasing times, run backwards; None for the solver's own grid.
        context: what the score is conditioned on, one for all points.

    Returns:
        The points at the highest time, in data units. Standardized, they follow
        approximately N(0, ``prior_scale``^2) if ``x`` follows the score's law.

    Raises:
        TypeError: for a solver with noise.

    Example:
        >>> from numpyro_score import VE, DPMSolverPP, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> noise = encode(score, jnp.array([0.0]), solver=DPMSolverPP())
        >>> float(noise[0])  # the flow of a symmetric law keeps its centre
        0.0
    """
    x, ts = _check_flow(score, x, solver, ts)
    return integrate.integrate_flow(score, x, ts[::-1], context, solver=solver)


def decode(
    score: DenoisingModel,
    x: Real,
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
) -> Real:
    """Return the data points of given noise under the probability flow.

    Args:
        score: a score model.
        x: points at the highest time of the grid, shape ``batch + event_shape``.
        solver: a solver of the probability flow.
        ts: decreasing times; None for the solver's own grid.
        context: what the score is conditioned on, one for all points.

    Returns:
        The points at the lowest time, in data units.

    Raises:
        TypeError: for a solver with noise.

    Example:
        >>> from numpyro_score import VE, DPMSolverPP, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> noise = encode(score, jnp.array([0.5]), solver=DPMSolverPP())
        >>> x = decode(score, noise, solver=DPMSolverPP())
        >>> bool(abs(x[0] - 0.5) < 0.01)
        True
    """
    x, ts = _check_flow(score, x, solver, ts)
    return integrate.integrate_flow(score, x, ts, context, solver=solver)


def _check_score(score: Any) -> None:
    """Raise a TypeError for what is no score."""
    what = "a ScoreModel, or an object with the same methods"
    check_kind("score", getattr(score, "sde", score), SDE, what)


def _check_flow(
    score: DenoisingModel, x: Real, solver: Solver, ts: Float[Array, " ts"] | None
) -> tuple[Real, Float[Array, " ts"]]:
    """Return points and times for the probability flow after checking all arguments."""
    _check_score(score)
    ts = check_deterministic(solver, score.sde, ts)
    points = as_points("x", x, score.event_shape)
    if points.size:
        check_rows_finite("x", jnp.atleast_1d(points))
    return points, ts


def check_deterministic(
    solver: Solver, sde: SDE, ts: Float[Array, " ts"] | None
) -> Float[Array, " ts"]:
    """Return the times for a solver of the probability flow.

    Raises:
        TypeError: for a solver with noise.
    """
    ts = _solver_times(solver, sde, ts)
    if solver.stochastic:
        raise TypeError(
            "`solver` must solve the probability flow, such as Heun(): a path with "
            f"noise cannot be run backwards. Got {solver!r}."
        )
    return ts


def _solver_times(solver: Solver, sde: SDE, ts: Array | None) -> Array:
    """Return the times for a solver; warn of steps at which it is unstable."""
    what = "a Solver object such as DPMSolverPP(order=2): a solver carries its options"
    check_kind("solver", solver, Solver, what)
    if ts is not None:
        check_numbers("ts", ts, "times of the noise process")
    ts = solver.default_times(sde) if ts is None else jnp.asarray(ts)
    check_times(ts, sde)
    if is_traced(ts):
        return ts
    with jax.ensure_compile_time_eval():  # ts is concrete even while the rest is traced
        stable = np.asarray(_stable(ts, solver=solver, sde=sde))
    if not stable.all():
        warn_caller(
            f"{int((~stable).sum())} of {len(stable)} steps are too long for "
            f"{solver!r} to be stable: errors may grow from step to step. Pass more "
            "times in `ts`, or a solver of lower order."
        )
    return ts


@partial(jax.jit, static_argnames=("solver", "sde"))
def _stable(ts: Array, *, solver: Solver, sde: SDE) -> Array:
    """Return for each step whether the solver is stable."""
    return solver.is_stable(sde.noise_level(ts))


def _run_in_blocks(
    keys: DrawKeys,
    score: DenoisingModel,
    ts: Array,
    context: Array | None,
    shape: tuple[int, ...],
    solver: Solver,
    denoise_last: bool,
    trajectory: bool,
) -> Solution:
    """Return what ``solve_compiled`` does, with a progress bar over blocks of steps."""
    num_steps = len(ts) - 1
    block = -(-num_steps // NUM_BLOCKS)
    first = state = integrate.draw_prior(keys, score, ts, context, solver=solver)
    parts = []
    with tqdm(total=num_steps) as bar:
        for done in range(0, num_steps, block):
            part = ts[done : done + block + 1]
            state, xs = integrate.integrate_grid(
                state,
                keys,
                score,
                part,
                context,
                done,
                solver=solver,
                trajectory=trajectory,
            )
            parts.append(xs)
            jax.block_until_ready(state)
            bar.update(len(part) - 1)
    solution = integrate.to_solution(
        state,
        score,
        ts[-1],
        context,
        shape=shape,
        solver=solver,
        num_steps=num_steps,
        denoise_last=denoise_last,
    )
    xs = jnp.concatenate(parts) if trajectory else None
    return solution._replace(
        trajectory=integrate.stack_trajectory(first, xs, score, ts[0], shape)
    )
