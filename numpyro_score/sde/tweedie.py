r"""Score, denoiser, noise and velocity: four names for one function.

With :math:`x_t = \alpha x_0 + \sigma n` and the denoiser
:math:`D(x_t, t) = E[x_0 | x_t]`, Tweedie's formula (Robbins 1956; Efron 2011) says

.. math:: \nabla \log p_t(x_t) = \frac{\alpha D - x_t}{\sigma^2}.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from numpyro_score.sde.base import Marginal
from numpyro_score.typing import Position, Real, Scalar


def score_from_denoised(
    x: Position, denoised: Position, marginal: Marginal
) -> Position:
    """Return (alpha D - x) / sigma^2, Tweedie's formula.

    Example:
        >>> float(score_from_denoised(jnp.array(2.0), jnp.array(1.0), Marginal(1, 1)))
        -1.0
    """
    alpha, sigma = marginal
    return (alpha * denoised - x) / sigma**2


def denoised_from_score(x: Position, score: Position, marginal: Marginal) -> Position:
    """Return (x + sigma^2 s) / alpha, the inverse of Tweedie's formula.

    Example:
        >>> float(denoised_from_score(jnp.array(2.0), jnp.array(-1.0), Marginal(1, 1)))
        1.0
    """
    alpha, sigma = marginal
    return (x + sigma**2 * score) / alpha


def noise_from_denoised(
    x: Position, denoised: Position, marginal: Marginal
) -> Position:
    """Return (x - alpha D) / sigma, the expected noise; it equals -sigma s.

    Example:
        >>> float(noise_from_denoised(jnp.array(2.0), jnp.array(1.0), Marginal(1, 1)))
        1.0
    """
    alpha, sigma = marginal
    return (x - alpha * denoised) / sigma


class Preconditioning(NamedTuple):
    """Coefficients of D(x, sigma) = skip x + out F(input x, noise)."""

    skip: Real
    out: Real
    input: Real
    noise: Real


SIGMA_SCORE = 0.1  # noise level, in data sd, below which the net's output is a score


def preconditioning(noise_level: Real | float) -> Preconditioning:
    r"""Return the coefficients of Karras et al. 2022 with a bounded score.

    For data of unit sd, c_skip, c_in and c_noise are those of their table 1. Their
    c_out, :math:`\sigma / \sqrt{1 + \sigma^2}`, makes F the noise, so an error of F
    enters the score divided by sigma. The factor
    :math:`\sigma / \sqrt{\sigma^2 + \sigma_s^2}` leaves F the noise above
    :math:`\sigma_s` and makes it the score below, where the score has a limit that the
    net carries over from higher levels.

    Example:
        >>> round(float(preconditioning(2.0).skip), 3)
        0.2
    """
    level = jnp.asarray(noise_level)
    norm = jnp.sqrt(1 + level**2)
    return Preconditioning(
        skip=1 / norm**2,
        out=level / norm * level / jnp.sqrt(level**2 + SIGMA_SCORE**2),
        input=1 / norm,
        noise=jnp.log(level) / 4,
    )


def edm_weight(noise_level: Real) -> Real:
    r"""Return :math:`(1 + \sigma^2) / \sigma^2`, the weight of unit noise error.

    The error :math:`(D - x_0)^2` of a denoiser falls as sigma squared for small sigma
    and tends to the variance of the data for large; the weight makes all levels count
    alike (Karras et al. 2022, eq. 8, for data of unit sd).

    Example:
        >>> float(edm_weight(jnp.array(1.0)))
        2.0
    """
    return 1 + 1 / jnp.square(noise_level)


def precondition(
    net_fn: Callable[[Position, Scalar], Position],
    x: Position,
    noise_level: Scalar,
    coefficients: Callable[[Scalar], Preconditioning] = preconditioning,
) -> Position:
    """Return the denoiser D(x, level) made from a raw net F(input, noise)."""
    c = coefficients(noise_level)
    return c.skip * x + c.out * net_fn(c.input * x, c.noise)
