"""What NPSE chooses where nothing is given: one rule for all models."""

import numpy as np

from numpyro_score.nn import MLP

PATIENCE = 10  # of 20 blocks; with fewer, slow gains end before the rate has fallen


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
    )


def default_num_steps(num_simulations: int) -> int:
    """Return how many steps to train for.

    Example:
        >>> default_num_steps(1000)
        4000
    """
    return int(np.clip(2 * num_simulations, 4000, 20_000))
