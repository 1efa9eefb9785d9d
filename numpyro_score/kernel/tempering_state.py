"""State of parallel tempering: chains at all temperatures, and their statistics."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.checks import item_or_known_fields
from numpyro_score.kernel.run_moments import (
    Point,
    RunMoments,
)
from numpyro_score.kernel.run_report import RunView, number_in_run
from numpyro_score.kernel.stepping_stone import (
    Evidence,
    SteppingStones,
    TemperingRecord,
    estimate_evidence,
)
from numpyro_score.kernel.tempered_potential import (
    TemperedPoint,
)
from numpyro_score.kernel.tempering_adaptation import (
    RoundStatistics,
    TemperingAdaptState,
)
from numpyro_score.kernel.tempering_schedule import (
    round_ends,
)
from numpyro_score.kernel.verdict import RunKind
from numpyro_score.run_verdict import RunSpan
from numpyro_score.typing import PRNGKey


@jax.tree_util.register_static
@dataclass(frozen=True)
class TemperingPlan:
    """The rounds of warm-up; a static part of the state, without leaves."""

    num_warmup: int

    @property
    def round_ends(self) -> tuple[int, ...]:
        """After how many iterations each round ends."""
        return round_ends(self.num_warmup)


class Replicas(NamedTuple):
    """States at all inverse temperatures, along the first axis (after that of chains).

    - **z**: unconstrained values of the latent sites.
    - **point**: prior and likelihood there.
    - **from_prior**: whether the state's last visit to an end was at the prior.
    """

    z: Any
    point: TemperedPoint
    from_prior: Bool[Array, "*chains rungs"]


class ParallelTemperingState(NamedTuple):
    """State of one chain, or of a batch of vectorized chains.

    - **i**: iteration, counted from the start of warm-up; one for all chains.
    - **z**: unconstrained values of the latent sites at the posterior.
    - **potential_energy**: known potential at z; learned laws have no value.
    - **log_likelihood**: log likelihood at z.
    - **num_steps**: evaluations of the gradient at all temperatures in the last
      iteration.
    - **accept_prob**: mean acceptance probability of the last transitions at the
      posterior.
    - **diverging**: whether one of these diverged.
    - **swap_accept_prob**: acceptance probability of swaps, averaged over all pairs.
    - **accept_rule**: which :class:`~numpyro_score.kernel.AcceptRule` decides, as its
      number.
    - **replicas**: states at all temperatures.
    - **adapt_state**: temperatures, step sizes and metrics.
    - **round_statistics**: of the present round of warm-up, or of sampling.
    - **stepping_stones**: what evidence and restarts are computed from.
    - **warmup_barrier**: barrier in the last round of warm-up, corrected for rejection
      rates near one.
    - **warmup_restart_rate**: restarts per iteration that it let expect.
    - **moments**: of the draws after warm-up, for their verdict; None where none is
      due.
    - **plan**: the rounds of warm-up; no arrays.
    - **rng_key**: key of the next iteration.
    - **data**: checksum of the arguments of the model, one for all chains; None without
      arguments.
    - **span**: place of the present run, one for all chains; None where no verdict is
      due.
    """

    i: Any
    z: Any
    potential_energy: Array
    log_likelihood: Array
    num_steps: Array
    accept_prob: Array
    diverging: Array
    swap_accept_prob: Array
    accept_rule: Array
    replicas: Replicas
    adapt_state: TemperingAdaptState
    round_statistics: RoundStatistics
    stepping_stones: SteppingStones
    warmup_barrier: Array
    warmup_restart_rate: Array
    moments: RunMoments | None
    plan: TemperingPlan
    rng_key: PRNGKey
    data: Any = None
    span: RunSpan | None = None

    def __getitem__(self, index: Any) -> Any:
        return item_or_known_fields(self, index)

    @property
    def point(self) -> Point:
        """Position and potential; tempered chains are judged without gradients."""
        none = jax.tree.map(jnp.zeros_like, self.z)
        return Point(self.z, none, self.potential_energy)

    @property
    def run_view(self) -> RunView:
        """The part that a verdict is made from: the chain at the posterior."""
        unit = jnp.ones_like(self.round_statistics.mean[..., 0, :])
        return RunView(
            self.moments,
            number_in_run(self),
            self.point,
            self.diverging,
            self.adapt_state.step_size,
            self.num_steps,
            metric=(unit, unit),
            shared=False,
            kind=RunKind(energy=False, learned=False, tempered=True),
            tempering=TemperingRecord(
                self.stepping_stones,
                self.adapt_state.inverse_temperatures,
                self.active,
            ),
        )

    @property
    def active(self) -> Bool[Array, "*chains pairs"]:
        """Mask of the pairs of neighbors in use."""
        return self.adapt_state.active

    @property
    def evidence(self) -> Evidence:
        """Log evidence, its standard error, and the gap of both directions."""
        return estimate_evidence(self.stepping_stones, self.active)

    @property
    def log_evidence(self) -> Float[Array, "*chains"]:
        """Estimate of the log evidence of each chain, from the draws after warm-up."""
        return self.evidence.log_evidence

    @property
    def log_evidence_error(self) -> Float[Array, "*chains"]:
        """Its standard error; infinite while fewer than eight restarts were counted."""
        return self.evidence.error

    @property
    def log_evidence_gap(self) -> Float[Array, "*chains"]:
        """Difference of the estimates from the prior up and from the posterior down."""
        return self.evidence.gap

    @property
    def rejection(self) -> Float[Array, "*chains pairs"]:
        """Rejection rates of swaps between neighbors, in this round or phase."""
        return self.round_statistics.rejection_rate

    @property
    def barrier(self) -> Float[Array, "*chains"]:
        """Estimate of the communication barrier: the sum of the rejection rates."""
        return jnp.where(self.active, self.rejection, 0.0).sum(-1)

    @property
    def restarts(self) -> Int[Array, "*chains"]:
        """Number of states that came from prior to posterior, after warm-up."""
        return self.stepping_stones.restarts


def chain_axes() -> ParallelTemperingState:
    """Return the axes of a batch of chains, which share iteration, data and run."""
    zeros: list[Any] = [0] * len(ParallelTemperingState._fields)
    return ParallelTemperingState(*zeros)._replace(i=None, data=None, span=None)


def show_posterior(state: ParallelTemperingState) -> ParallelTemperingState:
    """Return one chain's state with the fields of its posterior."""
    last = state.adapt_state.num_rungs - 1
    replicas = state.replicas
    z, point = jax.tree.map(lambda x: x[last], (replicas.z, replicas.point))
    return state._replace(
        z=z,
        log_likelihood=point.log_likelihood,
        potential_energy=point.prior.value - point.log_likelihood,
    )


def show_posteriors(state: ParallelTemperingState) -> ParallelTemperingState:
    """Return a batch of chains with the fields of their posteriors."""
    return jax.vmap(show_posterior, (chain_axes(),), chain_axes())(state)


def expand_chain(state: ParallelTemperingState) -> ParallelTemperingState:
    """Return a batch of one chain."""
    batch = jax.tree.map(lambda x: jnp.expand_dims(x, 0), state)
    return batch._replace(i=state.i, data=state.data, span=state.span)


def squeeze_chain(state: ParallelTemperingState) -> ParallelTemperingState:
    """Return the only chain of a batch."""
    alone = state._replace(i=jnp.zeros(1), data=jnp.zeros(1), span=None)
    one = jax.tree.map(lambda x: x[0], alone)
    return one._replace(i=state.i, data=state.data, span=state.span)
