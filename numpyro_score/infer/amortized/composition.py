r"""The denoiser given many observations from the denoiser given one.

For observations that are independent given z,
:math:`p(z_0 | z_t, y_{1:n}) \propto p(z_0 | z_t)^{1-n} \prod_j p(z_0 | z_t, y_j)`.
With every factor approximated by a Gaussian of mean :math:`D_j`, its denoised point,
and precision :math:`P_j`, the composed denoiser is

.. math:: D = P^{-1} \Big( \sum_j P_j D_j + (1 - n) P_\lambda D_\lambda \Big), \qquad
          P = \sum_j P_j + (1 - n) P_\lambda,

with :math:`\lambda` for the prior (Linhart et al. 2024, there for scores). It is exact
for Gaussian posteriors, and for all posteriors in the limit of low noise. Sums of
scores with the score of the prior without noise (Geffner et al. 2023) are exact at t =
0 only and need Langevin steps at each level; they are not implemented.

Without noise, :math:`P_j = \Lambda_j + I/r^2`. The vector in brackets, less P x, is

.. math:: g(x) = \sum_j (P_j - P_\lambda)(D_j - x) + \sum_j P_\lambda (D_j - D_\lambda)
          + P_\lambda (D_\lambda - x),

an estimate of the score *without* noise at x, and :math:`D = x + P^{-1} g`. This form
has no difference of sums over n terms, which would lose digits at high noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import Position, Scalar

Precisions = Float[Array, "observations size size"]
Matrix = Float[Array, "size size"]
NUM_DRAWS = 500  # per observation; relative error of their variance (2/500)^(1/2) = 6 %
MIN_VARIANCE = 1e-6  # of standardized z, about float32 rounding of its squares


class Composition(ABC):
    r"""A rule for :math:`\Lambda = P - I / r^2`, the precisions without the noise."""

    @abstractmethod
    def precisions(
        self,
        factors: "PosteriorFactors",
        x: Position,
        level: Scalar,
    ) -> tuple[Precisions, Matrix]:
        """Return the precisions given each observation and that of the prior."""


@dataclass(frozen=True)
class GaussianComposition(Composition):
    r"""Precisions of posterior draws, :math:`\Lambda_j = \Sigma_j^{-1}`; the default.

    GAUSS of Linhart et al. 2024, section 3.2. The same at every point and level.

    Example:
        >>> GaussianComposition()
        GaussianComposition()
    """

    def precisions(
        self, factors: "PosteriorFactors", x: Position, level: Scalar
    ) -> tuple[Precisions, Matrix]:
        """Return the same precisions at every point and level."""
        return factors.precisions, factors.prior_precision


@dataclass(frozen=True)
class JacobianComposition(Composition):
    r"""Precisions of the covariances :math:`r^2 \partial D / \partial x` at the point.

    JAC of Linhart et al. 2024, section 3.2, from Tweedie's formula for the second
    moment. It depends on the point, as the covariance of a posterior that is not
    Gaussian does, costs one forward-mode derivative per coordinate of z, and needs a
    net whose derivatives are accurate at all levels.

    Example:
        >>> JacobianComposition()
        JacobianComposition()
    """

    def precisions(
        self, factors: "PosteriorFactors", x: Position, level: Scalar
    ) -> tuple[Precisions, Matrix]:
        """Return the precisions from the Jacobians of the denoisers."""

        def precision(denoise: Callable[[Position], Position]) -> Matrix:
            jacobian = jax.jacfwd(denoise)(x)
            values, vectors = jnp.linalg.eigh(0.5 * (jacobian + jacobian.T))
            # v / (v + r^2) for a Gaussian of variance v, between 0 and 1
            shrinkage = jnp.clip(values, MIN_VARIANCE, 1.0)
            return (vectors * (1 / shrinkage - 1) / level**2) @ vectors.T

        each = jax.vmap(lambda c: precision(lambda x: factors.denoiser(x, level, c)))
        return each(factors.contexts), precision(
            lambda x: factors.prior(x, level, None)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PosteriorFactors:
    """Denoisers, observations and precisions of the factors.

    - **denoiser**: D(x, level, context) given one observation.
    - **prior**: D(x, level, None) of the prior.
    - **contexts**: the observations, one per row.
    - **precisions**: inverse covariances of posterior draws, per observation.
    - **prior_precision**: inverse covariance of prior draws.
    - **weight**: number of observations that each row stands for.
    - **learned_prior**: denoiser of the prior by the net of the factors, subtracted
      from each: their errors where the net extrapolates are alike and cancel, and
      ``prior`` counts once. None for ``prior``.
    """

    denoiser: Callable
    prior: Callable
    contexts: Array
    precisions: Any
    prior_precision: Any
    weight: Scalar | float = 1.0
    learned_prior: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ComposedDenoiser:
    """The denoiser of z given all observations, from :func:`compose`."""

    factors: PosteriorFactors
    composition: Composition = field(metadata={"static": True})

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return the composed denoised point of one standardized point."""
        factors = self.factors
        each, prior = self.composition.precisions(factors, x, level)
        unit = jnp.eye(x.size) / jnp.square(level)
        denoised = jax.vmap(lambda c: factors.denoiser(x, level, c))(factors.contexts)
        excess = jax.vmap(_positive_part)(each - prior)
        score = jnp.einsum("jab,jb->a", excess, denoised - x)
        subtract = factors.learned_prior or factors.prior
        known = (denoised - subtract(x, level, None)).sum(0)
        score = factors.weight * (score + (unit + prior) @ known)
        score = score + (unit + prior) @ (factors.prior(x, level, None) - x)
        total = unit + prior + factors.weight * excess.sum(0)
        return x + jnp.linalg.solve(total, score)


def compose(
    score: ScoreModel,
    prior: Callable,
    contexts: Float[Array, "observations ..."],
    draws: Float[Array, "observations draws size"],
    prior_draws: Float[Array, "prior_draws size"],
    composition: Composition,
) -> ScoreModel:
    """Return the score given all observations; it takes no context.

    Args:
        score: the score of vectors z given one observation.
        prior: denoiser of the prior, for standardized z.
        contexts: the observations, one per row.
        draws: posterior draws of z given each observation.
        prior_draws: prior draws of z.
        composition: the rule for the precisions.
    """

    def precision(z: Float[Array, "draws size"]) -> Matrix:
        return inverse_covariance(jax.vmap(score.standardize.forward)(z))

    each = jax.vmap(precision)(draws)
    factors = PosteriorFactors(
        score.denoiser, prior, contexts, each, precision(prior_draws)
    )
    return replace(score, denoiser=ComposedDenoiser(factors, composition))


def inverse_covariance(u: Float[Array, "draws size"]) -> Matrix:
    """Return the inverse covariance of standardized draws, ``MIN_VARIANCE`` added."""
    size = u.shape[1]
    covariance = jnp.cov(u.T).reshape(size, size)
    return jnp.linalg.inv(covariance + MIN_VARIANCE * jnp.eye(size))


def _positive_part(matrix: Matrix) -> Matrix:
    """Return the matrix's symmetric part with negative eigenvalues set to 0."""
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * jnp.maximum(values, 0.0)) @ vectors.T
