r"""Estimates of E[f(x)] with Stein control variates and antithetic pairs.

For a law with score s and any polynomial P the function

.. math:: c(x) = \Delta P(x) + \nabla P(x)^\top s(x)

has mean zero (Stein 1972). The intercept of a linear regression of f on such functions
estimates E[f] with the variance of the residuals (Mira et al. 2013).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_flags, check_rows_finite
from numpyro_score.typing import Real


class ControlVariateEstimate(NamedTuple):
    """An estimate of E[f(x)].

    - **mean**: the estimate.
    - **standard_error**: its standard error.
    - **variance_ratio**: variance of the plain mean over that of the estimate.
    """

    mean: Real
    standard_error: Real
    variance_ratio: Real


def _stein_control_variates(
    draws: Float[Array, "draws *event"],
    scores: Float[Array, "draws *event"],
    degree: int,
) -> Float[Array, "draws controls"]:
    """Return values of functions of mean zero under the law with the given scores.

    Args:
        draws: points of the law.
        scores: scores of the law at the points.
        degree: 1 for P = x_i; 2 adds P = x_i x_j.

    Raises:
        ValueError: for another degree.
    """
    if degree not in (1, 2):
        raise ValueError(
            "`degree` must be 1 or 2: the number of controls grows with its power of "
            f"the dimension. Got {degree}."
        )
    x, s = (a.reshape(len(a), -1) for a in (draws, scores))
    if degree == 1:
        return s
    scale = x.std(0)
    x, scaled = (x - x.mean(0)) / scale, s * scale
    products = x[:, :, None] * scaled[:, None, :]
    symmetric = products + products.transpose(0, 2, 1) + 2 * jnp.eye(x.shape[1])
    rows, columns = jnp.triu_indices(x.shape[1])
    return jnp.concatenate([scaled, symmetric[:, rows, columns]], axis=1)


def expectation(
    values: Float[Array, "draws *shape"],
    draws: Float[Array, "draws *event"],
    scores: Float[Array, "draws *event"] | None = None,
    *,
    degree: int = 1,
    antithetic: bool = False,
) -> ControlVariateEstimate:
    """Return an estimate of E[f(x)] by regression on Stein control variates.

    Under a Gaussian law it is exact for linear f (degree 1) and quadratic f (degree 2).
    The controls have mean zero only if the draws follow the law of the scores: they
    reduce variance, not the bias of a solver or of a net. For a learned law pass
    ``score.score(draws)``, at the time of the draws.

    Args:
        values: f(x) of every draw.
        draws: the draws.
        scores: scores at the draws; None for no control variates.
        degree: degree of the polynomials P, 1 or 2.
        antithetic: whether draws 2k and 2k + 1 have opposite noise, as those of
            ``solve(..., antithetic=True)``; pairs are averaged first.

    Raises:
        ValueError: for too few draws to fit the controls, or an odd number of draws.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> bool(jnp.abs(expectation(x, x, -x).mean).max() < 1e-6)
        True
    """
    check_rows_finite("values", values)
    check_rows_finite("draws", draws)
    if scores is not None:
        check_rows_finite("scores", scores)
    if not len(values) == len(draws) == len(draws if scores is None else scores):
        raise ValueError(
            "`values`, `draws` and `scores` must have a row per draw each. Got "
            f"{len(values)}, {len(draws)} and {0 if scores is None else len(scores)}."
        )
    check_flags(antithetic=antithetic)
    check_count("degree", degree, "the degree of the polynomials")
    values, draws = jnp.asarray(values, float), jnp.asarray(draws, float)
    f = values.reshape(len(values), -1)
    plain = f.var(0, ddof=1) / len(f)
    controls = jnp.zeros((len(f), 0), f.dtype)
    if scores is not None:
        controls = _stein_control_variates(draws, scores, degree)
    if antithetic:
        if len(f) % 2:
            raise ValueError(
                "`values` must have an even number of rows: antithetic draws come in "
                f"pairs. Got {len(f)}."
            )
        f, controls = 0.5 * (f[0::2] + f[1::2]), 0.5 * (controls[0::2] + controls[1::2])
    num_free = len(f) - controls.shape[1] - 1
    if num_free < 1:
        raise ValueError(
            "`draws` must outnumber the controls, whose coefficients are fitted to "
            f"them. Got {len(f)} draws or pairs, {controls.shape[1]} controls."
        )
    design = jnp.concatenate([jnp.ones((len(f), 1), f.dtype), controls], axis=1)
    coefficients = jnp.linalg.lstsq(design, f)[0]
    residuals = f - design @ coefficients
    variance = jnp.square(residuals).sum(0) / num_free / len(f)
    shape = values.shape[1:]
    return ControlVariateEstimate(
        coefficients[0].reshape(shape),
        jnp.sqrt(variance).reshape(shape),
        (plain / jnp.maximum(variance, jnp.finfo(f.dtype).tiny)).reshape(shape),
    )
