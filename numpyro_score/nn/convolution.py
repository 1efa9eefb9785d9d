"""Convolutions as matrix products on CPUs.

Inside ``lax.scan`` XLA's CPU compiler turns a convolution into a plain loop, slower
than outside, while matrix products keep their speed. On CPUs a convolution is therefore
one matrix product over shifted copies of the image; on other devices it is XLA's. Their
ratio is printed by ``python -m tests.benchmarks.training --unet``.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Images = Float[Array, "batch height width c_in"]
Convolved = Float[Array, "batch height width c_out"]
Kernel = Float[Array, "rows columns c_in c_out"]


def convolve(
    images: Images, kernel: Kernel, strides: Any, padding: Any, **options: Any
) -> Convolved:
    """Return convolved images of the same size: stride 1, zero padding.

    The signature is that of ``jax.lax.conv_general_dilated``, for ``nnx.Conv``.

    Args:
        images: a batch of images, channels last.
        kernel: weights with odd numbers of rows and columns.
        strides: as ``nnx.Conv`` passes it, 1.
        padding: as ``nnx.Conv`` passes it, "SAME".
        options: other arguments that ``nnx.Conv`` passes.

    Example:
        >>> images, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1))
        >>> by_xla = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        >>> convolve(images, kernel, (1, 1), "SAME", **by_xla)[0, :, :, 0].tolist()
        [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """

    def by_xla(images: Images, kernel: Kernel) -> Convolved:
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)

    return jax.lax.platform_dependent(
        images, kernel, cpu=_conv_by_patches, default=by_xla
    )


def _conv_by_patches(images: Images, kernel: Kernel) -> Convolved:
    """Return convolved images by one matrix product over shifted copies."""
    rows, columns, _, c_out = kernel.shape
    height, width = images.shape[1:3]
    margins = ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0))
    padded = jnp.pad(images, margins)
    shifted = [
        padded[:, i : i + height, j : j + width]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, c_out)


Convolution = partial(nnx.Conv, conv_general_dilated=convolve)
