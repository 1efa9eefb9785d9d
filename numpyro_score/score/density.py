r"""Log densities of score models by the probability flow.

Along :math:`d\hat x/d\lambda = \hat x - D(\hat x, e^\lambda)` the density obeys

.. math:: \log p_{\lambda_0}(\hat x_0) = \log p_{\lambda_1}(\hat x_1)
          + \int_{\lambda_0}^{\lambda_1} (d - \mathrm{tr}\, \partial_x D)\, d\lambda

(Chen et al. 2018; Song et al. 2021, eq. 39), with :math:`\lambda = \log\sigma` and the
law :math:`N(m, \sigma_{max}^2 + 1)` at the highest level, where draws start.
:func:`log_prob` integrates by diffrax with adaptive steps, :func:`solver_log_prob` by
any solver of the flow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import (
    as_points,
    check_count,
    check_integer,
    check_kind,
    check_positive,
)
from numpyro_score.solver import Solver
from numpyro_score.solver.base import integrate_levels
from numpyro_score.solver.integrate import DenoisingModel
from numpyro_score.solver.sample import check_deterministic
from numpyro_score.typing import DenoiseFn, Position, Real, Scalar, Time

# where the exact trace costs 4 times the 16 random probes of the default
MAX_EXACT_SIZE = 64


@runtime_checkable
class DensityModel(DenoisingModel, Protocol):
    """The part of :class:`~numpyro_score.score.ScoreModel` that densities use."""

    @property
    def denoiser(self) -> Callable:
        """Denoiser (x, level, context) -> D of standardized points."""

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""

    @property
    def size(self) -> int:
        """Number of numbers of one point."""

    def unconstrain(self, x: Real) -> Real:
        """Return unconstrained points of data."""

    def subtract_log_jacobian(self, log_prob: Real, z: Real, x: Real) -> Real:
        """Return log densities of data x, from those of the unconstrained points z."""

    def map_points(
        self, one: Callable, x: Real, t: Time | Array | None, context: Array | None
    ) -> Real:
        """Return one(x, t, context) over the leading dimensions of x and t."""


@runtime_checkable
class Divergence(Protocol):
    """Estimate of a trace: tr J = scale times the mean of v^T J v over probes v."""

    def probes(self, size: int) -> Float[Array, "probes size"]:
        """Return the vectors v."""

    def scale(self, size: int) -> float:
        """Return the factor of the mean over probes."""


@dataclass(frozen=True)
class ExactDivergence:
    """Exact trace by all unit vectors, with as many Jacobian-vector products.

    Example:
        >>> ExactDivergence().probes(2).shape
        (2, 2)
    """

    def probes(self, size: int) -> Float[Array, "probes size"]:
        """Return the unit vectors."""
        return jnp.eye(size)

    def scale(self, size: int) -> float:
        """Return the number of unit vectors."""
        return float(size)


@dataclass(frozen=True)
class HutchinsonDivergence:
    """Estimate of the trace by random signs, the same for every point and call.

    Hutchinson 1990 with Rademacher probes. The density is deterministic; its error is
    inversely proportional to the square root of ``num_probes``.

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
        check_count("num_probes", self.num_probes, "the number of probes of the trace")
        check_integer("seed", self.seed, "the seed of the probes")

    def probes(self, size: int) -> Float[Array, "probes size"]:
        """Return the random signs of the seed."""
        key = jax.random.key(self.seed)
        return jax.random.rademacher(key, (self.num_probes, size), float)

    def scale(self, size: int) -> float:
        """Return 1."""
        return 1.0


def denoise_and_divergence(
    denoise: DenoiseFn, x: Position, level: Scalar, divergence: Divergence
) -> tuple[Position, Scalar]:
    """Return D(x, level) and the trace of its Jacobian in x.

    Args:
        denoise: D(x, level).
        x: one point.
        level: noise level.
        divergence: rule for the trace.
    """
    probes = divergence.probes(x.size).reshape(-1, *x.shape)
    denoised, pushforward = jax.linearize(lambda x: denoise(x, level), x)
    products = jax.vmap(lambda v: jnp.vdot(v, pushforward(v)))(probes)
    return denoised, divergence.scale(x.size) * products.mean()


def flow_log_density(
    denoise: DenoiseFn,
    x: Position,
    level: Scalar,
    level_max: Scalar,
    center: Position | float = 0.0,
    *,
    divergence: Divergence,
    rtol: Scalar = 1e-4,
    atol: Scalar = 1e-4,
) -> Float[Array, ""]:
    """Return log p of one standardized point x_t / alpha at a noise level, in nats.

    NaN if the integration fails or needs more than 1000 steps.

    Args:
        denoise: D(x, level) for data of unit scale.
        x: the point.
        level: noise level of the density.
        level_max: highest level, with law Normal(center, sqrt(level_max^2 + 1)).
        center: mean of that law.
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
    value = jax.scipy.stats.norm.logpdf(top, center, scale).sum() + volume
    solved = solution.result == diffrax.RESULTS.successful
    return jnp.where(solved, value, jnp.nan)


def default_divergence(size: int) -> Divergence:
    """Return the exact trace up to 64 numbers per point, random signs above.

    Example:
        >>> default_divergence(2)
        ExactDivergence()
    """
    if size <= MAX_EXACT_SIZE:
        return ExactDivergence()
    return HutchinsonDivergence()


@partial(jax.jit, static_argnames="divergence")
def log_prob(
    score: DensityModel,
    x: Real,
    t: Time | Array | None,
    context: Array | None,
    rtol: Scalar,
    atol: Scalar,
    *,
    divergence: Divergence,
) -> Real:
    """Return log p_t of unconstrained points, in nats.

    One compiled program per shape and divergence.

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
            score.start_center(jnp.asarray(score.sde.sigma_max), context),
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
    score: DensityModel,
    x: Real,
    *,
    solver: Solver,
    ts: Float[Array, " ts"] | None = None,
    context: Array | None = None,
    divergence: Divergence | None = None,
) -> Real:
    r"""Return log p of data at the lowest time of a grid, by any solver of the flow.

    The number of evaluations is fixed, unlike that of ``ScoreModel.log_prob``. The
    change of volume is integrated as one more coordinate of the flow, with the order of
    the solver, relative to its value for unit Gaussian data:

    .. math:: \log p(\hat x_0) = \log N(\hat x_1; 0, 1 + \sigma_1^2)
              + \frac d2 \log\frac{1 + \sigma_1^2}{1 + \sigma_0^2}
              + \int \Big(\frac{d}{1 + \sigma^2}
              - \mathrm{tr}\, \partial_x D\Big)\, d\log\sigma,

    whose integrand vanishes at both ends (Song et al. 2021, eq. 39).

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
    check_kind("divergence", rule, Divergence, "a rule for the trace")
    x = as_points("x", x, score.data_shape)
    z = score.unconstrain(x)
    value = _by_solver(score, z, ts, context, solver=solver, divergence=rule)
    return score.subtract_log_jacobian(value, z, x)


@partial(jax.jit, static_argnames=("solver", "divergence"))
def _by_solver(
    score: DensityModel,
    z: Array,
    ts: Array,
    context: Array | None,
    *,
    solver: Solver,
    divergence: Divergence,
) -> Array:
    size, shape = score.size, score.event_shape

    def denoise(y: Array, level: Scalar) -> Array:
        """Return D with D_v appended, where dv/dlambda = v - D_v changes the volume."""
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
    center = score.start_center(levels[-1], context).reshape(-1)
    top = jax.scipy.stats.norm.logpdf(y[:, :-1], center, jnp.sqrt(last)).sum(1)
    value = top + 0.5 * size * jnp.log(last / first) + y[:, -1]
    value = value + score.standardize.log_abs_det_jacobian() - size * jnp.log(alpha)
    return value.reshape(z.shape[: z.ndim - len(shape)])


def bits_per_dimension(
    log_prob: Float[Array, "*batch"], size: int, *, bin_width: float | None = None
) -> Float[Array, "*batch"]:
    r"""Return bits per number, :math:`-\log_2 (p(x)\, w^d) / d`, of data in bins.

    For integers such as pixels, train on data with uniform noise of one bin added:
    :math:`p(x)\, w^d`, w the width of a bin, then bounds the probability of a bin
    (Theis et al. 2016, eq. 5).

    Args:
        log_prob: log density in nats, one per datum.
        size: number d of numbers of one datum.
        bin_width: width w, in the units of the data; None for w = 1 and continuous
            data, whose bits depend on their units.

    Raises:
        ValueError: for a size or a width that is not positive.

    Example:
        >>> uniform = jnp.zeros(1)  # on the unit square, in 256 bins per side
        >>> bits_per_dimension(uniform, 2, bin_width=1 / 256)
        Array([8.], dtype=float32)
    """
    width = 1.0 if bin_width is None else bin_width
    check_count("size", size, "the numbers of a point, per which bits are counted")
    check_positive("bin_width", width, "the width of a bin, per which bits are counted")
    return (-log_prob / size - log(width)) / log(2)
