"""Distributions of training noise levels (p_train of Karras et al. 2022)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from numpyro_score.checks import (
    check_count,
    check_kind,
    check_positive,
    is_real,
)
from numpyro_score.schedule import geometric
from numpyro_score.sde import SDE
from numpyro_score.typing import Points, PRNGKey


def per_row(values: Float[Array, " rows"], like: Points) -> Array:
    """Return one value per row, shaped to multiply rows of the shape of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Points, levels: Float[Array, " rows"], noise: Points) -> Points:
    """Return x_0 + level noise, with one level per row.

    Example:
        >>> x0, levels = jnp.zeros((2, 2)), jnp.array([1.0, 3.0])
        >>> add_noise(x0, levels, jnp.ones((2, 2))).tolist()
        [[1.0, 1.0], [3.0, 3.0]]
    """
    return x0 + per_row(levels, x0) * noise


def stratified_uniform(key: PRNGKey, num: int) -> Float[Array, " num"]:
    """Return ``num`` increasing draws in [0, 1), one in each of as many equal parts.

    Example:
        >>> (4 * stratified_uniform(jax.random.key(0), 4)).astype(int).tolist()
        [0, 1, 2, 3]
    """
    return (jnp.arange(num) + jax.random.uniform(key, (num,))) / num


@runtime_checkable
class NoiseLevelDistribution(Protocol):
    """Distribution of training noise levels; a frozen dataclass."""

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Return ``num`` draws of noise levels in [sigma_min, sigma_max]."""


@dataclass(frozen=True)
class SingleLevel:
    """A single noise level (Vincent 2011), at which alone the score is learned.

    Args:
        level: the level, in units of the data's sd; None for the process's lowest.

    Raises:
        ValueError: for a level that is not positive.

    Example:
        >>> SingleLevel(0.5).sample(jax.random.key(0), 2, 0.01, 20.0).tolist()
        [0.5, 0.5]
    """

    level: float | None = None

    def __post_init__(self) -> None:
        if self.level is not None:
            check_positive("level", self.level, "a standard deviation of noise")

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Return the same level ``num`` times."""
        return jnp.full(num, sigma_min if self.level is None else self.level)


@dataclass(frozen=True)
class GeometricLevels:
    """Geometric levels of equal probability (NCSN, Song and Ermon 2019, eq. 6).

    Stratified: each level has an equal share of a batch.

    Args:
        num_levels: number of levels.

    Raises:
        ValueError: for fewer than two levels.

    Example:
        >>> levels = GeometricLevels(2).sample(jax.random.key(0), 4, 1.0, 4.0)
        >>> sorted(levels.round(3).tolist())
        [1.0, 1.0, 4.0, 4.0]
    """

    num_levels: int = 10

    def __post_init__(self) -> None:
        why = "a number of levels, of which SingleLevel is a single one"
        check_count("num_levels", self.num_levels, why, least=2)

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Return ``num`` draws, one per stratum."""
        u = stratified_uniform(key, num)
        levels = geometric(sigma_min, sigma_max, self.num_levels)
        chosen = jnp.floor(u * self.num_levels).astype(int)
        return levels[jnp.minimum(chosen, self.num_levels - 1)]


def check_optional_levels(law: NoiseLevelDistribution | None) -> None:
    """Raise unless a value is None or a distribution of noise levels."""
    kind = "None or a distribution of levels, such as SingleLevel(0.1)"
    check_kind("noise_levels", law, (NoiseLevelDistribution, type(None)), kind)


@dataclass(frozen=True)
class UniformTime:
    r"""Levels of a process at times uniform in [t_min, t_max], stratified.

    Ho et al. 2020; Song et al. 2021. With
    :class:`~numpyro_score.loss.LikelihoodWeight` of the same process the objective
    bounds the likelihood.

    Args:
        sde: the process, in general that of the training.

    Example:
        >>> from numpyro_score.sde import RectifiedFlow
        >>> law = UniformTime(RectifiedFlow())
        >>> law.sample(jax.random.key(0), 3, 0.01, 100.0).shape
        (3,)
    """

    sde: SDE

    def __post_init__(self) -> None:
        check_kind("sde", self.sde, SDE, "a process, such as VE()")

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Return ``num`` draws, one per stratum of time, clipped to the range."""
        u = stratified_uniform(key, num)
        t = self.sde.t_min + u * (self.sde.t_max - self.sde.t_min)
        return jnp.clip(self.sde.noise_level(t), sigma_min, sigma_max)


@dataclass(frozen=True)
class LogNormal:
    r"""Truncated log-normal levels, :math:`\log\sigma \sim N(loc, scale^2)`.

    The form is that of Karras et al. 2022, table 1, for data of unit sd; the default is
    wider than theirs. ``sample`` draws one level from each of ``num`` strata of equal
    probability.

    Args:
        loc: mean of log sigma.
        scale: standard deviation of log sigma.

    Example:
        >>> levels = LogNormal().sample(jax.random.key(0), 4, 0.01, 20.0)
        >>> bool(((levels >= 0.01) & (levels <= 20.0)).all())
        True
    """

    loc: float = -0.5
    scale: float = 1.8

    def __post_init__(self) -> None:
        if not is_real(self.loc) or not abs(self.loc) < float("inf"):
            raise ValueError(
                "`loc` must be finite: it is the mean of the log noise level. "
                f"Got {self.loc}."
            )
        check_positive("scale", self.scale, "a standard deviation")

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Draw ``num`` levels in [sigma_min, sigma_max], one per stratum."""
        low = ndtr((jnp.log(sigma_min) - self.loc) / self.scale)
        high = ndtr((jnp.log(sigma_max) - self.loc) / self.scale)
        u = stratified_uniform(key, num)
        levels = jnp.exp(self.loc + self.scale * ndtri(low + u * (high - low)))
        return jnp.clip(levels, sigma_min, sigma_max)


@dataclass(frozen=True)
class LogUniform:
    r"""Levels with log sigma uniform on [log sigma_min, log sigma_max], stratified.

    Example:
        >>> levels = LogUniform().sample(jax.random.key(0), 4, 0.01, 20.0)
        >>> bool((jnp.diff(levels) > 0).all())
        True
    """

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Draw ``num`` levels in [sigma_min, sigma_max], one per stratum."""
        u = stratified_uniform(key, num)
        return sigma_min * (sigma_max / sigma_min) ** u
