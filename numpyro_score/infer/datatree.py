"""Results of every sampler as ArviZ's DataTree, with the model's plates as dimensions.

A result is read into one :class:`_Draws`, whatever made it, and the groups are built
from that: what the model says of the draws (data, likelihood, predictions) is computed
in the same way for all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from arviz_base import dict_to_dataset
from numpyro.distributions import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
)
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import condition, seed, substitute, trace, uncondition
from numpyro.infer import MCMC, Predictive, log_likelihood
from numpyro.infer.util import unconstrain_fn
from xarray import DataTree

from numpyro_score.checks import check_count, check_key
from numpyro_score.diagnostics.exactness import mark_exactness
from numpyro_score.diagnostics.verdict import mark_verdict
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from numpyro_score.infer.amortized.hierarchical import HierarchicalPosterior
from numpyro_score.infer.amortized.importance import MAX_KHAT
from numpyro_score.infer.amortized.npse import NPSE
from numpyro_score.infer.amortized.one_step import OneStepPosterior
from numpyro_score.infer.amortized.posterior import AmortizedPosterior
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.twisted.arviz_adapter import ScoreSDEAdapter
from numpyro_score.infer.twisted.particle_metropolis import (
    ParticleMetropolis,
    ParticleMetropolisState,
)
from numpyro_score.infer.twisted.score_sde import ScoreSDE
from numpyro_score.kernel.annealed_langevin import AnnealedLangevin
from numpyro_score.kernel.annealed_smc import AnnealedLangevinState
from numpyro_score.kernel.base import LangevinKernel
from numpyro_score.kernel.tempering_state import ParallelTemperingState
from numpyro_score.kernel.tempering_summary import summarize_tempering
from numpyro_score.model.distribution import find_learned
from numpyro_score.model.potential import model_potential
from numpyro_score.typing import PRNGKey

SAMPLE_DIMS = ("chain", "draw")
RESERVED_DIMS = (*SAMPLE_DIMS, "sample")  # ArviZ takes them for axes of draws
ARVIZ_NAMES = {  # as arviz.from_numpyro has them
    "accept_prob": "acceptance_rate",
    "adapt_state.step_size": "step_size",
    "num_steps": "n_steps",
}
BATCH_SIZE = 250  # draws whose energies are computed at a time; bounds memory
KERNELS = (LangevinKernel, ParticleMetropolis)
AMORTIZED = (AmortizedPosterior, OneStepPosterior, HierarchicalPosterior)
UNWEIGHTED = "approximate: without weights the shares of modes are wrong"
# others may lack axes: of events, or of an observation that is wider than its law
FULL_SHAPES = ("posterior", "prior", "observed_data")
SUPPORTED = (
    "an MCMC with ScoreLangevin, AnnealedLangevin, ParallelTempering or "
    "ParticleMetropolis, a ScoreSDE, or a posterior of NPSE"
)


def to_datatree(
    result: Any,
    observation: Any = None,
    *,
    rng_key: PRNGKey | None = None,
    num_samples: int = 1000,
    num_prior_samples: int = 0,
    importance: bool = False,
    learned_density: bool = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
) -> DataTree:
    """Return draws, data, predictions and diagnostics of a result as ArviZ's DataTree.

    Groups, each where it is known:

    - ``posterior``: ``get_samples``, or draws of the amortized posterior;
    - ``observed_data``, with NaN for numbers that a mask leaves out;
    - ``log_likelihood`` by observed number, where every latent site has draws; of a
      site with masked numbers without these, along an axis ``<site>_known`` of their
      places in the flat site; of factors (``numpyro.factor``) where they alone stand
      for the likelihood;
    - ``posterior_predictive``, with ``rng_key``, where every latent site has draws;
    - ``prior`` and ``prior_predictive``, with ``num_prior_samples``;
    - ``sample_stats``: the extra fields under ArviZ's names; ``lp``, the log joint
      density in NumPyro's unconstrained space, and ``energy = -lp``. The energy is the
      potential alone, without the momentum, so that its BFMI is that of the chain and
      near 2 for independent draws. Models with learned sites have them with
      ``learned_density``.

    Attributes of the root and of ``posterior``: ``sampler``, ``exactness`` (it begins
    with "exact" or "approximate"), ``log_evidence`` and ``log_evidence_error`` in nats
    where they are estimated, after ``MCMC`` ``accept_rule``, ``verdict`` and
    ``verdict_findings``, of draws after ``MCMC`` and ``ScoreSDE``, of the training for
    trained posteriors, and with ``importance`` instead ``khat`` and
    ``effective_sample_size``.

    Axes of plates have the names of the plates, except for plates named ``chain``,
    ``draw`` or ``sample``. A "/" in a name becomes ".", since "/" divides groups.

    Args:
        result: an ``MCMC`` with a kernel of this package or a :class:`ScoreSDE`, after
            ``run``, or an :class:`AmortizedPosterior`, :class:`OneStepPosterior` or
            :class:`HierarchicalPosterior`.
        observation: the observed value, for amortized posteriors alone.
        rng_key: random key of what is drawn: predictions, the prior, and the draws of
            an amortized posterior.
        num_samples: number of draws of an amortized posterior.
        num_prior_samples: number of draws of the prior; 0 for none.
        importance: whether the draws of an :class:`AmortizedPosterior` are resampled by
            importance weights, see its method ``importance``.
        learned_density: whether ``lp`` and ``energy`` are computed for models with
            learned sites, by the density of the probability flow, which costs hundreds
            of evaluations of the net for each draw.
        coords: coordinates by dimension, for example ``{"school": names}``.
        dims: names of all axes of a site, in the place of its plates.

    Raises:
        RuntimeError: before ``run``.
        TypeError: for another result.
        ValueError: without the ``rng_key`` or ``observation`` that is needed, and for
            draws of an improper prior.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro_score import ScoreLangevin
        >>> def model(y):
        ...     with numpyro.plate("school", 3):
        ...         x = numpyro.sample("x", dist.Normal(0, 1))
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> mcmc = MCMC(
        ...     ScoreLangevin(model), num_warmup=50, num_samples=50, progress_bar=False
        ... )
        >>> mcmc.run(jax.random.key(0), np.arange(3.0))
        >>> tree = to_datatree(mcmc)
        >>> tree.posterior["x"].dims, tree.attrs["exactness"]
        (('chain', 'draw', 'school'), 'exact')
    """
    check_count("num_prior_samples", num_prior_samples, "a number of draws", least=0)
    if rng_key is None and num_prior_samples:
        raise ValueError(
            "`rng_key` must be given for draws of the prior. "
            f"Got None, num_prior_samples={num_prior_samples}."
        )
    key_draw, key_predict, key_prior = _split(rng_key)
    if importance and not isinstance(result, AmortizedPosterior):
        raise ValueError(
            "`importance` must be False unless the result is an AmortizedPosterior, "
            f"whose density is known. Got a {type(result).__name__}."
        )
    draws = _read(result, observation, key_draw, num_samples, importance)
    if not draws.samples:
        raise ValueError(
            "`result` must hold draws of a site: its model has neither latent nor "
            "deterministic ones. Got none."
        )
    sites = _Sites.of(draws)
    likelihood, known = _without_masked(_log_likelihood(draws, sites))
    groups = {
        "posterior": draws.samples,
        "sample_stats": draws.stats | _energies(draws, learned_density),
        "log_likelihood": likelihood,
        "observed_data": sites.data,
    }
    if key_predict is not None:
        groups["posterior_predictive"] = _predict(draws, sites, key_predict)
    if num_prior_samples:
        groups |= _draw_prior(draws, sites, key_prior, num_prior_samples)
    tree = _build(groups, dict(coords or {}), {**sites.dims, **(dims or {})}, known)
    return _mark(tree, result, draws.marks)


@dataclass(frozen=True)
class _Draws:
    """Draws of a result, and the model that they belong to.

    Args:
        model: the model, with its observations; None for a kernel of a potential.
        args: its positional arguments.
        kwargs: its keyword arguments.
        samples: draws by site, with axes of chains and draws.
        marks: attributes of the tree.
        stats: what is known of each draw.
        observed: values of deterministic sites that were observed.
        has_likelihood: whether the likelihood of the observations is known.
        has_density: whether the joint density may be known.
        marginalized: whether latent sites without draws follow their prior given the
            others, as in simulations.
    """

    model: Callable | None
    args: tuple
    kwargs: dict[str, Any]
    samples: dict[str, Any]
    marks: dict[str, Any]
    stats: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    has_likelihood: bool = True
    has_density: bool = True
    marginalized: bool = False

    def trace(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the trace of the model at values of its sites."""
        # no site is drawn: all have values
        model: Any = seed(substitute(self.model, data=values), jax.random.key(0))
        with validation_enabled(False):  # draws may be rounded to the end of a support
            return trace(model).get_trace(*self.args, **self.kwargs)


@dataclass(frozen=True)
class _Sites:
    """Sites of a model.

    Args:
        observed: observed values, those that a mask leaves out among them.
        data: the same, with NaN for the latter.
        factors: names of factors.
        latents: names of latent sites.
        dims: names of axes by site.
    """

    observed: dict[str, Any]
    data: dict[str, Any]
    factors: frozenset[str]
    latents: frozenset[str]
    dims: dict[str, list[str | None]]

    @classmethod
    def of(cls, draws: _Draws) -> "_Sites":
        """Return the sites of the model at the first draw."""
        if draws.model is None:
            return cls({}, {}, frozenset(), frozenset(), {})
        sites = draws.trace(jax.tree.map(lambda x: x[0, 0], draws.samples))
        sampled = {k: site for k, site in sites.items() if site["type"] == "sample"}
        given = {k: site for k, site in sampled.items() if site["is_observed"]}
        # a factor has no value
        laws = {k: site["fn"] for k, site in given.items() if np.size(site["value"])}
        observed = {name: given[name]["value"] for name in laws}
        data = {
            name: left
            for name, value in observed.items()
            if (left := _without_masked_data(value, laws[name])) is not None
        }
        latents = {k for k, site in sampled.items() if not site["is_observed"]}
        values = {
            name: site
            for name, site in sites.items()
            if site["type"] in ("sample", "deterministic")
        }
        dims = {name: axis_names(site) for name, site in values.items()}
        return cls(
            observed | draws.observed,
            data | draws.observed,
            frozenset(given.keys() - laws.keys()),
            frozenset(latents),
            dims,
        )


def _without_masked_data(value: Any, law: Any) -> Any:
    """Return data with NaN where a mask of their law is False, None if it all is."""
    value, is_known = np.asarray(value), np.array(True)
    while isinstance(law, MaskedDistribution | Independent | ExpandedDistribution):
        if isinstance(law, MaskedDistribution):
            mask = np.asarray(law._mask)
            mask = mask.reshape(mask.shape + (1,) * law.event_dim)
            is_known = is_known & mask
        law = law.base_dist
    is_wider = np.broadcast_shapes(is_known.shape, value.shape) != value.shape
    if is_known.all() or is_wider:
        return value
    return np.where(is_known, value, np.nan) if is_known.any() else None


def axis_names(site: dict[str, Any]) -> list[str | None]:
    """Return for each axis of a site's value its plate, or None.

    Axes of an event have the names in the site's ``infer={"event_dims": ...}``. The
    event of a deterministic site is not known: its plates are the leading axes whose
    sizes fit.

    Args:
        site: of NumPyro's trace.

    Example:
        >>> import numpyro.distributions as dist
        >>> def model():
        ...     with numpyro.plate("rows", 3):
        ...         numpyro.sample("x", dist.Normal(np.zeros((2, 3)), 1))
        >>> axis_names(trace(seed(model, jax.random.key(0))).get_trace()["x"])
        [None, 'rows']
    """
    shape = np.shape(site["value"])
    frames = {frame.dim: frame for frame in site["cond_indep_stack"]}
    if site["type"] == "sample":
        counts = [len(shape) - site["fn"].event_dim]
    else:
        counts = list(range(-min(frames, default=0), len(shape) + 1))
    for count in counts:
        axes = {count + dim: frame for dim, frame in frames.items()}
        if all(i >= 0 and shape[i] == axes[i].size for i in axes):
            names = [axes[i].name if i in axes else None for i in range(count)]
            names += _event_names(site, len(shape) - count)
            return [None if name in RESERVED_DIMS else name for name in names]
    return [None] * len(shape)


def _event_names(site: dict[str, Any], count: int) -> list[str | None]:
    """Return the names of an event's axes, as the model gives them."""
    given = list(site.get("infer", {}).get("event_dims", []))
    return given if len(given) == count else [None] * count


def _split(rng_key: PRNGKey | None) -> tuple[Any, Any, Any]:
    if rng_key is None:
        return None, None, None
    check_key("rng_key", rng_key)
    first, second, third = jax.random.split(rng_key, 3)
    return first, second, third


def _read(
    result: Any, observation: Any, rng_key: Any, num_samples: int, importance: bool
) -> _Draws:
    """Return the draws of a result of any kind."""
    if isinstance(result, AMORTIZED):
        return _read_amortized(result, observation, rng_key, num_samples, importance)
    if observation is not None:
        raise ValueError(
            "`observation` is for amortized posteriors: other results hold the data "
            f"that they were run with. Got a {type(result).__name__}."
        )
    if isinstance(result, ScoreSDE):
        return _read_score_sde(result)
    if isinstance(result, MCMC) and isinstance(result.sampler, KERNELS):
        return _read_mcmc(result)
    raise TypeError(f"`result` must be {SUPPORTED}. Got {_describe(result)}.")


def _describe(result: Any) -> str:
    if isinstance(result, MCMC):
        name = type(result.sampler).__name__
        return f"an MCMC with {name}, which arviz.from_numpyro converts"
    if isinstance(result, NPSE):
        return "an NPSE, whose method `fit` returns the posterior"
    return f"a {type(result).__name__}"


def _read_mcmc(mcmc: MCMC) -> _Draws:
    if mcmc._states is None or _has_only_warmed_up(mcmc):
        raise RuntimeError("`run` must be called first: the MCMC has no draws yet.")
    kernel: Any = mcmc.sampler
    fields = mcmc.get_extra_fields(group_by_chain=True)
    stats = {name: fields[name] for name in fields if hasattr(fields[name], "shape")}
    samples = mcmc.get_samples(group_by_chain=True)
    if kernel.model is None:  # any tree of arrays
        stats |= _each(kernel.potential_fn, samples)
        samples = {
            jax.tree_util.keystr(path, simple=True, separator=".") or "x": leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(samples)
        }
    marks = {"sampler": type(kernel).__name__} | _evidence(mcmc.last_state)
    if isinstance(kernel, ParticleMetropolis):
        marks["exactness"] = "exact for the learned law of `levels` steps"
    elif isinstance(kernel, AnnealedLangevin) and mcmc.last_state.weights is None:
        marks["exactness"] = UNWEIGHTED
    return _Draws(kernel.model, mcmc._args, mcmc._kwargs, samples, marks, stats)


def _has_only_warmed_up(mcmc: MCMC) -> bool:
    """Return whether ``warmup`` came last: NumPyro then gives zeros for draws."""
    state: Any = mcmc.last_state
    return state is mcmc.post_warmup_state and bool(np.max(state.i) <= mcmc.num_warmup)


def _evidence(state: Any) -> dict[str, float]:
    """Return the log evidence of all chains and its standard error, where known."""
    if isinstance(state, ParallelTemperingState):
        found: Any = summarize_tempering(state)
    elif isinstance(state, AnnealedLangevinState) and state.weights is not None:
        found = state
    elif isinstance(state, ParticleMetropolisState):
        found = state.pooled
    else:
        return {}
    value, error = float(found.log_evidence), float(found.log_evidence_error)
    if np.isnan(value) or np.isinf(error):
        return {}
    return {"log_evidence": value, "log_evidence_error": error}


def _read_score_sde(inference: ScoreSDE) -> _Draws:
    samples = inference.get_samples(group_by_chain=True)  # raises before a run
    marks: dict[str, Any] = {"sampler": "ScoreSDE"}
    if inference.guidance is None:
        marks["exactness"] = (
            "exact for the learned law as `num_particles` grows, with its reverse SDE "
            "in `levels` steps"
        )
        marks["log_evidence"] = inference.log_evidence
        marks["log_evidence_error"] = inference.log_evidence_error
        found = inference.verdict
        marks["verdict"] = found.names
        marks["verdict_findings"] = str(found)
    else:
        marks["exactness"] = f"approximate: {inference.guidance.approximation}"
    stats = ScoreSDEAdapter(inference).get_sample_stats()
    model, args, kwargs = inference.model, inference._args, inference._kwargs
    return _Draws(model, args, kwargs, samples, marks, stats)


def _read_amortized(
    posterior: AmortizedPosterior | OneStepPosterior | HierarchicalPosterior,
    observation: Any,
    rng_key: Any,
    num_samples: int,
    importance: bool,
) -> _Draws:
    for name, value in (("observation", observation), ("rng_key", rng_key)):
        if value is None:
            raise ValueError(
                f"`{name}` must be given for an amortized posterior: its draws are "
                "made here, given the observation. Got None."
            )
    check_count("num_samples", num_samples, "the number of draws")
    if importance:
        samples, marks = _weighted(posterior, rng_key, observation, num_samples)
    else:
        samples = posterior.sample(rng_key, observation, num_samples)
        marks = {
            "exactness": "approximate: by the error of the net, for the model's "
            "posterior"
        } | _fit_verdict(posterior)
    simulator, model, observed = _model_given(posterior, observation)
    return _Draws(
        condition(model, data=observed),
        simulator.args,
        simulator.kwargs,
        {name: value[None] for name, value in samples.items()},
        {"sampler": type(posterior).__name__} | marks,
        observed=observed,
        has_likelihood=not simulator.intractable,
        has_density=not simulator.intractable,
        marginalized=True,
    )


def _fit_verdict(posterior: Any) -> dict[str, str]:
    """Return the verdict on the training of a posterior, or of both of its parts."""
    parts = {"": posterior}
    if isinstance(posterior, HierarchicalPosterior):
        parts = {"shared: ": posterior.shared, "local: ": posterior.local}
    names, texts = [], []
    for part, trained in parts.items():
        found: FitVerdict | None = getattr(trained, "verdict", None)
        if found is not None:
            names.append(found.names)
            texts.append(f"{part}{found}")
    if not names:
        return {}
    wrong = dict.fromkeys(name for name in names if name != "ok")
    return {"verdict": ", ".join(wrong) or "ok", "verdict_findings": "\n".join(texts)}


def _model_given(posterior: Any, observation: Any) -> tuple[Simulator, Any, dict]:
    """Return the simulator, the model of the observation, and observed values."""
    part = posterior
    if isinstance(posterior, HierarchicalPosterior):
        part = posterior.shared if posterior.local is None else posterior.local
    return part.simulator, *posterior.model_of(observation)


def _weighted(
    posterior: Any, rng_key: PRNGKey, observation: Any, num_samples: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return draws resampled by their importance weights, and attributes of them."""
    key_draw, key_resample = jax.random.split(rng_key)
    found = posterior.importance(key_draw, observation, num_samples)
    exactness = f"approximate: Pareto k-hat is not below {MAX_KHAT}"
    if found.is_reliable:
        exactness = "exact as `num_samples` grows: Pareto k-hat allows it"
    marks = {
        "exactness": exactness,
        "khat": found.khat,
        "effective_sample_size": found.ess,
        "log_evidence": found.log_evidence,
        "log_evidence_error": found.log_evidence_error,
    }
    return found.resample(key_resample), marks


def _energies(draws: _Draws, learned_density: bool) -> dict[str, Any]:
    """Return ``lp`` and ``energy``, where the density of the model is known."""
    if draws.model is None or not draws.has_density:
        return {}
    potential = model_potential(draws.model, draws.args, draws.kwargs)
    if not potential.prototype or (potential.learned and not learned_density):
        return {}
    seeded = seed(draws.model, jax.random.key(0))  # sites summed out are drawn

    def energy(values: dict[str, Any]) -> Any:
        z = unconstrain_fn(seeded, draws.args, draws.kwargs, values)
        value = potential.value(z)
        return value - _learned_log_prob(draws, values) if potential.learned else value

    return _each(energy, {name: draws.samples[name] for name in potential.prototype})


def _learned_log_prob(draws: _Draws, values: dict[str, Any]) -> Any:
    """Return the log density of learned sites, with their scales and masks."""
    terms = [
        (1.0 if site["scale"] is None else site["scale"])
        * site["fn"].log_prob(site["value"])
        for name, site in draws.trace(values).items()
        if site["type"] == "sample" and find_learned(site["fn"], name)
    ]
    return sum((term.sum() for term in terms), jnp.zeros(()))


def _each(energy: Callable[[Any], Any], values: Any) -> dict[str, Any]:
    """Return ``lp`` and ``energy`` of every draw."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values)
    shape = jax.tree.leaves(values)[0].shape[:2]
    found = jax.lax.map(energy, flat, batch_size=BATCH_SIZE).reshape(shape)
    return {"lp": -found, "energy": found}


def _log_likelihood(draws: _Draws, sites: _Sites) -> dict[str, Any]:
    """Return the log likelihood by observed number, where all latents have draws."""
    known = draws.has_likelihood and sites.latents <= set(draws.samples)
    names = sites.observed.keys() or sites.factors
    if not known or not names:
        return {}
    found = log_likelihood(
        draws.model, draws.samples, *draws.args, batch_ndims=2, **draws.kwargs
    )
    return {name: value for name, value in found.items() if name in names}


def _without_masked(
    likelihood: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return log likelihoods without masked numbers, and the places of the others.

    A masked number has the log likelihood 0 in all draws; it is none of the data, and
    its constant would end cross-validation in an error.
    """
    values, known = {}, {}
    for name, value in likelihood.items():
        value = np.asarray(value)
        flat = value.reshape(*value.shape[:2], -1)
        is_known = (flat != 0).any((0, 1))
        if is_known.all():
            values[name] = value
        elif is_known.any():
            values[name], known[name] = flat[..., is_known], np.flatnonzero(is_known)
    return values, known


def _predict(draws: _Draws, sites: _Sites, rng_key: PRNGKey) -> dict[str, Any]:
    """Return draws of the observed sites given the draws of the others."""
    known = draws.marginalized or sites.latents <= set(draws.samples)
    if not known or not sites.observed:  # enumerated sites have no draws
        return {}
    predictive = Predictive(
        uncondition(draws.model),
        draws.samples,
        return_sites=list(sites.observed),
        batch_ndims=2,
    )
    return predictive(rng_key, *draws.args, **draws.kwargs)


def _draw_prior(
    draws: _Draws, sites: _Sites, rng_key: PRNGKey, num_samples: int
) -> dict[str, dict[str, Any]]:
    """Return the groups of the prior and of the prior's predictions."""
    if draws.model is None:
        raise ValueError(
            "`num_prior_samples` must be 0 for a kernel of a `potential_fn`, which "
            f"has no prior. Got {num_samples}."
        )
    names = [*draws.samples, *sites.observed]
    model = uncondition(draws.model)
    predictive = Predictive(model, num_samples=num_samples, return_sites=names)
    try:
        values = predictive(rng_key, *draws.args, **draws.kwargs)
    except NotImplementedError as error:
        raise ValueError(
            "`num_prior_samples` must be 0 for a model with an improper prior, which "
            f"has no draws. Got {num_samples}."
        ) from error
    values = {name: value[None] for name, value in values.items()}
    prior = {name: values.pop(name) for name in draws.samples if name in values}
    return {"prior": prior, "prior_predictive": values}


def _build(
    groups: dict[str, dict[str, Any]],
    coords: dict[str, Any],
    dims: dict[str, Sequence[str | None]],
    known: dict[str, np.ndarray],
) -> DataTree:
    """Return the tree of the groups that hold something.

    Args:
        groups: values by name.
        coords: coordinates by axis.
        dims: axes by site.
        known: places in the flat site, of log likelihoods that lack masked numbers.
    """
    named: dict[Any, Any] = {
        _variable_name(name): [
            None if dim is None else _variable_name(dim) for dim in v
        ]
        for name, v in dims.items()
    }
    axes = {name: f"{_variable_name(name)}_known" for name in known}
    coords = coords | {axes[name]: places for name, places in known.items()}
    flat: dict[Any, Any] = {_variable_name(name): [axes[name]] for name in known}
    dims_of = {"sample_stats": {}, "log_likelihood": named | flat}
    datasets = {
        group: dict_to_dataset(
            {
                _variable_name(ARVIZ_NAMES.get(name, name)): np.asarray(value)
                for name, value in data.items()
            },
            inference_library=numpyro,
            coords=coords,
            dims=dims_of.get(group, named),
            sample_dims=[] if group == "observed_data" else list(SAMPLE_DIMS),
            skip_event_dims=group not in FULL_SHAPES,
            check_conventions=False,  # particles outnumber the draws of each
        )
        for group, data in groups.items()
        if data
    }
    return DataTree.from_dict(datasets)


def _variable_name(name: str) -> str:
    return name.replace("/", ".")


def _mark(tree: DataTree, result: Any, marks: dict[str, Any]) -> DataTree:
    """Add the attributes to the root and to the posterior.

    Those in ``marks`` replace what follows from the accept rule of a kernel.
    """
    if isinstance(result, MCMC) and isinstance(result.sampler, LangevinKernel):
        mark_exactness(tree)
    for node in (tree, tree["posterior"]):
        node.attrs.update(marks)
    if not isinstance(result, MCMC):
        return tree
    try:
        return mark_verdict(tree, result)
    except ValueError as error:  # too short a run, or one that goes on from another
        for node in (tree, tree["posterior"]):
            node.attrs.update(verdict="not judged", verdict_findings=str(error))
        return tree
