r"""AnnealedLangevin: from the prior to the posterior through noise or temperature.

Warm-up walks down the :mod:`path <numpyro_score.kernel.annealing_path>` from prior to
posterior and then adapts; sampling goes on with
:class:`~numpyro_score.kernel.ScoreLangevin`.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro.util import is_prng_key

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_count,
    check_flags,
    check_keys,
    check_levels_or_number,
    count_levels,
)
from numpyro_score.kernel.annealed_smc import (
    AnnealedLangevinState,
    AnnealingSchedule,
    annealed_step,
)
from numpyro_score.kernel.annealing_path import AnnealingPath
from numpyro_score.kernel.base import (
    AcceptRule,
    LangevinKernel,
    checksum_of_arguments,
    with_checksum,
)
from numpyro_score.kernel.run_report import report_at_end
from numpyro_score.kernel.score_langevin import ScoreLangevin
from numpyro_score.kernel.state import (
    ScoreLangevinState,
    begin_adaptation,
    chain_axes,
    first_state,
)
from numpyro_score.kernel.verdict import MAX_STAYING
from numpyro_score.model.initialization import (
    check_finite_potential,
    check_init_params,
    initialize_latents,
)
from numpyro_score.model.potential import Evaluation, Potential
from numpyro_score.model.reparam import separate_transforms
from numpyro_score.run_verdict import enclosing_run
from numpyro_score.smc.weights import ParticleWeights
from numpyro_score.typing import PRNGKey

# of the prior over all levels, as the default grid of Ancestral
MIN_REVERSE_STEPS = 200
MIN_PARTICLES = 32  # a share of equal weights is known within .5 / 32^1/2 = 9 %


@dataclass(frozen=True, eq=False)
class AnnealedLangevin(LangevinKernel):
    r"""Annealed Langevin Monte Carlo for NumPyro models, with or without learned sites.

    Warm-up starts from draws of the prior and goes down ``levels``: learned sites from
    much noise to little (Song and Ermon 2019), each time by a reverse step of their
    prior; the likelihood from power 0 to 1. At each level it takes Langevin
    transitions, whose step size follows the acceptance. What is left of warm-up adapts
    the sampler of the posterior, with which sampling goes on.

    With at least 32 vectorized chains the chains are particles of an annealed
    sequential Monte Carlo sampler (Del Moral et al. 2006): they are weighted, resampled
    when the weights degenerate, and give ``log_evidence`` and ``log_evidence_error``
    in ``mcmc.last_state``. Particles that share ancestors tell the shares of modes as
    badly as few independent ones: the error sees them, and an effective number of
    ancestors below 10 (``effective_num_ancestors``) gives a warning. Fewer chains
    anneal without weights: each ends in some mode, and the share of chains per mode is
    *not* the posterior's weight of the mode.

    Learned sites under a transform, such as a location and scale, have their learned
    point as a site of its own, ``<site>_base``, as in ``TransformReparam``.

    Args:
        model: a NumPyro model with proper priors.
        levels: number of levels, or decreasing noise levels in units of the data's sd
            (without learned sites only their number counts), for example of
            :func:`~numpyro_score.kernel.levels_from_data`.
        steps_per_level: transitions per level; None spends half of warm-up on levels.
        step_size: initial step, in units of the spread of each level; without
            adaptation the step at the lowest level, in units of the data's sd.
        num_steps: steps per transition; one, with the momentum drawn anew, is MALA.
        friction: as in ``ScoreLangevin``; None draws the momentum anew.
        adapt_step_size: whether steps follow the acceptance. If not, those of learned
            sites follow :math:`\epsilon_i = \epsilon\, \sigma_i^2 / \sigma_L^2` (Song
            and Ermon 2019) with :math:`\sqrt\epsilon` the ``step_size``, and neither
            step nor metric is adapted after the levels.
        dense_mass: whether the metric of sampling is dense.
        target_accept_prob: as in ``ScoreLangevin``.
        init_strategy: where the levels start, as in NumPyro; None for draws of the
            prior, without which there is no evidence.
        num_nodes: as in ``ScoreLangevin``.

    Raises:
        ValueError: for options out of range, learned sites with different processes, or
            a warm-up that is shorter than the levels.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro.infer import MCMC
        >>> def model(y):
        ...     x = sample("x", dist.Normal(0, 1))
        ...     sample("y", dist.Normal(x, 1), obs=y)
        >>> mcmc = MCMC(
        ...     AnnealedLangevin(model), num_warmup=60, num_samples=1, num_chains=500,
        ...     chain_method="vectorized", progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(0), 2.0)
        >>> state, exact = mcmc.last_state, dist.Normal(0, 2**0.5).log_prob(2.0)
        >>> bool(abs(state.log_evidence - exact) < 4 * state.log_evidence_error)
        True
    """

    model: Callable
    _: KW_ONLY
    levels: int | Sequence[float] = 20
    steps_per_level: int | None = None
    step_size: float = 1.0
    num_steps: int = 1
    friction: float | None = None
    adapt_step_size: bool = True
    dense_mass: bool = False
    target_accept_prob: float | None = None
    init_strategy: Callable | None = None
    num_nodes: int = 3

    def __post_init__(self) -> None:
        check_flags(dense_mass=self.dense_mass)
        self._kernel(False)  # checks the options that both kernels have
        object.__setattr__(self, "model", separate_transforms(self.model))
        check_levels_or_number(self.levels)
        if self.steps_per_level is not None:
            check_count("steps_per_level", self.steps_per_level, "a number of moves")

    def get_diagnostics_str(self, state: AnnealedLangevinState) -> str:
        """Return what the progress bar shows."""
        return f"beta {state.beta:.2f}. acc. prob={state.accept_prob:.2f}"

    def init(
        self,
        rng_key: PRNGKey,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple = (),
        model_kwargs: dict | None = None,
    ) -> AnnealedLangevinState:
        """Return the state before the first level: draws of the prior.

        Raises:
            ValueError: for initial values of another shape or not finite, for a warm-up
                shorter than the levels, or where the prior is not finite.
        """
        check_keys("rng_key", rng_key)
        check_count("num_warmup", num_warmup, "a number of transitions", least=0)
        kernel, path = self._kernel(False), self._path(model_args, model_kwargs)
        plan = AnnealingSchedule.of(self.levels, self.steps_per_level, num_warmup, path)
        single = is_prng_key(rng_key)
        size = 1 if single else len(rng_key)
        weighted = size >= MIN_PARTICLES
        if not weighted:
            _warn_unweighted(size)
        split = partial(jax.random.split, num=4)
        keys = split(rng_key) if single else jax.vmap(split, out_axes=1)(rng_key)
        t_start = plan.times()[0]
        potential = path.potential(t_start, 0.0)
        z = self._start(keys[2], path, t_start, init_params, single)
        rule = AcceptRule.of(potential, kernel.adjusted)
        model = kernel.potential(model_args, model_kwargs)

        def one(keys: Any, z: Any) -> ScoreLangevinState:
            if z is None:
                z = path.sample_prior(keys[2], t_start)
            dimension = ravel_pytree(z)[0].size
            adaptation = kernel.plan(num_warmup - plan.num_transitions, dimension)
            adapt_state = adaptation.init(z, self.step_size, None)
            chain = first_state(
                keys[1], keys[3], z, potential, rule, adaptation, adapt_state, model
            )
            return chain if weighted else begin_adaptation(chain, False)

        if not single:
            one = jax.vmap(one, out_axes=chain_axes(weighted))
        chain = one(tuple(keys), z)
        check_finite_potential(chain.evaluation)
        weights = None
        if weighted:
            proper = _can_draw_prior(path) and z is None
            weights = ParticleWeights.uniform(size, proper=proper)
            chain = begin_adaptation(chain, False, weighted)
        beta = jnp.zeros(() if weighted or single else size)
        data = checksum_of_arguments(model_args, model_kwargs)
        return AnnealedLangevinState(chain.i, chain, beta, weights, plan, keys[0], data)

    def sample(
        self,
        state: AnnealedLangevinState,
        model_args: tuple,
        model_kwargs: dict | None,
    ) -> AnnealedLangevinState:
        """Return the state after one transition (of every chain in a batch).

        A state of other data is refreshed first.
        """
        weighted = state.weights is not None
        kernel, may_stay = self._kernel(weighted), MAX_STAYING if weighted else 0.0
        path = self._path(model_args, model_kwargs)
        state = self.refresh_for_data(state, model_args, model_kwargs)

        def settle() -> AnnealedLangevinState:
            chain = state.chain._replace(rng_key=state.rng_key)
            chain = kernel.advance(chain, model_args, model_kwargs, may_stay)
            return state._replace(chain=chain, rng_key=chain.rng_key)

        state = jax.lax.cond(
            state.i < state.plan.num_transitions,
            lambda: annealed_step(state, path, kernel.dynamics),
            settle,
        )
        # few ancestors, or particles, were warned of at the last level
        view = state.run_view._replace(ess=None, ancestors=None)
        potential = partial(self.potential, model_args, model_kwargs)
        report_at_end(view, enclosing_run(), potential)
        return state._replace(i=state.i + 1)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable:
        """Return the map from z to the sites' values, deterministic sites included."""
        return self._kernel(False).postprocess_fn(model_args, model_kwargs)

    def potential(self, model_args: tuple, model_kwargs: dict | None) -> Potential:
        """Return the potential for arguments of the model, at the lowest level."""
        return self._kernel(False).potential(model_args, model_kwargs)

    def accept_rule(self, *args: Any, **kwargs: Any) -> AcceptRule:
        """Return the rule by which proposals are accepted, as in ``ScoreLangevin``."""
        return self._kernel(False).accept_rule(*args, **kwargs)

    def refresh(
        self,
        state: AnnealedLangevinState,
        model_args: tuple,
        model_kwargs: dict | None,
    ) -> AnnealedLangevinState:
        """Return the state with its cached values at z for other arguments.

        Weights and evidence belong to the arguments that they were made with; the
        evidence becomes NaN.
        """
        path, plan = self._path(model_args, model_kwargs), state.plan
        moves = jnp.minimum(state.i, plan.num_transitions)
        t = plan.times()[-(-moves // plan.steps_per_level)]

        def evaluate(z: Any, beta: Array) -> Evaluation:
            return path.potential(t, beta).evaluate(z)

        if not is_prng_key(state.rng_key):
            evaluate = jax.vmap(evaluate, (0, 0 if state.weights is None else None))
        chain = state.chain.move(state.z, evaluate(state.z, state.beta))
        weights = state.weights
        if weights is not None:
            weights = weights._replace(log_evidence=jnp.asarray(jnp.nan))
        state = state._replace(chain=chain, weights=weights)
        return with_checksum(state, model_args, model_kwargs)

    def wrap_model(self, wrapper: Callable) -> "AnnealedLangevin":
        """Return this kernel for ``wrapper(model)``."""
        return replace(self, model=wrapper(self.model))

    def _start(
        self, keys: Any, path: AnnealingPath, t: Array, init_params: Any, single: bool
    ) -> Any:
        """Return given initial values, or None where the prior is to be drawn from."""
        if init_params is None and self.init_strategy is None:
            return None
        args, kwargs = path.model_args, path.model_kwargs
        potential = path.potential(t, 0.0)
        if init_params is not None:
            batch = () if single else (len(keys),)
            return check_init_params(init_params, potential.prototype, batch)
        model = path.model_at(t, 0.0)
        return initialize_latents(
            keys, model, potential, self.init_strategy, args, kwargs
        )

    def _kernel(self, share_adaptation: bool) -> ScoreLangevin:
        """Return the kernel of the sampling phase."""
        return ScoreLangevin(
            self.model,
            step_size=self.step_size,
            num_steps=self.num_steps,
            friction=self.friction,
            adapt_step_size=self.adapt_step_size,
            adapt_mass_matrix=self.adapt_step_size,
            dense_mass=self.dense_mass,
            target_accept_prob=self.target_accept_prob,
            num_nodes=self.num_nodes,
            share_adaptation=share_adaptation,
        )

    def _path(self, model_args: tuple, model_kwargs: dict | None) -> AnnealingPath:
        return AnnealingPath.of(
            self.model,
            model_args,
            model_kwargs or {},
            num_nodes=self.num_nodes,
            num_reverse=-(-MIN_REVERSE_STEPS // count_levels(self.levels)),
        )


def _can_draw_prior(path: AnnealingPath) -> bool:
    """Return whether every latent prior can be drawn; warn of those that cannot."""
    sites = path.undrawn_sites()
    if not sites:
        return True
    names = ", ".join(f"'{name}'" for name in sites)
    warn_caller(
        f"AnnealedLangevin: the prior of {names} is improper, scaled or masked, so "
        "that particles do not start from draws of it: the shares of modes are those "
        "of the starts, and there is no evidence. Give these sites proper priors, and "
        "apply `scale` and `mask` to observed sites only."
    )
    return False


def _warn_unweighted(size: int) -> None:
    warn_caller(
        f"AnnealedLangevin anneals {size} chain(s) without weights: every chain ends "
        "in some mode, and the share of chains per mode is not the posterior's. Use "
        f"chain_method='vectorized' with at least {MIN_PARTICLES} chains to weight and "
        "resample them."
    )
