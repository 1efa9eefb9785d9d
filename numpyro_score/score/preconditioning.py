r"""What a net's output means: parametrizations of the denoiser.

In coordinates :math:`\hat x = x_t / \alpha` at level r = sigma/alpha, with data of unit
sd, every parametrization is a choice of
:math:`D(\hat x, r) = c_{skip} \hat x + c_{out} F(c_{in} \hat x, c_{noise})`. The net F
is always fed inputs of unit variance. All of them describe the same score; they differ
in how the error of F is spread over the noise levels (Karras et al. 2022, table 1;
Salimans and Ho 2022, section 4).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from numpyro_score.sde.tweedie import Preconditioning, preconditioning
from numpyro_score.typing import Real


@runtime_checkable
class Parametrization(Protocol):
    """A frozen dataclass that is called with the noise level."""

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
    """F is the noise at high levels and the score at low ones; the default.

    See :func:`~numpyro_score.sde.tweedie.preconditioning`.

    Example:
        >>> round(float(BoundedScore()(jnp.array(2.0)).skip), 3)
        0.2
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return preconditioning(noise_level)


@dataclass(frozen=True)
class EDM:
    r"""F has unit variance at every level: :math:`c_{out} = r/\sqrt{1 + r^2}`.

    Karras et al. 2022, table 1, for data of unit sd. Up to its sign the same as
    :class:`VPrediction`.

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
    r"""F is :math:`v = \alpha n - \sigma x_0` (Salimans and Ho 2022).

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
    r"""F is the noise n: :math:`D = \hat x - r F` (Ho et al. 2020, eq. 11).

    At high levels an error of F is multiplied by r.

    Example:
        >>> float(NoisePrediction()(jnp.array(2.0)).out)
        -2.0
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return _coefficients(noise_level, jnp.ones(()), -noise_level)


@dataclass(frozen=True)
class ScorePrediction:
    r"""F is the score of :math:`\hat x`: :math:`D = \hat x + r^2 F` (Vincent 2011).

    The score is large at low levels and tiny at high ones: for one level only.

    Example:
        >>> float(ScorePrediction()(jnp.array(2.0)).out)
        4.0
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return _coefficients(noise_level, jnp.ones(()), jnp.square(noise_level))


@dataclass(frozen=True)
class DataPrediction:
    """F is the clean point x_0, so D = F.

    At low levels the score is a small difference of large numbers.

    Example:
        >>> float(DataPrediction()(jnp.array(2.0)).skip)
        0.0
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        return _coefficients(noise_level, jnp.zeros(()), jnp.ones(()))


@dataclass(frozen=True)
class VelocityPrediction:
    r"""F is :math:`n - x_0`, the velocity of the straight path (Lipman et al. 2023).

    With t = r / (1 + r): :math:`D = (1 - t)\hat x - t F`.

    Example:
        >>> float(VelocityPrediction()(jnp.array(1.0)).out)
        -0.5
    """

    def __call__(self, noise_level: Real | float) -> Preconditioning:
        """Return the coefficients at a noise level."""
        t = noise_level / (1 + noise_level)
        return _coefficients(noise_level, 1 - t, -t)
