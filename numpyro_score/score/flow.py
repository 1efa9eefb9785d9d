r"""Densities by the probability flow.

Along :math:`d\hat x/d\lambda = \hat x - D(\hat x, e^\lambda)` the density obeys

.. math:: \log p_{\lambda_0}(\hat x_0) = \log p_{\lambda_1}(\hat x_1)
          + \int_{\lambda_0}^{\lambda_1} (d - \mathrm{tr}\, \partial_x D)\, d\lambda

(Chen et al. 2018; Song et al. 2021, eq. 39), with :math:`\lambda = \log\sigma` and a
Gaussian of variance :math:`\sigma_{max}^2 + 1` at the top. Solved by diffrax.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.typing import DenoiseFn, Position, Scalar

MAX_EXACT_SIZE = 64  # above, an exact trace costs more than its probes


@runtime_checkable
class Divergence(Protocol):
    """A rule for the trace of a Jacobian."""

    def probes(self, size: int) -> Float[Array, "probes size"]:
        """Return vectors v whose mean of v^T J v is (an estimate of) tr J / scale."""

    def scale(self, size: int) -> float:
        """Return what the mean over probes is multiplied by."""


@dataclass(frozen=True)
class ExactDivergence:
    """The trace by all unit vectors: size Jacobian-vector products, no error.

    Example:
        >>> ExactDivergence().probes(2).shape
        (2, 2)
    """

    def probes(self, size: int) -> Float[Array, "probes size"]:
        """Return the unit vectors."""
        return jnp.eye(size)

    def scale(self, size: int) -> float:
        """Return the number of unit vectors: their mean becomes a sum."""
        return float(size)


@dataclass(frozen=True)
class HutchinsonDivergence:
    """The trace by random signs, the same for every point and call (frozen).

    Hutchinson 1990 with Rademacher probes. The density is deterministic but carries
    the probes' error, which falls with the square root of ``num_probes``.

    Args:
        num_probes: number of sign vectors.
        seed: seed of the signs.

    Raises:
        ValueError: for fewer than one probe.

    Example:
        >>> HutchinsonDivergence(num_probes=3).probes(2).shape
        (3, 2)
    """

    num_probes: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(
                "`num_probes` must be at least 1: the trace is a mean over probes. "
                f"Got {self.num_probes}."
            )

    def probes(self, size: int) -> Float[Array, "probes size"]:
        """Return frozen random signs."""
        key = jax.random.key(self.seed)
        return jax.random.rademacher(key, (self.num_probes, size), float)

    def scale(self, size: int) -> float:
        """Return 1: the mean over probes is the estimate."""
        return 1.0


def denoise_and_divergence(
    denoise: DenoiseFn, x: Position, level: Scalar, divergence: Divergence
) -> tuple[Position, Scalar]:
    """Return D(x, level) and the trace of its Jacobian, sharing the forward pass."""
    probes = divergence.probes(x.size).reshape(-1, *x.shape)
    denoised, pushforward = jax.linearize(lambda x: denoise(x, level), x)
    products = jax.vmap(lambda v: jnp.vdot(v, pushforward(v)))(probes)
    return denoised, divergence.scale(x.size) * products.mean()


def flow_log_density(
    denoise: DenoiseFn,
    x: Position,
    level: Scalar,
    level_max: Scalar,
    *,
    divergence: Divergence,
    rtol: Scalar = 1e-4,
    atol: Scalar = 1e-4,
) -> Float[Array, ""]:
    """Return log p at noise ``level`` of one point in variance-exploding coordinates.

    Not a number if the integration needs more than 1000 steps, so that no wrong value
    passes for a density.

    Args:
        denoise: D(x, level) for data of unit scale.
        x: the point.
        level: noise level of the density.
        level_max: level at which the law is Normal(0, sqrt(level_max^2 + 1)).
        divergence: rule for the trace.
        rtol: relative tolerance of the integration.
        atol: absolute tolerance of the integration, in units of x and of nats.
    """
    import diffrax  # here, as it takes long and only densities need it

    def field(log_level: Any, y: tuple, _: None) -> tuple[Position, Scalar]:
        level = jnp.exp(log_level)
        denoised, trace = denoise_and_divergence(denoise, y[0], level, divergence)
        return y[0] - denoised, x.size - trace

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=jnp.log(level),
        t1=jnp.log(level_max),
        dt0=None,
        y0=(x, jnp.zeros((), x.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        saveat=diffrax.SaveAt(t1=True),
        max_steps=1000,
        throw=False,
    )
    (top,), (volume,) = solution.ys
    scale = jnp.sqrt(1 + jnp.square(level_max))
    value = jax.scipy.stats.norm.logpdf(top, 0.0, scale).sum() + volume
    solved = solution.result == diffrax.RESULTS.successful
    return jnp.where(solved, value, jnp.nan)
