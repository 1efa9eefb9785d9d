"""Simulations row by row, and what becomes of those that fail."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Simulations(NamedTuple):
    """Pairs of latents and observations, row by row.

    - **z**: latents of interest in unconstrained space.
    - **context**: what was observed.
    - **num_dropped**: simulations that were left out because they were not finite.
    """

    z: Float[np.ndarray, "rows size"]
    context: Float[np.ndarray, "rows ..."]
    num_dropped: int = 0


def finite_rows(*parts: Any) -> Bool[np.ndarray, " rows"]:
    """Return for each row whether all of its numbers are finite."""
    flat = [np.isfinite(part).reshape(len(part), -1).all(1) for part in parts]
    return np.logical_and.reduce(flat)


def drop_nonfinite(z: np.ndarray, context: np.ndarray) -> Simulations:
    """Leave out and report simulations that are not finite.

    Example:
        >>> z = np.zeros((2, 1))
        >>> drop_nonfinite(z, z).num_dropped
        0
    """
    good = finite_rows(z, context)
    num_dropped = int((~good).sum())
    if num_dropped:
        bad_latents = int((~finite_rows(z)).sum())
        warnings.warn(
            f"{num_dropped} of {len(good)} simulations are not finite and were "
            f"dropped ({bad_latents} of them for a latent at the edge of its support). "
            "The posterior is that of the model given that its simulator succeeds.",
            stacklevel=4,
        )
    return Simulations(z[good], context[good], num_dropped)


def train_validation_split(
    simulations: Simulations, share: float
) -> tuple[Simulations, Simulations | None]:
    """Hold out the last part of the simulations, which are in random order.

    Raises:
        ValueError: unless ``share`` lies in [0, 1).

    Example:
        >>> z = np.zeros((10, 1))
        >>> [len(part.z) for part in train_validation_split(Simulations(z, z), 0.2)]
        [8, 2]
    """
    if not 0 <= share < 1:
        raise ValueError(
            "`validation_share` must lie in [0, 1): it is the share of the simulations "
            f"that is held out. Got {share}."
        )
    count = round(share * len(simulations.z))
    if count == 0:
        return simulations, None
    z, context, _ = simulations
    train = Simulations(z[:-count], context[:-count])
    return train, Simulations(z[-count:], context[-count:])
