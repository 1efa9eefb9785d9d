"""Transformer over the items of a point, equivariant within groups of items."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_shape
from numpyro_score.nn.embedding import (
    NoiseEmbedding,
    check_net_sizes,
    coordinate_features,
    film,
)
from numpyro_score.typing import Position, Real

Items = Float[Array, "items width"]


class AttentionBlock(nnx.Module):
    """x + attention(FiLM(norm(x))), then x + MLP(FiLM(norm(x)))."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        zeros = nnx.initializers.zeros_init()
        self.num_heads = num_heads
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.films = nnx.List(
            [nnx.Linear(width, 2 * width, rngs=rngs) for _ in range(2)]
        )
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.mix = nnx.Linear(width, width, kernel_init=zeros, rngs=rngs)
        self.input = nnx.Linear(width, 2 * width, rngs=rngs)
        self.output = nnx.Linear(2 * width, width, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: Items, embedding: Float[Array, " embedding"]) -> Items:
        """Return the output of the block for all items."""
        h = film(self.norms[0](x), self.films[0](embedding))
        qkv = self.qkv(h).reshape(len(x), 3, self.num_heads, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        x = x + self.mix(mixed.reshape(x.shape))
        h = film(self.norms[1](x), self.films[1](embedding))
        return x + self.output(jax.nn.silu(self.input(h)))


class SetTransformerModule(nnx.Module):
    """Module of :class:`SetTransformer`."""

    def __init__(self, config: "SetTransformer", *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.per_coordinate = config.per_coordinate
        self.embedding = NoiseEmbedding(
            width,
            context_size=config.context_size,
            optional_context=config.optional_context,
            rngs=rngs,
        )
        inputs = (3 if config.per_coordinate else 1) * config.num_features
        self.input = nnx.Linear(inputs, width, rngs=rngs)
        self.groups = nnx.Embed(max(config.item_groups) + 1, width, rngs=rngs)
        self.blocks = nnx.List(
            [
                AttentionBlock(width, config.num_heads, rngs=rngs)
                for _ in range(config.depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(
            width,
            config.num_features,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    def __call__(
        self, x: Position, noise: Real | float, context: Array | None = None
    ) -> Position:
        """Return the output F for one set of items."""
        if jnp.shape(x) != self.config.event_shape:
            raise ValueError(
                "`x` must have the shape that the set transformer was built for. "
                f"Got {jnp.shape(x)}, expected {self.config.event_shape}."
            )
        embedding = self.embedding(jnp.mean(jnp.asarray(noise)), context)
        items = coordinate_features(x, noise) if self.per_coordinate else x
        h = self.input(items.reshape(len(x), -1))
        h = h + self.groups(jnp.array(self.config.item_groups))
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(jax.nn.silu(self.norm(h))).reshape(x.shape)


@dataclass(frozen=True)
class SetTransformer:
    """Configuration of a transformer for points that consist of items.

    Equivariant: exchanging items of one group exchanges the outputs, so that the
    learned law is exchangeable within groups. Items lie along the first axis of a
    point. No dropout and no positions (Vaswani et al. 2017; Lee et al. 2019; noise by
    feature-wise modulation).

    Args:
        event_shape: (items,) or (items, features).
        groups: index of the group of each item, from 0; None for one group. For a law
            without exchangeability give each item a group of its own.
        width: size of an item's embedding; a multiple of ``num_heads``.
        depth: number of attention blocks.
        num_heads: number of attention heads.
        context_size: size of the flattened context; 0 for none.
        optional_context: whether the context may be left out.
        per_coordinate: whether ``noise`` is one level per coordinate. Training with
            :class:`~numpyro_score.loss.PerCoordinate` sets it.

    Raises:
        ValueError: for shapes or groups that do not fit, and for a width that is not a
            multiple of ``num_heads``.

    Example:
        >>> net = SetTransformer((4, 2), width=8, depth=1, num_heads=2)
        >>> net(rngs=nnx.Rngs(0))(jnp.zeros((4, 2)), 0.0).shape
        (4, 2)
    """

    event_shape: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    width: int = 64
    depth: int = 3
    num_heads: int = 4
    context_size: int = 0
    optional_context: bool = False
    per_coordinate: bool = False

    def __post_init__(self) -> None:
        if len(check_shape("event_shape", self.event_shape)) not in (1, 2):
            raise ValueError(
                "`event_shape` must be (items,) or (items, features). "
                f"Got {self.event_shape}."
            )
        groups = self.item_groups
        if len(groups) != self.event_shape[0] or min(groups) < 0:
            raise ValueError(
                "`groups` must give each item its group, counted from 0. "
                f"Got {self.groups} for {self.event_shape[0]} items."
            )
        check_net_sizes(self.width, self.context_size, self.optional_context)
        check_count("depth", self.depth, "a number of layers")
        check_count("num_heads", self.num_heads, "a number of heads")
        if self.width % self.num_heads:
            raise ValueError(
                "`width` must be a multiple of `num_heads`, which share it. "
                f"Got {self.width} and {self.num_heads}."
            )

    @property
    def item_groups(self) -> tuple[int, ...]:
        """Index of the group of each item."""
        return (0,) * self.event_shape[0] if self.groups is None else self.groups

    @property
    def num_features(self) -> int:
        """Number of numbers of one item."""
        return self.event_shape[1] if len(self.event_shape) == 2 else 1

    def __call__(self, *, rngs: nnx.Rngs) -> SetTransformerModule:
        """Return the module with fresh weights."""
        return SetTransformerModule(self, rngs=rngs)
