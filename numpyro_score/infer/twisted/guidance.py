r"""Guidance without weights: fast, and biased by what each method leaves out.

Each member gives the shift of a reverse step by an approximation of
:math:`\nabla_{x_t} \log p(y | x_t)`. Nothing corrects for the approximation: there are
no weights and no evidence, and the shares of modes are wrong even with many draws.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.checks import check_positive
from numpyro_score.infer.twisted.linear_solve import (
    ResidualCovariance,
    solve_and_log_det,
)
from numpyro_score.infer.twisted.site_checks import check_residuals
from numpyro_score.infer.twisted.twist import (
    Twist,
    TwistEvaluation,
    TwistRegularization,
)
from numpyro_score.typing import SiteValues, Time


class Guidance(ABC):
    """Base class of approximations to the likelihood at a noisy point."""

    @property
    @abstractmethod
    def approximation(self) -> str:
        """The approximation that is made, in words for the summary."""

    @abstractmethod
    def evaluate(
        self,
        twist: Twist,
        z: SiteValues,
        t: Time,
        t_next: Time,
        regularization: TwistRegularization,
    ) -> TwistEvaluation:
        """Return the denoised sites and the gradient that guides the next step.

        Args:
            twist: of the model.
            z: latents of one particle, learned ones in standardized units of x/alpha.
            t: time.
            t_next: the next one.
            regularization: of the twist at t, measured on a batch of points.
        """


@dataclass(frozen=True)
class DPS(Guidance):
    r"""Diffusion posterior sampling (Chung et al. 2023, algorithm 1).

    After the prior's step the point moves by
    :math:`-\zeta\, \nabla_{x_t} |y - f(D)|^2 / |y - f(D)|`, for Normal sites y with
    location f and the denoised point D. Their noise is not used.

    Args:
        scale: zeta, in units of the data's standard deviation; to be tuned by hand.

    Raises:
        ValueError: unless the scale is positive.

    Example:
        >>> DPS(scale=0.5).approximation
        'the likelihood at the denoised point, with a step of 0.5 tuned by hand'
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale, "the length of a guided step")

    @property
    def approximation(self) -> str:
        """The approximation that is made."""
        return (
            "the likelihood at the denoised point, with a step of "
            f"{self.scale} tuned by hand"
        )

    def evaluate(
        self,
        twist: Twist,
        z: SiteValues,
        t: Time,
        t_next: Time,
        regularization: TwistRegularization,
    ) -> TwistEvaluation:
        """Return a gradient that shifts the step as the algorithm says."""
        check_residuals(twist.gaussian, self)

        def misfit(u: SiteValues) -> tuple[Array, SiteValues]:
            center = twist.denoise(u, t)
            error = twist.terms_at(z, center).error
            square = jnp.vdot(error, error)
            # the root has no gradient at zero
            norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
            return jnp.where(square > 0, norm, 0.0), center

        gradient, center = jax.grad(misfit, has_aux=True)(twist.learned_of(z))
        drift = {}
        for name, law in twist.learned.items():
            sde = law.score.sde
            levels = [
                jnp.square(sde.noise_level(jnp.maximum(time, law.t)))
                for time in (t, t_next)
            ]
            fall = levels[0] - levels[1]
            drift[name] = (
                -2 * self.scale * gradient[name] / jnp.where(fall > 0, fall, jnp.inf)
            )
        return TwistEvaluation.guided(center, drift)


@dataclass(frozen=True)
class PseudoinverseGuidance(Guidance):
    r"""Pseudoinverse guidance, PiGDM (Song et al. 2023, section 3.2).

    x_0 given x_t is taken for Normal(D, r^2) with :math:`r^2 = \sigma^2 / (\sigma^2 +
    1)` in units of the data's standard deviation, the same in all directions.

    Example:
        >>> PseudoinverseGuidance().approximation
        'one variance of x_0 given x_t for all points and directions'
    """

    @property
    def approximation(self) -> str:
        """The approximation that is made."""
        return "one variance of x_0 given x_t for all points and directions"

    def evaluate(
        self,
        twist: Twist,
        z: SiteValues,
        t: Time,
        t_next: Time,
        regularization: TwistRegularization,
    ) -> TwistEvaluation:
        """Return the gradient for the fixed variance."""
        check_residuals(twist.gaussian, self)
        center, pull = jax.vjp(lambda u: twist.denoise(u, t), twist.learned_of(z))

        def residuals_given(center: SiteValues) -> Array:
            return twist.terms_at(z, center).residual

        residual, back = jax.vjp(residuals_given, center)
        variance = {}
        for name, law in twist.learned.items():
            level = jnp.square(law.score.sde.noise_level(jnp.maximum(t, law.t)))
            variance[name] = level / (1 + level)
        uncertainty = ResidualCovariance(
            lambda u: jax.jvp(residuals_given, (center,), (u,))[1],
            lambda v: back(v)[0],
            lambda u: {k: variance[k] * u[k] for k in u},
            jnp.zeros((0, len(residual))),
        )
        solved = solve_and_log_det(residual, center, uncertainty)
        drift = pull(back(-solved.solution)[0])[0]
        return TwistEvaluation.guided(center, drift)


@dataclass(frozen=True)
class MomentMatching(Guidance):
    r"""Moment matching posterior sampling (Rozet et al. 2024, section 3).

    x_0 given x_t is taken for Normal(D, C) with :math:`C = \sigma^2 \partial D /
    \partial x_t`, by the second Tweedie formula. It is the proposal of the weighted
    sampler without its weights, and exact for a Gaussian law and a linear model.

    Example:
        >>> MomentMatching().approximation
        'a Gaussian of matched moments for x_0 given x_t'
    """

    @property
    def approximation(self) -> str:
        """The approximation that is made."""
        return "a Gaussian of matched moments for x_0 given x_t"

    def evaluate(
        self,
        twist: Twist,
        z: SiteValues,
        t: Time,
        t_next: Time,
        regularization: TwistRegularization,
    ) -> TwistEvaluation:
        """Return what the twist sees."""
        return twist.evaluate(z, t, regularization)
