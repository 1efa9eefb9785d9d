"""Supports of data: a constraint and its bijection from the real numbers."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import IndependentTransform, Transform

from numpyro_score.checks import check_numbers, check_positive, is_traced
from numpyro_score.typing import Real


class SoftClip(Transform):
    r"""Bijection from real numbers to an interval (l, u), linear in its interior.

    The logistic map has a different slope at every point of the interval, so that
    posteriors of equal width get different widths in unconstrained space. This map has
    slope 1 except within a few :math:`\tau` of the ends (softclip of TensorFlow
    Probability).

    .. math:: x = l + \tau \Big[\log(1 + e^{(z - l)/\tau})
              - \log(1 + e^{(z - u)/\tau})\Big], \qquad \tau = c\,(u - l)

    with c = ``softness`` and the inverse
    :math:`z = x + \tau \log\frac{1 - e^{-(x - l)/\tau}}{1 - e^{-(u - x)/\tau}}`. For a
    large ``softness`` it is the logistic map, up to a scale.

    Args:
        lower: lower end.
        upper: upper end.
        softness: width of the nonlinear part at each end, as a share of u - l.

    Raises:
        ValueError: unless ``softness`` is positive and lower < upper, both finite.

    Example:
        >>> to_box = SoftClip(-1.0, 1.0)
        >>> [round(float(x), 3) for x in to_box(jnp.array([-9.0, 0.5, 1.0]))]
        [-1.0, 0.5, 0.986]
    """

    domain = constraints.real

    def __init__(self, lower: Any, upper: Any, softness: float = 0.01) -> None:
        why = "the share of the interval in which the map is nonlinear"
        check_positive("softness", softness, why)
        _check_ends(lower, upper)
        self.lower, self.upper, self.softness = lower, upper, softness

    @property
    def codomain(self) -> Any:
        """Constraint of the interval."""
        return constraints.interval(self.lower, self.upper)

    def tree_flatten(self) -> tuple:
        """Return arrays and static data of the pytree."""
        return (self.lower, self.upper), (
            ("lower", "upper"),
            {"softness": self.softness},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SoftClip) or self.softness != other.softness:
            return False
        ends = (self.lower, self.upper), (other.lower, other.upper)
        return all(jnp.array_equal(a, b) for a, b in zip(*ends, strict=True))

    def __call__(self, z: Real) -> Real:
        """Return x, at least a rounding error inside the interval.

        As its distance from the nearer end, which keeps its digits where the interval
        spans many orders of magnitude.
        """
        lower, upper = jnp.asarray(self.lower), jnp.asarray(self.upper)
        width = upper - lower
        scale = width * self.softness
        is_low = z < lower + 0.5 * width
        near, far = jnp.where(is_low, z - lower, upper - z), z - upper
        far = jnp.where(is_low, far, lower - z)
        distance = jax.nn.softplus(near / scale) - jax.nn.softplus(far / scale)
        end = jnp.where(is_low, lower, upper)
        kind = jnp.finfo(jnp.result_type(float))
        # from which the inverse is finite, also where the end is 0
        smallest = 2 * kind.eps * jnp.abs(end) + kind.tiny * (1 + width + scale)
        distance = jnp.maximum(scale * distance, smallest)
        return jnp.where(is_low, lower + distance, upper - distance)

    def _inverse(self, x: Real) -> Real:
        scale = (jnp.asarray(self.upper) - self.lower) * self.softness
        below = jnp.log(-jnp.expm1((self.lower - x) / scale))
        above = jnp.log(-jnp.expm1((x - self.upper) / scale))
        return x + scale * (below - above)

    def log_abs_det_jacobian(
        self, x: Real, y: Real, intermediates: ArrayLike | None = None
    ) -> Real:
        """Return log dy/dx for y = self(x)."""
        scale = (jnp.asarray(self.upper) - self.lower) * self.softness
        inner = jax.nn.log_sigmoid((x - self.lower) / scale)
        outer = jax.nn.log_sigmoid((self.upper - x) / scale)
        return inner + outer + jnp.log(-jnp.expm1(-1 / self.softness))


def _check_ends(lower: Any, upper: Any) -> None:
    """Raise unless lower < upper, both finite; traced ends pass."""
    for name, end in {"lower": lower, "upper": upper}.items():
        check_numbers(name, end, "ends of an interval")
    if is_traced(lower, upper):
        return
    low, high = np.asarray(lower), np.asarray(upper)
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise ValueError(
            "`lower` and `upper` must be finite and satisfy lower < upper: they are "
            f"the ends of an interval. Got {lower}, {upper}."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Support:
    """Support of data, with a bijection x = T(z) from unconstrained points z.

    Noise is added to z, of shape ``unconstrained_shape``. T is NumPyro's ``biject_to``,
    or :class:`SoftClip`. Comparable and hashable by value, unlike NumPyro's
    constraints.

    Args:
        constraint: a constraint whose event is one whole datum; see :meth:`of`.
        softness: for an interval, the softness of :class:`SoftClip`; None for NumPyro's
            map.

    Example:
        >>> import jax.numpy as jnp
        >>> support = Support.of(constraints.positive, event_shape=(2,))
        >>> x = jnp.array([1.0, 2.0])
        >>> bool(jnp.allclose(support.constrain(support.unconstrain(x)), x))
        True
    """

    constraint: Any
    softness: float | None = field(default=None, metadata={"static": True})

    @property
    def name(self) -> str:
        """The name of NumPyro's constraint, without what makes it one event."""
        return constraint_name(self.constraint)

    @classmethod
    def of(
        cls,
        constraint: Any,
        event_shape: tuple[int, ...],
        softness: float | None = None,
    ) -> "Support":
        """Return the support of data of ``event_shape`` under a NumPyro constraint.

        A constraint on single numbers applies to every number of a datum. For
        constraints other than intervals ``softness`` is ignored.

        Raises:
            TypeError: for anything but a constraint on continuous data.
            ValueError: if the constraint is on larger events than a datum.
        """
        check_constraint(constraint)
        batch_ndims = len(event_shape) - constraint.event_dim
        if batch_ndims < 0:
            raise ValueError(
                "`support` must be a constraint on a datum or on its numbers. Got "
                f"events of {constraint.event_dim} dimensions, data of event shape "
                f"{event_shape}."
            )
        if _interval(constraint) is None:
            softness = None
        return cls(constraints.independent(constraint, batch_ndims), softness)

    @property
    def transform(self) -> Transform:
        """Bijection from the real numbers."""
        interval = _interval(self.constraint)
        if self.softness is None or interval is None:
            return biject_to(self.constraint)
        soft = SoftClip(interval.lower_bound, interval.upper_bound, self.softness)
        return IndependentTransform(soft, self.constraint.event_dim)

    def unconstrained_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of z for data of ``event_shape``."""
        return self.transform.inverse_shape(event_shape)

    def data_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a datum for unconstrained points of ``event_shape``."""
        return self.transform.forward_shape(event_shape)

    def constrain(self, z: Real) -> Real:
        """Return x = T(z) in the support."""
        return self.transform(z)

    def unconstrain(self, x: Real) -> Real:
        """Return z with T(z) = x."""
        return self.transform.inv(x)

    def log_abs_det_jacobian(self, z: Real, x: Real) -> Array:
        """Return ``log |det dT/dz|``; ``log p(x) = log p(z) - log |det dT/dz|``."""
        return self.transform.log_abs_det_jacobian(z, x)

    def check(self, data: Array, name: str = "data") -> None:
        """Raise unless all rows lie inside the support.

        Raises:
            ValueError: for rows outside, or on its boundary.
        """
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

    def check_single_numbers(self, subject: str) -> None:
        """Raise unless each unconstrained coordinate is that of one number.

        Args:
            subject: beginning of the message, such as "`condition` needs".

        Raises:
            TypeError: for supports that mix numbers, such as the simplex.
        """
        if base_constraint(self.constraint).event_dim > 0:
            raise TypeError(
                f"{subject} a support of single numbers, such as positive: the "
                f"unconstrained coordinates of {self.name} are mixtures of several "
                "numbers. Observe the numbers in a NumPyro model and use ScoreSDE."
            )

    def _key(self) -> tuple:
        return constraint_key(self.constraint), self.softness

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Support) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def constraint_key(constraint: Any) -> tuple:
    """Return a hashable description of a constraint, by its numbers' values.

    Example:
        >>> first, again = (constraints.interval(0.0, jnp.ones(2)) for _ in range(2))
        >>> constraint_key(first) == constraint_key(again)
        True
    """
    leaves, structure = jax.tree.flatten(constraint)
    values = tuple((np.shape(x), np.asarray(x).tobytes()) for x in leaves)
    return str(structure), values


def base_constraint(constraint: Any) -> Any:
    """Return a constraint without what makes it one event.

    Example:
        >>> base_constraint(constraints.independent(constraints.positive, 1))
        Positive(lower_bound=0.0)
    """
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def constraint_name(constraint: Any) -> str:
    """Return the name of a constraint, without what makes it one event.

    Example:
        >>> constraint_name(constraints.independent(constraints.positive, 1))
        'Positive'
    """
    return type(base_constraint(constraint)).__name__.strip("_")


def _interval(constraint: Any) -> Any:
    """Return the interval that constrains single numbers of a datum, or None."""
    constraint = base_constraint(constraint)
    is_interval = isinstance(constraint, constraints.interval)
    return constraint if is_interval and not constraint.is_discrete else None


def check_constraint(constraint: Any) -> None:
    """Raise unless ``constraint`` is a constraint of NumPyro on continuous data.

    Raises:
        TypeError: otherwise.
    """
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
