r"""Center data on a linear prediction from their context.

What the context says about the mean is taken out before a net sees the data, so the net
learns the law of the residual, on the residual's own scale: for a linear Gaussian model
nothing is left to learn, and posteriors that are far narrower than their prior are seen
at the noise levels that matter to them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.data.context_scale import ContextMap
from numpyro_score.data.standardize import Affine

MIN_RESIDUAL_SCALE = (
    0.1  # of a residual in sd of the data: noise has to hide the mean, too
)
PENALTIES = np.geomspace(1e-7, 1e2, 37)  # of the ridge, per row


def fit_linear_baseline(
    affine: Affine,
    affine_context: ContextMap | None,
    x: Float[Array, "rows *event"],
    context: Float[Array, "rows *shape"] | None,
) -> tuple[Affine, Float[Array, "features size"]]:
    """Return the map whose scale is the residual's, and the coefficients on that scale.

    Raises:
        ValueError: without a context.
    """
    if context is None or affine_context is None:
        raise ValueError(
            "`linear_baseline=True` needs a `context`, from which the data are "
            "predicted. Got None."
        )
    rows = len(x)
    features = np.asarray(affine_context.forward(context), float).reshape(rows, -1)
    targets = np.asarray(affine.forward(x), float).reshape(rows, -1)
    coefficients, spread = ridge(features, targets)
    spread = np.clip(spread, MIN_RESIDUAL_SCALE, 1.0)
    scale = affine.scale * jnp.asarray(spread, float).reshape(affine.scale.shape)
    return Affine(affine.loc, scale), jnp.asarray(coefficients / spread, float)


def ridge(
    features: Float[np.ndarray, "rows features"],
    targets: Float[np.ndarray, "rows size"],
) -> tuple[Float[np.ndarray, "features size"], Float[np.ndarray, " size"]]:
    """Return ridge coefficients and the residual's sd, for centered rows.

    The penalty has the least generalized cross-validation error, the sum over columns
    of RSS / (1 - tr / rows)^2 (Golub, Heath and Wahba 1979, eq. 1.4), by which the
    residual's sd is estimated too.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> coefficients, spread = ridge(x, x[:, :1] - x[:, 1:])
        >>> coefficients.round(3).tolist(), bool(spread[0] < 0.01)
        ([[1.0], [-1.0]], True)
    """
    rows = len(features)
    values, vectors = np.linalg.eigh(features.T @ features)
    values = np.maximum(values, 0.0)
    moments = vectors.T @ (features.T @ targets)
    total = np.square(targets).sum(0)

    def error(penalty: float) -> np.ndarray:
        """Return the cross-validation error of each column."""
        inverse = 1 / (values + penalty * rows)
        share = values * inverse
        explained = (inverse * (2 - share))[:, None] * np.square(moments)
        residual = np.maximum(total - explained.sum(0), 0.0)
        return residual / rows / max(1 - share.sum() / rows, 1 / rows) ** 2

    errors = np.stack([error(penalty) for penalty in PENALTIES])
    best = errors.sum(1).argmin()
    weights = 1 / (values + PENALTIES[best] * rows)
    return vectors @ (weights[:, None] * moments), np.sqrt(errors[best])
