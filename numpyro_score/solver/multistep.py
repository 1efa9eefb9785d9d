r"""Exponential Adams steps: exact integration of an interpolated denoiser.

With :math:`\lambda = -\log\sigma` and noise rate :math:`\tau` all reverse processes
with the right marginals are

.. math:: d\hat x = (1 + \tau^2)(D - \hat x)\, d\lambda
          + \sqrt{2}\, \tau \sigma\, dw .

The linear part is solved exactly and D is replaced by the polynomial through its last
values, over a step h (Xue et al. 2023, "SA-Solver", eq. 13; Zhang and Chen 2023):

.. math:: \hat x' = e^{-rh} \hat x + \sum_j c_j D_j
          + \sigma' \sqrt{1 - e^{-2 \tau^2 h}}\, n, \qquad
          c_j = r \int_0^h e^{-r (h - s)} L_j(s)\, ds, \quad r = 1 + \tau^2,

with :math:`L_j` the Lagrange polynomials of the nodes. Order 1 without noise is DDIM.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.sde import SDE
from numpyro_score.solver.base import Solver, check_noise_rate
from numpyro_score.solver.grid import default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Scalar

NUM_NODES = 8  # Gauss-Legendre nodes: exact to rounding for r h up to about 8


class History(NamedTuple):
    """The last denoised points, newest first, and how many there are so far."""

    denoised: Float[Array, "order *event"]
    log_levels: Float[Array, " order"]
    num_points: Int[Array, ""]


def empty_history(x: Position, order: int) -> History:
    """Return a history with room for ``order`` points."""
    return History(
        jnp.zeros((order, *x.shape), x.dtype),
        jnp.zeros(order, x.dtype),
        jnp.zeros((), int),
    )


def append(history: History, denoised: Position, level: Scalar) -> History:
    """Put a denoised point in front; the oldest falls out."""
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
    """Return the Lagrange polynomials of the valid nodes at ``points``; others are 0.

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
    """Return c_j for nodes given relative to the start of the step."""
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
    """Step from ``level`` to ``level_next`` with the newest ``order`` denoised points.

    A node at ``level_next`` makes this a corrector (Adams-Moulton), otherwise it is a
    predictor (Adams-Bashforth). While the history is shorter, so is the rule.

    Args:
        x: the point at ``level``.
        history: denoised points.
        level: noise level of ``x``.
        level_next: noise level to reach.
        order: how many points of the history to use at most.
        noise: standard normal numbers, for a noise rate above 0.
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


# Largest step h of log sigma at which the rule is stable on D = a x for 0 <= a <= 1
# (largest root of its characteristic polynomial at most 1), found by scanning a and h.
STABILITY_LIMIT = {1: jnp.inf, 2: jnp.inf, 3: 6.3, 4: 2.1}


@dataclass(frozen=True)
class _Multistep(Solver):
    """An exponential Adams-Bashforth rule of the flow; members choose their orders."""

    order: int

    def init(self, x: Position) -> Any:
        """Return an empty history."""
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
        """Return which steps of log sigma are stable on linear denoisers."""
        return jnp.abs(jnp.diff(jnp.log(levels))) < STABILITY_LIMIT[self.order]


@dataclass(frozen=True)
class AdamsBashforth(_Multistep):
    r"""Exponential Adams-Bashforth in :math:`\log\sigma`, of order 1 to 4.

    The denoiser is replaced by the polynomial through its last ``order`` values and the
    rest is integrated exactly (Zhang and Chen 2023, "DEIS", eq. 14, here for the
    denoiser). Order 1 is DDIM. One evaluation per step. The first steps have a shorter
    history and lower order, which is harmless where sigma is far above the data's
    scale, since the denoiser hardly changes there.

    Args:
        order: 1 to 4. Order 4 wants about 16 steps or more.

    Raises:
        ValueError: for another order.

    Example:
        >>> AdamsBashforth(order=3).num_evaluations(20, ())
        20
    """

    order: int = 3

    def __post_init__(self) -> None:
        if self.order not in STABILITY_LIMIT:
            raise ValueError(
                "`order` must be 1, 2, 3 or 4: higher multistep rules are unstable at "
                f"the steps that are used. Got {self.order}."
            )


@dataclass(frozen=True)
class DPMSolverPP(_Multistep):
    """DPM-Solver++ multistep for the probability flow, one evaluation per step.

    Deterministic given the start. Not for stochastic sampling.

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
        if self.order not in (1, 2, 3):
            raise ValueError(
                "`order` must be 1, 2 or 3: these are the multistep rules implemented. "
                f"Got {self.order}."
            )

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
        # the first step has no history and is first order
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

    An exponential Adams-Bashforth step of order p predicts the next point; the one
    evaluation there corrects that point by an Adams-Moulton step with p + 1 nodes,
    before the next prediction. Coefficients are exact (their "varying" variant), so p
    + 1 is the order of the whole. One evaluation per step. The last point is predicted
    only, as in the paper.

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
        if self.order not in (1, 2, 3):
            raise ValueError(
                "`order` must be 1, 2 or 3: it is the order of the predictor, one "
                f"below that of the corrector. Got {self.order}."
            )

    def init(self, x: Position) -> UniPCState:
        """Start without a history."""
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
        """Correct the point that was predicted, then predict the next."""
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

    One evaluation per step. The noise is exact, and the denoiser is interpolated along
    the path. Order 1 with tau = 1 is ancestral sampling (DDPM), of weak order 1. Orders
    2 and 3 have weak order 2; order 3 lowers the constant.

    Args:
        order: how many denoised values are interpolated: 1, 2 or 3.
        noise_rate: tau; 1 is the reverse SDE, smaller is closer to the flow.

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
        if self.order not in (1, 2, 3):
            raise ValueError(
                "`order` must be 1, 2 or 3: more values of a noisy path do not help. "
                f"Got {self.order}."
            )
        check_noise_rate(self.noise_rate)

    def init(self, x: Position) -> History:
        """Start without a history."""
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
        """Take one step with an extrapolated denoiser and fresh noise."""
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
        """Return 40 geometric steps."""
        return default_times(sde, 40)
