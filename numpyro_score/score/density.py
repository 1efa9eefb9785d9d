r"""Densities of score models by the probability flow, in physical units.

Along :math:`d\hat x/d\lambda = \hat x - D(\hat x, e^\lambda)` the density obeys

.. math:: \log p_{\lambda_0}(\hat x_0) = \log p_{\lambda_1}(\hat x_1)
          + \int_{\lambda_0}^{\lambda_1} (d - \mathrm{tr}\, \partial_x D)\, d\lambda

(Chen et al. 2018; Song et al. 2021, eq. 39), with :math:`\lambda = \log\sigma` and a
Gaussian of variance :math:`\sigma_{max}^2 + 1` at the top. :func:`log_prob` integrates
by diffrax with adaptive steps, :func:`solver_log_prob` by any solver of the flow.
"""

from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.solver import Solver
from numpyro_score.solver.base import integrate_levels
from numpyro_score.solver.sample import check_deterministic
from numpyro_score.typing import DenoiseFn, Position, Real, Scalar, Time

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


def default_divergence(size: int) -> Divergence:
    """Return the exact trace for few numbers per point, frozen random signs above.

    Example:
        >>> default_divergence(2)
        ExactDivergence()
    """
    if size <= MAX_EXACT_SIZE:
        return ExactDivergence()
    return HutchinsonDivergence()


@partial(jax.jit, static_argnames="divergence")
def log_prob(
    score: Any,
    x: Real,
    t: Time | Array | None,
    context: Array | None,
    rtol: Scalar,
    atol: Scalar,
    *,
    divergence: Divergence,
) -> Real:
    """Return log p_t of unconstrained points: one program per shape and divergence.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
        x: unconstrained points of shape ``batch + event_shape``.
        t: time of the density; None for the lowest noise level.
        context: what the score is conditioned on, one for all points.
        rtol: relative tolerance of the integration.
        atol: absolute tolerance of the integration.
        divergence: rule for the trace.
    """

    def one(x: Position, t: Time, context: Array | None) -> Scalar:
        alpha, sigma = score.sde.marginal(t)
        # log p_t(x) = log p(u / alpha) - d log alpha - sum log scale
        value = flow_log_density(
            lambda x, level: score.denoiser(x, level, context),
            score.standardize.forward(x) / alpha,
            sigma / alpha,
            score.sde.sigma_max,
            divergence=divergence,
            rtol=rtol,
            atol=atol,
        )
        jacobian = score.standardize.log_abs_det_jacobian() - score.size * jnp.log(
            alpha
        )
        return value + jacobian

    return score.map_points(one, x, t, context)


def solver_log_prob(
    score: Any,
    x: Real,
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
    divergence: Divergence | None = None,
) -> Real:
    r"""Return log p of data at the lowest time of a grid, by any solver of the flow.

    The number of evaluations is fixed, unlike that of ``ScoreModel.log_prob``. The
    change of volume rides along as one more coordinate of the flow, so that the value
    has the solver's own order. It is measured from that of unit Gaussian data,

    .. math:: \log p(\hat x_0) = \log N(\hat x_1; 0, 1 + \sigma_1^2)
              + \frac d2 \log\frac{1 + \sigma_1^2}{1 + \sigma_0^2}
              + \int \Big(\frac{d}{1 + \sigma^2}
              - \mathrm{tr}\, \partial_x D\Big)\, d\log\sigma,

    which leaves an integrand that vanishes at both ends (Song et al. 2021, eq. 39).

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
        x: data of shape ``batch + data_shape``.
        solver: a solver of the probability flow.
        ts: decreasing times, run backwards; None for the solver's own grid.
        context: what the score is conditioned on, one for all points.
        divergence: rule for the trace; None as in ``ScoreModel.log_prob``.

    Raises:
        TypeError: for a solver with noise.

    Example:
        >>> from numpyro_score import VE, DPMSolverPP, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> value = solver_log_prob(score, jnp.zeros(2), solver=DPMSolverPP())
        >>> round(float(value), 3)
        -1.838
    """
    ts = check_deterministic(solver, score.sde, ts)
    rule = default_divergence(score.size) if divergence is None else divergence
    x = jnp.asarray(x)
    z = score.unconstrain(x)
    value = _by_solver(score, z, ts, context, solver=solver, divergence=rule)
    return (
        value
        if score.support is None
        else value - score.support.log_abs_det_jacobian(z, x)
    )


@partial(jax.jit, static_argnames=("solver", "divergence"))
def _by_solver(
    score: Any,
    z: Array,
    ts: Array,
    context: Array | None,
    *,
    solver: Solver,
    divergence: Divergence,
) -> Array:
    size, shape = score.size, score.event_shape

    def denoise(y: Array, level: Scalar) -> Array:
        """Carry the volume as a coordinate v whose flow dv = v - D_v is its change."""
        denoised, trace = denoise_and_divergence(
            lambda x, level: score.denoiser(x, level, context),
            y[:-1].reshape(shape),
            level,
            divergence,
        )
        change = size / (1 + level**2) - trace
        return jnp.append(denoised.reshape(-1), y[-1] - change)

    alpha, levels = score.sde.alpha(ts[-1]), score.sde.noise_level(ts[::-1])
    points = z.reshape(-1, *shape)
    start = jax.vmap(score.standardize.forward)(points).reshape(-1, size) / alpha
    y = jnp.pad(start, ((0, 0), (0, 1)))
    keys = jax.random.split(jax.random.key(0), len(y))  # the flow uses no noise
    y = integrate_levels(keys, denoise, y, levels, solver)
    first, last = 1 + levels[0] ** 2, 1 + levels[-1] ** 2
    top = jax.scipy.stats.norm.logpdf(y[:, :-1], 0.0, jnp.sqrt(last)).sum(1)
    value = top + 0.5 * size * jnp.log(last / first) + y[:, -1]
    value = value + score.standardize.log_abs_det_jacobian() - size * jnp.log(alpha)
    return value.reshape(z.shape[: z.ndim - len(shape)])


def bits_per_dimension(
    log_prob: Float[Array, "*batch"], size: int, *, bin_width: float | None = None
) -> Float[Array, "*batch"]:
    r"""Return bits per number of a datum: :math:`-\log_2 p(x) / d`, for binned data.

    Data such as pixels are integers; a density of the data with uniform noise of one
    bin added bounds the probability of a bin: :math:`p(x)\, w^d` (Theis et al. 2016,
    eq. 5). So train on data with that noise, and pass the bin's width.

    Args:
        log_prob: log density in nats, one per datum.
        size: how many numbers one datum has.
        bin_width: distance of neighboring values of the data, in the units of the
            density; None for continuous data, whose bits depend on their units.

    Raises:
        ValueError: for a size or a width that is not positive.

    Example:
        >>> uniform = jnp.zeros(1)  # on the unit square, in 256 bins per side
        >>> bits_per_dimension(uniform, 2, bin_width=1 / 256)
        Array([8.], dtype=float32)
    """
    width = 1.0 if bin_width is None else bin_width
    if size < 1 or width <= 0:
        raise ValueError(
            "`size` and `bin_width` must be positive: bits are counted per number and "
            f"per bin. Got {size} and {width}."
        )
    return (-log_prob / size - log(width)) / log(2)
