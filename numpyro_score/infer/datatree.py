"""ArviZ's tree of a finished run, with what the run says of itself."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from arviz_base import dict_to_dataset
from arviz_base.io_numpyro import NumPyroInferenceAdapter, from_numpyro, infer_dims
from jaxtyping import Array
from numpyro.handlers import condition, seed, substitute, trace
from numpyro.infer import MCMC, Predictive
from numpyro.infer.initialization import init_to_sample
from numpyro.infer.util import potential_energy, unconstrain_fn

from numpyro_score.checks import check_integer
from numpyro_score.diagnostics.exactness import EXACTNESS
from numpyro_score.diagnostics.verdict import verdict
from numpyro_score.infer.amortized.importance import MAX_KHAT, UNIFORM_ESS_SHARE
from numpyro_score.infer.amortized.one_step import OneStepPosterior
from numpyro_score.infer.amortized.posterior import AmortizedPosterior
from numpyro_score.infer.amortized.simulator import resample_observed
from numpyro_score.infer.twisted.replicates import warn_on_degeneracy
from numpyro_score.infer.twisted.score_sde import PER_DRAW, ScoreSDE
from numpyro_score.kernel import AcceptRule, AnnealedLangevin, ParallelTempering
from numpyro_score.kernel.base import LangevinKernel
from numpyro_score.kernel.tempering_summary import summarize_tempering
from numpyro_score.model.distribution import find_learned
from numpyro_score.typing import PRNGKey

BATCH_SIZE = 250  # draws whose densities are computed at a time; bounds memory


def to_datatree(
    result: Any,
    *,
    rng_key: PRNGKey | None = None,
    observation: Any = None,
    num_samples: int = 1000,
    importance: bool = False,
    num_prior_samples: int = 500,
    learned_density: bool = True,
    coords: dict[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    r"""Return ArviZ's tree of a finished run: draws, data, predictions and statistics.

    Groups: ``posterior``, ``sample_stats``, ``observed_data``, ``log_likelihood``,
    ``posterior_predictive``, ``prior`` and ``prior_predictive``, as far as the model
    has them. Plates become dimensions of the same name. A group that would be wrong is
    left out: predictions and likelihoods where latent sites have no draws (enumerated
    ones), the prior where it is improper.

    ``sample_stats`` has ``lp``, the log joint density of unconstrained latents and
    data, and ``energy``, -lp plus the kinetic energy of the transition. Samplers
    without momentum get that of a standard normal one drawn anew for each draw.

    Attributes of the tree and of ``posterior``: ``exactness``, which begins with
    "exact" or "approximate"; ``accept_rule``; ``verdict`` and ``verdict_findings``;
    ``log_evidence`` and ``log_evidence_error``; ``khat``: as far as there are such.

    Args:
        result: an ``MCMC`` or :class:`~numpyro_score.ScoreSDE` after ``run``, or the
            posterior of :meth:`NPSE.fit <numpyro_score.NPSE.fit>`.
        rng_key: key of everything that is drawn here; None for a fixed key.
        observation: of an amortized posterior, as in its ``sample``.
        num_samples: number of draws from an amortized posterior.
        importance: whether draws of an amortized posterior are resampled by importance
            weights, see :meth:`AmortizedPosterior.importance
            <numpyro_score.infer.AmortizedPosterior.importance>`.
        num_prior_samples: draws of the prior; 0 leaves its groups out.
        learned_density: whether the density of learned sites is computed, which costs
            hundreds of evaluations of the net per draw; without it a model with learned
            sites has no ``lp`` and ``energy``.
        coords: coordinates of dimensions.
        dims: names of the dimensions of sites, in place of those found.

    Raises:
        RuntimeError: before ``run``.
        TypeError: for a result of another kind.
        ValueError: for an amortized posterior without observation, or a negative number
            of draws.

    Example:
        >>> from numpyro import plate, sample
        >>> from numpyro_score import ScoreLangevin
        >>> def model(y):
        ...     mean = sample("mean", dist.Normal(0, 1))
        ...     with plate("rows", 3):
        ...         sample("y", dist.Normal(mean, 1), obs=y)
        >>> kernel = ScoreLangevin(model)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=100, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.array([0.1, 0.5, 0.9]))
        >>> tree = to_datatree(mcmc)
        >>> tree.attrs["exactness"], tree["log_likelihood"]["y"].dims
        ('exact', ('chain', 'draw', 'rows'))
    """
    check_integer("num_prior_samples", num_prior_samples, "a number of draws")
    if num_prior_samples < 0:
        raise ValueError(
            "`num_prior_samples` must not be negative: it is a number of draws. "
            f"Got {num_prior_samples}."
        )
    key = jax.random.key(0) if rng_key is None else rng_key
    key_run, key_groups, key_energy = jax.random.split(key, 3)
    if isinstance(result, MCMC):
        run = _mcmc_run(result)
    elif isinstance(result, ScoreSDE):
        run = _score_sde_run(result)
    elif isinstance(result, AmortizedPosterior | OneStepPosterior):
        run = _amortized_run(result, key_run, observation, num_samples, importance)
    else:
        raise TypeError(
            "`result` must be an MCMC or a ScoreSDE after its run, or the posterior "
            f"that NPSE.fit returns. Got {type(result).__name__}."
        )
    sites = ModelSites.of(run)
    _add_energies(run, sites, key_energy, learned_density)
    groups = _drawn_groups(run, sites, key_groups, num_prior_samples)
    tree = from_numpyro(
        run,
        log_likelihood=bool(sites.observed) and not run.intractable and sites.complete,
        coords=coords,
        dims=_dims(run) | {name: list(names) for name, names in (dims or {}).items()},
        **groups,
    )
    if run.intractable:
        tree["observed_data"] = _observed_data(run)
    for node in (tree, tree["posterior"]):
        node.attrs.update(run.marks)
    return tree


class FinishedRun(NumPyroInferenceAdapter):
    """Draws and statistics of a run, with the axes chain and draw, for ArviZ.

    Args:
        model: the model given the data; None for a potential function.
        model_args: its positional arguments.
        model_kwargs: its keyword arguments.
        samples: draws by site.
        stats: statistics by name.
        marks: attributes of the tree.
        known_energy: whether ``stats`` have ``potential_energy`` without the learned
            sites.
        marginalized: whether latent sites without draws follow their prior given the
            others.
        intractable: whether the likelihood is unknown.
        data: values of observed sites by name, where the model does not hold them.
        log_density: log density of one draw, where that of the model is unknown.
    """

    model: Any
    sample_shape: Any
    _args: Any
    _kwargs: Any

    def __init__(
        self,
        model: Callable | None,
        model_args: tuple,
        model_kwargs: dict | None,
        samples: Any,
        stats: dict[str, Any],
        marks: dict[str, Any],
        *,
        known_energy: bool = False,
        marginalized: bool = False,
        intractable: bool = False,
        data: Mapping[str, Array] | None = None,
        log_density: Callable | None = None,
    ) -> None:
        shape: Any = jax.tree.leaves(samples)[0].shape[:2]
        given: Any = model
        super().__init__(None, given, model_args, model_kwargs or {}, shape)
        self.samples, self.stats, self.marks = samples, stats, marks
        self.known_energy = known_energy
        self.marginalized = marginalized
        self.intractable = intractable
        self.data = data or {}
        self.log_density = log_density
        self._max_tree_depth = None  # asked for by ArviZ

    @property
    def sample_dims(self) -> list[str]:
        """The axes of draws."""
        return ["chain", "draw"]

    def get_samples(self, seed: int | None = None, **kwargs: Any) -> Any:
        """Return draws with the axis of chains."""
        return self.samples

    def get_sample_stats(self, **kwargs: Any) -> dict[str, Any]:
        """Return statistics with the axis of chains."""
        return self.stats

    def trace(self, key: PRNGKey, values: Mapping[str, Array]) -> dict[str, Any]:
        """Return the trace of the model at values of its sites."""

        def find(site: dict[str, Any]) -> Any:
            given = values.get(site["name"])
            return init_to_sample(site) if given is None else given

        model = substitute(seed(self.model, key), substitute_fn=find)
        return trace(model).get_trace(*self._args, **self._kwargs)


@dataclass(frozen=True)
class ModelSites:
    """Names of the sites of a run's model.

    - **latent**: latent sites that have draws.
    - **missing**: latent sites that have none.
    - **observed**: observed sites, without factors.
    - **learned**: latent sites with a learned law.
    - **proper**: whether every latent site can be drawn.
    """

    latent: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    proper: bool = True

    @property
    def complete(self) -> bool:
        """Whether every latent site has draws."""
        return not self.missing

    @classmethod
    def of(cls, run: FinishedRun) -> "ModelSites":
        """Return the sites of the model of a run; none for a potential function."""
        if run.model is None:
            return cls()
        first = jax.tree.map(lambda x: x[0, 0], run.samples)
        sites = {
            name: site
            for name, site in run.trace(jax.random.key(0), first).items()
            if site["type"] == "sample"
        }
        latent = {k: site for k, site in sites.items() if not site["is_observed"]}
        return cls(
            tuple(name for name in latent if name in run.samples),
            tuple(name for name in latent if name not in run.samples),
            tuple(dict.fromkeys([*_drawn_data(sites), *run.data])),
            tuple(k for k, site in latent.items() if find_learned(site["fn"], k)),
            not any(_is_improper(site["fn"]) for site in latent.values()),
        )


def _drawn_data(sites: dict[str, Any]) -> list[str]:
    """Return the names of observed sites, without factors."""
    return [
        name
        for name, site in sites.items()
        if site["is_observed"] and not isinstance(site["fn"], dist.Unit)
    ]


def _is_improper(fn: Any) -> bool:
    while not isinstance(fn, dist.ImproperUniform):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def _mcmc_run(mcmc: MCMC) -> FinishedRun:
    """Return the draws of an MCMC with its verdict and evidence."""
    if mcmc.last_state is None or mcmc._states is None:
        raise RuntimeError(
            "`result` must have run: call `run` first, there are no draws yet."
        )
    kernel = getattr(mcmc.sampler, "kernel", mcmc.sampler)
    stats = dict(mcmc.get_extra_fields(group_by_chain=True))
    marks: dict[str, Any] = {}
    if isinstance(kernel, LangevinKernel):
        marks |= _exactness(mcmc, kernel, stats) | _verdict(mcmc)
        marks |= _kernel_evidence(mcmc.last_state, kernel)
    return FinishedRun(
        mcmc.sampler.model,
        mcmc._args,
        mcmc._kwargs,
        mcmc.get_samples(group_by_chain=True),
        stats,
        marks,
        known_energy=isinstance(kernel, LangevinKernel),
    )


def _exactness(mcmc: MCMC, kernel: LangevinKernel, stats: dict) -> dict[str, str]:
    """Return attributes that state the law of the draws."""
    rule = AcceptRule(int(np.max(stats["accept_rule"])))  # the least exact
    text = EXACTNESS[rule]
    if isinstance(kernel, AnnealedLangevin) and mcmc.last_state.weights is None:
        text = "approximate: without weights the shares of modes are wrong"
    return {"accept_rule": rule.name, "exactness": text}


def _verdict(mcmc: MCMC) -> dict[str, str]:
    """Return attributes with the verdict, or with why there is none."""
    try:
        found = verdict(mcmc)
    except ValueError as reason:
        return {"verdict": "not judged", "verdict_findings": str(reason)}
    names = ", ".join(finding.name for finding in found.findings)
    return {"verdict": names or "ok", "verdict_findings": str(found)}


def _kernel_evidence(state: Any, kernel: LangevinKernel) -> dict[str, float]:
    """Return the evidence of kernels that estimate it, where it is a number."""
    if isinstance(kernel, ParallelTempering):
        summary = summarize_tempering(state)
        value, error = summary.log_evidence, summary.log_evidence_error
    elif isinstance(kernel, AnnealedLangevin) and np.isfinite(state.log_evidence):
        value, error = state.log_evidence, state.log_evidence_error
    else:
        return {}
    return {"log_evidence": float(value), "log_evidence_error": float(error)}


def _score_sde_run(inference: ScoreSDE) -> FinishedRun:
    """Return the draws of a ScoreSDE, with its evidence and warnings as verdict."""
    samples = inference.get_samples(group_by_chain=True)
    fields = inference.get_extra_fields(group_by_chain=True)
    if inference.guidance is None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_on_degeneracy(inference._finished)
        findings = "\n".join(str(warning.message) for warning in caught)
        marks: dict[str, Any] = {
            "exactness": "exact for the learned law up to particles and reverse steps",
            "verdict": "degenerate" if findings else "ok",
            "verdict_findings": findings,
            "log_evidence": inference.log_evidence,
            "log_evidence_error": inference.log_evidence_error,
        }
    else:
        marks = {"exactness": f"approximate: {inference.guidance.approximation}"}
    stats = {name: fields[name] for name in PER_DRAW}
    return FinishedRun(
        inference.model, inference._args, inference._kwargs, samples, stats, marks
    )


def _amortized_run(
    posterior: AmortizedPosterior | OneStepPosterior,
    key: PRNGKey,
    observation: Any,
    num_samples: int,
    importance: bool,
) -> FinishedRun:
    """Return draws of an amortized posterior given an observation."""
    if observation is None:
        raise ValueError(
            "`observation` must be given for an amortized posterior: it is a function "
            "of the observation. Got None."
        )
    simulator = posterior.simulator
    if importance:
        samples, marks = _importance_draws(posterior, key, observation, num_samples)
    else:
        samples = posterior.sample(key, observation, num_samples)
        marks = {"exactness": "approximate: by the error of the net"}
    context = simulator.observed.parse(observation)
    values = simulator.observed.unflatten(context)
    log_density = None
    if simulator.intractable and isinstance(posterior, AmortizedPosterior):

        def log_density(draw: dict[str, Array]) -> Array:
            z = posterior.latents.flatten(draw)
            return posterior.score.log_prob(z, context=context)

    return FinishedRun(
        condition(simulator.model, data=values),
        simulator.args,
        simulator.kwargs,
        jax.tree.map(lambda x: x[None], samples),
        {},
        marks,
        marginalized=True,
        intractable=bool(simulator.intractable),
        data=values,
        log_density=log_density,
    )


def _importance_draws(
    posterior: Any, key: PRNGKey, observation: Any, num_samples: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return draws resampled by their importance weights, and attributes of them."""
    if isinstance(posterior, OneStepPosterior):
        raise TypeError(
            "`importance` needs the density of the posterior, which one-step draws do "
            "not have: use the AmortizedPosterior. Got OneStepPosterior."
        )
    key_draw, key_resample = jax.random.split(key)
    weighted = posterior.importance(key_draw, observation, num_samples)
    exactness = "exact up to the number of draws"
    if not weighted.khat < MAX_KHAT and weighted.ess < UNIFORM_ESS_SHARE * num_samples:
        exactness = f"approximate: Pareto k-hat is not below {MAX_KHAT}"
    marks = {
        "exactness": exactness,
        "khat": weighted.khat,
        "effective_sample_size": weighted.ess,
        "log_evidence": weighted.log_evidence,
        "log_evidence_error": weighted.log_evidence_error,
    }
    return weighted.resample(key_resample), marks


def _dims(run: FinishedRun) -> dict[str, list[str]]:
    """Return the names of the dimensions of sites, from the plates of the model."""
    if run.model is None:
        return {}
    return infer_dims(run.model, run._args, run._kwargs)


def _observed_data(run: FinishedRun) -> Any:
    """Return the dataset of observed sites, those of simulators included."""
    dims: Any = _dims(run)
    return dict_to_dataset(run.data, sample_dims=[], dims=dims)


def _drawn_groups(
    run: FinishedRun, sites: ModelSites, key: PRNGKey, num_prior_samples: int
) -> dict[str, Any]:
    """Return draws of the posterior predictive law and of the prior."""
    if run.model is None or not sites.observed:
        return {}
    model = resample_observed(run.model, sites.observed)
    key_predict, key_prior = jax.random.split(key)
    groups = {}
    if sites.complete or run.marginalized:
        latents = {name: run.samples[name] for name in sites.latent}
        predict = Predictive(
            model, latents, batch_ndims=2, return_sites=list(sites.observed)
        )
        groups["posterior_predictive"] = predict(key_predict, *run._args, **run._kwargs)
    if num_prior_samples and sites.proper:
        draw = Predictive(model, num_samples=num_prior_samples)
        prior = draw(key_prior, *run._args, **run._kwargs)
        groups["prior"] = {name: value[None] for name, value in prior.items()}
    return groups


def _add_energies(
    run: FinishedRun, sites: ModelSites, key: PRNGKey, learned_density: bool
) -> None:
    """Put the potential energy and the energy of every draw into the statistics.

    ArviZ gives minus the potential energy the name ``lp``.
    """
    stats = run.stats
    recorded, energy = stats.pop("potential_energy", None), stats.pop("energy", None)
    if sites.learned and not learned_density:
        return
    potential = _potential(run, sites, recorded)
    if potential is None:
        return
    if energy is not None and recorded is not None:
        kinetic = energy - recorded
    else:
        size = sum(x[0, 0].size for x in _latent_values(run, sites))
        kinetic = jax.random.chisquare(key, size, shape=run.sample_shape) / 2
    stats["potential_energy"] = potential
    stats["energy"] = potential + kinetic


def _latent_values(run: FinishedRun, sites: ModelSites) -> list[Array]:
    if run.model is None:
        return jax.tree.leaves(run.samples)
    return [run.samples[name] for name in sites.latent]


def _potential(
    run: FinishedRun, sites: ModelSites, recorded: Array | None
) -> Array | None:
    """Return the potential energy of every draw, or None where it is not known."""
    if recorded is not None:
        if not (run.known_energy and sites.learned):
            return recorded
        return recorded - _over_draws(partial(_learned_log_prob, run, sites), run)
    if run.log_density is not None:
        return -_over_draws(run.log_density, run)
    if run.model is None or run.intractable or not sites.complete:
        return None
    return _over_draws(partial(_model_potential, run, sites), run)


def _over_draws(function: Callable, run: FinishedRun) -> Array:
    """Return the function of every draw."""
    flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), run.samples)
    values = jax.lax.map(function, flat, batch_size=BATCH_SIZE)
    return values.reshape(run.sample_shape)


def _model_potential(
    run: FinishedRun, sites: ModelSites, draw: dict[str, Array]
) -> Array:
    """Return minus the log joint density of unconstrained latents and data."""
    values = {name: draw[name] for name in sites.latent}
    model = seed(run.model, jax.random.key(0))  # of subsamples, which change nothing
    z = unconstrain_fn(model, run._args, run._kwargs, values)
    return potential_energy(model, run._args, run._kwargs, z)


def _learned_log_prob(
    run: FinishedRun, sites: ModelSites, draw: dict[str, Array]
) -> Array:
    """Return the log density of the learned sites, with their scales and masks."""
    trace = run.trace(jax.random.key(0), draw)
    terms = []
    for name in sites.learned:
        site = trace[name]
        scale = 1.0 if site["scale"] is None else site["scale"]
        terms.append(jnp.sum(scale * site["fn"].log_prob(site["value"])))
    return sum(terms, jnp.zeros(()))
