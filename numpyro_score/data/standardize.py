"""Affine map between physical units and the unit scale of the noise processes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.typing import Position


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
    def per_dimension(cls, data: Float[Array, "rows *event"]) -> "Affine":
        """Return the map to mean 0 and sd 1 of every number of a point, for tables.

        Raises:
            ValueError: if a column is constant, since its scale is zero.
        """
        # not `std == 0`: rounding often makes the std of a constant positive
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
        """Return the map to mean 0 of every number and one sd 1 of all, for images.

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
        """Return the map to mean 0 and sd 1 of every number that is not constant.

        Constant numbers get the scale 1: they carry no information.
        """
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
        """Return -sum(log scale), the log Jacobian determinant of u in x."""
        return -jnp.log(self.scale).sum()
