"""Convolutions that are also fast inside a compiled loop on a CPU.

Inside ``lax.scan`` XLA's CPU compiler takes a plain loop for a convolution, far slower
than outside; matrix products keep their speed. So on CPUs a convolution is one matrix
product over shifted copies of the image. Elsewhere it is XLA's own. The ratio of the
two is printed by ``python -m tests.benchmarks.training --unet``.
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
    """Convolve with stride 1 and as much padding as keeps the size.

    The signature is that of ``jax.lax.conv_general_dilated``, so that ``nnx.Conv``
    takes it in its place.

    Args:
        images: a batch of images, channels last.
        kernel: weights with odd numbers of rows and columns.
        strides: as ``nnx.Conv`` passes it, 1.
        padding: as ``nnx.Conv`` passes it, "SAME".
        options: what else ``nnx.Conv`` passes.

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
    """Convolve by one matrix product over shifted copies of the images."""
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
