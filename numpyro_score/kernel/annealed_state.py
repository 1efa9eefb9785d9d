"""The state of AnnealedLangevin."""

from typing import Any, NamedTuple

from jaxtyping import Array

from numpyro_score.kernel.adaptation import AdaptationState
from numpyro_score.kernel.levels import AnnealingSchedule
from numpyro_score.kernel.state import ScoreLangevinState
from numpyro_score.smc.weights import ParticleWeights
from numpyro_score.typing import PRNGKey


class AnnealedLangevinState(NamedTuple):
    """State of one chain, or of a batch of vectorized chains.

    - **i**: iteration, counted from the start of warm-up.
    - **chain**: state of the Langevin transitions, as in ``ScoreLangevin``.
    - **beta**: present power of the likelihood; one per chain unless a cloud shares it.
    - **cloud**: weights and evidence of vectorized chains as particles, or None.
    - **plan**: the levels; no arrays.
    - **rng_key**: key of the next transition.
    """

    i: Any
    chain: ScoreLangevinState
    beta: Array
    cloud: ParticleWeights | None
    plan: AnnealingSchedule
    rng_key: PRNGKey

    @property
    def z(self) -> Any:
        """Unconstrained values of the latent sites."""
        return self.chain.z

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
        """Whether the last proposal diverged."""
        return self.chain.diverging

    @property
    def accept_rule(self) -> Array:
        """Number of the :class:`~numpyro_score.kernel.AcceptRule` that decides."""
        return self.chain.accept_rule

    @property
    def num_steps(self) -> Array:
        """Steps in the last transition."""
        return self.chain.num_steps

    @property
    def adapt_state(self) -> AdaptationState:
        """Step size and metric."""
        return self.chain.adapt_state
