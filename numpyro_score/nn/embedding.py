r"""Embedding of noise level and context, and its application to features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_flags, is_integer
from numpyro_score.typing import Position, Real, Scalar


def sinusoidal(noise: Scalar, num_features: int) -> Float[Array, " features"]:
    r"""Return :math:`[\sin(\omega_k c), \cos(\omega_k c)]`, frequencies 1/4 to 16.

    Vaswani et al. 2017, with frequencies for :math:`c = \log(\sigma)/4`, whose range is
    about two.

    Example:
        >>> sinusoidal(0.0, 4).shape
        (4,)
    """
    frequencies = 2.0 ** jnp.linspace(-2.0, 4.0, num_features // 2)
    angles = frequencies * noise
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def check_net_sizes(width: Any, context_size: Any, optional_context: Any) -> None:
    """Raise unless the sizes of an embedding are counts, and its width even."""
    check_count("context_size", context_size, "the size of the context", least=0)
    check_flags(optional_context=optional_context)
    if not is_integer(width) or width < 2 or width % 2:
        raise ValueError(
            "`embedding_width`, which is `width` in a SetTransformer, must be an even "
            "integer of at least 2: an embedding has a sine and a cosine of each "
            f"frequency. Got {width!r}."
        )


def coordinate_features(x: Position, noise: Real | float) -> Float[Array, "*shape 3"]:
    r"""Return y, c and :math:`y / \sqrt{1 + \sigma^2}` of each coordinate.

    y is the input of unit variance, :math:`y = \hat x / \sqrt{1 + \sigma^2}`, at level
    :math:`c = \log(\sigma) / 4` of its own. The third is its conditional mean under a
    standard normal law.

    Example:
        >>> features = coordinate_features(jnp.ones(1), jnp.zeros(1))
        >>> features.round(3).tolist()
        [[1.0, 0.0, 0.7070000171661377]]
    """
    noise = jnp.broadcast_to(noise, x.shape)
    shrunk = x * jax.lax.rsqrt(1 + jnp.exp(8 * noise))
    return jnp.stack([x, noise.astype(x.dtype), shrunk.astype(x.dtype)], -1)


class NoiseEmbedding(nnx.Module):
    """Two-layer embedding of the noise level and of an optional context vector.

    Args:
        width: size of the embedding.
        context_size: size of the flattened context; 0 for none.
        optional_context: whether the context may be left out; it is then replaced by a
            learned vector.
        num_features: number of sines and cosines of one level.
        num_levels: number of noise levels, one for all coordinates or one for each.
        rngs: keys for the weights.
    """

    def __init__(
        self,
        width: int,
        *,
        context_size: int = 0,
        optional_context: bool = False,
        num_features: int = 32,
        num_levels: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features = num_features
        self.num_levels = num_levels
        self.context_size = context_size
        if optional_context:
            self.no_context = nnx.Param(jnp.zeros(width))
        self.optional_context = optional_context
        size = num_levels * num_features + context_size
        self.input = nnx.Linear(size, width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, noise: Real | float, context: Array | None = None
    ) -> Float[Array, " width"]:
        """Return the embedding of the noise level, or levels, and the context."""
        is_dropped = self.optional_context and context is None
        size = 0 if context is None else jnp.size(context)
        if size != self.context_size and not is_dropped:
            raise ValueError(
                "`context` must have the size that the net was built for. "
                f"Got {size}, expected {self.context_size}."
            )
        encoded = self.encode_context(context)
        levels = jnp.broadcast_to(jnp.ravel(jnp.asarray(noise)), self.num_levels)
        waves = jax.vmap(lambda c: sinusoidal(c, self.num_features))(levels)
        features = jnp.concatenate([waves.ravel(), encoded])
        h = self.input(features.astype(self.input.kernel.dtype))
        if is_dropped:
            h = h + self.no_context[...]
        return jax.nn.silu(self.output(jax.nn.silu(h)))

    def encode_context(self, context: Array | None) -> Float[Array, " context"]:
        """Return the context as one vector; zeros if it is left out."""
        return jnp.zeros(self.context_size) if context is None else jnp.ravel(context)


def film(
    x: Float[Array, "*shape width"], shift_and_scale: Float[Array, " twice"]
) -> Float[Array, "*shape width"]:
    """Return x (1 + scale) + shift, the feature-wise modulation (FiLM) of x.

    Perez et al. 2018.

    Example:
        >>> film(jnp.ones(2), jnp.array([1.0, 1.0, 0.0, 0.0]))
        Array([2., 2.], dtype=float32)
    """
    shift, scale = jnp.split(shift_and_scale, 2)
    return x * (1 + scale) + shift
