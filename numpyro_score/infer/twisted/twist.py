r"""The twist: what the data say about a noisy point.

With :math:`x_s | x_t` about Normal(m, C), the likelihood of a noisy point is the
likelihood of the clean one averaged over it. The mean is the denoised point, and by the
second Tweedie formula, from level r_t to level r_s,

.. math:: C = (r_t^2 - r_s^2)\, \partial m / \partial x_t .

For whitened residuals e of Normal sites with Jacobian J this gives, with
:math:`B = J C J^T`, the log likelihood
:math:`-\tfrac12 e^T (I + B)^{-1} e - \tfrac12 \log\det(I + B)`, where what is not
linear in the residuals adds to e and to B. Other sites with a location, and mixtures
of such laws, have their scale widened by the variance of the location. The likelihood
p_i of every number of the others is averaged over points about the mean, two for each
of K directions a_k of covariance C:

.. math:: \sum_i \log \frac{1}{2K} \sum_{k=1}^K \sum_\pm p_i(m \pm a_k) .

Both are raised to a power that follows from the variance of their log likelihood, since
numbers that share their uncertainty are widened one by one. The score,
the model and its trace give all of it: no constant is asked of the user.

At high noise :math:`r_t^2` magnifies the error of a net's derivative, and the twist
would be overconfident in directions where C is small. Twice the standard error of C's
entries is added to its diagonal; it is zero for an exact score.

This C takes one derivative of the net for each observed number. In its place one
covariance may serve all points of a level, see
:mod:`numpyro_score.model.level_covariance`: the twist then takes one derivative.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpyro.handlers import seed, substitute, trace

from numpyro_score.infer.twisted.failures import Failure, first_failure
from numpyro_score.infer.twisted.gaussian_likelihood import (
    is_gaussian,
    is_location_scale,
    location,
    log_likelihood,
    log_likelihoods_of,
    whitened_residuals,
    widened_log_likelihood,
)
from numpyro_score.infer.twisted.linear_solve import (
    LinearSolution,
    ResidualCovariance,
    solve_and_log_det,
)
from numpyro_score.infer.twisted.site_checks import check_sites
from numpyro_score.model.denoising import (
    covariance_product,
    covariance_standard_error,
    denoise,
    to_covariance,
    to_physical_units,
)
from numpyro_score.model.handlers import temper
from numpyro_score.model.latent_dependence import is_linear
from numpyro_score.model.level_covariance import LevelCovariance
from numpyro_score.model.potential import ModelPotential, model_potential
from numpyro_score.typing import PRNGKey, SiteValues, Time

# draws: the variance of a location is within (2 / 8)^1/2 = 50 %, at as many derivatives
NUM_SPREAD_PROBES = 8
# directions in which residuals are looked at; with two the sd of log evidence is .9:
# `python -m tests.benchmarks.constants --only curvature`
NUM_PROBES = 8
# standard errors of C that are added to it: it is too small by a chance of 2 %
NUM_ERRORS = 2.0


class LikelihoodTerms(NamedTuple):
    """Terms of the likelihood of a model at one clean point.

    - **residual**: whitened residuals of the Normal sites.
    - **error**: the same in units of the data.
    - **log_scale**: their log normalizers.
    - **rest**: log likelihood of all other observed sites.
    - **log_prior**: of the ordinary sites.
    """

    residual: Float[Array, " m"]
    error: Float[Array, " m"]
    log_scale: Float[Array, ""]
    rest: Float[Array, ""]
    log_prior: Float[Array, ""]


class Spread(NamedTuple):
    """Uncertainty of a denoised point, for sites that are not Normal.

    - **locations**: shifts of the means of the locations of widened sites, and their
      variances.
    - **away**: displacements of the learned sites, one per row; the likelihoods of
      averaged sites are averaged over them.
    """

    locations: dict[str, tuple[Array, Array]]
    away: SiteValues


class TwistRegularization(NamedTuple):
    """Constants of all twists at one time, estimated from a batch of points.

    - **power**: of the likelihood of the sites that are not Normal.
    - **error**: standard error of the entries of C.
    """

    power: Float[Array, ""]
    error: Float[Array, ""]


class TwistEvaluation(NamedTuple):
    """Twist and denoised sites at one noisy point.

    - **denoised**: learned sites at their expectation at the lowest level, as u.
    - **log_prior**: of the ordinary sites, whose prior may depend on learned ones.
    - **log_twist**: log likelihood of the data given the noisy point, approximately.
    - **gradient**: gradient of both in u of the learned sites, with B held fixed.
    - **failure**: kind of :class:`~numpyro_score.infer.twisted.failures.Failure`.
    """

    denoised: SiteValues
    log_prior: Float[Array, ""]
    log_twist: Float[Array, ""]
    gradient: SiteValues
    failure: Int[Array, "..."]

    @classmethod
    def guided(cls, denoised: SiteValues, gradient: SiteValues) -> "TwistEvaluation":
        """Return the evaluation of a guidance that has a gradient and no density."""
        failure = first_failure(
            [
                (Failure.SCORE, ~is_finite(denoised)),
                (Failure.GRADIENT, ~is_finite(gradient)),
            ]
        )
        return cls(denoised, jnp.zeros(()), jnp.zeros(()), gradient, failure)

    def log_target(self, power: Array | float) -> Float[Array, "..."]:
        """Return the log target but for the law of x_t, at a power of the twist."""
        return self.log_prior + power * self.log_twist


@dataclass(frozen=True, eq=False)
class Twist:
    """The twists of one model and its arguments; made by :meth:`of`."""

    model: Callable
    model_args: tuple
    model_kwargs: dict
    potential: ModelPotential
    prior: ModelPotential
    gaussian: tuple[str, ...]
    has_rest: bool
    widened: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    level_covariances: dict[str, LevelCovariance] | None = None
    curved: bool = True

    @classmethod
    def of(
        cls,
        model: Callable,
        model_args: tuple,
        model_kwargs: dict,
        level_covariances: dict[str, LevelCovariance] | None = None,
    ) -> "Twist":
        """Read the observed sites of a model.

        Args:
            model: a NumPyro model.
            model_args: its positional arguments.
            model_kwargs: its keyword arguments.
            level_covariances: covariances of x_0 given x_t of each learned site, for
                all points of a level; None for those of each point.

        Raises:
            ValueError: for a model that a reverse SDE cannot sample, see
                :func:`~numpyro_score.infer.twisted.site_checks.check_sites`.
        """
        whole = model_potential(model, model_args, model_kwargs)
        prior = model_potential(temper(model, 0.0), model_args, model_kwargs)
        twist = cls(model, model_args, model_kwargs, whole, prior, (), True)
        sites = twist.trace(whole.prototype)
        check_sites(sites, whole.learned)
        observed = _observed(sites)
        names = tuple(name for name, site in observed.items() if is_gaussian(site))
        has_rest = len(names) < len(observed)
        widened = tuple(k for k, site in observed.items() if is_location_scale(site))
        averaged = tuple(k for k in observed if k not in (*names, *widened))
        parts = whole, prior, names, has_rest, widened, averaged, level_covariances
        twist = cls(model, model_args, model_kwargs, *parts)
        return replace(twist, curved=twist._is_curved())

    def _is_curved(self) -> bool:
        """Return whether residuals or locations may be nonlinear in learned sites."""
        z = self.potential.prototype

        def places(center: SiteValues) -> tuple[Array, SiteValues]:
            return self.terms_at(z, center).residual, self._locations(z, center)

        return not is_linear(places, self.learned_of(z))

    @property
    def learned(self) -> dict[str, Any]:
        """The learned sites."""
        return self.potential.learned

    @property
    def ordinary(self) -> tuple[str, ...]:
        """The names of the latent sites that are not learned."""
        return tuple(k for k in self.potential.prototype if k not in self.learned)

    def trace(self, z: SiteValues) -> dict[str, dict[str, Any]]:
        """Return the sites of the model at clean latents."""
        values = self.potential.constrain(z)
        # no site is drawn: all have values
        model = substitute(seed(self.model, jax.random.key(0)), data=values)
        return trace(model).get_trace(*self.model_args, **self.model_kwargs)

    def likelihood_terms(
        self,
        z: SiteValues,
        locations: dict[str, tuple[Array, Array]] | None = None,
        left_out: tuple[str, ...] = (),
    ) -> LikelihoodTerms:
        """Return residuals and log likelihoods at clean latents in physical units.

        Args:
            z: the latents.
            locations: shifts and variances of locations, by name of a site.
            left_out: names of sites that are not in the result.
        """
        locations = locations or {}
        sites = _observed(self.trace(z))
        whitened = [whitened_residuals(sites[name]) for name in self.gaussian]
        residual = jnp.concatenate([jnp.zeros(0), *(w.residual for w in whitened)])
        error = jnp.concatenate([jnp.zeros(0), *(w.error for w in whitened)])
        log_scale = sum((w.log_scale for w in whitened), jnp.zeros(()))
        log_prior = -self.prior.value(z) if self.ordinary else jnp.zeros(())
        others = [name for name in sites if name not in (*self.gaussian, *left_out)]
        rest = sum(
            (
                widened_log_likelihood(sites[name], *locations[name][::-1])
                if name in locations
                else log_likelihood(sites[name])
                for name in others
            ),
            jnp.zeros(()),
        )
        return LikelihoodTerms(residual, error, log_scale, rest, log_prior)

    def learned_of(self, z: SiteValues) -> SiteValues:
        """Return the learned sites among latents."""
        return {name: z[name] for name in self.learned}

    def values(self, z: SiteValues) -> SiteValues:
        """Return clean latents in physical units, learned ones given as u."""
        return {**z, **to_physical_units(self.learned, z)}

    def terms_at(
        self, z: SiteValues, center: SiteValues, spread: Spread | None = None
    ) -> LikelihoodTerms:
        """Return residuals and log likelihoods at denoised points, given as u."""
        values = self.values({**z, **center})
        if spread is None:
            return self.likelihood_terms(values)
        terms = self.likelihood_terms(values, spread.locations, self.averaged)
        if not self.averaged:
            return terms

        def log_likelihoods(center: SiteValues) -> Array:
            sites = self.trace(self.values({**z, **center}))
            parts = [log_likelihoods_of(sites[name]) for name in self.averaged]
            return jnp.concatenate([part.reshape(-1) for part in parts])

        averaged = averaged_log_likelihood(log_likelihoods, center, spread.away)
        return terms._replace(rest=terms.rest + averaged)

    def denoise(self, u: SiteValues, t: Time) -> SiteValues:
        """Return learned sites at their expectation at the lowest level, as u."""
        return denoise(self.learned, u, t)

    def denoised_values(self, u: SiteValues, t: Time) -> SiteValues:
        """Return learned sites at that expectation, in physical units."""
        return to_physical_units(self.learned, self.denoise(u, t))

    def log_likelihood(self, z: SiteValues) -> Float[Array, ""]:
        """Return the log likelihood at clean latents in physical units."""
        return self.prior.value(z) - self.potential.value(z)

    def evaluate(
        self, z: SiteValues, t: Time, regularization: TwistRegularization
    ) -> TwistEvaluation:
        """Return denoised sites, log twist and its gradient at noisy latents.

        Args:
            z: latents, learned ones as u.
            t: time.
            regularization: measured on a batch of points.
        """
        center, pull = jax.vjp(lambda u: self.denoise(u, t), self.learned_of(z))

        spread = self._spread(z, t, center)

        def terms_given(center: SiteValues) -> tuple[Array, Array, Array]:
            terms = self.terms_at(z, center, spread)
            tempered = regularization.power * terms.rest if self.has_rest else 0.0
            return terms.residual, terms.log_scale + tempered, terms.log_prior

        def covariance_times(v: SiteValues) -> SiteValues:
            covered = self._covariance(v, t, lambda v: pull(v)[0])
            error = NUM_ERRORS * regularization.error
            return {k: covered[k] + error * v[k] for k in v}

        (residual, other, log_prior), back = jax.vjp(terms_given, center)
        zero, one = jnp.zeros_like(other), jnp.ones_like(other)
        solved = LinearSolution(residual, zero, zero, jnp.array(True))
        if len(residual):
            even, odd = self._residual_remainders(z, t, center, residual)
            residual = residual + even.sum(0) / NUM_PROBES
            uncertainty = ResidualCovariance(
                lambda u: jax.jvp(lambda c: terms_given(c)[0], (center,), (u,))[1],
                lambda v: back((v, zero, zero))[0],
                covariance_times,
                jnp.concatenate([even, odd]) / jnp.sqrt(NUM_PROBES),
            )
            solved = solve_and_log_det(residual, center, uncertainty)
        log_twist = other - 0.5 * (solved.quadratic_form + solved.log_det)
        drift = pull(back((-solved.solution, one, one))[0])[0]
        checks = [
            (Failure.SCORE, ~is_finite(center)),
            *likelihood_failures((residual, other, log_prior)),
            (Failure.GRADIENT, ~solved.differentiable),
            (Failure.TWIST, ~is_finite(log_twist)),
            (Failure.GRADIENT, ~is_finite(drift)),
        ]
        failure = first_failure(checks)
        # without a gradient the particle cannot be moved to the next level
        log_twist = jnp.where(failure == Failure.GRADIENT, jnp.nan, log_twist)
        return TwistEvaluation(center, log_prior, log_twist, drift, failure)

    def covariance_product(
        self, z: SiteValues, t: Time, noise: SiteValues
    ) -> SiteValues:
        """Return the covariance of x_0 at level zero times a vector."""
        return covariance_product(self.learned, self.learned_of(z), t, noise)

    def regularization(self, z: SiteValues, t: Time) -> TwistRegularization:
        """Return what a batch of points says about twists at a time."""
        if self.level_covariances is None:
            u = self.learned_of(z)
            error = covariance_standard_error(self.learned, u, t)
        else:
            error = jnp.zeros(())  # C has no derivative of the net in it
        return TwistRegularization(self._power_of_others(z, t), error)

    def _covariance(
        self, v: SiteValues, t: Time, pull: Callable[[SiteValues], SiteValues]
    ) -> SiteValues:
        """Return C times a vector.

        Args:
            v: the vector.
            t: time of the noisy point.
            pull: product of a vector with the Jacobian of the denoiser there.
        """
        if self.level_covariances is None:
            return to_covariance(self.learned, t, pull(v))
        return {
            name: self.level_covariances[name].product(law, t, v[name])
            for name, law in self.learned.items()
        }

    def _power_of_others(self, z: SiteValues, t: Time) -> Float[Array, ""]:
        r"""Return the power of the sites that are not Normal, for a batch of points.

        A Gaussian likelihood whose variance C widens by the share w has the power
        1/(1 + w), and at points as far off as it expects the gradient g of its log has
        :math:`g^T C g = w (1 + w)`. That is solved for w, with the median over points.
        """
        if not self.has_rest:
            return jnp.ones(())
        change = jnp.median(jax.vmap(lambda z: self._log_likelihood_variance(z, t))(z))
        return 2 / (1 + jnp.sqrt(1 + 4 * change))

    def _residual_remainders(
        self, z: SiteValues, t: Time, center: SiteValues, residual: Array
    ) -> tuple[Float[Array, "probes m"], Float[Array, "probes m"]]:
        r"""Return what is not linear in the residuals, along v of covariance C.

        Even and odd parts, see :func:`central_differences`; none where the model is
        linear. A residual that is flat at the center would else be taken for certain
        where it is curved about it, or, as of a cube, rises on both sides.
        """
        if not self.curved:
            none = jnp.zeros((0, len(residual)), residual.dtype)
            return none, none

        def probe(key: PRNGKey) -> tuple[Array, Array]:
            away = self._displacement(key, z, t, center)
            found = central_differences(
                lambda center: self.terms_at(z, center).residual, center, away
            )
            return found.even, found.odd

        # fixed: the twist must be one function of x, at which points are compared
        return jax.vmap(probe)(jax.random.split(jax.random.key(0), NUM_PROBES))

    def _spread(self, z: SiteValues, t: Time, center: SiteValues) -> Spread:
        """Return the spread about a denoised point, by differences of locations."""
        if not self.widened and not self.averaged:
            return Spread({}, {})
        keys = jax.random.split(jax.random.key(1), NUM_SPREAD_PROBES)
        away = jax.vmap(lambda key: self._displacement(key, z, t, center))(keys)
        locations = partial(self._locations, z)

        def probe(away: SiteValues) -> tuple[SiteValues, SiteValues]:
            if not self.curved:
                slope = jax.jvp(locations, (center,), (away,))[1]
                return slope, jax.tree.map(jnp.zeros_like, slope)
            found = central_differences(locations, center, away)
            return jax.tree.map(jnp.add, found.slope, found.odd), found.even

        changes, bends = jax.vmap(probe)(away) if self.widened else ({}, {})
        found = {
            name: (bends[name].mean(0), (change**2 + bends[name] ** 2).mean(0))
            for name, change in changes.items()
        }
        return Spread(found, away)

    def _locations(self, z: SiteValues, center: SiteValues) -> SiteValues:
        """Return the locations of widened sites at denoised points, given as u."""
        sites = self.trace(self.values({**z, **center}))
        return {name: location(sites[name]) for name in self.widened}

    def _displacement(
        self, key: PRNGKey, z: SiteValues, t: Time, center: SiteValues
    ) -> SiteValues:
        r"""Return noise of about the covariance C, and of its trace exactly.

        For normal :math:`\xi` that is :math:`C \xi |\xi^T C \xi|_+^{1/2} / |C \xi|`,
        whose squared length is :math:`\xi^T C \xi`. It is zero where the derivative of
        a net makes the variance negative.
        """
        noise = {
            name: jax.random.normal(jax.random.fold_in(key, j), center[name].shape)
            for j, name in enumerate(center)
        }
        if self.level_covariances is not None:
            return {
                name: self.level_covariances[name].product(
                    law, t, noise[name], root=True
                )
                for name, law in self.learned.items()
            }
        away = {}
        for name, product in self.covariance_product(z, t, noise).items():
            variance = jnp.maximum(jnp.vdot(noise[name], product), 0.0)
            square = jnp.square(product).sum()
            away[name] = product * jnp.sqrt(variance / jnp.where(square, square, 1.0))
        return away

    def _log_likelihood_variance(self, z: SiteValues, t: Time) -> Float[Array, ""]:
        """Return the variance of the other sites' log likelihood, to first order."""
        center, pull = jax.vjp(lambda u: self.denoise(u, t), self.learned_of(z))
        spread = self._spread(z, t, center)
        gradient = jax.grad(lambda center: self.terms_at(z, center, spread).rest)(
            center
        )
        covered = self._covariance(gradient, t, lambda v: pull(v)[0])
        change = sum((jnp.vdot(gradient[k], covered[k]) for k in center), jnp.zeros(()))
        return jnp.nan_to_num(jnp.maximum(change, 0.0), posinf=0.0)


class CentralDifferences(NamedTuple):
    r"""A function at both sides of a point, :math:`f(m \pm a) - f(m)`, in parts.

    - **slope**: J a, with its Jacobian J at the point.
    - **even**: the mean of both, :math:`\tfrac12 a^T H a` of a quadratic function.
    - **odd**: half of their difference, less the slope; 0 of a quadratic function.
    """

    slope: Any
    even: Any
    odd: Any


def central_differences(
    fn: Callable[[SiteValues], Any], center: SiteValues, away: SiteValues
) -> CentralDifferences:
    """Return the change of a function on both sides of a point.

    Even and odd parts are zero where they are not finite.

    Args:
        fn: the function, of arrays or trees.
        center: the point.
        away: displacement of the sides.

    Example:
        >>> point, away = {"x": jnp.array(1.0)}, {"x": jnp.array(3.0)}
        >>> found = central_differences(lambda z: z["x"] ** 3, point, away)
        >>> float(found.slope), float(found.even), float(found.odd)
        (9.0, 27.0, 27.0)
    """

    def finite(x: Array) -> Array:
        return jnp.where(jnp.isfinite(x), x, 0.0)

    middle, slope = jax.jvp(fn, (center,), (away,))
    sides = [fn({k: center[k] + sign * away[k] for k in away}) for sign in (-1.0, 1.0)]
    return CentralDifferences(
        slope,
        jax.tree.map(lambda a, b, c: finite(0.5 * (a + b) - c), *sides, middle),
        jax.tree.map(lambda a, b, s: finite(0.5 * (b - a) - s), *sides, slope),
    )


def is_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether all numbers of a tree of arrays are finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def likelihood_failures(terms: Any) -> list[tuple[Failure, Bool[Array, ""]]]:
    """Return checks of log likelihoods: NaN, and infinite where the likelihood is 0."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(terms)])
    return [
        (Failure.LIKELIHOOD, jnp.isnan(flat).any()),
        (Failure.ZERO_LIKELIHOOD, ~jnp.isfinite(flat).all()),
    ]


def averaged_log_likelihood(
    log_likelihoods: Callable[[SiteValues], Float[Array, " m"]],
    center: SiteValues,
    away: SiteValues,
) -> Float[Array, ""]:
    """Return the sum of the logs of the mean likelihoods of numbers about a point.

    Points where a log likelihood is not finite are replaced by the center.

    Args:
        log_likelihoods: of every number, at a point.
        center: the point.
        away: displacements, one per row; points lie at both sides.

    Example:
        >>> away = {"x": jnp.array([1.0])}
        >>> value = averaged_log_likelihood(
        ...     lambda c: jnp.log(c["x"])[None], {"x": jnp.array(3.0)}, away
        ... )
        >>> round(float(jnp.exp(value)), 3)
        3.0
    """
    sides = jax.tree.map(lambda a: jnp.concatenate([a, -a]), away)

    def log_likelihoods_beside(away: SiteValues) -> Array:
        return log_likelihoods({name: center[name] + away[name] for name in center})

    found = jax.lax.stop_gradient(jax.vmap(log_likelihoods_beside)(sides))
    # before the gradient, which would be NaN there too
    is_usable = jax.vmap(is_finite)(found)
    sides = jax.tree.map(
        lambda a: jnp.where(is_usable.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0), sides
    )
    parts = jax.vmap(log_likelihoods_beside)(sides)
    return jnp.sum(jax.nn.logsumexp(parts, axis=0) - jnp.log(len(parts)))


def _observed(sites: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the observed sites of a trace."""
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and site["is_observed"]
    }
