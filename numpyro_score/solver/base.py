r"""The interface of a reverse-time integrator, and the scan over its steps.

State and denoiser are in the coordinates :math:`\hat x = u_t / \alpha(t)`, with u the
standardized data, at the noise level :math:`\sigma(t)/\alpha(t)`, written
:math:`\sigma` in the formulas of this package. In these coordinates every process is
variance exploding and the probability flow is
:math:`d\hat x / d\log\sigma = \hat x - D(\hat x, \sigma)`
(Karras et al. 2022, eq. 4, divided by :math:`\alpha`).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.checks import check_positive
from numpyro_score.sde import SDE
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar

BATCH_AXIS = "draws"  # name of the vmapped axis, for means over all draws
# applications of the denoiser to find the mean: (s^2 / (s^2 + sigma^2))^3 is missing
NUM_CENTERINGS = 3


class Solver(ABC):
    """A reverse-time integrator: base class of frozen dataclasses of its options.

    Subclasses define ``step`` for one point, and ``init`` where steps carry a state;
    batches are vmapped. The class variable ``stochastic`` is True if ``step`` uses its
    key.

    Example:
        >>> from numpyro_score import VE, ScoreModel
        >>> from numpyro_score.solver import sample
        >>> class FirstOrder(Solver):
        ...     def step(self, key, x, level, level_next, denoise, solver_state):
        ...         denoised = denoise(x, level)
        ...         return denoised + level_next / level * (x - denoised), solver_state
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> sample(jax.random.key(0), score, (3,), solver=FirstOrder()).shape
        (3, 2)
    """

    stochastic: ClassVar[bool] = False

    def init(self, x: Position) -> Any:
        """Return the solver's own state before the first step; empty by default."""
        return ()

    @abstractmethod
    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: Any,
    ) -> tuple[Position, Any]:
        """Return the point at ``level_next`` and the solver's new state.

        Args:
            key: random key; unused unless ``stochastic``.
            x: the point at ``level``, standardized and divided by alpha.
            level: noise level sigma/alpha.
            level_next: next noise level; below ``level``, or above it to encode.
            denoise: D(x, level) for one point.
            solver_state: from ``init`` or the step before.
        """

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return the times used where the caller gives none."""
        return default_times(sde)

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Return for each step whether earlier errors are not amplified by it."""
        return jnp.ones(len(levels) - 1, bool)

    def num_evaluations(
        self, num_steps: int, solver_state: Any
    ) -> Int[Array, "..."] | int:
        """Return the number of denoiser evaluations per draw.

        ``num_steps`` times the calls in one traced step. Adaptive solvers override
        this by a count in their state.
        """
        calls = []

        def denoise(x: Position, level: Scalar) -> Position:
            calls.append(level)
            return x

        def step(x: Position) -> Position:
            key = jax.random.key(0)  # shapes only
            return self.step(key, x, 2.0, 1.0, denoise, self.init(x))[0]

        jax.eval_shape(jax.vmap(step, axis_name=BATCH_AXIS), jnp.zeros((1, 1)))
        return num_steps * len(calls)


def draw_start(
    key: PRNGKey, shape: tuple[int, ...], level: Scalar
) -> Float[Array, "..."]:
    """Return draws of N(0, 1 + level^2), where the reverse process starts.

    The law of unit-variance data plus noise of the highest level.

    Args:
        key: random key.
        shape: shape of the draws.
        level: the highest noise level.

    Example:
        >>> draw_start(jax.random.key(0), (3, 2), 20.0).shape
        (3, 2)
    """
    return jnp.sqrt(1 + jnp.square(level)) * jax.random.normal(key, shape)


def start_center(
    denoise: DenoiseFn, shape: tuple[int, ...], level: Scalar
) -> Float[Array, "*event"]:
    r"""Return about the mean of the data, D(D(D(0))), around which draws start.

    For normal data of mean m and variance :math:`s^2` this is :math:`(1 - k^3) m`, with
    :math:`k = s^2 / (s^2 + \sigma^2)`, small where the level hides the data: .002 m is
    missing where the level is 2.6 sd of the data.

    Args:
        denoise: D(x, level) for one point.
        shape: shape of one point.
        level: the highest noise level.

    Example:
        >>> normal = lambda x, level: (x + 5.0 * level**2) / (1 + level**2)
        >>> round(float(start_center(normal, (), 20.0)), 3)
        5.0
    """
    center = jnp.zeros(shape)
    for _ in range(NUM_CENTERINGS):
        center = denoise(center, level)
    return center


class SolverState(NamedTuple):
    """State of the integration of a batch of draws.

    - **x**: points, standardized and divided by alpha.
    - **solver_state**: the solver's own state, one per draw.
    - **failed_step**: index of the first step that returned NaN or inf; -1 for none.
    """

    x: Float[Array, "draws *event"]
    solver_state: Any
    failed_step: Int[Array, " draws"]


def init_state(solver: Solver, x: Float[Array, "draws *event"]) -> SolverState:
    """Return the state before the first step."""
    return SolverState(x, jax.vmap(solver.init)(x), jnp.full(len(x), -1))


def integrate_steps(
    state: SolverState,
    keys: PRNGKey,
    denoise: DenoiseFn,
    levels: Float[Array, " levels"],
    solver: Solver,
    *,
    signs: Float[Array, " draws"] | None = None,
    first_step: Int[Array, ""] | int = 0,
    trajectory: bool = False,
) -> tuple[SolverState, Float[Array, "steps draws *event"] | None]:
    """Return the state at the last of ``levels``, by one scan over the steps.

    Args:
        state: from :func:`init_state`, or from the preceding part of the grid.
        keys: one key per draw; step i uses ``fold_in(key, i)``.
        denoise: D(x, level) for one point.
        levels: noise levels, the whole grid or a part of it.
        solver: the integrator.
        signs: +1 or -1 per draw; -1 changes the sign of all noise (antithetic
            draws). None for +1.
        first_step: number of steps already taken.
        trajectory: whether to return the points after every step too.

    Returns:
        The state, and the points after every step or None.
    """

    def one(
        key: PRNGKey, sign: Scalar | None, x: Position, solver_state: Any, step: tuple
    ) -> tuple[Position, Any]:
        index, level, level_next = step
        key = jax.random.fold_in(key, index)
        if sign is None:
            return solver.step(key, x, level, level_next, denoise, solver_state)
        # x with noise -n equals -x' with x' a draw of the reflected law with noise n
        reflected = lambda x, level: sign * denoise(sign * x, level)  # noqa: E731
        x, solver_state = solver.step(
            key, sign * x, level, level_next, reflected, solver_state
        )
        return sign * x, solver_state

    def body(state: SolverState, step: tuple) -> tuple[SolverState, Array | None]:
        many = jax.vmap(one, in_axes=(0, 0, 0, 0, None), axis_name=BATCH_AXIS)
        x, solver_state = many(keys, signs, state.x, state.solver_state, step)
        finite = jnp.isfinite(x).reshape(len(x), -1).all(1)
        new = ~finite & (state.failed_step < 0)
        failed_step = jnp.where(new, step[0], state.failed_step)
        return SolverState(x, solver_state, failed_step), x if trajectory else None

    indices = first_step + jnp.arange(len(levels) - 1)
    return jax.lax.scan(body, state, (indices, levels[:-1], levels[1:]))


def integrate_levels(
    keys: PRNGKey,
    denoise: DenoiseFn,
    x: Float[Array, "draws *event"],
    levels: Float[Array, " levels"],
    solver: Solver,
) -> Float[Array, "draws *event"]:
    """Return a batch of points integrated from the first to the last noise level.

    Args:
        keys: one key per point.
        denoise: D(x, level) for one point.
        x: points at ``levels[0]``.
        levels: noise levels.
        solver: the integrator.

    Example:
        >>> from numpyro_score.solver.runge_kutta import Euler
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> normal = lambda x, level: x / (1 + level**2)
        >>> x = 10.0 * jnp.ones((3, 1))
        >>> levels = jnp.geomspace(10.0, 0.1, 500)
        >>> out = integrate_levels(keys, normal, x, levels, Euler())
        >>> bool(abs(out[0, 0] - 1.0) < 0.02)
        True
    """
    return integrate_steps(init_state(solver, x), keys, denoise, levels, solver)[0].x


def check_noise_rate(noise_rate: float) -> None:
    """Raise unless the noise rate is positive."""
    why = "1 for the reverse SDE; without noise use a solver of the probability flow"
    check_positive("noise_rate", noise_rate, why)
