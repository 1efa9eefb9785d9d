"""The covariance of the normal law to which nets with a level per coordinate add.

With one noise level per coordinate the net learns the difference from the denoiser of
the normal law with this covariance. The initial net, whose output is zero, is then
exact for normal data, at every vector of levels.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.data.covariance import shrunk_covariance
from numpyro_score.data.standardize import Affine
from numpyro_score.nn.embed_context import EmbedContextModule
from numpyro_score.nn.mlp import MLPModule

# the Cholesky factor, 128^3 / 3, then costs as much as three blocks of an MLP of width
# 340, at 2 width^2 each
MAX_SIZE = 128
# keeps dependent columns apart: above the rounding 128 eps = 1.5e-5 of float32
MIN_SHARE = 1e-4


def denoiser_covariance(
    affine: Affine, x: Float[Array, "rows *event"], module: nnx.Module
) -> Float[Array, "size size"] | None:
    """Return the covariance of standardized rows, or None where it has no place.

    Only MLPs get one, for up to 128 numbers: it would break the symmetries of nets for
    sets and images, and those of nets whose code is not known here.

    Args:
        affine: map of the data to the unit scale.
        x: data, unconstrained.
        module: the net.
    """
    net = module.net if isinstance(module, EmbedContextModule) else module
    if not isinstance(net, MLPModule):
        return None
    rows = np.asarray(affine.forward(x), np.float64).reshape(len(x), -1)
    if rows.shape[1] > MAX_SIZE or len(rows) < 2:
        return None
    return jnp.asarray(shrunk_covariance(rows, MIN_SHARE), float)
