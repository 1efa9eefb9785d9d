"""Arguments of a model: arrays, which a program takes, and the rest, which is in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class _Slot:
    """Stands where an array was."""


_SLOT = _Slot()


class StaticArguments(NamedTuple):
    """Arguments with their arrays taken out; hashable where the rest is."""

    structure: Any
    leaves: tuple

    def combine(self, arrays: list[Array]) -> tuple[tuple, dict]:
        """Return the arguments with arrays put in."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _SLOT else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


def partition_arguments(
    args: tuple, kwargs: dict
) -> tuple[StaticArguments, list[Array]]:
    """Return the frame of a model's arguments, and the arrays that fill it.

    Python numbers, strings and None stay in the frame: models branch on them.

    Example:
        >>> frame, arrays = partition_arguments((3, np.ones(2)), {"y": None})
        >>> frame.combine(arrays)
        ((3, Array([1., 1.], dtype=float32)), {'y': None})
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [
        jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array
    ]
    rest = [
        _SLOT if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
    ]
    return StaticArguments(structure, tuple(rest)), arrays
