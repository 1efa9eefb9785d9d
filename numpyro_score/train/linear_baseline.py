r"""Linear baseline: a ridge regression of the data on their context.

The net learns the law of the residual, standardized by the sd of the residual. For a
linear Gaussian model the initial net, whose output is zero, is then exact, and for
posteriors much narrower than their prior the noise levels are those of the posterior.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.data.context_scale import ContextMap
from numpyro_score.data.standardize import Affine

# in sd of the data: the prediction has an sd of at most 10 residual sds, a thirtieth of
# the highest noise level of NPSE
MIN_RESIDUAL_SCALE = 0.1
# of the ridge, per row, four per decade: from float32 rounding to coefficients of .01
PENALTIES = np.geomspace(1e-7, 1e2, 37)


def fit_linear_baseline(
    affine: Affine,
    affine_context: ContextMap | None,
    x: Float[Array, "rows *event"],
    context: Float[Array, "rows *shape"] | None,
) -> tuple[Affine, Float[Array, "features size"]]:
    """Return the map with the scale of the residual, and coefficients on that scale.

    Args:
        affine: map of the data to the unit scale.
        affine_context: map of the contexts to the unit scale.
        x: data, unconstrained.
        context: contexts in physical units.

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
    coefficients, sd = ridge(features, targets)
    sd = np.clip(sd, MIN_RESIDUAL_SCALE, 1.0)
    scale = affine.scale * jnp.asarray(sd, float).reshape(affine.scale.shape)
    return Affine(affine.loc, scale), jnp.asarray(coefficients / sd, float)


def ridge(
    features: Float[np.ndarray, "rows features"],
    targets: Float[np.ndarray, "rows size"],
) -> tuple[Float[np.ndarray, "features size"], Float[np.ndarray, " size"]]:
    """Return ridge coefficients and the sd of the residual, for centered rows.

    The penalty minimizes the generalized cross-validation error, the sum over columns
    of RSS / (1 - tr / rows)^2 (Golub, Heath and Wahba 1979, eq. 1.4). The sd is the
    square root of that error of each column, divided by rows.

    Args:
        features: regressors.
        targets: responses.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> coefficients, sd = ridge(x, x[:, :1] - x[:, 1:])
        >>> coefficients.round(3).tolist(), bool(sd[0] < 0.01)
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
