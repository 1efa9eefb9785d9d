r"""ParticleMetropolis: a Metropolis chain whose proposals are whole SMC runs.

Particle-independent Metropolis-Hastings (Andrieu, Doucet and Holenstein 2010, section
2.4.1): propose a run of twisted SMC, draw one of its particles by weight, and accept it
with :math:`\min(1, \hat Z' / \hat Z)`. The estimates are unbiased, so the chain is
exact for any number of particles.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_score.checks import (
    check_callable,
    check_count,
    check_keys,
    check_levels_or_number,
    item_or_known_fields,
)
from numpyro_score.fingerprint import checksum
from numpyro_score.infer.twisted.independent_chains import (
    EqualDraws,
    IndependentChains,
    collect_chains,
)
from numpyro_score.infer.twisted.pilot_runs import (
    PilotRuns,
    log_estimate,
    pilot_runs,
)
from numpyro_score.infer.twisted.run import check_covariance, check_num_particles
from numpyro_score.infer.twisted.sampler import LevelSettings, twisted_smc
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.data_range import OffDataCounts
from numpyro_score.model.initialization import check_init_params
from numpyro_score.model.level_covariance import LevelCovariance
from numpyro_score.model.potential import ModelPotential, model_potential
from numpyro_score.model.reparam import separate_transforms
from numpyro_score.model.trace_checks import check_observations
from numpyro_score.reprs import short_repr
from numpyro_score.run_verdict import (
    RunSpan,
    call_when_due,
    enclosing_run,
    is_last,
)
from numpyro_score.smc.evidence import RatioOfMeans, combine_evidence
from numpyro_score.typing import PRNGKey, SiteValues


class FixedRun(NamedTuple):
    """Settings that all proposed runs share.

    - **ts**: decreasing times of the levels.
    - **covariances**: of x_0 given x_t by learned site; None for those of each point.
    - **settings**: of the twist and the moves at each level.
    - **num_warmup**: iterations before the draws.
    - **data**: checksum of the arguments of the model.
    """

    ts: Float[Array, "*chains ts"]
    covariances: dict[str, LevelCovariance] | None
    settings: LevelSettings
    num_warmup: Int[Array, "*chains"] | int = 0
    data: UInt32[Array, "*chains"] | int = 0


class PooledEvidence(NamedTuple):
    """The evidence from all chains, and its standard error, in nats."""

    log_evidence: Float[Array, ""]
    log_evidence_error: Float[Array, ""]


class ParticleMetropolisState(NamedTuple):
    """A draw, the run that it is from, and the evidence of all runs.

    - **i**: number of iterations.
    - **z**: unconstrained latents.
    - **log_estimate**: log evidence of the accepted run, up to a constant.
    - **weights**: normalized weights of its particles.
    - **accept_prob**: of the last proposed run.
    - **mean_accept_prob**: over all iterations with the present data.
    - **evidence**: sums over all proposed runs with the present data.
    - **equal_draws**: rows of equal draws of the present run.
    - **off_data**: draws of learned sites off their data, in the present run; None
      where the data are unknown.
    - **span**: place of the present run among all iterations.
    - **fixed**: what all runs have in common.
    - **rng_key**: random key.
    """

    i: Int[Array, "*chains"]
    z: SiteValues
    log_estimate: Float[Array, "*chains"]
    weights: Float[Array, "*chains particles"]
    accept_prob: Float[Array, "*chains"]
    mean_accept_prob: Float[Array, "*chains"]
    evidence: RatioOfMeans
    equal_draws: EqualDraws
    off_data: OffDataCounts | None
    span: RunSpan
    fixed: FixedRun
    rng_key: PRNGKey

    def __getitem__(self, index: Any) -> Any:
        return item_or_known_fields(self, index)

    @property
    def log_evidence(self) -> Float[Array, "*chains"]:
        """The log of the mean evidence of all proposed runs, in nats."""
        return self.evidence.value

    @property
    def log_evidence_error(self) -> Float[Array, "*chains"]:
        """Its standard error, from the differences between runs."""
        return self.evidence.error

    @property
    def pooled(self) -> PooledEvidence:
        """The log of the mean evidence of all chains, and its standard error."""
        values, errors = map(
            jnp.atleast_1d, (self.log_evidence, self.log_evidence_error)
        )
        return PooledEvidence(*combine_evidence(values, jnp.square(errors)))

    @property
    def number(self) -> Int[Array, "*chains"]:
        """Number of the last iteration in the present run, from 1; 0 in warm-up."""
        return self.span.number(self.i - self.fixed.num_warmup)

    @property
    def independent_chains(self) -> IndependentChains:
        """The report of the chains, for their verdict."""
        return IndependentChains(self.mean_accept_prob, self.equal_draws, self.off_data)


@dataclass(frozen=True, eq=False)
class ParticleMetropolis(MCMCKernel):
    r"""Chains of independent SMC runs, for models with learned sites.

    Each iteration runs twisted SMC from noise to data, as
    :class:`~numpyro_score.infer.ScoreSDE` does, and accepts one of its particles by the
    ratio of estimated evidences. Runs know nothing of the chain, so that it crosses
    between modes as often as runs find them.

    *Exact or approximate.* Exact for any number of particles, for the law of the
    learned prior whose reverse SDE is divided into ``levels`` steps. Particles without
    a finite score, likelihood or gradient count as impossible.

    What a run adapts to its particles would bias its evidence. Pilot runs in ``init``
    adapt it once, from a key of their own and the same for all chains; they also choose
    the number of particles, so that about half of the runs are accepted. Warm-up has
    only the start to forget. A run whose chains accept less than a tenth of the
    proposals ends with a warning (:func:`numpyro_score.diagnostics.verdict`).

    ``mcmc.last_state`` holds, by chain, ``log_evidence`` and ``log_evidence_error``, of
    all runs that were proposed after the pilot runs, and ``mean_accept_prob``.
    ``log_evidence`` can be collected as an extra field.

    When not to use it: an iteration costs ``num_particles`` times ``levels``
    evaluations of the net for one draw. ``ScoreSDE`` gives as many draws as there are
    particles for that, with an error that falls with their number.

    Args:
        model: a NumPyro model with a learned site.
        num_particles: of each run; None finds it, and needs arguments that are known
            when the chain starts.
        levels: number of noise levels, or decreasing levels in units of the data's sd.
        covariance: of x_0 given x_t, as in ``ScoreSDE``.

    Raises:
        ValueError: for options out of range, and when a chain starts for a model
            without learned sites, with discrete latent ones, with improper priors, or
            with a likelihood or score that is zero or NaN at all particles.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_score import ScoreDistribution, ScoreModel, VE
        >>> normal = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
        ... )
        >>> def model(y):
        ...     x = numpyro.sample("x", ScoreDistribution(normal))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> kernel = ParticleMetropolis(model, num_particles=16, levels=50)
        >>> mcmc = MCMC(kernel, num_warmup=10, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.array(2.0))
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.0) < 0.2)
        True
        >>> evidence = dist.Normal(0, 2**0.5).log_prob(2.0)
        >>> bool(abs(mcmc.last_state.log_evidence - evidence) < 0.1)
        True
    """

    model: Callable
    _: KW_ONLY
    num_particles: int | None = None
    levels: int | Sequence[float] = 100
    covariance: str | None = None

    def __post_init__(self) -> None:
        check_callable("model", self.model, "a NumPyro model")
        object.__setattr__(self, "model", separate_transforms(self.model))
        check_levels_or_number(self.levels)
        check_covariance(self.covariance)
        if self.num_particles is not None:
            check_num_particles(self.num_particles)

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def sample_field(self) -> str:
        """The field of the state that holds the draw."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The fields collected without asking."""
        return ("z", "accept_prob")

    @property
    def _sample_fn(self) -> Callable:
        """Return what MCMC compiles; by it MCMC resumes without a second ``init``."""
        return self.sample

    def get_diagnostics_str(self, state: ParticleMetropolisState) -> str:
        """Return what the progress bar shows."""
        return (
            f"{state.weights.shape[-1]} particles, log evidence "
            f"{float(state.log_evidence):.2f}. "
            f"acc. prob={float(state.mean_accept_prob):.2f}"
        )

    def init(
        self,
        rng_key: PRNGKey,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple = (),
        model_kwargs: dict | None = None,
    ) -> ParticleMetropolisState:
        """Return the state before the first run; a batch of keys gives a batch.

        The draw is one of the pilot runs, or ``init_params``, until a run is accepted:
        the first one with any weight.

        Raises:
            ValueError: see the class, and for arguments that are traced.
        """
        check_keys("rng_key", rng_key)
        check_count("num_warmup", num_warmup, "a number of iterations", least=0)
        args, kwargs = model_args, model_kwargs or {}
        _check_known(args, kwargs)
        single = is_prng_key(rng_key)
        with jax.ensure_compile_time_eval():  # chains may start inside of pmap
            check_observations(self.model, args, kwargs)
            pilots = pilot_runs(
                self.model,
                args,
                kwargs,
                self.levels,
                self.covariance,
                self.num_particles,
            )
            off_data = OffDataCounts.zero(model_potential(self.model, args, kwargs))
        start = None
        if init_params is not None:
            prototype = jax.tree.map(lambda leaf: leaf[0, 0], pilots.runs.z)
            batch = () if single else (len(rng_key),)
            start = check_init_params(init_params, prototype, batch)
        first = partial(
            _first_state,
            pilots=pilots,
            off_data=off_data,
            num_warmup=num_warmup,
            data=checksum((args, kwargs)),
        )
        return first(rng_key, start) if single else jax.vmap(first)(rng_key, start)

    def sample(
        self,
        state: ParticleMetropolisState,
        model_args: tuple,
        model_kwargs: dict | None,
    ) -> ParticleMetropolisState:
        """Return the state after one proposed run (of every chain in a batch)."""

        def iterate(state: ParticleMetropolisState) -> ParticleMetropolisState:
            covariances = state.fixed.covariances
            twist = Twist.of(self.model, model_args, model_kwargs or {}, covariances)
            state = _for_data(state, data)
            return _count_off_data(_iterate(state, twist), twist.potential)

        run = enclosing_run()
        data = checksum((model_args, model_kwargs or {}))
        if run is not None:
            drawn = state.i + 1 - state.fixed.num_warmup
            state = state._replace(span=state.span.at(drawn, run))
        single = is_prng_key(state.rng_key)
        state = iterate(state) if single else jax.vmap(iterate)(state)
        if run is not None:
            report = call_when_due(collect_chains(run.num_chains).receive)
            due = is_last(jnp.ravel(state.number)[0], run)
            report(due, state.independent_chains)
        return state

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable:
        """Return the map from z to the sites' values, deterministic sites included."""
        return model_potential(self.model, model_args, model_kwargs or {}).constrain


def _check_known(args: tuple, kwargs: dict) -> None:
    """Raise for traced arguments, with which pilot runs cannot be looked at."""
    leaves = jax.tree.leaves((args, kwargs))
    traced = [leaf for leaf in leaves if isinstance(leaf, jax.core.Tracer)]
    if traced:
        raise ValueError(
            "`model_args` of ParticleMetropolis must be known when a chain starts: "
            "pilot runs fix its settings. Call `mcmc.run` outside of `jax.jit` and "
            f"`jax.vmap`. Got {traced[0]}."
        )


def _first_state(
    rng_key: PRNGKey,
    start: Any,
    pilots: PilotRuns,
    off_data: OffDataCounts | None,
    num_warmup: int,
    data: UInt32[Array, ""],
) -> ParticleMetropolisState:
    """Return the state of one chain before its first run."""
    rng_key, key_draw = jax.random.split(rng_key)
    z = pilots.draw(key_draw) if start is None else start
    size, zero = pilots.num_particles, jnp.zeros(())
    return ParticleMetropolisState(
        jnp.zeros((), int),
        z,
        jnp.asarray(-jnp.inf),
        jnp.full(size, 1 / size),
        zero,
        zero,
        RatioOfMeans.zero(),
        EqualDraws.zero(),
        off_data,
        RunSpan.zero(),
        FixedRun(
            pilots.ts,
            pilots.covariances,
            pilots.settings,
            jnp.asarray(num_warmup),
            data,
        ),
        rng_key,
    )


def _for_data(
    state: ParticleMetropolisState, data: UInt32[Array, ""]
) -> ParticleMetropolisState:
    """Return the state of one chain, without what is known of other data.

    The next run with any weight is accepted, whatever the evidence of those data.
    """
    same = state.fixed.data == data
    none = {
        "log_estimate": jnp.asarray(-jnp.inf),
        "mean_accept_prob": jnp.zeros(()),
        "evidence": RatioOfMeans.zero(),
    }
    kept = {name: getattr(state, name) for name in none}
    known = jax.tree.map(partial(jnp.where, same), kept, none)
    return state._replace(**known, fixed=state.fixed._replace(data=data))


def _iterate(state: ParticleMetropolisState, twist: Twist) -> ParticleMetropolisState:
    """Return the state of one chain after a proposed run."""
    rng_key, key_run, key_draw, key_accept = jax.random.split(state.rng_key, 4)
    fixed, size = state.fixed, state.weights.shape[-1]
    run = twisted_smc(key_run, twist, fixed.ts, size, settings=fixed.settings)
    proposed = log_estimate(run)
    log_ratio = jnp.minimum(proposed - state.log_estimate, 0.0)
    # where neither run has any weight the ratio is NaN
    accept_prob = jnp.nan_to_num(jnp.exp(log_ratio))
    accept = jax.random.uniform(key_accept) < accept_prob
    index = jax.random.categorical(key_draw, run.weights.log_weight)
    z = jax.tree.map(lambda leaf: leaf[index], run.z)
    new = z, proposed, jnp.exp(run.weights.log_weight)
    old = state.z, state.log_estimate, state.weights
    z, estimate, weights = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
    evidence = state.evidence.add(proposed, run.initial_log_weight)
    mean = state.mean_accept_prob
    after = state._replace(
        i=state.i + 1,
        z=z,
        log_estimate=estimate,
        weights=weights,
        accept_prob=accept_prob,
        mean_accept_prob=mean + (accept_prob - mean) / evidence.num_pairs,
        evidence=evidence,
        rng_key=rng_key,
    )
    return after._replace(equal_draws=_count_draw(after, accept))


def _count_draw(state: ParticleMetropolisState, accept: Array) -> EqualDraws:
    """Return the rows of equal draws of the run, with the last one."""
    starts, zero = state.number <= 1, EqualDraws.zero()
    return jax.tree.map(partial(jnp.where, starts), zero, state.equal_draws).add(accept)


def _count_off_data(
    state: ParticleMetropolisState, potential: ModelPotential
) -> ParticleMetropolisState:
    """Return the state of one chain with its draw counted, if it is off the data."""
    if state.off_data is None:
        return state
    off_data = state.off_data.restart(state.number <= 1).add(potential, state.z)
    return state._replace(off_data=off_data)
