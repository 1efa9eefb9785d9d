"""Checks of arguments, before any work starts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Points = Float[Array, "_ *event"] | Float[np.ndarray, "_ *event"]


def check_target(model: Callable | None, potential_fn: Callable | None) -> None:
    """Raise unless exactly one of ``model`` and ``potential_fn`` is given."""
    if (model is None) == (potential_fn is None):
        raise ValueError(
            "Exactly one of `model` and `potential_fn` must be given: it is the "
            "target. A law known by its score alone becomes a model through "
            "ScoreModel.from_fn and ScoreDistribution. "
            f"Got model={model!r}, potential_fn={potential_fn!r}."
        )


def check_positive(name: str, value: float, why: str) -> None:
    """Raise unless a number is positive and finite."""
    if not (value > 0 and value < float("inf")):
        raise ValueError(
            f"`{name}` must be positive and finite: it is {why}. Got {value}."
        )


def check_count(name: str, value: int, why: str) -> None:
    """Raise unless a value is an integer of at least 1."""
    if isinstance(value, bool) or not float(value).is_integer() or value < 1:
        raise ValueError(
            f"`{name}` must be an integer of at least 1: it is {why}. Got {value!r}."
        )


def check_probability(name: str, value: float, why: str) -> None:
    """Raise unless a number lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must lie in (0, 1): it is {why}. Got {value}.")


def check_score_fn(score_fn: Callable | None, z: Any) -> None:
    """Raise unless ``score_fn`` maps z to the same structure, shapes and dtypes.

    Raises:
        ValueError: for another structure or another shape.
        TypeError: for another dtype.
    """
    if score_fn is None:
        return
    score = jax.eval_shape(score_fn, z)
    expected, got = (jax.tree.map(jnp.shape, tree) for tree in (z, score))
    if got != expected:
        raise ValueError(
            "`score_fn` must return the structure and shapes of its position: a score "
            f"has one number per coordinate. Got {got}, expected {expected}."
        )
    expected, got = (jax.tree.map(jnp.result_type, tree) for tree in (z, score))
    if got != expected:
        raise TypeError(
            "`score_fn` must return the dtype of its position: another would change "
            f"the state's dtype. Got {got}, expected {expected}."
        )


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
