r"""Embedding of noise level and context, and its application to features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_flags, is_integer
from numpyro_score.typing import Scalar


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


class NoiseEmbedding(nnx.Module):
    """Two-layer embedding of the noise level and of an optional context vector.

    Args:
        width: size of the embedding.
        context_size: size of the flattened context; 0 for none.
        optional_context: whether the context may be left out; it is then replaced by a
            learned vector.
        num_features: number of sines and cosines.
        rngs: keys for the weights.
    """

    def __init__(
        self,
        width: int,
        *,
        context_size: int = 0,
        optional_context: bool = False,
        num_features: int = 32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features = num_features
        self.context_size = context_size
        if optional_context:
            self.no_context = nnx.Param(jnp.zeros(width))
        self.optional_context = optional_context
        self.input = nnx.Linear(num_features + context_size, width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, noise: Scalar, context: Array | None = None
    ) -> Float[Array, " width"]:
        """Return the embedding of one noise level and its context."""
        is_dropped = self.optional_context and context is None
        size = 0 if context is None else jnp.size(context)
        if size != self.context_size and not is_dropped:
            raise ValueError(
                "`context` must have the size that the net was built for. "
                f"Got {size}, expected {self.context_size}."
            )
        encoded = self.encode_context(context)
        features = jnp.concatenate([sinusoidal(noise, self.num_features), encoded])
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
