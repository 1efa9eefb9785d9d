r"""Denoisers of functions trained elsewhere that predict x_0, noise, v or velocity.

A function of one point :math:`x_t = \alpha x_0 + \sigma n` and its time estimates one
combination of x_0 and n; with x_t it gives both, and the score :math:`-n/\sigma`
(:mod:`numpyro_score.sde.tweedie`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.checks import check_callable, check_rows_finite, is_traced
from numpyro_score.data.standardize import Affine
from numpyro_score.reprs import short_repr
from numpyro_score.score.denoiser import check_output
from numpyro_score.sde import SDE
from numpyro_score.sde.discrete import DiscreteVP
from numpyro_score.typing import Position, Scalar, Time

Split = tuple[Position, Position]
NUM_CHECKED = 512  # rows of `data` whose mean squared error is computed
# to the best linear denoiser's error, of which sampling noise of 512 rows is below
# 19 %, three relative sd of a mean of squared normals: 3 (2 / 512)^1/2
MAX_ERROR_RATIO = 2.0
# of the slope of the noise on its prediction from 1, beyond four standard errors: a
# wrong sign, order of steps, time or level is farther off at some level (the cases of
# tests/score/test_foreign_scores.py), a net that shrinks its prediction by a tenth not
MAX_SLOPE_ERROR, NUM_ERRORS = 0.2, 4.0
MIN_CHECKED = 32  # rows, with fewer the standard error is itself a guess
# of the sd of the data: noise far below it, with it, and far above it
CHECKED_LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def split_data(x: Position, output: Position, t: Time, sde: SDE) -> Split:
    """Return x_0 and n of an estimate of x_0."""
    alpha, sigma = sde.marginal(t)
    return output, (x - alpha * output) / sigma


def split_noise(x: Position, output: Position, t: Time, sde: SDE) -> Split:
    """Return x_0 and n of an estimate of n (Ho et al. 2020, eq. 15)."""
    alpha, sigma = sde.marginal(t)
    return (x - sigma * output) / alpha, output


def split_v(x: Position, output: Position, t: Time, sde: SDE) -> Split:
    """Return x_0 and n of v = alpha n - sigma x_0 (Salimans and Ho 2022, app. D)."""
    alpha, sigma = sde.marginal(t)
    square = alpha**2 + sigma**2
    return (alpha * x - sigma * output) / square, (sigma * x + alpha * output) / square


def split_velocity(x: Position, output: Position, t: Time, sde: SDE) -> Split:
    """Return x_0 and n of dx/dt = alpha' x_0 + sigma' n, the probability flow."""
    t = jnp.asarray(t, float)
    (alpha, sigma), rate = jax.jvp(sde.marginal, (t,), (jnp.ones_like(t),))
    determinant = alpha * rate.sigma - sigma * rate.alpha
    x0 = (rate.sigma * x - sigma * output) / determinant
    return x0, (alpha * output - rate.alpha * x) / determinant


@runtime_checkable
class NoiseInput(Protocol):
    """Rule that passes a noise level to a function: by time, step or level."""

    def __call__(self, call: Callable, t: Time, sde: SDE) -> Position:
        """Return the function's output at a time of the process."""


@dataclass(frozen=True)
class TimeInput:
    """The function takes the time t of the process."""

    def __call__(self, call: Callable, t: Time, sde: SDE) -> Position:
        """Return the output at t."""
        return call(t)


@dataclass(frozen=True)
class NoiseLevelInput:
    """The function takes the noise level sigma/alpha."""

    def __call__(self, call: Callable, t: Time, sde: SDE) -> Position:
        """Return the output at the level of t."""
        return call(sde.noise_level(t))


@dataclass(frozen=True)
class TimestepInput:
    """The function takes steps of a table of betas, counted from 0.

    Args:
        integer: whether it takes integer steps only. Then a time between two steps
            costs two evaluations, interpolated linearly in the noise level.
    """

    integer: bool = True

    def __call__(self, call: Callable, t: Time, sde: SDE) -> Position:
        """Return the output at the step of t."""
        assert isinstance(sde, DiscreteVP)
        if not self.integer:
            return call(sde.step(t))
        low, weight = sde.bracket(t)
        return (1 - weight) * call(low) + weight * call(low + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FnDenoiser:
    """Denoiser of a function that estimates a combination of x_0 and noise.

    Args:
        fn: (x_t, time) or (x_t, time, context) -> estimate, as a
            :class:`jax.tree_util.Partial`, whose bound arrays are leaves.
        split: (x_t, estimate, t, sde) -> (x_0, n).
        noise_input: what the function takes as time.
        sde: the process of x_t.
    """

    fn: Callable
    split: Callable = field(metadata={"static": True})
    noise_input: NoiseInput = field(metadata={"static": True})
    sde: SDE = field(metadata={"static": True})

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return D(x, level) for one point x_t / alpha."""
        return self._split(x, level, context)[0]

    def score_standardized(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return the score -n / level at x = x_t / alpha, without cancellation."""
        return -self._split(x, level, context)[1] / level

    def _split(self, x: Position, level: Scalar, context: Array | None) -> Split:
        t = self.sde.time(level)
        x_t = self.sde.alpha(t) * x

        def call(time: Any) -> Position:
            given = () if context is None else (context,)
            return call_function(self.fn, x_t, time, *given)

        return self.split(x_t, self.noise_input(call, t, self.sde), t, self.sde)

    def summary(self) -> dict[str, str]:
        """Return lines of the repr: the name of the function and what it predicts."""
        fn = getattr(self.fn, "func", self.fn)
        kind = self.split.__name__.removeprefix("split_")
        return {"function": short_repr(fn), "predicts": kind}


def batch_of_one(fn: Callable) -> Callable:
    """Return a function of one point from one of batches, as most nets are.

    Example:
        >>> double = batch_of_one(lambda x, t: 2 * x * t[:, None])
        >>> double(jnp.ones(2), jnp.array(3.0))
        Array([6., 6.], dtype=float32)
    """
    return jax.tree_util.Partial(_first_of_one, as_partial(fn))


def as_partial(fn: Callable) -> Callable:
    """Return a function as a pytree, whose leaves are the arrays that it is bound to.

    Example:
        >>> jax.tree.leaves(as_partial(jnp.sin))
        []
    """
    is_pytree = isinstance(fn, jax.tree_util.Partial)
    return fn if is_pytree else jax.tree_util.Partial(fn)


def _first_of_one(fn: Callable, *args: Any) -> Position:
    output = call_function(fn, *(jnp.asarray(arg)[None] for arg in args))
    expected = (1, *jnp.shape(args[0]))
    if getattr(output, "shape", expected[:1]) != expected:
        shape = getattr(output, "shape", None)
        raise ValueError(
            "`fn` must return an array of the shape of its batch of points: the result "
            "of a net with several outputs is taken apart by a function around it, "
            "such as `lambda x, t: net(x, t).sample`. "
            f"Got {type(output).__name__ if shape is None else shape}, "
            f"expected {expected}."
        )
    return output[0]


def call_function(fn: Callable, *args: Any) -> Any:
    """Return what a function does; an error in it says what it was called with.

    Example:
        >>> float(call_function(jnp.add, 1.0, 2.0))
        3.0
    """
    inner = getattr(fn, "func", fn)
    if inner is _first_of_one or isinstance(inner, HostFunction):  # errors of their own
        return fn(*args)
    try:
        return fn(*args)
    except (TypeError, ValueError, IndexError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        shapes = ", ".join(str(jnp.shape(arg)) for arg in args)
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise kind(
            "`fn` must be a function in JAX of one point, its time and, if there is "
            "one, its context: it is evaluated in compiled programs. A function of "
            "batches is wrapped by numpyro_score.score.prediction.batch_of_one, one of "
            "NumPy or PyTorch by numpyro_score.score.HostFunction. Called with arrays "
            f"of shapes {shapes}, {short_repr(inner)} raised "
            f"{type(error).__name__}: {reason}"
        ) from error


@dataclass(frozen=True)
class HostFunction:
    """A function of NumPy arrays, such as one that calls PyTorch, inside of programs.

    Points of a batch reach it together. It has no derivatives: samplers that
    differentiate the denoiser (:class:`~numpyro_score.ScoreSDE`, ``log_prob``, NUTS)
    raise; solvers and ``ScoreLangevin``, which need values only, work.

    Args:
        fn: (points of shape ``(batch,) + event_shape``, times of shape ``(batch,)``)
            -> array of the shape of the points.

    Raises:
        ValueError: when called, for an output of another shape.
        TypeError: when a program differentiates it.

    Example:
        >>> double = HostFunction(lambda x, t: 2 * x * t[:, None])
        >>> double(jnp.ones(2), jnp.array(3.0))
        Array([6., 6.], dtype=float32)
    """

    fn: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def __post_init__(self) -> None:
        check_callable("fn", self.fn, "a function of points and times")

    def __call__(self, x: Position, t: Any) -> Position:
        """Return the function's value at one point, by a callback."""
        return _call_host(self.fn, x, jnp.asarray(t))

    @property
    def __name__(self) -> str:
        return f"HostFunction({short_repr(self.fn)})"


def _evaluate_host(fn: Callable, event_dim: int, x: Any, t: Any) -> np.ndarray:
    points = np.array(x)  # copies: functions may write into them
    rows = points.reshape(-1, *points.shape[points.ndim - event_dim :])
    output = fn(rows, np.array(t).reshape(-1))
    value = np.asarray(output)
    if value.dtype.kind not in "iuf":
        raise TypeError(
            "`fn` must return one array of real numbers: it estimates points. "
            f"Got a {type(output).__name__} of type {value.dtype}."
        )
    if value.shape != rows.shape:
        raise ValueError(
            "`fn` must return the shape of its points: one number per coordinate. "
            f"Got {value.shape}, expected {rows.shape}."
        )
    return value.astype(points.dtype).reshape(points.shape)


def _host_call(fn: Callable, x: Position, t: Array) -> Position:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def host(x: Any, t: Any) -> np.ndarray:
        return _evaluate_host(fn, len(shape.shape), x, t)

    return jax.pure_callback(host, shape, x, t, vmap_method="broadcast_all")


_call_host = jax.custom_jvp(_host_call, nondiff_argnums=(0,))


@_call_host.defjvp
def _refuse_derivative(fn: Callable, primals: tuple, tangents: tuple) -> Any:
    raise TypeError(
        "A HostFunction has no derivative: it runs outside of JAX. Use a sampler that "
        "needs values of the score only, such as `score.sample` or ScoreLangevin, or "
        f"write the function in JAX. Got {short_repr(fn)}."
    )


def check_finite(denoiser: FnDenoiser, event_shape: tuple[int, ...]) -> None:
    """Raise unless a function maps points to finite arrays of the event shape.

    At 0 and at a draw of x_t for standard normal data, of both signs, at the lowest,
    the middle and the highest noise level.

    Raises:
        TypeError: for another type.
        ValueError: for another shape, for NaN or infinity.
    """
    low, high = denoiser.sde.sigma_min, denoiser.sde.sigma_max
    draw = jax.random.normal(jax.random.key(0), event_shape)  # any
    is_host = isinstance(getattr(denoiser.fn, "func", None), HostFunction)
    evaluate = _raw_output if is_host else jax.jit(_raw_output)
    for level in (low, (low * high) ** 0.5, high):
        t = denoiser.sde.time(jnp.asarray(level, float))
        alpha, sigma = denoiser.sde.marginal(t)
        sd = jnp.sqrt(alpha**2 + sigma**2)
        for name, factor in (("0", 0.0), ("a normal draw", sd), ("a normal draw", -sd)):
            output = evaluate(denoiser, factor * draw, t)
            if not is_traced(output) and not jnp.isfinite(output).all():
                raise ValueError(
                    "`fn` must be finite: it is evaluated at every noise level. Got "
                    f"NaN or infinity at x_t = {name}, noise level {level:.4g}."
                )


def _raw_output(denoiser: FnDenoiser, x: Position, t: Scalar) -> Any:
    """Return the function's output at a time, whose type and shape are right."""
    host = getattr(denoiser.fn, "func", None)

    def call(time: Any) -> Any:
        if isinstance(host, HostFunction):  # at once: errors in programs are obscure
            return jnp.asarray(_evaluate_host(host.fn, x.ndim, x, time))
        output = call_function(denoiser.fn, x, time)
        check_output(output, x.shape, "fn")
        return output

    return denoiser.noise_input(call, t, denoiser.sde)


class NoisyData(NamedTuple):
    """A noise level, and the denoised data with this noise."""

    level: Array
    clean: Array


def _denoise_data(
    denoiser: Callable, sde: SDE, u: Array, noise: Array, factors: Sequence[float]
) -> Iterator[NoisyData]:
    """Yield standardized data with noise of so many of their sds, denoised."""
    scale = jnp.sqrt(jnp.square(u - u.mean(0)).mean())
    denoise = jax.jit(jax.vmap(denoiser, in_axes=(0, None)))
    for factor in factors:
        level = jnp.clip(factor * scale, sde.sigma_min, sde.sigma_max)
        clean = denoise(u + level * noise, level)
        if not is_traced(clean) and not jnp.isfinite(clean).all():
            count = int((~jnp.isfinite(clean)).reshape(len(u), -1).any(1).sum())
            raise ValueError(
                "`fn` must be finite at `data` with noise. Got NaN or infinity at "
                f"noise level {level:.3g} for {count} of {len(u)} rows."
            )
        yield NoisyData(level, clean)


def _draw_noise(u: Array) -> Array:
    return jax.random.normal(jax.random.key(0), u.shape)  # any noise will do


def _some_rows(rows: np.ndarray) -> Array:
    """Return rows at random: data may be sorted."""
    order = np.random.default_rng(0).permutation(len(rows))
    return jnp.asarray(rows[order[:NUM_CHECKED]], float)


def check_data_scale(denoiser: FnDenoiser, standardize: Affine, data: Any) -> None:
    """Raise where a function removes noise from data worse than a line would.

    At the noise levels 1/4, 1 and 4 of the standardized data's sd. The best denoiser
    linear in x_t has the mean squared error v r^2 / (v + r^2) for data of variance v; a
    trained function whose error is twice that was trained on data of another scale.

    Raises:
        ValueError: for such a function, or data of another shape.
    """
    rows = np.asarray(data)
    if rows.ndim < 1 or rows.shape[1:] != standardize.loc.shape or len(rows) < 2:
        raise ValueError(
            "`data` must have one datum of the event shape per row, at least 2. "
            f"Got {rows.shape}, event shape {standardize.loc.shape}."
        )
    check_rows_finite("data", rows)
    u = standardize.forward(_some_rows(rows))
    variance = jnp.square(u - u.mean(0)).mean()
    if not variance > 0:
        raise ValueError(
            "`data` must vary: its sd tells whether `fn` was trained on its scale. "
            f"Got {len(rows)} equal rows."
        )
    # below, at and above the scale of the data, where a linear map leaves 6, 50, 94 %
    noise, factors = _draw_noise(u), (0.25, 1.0, 4.0)
    for level, clean in _denoise_data(denoiser, denoiser.sde, u, noise, factors):
        error = jnp.square(clean - u).mean()
        linear = variance * level**2 / (variance + level**2)
        if not error < MAX_ERROR_RATIO * linear:
            raise ValueError(
                "`standardize` must map data to the scale that `fn` was trained on, "
                "such as [-1, 1]: on this data it removes noise worse than a linear "
                f"map does. Got a mean squared error of {error:.3g} at noise level "
                f"{level:.3g}, of a linear map {linear:.3g}; mapped data have mean "
                f"{u.mean():.3g} and sd {variance**0.5:.3g}."
            )


def check_predicted_noise(
    denoiser: Any, sde: SDE, standardize: Affine, data: Any
) -> None:
    r"""Raise where a function predicts more or less noise than data have.

    The best prediction of the noise n in :math:`x_t = \alpha x_0 + \sigma n` is its
    conditional mean, on which n has the slope :math:`E[n \hat n] / E[\hat n^2] = 1`
    whatever the data. Another sign, scale, table of betas or order of steps has another
    slope. Each row gets noise n and -n: what n has in common with the row by chance
    cancels. Fewer than 32 rows say nothing of it.

    Raises:
        ValueError: naming the noise level and the slope.
    """
    u = standardize.forward(_some_rows(np.asarray(data)))
    if len(u) < MIN_CHECKED:
        return
    one = _draw_noise(u)
    pairs, noise = jnp.concatenate([u, u]), jnp.concatenate([one, -one])
    for level, clean in _denoise_data(denoiser, sde, pairs, noise, CHECKED_LEVELS):
        predicted = (pairs + level * noise - clean) / level
        product, square = (
            x.reshape(2, len(u), -1).sum((0, 2))
            for x in (noise * predicted, predicted**2)
        )
        slope = product.sum() / square.sum()
        error = jnp.sqrt(jnp.square(product - slope * square).sum()) / square.sum()
        if not abs(slope - 1) < MAX_SLOPE_ERROR + NUM_ERRORS * error:
            raise ValueError(
                "`fn` must predict the noise in `data`: its sign, the table of betas, "
                "the order of steps, the noise level it is given or `standardize` does "
                f"not fit. At noise level {level:.3g} the noise in data is {slope:.2f} "
                f"+- {error:.2g} times its prediction; expected 1."
            )
