r"""Random directions v with :math:`c\, E[v v^\top] = I`, for traces.

Then :math:`c\, E[v^\top J v] = \mathrm{tr}\, J` (Hutchinson 1990).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.typing import PRNGKey


@runtime_checkable
class Projection(Protocol):
    """Distribution of directions; a frozen dataclass."""

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Return one direction per row of ``shape``, over the remaining axes."""

    def scale(self, size: int) -> float:
        """Return the factor c for directions in ``size`` dimensions."""


@dataclass(frozen=True)
class Rademacher:
    """Random signs, which have the least variance and none for diagonal Jacobians.

    Example:
        >>> Rademacher().scale(5)
        1.0
    """

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Return random signs."""
        return jax.random.rademacher(key, shape, float)

    def scale(self, size: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Gaussian:
    """Standard normal directions.

    Example:
        >>> Gaussian().sample(jax.random.key(0), (2, 3)).shape
        (2, 3)
    """

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Return standard normal draws."""
        return jax.random.normal(key, shape)

    def scale(self, size: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Sphere:
    """Uniform directions of unit length, with E[v v^T] = I/d and so the factor d.

    Example:
        >>> Sphere().scale(5)
        5.0
    """

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Return points of the unit sphere."""
        v = jax.random.normal(key, shape)
        norm = jnp.sqrt(jnp.square(v).reshape(shape[0], -1).sum(1))
        return v / norm.reshape(-1, *[1] * (len(shape) - 1))

    def scale(self, size: int) -> float:
        """Return d."""
        return float(size)
