r"""ParallelTempering: chains at all temperatures between prior and posterior.

Non-reversible parallel tempering (Okabe et al. 2001; Syed, Bouchard-Côté, Deligiannidis
and Doucet 2022) on :math:`\pi_\beta(z) \propto p(z)\, e^{\beta \ell(z)}`, with
:math:`0 = \beta_0 < \dots < \beta_K = 1`. One iteration

1. draws the state at :math:`\beta_0` anew from the prior, and proposes more draws of it
   at other temperatures, where :math:`\min(1, e^{\beta (\ell(z') - \ell(z))})` accepts,
2. moves the others by Langevin transitions on their :math:`\pi_\beta`,
3. swaps neighbors, even and odd pairs in turn, with probability
   :math:`\min(1, e^{(\beta' - \beta)(\ell(z) - \ell(z'))})`.

The prior cancels from the swap, so that of a learned site need only have a score.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.distributions import Distribution
from numpyro.util import is_prng_key

from numpyro_score.checks import (
    check_callable,
    check_count,
    check_keys,
    check_kind,
    check_optional_callable,
)
from numpyro_score.kernel.base import (
    AcceptRule,
    LangevinKernel,
    checksum_of_arguments,
    with_checksum,
)
from numpyro_score.kernel.replica_exchange import (
    Exploration,
    explore,
    propose_draws,
    swap,
    swap_probability,
)
from numpyro_score.kernel.run_moments import (
    first_moments,
)
from numpyro_score.kernel.run_report import count_in_run, follow, report_at_end
from numpyro_score.kernel.score_langevin import ScoreLangevin
from numpyro_score.kernel.stepping_stone import (
    SteppingStones,
    is_full,
)
from numpyro_score.kernel.tempered_potential import (
    TemperedModel,
    TemperedPoint,
    TemperedPotential,
    temper_model,
)
from numpyro_score.kernel.tempering_adaptation import (
    RoundOptions,
    RoundStatistics,
    TemperingAdaptState,
    adapt_step_sizes,
    next_round,
)
from numpyro_score.kernel.tempering_checks import (
    check_prior_draws,
    warn_of_few_crossings,
    warn_of_no_likelihood,
)
from numpyro_score.kernel.tempering_schedule import (
    barrier_steps,
    expected_restart_rate,
    first_inverse_temperatures,
    round_ends,
)
from numpyro_score.kernel.tempering_state import (
    ParallelTemperingState,
    Replicas,
    TemperingPlan,
    chain_axes,
    expand_chain,
    show_posterior,
    show_posteriors,
    squeeze_chain,
)
from numpyro_score.kernel.transition import Dynamics, fuse_on_cpu
from numpyro_score.model.initialization import (
    check_finite_potential,
    check_init_params,
    initialize_latents,
)
from numpyro_score.model.learned_sites import exclude_learned
from numpyro_score.model.potential import Potential
from numpyro_score.model.trace_checks import sites_without_density
from numpyro_score.run_verdict import RunSpan, enclosing_run
from numpyro_score.typing import PRNGKey

MAX_RUNGS = 65  # barriers of up to 64 / RUNGS_PER_BARRIER = 26; more: memory and time
# rungs that explore together where their number is adapted; measured:
# `python -m tests.benchmarks.constants --only block`
BLOCK = 4
# Of a local transition, unless `local` says otherwise. Eight give larger errors for
# equal gradients (`python -m tests.benchmarks.tempering --num-steps 8`).
NUM_STEPS = 4
LOCAL_OPTIONS = (
    "num_steps",
    "friction",
    "step_size",
    "adapt_step_size",
    "target_accept_prob",
    "num_nodes",
)
# draws of the prior: their absolute deviation is within 1.17 / 100^1/2 = 12 %
NUM_PILOT = 100


@dataclass(frozen=True, eq=False)
class ParallelTempering(LangevinKernel):
    r"""Non-reversible parallel tempering from the prior to the posterior.

    For posteriors with several modes, or far narrower than the prior. Chains at
    ``num_rungs`` inverse temperatures between prior and posterior run together and
    swap; the lowest draws independently from the prior at every iteration, so that
    chains cross between modes and forget where they started. The draws are those of the
    posterior, and come with an estimate of the evidence.

    *Exact or approximate.* Exact for any number of rungs, for ordinary sites; for
    learned ones as :class:`ScoreLangevin` with its line integral, and up to the
    difference between the law that the score's solver draws from and that of the score.
    Modes that neither draws of the prior nor local moves find stay unseen: no sampler
    can tell.

    Warm-up runs in rounds, each twice as long as the one before. After each the inverse
    temperatures move to equal steps of the communication barrier, the number of rungs
    to 2.5 of them per unit of barrier, and every rung gets a step size, a number of
    transitions and, from its gradients, a metric: dense for up to 100 latent numbers,
    diagonal for more. All of it is fixed afterwards. One transition in four takes a
    step of a third, for modes that are narrower than the metric says. Draws of the
    prior are proposed at rungs by chance (``num_prior_draws``), for modes that lie in
    modes of the prior, between which no temperature lets local moves cross.

    ``mcmc.last_state`` holds, by chain, ``log_evidence``, ``log_evidence_error``,
    ``log_evidence_gap`` (between the estimates from below and from above), ``barrier``
    and ``restarts``; :func:`print_tempering_summary` prints them. ``swap_accept_prob``
    and ``log_likelihood`` can be collected as extra fields.

    When not to use it: for posteriors of one mode :class:`ScoreLangevin` or NUTS need
    some ten times fewer gradients. As a block of NumPyro's ``Gibbs`` the chains at
    higher temperatures lag behind the other blocks, so the result is approximate.

    Args:
        model: a NumPyro model with proper priors, or with ``reference``.
        num_rungs: number of inverse temperatures, both ends included; None adapts it,
            up to 65.
        local: a :class:`ScoreLangevin`, or a function that makes one of a model, for
            example ``partial(ScoreLangevin, num_steps=4)``: its ``num_steps``,
            ``friction``, ``step_size``, ``adapt_step_size``, ``target_accept_prob`` and
            ``num_nodes`` are those of the local transitions.
        max_transitions: local transitions per iteration and rung, at most; rungs whose
            log likelihood changes slowly get more of them.
        num_prior_draws: draws of the prior per iteration: the state at the lowest
            temperature, and those that are proposed at other rungs.
        reference: laws of latent sites from which chains at the lowest temperature are
            drawn in the place of their priors, for priors that are improper or far too
            wide: ``{"loc": dist.Normal(0, 10)}``. The posterior stays that of the
            model, other sites keep their priors, and the log evidence is that of the
            model. It must be wide enough for all modes: a law fitted to draws of a
            pilot run covers only the modes that these reached.
        init_strategy: where the chain at the posterior starts, as in NumPyro; None for
            a draw of the prior, weighted by the likelihood.

    Raises:
        ValueError: for options out of range or a prior that cannot be drawn from.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro.infer import MCMC
        >>> def model(y):
        ...     x = sample("x", dist.Normal(0, 3))
        ...     sample("y", dist.Normal(abs(x), 0.2), obs=y)
        >>> mcmc = MCMC(
        ...     ParallelTempering(model), num_warmup=300, num_samples=1000,
        ...     progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(0), 2.0)
        >>> bool(abs((mcmc.get_samples()["x"] > 0).mean() - 0.5) < 0.1)
        True
        >>> exact = jnp.log(2) + dist.Normal(0, (9 + 0.2**2) ** 0.5).log_prob(2.0)
        >>> bool(abs(mcmc.last_state.log_evidence - exact) < 0.2)
        True
    """

    model: Callable
    _: KW_ONLY
    num_rungs: int | None = None
    local: ScoreLangevin | Callable[[Callable], ScoreLangevin] | None = None
    max_transitions: int = 10
    num_prior_draws: int = 5
    reference: dict[str, Distribution] | None = None
    init_strategy: Callable | None = None

    def __post_init__(self) -> None:
        check_callable("model", self.model, "the target")
        check_optional_callable("init_strategy", self.init_strategy, "a strategy")
        if self.reference is not None:
            kind = "a dict of distributions by the names of sites"
            check_kind("reference", self.reference, Mapping, kind)
        if self.num_rungs is not None:
            why = "the number of temperatures, with those of prior and posterior"
            check_count("num_rungs", self.num_rungs, why, least=2)
        why = "a number of local transitions"
        check_count("max_transitions", self.max_transitions, why)
        check_count("num_prior_draws", self.num_prior_draws, "per iteration")
        _check_local(self.local_kernel)

    @property
    def local_kernel(self) -> ScoreLangevin:
        """The kernel whose options the local transitions have."""
        if self.local is None:
            return ScoreLangevin(self.model)
        if isinstance(self.local, ScoreLangevin):
            return self.local
        check_callable("local", self.local, "ScoreLangevin, or makes one of a model")
        return self.local(self.model)

    @property
    def size(self) -> int:
        """The largest number of rungs."""
        return self.num_rungs or MAX_RUNGS

    @property
    def block(self) -> int:
        """Number of rungs that explore together."""
        return BLOCK if self.num_rungs is None else self.num_rungs - 1

    @property
    def num_steps(self) -> int:
        """Steps of one local transition."""
        return self.local_kernel.num_steps or NUM_STEPS

    def get_diagnostics_str(self, state: ParallelTemperingState) -> str:
        """Return what the progress bar shows."""
        return (
            f"{int(state.adapt_state.num_rungs)} rungs, barrier "
            f"{float(state.barrier):.1f}, {int(state.restarts)} restarts. "
            f"acc. prob={float(state.accept_prob):.2f}"
        )

    def init(
        self,
        rng_key: PRNGKey,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple = (),
        model_kwargs: dict | None = None,
    ) -> ParallelTemperingState:
        """Return the state before the first iteration; a batch of keys gives a batch.

        Raises:
            ValueError: for a warm-up that is too short, a prior that cannot be drawn
                from, draws of the prior without likelihood, or initial values that are
                missing, of another shape or not finite.
        """
        check_keys("rng_key", rng_key)
        check_count("num_warmup", num_warmup, "a number of iterations", least=0)
        round_ends(num_warmup)  # raises for too short a warm-up
        single = is_prng_key(rng_key)
        model = self._temper(model_args, model_kwargs)
        if not model.has_likelihood:
            warn_of_no_likelihood()
        keys = jnp.expand_dims(rng_key, 0) if single else rng_key
        keys = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(keys)
        pilots = jax.vmap(partial(_draw_pilots, model))(keys[1])
        find_sites = partial(
            sites_without_density,
            exclude_learned(model.model),
            model.args,
            model.kwargs,
        )
        check_prior_draws(*pilots, model.potential.learned, find_sites)
        start = self._start(keys[2], model, init_params, single)
        rule = AcceptRule.of(model.potential, True)
        posterior = self._checked(model)
        first = partial(self._first_state, model.potential, num_warmup, rule, posterior)
        state = jax.vmap(first, out_axes=chain_axes())(keys[0], keys[3], pilots, start)
        check_finite_potential(model.potential.combine(state.replicas.point))
        state = state._replace(data=checksum_of_arguments(model_args, model_kwargs))
        return squeeze_chain(state) if single else state

    def sample(
        self,
        state: ParallelTemperingState,
        model_args: tuple,
        model_kwargs: dict | None,
    ) -> ParallelTemperingState:
        """Return the state after one iteration (of every chain in a batch).

        A state of other data is refreshed first.
        """
        model = self._temper(model_args, model_kwargs)
        single = is_prng_key(state.rng_key)
        state = self.refresh_for_data(state, model_args, model_kwargs)
        state = expand_chain(state) if single else state
        run = enclosing_run()
        potential = self._checked(model)

        def iterate(state: ParallelTemperingState) -> ParallelTemperingState:
            after = count_in_run(self._iterate(state, model), run)
            moments = follow(state.point, after.run_view, run, potential)
            return after._replace(moments=moments)

        state = jax.lax.platform_dependent(
            state, cpu=partial(fuse_on_cpu, iterate), default=iterate
        )
        warn_of_few_crossings(state, run is not None)
        report_at_end(state.run_view, run, lambda: potential)
        return squeeze_chain(state) if single else state

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable:
        """Return the map from z to the sites' values, deterministic sites included."""
        return self.local_kernel_of_model.postprocess_fn(model_args, model_kwargs)

    def potential(self, model_args: tuple, model_kwargs: dict | None) -> Potential:
        """Return the potential of the posterior for arguments of the model."""
        return self.local_kernel_of_model.potential(model_args, model_kwargs)

    @property
    def local_kernel_of_model(self) -> ScoreLangevin:
        """A kernel of this model on its posterior."""
        return ScoreLangevin(self.model, num_nodes=self.local_kernel.num_nodes)

    def accept_rule(self, *args: Any, **kwargs: Any) -> AcceptRule:
        """Return the rule by which local proposals are accepted.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        return self.local_kernel_of_model.accept_rule(*args, **kwargs)

    def refresh(
        self,
        state: ParallelTemperingState,
        model_args: tuple,
        model_kwargs: dict | None,
    ) -> ParallelTemperingState:
        """Return the state with its cached values at z for other arguments.

        The evidence belongs to the arguments that it was estimated with, and starts
        anew; temperatures, step sizes and metrics stay.
        """
        model = self._temper(model_args, model_kwargs)
        point = jax.vmap(model.potential.point, axis_size=self.size)
        zero = SteppingStones.zero(self.size - 1)
        single = is_prng_key(state.rng_key)
        if not single:
            size = len(state.rng_key)
            point = jax.vmap(point, axis_size=size)
            zero = jax.tree.map(lambda x: jnp.repeat(x[None], size, 0), zero)
        replicas = state.replicas._replace(point=point(state.replicas.z))
        state = state._replace(replicas=replicas, stepping_stones=zero)
        state = with_checksum(state, model_args, model_kwargs)
        if single:
            return squeeze_chain(show_posteriors(expand_chain(state)))
        return show_posteriors(state)

    def wrap_model(self, wrapper: Callable) -> "ParallelTempering":
        """Return this kernel for ``wrapper(model)``."""
        return replace(self, model=wrapper(self.model))

    def _checked(self, model: TemperedModel) -> Potential:
        """Return a potential with the learned sites and transforms, to check draws."""
        learned = bool(model.potential.learned)
        return self.potential(model.args, model.kwargs) if learned else model.potential

    def _temper(self, model_args: tuple, model_kwargs: dict | None) -> TemperedModel:
        return temper_model(
            self.model,
            model_args,
            model_kwargs or {},
            num_nodes=self.local_kernel.num_nodes,
            reference=self.reference,
        )

    def _start(
        self, keys: PRNGKey, model: TemperedModel, init_params: Any, single: bool
    ) -> Any:
        """Return given initial values by chain, or None for draws of the prior."""
        prototype = model.potential.prototype
        if init_params is not None:
            batch = () if single else (len(keys),)
            start = check_init_params(init_params, prototype, batch)
            return (
                jax.tree.map(lambda x: jnp.asarray(x)[None], start) if single else start
            )
        if self.init_strategy is None:
            return None
        potential = self.potential(model.args, model.kwargs)
        return initialize_latents(
            keys, self.model, potential, self.init_strategy, model.args, model.kwargs
        )

    def _first_state(
        self,
        potential: TemperedPotential,
        num_warmup: int,
        rule: int,
        posterior: Potential,
        rng_key: PRNGKey,
        key: PRNGKey,
        pilots: tuple[Any, TemperedPoint],
        start: Any,
    ) -> ParallelTemperingState:
        """Return one chain's state from draws of the prior."""
        z, point = pilots
        num_rungs = self.num_rungs or 1 + 3 * BLOCK
        betas = first_inverse_temperatures(point.log_likelihood, num_rungs, self.size)
        adapt_state = TemperingAdaptState.first(
            betas, num_rungs, point, self.local_kernel.step_size
        )
        chosen = _choose(key, betas, point.log_likelihood)
        z, point = jax.tree.map(lambda x: x[chosen], (z, point))
        if start is not None:
            last = num_rungs - 1
            both = z, point
            at_start = start, potential.point(start)
            z, point = jax.tree.map(lambda x, y: x.at[last].set(y), both, at_start)
        from_prior = jnp.arange(self.size) == 0
        none = jnp.zeros(())
        state = ParallelTemperingState(
            i=jnp.zeros((), int),
            z=None,
            potential_energy=none,
            log_likelihood=none,
            num_steps=jnp.zeros((), int),
            accept_prob=none,
            diverging=jnp.zeros((), bool),
            swap_accept_prob=none,
            accept_rule=jnp.asarray(int(rule)),
            replicas=Replicas(z, point, from_prior),
            adapt_state=adapt_state,
            round_statistics=RoundStatistics.zero(adapt_state.mass_matrix_sqrt_inv),
            stepping_stones=SteppingStones.zero(self.size - 1),
            warmup_barrier=none,
            warmup_restart_rate=none,
            moments=first_moments(jax.tree.map(lambda x: x[0], z), posterior),
            plan=TemperingPlan(num_warmup),
            rng_key=rng_key,
            span=RunSpan.first(),
        )
        return show_posterior(state)

    def _iterate(
        self, state: ParallelTemperingState, model: TemperedModel
    ) -> ParallelTemperingState:
        """Return a batch of chains after one iteration: draw, explore, swap, adapt."""
        keys = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(state.rng_key)
        adapt_state, potential = state.adapt_state, model.potential
        # fresh draws of the prior, one of them at beta 0
        betas, last = adapt_state.inverse_temperatures, adapt_state.num_rungs - 1
        renew = jax.vmap(partial(_renew, model, self.num_prior_draws))
        replicas = renew(keys[1], state.replicas, betas, last)
        # local transitions elsewhere
        explored = explore(
            keys[2], replicas, adapt_state, potential, self._dynamics, self.block
        )
        replicas_next = replicas._replace(z=explored.z, point=explored.point)
        # swaps of even or odd pairs
        log_likelihood = explored.point.log_likelihood
        swap_at = jax.vmap(swap_probability)
        accept_prob = swap_at(betas, explored.point, adapt_state.active)
        swapped, restarts = jax.vmap(swap, (0, 0, 0, None, 0))(
            keys[3], replicas_next, accept_prob, state.i % 2, last
        )
        state = state._replace(replicas=swapped, rng_key=keys[0])
        state = self._report(state, explored, accept_prob)
        before = replicas.point.log_likelihood
        state = self._adapt(state, explored, before, 1 - accept_prob)
        return self._count(state, betas, log_likelihood, restarts)

    @property
    def _dynamics(self) -> Dynamics:
        """The member of the family; a lone step begins with a fresh momentum."""
        friction = None if self.num_steps == 1 else self.local_kernel.friction
        return Dynamics(self.num_steps, friction, True)

    @property
    def target_accept_prob(self) -> float:
        """The acceptance of local transitions that warm-up aims for."""
        default = self._dynamics.target_accept_prob
        return self.local_kernel.target_accept_prob or default

    def _report(
        self,
        state: ParallelTemperingState,
        explored: Exploration,
        accept_prob: Float[Array, "chains pairs"],
    ) -> ParallelTemperingState:
        """Return the state with what is shown of the last iteration."""
        adapt_state = state.adapt_state
        active = adapt_state.active
        # in use are rungs 1 to the last; each draw of the prior is one more evaluation
        transitions = jnp.where(active, adapt_state.num_transitions[:, 1:], 0).sum(-1)
        last = (adapt_state.num_rungs - 1)[:, None]
        at_last = partial(jnp.take_along_axis, indices=last, axis=1)
        return show_posteriors(state)._replace(
            num_steps=self.num_prior_draws + self.num_steps * transitions,
            accept_prob=at_last(explored.accept_prob)[:, 0],
            diverging=at_last(explored.diverging)[:, 0],
            swap_accept_prob=accept_prob.sum(-1) / active.sum(-1),
        )

    def _adapt(
        self,
        state: ParallelTemperingState,
        explored: Exploration,
        before: Float[Array, "chains rungs"],
        rejection: Float[Array, "chains pairs"],
    ) -> ParallelTemperingState:
        """Return the state with the round's statistics, and at its end adapted."""
        local: Any = self.local_kernel

        def update() -> tuple[RoundStatistics, TemperingAdaptState]:
            statistics = jax.vmap(RoundStatistics.add)(
                state.round_statistics,
                state.adapt_state,
                explored.point,
                before,
                rejection,
            )
            adapt_state = state.adapt_state
            if local.adapt_step_size:
                adapt_state = adapt_step_sizes(
                    adapt_state,
                    explored.accept_prob,
                    statistics.num_draws,
                    self.target_accept_prob,
                )
            return statistics, adapt_state

        def count() -> tuple[RoundStatistics, TemperingAdaptState]:
            return state.round_statistics.add_rejection(rejection), state.adapt_state

        warming = state.i < state.plan.num_warmup
        statistics, adapt_state = jax.lax.cond(warming, update, count)
        state = state._replace(round_statistics=statistics, adapt_state=adapt_state)
        ends_round = (state.i + 1 == jnp.asarray(state.plan.round_ends)).any()
        return jax.lax.cond(ends_round, lambda: self._close_round(state), lambda: state)

    def _close_round(self, state: ParallelTemperingState) -> ParallelTemperingState:
        """Return a batch of chains at the start of the next round, or of sampling."""
        local, statistics = self.local_kernel, state.round_statistics
        options = RoundOptions(
            BLOCK if self.num_rungs is None else None,
            self.size,
            local.adapt_step_size,
            self.max_transitions,
        )
        adapt = jax.vmap(partial(next_round, options=options))
        rungs = jnp.arange(self.size)
        stay = jnp.broadcast_to(rungs, state.replicas.from_prior.shape)
        # after the last round all stays as it was tuned
        adapt_state, source = jax.lax.cond(
            state.i + 1 == state.plan.num_warmup,
            lambda: (state.adapt_state, stay),
            lambda: adapt(state.adapt_state, statistics),
        )
        take = jax.vmap(lambda x, source: x[source])
        replicas = jax.tree.map(lambda x: take(x, source), state.replicas)
        from_prior = jnp.broadcast_to(rungs == 0, stay.shape)
        return state._replace(
            replicas=replicas._replace(from_prior=from_prior),
            adapt_state=adapt_state,
            round_statistics=jax.tree.map(jnp.zeros_like, statistics),
            warmup_barrier=barrier_steps(statistics.rejection_rate, state.active).sum(
                -1
            ),
            warmup_restart_rate=jax.vmap(expected_restart_rate)(
                statistics.rejection_rate, state.active
            ),
        )

    def _count(
        self,
        state: ParallelTemperingState,
        betas: Float[Array, "chains rungs"],
        log_likelihood: Float[Array, "chains rungs"],
        restarts: Int[Array, " chains"],
    ) -> ParallelTemperingState:
        """Return the state with the iteration counted, for the evidence if drawn."""
        # begins anew with other data
        t = jnp.max(state.stepping_stones.num_draws)

        def add() -> SteppingStones:
            stones = jax.lax.cond(
                is_full(t),
                lambda: state.stepping_stones.halve(),
                lambda: state.stepping_stones,
            )
            axes = (0, None, 0, 0, 0)
            return jax.vmap(SteppingStones.add, axes)(
                stones, t, betas, log_likelihood, restarts
            )

        drawn = state.i >= state.plan.num_warmup
        stones = jax.lax.cond(drawn, add, lambda: state.stepping_stones)
        return state._replace(i=state.i + 1, stepping_stones=stones)


def _check_local(local: Any) -> None:
    """Raise for a local kernel that is biased, or whose options would be ignored."""
    if not (isinstance(local, ScoreLangevin) and local.adjusted):
        raise ValueError(
            "`local` must be an adjusted ScoreLangevin, or make one of a model: "
            "unadjusted moves are biased at every temperature. "
            f"Got {local!r}."
        )
    ignored = [
        field.name
        for field in fields(local)
        if field.name not in ("model", "adjusted", *LOCAL_OPTIONS)
        and getattr(local, field.name) is not field.default
    ]
    if ignored:
        raise ValueError(
            f"`local` may have the options {', '.join(LOCAL_OPTIONS)}: the metric and "
            "where chains start are those of each rung, and learned sites bring their "
            f"own force. Got {', '.join(ignored)}."
        )


def _draw_pilots(model: TemperedModel, key: PRNGKey) -> tuple[Any, TemperedPoint]:
    """Return draws of the prior, with prior and likelihood there."""
    z = jax.vmap(model.draw_prior)(jax.random.split(key, NUM_PILOT))
    return z, jax.vmap(model.potential.point, axis_size=NUM_PILOT)(z)


def _choose(
    key: PRNGKey,
    betas: Float[Array, " rungs"],
    log_likelihood: Float[Array, " draws"],
) -> Int[Array, " rungs"]:
    """Return a draw of the prior for every rung, by its tempered likelihood."""
    usable = jnp.isfinite(log_likelihood)
    log_weight = betas[:, None] * jnp.where(usable, log_likelihood, 0.0)
    log_weight = jnp.where(usable, log_weight, -jnp.inf)
    return jax.random.categorical(key, log_weight, axis=-1)


def _renew(
    model: TemperedModel,
    num_draws: int,
    key: PRNGKey,
    replicas: Replicas,
    betas: Float[Array, " rungs"],
    last: Int[Array, ""],
) -> Replicas:
    """Return one chain's states with a draw of the prior at rung 0, others proposed."""
    keys = jax.random.split(key, num_draws + 1)
    z = jax.vmap(model.draw_prior)(keys[1:])
    point = jax.vmap(model.potential.point, axis_size=num_draws)(z)
    first, others = (
        jax.tree.map(lambda x, i=i: x[i], (z, point)) for i in (0, slice(1, None))
    )
    set_first = partial(jax.tree.map, lambda x, new: x.at[0].set(new))
    replicas = replicas._replace(
        z=set_first(replicas.z, first[0]), point=set_first(replicas.point, first[1])
    )
    return propose_draws(keys[0], replicas, others, betas, last)
