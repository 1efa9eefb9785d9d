"""Training data: checked rows on the device."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def check_data(
    data: Any, name: str = "data", event_shape: tuple[int, ...] | None = None
) -> Array:
    """Return data as floating-point rows, or raise saying what is wrong with them.

    Raises:
        ValueError: for no rows, another event shape, or numbers that are not finite.
    """
    data = np.asarray(data)
    if data.ndim < 1 or len(data) == 0 or data.dtype.kind not in "iufb":
        raise ValueError(
            f"`{name}` must be an array of real numbers with one row per sample. "
            f"Got shape {data.shape}, dtype {data.dtype}."
        )
    if event_shape is not None and data.shape[1:] != event_shape:
        raise ValueError(
            f"`{name}` must have rows of the shape that the net was trained for. "
            f"Got {data.shape[1:]}, expected {event_shape}."
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
        data = data.astype(jnp.result_type(float))
    bad = np.flatnonzero(~np.isfinite(data).reshape(len(data), -1).all(1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite: a score cannot be learned from NaN or inf. "
            f"Drop or fill these rows first. Got {len(bad)} bad rows of {len(data)}, "
            f"the first at {bad[:5].tolist()}."
        )
    return jnp.asarray(data)


def check_counts(num_steps: int, batch_size: int, num_rows: int) -> None:
    """Raise unless the run has steps and its batches fit the data."""
    if num_steps < 1:
        raise ValueError(
            f"`num_steps` must be at least 1: it is the length of the run. "
            f"Got {num_steps}."
        )
    if not 1 <= batch_size <= num_rows:
        raise ValueError(
            "`batch_size` must lie between 1 and the number of rows: a batch is drawn "
            f"from the data. Got batch_size={batch_size}, {num_rows} rows."
        )
