r"""Conversions between score, denoiser and expected noise.

With :math:`x_t = \alpha x_0 + \sigma n` and the denoiser
:math:`D(x_t, t) = E[x_0 | x_t]`, Tweedie's formula (Robbins 1956; Efron 2011) is

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
    """Return (x - alpha D) / sigma = -sigma s, the expected noise.

    Example:
        >>> float(noise_from_denoised(jnp.array(2.0), jnp.array(1.0), Marginal(1, 1)))
        1.0
    """
    alpha, sigma = marginal
    return (x - alpha * denoised) / sigma


class Preconditioning(NamedTuple):
    """Coefficients of D(x, r) = skip x + out F(input x, noise) at noise level r."""

    skip: Real
    out: Real
    input: Real
    noise: Real


SIGMA_SCORE = 0.1  # noise level, in data sd, at which F goes from noise to score


def preconditioning(noise_level: Real | float) -> Preconditioning:
    r"""Return the coefficients of Karras et al. 2022 with a bounded score.

    For data of unit sd, c_skip, c_in and c_noise are those of their table 1. Their
    c_out, :math:`\sigma / \sqrt{1 + \sigma^2}`, makes F an estimate of the noise, whose
    error enters the score divided by sigma. With the factor
    :math:`\sigma / \sqrt{\sigma^2 + \sigma_s^2}`, F estimates the noise above
    :math:`\sigma_s` and the score below, which is bounded as sigma tends to 0.

    Args:
        noise_level: sigma/alpha, in units of the data's sd.

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
    r"""Return :math:`(1 + \sigma^2) / \sigma^2`, the EDM weight of a noise level.

    The minimal error :math:`E (D - x_0)^2` of Gaussian data of unit sd is
    :math:`\sigma^2 / (1 + \sigma^2)`; multiplied by the weight it is 1 at every level
    (Karras et al. 2022, eq. 8).

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
    """Return D(x, r) = skip x + out F(input x, noise) with the coefficients at r."""
    c = coefficients(noise_level)
    return c.skip * x + c.out * net_fn(c.input * x, c.noise)
