r"""Adaptive step sizes by diffrax, with the logarithm of the noise level as time.

Within one interval of the grid, by default the whole range,
:math:`s = \log\sigma_0 - \log\sigma` is integrated from 0 to the interval's length.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import lineax  # type: ignore[import-untyped]
from jaxtyping import Array, Float, Int

from numpyro_score.checks import check_count, check_flags, check_kind, check_positive
from numpyro_score.sde import SDE
from numpyro_score.solver.base import BATCH_AXIS, Solver, check_noise_rate
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Real, Scalar


def _batch_rms_norm(error: Real) -> Scalar:
    """Return the root mean square over all coordinates of all draws."""
    return jnp.sqrt(jax.lax.pmean(jnp.mean(jnp.square(error)), BATCH_AXIS))


def _rms_norm(error: Real) -> Scalar:
    """Return the root mean square over the coordinates of one draw."""
    return jnp.sqrt(jnp.mean(jnp.square(error)))


class _Counting(Solver):
    """A solver that chooses its steps, and has its number of evaluations as state."""

    def init(self, x: Position) -> Int[Array, ""]:
        """Return a count of 0 evaluations."""
        return jnp.zeros((), int)

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return the first and the last time: the controller chooses the steps."""
        return default_times(sde, 1)

    def num_evaluations(
        self, num_steps: int, solver_state: Any
    ) -> Int[Array, "..."] | int:
        """Return the count of each draw."""
        return solver_state


@dataclass(frozen=True)
class Adaptive(_Counting):
    r"""An adaptive solver of the probability flow, with a PID controller.

    Integrates :math:`dx/d\lambda = D - x` by any Runge-Kutta solver of diffrax. With
    shared steps the error norm is a mean over all draws: fewest evaluations where draws
    run in parallel, but a draw depends on the others. With steps of its own a draw is
    independent of the others. A draw that needs more than ``max_steps`` steps becomes
    NaN and is recorded in ``failed_step``. Evaluations are stages times steps, rejected
    ones included; iterations of implicit solvers are not counted.

    Args:
        method: a diffrax solver: Tsit5(), Dopri5(), or Kvaerno5() for stiff scores.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in standard deviations of the data.
        shared_steps: whether all draws take the same steps.
        max_steps: largest number of steps per interval of the grid.

    Raises:
        ValueError: for tolerances or a number of steps that are not positive.

    Example:
        >>> Adaptive(rtol=1e-3, atol=1e-3).shared_steps
        True
    """

    method: diffrax.AbstractAdaptiveSolver = field(default_factory=diffrax.Tsit5)
    rtol: float = 1e-2
    atol: float = 1e-2
    shared_steps: bool = True
    max_steps: int = 1000

    def __post_init__(self) -> None:
        _check_tolerances(self.rtol, self.atol, self.max_steps)
        check_flags(shared_steps=self.shared_steps)
        kind = "an adaptive method of diffrax, such as diffrax.Tsit5()"
        check_kind("method", self.method, diffrax.AbstractAdaptiveSolver, kind)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: Int[Array, ""],
    ) -> tuple[Position, Int[Array, ""]]:
        """Integrate over one interval of the grid."""

        def slope(s: Any, x: Position, _: None) -> Position:
            return denoise(x, level * jnp.exp(-s)) - x

        x, num_steps = adaptive_solve(
            diffrax.ODETerm(slope),
            self.method,
            x,
            jnp.log(level) - jnp.log(level_next),
            diffrax.PIDController(
                rtol=self.rtol,
                atol=self.atol,
                pcoeff=0.4,  # diffrax's docstring, for error estimates that do not
                icoeff=0.3,  # vary smoothly
                norm=_batch_rms_norm if self.shared_steps else _rms_norm,
            ),
            self.max_steps,
        )
        return x, solver_state + num_steps * num_stages(self.method)


@dataclass(frozen=True)
class AdaptiveSDE(_Counting):
    r"""An adaptive solver of the reverse SDE with noise rate tau.

    .. math:: d\hat x = (1 + \tau^2)(D - \hat x)\, d\lambda
              + \sqrt 2\, \tau \sigma\, dw

    has additive noise, so that ShARK of diffrax has strong order 1.5 and an error
    estimate (Foster et al. 2024); rejected steps are refined on a virtual Brownian
    tree. Each draw has its own steps, because the error estimate is that of one path.
    For reference runs, or a tolerance along each path; for draws alone
    :class:`~numpyro_score.solver.multistep.DPMSolverSDE` needs far fewer evaluations.

    Args:
        noise_rate: tau; 1 is the reverse SDE, smaller values have less noise.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in standard deviations of the data.
        max_steps: largest number of steps per interval of the grid.

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> AdaptiveSDE(atol=0.01).stochastic
        True
    """

    stochastic: ClassVar[bool] = True

    noise_rate: float = 1.0
    rtol: float = 1e-2
    atol: float = 1e-2
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        _check_tolerances(self.rtol, self.atol, self.max_steps)
        check_noise_rate(self.noise_rate)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: Int[Array, ""],
    ) -> tuple[Position, Int[Array, ""]]:
        """Integrate over one interval of the grid."""
        length = jnp.log(level) - jnp.log(level_next)
        tau = self.noise_rate

        def drift(s: Any, x: Position, _: None) -> Position:
            return (1 + tau**2) * (denoise(x, level * jnp.exp(-s)) - x)

        def diffusion(s: Any, x: Position, _: None) -> lineax.DiagonalLinearOperator:
            noise_scale = jnp.sqrt(2.0) * tau * level * jnp.exp(-s)
            return lineax.DiagonalLinearOperator(jnp.full_like(x, noise_scale))

        brownian = diffrax.VirtualBrownianTree(
            0.0,
            length,
            tol=length / 2**15,  # half of dtmin below
            shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            key=key,
            levy_area=diffrax.SpaceTimeLevyArea,
        )
        x, num_steps = adaptive_solve(
            diffrax.MultiTerm(
                diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, brownian)
            ),
            diffrax.ShARK(),
            x,
            length,
            diffrax.PIDController(
                rtol=self.rtol, atol=self.atol, norm=_rms_norm, dtmin=length / 2**14
            ),
            self.max_steps,
        )
        return x, solver_state + 2 * num_steps  # ShARK has two stages


def adaptive_solve(
    terms: Any,
    method: diffrax.AbstractSolver,
    x: Position,
    length: Scalar,
    controller: diffrax.PIDController,
    max_steps: int,
) -> tuple[Position, Int[Array, ""]]:
    """Return the point at s = ``length``, NaN after ``max_steps``, and the steps."""
    solution = diffrax.diffeqsolve(
        terms,
        method,
        t0=jnp.zeros(()),
        t1=length,
        dt0=None,
        y0=x,
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t1=True),
        max_steps=max_steps,
        throw=False,
    )
    solved = solution.result == diffrax.RESULTS.successful
    x = jnp.where(solved, jnp.asarray(solution.ys)[0], jnp.nan)
    return x, jnp.asarray(solution.stats["num_steps"], int)


def num_stages(method: diffrax.AbstractSolver) -> int:
    """Return evaluations per step: stages, less one if the last is reused (FSAL)."""
    tableau = getattr(method, "tableau", None)
    if tableau is None:
        return 1
    return tableau.num_stages - bool(tableau.fsal)


def _check_tolerances(rtol: float, atol: float, max_steps: int) -> None:
    """Raise unless tolerances and the number of steps are positive."""
    check_positive("rtol", rtol, "the error of a step, relative to the point")
    check_positive("atol", atol, "the error of a step")
    check_count("max_steps", max_steps, "a bound of the cost")
