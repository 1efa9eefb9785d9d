"""The metric: diagonal, dense, or one block per group of sites.

A metric is stored as NumPyro's HMC stores it, by the matrix S with covariance S^T S: a
vector, a matrix, a :class:`LowRankSqrt`, or a dict of these keyed by tuples of site
names.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.langevin import IntegratorState, PerChain, PointState
from numpyro_score.model.potential import Evaluation, Potential, potential_difference

# scatter between chains over that within them: an R-hat of (1 + 1)^1/2 = 1.4
MAX_BETWEEN_WITHIN = 1.0

# Size of a matrix up to which its products are written as sums, which XLA fuses for a
# CPU, where it calls a library for each matrix product: that takes two to four times as
# long for ten coordinates (`python -m tests.benchmarks.transition --dense-mass`).
MAX_SUMMED = 16

Vector = Float[Array, " d"]
LAST = -1  # the axis of chains while they move
Flat = Float[Array, "d *chains"]
Metric = Any  # Array | LowRankSqrt | dict[tuple[str, ...], Array]


class LowRankSqrt(NamedTuple):
    r"""Square root S of a diagonal metric with correlations along k directions.

    The covariance is :math:`D (I + V (\Lambda - I) V^\top) D` with diagonal D and
    orthonormal columns of V, and :math:`S = (I + V (\Lambda^{1/2} - I) V^\top) D`.

    - **scale**: the diagonal of D.
    - **basis**: V.
    - **stretch**: the diagonal of the square root of Lambda.
    """

    scale: Float[Array, " d"]
    basis: Float[Array, "d k"]
    stretch: Float[Array, " k"]

    @classmethod
    def diagonal(cls, scale: Float[Array, " d"], k: int) -> "LowRankSqrt":
        """Return a diagonal metric with room for k directions."""
        return cls(scale, jnp.zeros((len(scale), k), scale.dtype), jnp.ones(k))

    def whiten(self, gradient: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return S g."""
        return self._along(self.scale * gradient, self.stretch)

    def unwhiten(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return S^T y."""
        return self.scale * self._along(y, self.stretch)

    def whiten_scaled(self, rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Return S^-T D y for displacements D y, one per row."""
        return jax.vmap(lambda row: self._along(row, 1 / self.stretch))(rows)

    def inverse(self) -> "LowRankSqrt":
        """Return scale, basis and stretch of S^-T."""
        return LowRankSqrt(1 / self.scale, self.basis, 1 / self.stretch)

    def covariance(self) -> "LowRankSqrt":
        """Return scale, basis and stretch (here Lambda) of the covariance."""
        return self._replace(stretch=jnp.square(self.stretch))

    def _along(self, y: Array, stretch: Array) -> Array:
        return y + self.basis @ ((stretch - 1) * (self.basis.T @ y))


def scales(sqrt: Any) -> Float[Array, "*chains d"]:
    """Return the diagonal of a metric without correlations, a matrix or of low rank."""
    if isinstance(sqrt, LowRankSqrt):
        return sqrt.scale
    return jnp.diagonal(sqrt, axis1=-2, axis2=-1)


def ravel_blocks(z: Any, names: tuple[str, ...] | None) -> Vector:
    """Return the sites of one block (None: the whole position) as one vector."""
    block = z if names is None else tuple(z[name] for name in names)
    return ravel_pytree(block)[0]


class RavelledPosition(NamedTuple):
    """Layout of a position as one vector, in the order of the metric.

    Chains of a batch stand in the second axis of vectors, in the last of positions.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    order: tuple[int, ...]
    batch: tuple[int, ...]

    @classmethod
    def of(
        cls, sqrt: Metric, z: Any, batch: tuple[int, ...] = ()
    ) -> "RavelledPosition":
        """Return the coordinates of positions like z, which is that of one chain.

        Args:
            sqrt: the metric.
            z: the position.
            batch: number of chains; empty for one chain.
        """
        leaves, structure = jax.tree.flatten(z)
        order: Any = range(len(leaves))
        if isinstance(sqrt, dict):
            indices = jax.tree.unflatten(structure, order)
            order = jax.tree.leaves([indices[name] for block in sqrt for name in block])
        shapes = tuple(map(jnp.shape, leaves))
        dtypes = tuple(map(jnp.result_type, leaves))
        return cls(structure, shapes, dtypes, tuple(order), batch)

    def ravel(self, z: Any) -> Float[Array, "d *chains"]:
        """Return a position, or a gradient, as a vector."""
        leaves = jax.tree.leaves(z)
        parts = [
            leaves[i].reshape(-1, *leaves[i].shape[len(self.shapes[i]) :])
            for i in self.order
        ]
        return jnp.concatenate(parts) if parts else jnp.zeros((0, *self.batch))

    def start(self, z: dict[str, Any], name: str) -> int:
        """Return the number of a site's first coordinate in the vector.

        Args:
            z: a position, by site.
            name: of the site.
        """
        leaf = sorted(z).index(name)  # the order of leaves of a dictionary
        before = self.order[: self.order.index(leaf)]
        return sum(math.prod(self.shapes[i]) for i in before)

    def unravel(self, flat: Float[Array, "d *chains"]) -> Any:
        """Return the position that a vector is."""
        leaves: list[Any] = [None] * len(self.order)
        start = 0
        for i in self.order:
            shape = self.shapes[i]
            end = start + math.prod(shape)
            leaf = flat[start:end].reshape(*shape, *flat.shape[1:])
            leaves[i] = leaf.astype(self.dtypes[i])
            start = end
        return jax.tree.unflatten(self.structure, leaves)


def whiten(sqrt: Metric, gradient: Vector) -> Vector:
    """Return S g, the gradient in coordinates whose covariance is the identity."""
    return _blockwise(sqrt, gradient, partial(_scale, transpose=False))


def unwhiten(sqrt: Metric, y: Vector) -> Vector:
    """Return S^T y, the displacement that y is in whitened coordinates."""
    return _blockwise(sqrt, y, partial(_scale, transpose=True))


def whiten_displacement(inverse: Metric, displacement: Vector) -> Vector:
    """Return S^-T x, the whitened coordinates of a displacement.

    Args:
        inverse: of S, as ``mass_matrix_sqrt`` holds it (for a low rank that of S^T).
        displacement: x.
    """

    def scale(inverse: Any, part: Vector) -> Vector:
        return _scale(inverse, part, transpose=not isinstance(inverse, LowRankSqrt))

    return _blockwise(inverse, displacement, scale)


def _blockwise(sqrt: Metric, vector: Vector, scale: Callable) -> Vector:
    """Return a map of the blocks of a metric and of a vector."""
    if not isinstance(sqrt, dict):
        return scale(sqrt, vector)
    ends = np.cumsum([_size(s) for s in sqrt.values()])[:-1]
    pairs = zip(sqrt.values(), jnp.split(vector, ends), strict=True)
    return jnp.concatenate([scale(s, part) for s, part in pairs])


def _size(sqrt: Any) -> int:
    return (sqrt.scale if isinstance(sqrt, LowRankSqrt) else sqrt).shape[-1]


def _scale(sqrt: Any, vector: Vector, transpose: bool) -> Vector:
    if isinstance(sqrt, LowRankSqrt):
        return sqrt.unwhiten(vector) if transpose else sqrt.whiten(vector)
    if sqrt.ndim == 1:
        return sqrt * vector
    if len(vector) > MAX_SUMMED:
        return vector @ sqrt if transpose else sqrt @ vector
    return (vector[:, None] * sqrt).sum(0) if transpose else (sqrt * vector).sum(1)


class WhitenedTarget(NamedTuple):
    """Whitened displacements from where a transition starts, and the target in them.

    ``aux`` of a point is its evaluation, with the gradient in the coordinates.
    """

    potential: Potential
    coordinates: RavelledPosition
    origin: Flat
    sqrt: Metric
    sqrt_axis: int | None
    batched: bool

    @classmethod
    def of(
        cls,
        z: Any,
        sqrt: Metric,
        batch: tuple[int, ...],
        potential: Potential,
        shared: bool,
    ) -> "WhitenedTarget":
        """Return the target around z.

        Args:
            z: a position, with the chains in the last axis.
            sqrt: the metric, common to all chains or one for each.
            batch: number of chains; empty for one chain.
            potential: the target.
            shared: whether the chains have one metric.
        """
        axis = None if shared else 0
        one = jax.tree.map(lambda x: x[..., 0], z) if batch else z
        coordinates = RavelledPosition.of(sqrt, one, batch)
        origin = coordinates.ravel(z)
        return cls(potential, coordinates, origin, sqrt, axis, bool(batch))

    def start(self, z: Any, evaluation: Evaluation, momentum: Flat) -> IntegratorState:
        """Return the phase at the origin."""
        flat = self.coordinates.ravel(evaluation.grad)
        place = PointState(
            jnp.zeros_like(self.origin),
            self._scale(whiten, flat),
            evaluation._replace(grad=flat),
        )
        return IntegratorState(place, momentum)

    def evaluate(self, y: Flat) -> PointState:
        """Return the place at a displacement."""
        evaluate = self.potential.evaluate
        if self.batched:
            count = self.coordinates.batch[0]  # a model may have no latent sites
            evaluate = jax.vmap(evaluate, LAST, LAST, axis_size=count)
        evaluation = evaluate(self._position(y))
        flat = self.coordinates.ravel(evaluation.grad)
        return PointState(y, self._scale(whiten, flat), evaluation._replace(grad=flat))

    def difference(self, start: PointState, end: PointState, limit: float) -> PerChain:
        """Return the change of the potential, or infinity where it is uncertain."""
        change = partial(potential_difference, self.potential, max_error=limit)
        if self.batched:
            size = len(start.aux.value)
            change = jax.vmap(change, (LAST, LAST), axis_size=size)
        return change(start.aux, end.aux)

    def to_latents(self, place: PointState) -> tuple[Any, Evaluation]:
        """Return the position z of a place, and its evaluation."""
        detail = place.aux
        grad = self.coordinates.unravel(detail.grad)
        return self._position(place.position), detail._replace(grad=grad)

    def _position(self, y: Flat) -> Any:
        return self.coordinates.unravel(self.origin + self._scale(unwhiten, y))

    def _scale(self, scale: Callable, vector: Flat) -> Flat:
        if self.batched:
            scale = jax.vmap(scale, (self.sqrt_axis, LAST), LAST)
        return scale(self.sqrt, vector)


class WelfordState(NamedTuple):
    """Moments of the draws of a window, of one chain or several (Welford 1962).

    - **mean**: of every chain.
    - **scatter**: of the draws about the means of their chains, summed over chains.
    - **number**: of draws of every chain.
    """

    mean: Float[Array, "chains d"]
    scatter: Array
    number: Array

    @classmethod
    def zero(cls, like: Array) -> "WelfordState":
        """Return the moments of no draws of one chain, for a covariance like this."""
        mean = jnp.zeros((1, like.shape[-1]))
        return cls(mean, jnp.zeros_like(like), jnp.zeros((), int))

    def for_chains(self, num_chains: int) -> "WelfordState":
        """Return the moments of no draws of several chains."""
        return self._replace(mean=jnp.zeros((num_chains, self.mean.shape[-1])))

    def merge(self, draws: Float[Array, "chains d"]) -> "WelfordState":
        """Return the moments with one draw of every chain taken in."""
        number = self.number + 1
        gap = draws - self.mean
        scatter = self.scatter + _outer(gap, self.scatter.ndim) * (1 - 1 / number)
        return WelfordState(self.mean + gap / number, scatter, number)

    def total(self) -> tuple[Array, Array, Array]:
        """Return mean, scatter and number as of one chain.

        The scatter is that about the common mean where chains have mixed, and where
        they have not that about their own means: chains that are still on their way
        would stretch the metric along the distances between them.
        """
        num_chains = len(self.mean)
        mean = self.mean.mean(axis=0)
        between = self.number * _outer(self.mean - mean, self.scatter.ndim)
        ratio = _variances(between) / jnp.maximum(_variances(self.scatter), 1e-30)
        mixed = jnp.max(ratio, initial=0.0) < MAX_BETWEEN_WITHIN
        scatter = self.scatter + jnp.where(mixed, between, 0.0)
        return mean, scatter, num_chains * self.number


def _outer(deviations: Float[Array, "n d"], ndim: int) -> Array:
    """Return the summed squares, or products, of deviations."""
    return jnp.square(deviations).sum(0) if ndim == 1 else deviations.T @ deviations


def _variances(scatter: Array) -> Array:
    return scatter if scatter.ndim == 1 else jnp.diagonal(scatter)
