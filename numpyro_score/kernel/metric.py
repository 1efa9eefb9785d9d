"""The metric: diagonal, dense, or one block per group of sites.

A metric is stored as NumPyro's HMC stores it, by the matrix S with covariance S^T S: a
vector, a matrix, or a dict of these keyed by tuples of site names.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

Vector = Float[Array, " d"]
Metric = Any  # Array | dict[tuple[str, ...], Array]


def ravel_blocks(z: Any, names: tuple[str, ...] | None) -> Vector:
    """Return the sites of one block (None: the whole position) as one vector."""
    block = z if names is None else tuple(z[name] for name in names)
    return ravel_pytree(block)[0]


def whiten(sqrt: Metric, gradient: Any) -> Vector:
    """Return S g, the gradient in coordinates whose covariance is the identity."""
    if not isinstance(sqrt, dict):
        return _scale(sqrt, ravel_blocks(gradient, None))
    blocks = [_scale(s, ravel_blocks(gradient, names)) for names, s in sqrt.items()]
    return jnp.concatenate(blocks)


def displace(sqrt: Metric, z: Any, y: Vector) -> Any:
    """Return z + S^T y, the position at a whitened displacement y from z."""
    if not isinstance(sqrt, dict):
        flat, unravel = ravel_pytree(z)
        return unravel(flat + _scale(sqrt.T, y))
    moved, start = dict(z), 0
    for names, s in sqrt.items():
        flat, unravel = ravel_pytree(tuple(z[name] for name in names))
        step = _scale(s.T, y[start : start + flat.size])
        moved.update(zip(names, unravel(flat + step), strict=True))
        start += flat.size
    return moved


def _scale(sqrt: Array, vector: Vector) -> Vector:
    return sqrt @ vector if sqrt.ndim == 2 else sqrt * vector


class Moments(NamedTuple):
    """Mean, scatter and number of the draws of a window (Chan et al. 1979)."""

    mean: Array
    scatter: Array
    number: Array

    @classmethod
    def zero(cls, like: Array) -> "Moments":
        """Return the moments of no draws, for a vector or a matrix of covariance."""
        return cls(jnp.zeros(like.shape[-1]), jnp.zeros_like(like), jnp.zeros((), int))

    def merge(self, draws: Float[Array, "chains d"]) -> "Moments":
        """Return the moments with one draw of every chain taken in."""
        size = len(draws)
        mean = draws.mean(0)
        gap = mean - self.mean
        number = self.number + size
        scatter = self.scatter + _outer(draws - mean, self.scatter.ndim)
        # the gap between the means of both parts adds to the scatter
        scatter += _outer(gap[None], self.scatter.ndim) * self.number * size / number
        return Moments(self.mean + gap * size / number, scatter, number)


def _outer(deviations: Float[Array, "n d"], ndim: int) -> Array:
    """Return the summed squares, or products, of deviations."""
    return jnp.square(deviations).sum(0) if ndim == 1 else deviations.T @ deviations
