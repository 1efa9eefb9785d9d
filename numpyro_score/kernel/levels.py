"""The levels that AnnealedLangevin goes down, fixed before the first transition."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.kernel.annealing_path import AnnealingPath
from numpyro_score.model.noise_levels import SiteTime, level_times


@jax.tree_util.register_static
@dataclass(frozen=True)
class AnnealingSchedule:
    """Times of the levels and transitions per level; travels in the state, no arrays.

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
