r"""Preconditioning of nets: the denoiser D as a function of the net's raw output F.

In coordinates :math:`\hat x = x_t / \alpha` at noise level r = sigma/alpha, with data
of unit sd, a parametrization is a choice of coefficients in :math:`D(\hat x, r) =
c_{skip} \hat x + c_{out} F(c_{in} \hat x, c_{noise})`, with :math:`c_{in} = 1/\sqrt{1 +
r^2}`, so that inputs of F have unit variance, and :math:`c_{noise} = \log(r)/4`. All
parametrizations describe the same score; they differ in how an error of F enters it at
each noise level (Karras et al. 2022, table 1; Salimans and Ho 2022, section 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from numpyro_score.typing import Position, Real

SIGMA_SCORE = 0.1  # sd of data; its effect: EDM in python -m tests.benchmarks.learning


class Preconditioning(NamedTuple):
    """Coefficients of D(x, r) = skip x + out F(input x, noise) at a noise level r."""

    skip: Real
    out: Real
    input: Real
    noise: Real


@runtime_checkable
class Parametrization(Protocol):
    """Coefficients as a function of the noise level; a frozen dataclass."""

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""


def _coefficients(
    noise_level: Real | float, skip: Real | float, out: Real | float
) -> Preconditioning:
    unit = 1 / jnp.sqrt(1 + jnp.square(noise_level))
    return Preconditioning(
        jnp.asarray(skip), jnp.asarray(out), unit, jnp.log(noise_level) / 4
    )


@dataclass(frozen=True)
class BoundedScore:
    r"""F estimates the noise at high levels and the score at low ones; the default.

    The coefficients of :class:`EDM`, with :math:`c_{out}` multiplied by
    :math:`r / \sqrt{r^2 + \sigma_s^2}`, :math:`\sigma_s` = ``SIGMA_SCORE``. With
    :class:`EDM` alone F estimates the noise at all levels, and its error enters the
    score divided by r. Here F is the noise for :math:`r \gg \sigma_s` and, up to the
    factor :math:`\sigma_s`, the score for :math:`r \ll \sigma_s`, which is bounded.

    Example:
        >>> round(float(BoundedScore()(jnp.array(2.0)).skip), 3)
        0.2
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        level = jnp.asarray(noise_level)
        norm = jnp.sqrt(1 + level**2)
        return Preconditioning(
            skip=1 / norm**2,
            out=level / norm * level / jnp.sqrt(level**2 + SIGMA_SCORE**2),
            input=1 / norm,
            noise=jnp.log(level) / 4,
        )


@dataclass(frozen=True)
class EDM:
    r"""F has a target of unit variance at every noise level.

    :math:`c_{out} = r/\sqrt{1 + r^2}` (Karras et al. 2022, table 1). Up to its sign the
    same as :class:`VPrediction`.

    Example:
        >>> round(float(EDM()(jnp.array(1.0)).out), 3)
        0.707
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        r = noise_level
        return _coefficients(r, 1 / (1 + r**2), r / jnp.sqrt(1 + r**2))


@dataclass(frozen=True)
class VPrediction:
    r"""F estimates :math:`v = \alpha n - \sigma x_0` (Salimans and Ho 2022).

    alpha and sigma are those of a variance-preserving process at the same level.

    Example:
        >>> round(float(VPrediction()(jnp.array(1.0)).out), 3)
        -0.707
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        r = noise_level
        return _coefficients(r, 1 / (1 + r**2), -r / jnp.sqrt(1 + r**2))


@dataclass(frozen=True)
class NoisePrediction:
    r"""F estimates the noise n: :math:`D = \hat x - r F` (Ho et al. 2020, eq. 11).

    An error of F enters D multiplied by r.

    Example:
        >>> float(NoisePrediction()(jnp.array(2.0)).out)
        -2.0
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return _coefficients(noise_level, jnp.ones(()), -noise_level)


@dataclass(frozen=True)
class ScorePrediction:
    r"""F estimates the score of :math:`\hat x`: :math:`D = \hat x + r^2 F`.

    Vincent 2011. The target of F has a variance of :math:`r^{-2}`: for one level only.

    Example:
        >>> float(ScorePrediction()(jnp.array(2.0)).out)
        4.0
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return _coefficients(noise_level, jnp.ones(()), jnp.square(noise_level))


@dataclass(frozen=True)
class DataPrediction:
    r"""F estimates x_0, so D = F.

    An error of F enters the score :math:`(D - \hat x) / r^2` divided by r^2.

    Example:
        >>> float(DataPrediction()(jnp.array(2.0)).skip)
        0.0
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return _coefficients(noise_level, jnp.zeros(()), jnp.ones(()))


@dataclass(frozen=True)
class VelocityPrediction:
    r"""F estimates :math:`n - x_0`, the velocity of the straight path.

    Lipman et al. 2023. With t = r / (1 + r): :math:`D = (1 - t)\hat x - t F`.

    Example:
        >>> float(VelocityPrediction()(jnp.array(1.0)).out)
        -0.5
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        t = noise_level / (1 + noise_level)
        return _coefficients(noise_level, 1 - t, -t)


def precondition(
    net_fn: Callable[[Position, Any], Position],
    x: Position,
    noise_level: Real | float,
    parametrization: Parametrization = BoundedScore(),
) -> Position:
    """Return D(x, r) = skip x + out F(input x, noise) for a raw net F.

    Args:
        net_fn: (input, noise) -> F.
        x: standardized point x_t / alpha.
        noise_level: r = sigma/alpha, in units of the data's sd; one, or one per
            coordinate.
        parametrization: coefficients as a function of r.
    """
    c = parametrization(noise_level)
    return c.skip * x + c.out * net_fn(c.input * x, c.noise)
