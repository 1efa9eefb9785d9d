"""A tree of arrays as a key of caches: equal to itself alone."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, eq=False)
class IdentityKey:
    """Key that equals those of trees with the same arrays, which it keeps alive.

    - **tree**: the tree, such as a score.
    - **ids**: identities of its leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.zeros(2)
        >>> IdentityKey.of((x,)) == IdentityKey.of((x,))
        True
        >>> IdentityKey.of((x,)) == IdentityKey.of((jnp.zeros(2),))
        False
    """

    tree: Any
    ids: tuple[int, ...]

    @classmethod
    def of(cls, tree: Any) -> "IdentityKey":
        """Return the key of a tree."""
        return cls(tree, tuple(map(id, jax.tree.leaves(tree))))

    def __hash__(self) -> int:
        return hash(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IdentityKey) or self.ids != other.ids:
            return False
        first: Any = jax.tree.structure(self.tree)
        return bool(first == jax.tree.structure(other.tree))
