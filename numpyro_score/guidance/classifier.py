r"""Classifier guidance: add the gradient of a log likelihood seen through noise.

.. math:: \nabla \log p_t(x | y) = \nabla \log p_t(x) + \nabla \log p_t(y | x), \qquad
          D_y = D + \sigma^2 \nabla \log p(y | \hat x, \sigma)

with the last gradient in the coordinates of the solvers (Dhariwal and Nichol 2021,
section 4; Song et al. 2021, eq. 14).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
from jaxtyping import Array

from numpyro_score.data.standardize import Affine
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.typing import Position, Scalar, Time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GradientDenoiser:
    """A denoiser moved by the gradient of a function of (x_hat, level)."""

    denoiser: Callable
    log_density: Callable
    weight: Scalar

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D + weight sigma^2 grad."""
        push = jax.grad(self.log_density)(x, level)
        return self.denoiser(x, level, context) + self.weight * level**2 * push


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PhysicalLogDensity:
    """A user's function of (x_t, t) as one of (x_hat, level)."""

    log_prob_fn: Callable = field(metadata={"static": True})
    sde: SDE = field(metadata={"static": True})
    standardize: Affine

    def __call__(self, x: Position, level: Scalar) -> Scalar:
        """Evaluate at loc + scale alpha x."""
        t = self.sde.time(level)
        return self.log_prob_fn(self.standardize.inverse(self.sde.alpha(t) * x), t)


def classifier_guidance(
    score: ScoreModel,
    log_prob_fn: Callable[[Position, Time], Scalar],
    *,
    weight: Scalar = 1.0,
) -> ScoreModel:
    """Return the score of the law given what a noise-aware classifier says.

    Exact for weight 1 if ``log_prob_fn`` is the true log p(y | x_t) at every t. A
    classifier that was trained on clean data only is not: for the likelihood of a model
    see :class:`~numpyro_score.model.handlers.noise_level` and the kernels.

    Args:
        score: the unconditional score.
        log_prob_fn: (x_t, t) -> log p(y | x_t) of one point in physical units, up to a
            constant. Hashable, and the same function for equal hashes.
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
    log_density = PhysicalLogDensity(log_prob_fn, score.sde, score.standardize)
    return replace(
        score, denoiser=GradientDenoiser(score.denoiser, log_density, weight)
    )
