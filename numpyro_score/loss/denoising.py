"""Denoising score matching with any noise levels, weights and targets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.checks import check_callable, check_kind
from numpyro_score.loss.noise_levels import LogNormal, NoiseLevelDistribution, add_noise
from numpyro_score.loss.per_coordinate import PerCoordinate
from numpyro_score.loss.target import DataTarget, RegressionTarget
from numpyro_score.loss.weighting import EDMWeight, Weighting
from numpyro_score.sde import SDE
from numpyro_score.typing import PRNGKey

BatchDenoiseFn = Callable[
    [Float[Array, "rows *event"], Float[Array, "rows *levels"]],
    Float[Array, "rows *event"],
]
Loss = Callable[..., Float[Array, ""]]  # (key, denoise, x0, sde)


def denoising_error(
    x0: Float[Array, "rows *event"],
    denoised: Float[Array, "rows *event"],
    weight: Float[Array, " rows"],
) -> Float[Array, ""]:
    r"""Return the mean over rows and dimensions of weight :math:`(D - x_0)^2`.

    Example:
        >>> float(denoising_error(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.ones(2)))
        1.0
    """
    error = jnp.square(denoised - x0).reshape(len(x0), -1).mean(1)
    return jnp.mean(weight * error)


@dataclass(frozen=True)
class DenoisingScoreMatching:
    r"""Denoising score matching, by default over all noise levels with EDM weights.

    .. math:: E_{\sigma, x_0, n}\; \frac{1 + \sigma^2}{\sigma^2}
              \|D(x_0 + \sigma n, \sigma) - x_0\|^2 / d

    Vincent 2011 at every level; weights and levels of Karras et al. 2022, eq. 8. The
    minimizer is E[x_0 | x_t], by Tweedie's formula the score of the marginal. The
    minimal value is the error of that denoiser, which is positive.

    Args:
        noise_levels: distribution of the training levels, one stratum per row;
            ``SingleLevel(r)`` is Vincent's objective, ``GeometricLevels(L)`` with
            ``SigmaSquaredWeight()`` that of NCSN, ``UniformTime(sde)`` that of an SDE.
        weighting: weight of the levels.
        target: regression target; targets other than x_0 have less variance.
        noise: :class:`~numpyro_score.loss.PerCoordinate` for one noise level per
            coordinate, from which the score of every conditional law follows; None for
            one level per row.

    Raises:
        TypeError: if ``noise`` is anything else.
        ValueError: for ``noise`` with a target other than x_0, which is known for equal
            levels only.

    Example:
        >>> from numpyro_score.sde import VE
        >>> loss = DenoisingScoreMatching()
        >>> x0 = jax.random.normal(jax.random.key(0), (512, 2))
        >>> best = lambda x, level: x / (1 + level[:, None] ** 2)
        >>> worse = lambda x, level: 0.5 * x / (1 + level[:, None] ** 2)
        >>> key = jax.random.key(1)
        >>> bool(loss(key, best, x0, VE()) < loss(key, worse, x0, VE()))
        True
    """

    noise_levels: NoiseLevelDistribution = field(default_factory=LogNormal)
    weighting: Weighting = EDMWeight()
    target: RegressionTarget = DataTarget()
    noise: PerCoordinate | None = None

    def __post_init__(self) -> None:
        kind = "a distribution of levels, such as SingleLevel(0.1)"
        check_kind("noise_levels", self.noise_levels, NoiseLevelDistribution, kind)
        check_callable("weighting", self.weighting, "a weight, such as EDMWeight()")
        check_callable("target", self.target, "a target, such as DataTarget()")
        given: Any = self.noise  # may be of any type
        if given is not None and not isinstance(given, PerCoordinate):
            raise TypeError(
                "`noise` must be PerCoordinate(), or None for one level per row. "
                f"Got {given!r}."
            )
        if self.per_coordinate and not isinstance(self.target, DataTarget):
            raise ValueError(
                "`target` must be DataTarget() with `noise`: other targets are known "
                f"for equal noise levels only. Got {self.target}."
            )

    @property
    def per_coordinate(self) -> bool:
        """True if the denoiser gets one noise level per coordinate."""
        return self.noise is not None

    @property
    def batch_coupled(self) -> bool:
        """True if the target treats the rows of a batch as draws of one law."""
        return self.target.batch_coupled

    def __call__(
        self,
        key: PRNGKey,
        denoise: BatchDenoiseFn,
        x0: Float[Array, "rows *event"],
        sde: SDE,
        data_score: Float[Array, "rows *event"] | None = None,
        known: Bool[Array, "rows *event"] | None = None,
    ) -> Float[Array, ""]:
        """Return the loss of one batch of standardized data.

        Args:
            key: random key.
            denoise: D of rows of noisy points and levels.
            x0: the data.
            sde: the noise process.
            data_score: score of the data at x0, for targets that take it.
            known: with ``noise``, which numbers are known; the others are draws given
                these. Such a draw is no target where all that is known of its row is
                observed exactly: its law there is learned from rows that have it, as
                for data missing at random, and not from draws of itself.
        """
        key_level, key_noise = jax.random.split(key)
        levels = self.noise_levels.sample(
            key_level, len(x0), sde.sigma_min, sde.sigma_max
        )
        noise = jax.random.normal(key_noise, x0.shape, x0.dtype)
        if self.noise is not None:
            key_observed = jax.random.fold_in(key_level, 1)
            range_ = sde.sigma_min, sde.sigma_max
            levels = self.noise.sample(key_observed, levels, x0.shape[1:], *range_)
            return self._coordinate_error(levels, denoise, x0, noise, sde, known)
        x = add_noise(x0, levels, noise)
        target = self.target(x0, noise, levels, data_score)
        weight = self.weighting(levels, sde)
        return denoising_error(target, denoise(x, levels), weight)

    def _coordinate_error(
        self,
        levels: Float[Array, "rows *event"],
        denoise: BatchDenoiseFn,
        x0: Float[Array, "rows *event"],
        noise: Float[Array, "rows *event"],
        sde: SDE,
        known: Bool[Array, "rows *event"] | None,
    ) -> Float[Array, ""]:
        """Return the mean weighted error; that of coordinates without noise is 0."""
        is_noisy = levels > 0
        seen = jnp.where(is_noisy, levels, 1.0)  # weights at level 0 are infinite
        weight = self.weighting(seen.ravel(), sde).reshape(levels.shape)
        error = jnp.square(denoise(x0 + levels * noise, levels) - x0)
        is_target = is_noisy
        if known is not None:
            axes = tuple(range(1, x0.ndim))
            is_target &= known | (known & is_noisy).any(axes, keepdims=True)
        return jnp.mean(jnp.where(is_target, weight, 0.0) * error)
