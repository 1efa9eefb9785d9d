"""Affine map between physical units and the unit scale of the noise processes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.typing import Position

SAFE_SQUARES = 1e-15, 1e15  # widths whose squares, and sums of them, float32 holds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    r"""Map x = loc + scale u between data x and standardized points u.

    Args:
        loc: mean in physical units, shape ``event_shape``.
        scale: positive scale in physical units, shape ``event_shape``.

    Example:
        >>> data = jnp.array([[0.0, 1.0], [2.0, 5.0]])
        >>> Affine.per_dimension(data).scale
        Array([1., 2.], dtype=float32)
    """

    loc: Float[Array, "*event"]
    scale: Float[Array, "*event"]

    @classmethod
    def identity(cls, event_shape: tuple[int, ...]) -> "Affine":
        """Return the map with loc 0 and scale 1."""
        return cls(jnp.zeros(event_shape), jnp.ones(event_shape))

    @classmethod
    def from_range(
        cls, low: float, high: float, event_shape: tuple[int, ...]
    ) -> "Affine":
        """Return the map of [low, high] to [-1, 1], as images are usually scaled.

        Raises:
            ValueError: unless low < high, both finite.

        Example:
            >>> Affine.from_range(0.0, 255.0, (2,)).forward(jnp.array([0.0, 255.0]))
            Array([-1.,  1.], dtype=float32)
        """
        if not -np.inf < low < high < np.inf:
            raise ValueError(
                "`low` and `high` must satisfy low < high and be finite: they are the "
                f"ends of the data's range. Got {low}, {high}."
            )
        loc, scale = (low + high) / 2, (high - low) / 2
        return cls(jnp.full(event_shape, loc), jnp.full(event_shape, scale))

    @classmethod
    def per_dimension(cls, data: Float[Array, "rows *event"]) -> "Affine":
        """Return the map to mean 0 and sd 1 of every number of a point, for tables.

        Raises:
            ValueError: if a column is constant, since its scale is zero.
        """
        # not `std == 0`: rounding often makes the std of a constant positive
        constant = np.argwhere(widths(data) == 0)
        if len(constant):
            raise ValueError(
                "`data` must vary in every column: a constant has no density and no "
                "scale. Drop it, or pass `standardize=Affine.shared` to use one scale "
                f"for all. Constant columns: {constant.squeeze(-1).tolist()[:10]}."
                if constant.shape[-1] == 1
                else "`data` must vary in every number of a point. Pass "
                "`standardize=Affine.shared` to use one scale for all. "
                f"Constant positions: {constant.tolist()[:10]}."
            )
        return cls(*moments(data))

    @classmethod
    def shared(cls, data: Float[Array, "rows *event"]) -> "Affine":
        """Return the map to mean 0 of every number and one sd 1 of all, for images.

        Raises:
            ValueError: if all rows are equal, since the scale is zero.
        """
        if not widths(data).any():
            raise ValueError(
                "`data` must vary: all rows are equal, so there is nothing to learn. "
                f"Got {len(data)} equal rows."
            )
        loc, scale = moments(data)
        largest = jnp.maximum(scale.max(), jnp.finfo(scale.dtype).tiny)
        shared = largest * jnp.sqrt(jnp.mean(jnp.square(scale / largest)))
        return cls(loc, jnp.full(loc.shape, shared, loc.dtype))

    @classmethod
    def context(cls, rows: Float[Array, "rows *event"]) -> "Affine":
        """Return the map to mean 0 and sd 1 of every number that is not constant.

        Constant numbers get the scale 1: they carry no information.
        """
        loc, scale = moments(rows)
        return cls(loc, jnp.where(widths(rows) == 0, 1.0, scale))

    def forward(self, x: Position) -> Position:
        """Return u = (x - loc) / scale."""
        return (x - self.loc) / self.scale

    def inverse(self, u: Position) -> Position:
        """Return x = loc + scale u."""
        return self.loc + self.scale * u

    def log_abs_det_jacobian(self) -> Float[Array, ""]:
        """Return -sum(log scale), the log Jacobian determinant of u in x."""
        return -jnp.log(self.scale).sum()

    def check(self, name: str) -> None:
        """Raise unless numbers on the unit scale can be told from physical ones.

        Args:
            name: whose scale it is, for the message.

        Raises:
            ValueError: for a scale that is not positive and finite.
        """
        tiny = jnp.finfo(self.scale.dtype).tiny  # below it devices round to zero
        is_usable = jnp.isfinite(self.loc) & jnp.isfinite(self.scale)
        if not (is_usable & (self.scale >= tiny)).all():
            ends = f"{self.scale.min()} to {self.scale.max()}"
            raise ValueError(
                f"`{name}` must have a mean and a positive scale that fit "
                f"{self.scale.dtype}: what is learned lives on the unit scale. Use "
                f"other units. Got scales from {ends}."
            )


def moments(
    rows: Float[Array, "rows *event"] | np.ndarray,
) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
    """Return mean and sd of every number, also where squares overflow.

    Example:
        >>> [f"{m:.1e}" for m in moments(jnp.array([-3e30, 3e30]))]
        ['0.0e+00', '3.0e+30']
    """
    width, (small, large) = widths(rows), SAFE_SQUARES
    if ((width == 0) | ((width > small) & (width < large))).all():
        return jnp.mean(rows, axis=0), jnp.std(rows, axis=0)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
        exact = np.asarray(rows, np.float64)
        mean = np.asarray(exact.mean(0), width.dtype)
        sd = np.asarray(exact.std(0), width.dtype)
    # differences that overflow leave no unit scale
    return jnp.asarray(mean), jnp.asarray(np.where(np.isfinite(width), sd, np.inf))


def widths(rows: Any) -> np.ndarray:
    """Return largest less smallest of every number, inf where that overflows.

    Example:
        >>> widths(np.array([[0.0, 1.0], [2.0, 1.0]]))
        array([2., 0.])
    """
    with np.errstate(over="ignore"):
        return np.asarray(np.ptp(np.asarray(rows), axis=0))
