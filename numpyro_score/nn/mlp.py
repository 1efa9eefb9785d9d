"""Residual multilayer perceptron with feature-wise modulation by the noise level."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_flags
from numpyro_score.nn.embedding import NoiseEmbedding, coordinate_features, film
from numpyro_score.typing import Position, Real

# of one coordinate: the lowest frequency has a period beyond the range of levels,
# the highest resolves a factor of 1.2 between levels, as 2 pi / 16 in 4 log(sigma)
COORDINATE_FEATURES = 8


class ResidualBlock(nnx.Module):
    """x + W2 silu(FiLM(W1 norm(x))), with or without the norm."""

    def __init__(self, width: int, norm: bool = True, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs) if norm else _identity
        self.input = nnx.Linear(width, width, rngs=rngs)
        self.film = nnx.Linear(width, 2 * width, rngs=rngs)
        self.output = nnx.Linear(
            width, width, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(
        self, x: Float[Array, " width"], embedding: Float[Array, " width"]
    ) -> Float[Array, " width"]:
        """Return the output of the block."""
        h = film(self.input(self.norm(x)), self.film(embedding))
        return x + self.output(jax.nn.silu(h))


def _identity(x: Array) -> Array:
    return x


class MLPModule(nnx.Module):
    """Module of :class:`MLP`."""

    def __init__(self, config: "MLP", *, rngs: nnx.Rngs) -> None:
        size, width = config.size, config.width
        self.per_coordinate = config.per_coordinate
        several = {"num_levels": size, "num_features": COORDINATE_FEATURES}
        self.embedding = NoiseEmbedding(
            width,
            **(several if config.per_coordinate else {}),
            context_size=config.context_size,
            optional_context=config.optional_context,
            rngs=rngs,
        )
        inputs = (3 if config.per_coordinate else 1) * size + config.context_size
        self.input = nnx.Linear(inputs, width, rngs=rngs)
        self.blocks = nnx.List(
            [ResidualBlock(width, config.norm, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs) if config.norm else _identity
        self.output = nnx.Linear(
            width, size, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(
        self, x: Position, noise: Real | float, context: Array | None = None
    ) -> Position:
        """Return the output F for one point of any shape."""
        size = self.output.out_features
        if jnp.size(x) != size:
            raise ValueError(
                "`x` must have as many numbers as the MLP was built for. "
                f"Got shape {jnp.shape(x)}, expected {size} numbers."
            )
        embedding = self.embedding(noise, context)
        # also an input beside x: their differences then take one layer
        encoded = self.embedding.encode_context(context)
        point = coordinate_features(x, noise) if self.per_coordinate else x
        h = self.input(jnp.concatenate([jnp.ravel(point), encoded.astype(x.dtype)]))
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(jax.nn.silu(self.norm(h))).reshape(jnp.shape(x))


@dataclass(frozen=True)
class MLP:
    """Configuration of a residual MLP for points of ``size`` numbers.

    For tables and images of up to a few hundred numbers; use
    :class:`~numpyro_score.nn.UNet` for larger images.

    Args:
        size: number of numbers of one point (the product of its event shape).
        width: number of hidden units.
        depth: number of residual blocks.
        context_size: size of the flattened context; 0 for none.
        optional_context: whether the context may be left out, for training with
            ``drop_context``.
        norm: whether every block begins with a layer norm. Without it the net can
            represent sums and differences of x and the context exactly, which is better
            for posteriors much narrower than their prior.
        per_coordinate: whether ``noise`` is one level per coordinate. Training with
            :class:`~numpyro_score.loss.PerCoordinate` sets it.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> from flax import nnx
        >>> net = MLP(2, width=8, depth=1)(rngs=nnx.Rngs(0))
        >>> net(jnp.zeros(2), 0.0).shape
        (2,)
    """

    size: int
    width: int = 128
    depth: int = 3
    context_size: int = 0
    optional_context: bool = False
    norm: bool = True
    per_coordinate: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "width", "depth"):
            check_count(name, getattr(self, name), "a number of numbers or layers")
        check_count("context_size", self.context_size, "a number of numbers", least=0)
        check_flags(optional_context=self.optional_context, norm=self.norm)

    def __call__(self, *, rngs: nnx.Rngs) -> MLPModule:
        """Return the module with fresh weights."""
        return MLPModule(self, rngs=rngs)
