r"""The choice of the training objective of a model's simulations.

The joint score :math:`g = \nabla_z \log p(z, y)` at a simulation reduces the variance
of the denoising target at low noise (:class:`~numpyro_score.loss.TargetScore`). The
target is unbiased only if the joint density is absolutely continuous in z. Models that
round, compare, or have a support that depends on latents are not; their discontinuities
are detected by :mod:`~numpyro_score.infer.amortized.discontinuity`. Furthermore the
score of the law of the simulations satisfies Stein's identities

.. math:: E[g_i\, h(z, y)] = -E[\partial_{z_i} h(z, y)]

for every smooth h; they are tested on the simulations for h = 1, z and y.

The target weighs g and the noise by the mean of :math:`|g|^2` over the simulations. If
the part of the likelihood in that, :math:`|\nabla_z \log p(y | z)|^2`, is the mean of
very different observations, such as counts of a log-normal rate, g adds variance where
the posterior is narrow, and is not used. The prior's part may be large at the edges of
its support and says nothing of observations.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_score.data.context_scale import ContextScale
from numpyro_score.infer.amortized.discontinuity import has_discontinuities
from numpyro_score.infer.amortized.simulator import Simulations, Simulator, finite_rows
from numpyro_score.loss import DenoisingScoreMatching, TargetScore
from numpyro_score.loss.denoising import Loss

# Of simulations that carry the mean of |l|^2. It is smaller for y ~ Poisson(exp(2x)),
# where g moves the posterior mean far off, and about as large for y ~ Normal(0,
# exp(2x)), where g does no harm (`python -m tests.benchmarks.constants --only target`).
MIN_EFFECTIVE_SHARE = 0.08
MAX_STANDARD_ERRORS = 6.0  # of an identity; normal two-sided probability 2e-9

Matrix = Float[np.ndarray, "rows _"]


def choose_loss(
    loss: Loss | None, simulator: Simulator, simulations: Simulations
) -> tuple[Loss, Float[np.ndarray, "rows size"] | None]:
    """Return the objective, and the joint score at the simulations if it needs it.

    Args:
        loss: the user's choice; None for denoising score matching, with the joint score
            if it is tractable, passes both tests and has no heavy tails.
        simulator: the model.
        simulations: the training data.

    Raises:
        ValueError: if ``loss`` needs the joint score and the model has none.
    """
    if loss is not None:
        wanted = isinstance(getattr(loss, "target", None), TargetScore)
        return loss, simulator.joint_score(simulations) if wanted else None
    if not simulator.intractable and not has_discontinuities(simulator, simulations):
        score = simulator.joint_score(simulations)
        z, context, _ = simulations
        prior_score = simulator.prior_score
        is_right = satisfies_stein_identities(z, context, score)
        if is_right and not is_heavy_tailed(z, context, score - prior_score(z)):
            return DenoisingScoreMatching(target=TargetScore()), score
    return DenoisingScoreMatching(), None


def satisfies_stein_identities(
    z: Matrix, context: Float[np.ndarray, "rows ..."], score: Matrix
) -> bool:
    """Return whether scores satisfy Stein's identities within Monte Carlo error.

    Args:
        z: latents of the simulations.
        context: their observations.
        score: gradient of the joint log density in z at the simulations.

    Example:
        >>> z, y = np.random.default_rng(0).normal(size=(2, 1000, 1))
        >>> [satisfies_stein_identities(z, y, score) for score in (-z, 0 * z)]
        [True, False]
    """
    if not finite_rows(score).all():
        return False
    mean, error = stein_residuals(z, score, context.reshape(len(context), -1))
    return bool((np.abs(mean) <= MAX_STANDARD_ERRORS * (error + 1e-6)).all())


def stein_residuals(
    z: Matrix, score: Matrix, functions: Matrix | None = None
) -> tuple[Float[np.ndarray, "size _"], Float[np.ndarray, "size _"]]:
    r"""Return :math:`E[g_i h + \partial_{z_i} h]` over draws, and its standard errors.

    For h = 1, each coordinate of z and each further function; z and functions in units
    of their standard deviation.

    Args:
        z: draws.
        score: g, the gradient of the log density in z.
        functions: further h, of which none depends on z.
    """
    unit = [_standardized(part) for part in (z, functions) if part is not None]
    tests = np.concatenate([np.ones((len(z), 1)), *unit], axis=1)
    moments = []
    for i, column in enumerate((score * z.std(axis=0)).T):
        terms = column[:, None] * tests
        terms[:, 1 + i] += 1.0  # the derivative of z_i itself
        moments.append((terms.mean(axis=0), terms.std(axis=0) / np.sqrt(len(z))))
    mean, error = np.array(moments).transpose(1, 0, 2)
    return mean, error


def is_heavy_tailed(
    z: Matrix, context: Float[np.ndarray, "rows ..."], score: Matrix
) -> bool:
    """Return whether few simulations carry E|l|^2, and observations have heavy tails.

    Args:
        z: latents of the simulations.
        context: their observations.
        score: gradient l of the log likelihood in z at the simulations.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(1000, 1))
        >>> counts = np.exp(3 * z)
        >>> is_heavy_tailed(z, counts, z), is_heavy_tailed(z, counts, counts)
        (False, True)
    """
    square = np.square(np.asarray(score, float) * z.std(axis=0)).sum(axis=1)
    largest = square.max()
    if largest == 0:  # observations that tell nothing of the latents
        return False
    effective = (square / largest).sum() ** 2 / np.square(square / largest).sum()
    if effective > MIN_EFFECTIVE_SHARE * len(z):
        return False
    return bool((ContextScale.fit(jnp.asarray(context)).width > 0).any())


def _standardized(rows: Matrix) -> Matrix:
    """Return rows of mean 0 and standard deviation 1 (constant columns: 0)."""
    scale = rows.std(axis=0)
    return (rows - rows.mean(axis=0)) / np.where(scale > 0, scale, 1.0)
