"""U-Net for images, with residual blocks at one scale per channel count."""

from dataclasses import dataclass
from math import gcd

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_shape
from numpyro_score.nn.convolution import Convolution
from numpyro_score.nn.embedding import (
    NoiseEmbedding,
    check_net_sizes,
    coordinate_features,
    film,
)
from numpyro_score.typing import Position, Real

Image = Float[Array, "_ _ _"]  # height, width, channels


def _groups(channels: int) -> int:
    """Return the number of groups: at most 8, with 4 channels or more in each.

    Normalization in groups of one channel would remove the mean of every channel.
    """
    return gcd(channels, min(8, max(channels // 4, 1)))


class ConvBlock(nnx.Module):
    """skip(x) + conv(silu(FiLM(norm(conv(silu(norm(x)))))))."""

    def __init__(self, c_in: int, c_out: int, width: int, *, rngs: nnx.Rngs) -> None:
        zeros = nnx.initializers.zeros_init()
        self.norm_in = nnx.GroupNorm(c_in, _groups(c_in), rngs=rngs)
        self.conv_in = Convolution(c_in, c_out, (3, 3), rngs=rngs)
        self.film = nnx.Linear(width, 2 * c_out, rngs=rngs)
        self.norm_out = nnx.GroupNorm(c_out, _groups(c_out), rngs=rngs)
        self.conv_out = Convolution(c_out, c_out, (3, 3), kernel_init=zeros, rngs=rngs)
        self.skip = Convolution(c_in, c_out, (1, 1), rngs=rngs)

    def __call__(self, x: Image, embedding: Float[Array, " embedding"]) -> Image:
        """Return the output of the block for one image."""
        h = self.conv_in(jax.nn.silu(self.norm_in(x)))
        h = film(self.norm_out(h), self.film(embedding))
        return self.skip(x) + self.conv_out(jax.nn.silu(h))


def _downsample(x: Image) -> Image:
    """Return the means of 2 x 2 pixels."""
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def _upsample(x: Image) -> Image:
    """Return the image with every pixel repeated in both directions."""
    return x.repeat(2, axis=0).repeat(2, axis=1)


class UNetModule(nnx.Module):
    """Module of :class:`UNet`."""

    def __init__(self, config: "UNet", *, rngs: nnx.Rngs) -> None:
        channels, width = config.channels, config.embedding_width
        self.config = config
        self.per_coordinate = config.per_coordinate
        self.embedding = NoiseEmbedding(
            width,
            context_size=config.context_size,
            optional_context=config.optional_context,
            rngs=rngs,
        )
        # one more input channel: 1 in the image, 0 in the padding
        inputs = (3 if config.per_coordinate else 1) * config.image_channels
        self.stem = Convolution(inputs + 1, channels[0], (3, 3), rngs=rngs)
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        self.down = nnx.List([ConvBlock(a, b, width, rngs=rngs) for a, b in pairs])
        self.middle = ConvBlock(channels[-1], channels[-1], width, rngs=rngs)
        self.up = nnx.List(
            [ConvBlock(2 * b, a, width, rngs=rngs) for a, b in reversed(pairs)]
        )
        self.norm = nnx.GroupNorm(channels[0], _groups(channels[0]), rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.head = Convolution(
            channels[0], config.image_channels, (3, 3), kernel_init=zeros, rngs=rngs
        )

    def __call__(
        self, x: Position, noise: Real | float, context: Array | None = None
    ) -> Position:
        """Return the output F for one image."""
        if jnp.shape(x) != self.config.event_shape:
            raise ValueError(
                "`x` must have the image shape that the U-Net was built for. "
                f"Got {jnp.shape(x)}, expected {self.config.event_shape}."
            )
        height, width, _ = self.config.image_shape
        embedding = self.embedding(jnp.mean(jnp.asarray(noise)), context)
        image = coordinate_features(x, noise) if self.per_coordinate else x
        h = self.stem(self._pad(image.reshape(height, width, -1)))
        skips = []
        for k, block in enumerate(self.down):
            h = block(_downsample(h) if k else h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for k, block in enumerate(self.up):
            h = block(
                jnp.concatenate([_upsample(h) if k else h, skips.pop()], -1), embedding
            )
        out = self.head(jax.nn.silu(self.norm(h)))
        return out[:height, :width].reshape(self.config.event_shape)

    def _pad(self, image: Image) -> Image:
        """Return the image padded to a multiple of the coarsest pixel, with a mask."""
        height, width, _ = image.shape
        image = jnp.concatenate([image, jnp.ones_like(image[..., :1])], -1)
        multiple = 2 ** (len(self.config.channels) - 1)
        return jnp.pad(image, ((0, -height % multiple), (0, -width % multiple), (0, 0)))


@dataclass(frozen=True)
class UNet:
    """Configuration of a small U-Net for images of any size and channel count.

    Ronneberger et al. 2015, with the residual blocks of Ho et al. 2020 and no
    attention. For rows of a table use :class:`~numpyro_score.nn.MLP`.

    Args:
        event_shape: (height, width) or (height, width, channels) of one image.
        channels: hidden channels per scale, finest first; each scale halves the size.
        embedding_width: size of the noise embedding.
        context_size: size of the flattened context; 0 for none.
        optional_context: whether the context may be left out, for training with
            ``drop_context``.
        per_coordinate: whether ``noise`` is one level per coordinate. Training with
            :class:`~numpyro_score.loss.PerCoordinate` sets it.

    Raises:
        ValueError: for an event shape that is not an image's, or for no channels.

    Example:
        >>> from flax import nnx
        >>> net = UNet((5, 4), channels=(8, 16))(rngs=nnx.Rngs(0))
        >>> jax.eval_shape(net, jnp.zeros((5, 4)), 0.0).shape
        (5, 4)
    """

    event_shape: tuple[int, ...]
    channels: tuple[int, ...] = (32, 64)
    embedding_width: int = 64
    context_size: int = 0
    optional_context: bool = False
    per_coordinate: bool = False

    def __post_init__(self) -> None:
        if len(check_shape("event_shape", self.event_shape)) not in (2, 3):
            raise ValueError(
                "`event_shape` must be (height, width) or (height, width, channels): a "
                f"U-Net works on images. Got {self.event_shape}."
            )
        if not check_shape("channels", self.channels):
            raise ValueError("`channels` must list at least one channel count. Got ().")
        check_net_sizes(self.embedding_width, self.context_size, self.optional_context)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape with an explicit channel axis."""
        height, width = self.event_shape[:2]
        return height, width, self.image_channels

    @property
    def image_channels(self) -> int:
        """Number of channels of the image."""
        return self.event_shape[2] if len(self.event_shape) == 3 else 1

    def __call__(self, *, rngs: nnx.Rngs) -> UNetModule:
        """Return the module with fresh weights."""
        return UNetModule(self, rngs=rngs)
