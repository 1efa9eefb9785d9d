r"""Implicit score matching: Hyvärinen's objective and its random projections.

For a score s of the law of x, partial integration turns
:math:`\tfrac12 E|s - \nabla \log p|^2` into
:math:`E[\mathrm{tr}\,\partial s/\partial x + \tfrac12 |s|^2]` plus a constant
(Hyvärinen 2005, theorem 1). The score comes from the denoiser:
:math:`s = (D(x, r) - x)/r^2`.

Without ``noise_levels`` no noise is added, and the net is trained at the process's
lowest level only, as the score of the data. Regions between modes have no data and are
not learned, so use such a score locally and not for sampling. With ``noise_levels`` the
objective is that of noisy data, weighted by r^2 (Song et al. 2020, section 6.2), for
all samplers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import (
    check_count,
    check_flags,
    check_kind,
    check_positive,
)
from numpyro_score.loss.denoising import BatchDenoiseFn
from numpyro_score.loss.noise_levels import (
    NoiseLevelDistribution,
    add_noise,
    check_optional_levels,
    per_row,
)
from numpyro_score.loss.projection import Gaussian, Projection, Rademacher
from numpyro_score.sde import SDE
from numpyro_score.typing import Points, PRNGKey

PerRow = Float[Array, " rows"]


def _noisy_score(
    key: PRNGKey,
    denoise: BatchDenoiseFn,
    x0: Points,
    sde: SDE,
    noise_levels: NoiseLevelDistribution | None,
) -> tuple[Points, Callable[[Points], Points], PerRow]:
    """Return the noisy rows x, their score function and the weight of each row."""
    key_level, key_noise = jax.random.split(key)
    if noise_levels is None:
        levels, x, weight = jnp.full(len(x0), sde.sigma_min), x0, jnp.ones(len(x0))
    else:
        levels = noise_levels.sample(key_level, len(x0), sde.sigma_min, sde.sigma_max)
        noise = jax.random.normal(key_noise, x0.shape, x0.dtype)
        x, weight = add_noise(x0, levels, noise), jnp.square(levels)

    def score(x: Points) -> Points:
        return (denoise(x, levels) - x) / jnp.square(per_row(levels, x))

    return x, score, weight


def _dot(a: Points, b: Points) -> PerRow:
    return (a * b).reshape(len(a), -1).sum(1)


@dataclass(frozen=True)
class ImplicitScoreMatching:
    r"""Implicit score matching with the exact trace (Hyvärinen 2005, eq. 4).

    .. math:: E[r^2 (\mathrm{tr}\,\partial s/\partial x + \tfrac12 |s|^2)] / d

    The trace takes d Jacobian-vector products of the net per row; above d of about 20
    use :class:`SlicedScoreMatching`.

    Args:
        noise_levels: distribution of the levels; None for data without noise.

    Example:
        >>> from numpyro_score.sde import VE
        >>> x0 = jax.random.normal(jax.random.key(0), (4, 2))
        >>> exact = lambda x, level: x / (1 + level[:, None] ** 2)
        >>> ImplicitScoreMatching()(jax.random.key(1), exact, x0, VE()).shape
        ()
    """

    noise_levels: NoiseLevelDistribution | None = None

    def __post_init__(self) -> None:
        check_optional_levels(self.noise_levels)

    def __call__(
        self, key: PRNGKey, denoise: BatchDenoiseFn, x0: Points, sde: SDE
    ) -> Float[Array, ""]:
        """Return the loss of one batch of standardized data."""
        x, score, weight = _noisy_score(key, denoise, x0, sde, self.noise_levels)
        size = prod(x0.shape[1:])
        axes = jnp.eye(size).reshape(size, *x0.shape[1:])
        s, pushforward = jax.linearize(score, x)

        def diagonal(axis: Array) -> PerRow:
            v = jnp.broadcast_to(axis, x.shape)
            return _dot(v, pushforward(v))

        trace = jax.vmap(diagonal)(axes).sum(0)
        return jnp.mean(weight * (trace + 0.5 * _dot(s, s))) / size


@dataclass(frozen=True)
class SlicedScoreMatching:
    r"""Sliced score matching (Song et al. 2020, eq. 8 and 9).

    .. math:: E[r^2 (v^\top (\partial s/\partial x) v + \tfrac12 (v^\top s)^2)] c / d

    with random v and the factor c of the projection. In the variance-reduced form, the
    default, :math:`c (v^\top s)^2` is replaced by its expectation :math:`|s|^2`.

    Args:
        noise_levels: distribution of the levels; None for data without noise.
        projection: distribution of v.
        num_projections: directions per row.
        variance_reduced: True for the variance-reduced form.

    Raises:
        ValueError: for fewer than one projection.

    Example:
        >>> from numpyro_score.sde import VE
        >>> x0 = jax.random.normal(jax.random.key(0), (4, 2))
        >>> exact = lambda x, level: x / (1 + level[:, None] ** 2)
        >>> SlicedScoreMatching()(jax.random.key(1), exact, x0, VE()).shape
        ()
    """

    noise_levels: NoiseLevelDistribution | None = None
    projection: Projection = Rademacher()
    num_projections: int = 1
    variance_reduced: bool = True

    def __post_init__(self) -> None:
        check_optional_levels(self.noise_levels)
        check_kind("projection", self.projection, Projection, "such as Rademacher()")
        check_flags(variance_reduced=self.variance_reduced)
        why = "the number of projections over which the trace is a mean"
        check_count("num_projections", self.num_projections, why)

    def __call__(
        self, key: PRNGKey, denoise: BatchDenoiseFn, x0: Points, sde: SDE
    ) -> Float[Array, ""]:
        """Return the loss of one batch of standardized data."""
        key_noise, key_v = jax.random.split(key)
        x, score, weight = _noisy_score(key_noise, denoise, x0, sde, self.noise_levels)
        size = prod(x0.shape[1:])
        scale = self.projection.scale(size)
        s, pushforward = jax.linearize(score, x)

        def slice_(key: PRNGKey) -> PerRow:
            v = self.projection.sample(key, x.shape)
            trace = scale * _dot(v, pushforward(v))
            if self.variance_reduced:
                return trace + 0.5 * _dot(s, s)
            return trace + 0.5 * scale * jnp.square(_dot(v, s))

        keys = jax.random.split(key_v, self.num_projections)
        return jnp.mean(weight * jax.vmap(slice_)(keys).mean(0)) / size


@dataclass(frozen=True)
class FiniteDifferenceScoreMatching:
    r"""Sliced score matching with central differences (Pang et al. 2020, section 3.2).

    .. math:: E[r^2 (v^\top (s_+ - s_-) / 2h + \tfrac12 |(s_+ + s_-)/2|^2)] / d

    with :math:`s_\pm = s(x \pm h v)`, Gaussian v and h = ``step`` r. Two evaluations of
    the net and no derivative in x. The bias is O(step^2); the rounding error is
    inversely proportional to the step.

    Args:
        noise_levels: distribution of the levels; None for data without noise.
        step: half the width of the difference, in units of the noise.

    Raises:
        ValueError: for a step that is not positive.

    Example:
        >>> from numpyro_score.sde import VE
        >>> x0 = jax.random.normal(jax.random.key(0), (4, 2))
        >>> exact = lambda x, level: x / (1 + level[:, None] ** 2)
        >>> loss = FiniteDifferenceScoreMatching()
        >>> bool(jnp.isfinite(loss(jax.random.key(1), exact, x0, VE())))
        True
    """

    noise_levels: NoiseLevelDistribution | None = None
    step: float = 0.1

    def __post_init__(self) -> None:
        check_optional_levels(self.noise_levels)
        check_positive("step", self.step, "the width of a difference")

    def __call__(
        self, key: PRNGKey, denoise: BatchDenoiseFn, x0: Points, sde: SDE
    ) -> Float[Array, ""]:
        """Return the loss of one batch of standardized data."""
        key_noise, key_v = jax.random.split(key)
        x, score, weight = _noisy_score(key_noise, denoise, x0, sde, self.noise_levels)
        width = jnp.full(len(x0), sde.sigma_min)
        if self.noise_levels is not None:
            width = jnp.sqrt(weight)
        width = self.step * width
        v = Gaussian().sample(key_v, x.shape)
        shift = per_row(width, x) * v
        plus, minus = score(x + shift), score(x - shift)
        trace = _dot(v, plus - minus) / (2 * width)
        mean = 0.5 * (plus + minus)
        size = prod(x0.shape[1:])
        return jnp.mean(weight * (trace + 0.5 * _dot(mean, mean))) / size
