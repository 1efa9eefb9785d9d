"""The state of a Langevin kernel: what the next transition needs, and what is shown."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from numpyro_score.checks import item_or_known_fields
from numpyro_score.kernel.adaptation import (
    MAX_STEPS,
    AdaptationSettings,
    AdaptationState,
)
from numpyro_score.kernel.run_moments import Point, RunMoments, first_moments
from numpyro_score.kernel.run_report import RunView, number_in_run
from numpyro_score.kernel.step_halving import HalvingRecord
from numpyro_score.kernel.verdict import RunKind
from numpyro_score.model.initialization import is_resolved
from numpyro_score.model.potential import Evaluation, LearnedPoint, Potential
from numpyro_score.run_verdict import RunSpan, apply_if
from numpyro_score.typing import PRNGKey


class ScoreLangevinState(NamedTuple):
    """State of one chain, or of a batch of vectorized chains.

    ``potential_energy`` is the known part: learned laws have no value, only a score.

    - **i**: iteration, counted from the start of warm-up; one for all chains.
    - **z**: unconstrained values of the latent sites.
    - **z_grad**: gradient of the full potential at z.
    - **potential_energy**: known potential at z.
    - **learned**: points and weighted scores of the learned sites at z.
    - **momentum**: momentum in whitened coordinates.
    - **num_steps**: steps in the last transition; where they may be halved, gradients.
    - **energy_error**: energy error of the last proposal.
    - **accept_prob**: acceptance probability of the last proposal (unadjusted: what it
      would have been).
    - **mean_accept_prob**: its mean in the present phase.
    - **diverging**: whether the last proposal's energy error or position was not finite
      or the error above 1000; such a proposal is rejected, by unadjusted chains too.
    - **accept_rule**: which :class:`~numpyro_score.kernel.AcceptRule` decides, as its
      number.
    - **adapt_state**: step size and metric, as in NumPyro's HMC.
    - **moments**: of the run since warm-up, for its verdict; None where none is due.
    - **plan**: what warm-up adapts; no arrays.
    - **rng_key**: key of the next transition.
    - **halving**: what became of steps that may be halved, in the last transition;
      None where they may not.
    - **proposed_energy**: known potential at the last proposal; inf if it diverged.
    - **data**: checksum of the arguments of the model, one for all chains; None without
      arguments.
    - **span**: place of the present run, one for all chains; None where no verdict is
      due.
    """

    i: Any
    z: Any
    z_grad: Any
    potential_energy: Array
    learned: dict[str, LearnedPoint]
    momentum: Array
    num_steps: Array
    energy_error: Array
    accept_prob: Array
    mean_accept_prob: Array
    diverging: Array
    accept_rule: Array
    adapt_state: AdaptationState
    moments: RunMoments | None
    plan: AdaptationSettings
    rng_key: PRNGKey
    halving: HalvingRecord | None = None
    proposed_energy: Array | None = None
    data: Any = None
    span: RunSpan | None = None

    def __getitem__(self, index: Any) -> Any:
        return item_or_known_fields(self, index)

    @property
    def evaluation(self) -> Evaluation:
        """The potential evaluated at z."""
        return Evaluation(self.potential_energy, self.z_grad, self.learned)

    @property
    def point(self) -> Point:
        """Position, gradient and potential, for the verdict on a run."""
        return Point(self.z, self.z_grad, self.potential_energy)

    @property
    def run_view(self) -> RunView:
        """The part of the state that a verdict is made from."""
        adapted, learned = self.adapt_state, bool(self.learned)
        adjusted = not self.plan.by_energy
        return RunView(
            self.moments,
            number_in_run(self),
            self.point,
            self.diverging,
            adapted.step_size,
            jnp.broadcast_to(adapted.num_steps, adapted.step_size.shape),
            metric=(adapted.mass_matrix_sqrt_inv, adapted.mass_matrix_sqrt),
            proposed_energy=self.proposed_energy,
            shared=adapted.window_idx.ndim < self.potential_energy.ndim,
            kind=RunKind(
                adjusted and not learned,
                learned,
                halves=adjusted and self.halving is None,
                most_steps=MAX_STEPS if self.plan.num_steps is None else None,
            ),
        )

    def move(self, z: Any, evaluation: Evaluation) -> "ScoreLangevinState":
        """Return the state at another z, with the potential evaluated there."""
        value, grad, learned = evaluation
        return self._replace(z=z, potential_energy=value, z_grad=grad, learned=learned)


def first_state(
    rng_key: PRNGKey,
    key_momentum: PRNGKey,
    z: Any,
    potential: Potential,
    accept_rule: int,
    plan: AdaptationSettings,
    adapt_state: AdaptationState,
    model: Potential,
) -> ScoreLangevinState:
    """Return the state of one chain before its first transition.

    ``model`` is the potential that is sampled after warm-up.
    """
    value, grad, learned = potential.evaluate(z)
    zero = jnp.zeros(())
    return ScoreLangevinState(
        i=jnp.zeros((), int),
        z=z,
        z_grad=grad,
        potential_energy=value,
        learned=learned,
        momentum=jax.random.normal(key_momentum, ravel_pytree(z)[0].shape),
        num_steps=jnp.zeros((), int),
        energy_error=zero,
        accept_prob=zero,
        mean_accept_prob=zero,
        diverging=jnp.zeros((), bool),
        accept_rule=jnp.asarray(accept_rule),
        adapt_state=adapt_state,
        moments=first_moments(z, model),
        plan=plan,
        rng_key=rng_key,
        proposed_energy=jnp.full_like(value, jnp.inf),
        span=RunSpan.first(),
    )


def chain_axes(share_adaptation: bool) -> ScoreLangevinState:
    """Return the axes of a batch of chains, for ``vmap``.

    Chains share the iteration, so that adaptation ends for all at once and costs
    nothing after warm-up, and if so wanted all of the adaptation but the step size,
    which is repeated for every chain so that it can be collected.
    """
    zeros: list[Any] = [0] * len(ScoreLangevinState._fields)
    axes = ScoreLangevinState(*zeros)._replace(i=None, data=None, span=None)
    if not share_adaptation:
        return axes
    none: list[Any] = [None] * len(AdaptationState._fields)
    none[AdaptationState._fields.index("step_size")] = 0
    return axes._replace(adapt_state=AdaptationState(*none))


def begin_adaptation(
    state: ScoreLangevinState, rescale: bool, share_adaptation: bool = False
) -> ScoreLangevinState:
    """Return the state with adaptation begun where the chains start.

    Args:
        state: before the first transition, of one chain, or with ``share_adaptation``
            of a batch.
        rescale: whether the metric may start from the gradient.
        share_adaptation: whether the chains of a batch have one metric.
    """
    start = state.z, state.z_grad
    if not share_adaptation:
        start = jax.tree.map(lambda x: x[None], start)
    adapt_state = state.plan.begin(state.adapt_state, *start, rescale=rescale)
    return state._replace(adapt_state=adapt_state)


def adapt(state: ScoreLangevinState, share_adaptation: bool) -> ScoreLangevinState:
    """Count, adapt during warm-up, and follow the mean acceptance of the phase.

    The state is one chain's, or with ``share_adaptation`` a batch of chains'.
    """
    i, plan = state.i, state.plan
    warming = i < plan.num_warmup

    def update(adapt_state: AdaptationState) -> AdaptationState:
        resolved = is_resolved(state.potential_energy)
        found = state.energy_error, state.diverging, state.z, state.z_grad, resolved
        if not share_adaptation:
            found = jax.tree.map(lambda x: x[None], found)
        errors, diverging, z, gradient, resolved = found
        step_size = adapt_state.step_size
        if share_adaptation:
            adapt_state = adapt_state._replace(step_size=step_size[0])
        updated = plan.update(i, errors, diverging, z, gradient, adapt_state, resolved)
        repeated = jnp.full_like(step_size, updated.step_size)
        return updated._replace(step_size=repeated)

    adapt_state = apply_if(warming, update, state.adapt_state)
    n = 1 + jnp.where(warming, i, i - plan.num_warmup)
    mean = state.mean_accept_prob
    mean = mean + (state.accept_prob - mean) / n
    return state._replace(i=i + 1, adapt_state=adapt_state, mean_accept_prob=mean)
