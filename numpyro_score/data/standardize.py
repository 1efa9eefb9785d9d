"""Affine map between physical units and the unit scale of the noise processes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import check_shape, is_real, is_traced
from numpyro_score.typing import Position

# converted to float64 at a time: bounds memory to 32 kB for each number of a row
BLOCK_ROWS = 4096
# The sd of a normal law is the interquartile range over this, 2 z with Phi(z) = 3/4.
NORMAL_IQR = 1.3489795
# At this ratio of sd to scaled interquartile range the lowest noise level, .01 sd, is a
# twentieth of the width of the bulk. Student's t of 3 degrees of freedom has 1.5.
HEAVY_TAIL = 5.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    r"""Map x = loc + scale u between data x and standardized points u.

    Args:
        loc: mean in physical units, shape ``event_shape``.
        scale: positive scale in physical units, shape ``event_shape``. What takes the
            map checks it by :meth:`check`: a pytree may hold anything.

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
        event_shape = check_shape("event_shape", event_shape)
        are_real = is_real(low) and is_real(high)
        if not are_real or not -np.inf < low < high < np.inf:
            raise ValueError(
                "`low` and `high` must satisfy low < high and be finite: they are the "
                f"ends of the data's range. Got {low}, {high}."
            )
        loc, scale = (low + high) / 2, (high - low) / 2
        return cls(jnp.full(event_shape, loc), jnp.full(event_shape, scale))

    @classmethod
    def per_dimension(cls, data: Float[Array, "rows *event"]) -> "Affine":
        """Return the map to mean 0 and sd 1 of every number of a point, for tables.

        Columns with heavy tails are mapped to median 0 and the interquartile range of
        the normal law instead, with a warning that names them.

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
        return cls(*_robust_moments(data))

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

    def recentered(self, u: Position) -> "Affine":
        """Return the map of the same scale that has a standardized point as origin."""
        return Affine(self.inverse(u), self.scale)

    def log_abs_det_jacobian(self) -> Float[Array, ""]:
        """Return -sum(log scale), the log Jacobian determinant of u in x."""
        return -jnp.log(self.scale).sum()

    def check(self, name: str) -> None:
        """Raise unless the map is finite, with a scale above 0.

        Args:
            name: whose scale it is, for the message.

        Raises:
            ValueError: for a scale that is not positive and finite, or arrays of other
                types and shapes.
        """
        self._check_arrays(name)
        if is_traced(self.loc, self.scale):
            return
        tiny = jnp.finfo(self.scale.dtype).tiny  # below it devices round to zero
        is_usable = jnp.isfinite(self.loc) & jnp.isfinite(self.scale)
        if not (is_usable & (self.scale >= tiny)).all():
            ends = f"{self.scale.min()} to {self.scale.max()}"
            raise ValueError(
                f"`{name}` must have a mean and a positive scale that fit "
                f"{self.scale.dtype}: what is learned lives on the unit scale. Use "
                f"other units. Got scales from {ends}."
            )

    def _check_arrays(self, name: str) -> None:
        """Raise unless both are arrays of floating-point numbers, of one shape."""
        kinds = [str(getattr(x, "dtype", type(x))) for x in (self.loc, self.scale)]
        are_arrays = all(
            hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
            for x in (self.loc, self.scale)
        )
        if not are_arrays or self.loc.shape != self.scale.shape:
            raise ValueError(
                f"`{name}` must have `loc` and `scale` that are arrays of "
                "floating-point numbers of one shape: one number each for every "
                f"number of a point. Got {' and '.join(kinds)}, shapes "
                f"{np.shape(self.loc)} and {np.shape(self.scale)}."
            )


def moments(
    rows: Float[Array, "rows *event"] | np.ndarray,
) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
    """Return mean and sd of every number, computed in float64.

    Example:
        >>> [f"{m:.1e}" for m in moments(jnp.array([-3e30, 3e30]))]
        ['0.0e+00', '3.0e+30']
    """
    width = widths(rows)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
        mean, sd = (np.asarray(part, width.dtype) for part in exact_moments(rows))
    # differences that overflow leave no unit scale
    return jnp.asarray(mean), jnp.asarray(np.where(np.isfinite(width), sd, np.inf))


def exact_moments(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and sd of every number in float64, with little extra memory.

    Args:
        rows: an array of any type of numbers with one datum per row.

    Example:
        >>> exact_moments(np.array([1.7e9 - 30, 1.7e9 + 30]))[1].tolist()
        30.0
    """
    rows = np.asarray(rows)
    mean = np.mean(rows, axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(rows), BLOCK_ROWS):
        squares += np.square(rows[start : start + BLOCK_ROWS] - mean).sum(0)
    return np.asarray(mean), np.asarray(np.sqrt(squares / len(rows)))


def _robust_moments(
    rows: Float[Array, "rows *event"],
) -> tuple[Float[Array, "*event"], Float[Array, "*event"]]:
    """Return mean and sd, or median and scaled interquartile range for heavy tails."""
    mean, sd = moments(rows)
    exact = np.asarray(rows, np.float64)
    median, iqr, heavy = heavy_tails(exact, np.asarray(sd))
    if not heavy.any():
        return mean, sd
    extreme = (np.abs(exact - median).max(0)[heavy] / iqr[heavy]).max()
    warn_caller(
        "`data` has columns with heavy tails, whose sd measures a few extreme rows: "
        "they are scaled by their interquartile range instead, so that noise levels "
        "fit the bulk. Tails beyond the largest noise level are not learned: transform "
        "these columns, by a logarithm or arcsinh, to learn them. Columns "
        f"{np.flatnonzero(heavy)[:10].tolist()}, extremes {extreme:.3g} scales away."
    )
    return (
        jnp.where(heavy, jnp.asarray(median, mean.dtype), mean),
        jnp.where(heavy, jnp.asarray(iqr, sd.dtype), sd),
    )


def heavy_tails(
    rows: Float[np.ndarray, "rows *event"], sd: Float[np.ndarray, "*event"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return medians, scaled interquartile ranges, and where tails are heavy.

    Tails are heavy where the sd is more than five times the interquartile range over
    1.349, which is the sd of a normal law: the sd then measures a few extreme rows, as
    for Cauchy variables, for which it grows with the number of rows.

    Args:
        rows: data, of which NaN are left out.
        sd: their standard deviations.

    Example:
        >>> rows = np.append(np.linspace(-1.0, 1.0, 99), 1e6)[:, None]
        >>> median, iqr, heavy = heavy_tails(rows, rows.std(0))
        >>> iqr.round(2), heavy
        (array([0.75]), array([ True]))
    """
    low, median, high = np.nanquantile(rows, [0.25, 0.5, 0.75], axis=0)
    iqr = (high - low) / NORMAL_IQR
    heavy = (iqr > 0) & np.isfinite(sd) & (sd > HEAVY_TAIL * iqr)
    return np.asarray(median), np.asarray(iqr), np.asarray(heavy)


def widths(rows: Any) -> np.ndarray:
    """Return largest less smallest of every number, inf where that overflows.

    Example:
        >>> widths(np.array([[0.0, 1.0], [2.0, 1.0]]))
        array([2., 0.])
    """
    with np.errstate(over="ignore"):
        return np.asarray(np.ptp(np.asarray(rows), axis=0))
