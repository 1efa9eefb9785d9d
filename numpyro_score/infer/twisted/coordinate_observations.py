r"""Normal observations of single coordinates, which a score can be conditioned on.

A score with one noise level per coordinate gives the law of a learned site x given
:math:`y_j = a_j x_{k_j} + b_j + s_j n_j` without particles
(:mod:`numpyro_score.score.conditioning`). Such observations are taken out of the model
and into the law of x: the twist of :mod:`~numpyro_score.infer.twisted.twist` is then
perfect for them, :math:`p(y | x_t)` itself, and weights are left to the other sites.

Their evidence is, at any point x and so at draws of the posterior,

.. math:: \log p(y) = \log p(x) + \log p(y | x) - \log p(x | y),

with both densities by the probability flow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.handlers import block
from numpyro.primitives import Messenger

from numpyro_score.data.standardize import Affine
from numpyro_score.infer.twisted.gaussian_likelihood import NormalSite, normal_site
from numpyro_score.infer.twisted.replicates import ChainResult
from numpyro_score.infer.twisted.run import StaticArguments, partition_arguments
from numpyro_score.infer.twisted.site_checks import check_latents
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.latent_dependence import is_linear, used_inputs
from numpyro_score.score.conditioning import NoisyDenoiser
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import Position, SiteValues

# of an observation, in lowest noise levels, which add 1 / 100 to its variance
MIN_SD = 10.0
# draws whose spread is the error of the evidence, within (1 / 14)^1/2 = 27 %
NUM_POINTS = 8
RTOL = 1e-4  # within which a location must be affine: 1000 float32 roundings


class CoordinateObservations(NamedTuple):
    """Observations of coordinates of one learned site, as one value for each.

    - **value**: observed values in units of x; NaN where nothing is observed.
    - **sd**: their sd.
    - **log_constant**: of the likelihood, which is this times Normal(value; x, sd).
    - **is_exact**: whether the model's likelihood is of this form.
    """

    value: Position
    sd: Position
    log_constant: Float[Array, ""]
    is_exact: Array


@dataclass(frozen=True)
class ConditionedModel:
    """A model whose learned site has seen some observed sites; takes its score.

    Args:
        model: the model.
        site: name of the learned site.
        observed: sorted names of the observed sites, which are left out.
    """

    model: Callable
    site: str
    observed: tuple[str, ...]

    def __call__(self, score: ScoreModel, *args: Any, **kwargs: Any) -> Any:
        """Run the model with another law at the learned site."""
        law = ScoreDistribution(score, t=score.sde.t_min)
        with block(hide=list(self.observed)), _replace_law(self.site, law):
            return self.model(*args, **kwargs)


class _replace_law(Messenger):  # noqa: N801
    """Give one site another law."""

    def __init__(self, site: str, law: ScoreDistribution) -> None:
        self.site, self.law = site, law
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the law of the site."""
        if msg["type"] == "sample" and msg["name"] == self.site:
            msg["fn"] = self.law


@dataclass(frozen=True)
class Conditioning:
    """A model, its arguments, and what is needed for the evidence of what it left out.

    - **model**: the model whose learned site has seen the observations.
    - **static**, **arrays**: its arguments.
    - **law**, **given**: laws of the learned site before and after.
    - **observations**: what it has seen.
    """

    model: ConditionedModel
    static: StaticArguments
    arrays: list[Array]
    law: ScoreModel
    given: ScoreModel
    observations: CoordinateObservations

    @classmethod
    def of(
        cls, model: Callable, static: StaticArguments, arrays: list[Array]
    ) -> "Conditioning | None":
        """Return the model conditioned where that is exact; None where it is not."""
        found = _observed_coordinates.eval_shape(arrays, model, static)
        if not found:
            return None
        site, observed = next((name, tuple(sites)) for name, sites in found.items())
        args, kwargs = static.combine(arrays)
        law = _law_of_values(check_latents(model, args, kwargs)[site])
        seen = _observe(arrays, model, static, site, observed)
        sd = seen.sd / law.standardize.scale
        narrow = jnp.nanmin(sd) < MIN_SD * law.sde.sigma_min
        if not bool(seen.is_exact) or bool(narrow):
            return None
        silent = replace(law, rows=None)  # draws off the data are a finding of the run
        given = silent.condition(seen.value, jnp.nan_to_num(seen.sd))
        rest, arrays = partition_arguments((given, *args), kwargs)
        rest = rest._replace(program=static.program)
        conditioned = ConditionedModel(model, site, observed)
        return cls(conditioned, rest, arrays, law, given, seen)

    def with_evidence(self, result: ChainResult) -> ChainResult:
        """Return a result with the evidence of these observations in it."""
        draws = result.samples[self.model.site]
        draws = draws.reshape(-1, *self.law.event_shape)
        step = max(1, len(draws) // NUM_POINTS)
        points = draws[::step][:NUM_POINTS]
        laws = self.law, self.given
        value, variance = _log_evidence(*laws, self.observations, points)
        return result._replace(
            log_evidence=result.log_evidence + value,
            log_evidence_variance=result.log_evidence_variance + variance,
        )

    def describe(self) -> str:
        """Return in words which sites are observed exactly."""
        return (
            f"{', '.join(self.model.observed)} by the law of {self.model.site} given "
            "coordinates, without weights"
        )


@jax.jit
def _log_evidence(
    law: ScoreModel, given: ScoreModel, seen: CoordinateObservations, points: Array
) -> tuple[Array, Array]:
    """Return the log evidence of observations and its variance, at some draws."""
    t = law.sde.t_min
    values = (
        law.log_prob(points, t)
        + jax.vmap(lambda x: _log_likelihood(law, seen, x))(points)
        - given.log_prob(points, t)
    )
    return values.mean() + seen.log_constant, values.var() / len(values)


def _log_likelihood(
    law: ScoreModel, seen: CoordinateObservations, x: Position
) -> Float[Array, ""]:
    r"""Return log p(y | x_t) at the lowest level, with x_0 given x_t normal.

    Mean and covariance are D and :math:`r^2\, \partial D/\partial x` (Tweedie).
    """
    level = law.sde.noise_level(law.sde.t_min)
    u = law.standardize.forward(x) / law.sde.alpha(law.sde.t_min)

    def denoise(u: Array) -> Array:
        return law.denoiser(u.reshape(law.event_shape), level).reshape(-1)

    flat = u.reshape(-1)
    covariance = level**2 * jax.jacfwd(denoise)(flat)
    value = law.standardize.forward(seen.value).reshape(-1)
    sd = (seen.sd / law.standardize.scale).reshape(-1)
    is_seen = ~jnp.isnan(value)
    pair = is_seen[:, None] & is_seen[None, :]
    covariance = jnp.where(pair, 0.5 * (covariance + covariance.T), 0.0)
    covariance = covariance + jnp.diag(jnp.where(is_seen, sd**2, 1.0))
    error = jnp.where(is_seen, value - denoise(flat), 0.0)
    quadratic = error @ jnp.linalg.solve(covariance, error)
    log_scale = jnp.where(is_seen, jnp.log(law.standardize.scale).reshape(-1), 0.0)
    constant = 0.5 * jnp.log(2 * jnp.pi) * is_seen.sum() + log_scale.sum()
    return -0.5 * (quadratic + jnp.linalg.slogdet(covariance)[1]) - constant


def _law_of_values(law: ScoreDistribution) -> ScoreModel:
    r"""Return the score of the values of a site, which are noisy points x_t.

    At its lowest level :math:`r_0` the result has the noise r of the site: it denoises
    to :math:`x_0 + (r^2 - r_0^2)^{1/2} n`.
    """
    score = law.score
    sde, standardize = score.sde, score.standardize
    added = jnp.square(sde.noise_level(law.t)) - jnp.square(sde.sigma_min)
    level = jnp.broadcast_to(jnp.sqrt(jnp.maximum(added, 0.0)), score.event_shape)
    ratio = sde.alpha(law.t) / sde.alpha(sde.t_min)
    return replace(
        score,
        denoiser=NoisyDenoiser(score.denoiser, level, jnp.asarray(sde.sigma_max)),
        standardize=Affine(standardize.loc, standardize.scale * ratio),
        rows=None,
    )


@partial(jax.jit, static_argnames=("model", "static"))
def _observed_coordinates(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> dict[str, dict[str, Array]]:
    """Return the observed sites of each learned one; traced once and never run."""
    args, kwargs = static.combine(arrays)
    laws = check_latents(model, args, kwargs)
    scores: dict[str, Any] = {name: law.score for name, law in laws.items()}
    names = [
        name
        for name, score in scores.items()
        if getattr(score.denoiser, "per_coordinate", False) and score.support is None
    ]
    if not names:
        return {}
    twist = Twist.of(model, args, kwargs)
    sites = twist.trace(twist.potential.prototype)
    # expanded or transformed, the law of the site is another
    plain = [n for n in names if isinstance(sites[n]["fn"], ScoreDistribution)]
    found = {n: [o for o in twist.gaussian if _is_affine(twist, n, o)] for n in plain}
    return {n: dict.fromkeys(o, jnp.zeros(())) for n, o in found.items() if o}


def _is_affine(twist: Twist, site: str, observed: str) -> bool:
    """Return whether an observed site is Normal around an affine function of one site.

    The derivative of its location must not depend on the point, and its scale and
    weight on no latent; read off the jaxpr.
    """
    z = twist.potential.prototype
    if normal_site(twist.trace(z)[observed]) is None:
        return False

    def parts(z: SiteValues) -> NormalSite:
        found: Any = normal_site(twist.trace(z)[observed])
        return found

    used = [used_inputs(lambda z, i=i: parts(z)[i], z) for i in range(3)]
    names = sorted(z)
    reads = [{n for n, is_used in zip(names, u, strict=True) if is_used} for u in used]
    fixed = is_linear(lambda x: parts({**z, site: x}).loc, z[site])
    return fixed and reads == [{site}, set(), set()]


@partial(jax.jit, static_argnames=("model", "static", "site", "observed"))
def _observe(
    arrays: list[Array],
    model: Callable,
    static: StaticArguments,
    site: str,
    observed: tuple[str, ...],
) -> CoordinateObservations:
    """Return the observations of a site's coordinates as one for each coordinate."""
    args, kwargs = static.combine(arrays)
    twist = Twist.of(model, args, kwargs)
    z = twist.potential.prototype
    shape, size = z[site].shape, z[site].size

    def locate(x: Array) -> tuple[Array, ...]:
        sites = twist.trace({**z, site: x.reshape(shape)})
        found: list[Any] = [normal_site(sites[name]) for name in observed]
        columns = [(f.loc, f.scale, f.weight, f.value) for f in found]
        return tuple(jnp.concatenate(c) for c in zip(*columns, strict=True))

    def slope(v: Array) -> Array:
        return jax.jvp(lambda x: locate(x)[0], (jnp.zeros(size),), (v,))[1]

    loc, scale, weight, value = locate(jnp.zeros(size))
    factor = slope(jnp.ones(size))
    index = jnp.round(slope(jnp.arange(size, dtype=factor.dtype)) / factor).astype(int)
    point = jax.random.normal(jax.random.key(0), (size,))  # any point will do
    part, unit = factor * point[jnp.clip(index, 0, size - 1)], jnp.abs(factor)
    is_seen = weight > 0
    checks = [
        jnp.abs(locate(point)[0] - loc - part) <= RTOL * (jnp.abs(loc) + unit),
        jnp.abs(slope(point) - part) <= RTOL * unit,
        (factor != 0) & (index >= 0) & (index < size),
        (weight == 1) & jnp.isfinite(value) & (scale > 0),
    ]
    is_exact = (jnp.stack(checks).all(0) | ~is_seen).all() & is_seen.any()
    seen = jnp.where(is_seen, (value - loc) / factor, 0.0)
    sd = jnp.where(is_seen, scale / jnp.abs(factor), jnp.inf)
    log_jacobian = jnp.where(is_seen, -jnp.log(jnp.abs(factor)), 0.0).sum()
    mean, total, log_constant = _combine(seen, sd, index, size)
    log_constant = log_constant + log_jacobian
    return CoordinateObservations(
        mean.reshape(shape), total.reshape(shape), log_constant, is_exact
    )


def _combine(
    seen: Array, sd: Array, index: Array, size: int
) -> tuple[Array, Array, Array]:
    """Return mean and sd of Normal observations of each coordinate, and log constant.

    Their product in x is exp(constant) times Normal(mean; x, sd).
    """
    precision = jax.ops.segment_sum(1 / sd**2, index, size)
    mean = jax.ops.segment_sum(seen / sd**2, index, size) / precision
    total = 1 / jnp.sqrt(precision)
    each = dist.Normal(mean[index], jnp.minimum(sd, jnp.finfo(sd.dtype).max))
    log_prob = jnp.where(jnp.isfinite(sd), each.log_prob(seen), 0.0).sum()
    peak = -0.5 * jnp.log(2 * jnp.pi) - jnp.log(jnp.where(precision > 0, total, 1.0))
    return mean, total, log_prob - jnp.where(precision > 0, peak, 0.0).sum()
