"""Bounded data in unconstrained space: a constraint, its bijection and its Jacobian."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints

from numpyro_score.typing import Real


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Support:
    """The set that data live in, and NumPyro's bijection from real numbers to it.

    A score lives in unconstrained space, where Gaussian noise makes sense: z has the
    shape ``unconstrained_shape`` and x = biject_to(constraint)(z). Comparable and
    hashable by value, which NumPyro's constraints are not.

    Args:
        constraint: a constraint whose event is one whole datum; see :meth:`of`.

    Example:
        >>> import jax.numpy as jnp
        >>> support = Support.of(constraints.positive, event_shape=(2,))
        >>> x = jnp.array([1.0, 2.0])
        >>> bool(jnp.allclose(support.constrain(support.unconstrain(x)), x))
        True
    """

    constraint: Any

    @classmethod
    def of(cls, constraint: Any, event_shape: tuple[int, ...]) -> "Support":
        """Return the support of data of ``event_shape`` under a NumPyro constraint.

        A constraint on single numbers applies to every number of a datum.

        Raises:
            TypeError: for anything but a constraint on continuous data.
            ValueError: if the constraint is on larger events than a datum.
        """
        check_constraint(constraint)
        missing = len(event_shape) - constraint.event_dim
        if missing < 0:
            raise ValueError(
                "`support` must be a constraint on a datum or on its numbers. Got "
                f"events of {constraint.event_dim} dimensions, data of event shape "
                f"{event_shape}."
            )
        return cls(constraints.independent(constraint, missing))

    def unconstrained_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of z for data of ``event_shape``."""
        return biject_to(self.constraint).inverse_shape(event_shape)

    def data_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a datum for unconstrained points of ``event_shape``."""
        return biject_to(self.constraint).forward_shape(event_shape)

    def constrain(self, z: Real) -> Real:
        """Return x of the support for real z."""
        return biject_to(self.constraint)(z)

    def unconstrain(self, x: Real) -> Real:
        """Return real z for x of the support."""
        return biject_to(self.constraint).inv(x)

    def log_abs_det(self, z: Real, x: Real) -> Array:
        """Return the log Jacobian of x in z, which densities of x subtract."""
        return biject_to(self.constraint).log_abs_det_jacobian(z, x)

    def check(self, data: Array, name: str = "data") -> None:
        """Raise unless all rows lie inside the support."""
        inside = np.asarray(self.constraint(data))
        rows = np.asarray(self.unconstrain(data))
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        bad = np.flatnonzero(~(inside & finite))
        if len(bad):
            raise ValueError(
                f"`{name}` must lie inside the support, not on its edge: the edge is "
                "infinitely far in unconstrained space. "
                f"Got {len(bad)} bad rows of {len(data)}, the first at "
                f"{bad[:5].tolist()}, support {self.constraint}."
            )

    def _key(self) -> tuple:
        leaves, structure = jax.tree.flatten(self.constraint)
        values = tuple((np.shape(x), np.asarray(x).tobytes()) for x in leaves)
        return str(structure), values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Support) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def check_constraint(constraint: Any) -> None:
    """Raise unless ``constraint`` is one of NumPyro's on continuous data."""
    is_constraint = isinstance(constraint, constraints.Constraint)
    if not is_constraint or constraint.is_discrete:
        raise TypeError(
            "`support` must be a NumPyro constraint on continuous data, such as "
            "constraints.positive, constraints.interval(0.0, 1.0) or "
            f"constraints.simplex. Got {constraint!r}."
        )
    try:
        biject_to(constraint)
    except NotImplementedError:
        raise TypeError(
            "`support` must have a bijection from the real numbers in "
            f"numpyro.distributions.biject_to. Got {constraint!r}."
        ) from None
