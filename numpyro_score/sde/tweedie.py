r"""Conversions between score, denoiser and expected noise.

With :math:`x_t = \alpha x_0 + \sigma n` and the denoiser
:math:`D(x_t, t) = E[x_0 | x_t]`, Tweedie's formula (Robbins 1956; Efron 2011) is

.. math:: \nabla \log p_t(x_t) = \frac{\alpha D - x_t}{\sigma^2}.
"""

from numpyro_score.sde.base import Marginal
from numpyro_score.typing import Position


def score_from_denoised(
    x: Position, denoised: Position, marginal: Marginal
) -> Position:
    """Return (alpha D - x) / sigma^2, Tweedie's formula.

    Example:
        >>> import jax.numpy as jnp
        >>> float(score_from_denoised(jnp.array(2.0), jnp.array(1.0), Marginal(1, 1)))
        -1.0
    """
    alpha, sigma = marginal
    return (alpha * denoised - x) / sigma**2


def denoised_from_score(x: Position, score: Position, marginal: Marginal) -> Position:
    """Return (x + sigma^2 s) / alpha, the inverse of Tweedie's formula.

    Example:
        >>> import jax.numpy as jnp
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
        >>> import jax.numpy as jnp
        >>> float(noise_from_denoised(jnp.array(2.0), jnp.array(1.0), Marginal(1, 1)))
        1.0
    """
    alpha, sigma = marginal
    return (x - alpha * denoised) / sigma
