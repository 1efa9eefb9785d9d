r"""Exponential Adams methods: exact integration of an interpolated denoiser.

With :math:`\lambda = -\log\sigma` the reverse processes of noise rate :math:`\tau`,
all with the marginals of the forward process, are

.. math:: d\hat x = (1 + \tau^2)(D - \hat x)\, d\lambda
          + \sqrt{2}\, \tau \sigma\, dw .

The linear part is integrated exactly over a step h, with D replaced by the polynomial
through its latest values (Zhang and Chen 2023; Xue et al. 2023, "SA-Solver", eq. 13):

.. math:: \hat x' = e^{-rh} \hat x + \sum_j c_j D_j
          + \sigma' \sqrt{1 - e^{-2 \tau^2 h}}\, n, \qquad
          c_j = r \int_0^h e^{-r (h - s)} L_j(s)\, ds, \quad r = 1 + \tau^2,

with :math:`L_j` the Lagrange polynomials of the nodes. Order 1 with tau = 0 is DDIM.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.checks import is_integer
from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver, check_noise_rate
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar

# Gauss-Legendre nodes on a step: the error of the integral of r e^{-r(h - s)} is below
# (rh)^17 (8!)^4 / (17 (16!)^3), which is 4e-8 at rh = 8
NUM_NODES = 8


class History(NamedTuple):
    """Latest denoised points, newest first.

    - **denoised**: D at the latest ``order`` points; rows not yet filled are 0.
    - **log_levels**: their log noise levels.
    - **num_points**: number of points appended so far.
    """

    denoised: Float[Array, "order *event"]
    log_levels: Float[Array, " order"]
    num_points: Int[Array, ""]


def empty_history(x: Position, order: int) -> History:
    """Return a history of capacity ``order`` without points."""
    return History(
        jnp.zeros((order, *x.shape), x.dtype),
        jnp.zeros(order, x.dtype),
        jnp.zeros((), int),
    )


def append(history: History, denoised: Position, level: Scalar) -> History:
    """Return the history with a denoised point in front and the oldest removed."""
    return History(
        jnp.concatenate([denoised[None], history.denoised[:-1]]),
        jnp.concatenate([jnp.log(level)[None], history.log_levels[:-1]]),
        history.num_points + 1,
    )


def lagrange_basis(
    points: Float[Array, " points"],
    nodes: Float[Array, " order"],
    valid: Array,
) -> Float[Array, "order points"]:
    """Return L_j(points) for the valid nodes j, and 0 for the others.

    Example:
        >>> nodes, valid = jnp.array([0.0, -1.0]), jnp.array([True, True])
        >>> lagrange_basis(jnp.array([0.5]), nodes, valid)
        Array([[ 1.5],
               [-0.5]], dtype=float32)
    """
    same = jnp.eye(len(nodes), dtype=bool)
    use = valid[None, :] & ~same
    gaps = jnp.where(use, nodes[:, None] - nodes[None, :], 1.0)
    # ratios[j, i, p] = (point_p - node_i) / (node_j - node_i)
    ratios = (points[None, None, :] - nodes[None, :, None]) / gaps[..., None]
    product = jnp.where(use[..., None], ratios, 1.0).prod(1)
    return jnp.where(valid[:, None], product, 0.0)


def adams_coefficients(
    nodes: Float[Array, " order"], valid: Array, step: Scalar, rate: float
) -> Float[Array, " order"]:
    """Return c_j for nodes relative to the start of the step, in units of lambda."""
    points, mass = np.polynomial.legendre.leggauss(NUM_NODES)
    s = 0.5 * (points + 1) * step
    kernel = 0.5 * mass * step * rate * jnp.exp(-rate * (step - s))
    return lagrange_basis(jnp.asarray(s), nodes, valid) @ kernel


def adams_step(
    x: Position,
    history: History,
    level: Scalar,
    level_next: Scalar,
    *,
    order: int,
    noise: Position | None = None,
    noise_rate: float = 0.0,
) -> Position:
    """Return the point at ``level_next`` from the latest ``order`` denoised points.

    With a node at ``level_next`` this is the implicit rule (Adams-Moulton, corrector),
    otherwise the explicit one (Adams-Bashforth, predictor). While the history has fewer
    points the order is lower.

    Args:
        x: the point at ``level``.
        history: denoised points.
        level: noise level of ``x``.
        level_next: next noise level.
        order: largest number of points of the history to use.
        noise: standard normal draw of the shape of x; None for tau = 0.
        noise_rate: tau; 0 is the probability flow and 1 the reverse SDE.
    """
    step = jnp.log(level) - jnp.log(level_next)
    index = jnp.arange(len(history.log_levels))
    valid = (index < history.num_points) & (index < order)
    nodes = jnp.log(level) - history.log_levels
    rate = 1 + noise_rate**2
    c = adams_coefficients(nodes, valid, step, rate)
    x = jnp.exp(-rate * step) * x + jnp.tensordot(c, history.denoised, axes=1)
    if noise is None:
        return x
    noise_scale = jnp.sqrt(-jnp.expm1(-2 * noise_rate**2 * step))
    return x + level_next * noise_scale * noise


# Largest step h of log sigma at which the rule is stable on D = a x for a in [0, 1]: no
# root of its characteristic polynomial exceeds 1 in modulus. By a scan over a and h,
# which test_rules_are_stable_up_to_their_limit repeats. UniPC's is the same.
STABILITY_LIMIT = {1: jnp.inf, 2: jnp.inf, 3: 5.97, 4: 2.08}


@dataclass(frozen=True)
class _Multistep(Solver):
    """Exponential Adams-Bashforth rule for the flow; subclasses check their orders."""

    order: int

    def init(self, x: Position) -> Any:
        """Return a history without points."""
        return empty_history(x, self.order)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: Any,
    ) -> tuple[Position, Any]:
        """Take one exponential step with an extrapolated denoiser."""
        history = append(solver_state, denoise(x, level), level)
        return adams_step(x, history, level, level_next, order=self.order), history

    def is_stable(self, levels: Float[Array, " levels"]) -> Bool[Array, " steps"]:
        """Return which steps of log sigma are below ``STABILITY_LIMIT``."""
        return jnp.abs(jnp.diff(jnp.log(levels))) < STABILITY_LIMIT[self.order]


@dataclass(frozen=True)
class AdamsBashforth(_Multistep):
    r"""Exponential Adams-Bashforth in :math:`\log\sigma`, of order 1 to 4.

    The denoiser is replaced by the polynomial through its latest ``order`` values and
    the step is integrated exactly (Zhang and Chen 2023, "DEIS", eq. 14, here for the
    denoiser). Order 1 is DDIM. One evaluation per step. The first steps have fewer
    values and lower order; their error is small where sigma is far above the data's
    standard deviation, because the denoiser is nearly constant there.

    Args:
        order: 1 to 4. Order 4 needs more than 16 steps to be as accurate as order 3
            (docs/choosing-a-sampler.md).

    Raises:
        ValueError: for another order.

    Example:
        >>> AdamsBashforth(order=3).num_evaluations(20, ())
        20
    """

    order: int = 3

    def __post_init__(self) -> None:
        _check_order(self.order, 4, "higher ones are unstable at usual steps")


def _check_order(order: Any, highest: int, why: str) -> None:
    """Raise for orders of multistep rules that there are not."""
    if not is_integer(order) or not 1 <= order <= highest:
        raise ValueError(
            f"`order` must be an integer from 1 to {highest}: {why}. Got {order!r}."
        )


@dataclass(frozen=True)
class DPMSolverPP(_Multistep):
    """DPM-Solver++ multistep for the probability flow (Lu et al. 2022, algorithm 2).

    One evaluation per step, deterministic given the initial point. For stochastic
    sampling use :class:`DPMSolverSDE`.

    Args:
        order: 1 (DDIM), 2 (2M) or 3 (3M, with exact coefficients).

    Raises:
        ValueError: for another order.

    Example:
        >>> DPMSolverPP(order=2)
        DPMSolverPP(order=2)
    """

    order: int = 2

    def __post_init__(self) -> None:
        _check_order(self.order, 3, "these are the multistep rules implemented")

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: History,
    ) -> tuple[Position, History]:
        """Take one exponential step with an extrapolated denoiser."""
        if self.order != 2:
            return super().step(key, x, level, level_next, denoise, solver_state)
        history = append(solver_state, denoise(x, level), level)
        step = jnp.log(level) - jnp.log(level_next)
        # without an earlier point the first step is of order 1
        first = solver_state.num_points == 0
        previous = jnp.where(first, 1.0, solver_state.log_levels[0] - jnp.log(level))
        ratio = jnp.where(first, 0.0, step / previous)
        newest, before = history.denoised
        target = newest + 0.5 * ratio * (newest - before)
        return jnp.exp(-step) * x - jnp.expm1(-step) * target, history


class UniPCState(NamedTuple):
    """The last corrected point, its noise level, and the denoised points."""

    x: Position
    level: Scalar
    history: History


@dataclass(frozen=True)
class UniPC(_Multistep):
    r"""Unified predictor-corrector of order p + 1 (Zhao et al. 2023, algorithm 1).

    An exponential Adams-Bashforth step of order p predicts the next point. The
    evaluation there also gives an Adams-Moulton step with p + 1 nodes, which corrects
    that point before the next prediction. Coefficients are exact (their "varying"
    variant), so the order is p + 1. One evaluation per step. The last point is not
    corrected, as in the paper.

    Args:
        order: p, the order of the predictor: 1, 2 or 3.

    Raises:
        ValueError: for another order.

    Example:
        >>> UniPC(order=2)
        UniPC(order=2)
    """

    order: int = 2

    def __post_init__(self) -> None:
        _check_order(self.order, 3, "the corrector has one order more")

    def init(self, x: Position) -> UniPCState:
        """Return a state without points."""
        history = empty_history(x, self.order + 1)
        return UniPCState(x, jnp.ones((), x.dtype), history)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: UniPCState,
    ) -> tuple[Position, UniPCState]:
        """Correct the predicted point, then predict the next."""
        history = append(solver_state.history, denoise(x, level), level)
        corrected = adams_step(
            solver_state.x, history, solver_state.level, level, order=self.order + 1
        )
        x = jnp.where(solver_state.history.num_points == 0, x, corrected)
        x_next = adams_step(x, history, level, level_next, order=self.order)
        return x_next, UniPCState(x, jnp.asarray(level, x.dtype), history)


@dataclass(frozen=True)
class DPMSolverSDE(Solver):
    r"""Exponential Adams steps of the reverse SDE (Lu et al. 2022; Xue et al. 2023).

    .. math:: \hat x' = e^{-rh} \hat x + \sum_j c_j D_j
              + \sigma' \sqrt{1 - e^{-2 \tau^2 h}}\, n, \qquad r = 1 + \tau^2

    One evaluation per step. The noise has its exact variance; the denoiser is
    interpolated along the path. Order 1 with tau = 1 is ancestral sampling (DDPM), of
    weak order 1. Orders 2 and 3 have weak order 2, order 3 with a smaller constant.

    Args:
        order: number of interpolated denoised values: 1, 2 or 3.
        noise_rate: tau; 1 is the reverse SDE, smaller values have less noise.

    Raises:
        ValueError: for another order or a noise rate that is not positive.

    Example:
        >>> DPMSolverSDE(order=3).num_evaluations(40, ())
        40
    """

    stochastic: ClassVar[bool] = True

    order: int = 3
    noise_rate: float = 1.0

    def __post_init__(self) -> None:
        _check_order(self.order, 3, "more values of a noisy path do not help")
        check_noise_rate(self.noise_rate)

    def init(self, x: Position) -> History:
        """Return a history without points."""
        return empty_history(x, self.order)

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: History,
    ) -> tuple[Position, History]:
        """Take one exponential step with an extrapolated denoiser and noise."""
        history = append(solver_state, denoise(x, level), level)
        x = adams_step(
            x,
            history,
            level,
            level_next,
            order=self.order,
            noise=jax.random.normal(key, x.shape, x.dtype),
            noise_rate=self.noise_rate,
        )
        return x, history

    def default_times(self, sde: SDE) -> Float[Array, " ts"]:
        """Return 40 geometric steps (docs/choosing-a-sampler.md: at the floor)."""
        return default_times(sde, 40)
