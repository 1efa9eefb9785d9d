"""What NPSE chooses where nothing is given: one rule for all models."""

import jax
import numpy as np

from numpyro_score.data.rows import Batch
from numpyro_score.nn import MLP

PATIENCE = 10  # of 20 blocks; with fewer, slow gains end before the rate has fallen
VALIDATION_ROWS = 10_000  # held-out rows are repeated, each time with other noise
VALIDATION_NUMBERS = 1_000_000  # of their observations, which limits the memory


def default_net(size: int, shape: tuple[int, ...], optional_context: bool) -> MLP:
    """Return the net of latents of a size and observations of a shape.

    Example:
        >>> default_net(2, (3,), False).context_size
        3
    """
    return MLP(
        size,
        context_size=int(np.prod(shape)),
        optional_context=optional_context,
        norm=False,
    )


def default_num_steps(num_simulations: int) -> int:
    """Return how many steps to train for: 80 000 for 100 000 simulations.

    Example:
        >>> [default_num_steps(n) for n in (500, 5000, 10_000, 100_000)]
        [4000, 20000, 40000, 80000]
    """
    if num_simulations <= 10_000:
        return max(4 * num_simulations, 4000)
    return min(round(40_000 * (num_simulations / 10_000) ** 0.302), 80_000)


def repeat_validation(rows: Batch) -> Batch:
    """Return held-out rows again and again, unless there are many.

    The noise of few rows would decide where training stops.

    Example:
        >>> repeat_validation(Batch(np.zeros((300, 1)))).x.shape
        (10200, 1)
    """
    numbers = 1 if rows.context is None else np.size(rows.context[0])
    count = min(VALIDATION_ROWS, VALIDATION_NUMBERS // numbers)
    times = max(1, -(-count // len(rows.x)))
    return jax.tree.map(lambda part: np.concatenate([part] * times), rows)
