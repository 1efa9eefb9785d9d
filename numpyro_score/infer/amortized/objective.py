r"""The objective for simulations of a model: with the joint score where it is known.

The gradient :math:`g = \nabla_z \log p(z, y)` at a simulation lowers the variance of
the target at low noise (:class:`~numpyro_score.loss.TargetScore`). It is an unbiased
target only where the joint density is smooth: a model that rounds, compares or moves a
support has jumps that no gradient sees. They are looked for along lines
(:mod:`~numpyro_score.infer.amortized.discontinuity`). And a gradient of the
simulations' own density satisfies, by partial integration,

.. math:: E[g_i\, h(z, y)] = -E[\partial_{z_i} h(z, y)]

for every smooth h. It is checked for constants, z and y on the simulations themselves.
"""

import numpy as np
from jaxtyping import Float

from numpyro_score.infer.amortized.discontinuity import has_discontinuities
from numpyro_score.infer.amortized.simulator import Simulations, Simulator, finite_rows
from numpyro_score.loss import DenoisingScoreMatching, TargetScore
from numpyro_score.loss.denoising import Loss

MAX_STANDARD_ERRORS = (
    6.0  # standard errors that an identity may be off, for many at a time
)

Matrix = Float[np.ndarray, "rows _"]


def choose_loss(
    loss: Loss | None, simulator: Simulator, simulations: Simulations
) -> tuple[Loss, Float[np.ndarray, "rows size"] | None]:
    """Return the objective and the joint score at the simulations, if it is used.

    Args:
        loss: the user's choice; None for denoising with the joint score wherever the
            model has one that passes the check, and without otherwise.
        simulator: the model.
        simulations: what will be trained on.

    Raises:
        ValueError: if the user's choice needs the joint score and the model has none.
    """
    if loss is not None:
        wanted = isinstance(getattr(loss, "target", None), TargetScore)
        return loss, simulator.joint_score(simulations) if wanted else None
    if not simulator.intractable and not has_discontinuities(simulator, simulations):
        score = simulator.joint_score(simulations)
        if satisfies_stein_identities(simulations.z, simulations.context, score):
            return DenoisingScoreMatching(target=TargetScore()), score
    return DenoisingScoreMatching(), None


def satisfies_stein_identities(
    z: Matrix, context: Float[np.ndarray, "rows ..."], score: Matrix
) -> bool:
    """Return whether scores pass the identities of partial integration.

    Args:
        z: latents of simulations.
        context: their observations.
        score: gradient of the joint log density in z.

    Example:
        >>> z, y = np.random.default_rng(0).normal(size=(2, 1000, 1))
        >>> [satisfies_stein_identities(z, y, score) for score in (-z, 0 * z)]
        [True, False]
    """
    if not finite_rows(score).all():
        return False
    unit = [_standardized(part.reshape(len(part), -1)) for part in (z, context)]
    tests = np.concatenate([np.ones((len(z), 1)), *unit], axis=1)
    scaled = score * z.std(axis=0)
    for i, column in enumerate(scaled.T):
        terms = column[:, None] * tests
        terms[:, 1 + i] += 1.0  # the derivative of z_i itself, in units of its sd
        errors = terms.std(axis=0) / np.sqrt(len(z)) + 1e-6
        deviation = np.abs(terms.mean(axis=0)) / errors
        if (deviation > MAX_STANDARD_ERRORS).any():
            return False
    return True


def _standardized(rows: Matrix) -> Matrix:
    """Return rows of mean 0 and unit scale."""
    scale = rows.std(axis=0)
    return (rows - rows.mean(axis=0)) / np.where(scale > 0, scale, 1.0)
