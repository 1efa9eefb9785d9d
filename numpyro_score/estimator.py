"""Denoisers of standardized data: a preconditioned net, or somebody's score."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from numpyro_score.denoiser import denoised_from_score, precondition
from numpyro_score.sde import SDE
from numpyro_score.standardize import Affine
from numpyro_score.typing import Position, Scalar, ScoreFn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NetDenoiser:
    """A preconditioned NNX net as denoiser of standardized data."""

    params: Any
    graphdef: nnx.GraphDef = field(metadata={"static": True})
    standardize_context: Affine | None = None

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D(x, level)."""
        return precondition(
            lambda x, noise: self.raw(self.params, x, noise, context), x, level
        )

    def raw(
        self, params: Any, x: Position, noise: Scalar, context: Array | None
    ) -> Any:
        """Return the net's own output F, unchecked, for a context in physical units."""
        if context is not None and self.standardize_context is not None:
            context = self.standardize_context.forward(context)
        return nnx.merge(self.graphdef, params)(x, noise, context)

    def check(self, point: Position, context: Array | None = None) -> None:
        """Raise unless the net maps a point to floats of its shape."""
        noise = jnp.zeros((), point.dtype)
        output = jax.eval_shape(self.raw, self.params, point, noise, context)
        check_output(output, point.shape, "net")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreFnDenoiser:
    """Somebody's score function as denoiser: D = (x + sigma^2 s) / alpha."""

    score_fn: ScoreFn = field(metadata={"static": True})
    sde: SDE = field(metadata={"static": True})

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D(x, level) from the score at x_t = alpha x."""
        t = self.sde.time(level)
        marginal = self.sde.marginal(t)
        x_t = marginal.alpha * x
        return denoised_from_score(x_t, self.score_fn(x_t, t), marginal)


def check_output(output: Any, event_shape: tuple[int, ...], name: str) -> None:
    """Raise unless a function returns one floating-point array of the event shape."""
    dtype = getattr(output, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must return one floating-point array: it estimates a point. "
            f"Got {dtype or type(output).__name__}."
        )
    if output.shape != event_shape:
        raise ValueError(
            f"`{name}` must return the shape of its point: one number per coordinate. "
            f"Got {output.shape}, expected {event_shape}."
        )
