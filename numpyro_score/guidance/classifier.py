r"""Classifier guidance: a score plus the gradient of log p(y | x_t).

.. math:: \nabla \log p_t(x | y) = \nabla \log p_t(x) + \nabla \log p_t(y | x), \qquad
          D_y = D + \sigma^2 \nabla \log p(y | \hat x, \sigma)

with the last gradient in the coordinates of the solvers (Dhariwal and Nichol 2021,
section 4; Song et al. 2021, eq. 14).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
from jaxtyping import Array

from numpyro_score.checks import check_callable, check_kind, check_weight
from numpyro_score.data.standardize import Affine
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.typing import Position, Scalar, Time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GradientDenoiser:
    """Denoiser D + weight level^2 grad log_density(x_hat, level)."""

    denoiser: Callable
    log_density: Callable
    weight: Scalar

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D + weight level^2 grad at one standardized point x_t / alpha."""
        gradient = jax.grad(self.log_density)(x, level)
        return self.denoiser(x, level, context) + self.weight * level**2 * gradient


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PhysicalLogDensity:
    """Function (x_t, t) of physical units as a function of (x_hat, level)."""

    log_prob_fn: Callable = field(metadata={"static": True})
    sde: SDE = field(metadata={"static": True})
    standardize: Affine

    def __call__(self, x: Position, level: Scalar) -> Scalar:
        """Return the value at x_t = loc + scale alpha x."""
        t = self.sde.time(level)
        return self.log_prob_fn(self.standardize.inverse(self.sde.alpha(t) * x), t)


def classifier_guidance(
    score: ScoreModel,
    log_prob_fn: Callable[[Position, Time], Scalar],
    *,
    weight: Scalar = 1.0,
) -> ScoreModel:
    """Return the score plus ``weight`` times the gradient of log p(y | x_t).

    The score of p(x | y) for weight 1 if ``log_prob_fn`` is log p(y | x_t) at every t.
    The likelihood p(y | x_0) of a model, or a classifier trained on data without noise,
    is not: for those see :class:`~numpyro_score.model.handlers.noise_level` and the
    kernels.

    Args:
        score: the unconditional score.
        log_prob_fn: (x_t, t) -> log p(y | x_t) of one point in physical units, up to a
            constant; hashable.
        weight: factor of its gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_score import VE
        >>> prior = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), ()
        ... )
        >>> guided = classifier_guidance(prior, lambda x, t: 3.0 * x)
        >>> round(float(guided.score(jnp.array(0.0))), 3)
        3.0
    """
    check_kind("score", score, ScoreModel, "a ScoreModel")
    check_callable("log_prob_fn", log_prob_fn, "log p(y | x_t)")
    check_weight(weight)
    log_density = PhysicalLogDensity(log_prob_fn, score.sde, score.standardize)
    return replace(
        score, denoiser=GradientDenoiser(score.denoiser, log_density, weight)
    )
