"""More laws of training levels, beside those in ``schedule``."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.schedule import geometric
from numpyro_score.sde import SDE
from numpyro_score.typing import PRNGKey


@runtime_checkable
class NoiseLevelDistribution(Protocol):
    """A frozen dataclass that draws training levels."""

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Draw ``num`` levels in [sigma_min, sigma_max]."""


@dataclass(frozen=True)
class SingleLevel:
    """A single level, as in Vincent 2011. The score is learned at this level only.

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
        if self.level is not None and self.level <= 0:
            raise ValueError(
                "`level` must be positive: it is a standard deviation of noise. "
                f"Got {self.level}."
            )

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Return the same level ``num`` times."""
        return jnp.full(num, sigma_min if self.level is None else self.level)


@dataclass(frozen=True)
class GeometricLevels:
    """A few geometric levels, equally likely (NCSN, Song and Ermon 2019, eq. 6).

    Stratified: each level has its equal share of a batch.

    Args:
        num_levels: how many levels.

    Raises:
        ValueError: for fewer than two levels.

    Example:
        >>> levels = GeometricLevels(2).sample(jax.random.key(0), 4, 1.0, 4.0)
        >>> sorted(levels.round(3).tolist())
        [1.0, 1.0, 4.0, 4.0]
    """

    num_levels: int = 10

    def __post_init__(self) -> None:
        if self.num_levels < 2:
            raise ValueError(
                "`num_levels` must be at least 2; SingleLevel is a single one. "
                f"Got {self.num_levels}."
            )

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Draw ``num`` levels, one per stratum."""
        u = (jnp.arange(num) + jax.random.uniform(key, (num,))) / num
        levels = geometric(sigma_min, sigma_max, self.num_levels)
        chosen = jnp.floor(u * self.num_levels).astype(int)
        return levels[jnp.minimum(chosen, self.num_levels - 1)]


@dataclass(frozen=True)
class UniformTime:
    r"""The levels of a process whose time is uniform in [t_min, t_max], stratified.

    Ho et al. 2020 and Song et al. 2021 train so. With
    :class:`~numpyro_score.loss.LikelihoodWeight` of the same process the objective
    bounds the likelihood.

    Args:
        sde: the process; mostly the one that is trained.

    Example:
        >>> from numpyro_score.sde import RectifiedFlow
        >>> law = UniformTime(RectifiedFlow())
        >>> law.sample(jax.random.key(0), 3, 0.01, 100.0).shape
        (3,)
    """

    sde: SDE

    def sample(
        self, key: PRNGKey, num: int, sigma_min: float, sigma_max: float
    ) -> Float[Array, " num"]:
        """Draw ``num`` levels, one per stratum of time, within the given range."""
        u = (jnp.arange(num) + jax.random.uniform(key, (num,))) / num
        t = self.sde.t_min + u * (self.sde.t_max - self.sde.t_min)
        return jnp.clip(self.sde.noise_level(t), sigma_min, sigma_max)
