"""The density of a score model in physical units, by the probability flow."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score import flow
from numpyro_score.typing import Position, Real, Scalar, Time


def default_divergence(size: int) -> flow.Divergence:
    """Return the exact trace for few numbers per point, frozen random signs above.

    Example:
        >>> default_divergence(2)
        ExactDivergence()
    """
    if size <= flow.MAX_EXACT_SIZE:
        return flow.ExactDivergence()
    return flow.HutchinsonDivergence()


@partial(jax.jit, static_argnames="divergence")
def log_prob(
    score: Any,
    x: Real,
    t: Time | Array | None,
    context: Array | None,
    rtol: Scalar,
    atol: Scalar,
    *,
    divergence: flow.Divergence,
) -> Real:
    """Return log p_t of unconstrained points: one program per shape and divergence.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
        x: unconstrained points of shape ``batch + event_shape``.
        t: time of the density; None for the lowest noise level.
        context: what the score is conditioned on, one for all points.
        rtol: relative tolerance of the integration.
        atol: absolute tolerance of the integration.
        divergence: rule for the trace.
    """

    def one(x: Position, t: Time, context: Array | None) -> Scalar:
        alpha, sigma = score.sde.marginal(t)
        # log p_t(x) = log p(u / alpha) - d log alpha - sum log scale
        value = flow.log_density(
            lambda x, level: score.denoiser(x, level, context),
            score.standardize.forward(x) / alpha,
            sigma / alpha,
            score.sde.sigma_max,
            divergence=divergence,
            rtol=rtol,
            atol=atol,
        )
        jacobian = score.standardize.log_abs_det() - score.size * jnp.log(alpha)
        return value + jacobian

    return score._map(one, x, t, context)
