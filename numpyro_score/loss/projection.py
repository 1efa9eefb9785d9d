r"""Random directions v with :math:`scale\, E[v v^\top] = I`, for traces.

Then :math:`scale\, E[v^\top J v] = tr J` (Hutchinson 1990).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.typing import PRNGKey


@runtime_checkable
class Projection(Protocol):
    """A frozen dataclass that draws directions."""

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Draw one direction per row; the event fills the other axes."""

    def scale(self, size: int) -> float:
        """Return the factor that makes the mean of v v^T the identity."""


@dataclass(frozen=True)
class Rademacher:
    """Random signs: exact for diagonal Jacobians, the least variance of all.

    Example:
        >>> Rademacher().scale(5)
        1.0
    """

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Draw signs."""
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
        """Draw normals."""
        return jax.random.normal(key, shape)

    def scale(self, size: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Sphere:
    """Directions of unit length; the mean of v v^T is I/d, so the factor is d.

    Example:
        >>> Sphere().scale(5)
        5.0
    """

    def sample(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Draw points of the unit sphere."""
        v = jax.random.normal(key, shape)
        norm = jnp.sqrt(jnp.square(v).reshape(shape[0], -1).sum(1))
        return v / norm.reshape(-1, *[1] * (len(shape) - 1))

    def scale(self, size: int) -> float:
        """Return d."""
        return float(size)
