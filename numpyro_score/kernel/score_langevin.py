r"""ScoreLangevin: Langevin transitions on a known potential and learned scores.

One transition is ``num_steps`` steps of the splittings in
:mod:`numpyro_score.langevin`. Adjusted steps are OBABO (refresh, kick, drift, kick),
accepted with probability :math:`\min(1, e^{-\Delta})` for the energy error
:math:`\Delta` of their leapfrogs; unadjusted steps are BAOAB and always accepted.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro.util import is_prng_key

from numpyro_score.checks import (
    check_count,
    check_flags,
    check_keys,
    check_metric,
    check_optional_callable,
    check_positive,
    check_probability,
    check_score_fn,
    check_target,
)
from numpyro_score.kernel.adaptation import AdaptationSettings
from numpyro_score.kernel.base import (
    AcceptRule,
    LangevinKernel,
    checksum_of_arguments,
    with_checksum,
)
from numpyro_score.kernel.monitoring import warn_on_failure
from numpyro_score.kernel.run_report import count_in_run, follow, report_at_end
from numpyro_score.kernel.state import (
    ScoreLangevinState,
    adapt,
    begin_adaptation,
    chain_axes,
    first_state,
)
from numpyro_score.kernel.step_halving import HalvingRecord
from numpyro_score.kernel.transition import Dynamics, fuse_on_cpu, transition
from numpyro_score.model.initialization import (
    check_finite_potential,
    check_init_params,
    initialize_latents,
)
from numpyro_score.model.potential import (
    FunctionPotential,
    Potential,
    model_potential,
)
from numpyro_score.model.quadrature import lobatto
from numpyro_score.run_verdict import enclosing_run
from numpyro_score.typing import PRNGKey

# of transitions whose length is not adapted: as FIRST_STEPS of adaptation
UNADJUSTED_STEPS = 8
METRICS = ("fisher", "welford")
MAX_STEP_HALVINGS = 10  # 1024 parts; Bou-Rabee et al. 2025 need 5 for a funnel's neck


@dataclass(frozen=True, eq=False)
class ScoreLangevin(LangevinKernel):
    r"""Langevin Monte Carlo for NumPyro models, with or without learned sites.

    ==============  ==============  ============  =====================================
    ``num_steps``   ``friction``    ``adjusted``  what it is
    ==============  ==============  ============  =====================================
    several         finite          True          MALT (Riou-Durand and Vogrinc 2022),
                                                  the default
    1               None            True          MALA (Besag 1994)
    1               finite          True          generalised HMC (Horowitz 1991)
    any             None            False         Leimkuhler-Matthews (overdamped)
    any             finite          False         kinetic Langevin, BAOAB
    ==============  ==============  ============  =====================================

    *Exact or approximate.* Adjusted chains on a model without learned sites, or with
    ``score_fn`` as force, are exact. At learned sites the accept step uses a
    Gauss-Lobatto line integral of the score, so the chain is exact for the learned law
    up to that quadrature; :meth:`accept_rule`, and ``accept_rule`` among the extra
    fields, say which rule decides. Unadjusted chains carry a bias of the step size,
    held small through ``energy_variance``. Langevin moves are local: they do not carry
    a chain across regions of negligible probability.

    Args:
        model: a NumPyro model.
        potential_fn: minus the log density of a pytree z, instead of a model; needs
            ``init_params``.
        score_fn: force on z in place of the gradient of the potential, for example a
            cheap learned one; the accept step still uses the potential, so an adjusted
            chain stays exact.
        step_size: (initial) step h in the units of the metric.
        num_steps: steps per transition. None lets warm-up choose 3 to 64: a quarter
            period along the direction that the metric leaves longest (Riou-Durand et
            al. 2023). Unadjusted chains take 8.
        friction: rate of refreshment per unit of time, where the number of steps is
            adapted per that direction's sd; None refreshes fully each step.
        adjusted: whether to accept or reject.
        inverse_mass_matrix: initial metric: a vector or matrix over the raveled z, or
            one per tuple of site names, as in NumPyro's HMC. None starts a Fisher
            metric at the variances ``1/|gradient|``.
        adapt_step_size: whether warm-up adapts the step size.
        adapt_mass_matrix: whether warm-up adapts the metric.
        dense_mass: whether the metric is dense, or a list of tuples of site names that
            form dense blocks, as in NumPyro's HMC. None keeps correlations where they
            pay: a dense matrix up to 50 dimensions, above it a diagonal and at most
            40 directions.
        metric: "fisher" learns it from draws and their gradients (Seyboldt, Carlson
            and Carpenter 2026), "welford" from the covariance of draws alone, as
            NumPyro's HMC does. Unadjusted chains use the latter.
        target_accept_prob: what dual averaging aims for in adjusted chains; None for
            0.574 with one step (Roberts and Rosenthal 1998) and 0.8 with several.
        energy_variance: for unadjusted chains the variance of the energy error per
            dimension that the step size is adapted to (Robnik et al. 2024).
        share_adaptation: whether vectorized chains adapt one step size, metric and
            length from the draws of all, which needs a far shorter warm-up. None
            shares among adjusted chains.
        init_strategy: as in NumPyro; None starts learned sites at a draw of their law
            and others by ``init_to_uniform``, or at draws of the prior where there is
            no density, or one that rounding hides.
        num_nodes: nodes of the line integral at learned sites, 2 to 5; the outer two
            cost nothing.
        max_step_halvings: how often a step of an adjusted chain may be halved where
            the energy varies by more than half a nat along it (WALNUTS, Bou-Rabee et
            al. 2025): 3 to 5 where no step size fits the whole posterior, at the cost
            of attempts and a check of the way back. Then ``num_steps`` of the state
            counts gradients, and the extra fields ``halving.max_halvings`` and
            ``halving.irreversible`` tell what became of it. 0 for equal steps.

    Raises:
        ValueError: for options out of range, or unless exactly one of ``model`` and
            ``potential_fn`` is given.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro.infer import MCMC
        >>> def model():
        ...     sample("x", dist.Normal(0, 1))
        >>> mcmc = MCMC(
        ...     ScoreLangevin(model), num_warmup=200, num_samples=500, num_chains=4,
        ...     chain_method="vectorized", progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(0))
        >>> bool(abs(mcmc.get_samples()["x"].mean()) < 0.2)
        True
    """

    model: Callable | None = None
    _: KW_ONLY
    potential_fn: Callable | None = None
    score_fn: Callable | None = None
    step_size: float = 1.0
    num_steps: int | None = None
    friction: float | None = 0.5
    adjusted: bool = True
    inverse_mass_matrix: Array | dict | None = None
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    dense_mass: bool | list[tuple[str, ...]] | None = None
    metric: str = "fisher"
    target_accept_prob: float | None = None
    energy_variance: float = 5e-4
    share_adaptation: bool | None = None
    init_strategy: Callable | None = None
    num_nodes: int = 3
    max_step_halvings: int = 0

    def __post_init__(self) -> None:
        check_target(self.model, self.potential_fn)
        check_flags(
            adjusted=self.adjusted,
            adapt_step_size=self.adapt_step_size,
            adapt_mass_matrix=self.adapt_mass_matrix,
        )
        if self.share_adaptation is not None:
            check_flags(share_adaptation=self.share_adaptation)
        check_optional_callable("score_fn", self.score_fn, "the force at z")
        check_optional_callable("init_strategy", self.init_strategy, "a strategy")
        dense: Any = self.dense_mass  # may be of any type
        if not isinstance(dense, list | tuple | None):
            check_flags(dense_mass=dense)
        check_positive("step_size", self.step_size, "the step of the Langevin SDE")
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps, "the steps of one transition")
        check_positive("energy_variance", self.energy_variance, "a variance")
        if self.friction is not None:
            check_positive("friction", self.friction, "the rate of refreshment")
        if self.target_accept_prob is not None:
            check_probability(
                "target_accept_prob", self.target_accept_prob, "a probability"
            )
        check_metric("inverse_mass_matrix", self.inverse_mass_matrix)
        metric: Any = self.metric  # may be of any type
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(
                "`metric` must be 'fisher' or 'welford': it is learned from draws and "
                f"gradients, or from draws. Got {self.metric!r}."
            )
        lobatto(self.num_nodes)
        self._check_halvings()

    def _check_halvings(self) -> None:
        limit, reason = self.max_step_halvings, "how often a step may be halved"
        check_count("max_step_halvings", limit, reason, least=0)
        if limit > MAX_STEP_HALVINGS:
            raise ValueError(
                f"`max_step_halvings` must be at most {MAX_STEP_HALVINGS}: j halvings "
                f"cost 2^j gradients a step. Got {limit}."
            )
        if limit and not self.adjusted:
            raise ValueError(
                "`max_step_halvings` needs `adjusted=True`: a step that depends on "
                "where it starts keeps the target only by the accept step. "
                f"Got max_step_halvings={limit}."
            )

    def get_diagnostics_str(self, state: ScoreLangevinState) -> str:
        """Return what the progress bar shows."""
        adapted = state.adapt_state
        return (
            f"{adapted.num_steps} steps of size {adapted.step_size:.2e}. "
            f"acc. prob={state.mean_accept_prob:.2f}"
        )

    def init(
        self,
        rng_key: PRNGKey,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple = (),
        model_kwargs: dict | None = None,
    ) -> ScoreLangevinState:
        """Return the state before the first transition; a batch of keys gives a batch.

        Raises:
            ValueError: for initial values that are missing, of another shape or not
                finite, or where the potential or its gradient is not finite.
            TypeError: for a ``score_fn`` of another dtype.
        """
        check_keys("rng_key", rng_key)
        check_count("num_warmup", num_warmup, "a number of transitions", least=0)
        model_kwargs = {} if model_kwargs is None else model_kwargs
        single = is_prng_key(rng_key)
        split = partial(jax.random.split, num=3)
        keys = split(rng_key) if single else jax.vmap(split, out_axes=1)(rng_key)
        rng_key, key_start, key_momentum = keys
        potential = self.potential(model_args, model_kwargs)
        if init_params is None:
            strategy, arguments = self.init_strategy, (model_args, model_kwargs)
            z = initialize_latents(
                key_start, self.model, potential, strategy, *arguments
            )
        else:
            batch = () if single else (len(rng_key),)
            z = check_init_params(init_params, potential.prototype, batch)

        def one(key: PRNGKey, key_momentum: PRNGKey, z: Any) -> ScoreLangevinState:
            check_score_fn(self.score_fn, z)
            plan = self.plan(num_warmup, ravel_pytree(z)[0].size)
            adapt_state = plan.init(z, self.step_size, self.inverse_mass_matrix)
            rule = AcceptRule.of(potential, self.adjusted)
            state = first_state(
                key, key_momentum, z, potential, rule, plan, adapt_state, potential
            )
            if self.max_step_halvings:
                state = state._replace(halving=HalvingRecord.zero())
            return state if share else begin_adaptation(state, rescale)

        share = self.shares_adaptation and not single
        rescale = self.inverse_mass_matrix is None
        if single:
            state = one(rng_key, key_momentum, z)
        else:
            axes = chain_axes(share)
            state = jax.vmap(one, out_axes=axes)(rng_key, key_momentum, z)
            if share:
                state = begin_adaptation(state, rescale, share)
        check_finite_potential(state.evaluation)
        return state._replace(data=checksum_of_arguments(model_args, model_kwargs))

    def sample(
        self, state: ScoreLangevinState, model_args: tuple, model_kwargs: dict | None
    ) -> ScoreLangevinState:
        """Return the state after one transition (of every chain in a batch).

        A state of other data is refreshed first.
        """
        state = self.refresh_for_data(state, model_args, model_kwargs)
        state = self.advance(state, model_args, model_kwargs)
        potential = partial(self.potential, model_args, model_kwargs)
        report_at_end(state.run_view, enclosing_run(), potential)
        return state

    def advance(
        self,
        state: ScoreLangevinState,
        model_args: tuple,
        model_kwargs: dict | None,
        may_stay: float = 0.0,
    ) -> ScoreLangevinState:
        """Return the state after one transition; no verdict at the end of a run."""
        potential = self.potential(model_args, model_kwargs)

        single, share = is_prng_key(state.rng_key), self.shares_adaptation
        learn = partial(adapt, share_adaptation=share and not single)
        if not (single or share):
            axes = chain_axes(False)
            learn = jax.vmap(learn, (axes,), axes)

        run = enclosing_run()

        def move(state: ScoreLangevinState) -> ScoreLangevinState:
            after = learn(transition(state, potential, self.dynamics, share))
            after = count_in_run(after, run)
            moments = follow(state.point, after.run_view, run, potential)
            return after._replace(moments=moments)

        state = jax.lax.platform_dependent(
            state, cpu=partial(fuse_on_cpu, move), default=move
        )
        warn_on_failure(state, may_stay)
        return state

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable:
        """Return the map from z to the sites' values, deterministic sites included."""
        return self.potential(model_args, model_kwargs).constrain

    def accept_rule(self, *args: Any, **kwargs: Any) -> AcceptRule:
        """Return the rule by which proposals are accepted.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        return AcceptRule.of(self.potential(args, kwargs), self.adjusted)

    def refresh(
        self, state: ScoreLangevinState, model_args: tuple, model_kwargs: dict | None
    ) -> ScoreLangevinState:
        """Return the state with its cached values at z for other arguments."""
        potential = self.potential(model_args, model_kwargs)
        evaluate = potential.evaluate
        if not is_prng_key(state.rng_key):
            evaluate = jax.vmap(evaluate, axis_size=len(state.rng_key))
        state = with_checksum(state, model_args, model_kwargs)
        return state.move(state.z, evaluate(state.z))

    def wrap_model(self, wrapper: Callable) -> "ScoreLangevin":
        """Return this kernel for ``wrapper(model)``.

        Raises:
            ValueError: for a kernel of a potential function.
        """
        if self.model is None:
            raise ValueError(
                "`wrap_model` needs a kernel with a `model`: a potential function "
                "cannot be wrapped."
            )
        return dataclasses.replace(self, model=wrapper(self.model))

    def potential(self, model_args: tuple, model_kwargs: dict | None) -> Potential:
        """Return the potential for arguments of the model."""
        if self.potential_fn is not None:
            return FunctionPotential(self.potential_fn, self.score_fn)
        assert self.model is not None
        potential = model_potential(
            self.model, model_args, model_kwargs or {}, num_nodes=self.num_nodes
        )
        return potential.with_force(self.score_fn)

    @property
    def dynamics(self) -> Dynamics:
        """The member of the family that the options choose."""
        num_steps = self.num_steps
        if num_steps is None and not self.adjusted:
            num_steps = UNADJUSTED_STEPS
        halvings = self.max_step_halvings
        return Dynamics(num_steps, self.friction, self.adjusted, halvings)

    @property
    def shares_adaptation(self) -> bool:
        """True if vectorized chains have one step size and one metric."""
        if self.share_adaptation is None:
            return self.adjusted
        return self.share_adaptation

    def plan(self, num_warmup: int, size: int) -> AdaptationSettings:
        """Return what warm-up adapts for a target of ``size`` dimensions."""
        dynamics = self.dynamics
        variance = (dynamics.num_steps or 1) * size * self.energy_variance
        return AdaptationSettings(
            num_warmup,
            self.adapt_step_size,
            self.adapt_mass_matrix,
            self._dense_blocks(),
            target_accept_prob=self.target_accept_prob or dynamics.target_accept_prob,
            energy_variance=None if self.adjusted else variance,
            fisher=self.fisher,
            num_steps=dynamics.num_steps,
            friction=self.friction,
        )

    def _dense_blocks(self) -> bool | tuple[tuple[str, ...], ...] | None:
        """Return ``dense_mass`` in hashable form; Welford's metric chooses nothing."""
        if isinstance(self.dense_mass, list | tuple):
            return tuple(map(tuple, self.dense_mass))
        return False if self.dense_mass is None and not self.fisher else self.dense_mass

    @property
    def fisher(self) -> bool:
        """True if the metric is learned from draws and gradients."""
        return self.metric == "fisher" and self.adjusted
