"""A NumPyro distribution whose log density is given by a learned score."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from numpyro_score.checks import as_points, check_key, is_traced
from numpyro_score.data.standardize import Affine
from numpyro_score.score.identity import IdentityKey
from numpyro_score.score.level import level_in_use, warn_of_level
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey, Time

# 1 - alpha that is left, a tenth of the lowest level; VE has none, VP 5e-5 at .01
MAX_SHRINKAGE = 1e-3


@jax.custom_jvp
def _log_prob(score: ScoreModel, t: Time, x: Array) -> Array:
    """Return log p_t(x) by the probability flow; its derivative in x is the score."""
    return score.log_prob(x, t)


@_log_prob.defjvp
def _log_prob_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    score, t, x = primals
    directional = score.score(x, t) * tangents[2]
    rank = len(score.event_shape)
    axes = tuple(range(directional.ndim - rank, directional.ndim))
    return _log_prob(score, t, x), directional.sum(axes)


class ScoreDistribution(dist.Distribution):
    r"""The law of a :class:`~numpyro_score.score.ScoreModel`, for ``numpyro.sample``.

    ``sample`` integrates the probability flow from noise. ``log_prob`` is the density
    of the flow, by an adaptive ODE solver. The gradient of ``log_prob`` is defined to
    be the learned score; no gradient flows to the net's weights. Gradient and value
    agree up to the error of the net, and a Metropolis kernel may use both: the accept
    step uses the value, and leapfrog with any force that depends on position alone is
    reversible and volume preserving.

    The value costs several hundred evaluations of the net. Kernels of this package do
    not evaluate it. NUTS does at every leapfrog step: use
    :class:`~numpyro_score.kernel.ScoreLangevin` unless the net is small.

    Args:
        score: the learned law.
        t: time of the marginal, the law of :math:`\alpha x_0 + \sigma n` on the unit
            scale; None for :math:`x_0 + r n` there, where :math:`r = \sigma/\alpha` is
            the lowest noise level at which line integrals of the score can be trusted,
            see :attr:`ScoreModel.level_in_use
            <numpyro_score.score.ScoreModel.level_in_use>`. A warning says once if it is
            not the lowest of the process.
        validate_args: as in every NumPyro distribution.

    Raises:
        TypeError: if ``score`` is not a ``ScoreModel``.
        ValueError: if ``t`` is not a time of the score's process.

    Example:
        >>> from numpyro_score.sde import VE
        >>> normal = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
        ... )
        >>> round(float(ScoreDistribution(normal).log_prob(jnp.array(1.0))), 3)
        -1.419
    """

    arg_constraints: dict = {}
    pytree_data_fields = ("score", "t")

    def __init__(
        self,
        score: ScoreModel,
        *,
        t: Time | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(score, ScoreModel):
            raise TypeError(
                "`score` must be a ScoreModel: take `result.score` of "
                "ScoreMatching.run, or wrap a function by ScoreModel.from_fn. "
                f"Got {type(score).__name__}."
            )
        if t is None:
            t = _trusted_time(score)
            score = _without_shrinkage(score, t)
        else:
            score.sde.check_time("t", t)
        self.score = score
        self.t: Time = t
        super().__init__(event_shape=score.data_shape, validate_args=validate_args)

    def __getattr__(self, name: str) -> Any:
        """Raise for parameters, which a law that is known by its score does not have.

        Reparameterizations such as ``LocScaleReparam`` ask for them.
        """
        raise AttributeError(
            f"A ScoreDistribution has no `{name}`: its law is known by a score, not by "
            "parameters such as a location and scale, so LocScaleReparam and its like "
            "cannot take it. Sample it as it is, or reparameterize it by "
            "ProbabilityFlowReparam().",
            name=name,
            obj=self,
        )

    @property
    def support(self) -> constraints.Constraint:
        """The score's support; the real numbers if it has none."""
        if self.score.support is not None:
            return self.score.support.constraint
        return constraints.independent(constraints.real, len(self.event_shape))

    def marginal(self, t: Time | None) -> "ScoreDistribution":
        """Return the law of x_t of the same score at another time."""
        return ScoreDistribution(self.score, t=t)

    def sample(
        self, key: PRNGKey, sample_shape: tuple[int, ...] = ()
    ) -> Float[Array, "*batch"]:
        """Return draws of p_t: solver draws at the lowest level plus noise up to t."""
        check_key("key", key)
        key_draw, key_noise = jax.random.split(key)
        sde, standardize = self.score.sde, self.score.standardize
        x = self.score.sample(key_draw, tuple(sample_shape))
        noise_of_x = self.score.noise_of_draws()
        added = jnp.square(sde.noise_level(self.t)) - jnp.square(noise_of_x)
        shape = (*sample_shape, *self.score.event_shape)
        noise = jax.random.normal(key_noise, shape, x.dtype)
        u = standardize.forward(self.score.unconstrain(x)) / sde.alpha(sde.t_min)
        u = u + jnp.sqrt(jnp.maximum(added, 0.0)) * noise
        return self.score.constrain(standardize.inverse(sde.alpha(self.t) * u))

    @validate_sample
    def log_prob(
        self, value: Float[Array, "..."], intermediates: Any = None
    ) -> Float[Array, "..."]:
        """Return log p_t(value), the density of the probability flow, in nats."""
        value = as_points("value", value, self.score.data_shape)
        z = self.score.unconstrain(value)
        log_prob = _log_prob(replace(self.score, support=None), self.t, z)
        return self.score.subtract_log_jacobian(log_prob, z, value)


def _trusted_time(score: ScoreModel) -> Time:
    """Return the time of the level in use; the lowest where it is not known."""
    level, lowest = level_in_use(score), float(score.sde.sigma_min)
    if level is None or level <= lowest:
        return score.sde.t_min
    warn_of_level(score, level)
    with jax.ensure_compile_time_eval():
        return float(score.sde.time(level))


def _without_shrinkage(score: ScoreModel, t: Time) -> ScoreModel:
    r"""Return a score whose :math:`x_t` are :math:`x_0 + r n`, not alpha times these.

    Straight paths have :math:`\alpha = 1/(1 + r)`, which would pull data of level .1 by
    9 % towards the origin of the unit scale.
    """
    with jax.ensure_compile_time_eval():
        alpha = float(score.sde.alpha(t))
    if 1 - alpha < MAX_SHRINKAGE:
        return score
    if is_traced(score):
        return _rescale(score, alpha)
    with jax.ensure_compile_time_eval():
        return _rescale_once(IdentityKey.of(score), alpha)


def _rescale(score: ScoreModel, alpha: float) -> ScoreModel:
    standardize = score.standardize
    scale = standardize.scale / alpha
    return replace(score, standardize=Affine(standardize.loc, scale))


@lru_cache(maxsize=32)
def _rescale_once(key: IdentityKey, alpha: float) -> ScoreModel:
    """Return one object for each score, by which its measurements are kept."""
    return _rescale(key.tree, alpha)


_WRAPPERS = (
    dist.ExpandedDistribution,
    dist.Independent,
    dist.MaskedDistribution,
    dist.TransformedDistribution,
)


def _is_learned(node: Any) -> bool:
    return isinstance(node, ScoreDistribution)


def base_distribution(fn: Any) -> Any:
    """Return the distribution inside expand, mask, to_event and transforms."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def is_masked(fn: Any) -> bool:
    """Return whether a distribution has a mask on any level.

    Example:
        >>> is_masked(dist.Normal(0, 1).expand([3]).mask(False).to_event(1))
        True
    """
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def find_learned(fn: Any, name: str) -> ScoreDistribution | None:
    """Return the ``ScoreDistribution`` inside a site's distribution, or None.

    Raises:
        TypeError: if its log density does not enter that of the site linearly, as in a
            mixture, whose score is not a function of this score alone.
    """
    inner = base_distribution(fn)
    if _is_learned(inner):
        return inner
    if any(map(_is_learned, jax.tree.leaves(fn, is_leaf=_is_learned))):
        raise TypeError(
            f"Site '{name}' holds a ScoreDistribution inside {type(inner).__name__}: "
            "its score can be used alone, or expanded, masked, transformed, in plates "
            "and with `to_event`. Write the model with one site per component, or use "
            "NUTS, which evaluates the density."
        )
    return None


def replace_learned(fn: Any, replacement: dist.Distribution) -> dist.Distribution:
    """Return ``fn`` with its ``ScoreDistribution`` replaced, wrappers unchanged.

    A mask of False becomes an array: NumPyro does not evaluate what it hides.
    """

    def replace(node: Any) -> Any:
        if _is_learned(node):
            return replacement
        if not _is_hidden(node):
            return node
        base = replace_learned(node.base_dist, replacement)
        return base.mask(jnp.zeros(base.batch_shape, bool))

    def is_leaf(node: Any) -> bool:
        return _is_learned(node) or _is_hidden(node)

    return jax.tree.map(replace, fn, is_leaf=is_leaf)


def _is_hidden(node: Any) -> bool:
    return isinstance(node, dist.MaskedDistribution) and node._mask is False
