"""Bounded data in unconstrained space: a constraint, its bijection and its Jacobian."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import IndependentTransform, Transform

from numpyro_score.typing import Real


class SoftClip(Transform):
    r"""The bijection from real numbers to an interval (l, u) that bends at the edges.

    The logit stretches a whole interval: a posterior of one width everywhere gets
    another width at each place, which a net then has to learn. This map leaves the
    inside of the interval alone.

    .. math:: x = l + \tau \Big[\log(1 + e^{(z - l)/\tau})
              - \log(1 + e^{(z - u)/\tau})\Big], \qquad \tau = edge\,(u - l)

    With :math:`z = x + \tau \log\frac{1 - e^{-(x - l)/\tau}}{1 - e^{-(u - x)/\tau}}`
    for inverse: x itself, but for terms that vanish a few :math:`\tau` away from the
    edges. For a large ``edge`` it is the logistic map, up to a scale.

    Args:
        lower: lower end.
        upper: upper end.
        edge: share of the width in which the map bends.

    Raises:
        ValueError: unless ``edge`` is positive.

    Example:
        >>> to_box = SoftClip(-1.0, 1.0)
        >>> [round(float(x), 3) for x in to_box(jnp.array([-9.0, 0.5, 1.0]))]
        [-1.0, 0.5, 0.986]
    """

    domain = constraints.real

    def __init__(self, lower: Any, upper: Any, edge: float = 0.01) -> None:
        if not edge > 0:
            raise ValueError(
                "`edge` must be positive: it is the share of the interval in which "
                f"the map bends. Got {edge}."
            )
        self.lower, self.upper, self.edge = lower, upper, edge

    @property
    def codomain(self) -> Any:
        """The interval."""
        return constraints.interval(self.lower, self.upper)

    def tree_flatten(self) -> tuple:
        """Return what JAX needs to carry the map as a pytree."""
        return (self.lower, self.upper), (("lower", "upper"), {"edge": self.edge})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SoftClip) or self.edge != other.edge:
            return False
        ends = (self.lower, self.upper), (other.lower, other.upper)
        return all(jnp.array_equal(a, b) for a, b in zip(*ends, strict=True))

    def __call__(self, z: Real) -> Real:
        """Return x, at least a rounding error inside the interval."""
        half = 0.5 * (jnp.asarray(self.upper) - self.lower)
        center = jnp.asarray(self.lower) + half
        scale = 2 * half * self.edge
        # the distance to the nearer edge, which is what can be tiny
        side = jnp.where(z < center, -1.0, 1.0)
        away = side * (z - center)
        distance = jax.nn.softplus((half - away) / scale)
        distance = scale * (distance - jax.nn.softplus(-(half + away) / scale))
        tiny = 2 * jnp.finfo(jnp.result_type(float)).eps
        least = tiny * (half + jnp.abs(center))
        return center + side * (half - jnp.maximum(distance, least))

    def _inverse(self, x: Real) -> Real:
        scale = (jnp.asarray(self.upper) - self.lower) * self.edge
        below = jnp.log(-jnp.expm1((self.lower - x) / scale))
        above = jnp.log(-jnp.expm1((x - self.upper) / scale))
        return x + scale * (below - above)

    def log_abs_det_jacobian(
        self, x: Real, y: Real, intermediates: ArrayLike | None = None
    ) -> Real:
        """Return log dy/dx for y = self(x), in NumPyro's names."""
        scale = (jnp.asarray(self.upper) - self.lower) * self.edge
        inner = jax.nn.log_sigmoid((x - self.lower) / scale)
        outer = jax.nn.log_sigmoid((self.upper - x) / scale)
        return inner + outer + jnp.log(-jnp.expm1(-1 / self.edge))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Support:
    """The set that data live in, and NumPyro's bijection from real numbers to it.

    A score lives in unconstrained space, where Gaussian noise makes sense: z has the
    shape ``unconstrained_shape`` and x = biject_to(constraint)(z). Comparable and
    hashable by value, which NumPyro's constraints are not.

    Args:
        constraint: a constraint whose event is one whole datum; see :meth:`of`.
        edge: for an interval, the share of its width in which the map bends, see
            :class:`SoftClip`; None for NumPyro's map.

    Example:
        >>> import jax.numpy as jnp
        >>> support = Support.of(constraints.positive, event_shape=(2,))
        >>> x = jnp.array([1.0, 2.0])
        >>> bool(jnp.allclose(support.constrain(support.unconstrain(x)), x))
        True
    """

    constraint: Any
    edge: float | None = field(default=None, metadata={"static": True})

    @property
    def name(self) -> str:
        """The name of NumPyro's constraint, without what makes it one event."""
        constraint = self.constraint
        while hasattr(constraint, "base_constraint"):
            constraint = constraint.base_constraint
        return type(constraint).__name__.strip("_")

    @classmethod
    def of(
        cls, constraint: Any, event_shape: tuple[int, ...], edge: float | None = None
    ) -> "Support":
        """Return the support of data of ``event_shape`` under a NumPyro constraint.

        A constraint on single numbers applies to every number of a datum. ``edge`` is
        left out for constraints other than intervals.

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
        if _interval(constraint) is None:
            edge = None
        return cls(constraints.independent(constraint, missing), edge)

    @property
    def transform(self) -> Transform:
        """The bijection from real numbers."""
        interval = _interval(self.constraint)
        if self.edge is None or interval is None:
            return biject_to(self.constraint)
        soft = SoftClip(interval.lower_bound, interval.upper_bound, self.edge)
        return IndependentTransform(soft, self.constraint.event_dim)

    def unconstrained_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of z for data of ``event_shape``."""
        return self.transform.inverse_shape(event_shape)

    def data_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a datum for unconstrained points of ``event_shape``."""
        return self.transform.forward_shape(event_shape)

    def constrain(self, z: Real) -> Real:
        """Return x of the support for real z."""
        return self.transform(z)

    def unconstrain(self, x: Real) -> Real:
        """Return real z for x of the support."""
        return self.transform.inv(x)

    def log_abs_det_jacobian(self, z: Real, x: Real) -> Array:
        """Return the log Jacobian of x in z, which densities of x subtract."""
        return self.transform.log_abs_det_jacobian(z, x)

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
        return str(structure), values, self.edge

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Support) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _interval(constraint: Any) -> Any:
    """Return the interval that single numbers of a datum lie in, or None."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    is_interval = isinstance(constraint, constraints.interval)
    return constraint if is_interval and not constraint.is_discrete else None


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
