"""Rows of draws or data, and the check that they are finite."""

import numpy as np
from jaxtyping import Array, Float

Points = Float[Array, "_ *event"] | Float[np.ndarray, "_ *event"]


def check_rows_finite(name: str, rows: Points, why: str = "") -> None:
    """Raise for rows with NaN or infinity.

    Args:
        name: the argument's name, for the error.
        rows: one draw or datum per row.
        why: what would go wrong, after a colon, for the error.

    Raises:
        ValueError: if a row is not finite; the error counts them.

    Example:
        >>> check_rows_finite("draws", np.zeros((3, 2)))
    """
    bad = int((~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)).sum())
    if bad:
        raise ValueError(
            f"`{name}` must be finite{why}. "
            f"Got {bad} rows of {len(rows)} with NaN or infinity."
        )
