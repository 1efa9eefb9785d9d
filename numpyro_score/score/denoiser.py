"""Denoisers of standardized data: a preconditioned net, or a given score function."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import check_numbers
from numpyro_score.data.context_scale import ContextMap
from numpyro_score.reprs import count_weights, short_repr
from numpyro_score.score.gaussian_baseline import GaussianBaseline
from numpyro_score.score.preconditioning import (
    BoundedScore,
    Parametrization,
    precondition,
)
from numpyro_score.sde import SDE
from numpyro_score.sde.tweedie import denoised_from_score
from numpyro_score.typing import Position, Real, Scalar, ScoreFn


def denoise_normal(
    x: Position, levels: Position, covariance: Float[Array, "size size"]
) -> Position:
    r"""Return E[x_0 | x] for :math:`x_0 \sim N(0, \Sigma)` and noise of given levels.

    :math:`x - S (\Sigma + S)^{-1} x` with S the diagonal of squared levels, solved with
    rows and columns scaled to a unit diagonal.

    Example:
        >>> denoise_normal(jnp.array([4.0]), jnp.array([0.0]), jnp.eye(1)).tolist()
        [4.0]
    """
    variance = jnp.square(jnp.ravel(levels))
    unit = 1 / jnp.sqrt(jnp.diag(covariance) + variance)
    scaled = unit[:, None] * (covariance + jnp.diag(variance)) * unit
    factor = jax.scipy.linalg.cho_factor(scaled, lower=True)
    solved = unit * jax.scipy.linalg.cho_solve(factor, unit * jnp.ravel(x))
    return x - (variance * solved).reshape(x.shape)


@runtime_checkable
class DirectScore(Protocol):
    """A denoiser that evaluates its score directly."""

    def score_standardized(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return the score at one standardized point x_t / alpha."""


@runtime_checkable
class EnergyDenoiser(Protocol):
    """A denoiser whose score may be the gradient of an energy."""

    @property
    def has_energy(self) -> bool:
        """True if :meth:`energy` can be evaluated."""

    def energy(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Float[Array, ""]:
        """Return -log p_r(x) + const at one standardized point x_t / alpha."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NetDenoiser:
    """Denoiser of standardized data, from a preconditioned NNX net.

    ``compute_dtype`` is the type that the net computes in, None for that of its
    weights; the result has the type of x. ``linear_baseline``, of shape (context size,
    size of x), holds coefficients B of a linear prediction of x_0 from the standardized
    context c: the net denoises x - c B, and the prediction is added to its result. With
    a ``gaussian_baseline`` the net's output is added to the denoiser of a normal law.
    ``min_level`` is None for a net that takes one level. For one that takes a level per
    coordinate it is the lowest that the net gets as input, in place of lower ones; with
    a ``covariance`` the net then estimates the difference from the denoiser of the
    normal law with mean 0 and this covariance. ``measured_level`` is the level in use
    (:mod:`numpyro_score.score.level`) that was saved with the net; it goes with the
    net, so that scores of other denoisers are measured anew.
    """

    params: Any
    graphdef: Any = field(metadata={"static": True})  # of Flax NNX
    standardize_context: ContextMap | None = None
    config: Any = field(default=None, metadata={"static": True})
    parametrization: Parametrization = field(
        default=BoundedScore(), metadata={"static": True}
    )
    compute_dtype: Any = field(default=None, metadata={"static": True})
    linear_baseline: Array | None = None
    gaussian_baseline: GaussianBaseline | None = None
    min_level: float | None = field(default=None, metadata={"static": True})
    covariance: Array | None = None
    measured_level: float | None = field(default=None, metadata={"static": True})

    @property
    def per_coordinate(self) -> bool:
        """True if levels may have the shape of a point."""
        return self.min_level is not None

    def __call__(
        self, x: Position, level: Real | float, context: Array | None = None
    ) -> Position:
        """Return D(x, level) for one standardized point x_t / alpha.

        With ``min_level``, ``level`` is one for all coordinates or one per coordinate,
        where 0 says that x_0 = x.
        """
        if self.min_level is not None:
            return self._per_coordinate(x, level, self.min_level, context)

        def net_fn(x: Position, noise: Any) -> Any:
            return self.raw(self.params, x, noise, context)

        predicted = self.baseline(x, context)
        residual, c = x - predicted, self.parametrization
        if self.gaussian_baseline is None:
            return predicted + precondition(net_fn, residual, level, c)
        return predicted + self.gaussian_baseline.denoise(net_fn, residual, level, c)

    def _per_coordinate(
        self,
        x: Position,
        level: Real | float,
        min_level: float,
        context: Array | None,
    ) -> Position:
        """Return D(x, levels) by coefficients of each coordinate's own level."""
        levels = jnp.broadcast_to(jnp.asarray(level, x.dtype), x.shape)
        noise = self.parametrization(jnp.maximum(levels, min_level)).noise
        predicted = self.baseline(x, context)
        residual = precondition(
            lambda x, _: self.raw(self.params, x, noise, context),
            x - predicted,
            levels,
            self.parametrization,
        )
        if self.covariance is not None:
            skipped = self.parametrization(levels).skip * x
            residual += denoise_normal(x, levels, self.covariance) - skipped
        return jnp.where(levels == 0, x, predicted + residual)

    def baseline(self, x: Position, context: Array | None) -> Real:
        """Return the linear prediction of x_0 from a context, or 0."""
        if self.linear_baseline is None or context is None:
            return jnp.zeros((), x.dtype)
        features = jnp.ravel(self._unit_context(context))
        return (features @ self.linear_baseline).reshape(x.shape)

    def _unit_context(self, context: Any) -> Any:
        """Return a context on the unit scale, or None.

        Raises:
            ValueError: for another shape, which would be repeated, or no numbers.
        """
        if context is None or self.standardize_context is None:
            return context
        check_numbers("context", context, "what the score is conditioned on")
        expected = self.standardize_context.loc.shape
        if jnp.shape(context) != expected:
            raise ValueError(
                "`context` must have the shape that the net was trained with: it is "
                "what the score is conditioned on, one for all points. "
                f"Got {jnp.shape(context)}, expected {expected}."
            )
        return self.standardize_context.forward(jnp.asarray(context))

    def raw(
        self, params: Any, x: Position, noise: Real | float, context: Array | None
    ) -> Any:
        """Return the net's output F for a context in physical units."""
        context = self._unit_context(context)
        if self.compute_dtype is None:
            return self._net(params)(x, noise, context)
        weights, point, context = jax.tree.map(
            lambda leaf: leaf.astype(self.compute_dtype), (params, x, context)
        )
        # the noise level keeps its type: rounding it changes the sines of its embedding
        output = self._net(weights)(point, noise, context)
        return output.astype(x.dtype)

    def _net(self, params: Any) -> Any:
        from flax import nnx  # here, as it takes long and only nets need it

        return nnx.merge(self.graphdef, params)

    @property
    def has_energy(self) -> bool:
        """True if the net is the gradient of a potential that it can evaluate."""
        plain = self.gaussian_baseline is None
        return plain and hasattr(self._net(self.params), "energy")

    def energy(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Float[Array, ""]:
        r"""Return -log p_r(x) + const, in nats, from the potential of an energy net.

        :math:`(1 - c_{skip}) |x|^2 / 2r^2 + c_{out} \Phi(c_{in} x) / (c_{in} r^2)`
        """
        x = x - self.baseline(x, context)
        context = self._unit_context(context)
        c = self.parametrization(level)
        potential = self._net(self.params).energy(c.input * x, c.noise, context)
        square = jnp.square(x).sum()
        value = 0.5 * (1 - c.skip) * square + c.out / c.input * potential
        return value / jnp.square(level)

    def summary(self) -> dict[str, str]:
        """Return lines of the repr: net, number of weights and parametrization."""
        net = "a net" if self.config is None else short_repr(self.config)
        rows = {"net": f"{count_weights(self.params):,} weights in {net}"}
        if self.standardize_context is not None:
            rows["context shape"] = str(self.standardize_context.loc.shape)
        if self.per_coordinate:
            rows["net"] += ", one noise level per coordinate"
        added = ", added to a Gaussian law" if self.gaussian_baseline else ""
        return rows | {"learned as": short_repr(self.parametrization) + added}

    def check(self, point: Position, context: Array | None = None) -> None:
        """Raise unless the net maps a point to floats of its shape.

        Raises:
            TypeError: for another type.
            ValueError: for another shape.
        """
        noise = jnp.zeros(point.shape if self.per_coordinate else (), point.dtype)
        output = jax.eval_shape(self.raw, self.params, point, noise, context)
        check_output(output, point.shape, "net")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreFnDenoiser:
    """Denoiser of a given score function: D = (x + sigma^2 s) / alpha."""

    score_fn: ScoreFn = field(metadata={"static": True})
    sde: SDE = field(metadata={"static": True})

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D(x, level) from the score at x_t = alpha x.

        Raises:
            ValueError: for a context, which the function would not see.
        """
        _check_no_context(context)
        t = self.sde.time(level)
        marginal = self.sde.marginal(t)
        x_t = marginal.alpha * x
        return denoised_from_score(x_t, self.score_fn(x_t, t), marginal)

    def summary(self) -> dict[str, str]:
        """Return lines of the repr: the name of the function."""
        return {"score function": short_repr(self.score_fn)}

    def score_standardized(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return the score at x = x_t / alpha by a direct call.

        The score of D, (D - x) / level^2, loses digits at low noise, where x and D
        differ by level^2 s.
        """
        _check_no_context(context)
        t = self.sde.time(level)
        alpha = self.sde.alpha(t)
        return alpha * self.score_fn(alpha * x, t)


def _check_no_context(context: Any) -> None:
    """Raise for a context of a function of x and t."""
    if context is not None:
        raise ValueError(
            "`context` must be None: this score is a function of x_t and t alone. "
            "Use ScoreModel.from_denoiser, whose function may take a context. "
            f"Got shape {jnp.shape(context)}."
        )


def check_output(output: Any, event_shape: tuple[int, ...], name: str) -> None:
    """Raise unless a function returns one floating-point array of the event shape.

    Raises:
        TypeError: for anything but a floating-point array.
        ValueError: for another shape.
    """
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
