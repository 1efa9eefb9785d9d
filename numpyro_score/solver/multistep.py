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

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_score.typing import Position, Scalar

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
    spread = jnp.sqrt(-jnp.expm1(-2 * noise_rate**2 * step))
    return x + level_next * spread * noise
