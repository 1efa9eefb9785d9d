r"""Weights of :math:`(D - x_0)^2` over the noise levels.

The minimizer is the same for every positive weight; weights set the relative importance
of the levels. With r = sigma/alpha the error of the noise is that of D divided by r,
and that of the score of :math:`\hat x = x_t/\alpha` is that of D divided by
:math:`r^2`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from numpyro_score.sde import SDE
from numpyro_score.typing import Real


@runtime_checkable
class Weighting(Protocol):
    """Weight of noise levels; a frozen dataclass."""

    def __call__(self, levels: Real, sde: SDE) -> Real:
        """Return the weight of (D - x_0)^2 at each level."""


@dataclass(frozen=True)
class EDMWeight:
    r"""(1 + r^2) / r^2, for equal weight of all levels.

    The minimal error :math:`E (D - x_0)^2` for Gaussian data of unit sd is
    :math:`r^2 / (1 + r^2)`; weighted it is 1 at every level (Karras et al. 2022,
    eq. 8).

    Example:
        >>> from numpyro_score.sde import VE
        >>> float(EDMWeight()(jnp.array(1.0), VE()))
        2.0
    """

    def __call__(self, levels: Real, sde: SDE) -> Real:
        """Return the weight of (D - x_0)^2 at each level."""
        return 1 + 1 / jnp.square(levels)


@dataclass(frozen=True)
class SigmaSquaredWeight:
    """1 / r^2: the squared error of the noise, sigma^2 times that of the score.

    Song and Ermon 2019, section 4.2; the "simple" loss of Ho et al. 2020, eq. 14.

    Example:
        >>> from numpyro_score.sde import VE
        >>> float(SigmaSquaredWeight()(jnp.array(2.0), VE()))
        0.25
    """

    def __call__(self, levels: Real, sde: SDE) -> Real:
        """Return the weight of (D - x_0)^2 at each level."""
        return 1 / jnp.square(levels)


@dataclass(frozen=True)
class LikelihoodWeight:
    r"""g^2 times the squared error of the score, which bounds the likelihood.

    Song, Durkan, Murray and Ermon 2021, eq. 8:
    :math:`g^2 |s - s^*|^2 = g^2 \alpha^2 / \sigma^4 (D - D^*)^2`. Use with
    :class:`~numpyro_score.loss.UniformTime` of the same process.

    Example:
        >>> from numpyro_score.sde import VE
        >>> bool(LikelihoodWeight()(jnp.array([1.0]), VE()) > 0)
        True
    """

    def __call__(self, levels: Real, sde: SDE) -> Real:
        """Return the weight of (D - x_0)^2 at each level."""
        t = sde.time(levels)
        alpha, sigma = sde.marginal(t)
        diffusion = jax.vmap(sde.diffusion)(t)
        return jnp.square(diffusion * alpha / sigma**2)


@dataclass(frozen=True)
class FlowMatchingWeight:
    r"""((1 + r) / r)^2: the squared error of the velocity n - x_0.

    Lipman et al. 2023, eq. 9.

    Example:
        >>> from numpyro_score.sde import VE
        >>> float(FlowMatchingWeight()(jnp.array(1.0), VE()))
        4.0
    """

    def __call__(self, levels: Real, sde: SDE) -> Real:
        """Return the weight of (D - x_0)^2 at each level."""
        return jnp.square(1 + 1 / levels)
