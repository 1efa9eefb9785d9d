"""The affine map between physical units and the unit scale that processes work in."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.typing import Position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    r"""x = loc + scale u, with u of about unit variance.

    Args:
        loc: center in physical units, shape ``event_shape``.
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
        """Leave physical units as they are."""
        return cls(jnp.zeros(event_shape), jnp.ones(event_shape))

    @classmethod
    def per_dimension(cls, data: Float[Array, "rows *event"]) -> "Affine":
        """Center and scale every number of a point by itself, as for tables.

        Raises:
            ValueError: if a column is constant, since its scale is zero.
        """
        # not `std == 0`: the std of a constant is rounding error, and often not zero
        constant = np.argwhere(np.ptp(data, axis=0) == 0)
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
        return cls(
            jnp.asarray(np.mean(data, axis=0)), jnp.asarray(np.std(data, axis=0))
        )

    @classmethod
    def shared(cls, data: Float[Array, "rows *event"]) -> "Affine":
        """Center every number by itself and scale all alike, as for images.

        Raises:
            ValueError: if all rows are equal, since the scale is zero.
        """
        if not np.ptp(data, axis=0).any():
            raise ValueError(
                "`data` must vary: all rows are equal, so there is nothing to learn. "
                f"Got {len(data)} equal rows."
            )
        loc = np.mean(data, axis=0)
        scale = np.sqrt(np.mean(np.square(data - loc)))
        return cls(jnp.asarray(loc), jnp.full(loc.shape, scale, loc.dtype))

    @classmethod
    def context(cls, rows: Float[Array, "rows *event"]) -> "Affine":
        """Center and scale every number; constant ones, which say nothing, stay."""
        scale = np.std(rows, axis=0)
        scale = np.where(np.ptp(rows, axis=0) == 0, np.ones_like(scale), scale)
        return cls(jnp.asarray(np.mean(rows, axis=0)), jnp.asarray(scale))

    def forward(self, x: Position) -> Position:
        """Return u = (x - loc) / scale."""
        return (x - self.loc) / self.scale

    def inverse(self, u: Position) -> Position:
        """Return x = loc + scale u."""
        return self.loc + self.scale * u

    def log_abs_det_jacobian(self) -> Float[Array, ""]:
        """Return -sum(log scale), the log Jacobian of u in x that densities need."""
        return -jnp.log(self.scale).sum()
