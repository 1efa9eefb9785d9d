r"""Normal baseline: the covariance of the data, shrunk towards its diagonal.

With one noise level per coordinate the net learns the difference from the denoiser of
the normal law with this covariance. The initial net, whose output is zero, is then
exact for normal data, at every vector of levels.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.data.standardize import Affine
from numpyro_score.nn.embed_context import EmbedContextModule
from numpyro_score.nn.mlp import MLPModule

# the Cholesky factor, 128^3 / 3, then costs as much as three blocks of an MLP of width
# 340, at 2 width^2 each
MAX_SIZE = 128


def normal_baseline(
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
    return jnp.asarray(shrunk_covariance(rows), float)


def shrunk_covariance(
    rows: Float[np.ndarray, "rows size"],
) -> Float[np.ndarray, "size size"]:
    r"""Return :math:`(1 - a) S + a \,\mathrm{diag}(S)` with the best estimated a.

    a is the sum of the estimated variances of the off-diagonal elements of S over the
    sum of their squares, within [0, 1] (Schafer and Strimmer 2005, eq. 8, target D).

    Args:
        rows: data of about unit scale.

    Example:
        >>> rows = np.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> shrunk_covariance(rows).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    count = len(rows)
    centered = rows - rows.mean(0)
    covariance = centered.T @ centered / count
    fourth = np.square(centered).T @ np.square(centered) / count
    variances = (fourth - np.square(covariance)) / (count - 1)
    off = ~np.eye(rows.shape[1], dtype=bool)
    total = np.square(covariance[off]).sum()
    share = np.clip(variances[off].sum() / total, 0.0, 1.0) if total > 0 else 1.0
    # a share of 1e-4 keeps exactly dependent columns apart in float32
    share = max(share, 1e-4)
    return (1 - share) * covariance + share * np.diag(np.diag(covariance))
