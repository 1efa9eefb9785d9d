"""Annealed sequential Monte Carlo: schedule, state, and one step down the path.

Vectorized chains are weighted particles (Del Moral et al. 2006); chains that run alone
take the same steps without weights.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, UInt32
from numpyro.util import is_prng_key

from numpyro_score.checks import item_or_known_fields
from numpyro_score.kernel.adaptation import AdaptationState, with_matrices
from numpyro_score.kernel.annealing_path import AnnealingPath
from numpyro_score.kernel.run_report import RunView
from numpyro_score.kernel.state import ScoreLangevinState, chain_axes
from numpyro_score.kernel.tempered_potential import scale_by_beta
from numpyro_score.kernel.transition import Dynamics, transition
from numpyro_score.kernel.verdict import MIN_ESS_SHARE
from numpyro_score.model.noise_levels import SiteTime, level_times
from numpyro_score.smc.evidence import has_few_ancestors
from numpyro_score.smc.resampling import resample
from numpyro_score.smc.tempering import next_tempering_param
from numpyro_score.smc.weights import ParticleWeights, effective_sample_size
from numpyro_score.typing import PRNGKey


@jax.tree_util.register_static
@dataclass(frozen=True)
class AnnealingSchedule:
    """Times of the levels and transitions per level; a static part of the state.

    ``ts`` begins with the time of the prior and ends with that of the model; it is all
    zeros where nothing is learned and only the temperature moves.
    """

    ts: tuple[float, ...]
    steps_per_level: int

    @property
    def num_levels(self) -> int:
        """The number of levels after the prior."""
        return len(self.ts) - 1

    @property
    def num_transitions(self) -> int:
        """The number of transitions on levels."""
        return self.num_levels * self.steps_per_level

    def times(self) -> Float[Array, " ts"]:
        """Return the times as an array."""
        return jnp.asarray(self.ts)

    @classmethod
    def of(
        cls,
        levels: int | Sequence[float],
        steps_per_level: int | None,
        num_warmup: int,
        path: AnnealingPath,
    ) -> "AnnealingSchedule":
        """Return the plan of a kernel's options for a model.

        Raises:
            ValueError: if warm-up is shorter than the levels, noise levels do not
                decrease, learned sites have different processes, or their times are
                traced.
        """
        ts = level_times(levels, SiteTime.of(path.learned))
        num_levels = len(ts) - 1
        steps = steps_per_level or max(1, num_warmup // (2 * num_levels))
        if num_warmup < num_levels * steps:
            raise ValueError(
                "`num_warmup` must hold `steps_per_level` transitions at each of the "
                f"`levels`. Got num_warmup={num_warmup}, {num_levels} levels, "
                f"steps_per_level={steps}."
            )
        return cls(ts, steps)


class AnnealedLangevinState(NamedTuple):
    """State of one chain, or of a batch of vectorized chains.

    - **i**: iteration, counted from the start of warm-up.
    - **chain**: state of the Langevin transitions, as in ``ScoreLangevin``.
    - **beta**: present power of the likelihood; one per chain unless particles
      share it.
    - **weights**: weights and evidence of vectorized chains as particles, or None.
    - **plan**: the levels; no arrays.
    - **rng_key**: key of the next transition.
    - **data**: checksum of the arguments of the model; None without arguments.
    """

    i: Any
    chain: ScoreLangevinState
    beta: Array
    weights: ParticleWeights | None
    plan: AnnealingSchedule
    rng_key: PRNGKey
    data: UInt32[Array, ""] | None = None

    def __getitem__(self, index: Any) -> Any:
        return item_or_known_fields(self, index)

    @property
    def z(self) -> Any:
        """Unconstrained values of the latent sites."""
        return self.chain.z

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """The log evidence in nats; NaN without weights or draws of a proper prior."""
        if self.weights is None:
            return jnp.asarray(jnp.nan)
        return self.weights.log_evidence

    @property
    def log_evidence_error(self) -> Float[Array, ""]:
        """The standard error of the log evidence in nats, NaN where there is none.

        Counts that resampled particles share ancestors; few of these make it
        unreliable: see ``effective_num_ancestors``.
        """
        if self.weights is None:
            return jnp.asarray(jnp.nan)
        return jnp.sqrt(self.weights.total_log_evidence_variance)

    @property
    def effective_num_ancestors(self) -> Float[Array, ""]:
        """Effective number of draws of the prior left; NaN without weights."""
        if self.weights is None:
            return jnp.asarray(jnp.nan)
        return self.weights.effective_num_ancestors

    @property
    def potential_energy(self) -> Array:
        """Known potential at z."""
        return self.chain.potential_energy

    @property
    def accept_prob(self) -> Array:
        """Acceptance probability of the last proposal."""
        return self.chain.accept_prob

    @property
    def diverging(self) -> Array:
        """True if the last proposal diverged."""
        return self.chain.diverging

    @property
    def accept_rule(self) -> Array:
        """Number of the :class:`~numpyro_score.kernel.AcceptRule` that decides."""
        return self.chain.accept_rule

    @property
    def run_view(self) -> RunView:
        """The part that a verdict is made from: the chain after the levels."""
        view = self.chain.run_view
        weighted = self.weights is not None
        kind = dataclasses.replace(view.kind, halves=False, weighted=weighted)
        view = view._replace(kind=kind)
        if self.weights is None:
            return view
        shape = view.step_size.shape
        ess, ancestors = self.weights.ess, self.weights.effective_num_ancestors
        return view._replace(
            ess=jnp.broadcast_to(ess, shape),
            ancestors=jnp.broadcast_to(ancestors, shape),
        )

    @property
    def num_steps(self) -> Array:
        """Steps in the last transition."""
        return self.chain.num_steps

    @property
    def adapt_state(self) -> AdaptationState:
        """Step size and metric."""
        return self.chain.adapt_state


# share kept at a step in temperature: increments with an sd of one mean
TARGET_ESS = 0.5
# share of N below which particles are resampled; measured:
# `python -m tests.benchmarks.constants --only annealed`
RESAMPLE_ESS = 0.75
# acceptance of MALA falls by 1.15 per unit of log step at .574: a step keeps
# 1 - .3 * 1.15 = .66 of its error
LOG_STEP_GAIN = 0.3


class AnnealingStep(NamedTuple):
    """A step from one level to the next.

    - **t**, **t_next**: times of the two levels.
    - **fraction**: share of the levels that is gone after the step.
    - **remaining**: number of levels that are left, with this one.
    - **last**: whether this step ends at the posterior.
    """

    t: Array
    t_next: Array
    fraction: Array
    remaining: Array
    last: Array


def annealed_step(
    state: AnnealedLangevinState, path: AnnealingPath, dynamics: Dynamics
) -> AnnealedLangevinState:
    """Take one transition on the present level, after a step to it where it is new."""
    plan = state.plan
    k = state.i // plan.steps_per_level
    times, count = plan.times(), plan.num_levels
    step = AnnealingStep(
        times[k], times[k + 1], (k + 1) / count, count - k, k + 1 == count
    )
    split = jax.random.split
    if is_prng_key(state.rng_key):
        rng_key, key = split(state.rng_key)
    else:
        rng_key, key = jax.vmap(split, out_axes=1)(state.rng_key)
    state = state._replace(rng_key=rng_key)
    state = jax.lax.cond(
        state.i % plan.steps_per_level == 0,
        lambda: _step_down(key, state, step, path),
        lambda: state,
    )

    weighted = state.weights is not None

    def move(chain: ScoreLangevinState, beta: Array) -> ScoreLangevinState:
        return transition(chain, path.potential(step.t_next, beta), dynamics, weighted)

    if not (is_prng_key(state.rng_key) or weighted):
        # every chain has a likelihood of its own power
        axes = chain_axes(False)
        move = jax.vmap(move, (axes, 0), axes)
    chain = move(state.chain, state.beta)
    return state._replace(chain=_adapt_step_size(chain, weighted))


def _adapt_step_size(chain: ScoreLangevinState, pooled: bool) -> ScoreLangevinState:
    """Move the step size towards the target acceptance, of all chains if pooled."""
    if not chain.plan.adapt_step_size:
        return chain
    accept_prob = chain.accept_prob
    if pooled:
        accept_prob = jnp.full_like(accept_prob, accept_prob.mean())
    miss = accept_prob - chain.plan.target_accept_prob
    step_size = chain.adapt_state.step_size * jnp.exp(LOG_STEP_GAIN * miss)
    first = chain.plan.init_step_size_state
    if not pooled and step_size.ndim:
        first = jax.vmap(first)
    step_state = first(step_size[0] if pooled else step_size)
    adapt_state = chain.adapt_state._replace(step_size=step_size, ss_state=step_state)
    return chain._replace(adapt_state=adapt_state)


def _step_down(
    key: PRNGKey, state: AnnealedLangevinState, step: AnnealingStep, path: AnnealingPath
) -> AnnealedLangevinState:
    """Return a chain, chains alone, or weighted particles at the next level."""
    z = state.chain.z
    if state.weights is not None:
        z, beta, weights = smc_step(key[0], z, state.beta, state.weights, step, path)
        evaluate = jax.vmap(path.potential(step.t_next, beta).evaluate)
        flat = jax.vmap(lambda z: ravel_pytree(z)[0])(z)
        chain = state.chain.move(z, evaluate(z))
        sd = jnp.std(flat, axis=0)
        if not state.chain.plan.adapt_step_size:
            first = jax.tree.map(lambda z: z[0], z)
            sd = ravel_pytree(path.ncsn_step_scales(first, step.t_next))[0]
        chain = _set_metric(chain, sd)
        return state._replace(chain=chain, beta=beta, weights=weights)

    def alone(
        key: PRNGKey, chain: ScoreLangevinState, beta: Array
    ) -> tuple[ScoreLangevinState, Array]:
        z, beta = _anneal_chain(key, chain.z, beta, step, path)
        chain = chain.move(z, path.potential(step.t_next, beta).evaluate(z))
        scales = (
            path.denoising_sd if chain.plan.adapt_step_size else path.ncsn_step_scales
        )
        return _set_metric(chain, ravel_pytree(scales(z, step.t_next))[0]), beta

    if not is_prng_key(key):
        axes = chain_axes(False)
        alone = jax.vmap(alone, (0, axes, 0), (axes, 0))
    chain, beta = alone(key, state.chain, state.beta)
    return state._replace(chain=chain, beta=beta)


def _set_metric(chain: ScoreLangevinState, sd: Array) -> ScoreLangevinState:
    """Set a diagonal metric, in the shape of the metric that is adapted later."""
    sd = jnp.maximum(sd, jnp.finfo(sd.dtype).tiny ** 0.5)
    matrices = sd**2, 1 / sd, sd
    if chain.adapt_state.inverse_mass_matrix.ndim == 2:
        matrices = jax.tree.map(jnp.diag, matrices)
    return chain._replace(adapt_state=with_matrices(chain.adapt_state, matrices))


def _anneal_chain(
    key: PRNGKey,
    z: dict[str, Array],
    beta: Array,
    step: AnnealingStep,
    path: AnnealingPath,
) -> tuple[dict[str, Array], Array]:
    """Return one chain's latents and power of the likelihood at the next level.

    Learned sites take a reverse step of their prior. With them the power follows
    ``AnnealingPath.likelihood_variance_inflation``; without, the cube of the fraction
    of levels gone.
    """
    z = path.sample_reverse(key, z, step.t, step.t_next)
    limit = step.fraction**3
    if path.learned:
        limit = 1 / (1 + path.likelihood_variance_inflation(z, step.t_next))
    return z, jnp.where(step.last, 1.0, jnp.maximum(beta, limit))


def smc_step(
    key: PRNGKey,
    z: dict[str, Array],
    beta: Array,
    weights: ParticleWeights,
    step: AnnealingStep,
    path: AnnealingPath,
) -> tuple[dict[str, Array], Array, ParticleWeights]:
    """Return particles, power of the likelihood and weights at the next level.

    The reverse step draws learned sites from p(x_s | x_t), so the incremental weight is
    the ratio of the tempered likelihoods after and before. The power grows as far as
    the effective sample size allows (Del Moral et al. 2006; Jasra et al. 2011).
    """
    size = len(weights.log_weight)
    key_move, key_resample = jax.random.split(key)
    before = jax.vmap(lambda z: path.log_likelihood(z, step.t))(z)
    keys = jax.random.split(key_move, size)
    z = jax.vmap(lambda k, z: path.sample_reverse(k, z, step.t, step.t_next))(keys, z)
    after = jax.vmap(lambda z: path.log_likelihood(z, step.t_next))(z)

    def log_increment(beta_next: Array) -> Float[Array, " particles"]:
        return scale_by_beta(beta_next, after) - scale_by_beta(beta, before)

    limit = jnp.ones(())
    if path.learned:
        widening = jax.vmap(
            lambda z: path.likelihood_variance_inflation(z, step.t_next)
        )(z)
        limit = 1 / (1 + widening.mean())
    share = jnp.asarray(TARGET_ESS)
    if not path.learned:
        share = even_ess_share(after, weights, beta, step.remaining)
    highest = jnp.maximum(limit, beta)
    ess = effective_sample_size(weights.log_weight)
    largest = next_tempering_param(
        log_increment, weights, beta, highest, target_ess=share * ess
    )
    beta_next = jnp.where(step.last, 1.0, largest)
    weights = weights.reweight(log_increment(beta_next))
    ancestors, weights = resample(
        key_resample, weights, ess_threshold=RESAMPLE_ESS, force=step.last
    )
    jax.lax.cond(step.last, lambda: _warn_of_degeneracy(weights), lambda: None)
    return jax.tree.map(lambda z: z[ancestors], z), beta_next, weights


def even_ess_share(
    log_likelihood: Float[Array, " particles"],
    weights: ParticleWeights,
    beta: Array,
    remaining: Array,
) -> Float[Array, ""]:
    r"""Return the share of itself that the ESS keeps if all levels left lose alike.

    A step that shifts beta by :math:`\delta / \mathrm{sd}_\beta(\ell)` keeps
    :math:`1 / (1 + \delta^2)` to second order. Where data dominate the prior,
    :math:`\beta\, \mathrm{sd}_\beta(\ell)` is constant (:math:`(d/2)^{1/2}` for a
    Gaussian posterior), so that :math:`\log(1/\beta)` times it is left to 1, in equal
    steps :math:`\delta`. At beta 0, where nothing is known of it, ``TARGET_ESS``.

    Args:
        log_likelihood: of the particles.
        weights: their weights.
        beta: present power.
        remaining: number of steps left.
    """
    probability = jnp.exp(weights.log_weight)
    finite = jnp.where(jnp.isfinite(log_likelihood), log_likelihood, 0.0)
    probability = jnp.where(jnp.isfinite(log_likelihood), probability, 0.0)
    variance = probability @ jnp.square(finite - probability @ finite)
    length = beta * jnp.sqrt(variance) * jnp.log(1 / beta)
    share = 1 / (1 + jnp.square(length / remaining))
    return jnp.where(beta > 0, jnp.maximum(share, TARGET_ESS), TARGET_ESS)


def _warn_of_degeneracy(weights: ParticleWeights) -> None:
    """Warn, when the program runs, of few effective particles or few ancestors."""

    def warn(ess: Any, ancestors: Any) -> None:
        size = len(weights.log_weight)
        if not ess >= MIN_ESS_SHARE * size:
            warnings.warn(
                "AnnealedLangevin: the effective sample size fell to "
                f"{100 * float(ess) / size:.1f} % of the particles at the last level, "
                "so the draws and the evidence are not to be trusted. Raise `levels`, "
                "`num_warmup` or `num_chains`.",
                stacklevel=2,
            )
        elif has_few_ancestors(ancestors, size):
            warnings.warn(
                f"AnnealedLangevin: the {size} particles descend from an effective "
                f"number of {float(ancestors):.1f} draws of the prior, so the shares "
                "of separate modes and the evidence are not to be trusted. Raise "
                "`num_chains`, or `num_warmup` for more transitions per level.",
                stacklevel=2,
            )

    jax.debug.callback(warn, weights.ess, weights.effective_num_ancestors)
