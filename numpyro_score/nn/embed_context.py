"""Embeddings of contexts that are images, sets or series.

An embedding maps one context, in its own shape, to a vector, which is the context of
another net. Both are trained together by the loss of the score.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_shape
from numpyro_score.typing import Position, Real


class EmbedContextModule(nnx.Module):
    """Module of :class:`EmbedContext`."""

    def __init__(self, config: "EmbedContext", *, rngs: nnx.Rngs) -> None:
        self.embedding = config.embedding(rngs=rngs)
        self.net = config.net(rngs=rngs)
        self.per_coordinate = getattr(self.net, "per_coordinate", False)

    def __call__(
        self, x: Position, noise: Real | float, context: Array | None = None
    ) -> Position:
        """Return the net's output F for one point and its embedded context."""
        embedded = None if context is None else self.embedding(context)
        return self.net(x, noise, embedded)


@dataclass(frozen=True)
class EmbedContext:
    """Configuration of a net whose context is embedded by another net.

    Args:
        net: configuration of the net; its ``context_size`` is the size of the
            embedding.
        embedding: configuration of the embedding, such as :class:`SetEmbedding`: a
            callable with ``rngs=`` that returns an ``nnx.Module`` from one context to
            one vector.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_score.nn import MLP
        >>> net = MLP(2, width=8, depth=1, context_size=4)
        >>> net = EmbedContext(net, SetEmbedding(num_features=3, size=4, width=8))
        >>> net(rngs=nnx.Rngs(0))(jnp.zeros(2), 0.0, jnp.ones((7, 3))).shape
        (2,)
    """

    net: Callable
    embedding: Callable

    def __call__(self, *, rngs: nnx.Rngs) -> EmbedContextModule:
        """Return the module with fresh weights."""
        return EmbedContextModule(self, rngs=rngs)


class SetEmbeddingModule(nnx.Module):
    """Module of :class:`SetEmbedding`."""

    def __init__(self, config: "SetEmbedding", *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.item = nnx.Linear(config.num_features, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.pooled = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, config.size, rngs=rngs)

    def __call__(self, items: Float[Array, "items *features"]) -> Float[Array, " size"]:
        """Return the embedding of one set of items; their order has no influence."""
        rows = items.reshape(len(items), -1)
        if rows.shape[1] != self.config.num_features:
            raise ValueError(
                "`context` must be a set of items with as many numbers each as the "
                f"embedding was built for. Got items of {rows.shape[1]}, expected "
                f"{self.config.num_features}."
            )
        h = self.hidden(jax.nn.silu(self.item(rows)))
        return self.output(jax.nn.silu(self.pooled(jax.nn.silu(h).mean(0))))


@dataclass(frozen=True)
class SetEmbedding:
    """Configuration of a deep set, an embedding of exchangeable items.

    A net of each item along the first axis, the mean over items, and a net of that
    (Zaheer et al. 2017, theorem 2).

    Args:
        num_features: number of numbers of one item.
        size: number of numbers of the embedding.
        width: number of hidden units.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> embed = SetEmbedding(num_features=1, size=2, width=8)(rngs=nnx.Rngs(0))
        >>> items = jnp.array([[1.0], [2.0], [3.0]])
        >>> bool(jnp.allclose(embed(items), embed(items[::-1]), atol=1e-6))
        True
    """

    num_features: int
    size: int = 16
    width: int = 64

    def __post_init__(self) -> None:
        for name in ("num_features", "size", "width"):
            check_count(name, getattr(self, name), "a number of numbers")

    def __call__(self, *, rngs: nnx.Rngs) -> SetEmbeddingModule:
        """Return the module with fresh weights."""
        return SetEmbeddingModule(self, rngs=rngs)


class ConvEmbeddingModule(nnx.Module):
    """Module of :class:`ConvEmbedding`."""

    def __init__(self, config: "ConvEmbedding", *, rngs: nnx.Rngs) -> None:
        self.config = config
        kernel = (3,) * len(config.grid)
        sizes = (config.num_features, *config.channels)
        self.layers = nnx.List(
            [
                nnx.Conv(a, b, kernel, strides=2, rngs=rngs)
                for a, b in itertools.pairwise(sizes)
            ]
        )
        grid = config.grid
        for _ in config.channels:
            grid = tuple(-(-length // 2) for length in grid)
        flat = sizes[-1] * math.prod(grid)
        self.output = nnx.Linear(flat, config.size, rngs=rngs)

    def __call__(self, values: Float[Array, "..."]) -> Float[Array, " size"]:
        """Return the embedding of one image or series."""
        h = values.reshape(*self.config.grid, self.config.num_features)
        for layer in self.layers:
            h = jax.nn.silu(layer(h))
        return self.output(h.ravel())


@dataclass(frozen=True)
class ConvEmbedding:
    """Configuration of a convolutional embedding of series and images.

    Each convolution halves the grid; a linear layer maps all that is left to the
    embedding, so that positions are not averaged out.

    Args:
        grid: (steps,) of a series or (height, width) of an image.
        num_features: number of channels.
        size: number of numbers of the embedding.
        channels: channels of the layers.

    Raises:
        ValueError: for another number of dimensions, or no layers.

    Example:
        >>> import jax.numpy as jnp
        >>> embed = ConvEmbedding((8, 8), size=4, channels=(4, 8))(rngs=nnx.Rngs(0))
        >>> embed(jnp.zeros((8, 8))).shape
        (4,)
    """

    grid: tuple[int, ...]
    num_features: int = 1
    size: int = 16
    channels: tuple[int, ...] = (16, 32)

    def __post_init__(self) -> None:
        for name in ("num_features", "size"):
            check_count(name, getattr(self, name), "a number of numbers")
        grid = check_shape("grid", self.grid)
        if len(grid) not in (1, 2) or not check_shape("channels", self.channels):
            raise ValueError(
                "`grid` must be (steps,) or (height, width) and `channels` must list a "
                f"layer at least. Got {self}."
            )

    def __call__(self, *, rngs: nnx.Rngs) -> ConvEmbeddingModule:
        """Return the module with fresh weights."""
        return ConvEmbeddingModule(self, rngs=rngs)
