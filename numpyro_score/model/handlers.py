"""Effect handlers: noise levels, tempered likelihoods and learned priors."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.handlers import condition, do, substitute
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_score.checks import check_callable, check_kind, is_traced
from numpyro_score.data.support import base_constraint, constraint_name
from numpyro_score.model.distribution import (
    find_learned,
    is_masked,
    replace_learned,
)
from numpyro_score.model.latents import LatentSite
from numpyro_score.model.learned_prior import LearnedPrior
from numpyro_score.typing import Scalar, Time

ROUNDING = 1e-5  # of the largest bound of a support; about 100 units of float32


class noise_level(Messenger):  # noqa: N801 (handlers are lower case, as in NumPyro)
    r"""Replace every learned site by its marginal at time t.

    A site ``x ~ ScoreDistribution(score)`` is recorded as :math:`x_t` with law
    :math:`p_t`, and the rest of the model receives the denoised point
    :math:`E[x_s | x_t]` (Tweedie's formula), where s is the site's own time, by default
    the lowest. The likelihood of the model becomes that of diffusion posterior sampling
    (DPS, Chung et al. 2023). Other sites do not change. At t = s the model is the
    original one; at t < s a site keeps its own time.

    Args:
        fn: a NumPyro model.
        t: the time of the scores' process, one for all learned sites; None for the
            lowest noise level.

    Raises:
        TypeError: for a learned site under a transform, whose noise is not Gaussian.

    Example:
        >>> import jax, numpyro
        >>> from numpyro_score import ScoreDistribution, ScoreModel, VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
        ... )
        >>> def model():
        ...     x = numpyro.sample("x", ScoreDistribution(score))
        ...     numpyro.deterministic("seen", x)
        >>> noisy = numpyro.handlers.seed(noise_level(model, VE().time(1.0)), 0)
        >>> trace = numpyro.handlers.trace(noisy).get_trace()
        >>> bool(abs(trace["seen"]["value"] - trace["x"]["value"] / 2) < 1e-3)
        True
    """

    def __init__(self, fn: Callable | None = None, t: Time | None = None) -> None:
        self.t = t
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace a learned distribution by its marginal at t."""
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        learned = find_learned(msg["fn"], msg["name"])
        if learned is None:
            return
        _check_transforms(msg["fn"], msg["name"])
        t = learned.t if self.t is None else jnp.maximum(self.t, learned.t)
        noisy = learned.marginal(t)
        msg["fn"] = replace_learned(msg["fn"], noisy)
        msg["infer"] = {**msg["infer"], "_noise_level": (learned, noisy.t)}

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Return the denoised point to the model, after outer traces recorded x_t."""
        noisy = msg.get("infer", {}).get("_noise_level")
        if msg["type"] == "sample" and noisy is not None:
            learned, t = noisy
            score = learned.score
            z = score.reverse_transition(score.unconstrain(msg["value"]), t, learned.t)[
                0
            ]
            msg["value"] = score.constrain(z)


def _check_transforms(fn: Any, name: str) -> None:
    """Raise for a learned site under a transform."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.TransformedDistribution):
            raise TypeError(
                f"Site '{name}' transforms a ScoreDistribution: noise on the learned "
                "point is not Gaussian after a transform. Sample the learned point at "
                "its own site and transform it by `numpyro.deterministic`."
            )
        fn = fn.base_dist


class temper(Messenger):  # noqa: N801
    r"""Raise the likelihood to the power beta; 0 is the prior and 1 the posterior.

    Multiplies the log density of observed sites and factors by beta. Latent sites, and
    the log Jacobians of their transforms, do not change.

    Args:
        fn: a NumPyro model.
        beta: the power, in [0, 1].

    Example:
        >>> import numpyro
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=3.0)
        >>> def energy(beta):
        ...     tempered = temper(model, beta)
        ...     return numpyro.infer.util.log_density(tempered, (), {}, {"x": 0.0})[0]
        >>> float(energy(0.0)) == float(dist.Normal(0, 1).log_prob(0.0))
        True
    """

    def __init__(self, fn: Callable | None = None, beta: Scalar = 1.0) -> None:
        self.beta = beta
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Scale the log density of an observed site."""
        if is_likelihood(msg):
            scale = 1.0 if msg.get("scale") is None else msg["scale"]
            msg["scale"] = scale * self.beta
            # 0 * -inf is NaN: at power 0 the likelihood is 1 even where it was 0
            msg["fn"] = msg["fn"].mask(jnp.asarray(self.beta) > 0)


def is_likelihood(msg: dict[str, Any]) -> bool:
    """Return whether a site belongs to the likelihood.

    NumPyro's factor for the Jacobian of a latent site belongs to the prior.
    """
    if msg["type"] != "sample" or not msg["is_observed"]:
        return False
    return not (msg["name"].startswith("_") and msg["name"].endswith("_log_det"))


class with_prior:  # noqa: N801
    r"""Replace the priors of some sites of a model by a learned joint prior.

    The sites become deterministic functions of one latent site, ``learned_prior`` by
    default, of whitened unconstrained points with a learned score. Other sites keep
    their priors. The result is a model for any kernel, ``Predictive`` and NUTS, which
    evaluates the density by the probability flow.

    Args:
        fn: the model.
        prior: what :func:`numpyro_score.learn_prior` returned.
        name: name of the new latent site.

    Raises:
        TypeError: if ``fn`` is no model, or ``prior`` no learned prior.
        ValueError: when the model runs, for a learned site that is observed or given a
            value, by ``condition`` and ``do`` of NumPyro around the result too, or by
            ``Predictive`` without a value of the new site, has another shape or support
            than it was learned with, is masked or scaled, or is not in the model; and
            for a ``name`` that the model has.

    Example:
        >>> import jax
        >>> from numpyro_score import learn_prior
        >>> def model(y=None):
        ...     s = numpyro.sample("s", dist.LogNormal(0, 1))
        ...     numpyro.sample("y", dist.Normal(0, s), obs=y)
        >>> draws = {"s": jnp.exp(0.1 * jax.random.normal(jax.random.key(0), (400,)))}
        >>> prior = learn_prior(
        ...     jax.random.key(1), draws, model, 0.5, num_steps=20, progress_bar=False
        ... )
        >>> seeded = numpyro.handlers.seed(with_prior(model, prior), 0)
        >>> trace = numpyro.handlers.trace(seeded).get_trace(y=1.0)
        >>> {name: site["type"] for name, site in trace.items()}
        {'learned_prior': 'sample', 's': 'deterministic', 'y': 'sample'}
    """

    def __init__(
        self, fn: Callable, prior: LearnedPrior, *, name: str = "learned_prior"
    ) -> None:
        if not isinstance(prior, LearnedPrior):
            raise TypeError(
                "`prior` must be a LearnedPrior, the result of "
                f"numpyro_score.learn_prior. Got {type(prior).__name__}."
            )
        check_callable("fn", fn, "the model whose sites have the prior")
        check_kind("name", name, str, "the name of the new latent site")
        self.fn, self.prior, self.name = fn, prior, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the sites at one draw of the prior."""
        self._check_given()
        u = numpyro.sample(self.name, self.prior.distribution)
        values = self.prior.constrain(u)
        replaced = _replace_sites(self.fn, self.prior, values, self.name)
        # inside `scan` and `cond` values are taken from `substitute` alone
        given = substitute(replaced, data=values)
        with warnings.catch_warnings():
            # a start is offered for sites inside `scan` too, and rightly left out
            warnings.filterwarnings("ignore", r"init_to_\w+\(\) skipping")
            result = given(*args, **kwargs)
        missing = [name for name in self.prior.names if name not in replaced.seen]
        if missing:
            raise ValueError(
                "`fn` must have the sites that the prior was learned for: otherwise it "
                "would not act on them. Learn it with `sites=` without these. Got none "
                f"named {missing}."
            )
        return result

    def _check_given(self) -> None:
        """Raise for given values of learned sites without the site of all of them."""
        outer = [
            handler
            for handler in _PYRO_STACK
            # that of another prior gives values of its own sites
            if isinstance(handler, substitute)
            and not isinstance(handler.fn, _replace_sites)
        ]
        lost = [name for name in self.prior.names if _is_substituted(outer, name)]
        if lost and not _is_substituted(outer, self.name):
            raise ValueError(
                f"Values of site '{self.name}' must be given with those of the learned "
                "sites, which are functions of it: alone they are ignored. Pass all of "
                "`get_samples()` to `Predictive`, or use the model itself, in which "
                "they are sites, without `with_prior`: given them the prior plays no "
                f"role. Got values of {lost}."
            )


def _is_substituted(handlers: Sequence[Messenger], name: str) -> bool:
    """Return whether `substitute`, also that of `Predictive`, gives a site a value."""
    for handler in handlers:
        choose: Any = getattr(handler, "substitute_fn", None)
        # strategies of kernels offer starts, which are no values
        of_draws = getattr(choose, "__qualname__", "").startswith("_predictive.")
        message = {"type": "sample", "name": name}
        if of_draws and choose(message) is not None:
            return True
        if name in (handler.data or {}):
            return True
    return False


class _replace_sites(Messenger):  # noqa: N801
    """Give sites of a model values, and take their priors out."""

    def __init__(
        self, fn: Callable, prior: LearnedPrior, values: dict[str, Array], name: str
    ) -> None:
        self.sites = {site.name: site for site in prior.latents}
        self.values, self.name = values, name
        self.seen: set[str] = set()
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Make a learned site deterministic."""
        if msg["type"] in ("sample", "deterministic") and msg["name"] == self.name:
            raise ValueError(
                "`name` must be that of no site of the model, nor of another prior in "
                f"it: two priors need two names. Got '{self.name}'."
            )
        if msg["type"] != "sample" or msg["name"] not in self.sites:
            return
        name = msg["name"]
        outer = _PYRO_STACK[: _PYRO_STACK.index(self)]
        _check_site(self.sites[name], msg, any(_gives(h, msg) for h in outer))
        self.seen.add(name)
        kept = {"name": name, "cond_indep_stack": msg["cond_indep_stack"]}
        msg.clear()
        msg.update(type="deterministic", value=self.values[name], **kept)


def _check_site(site: LatentSite, msg: dict[str, Any], is_given: bool) -> None:
    """Raise unless a site of a model is the one that a prior was learned for.

    Args:
        site: the site as it was learned.
        msg: its message.
        is_given: whether a handler around the model gives it a value.
    """
    # what was drawn inside of `scan` or `cond` has a value too
    has_value = msg["value"] is not None and not msg.get("_control_flow_done", False)
    if msg["is_observed"] or has_value or is_given:
        raise ValueError(
            f"Site '{site.name}' must not be observed, or given a value by "
            "`condition`, `do` or `substitute` of NumPyro: its prior was learned, so "
            "that it is a function of the learned site, to which the others are tied. "
            "Learn the prior with `sites=` without it."
        )
    shape = tuple(msg["fn"].shape(msg["kwargs"].get("sample_shape", ())))
    got, expected = str(msg["fn"].support), str(site.support.constraint)
    if shape != site.shape:
        raise ValueError(
            f"Site '{site.name}' must have the shape that its prior was learned with. "
            "Learn the prior with `sites=` without sites of single data. "
            f"Got {shape}, expected {site.shape}."
        )
    if msg.get("scale") is not None or is_masked(msg["fn"]):
        raise ValueError(
            f"Site '{site.name}' must not be masked or scaled, as in a plate with "
            "`subsample_size`: one density of all sites takes the place of its own. "
            "Mask or scale observed sites only."
        )
    kind = constraint_name(msg["fn"].support)
    same_bounds = _are_close(msg["fn"].support, site.support.constraint)
    if kind != site.support.name or not same_bounds:
        raise ValueError(
            f"Site '{site.name}' must have the support that its prior was learned "
            f"with. Got {got}, expected {expected}."
        )


def _gives(handler: Messenger, msg: dict[str, Any]) -> bool:
    """Return whether a handler gives a sample site a value that counts as known."""
    if not isinstance(handler, condition | do):
        return False
    choose = getattr(handler, "condition_fn", None)
    return msg["name"] in (handler.data or {}) or (
        choose is not None and choose(msg) is not None
    )


def _are_close(constraint: Any, other: Any) -> bool:
    """Return whether constraints of one kind have equal bounds, as far as known."""
    bounds, others = (jax.tree.leaves(base_constraint(c)) for c in (constraint, other))
    if any(map(is_traced, bounds)) or len(bounds) != len(others):
        return True
    largest = max((float(np.abs(b).max()) for b in bounds), default=0.0)
    # the default tolerance is absolute, beyond the bounds of small units
    close = partial(np.allclose, rtol=ROUNDING, atol=ROUNDING * largest)
    return all(map(close, bounds, others))
