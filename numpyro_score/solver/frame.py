r"""The frame that runs any solver: noise to data in one compiled scan.

Solvers work on :math:`\hat x = u_t / \alpha(t)` at the noise level
:math:`\sigma(t)/\alpha(t)`, where u is standardized data. There every process is
variance exploding and the probability flow is
:math:`d\hat x / d\log\sigma = \hat x - D(\hat x, \sigma)` (Karras et al. 2022).
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.schedule import geometric
from numpyro_score.sde import SDE
from numpyro_score.standardize import Affine
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar

DEFAULT_NUM_STEPS = 32


class Solver(ABC):
    """One reverse-time integrator: a frozen dataclass of its options."""

    @abstractmethod
    def init(self, x: Position) -> Any:
        """Return what the solver remembers before the first step."""

    @abstractmethod
    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        memory: Any,
    ) -> tuple[Position, Any]:
        """Move one point from ``level`` to the lower ``level_next``."""


@runtime_checkable
class Denoises(Protocol):
    """What :func:`sample` needs of a score model."""

    @property
    def sde(self) -> SDE:
        """The process."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one point."""

    @property
    def standardize(self) -> Affine:
        """The map to the unit scale."""

    def denoise_level(self, x: Position, level: Scalar, context: Any) -> Position:
        """Return D(x, level) in standardized coordinates."""


def default_times(sde: SDE, num_steps: int = DEFAULT_NUM_STEPS) -> Float[Array, " ts"]:
    """Return ``num_steps`` + 1 decreasing times whose noise levels are geometric."""
    return sde.time(geometric(sde.sigma_min, sde.sigma_max, num_steps + 1))


def sample(
    key: PRNGKey,
    score: Denoises,
    shape: tuple[int, ...] = (),
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
) -> Float[Array, "*batch"]:
    r"""Draw ``shape`` points from the law at the last time of ``ts``.

    Starts from the process's prior at ``ts[0]`` and returns physical units. The draws
    keep the noise of ``ts[-1]``, by default the lowest level of the process.

    Args:
        key: random key.
        score: a score model.
        shape: batch shape of the draws.
        solver: the integrator.
        ts: decreasing times; None for 32 steps with geometric noise levels.
        context: what the score is conditioned on, one for all draws.

    Returns:
        Draws of shape ``shape + event_shape``.

    Raises:
        TypeError: if ``solver`` is not a :class:`Solver`.
        ValueError: if ``ts`` has fewer than two times or increases.
        FloatingPointError: if a draw is not finite.
    """
    if not isinstance(solver, Solver):
        raise TypeError(
            "`solver` must be a Solver object such as DPMSolverPP(order=2): a solver "
            f"carries its options. Got {solver!r}."
        )
    ts = default_times(score.sde) if ts is None else jnp.asarray(ts)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(
            "`ts` must list at least two decreasing times: one step needs a start and "
            f"an end. Got shape {ts.shape}."
        )
    if not isinstance(ts, jax.core.Tracer) and (jnp.diff(ts) > 0).any():
        raise ValueError(
            "`ts` must decrease: the solver runs from noise to data. "
            f"Got {ts[0]}, ..., {ts[-1]}."
        )
    draws = _sample(key, score, ts, context, shape=tuple(shape), solver=solver)
    if not isinstance(draws, jax.core.Tracer) and not jnp.isfinite(draws).all():
        bad = int((~jnp.isfinite(draws)).sum())
        raise FloatingPointError(
            "The draws are not finite: the score returned NaN or inf, or the steps are "
            "too large for the solver. Check the score, or pass more times in `ts`. "
            f"Numbers that are not finite: {bad} of {draws.size}."
        )
    return draws


@partial(jax.jit, static_argnames=("shape", "solver"))
def _sample(
    key: PRNGKey,
    score: Denoises,
    ts: Array,
    context: Array | None,
    *,
    shape: tuple[int, ...],
    solver: Solver,
) -> Array:
    """Run the scan; one program per batch shape, solver and number of times."""
    size = 1
    for length in shape:
        size *= length
    levels = score.sde.noise_level(ts)

    def one(key: PRNGKey) -> Position:
        key_start, key_steps = jax.random.split(key)
        start = jnp.sqrt(1 + levels[0] ** 2)
        x = start * jax.random.normal(key_start, score.event_shape)
        x = integrate(
            key_steps,
            lambda x, level: score.denoise_level(x, level, context),
            x,
            levels,
            solver,
        )
        return score.standardize.inverse(score.sde.alpha(ts[-1]) * x)

    draws = jax.vmap(one)(jax.random.split(key, size))
    return draws.reshape(*shape, *score.event_shape)


def integrate(
    key: PRNGKey,
    denoise: DenoiseFn,
    x: Position,
    levels: Float[Array, " levels"],
    solver: Solver,
) -> Position:
    """Carry one point down the grid of noise levels in one scan."""

    def body(carry: tuple[Position, Any], inputs: Any) -> tuple[Any, None]:
        x, memory = carry
        key, level, level_next = inputs
        return solver.step(key, x, level, level_next, denoise, memory), None

    keys = jax.random.split(key, len(levels) - 1)
    start = (x, solver.init(x))
    (x, _), _ = jax.lax.scan(body, start, (keys, levels[:-1], levels[1:]))
    return x
