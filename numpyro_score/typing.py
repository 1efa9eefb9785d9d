"""Names for the arrays and functions that the package passes around.

Shapes follow jaxtyping: ``*event`` is the shape of one draw, ``*batch`` any leading
shape. Functions are written for one point and batched with ``vmap`` at the edge.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

Position = Float[Array, "*event"]
"""One point x of the sample space, shape ``event_shape``."""

Points = Float[Array, "rows *event"]
"""Points of the sample space, one per row."""

Real = Float[Array, "..."]
"""Real numbers in an array of any shape."""

Scalar = Float[Array, ""] | float
"""One real number."""

Time = Float[Array, "..."] | float
"""Diffusion time t in [0, 1]; 0 is data, 1 is noise. Processes take arrays of them."""

PRNGKey = Any
"""A JAX key, typed (``jax.random.key``) or legacy (``jax.random.PRNGKey``)."""

SiteValues = dict[str, Array]
"""Values of the sites of a model, by name."""

Params = Any
"""Weights of a net: a pytree of arrays."""

ScoreFn = Callable[[Position, Time], Position]
"""(x, t) -> the gradient of log p_t at x."""

DenoiseFn = Callable[[Position, Scalar], Position]
"""(x, noise level) -> E[x_0 | x_0 + level * noise = x]."""
