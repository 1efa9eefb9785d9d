r"""Step-size bias of unadjusted Langevin chains by Richardson extrapolation.

Averages of f over a chain with step h have the bias :math:`c\, h^p` to leading order.
A second chain with step h/2, driven by the same Brownian path, has the bias
:math:`c\, (h/2)^p`. The coupling gives their difference a small variance, and

.. math:: bias(h) \approx \frac{E[f(x_h)] - E[f(x_{h/2})]}{1 - 2^{-p}} .

The estimate is local to the modes of the initial points; it does not include the error
of modes that no chain visits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import (
    as_points,
    check_count,
    check_key,
    check_positive,
    check_rows_finite,
)
from numpyro_score.langevin import (
    IntegratorState,
    IntegratorTarget,
    PointState,
    Vector,
    baoab,
    persistence,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey, Scalar

VectorScore = Callable[[Vector], Vector]


@runtime_checkable
class LangevinScheme(Protocol):
    """One unadjusted Langevin update; a frozen dataclass.

    ``order`` is the power p of h in the bias, ``refinement`` the number of steps of h/2
    that cover the time of one step of h.
    """

    @property
    def order(self) -> int:
        """The power p of h in the bias of averages."""

    @property
    def refinement(self) -> int:
        """The number of steps of h/2 that cover the time of one step of h."""

    def step(
        self,
        noise: Vector,
        state: IntegratorState,
        step_size: Scalar,
        target: IntegratorTarget,
    ) -> IntegratorState:
        """Return the state after one step with given standard normal noise."""

    def couple(
        self, noise: Float[Array, "steps d"], step_size: Scalar
    ) -> Float[Array, " d"]:
        """Return the noise of one step of h from that of its steps of h/2."""


@dataclass(frozen=True)
class BAOAB:
    r"""The BAOAB splitting, that of ``ScoreLangevin(adjusted=False)``.

    Its bias is of order :math:`h^4` with full refreshment and of order :math:`h^2` with
    friction; for Gaussian laws it is 0 (Leimkuhler and Matthews 2013).

    Args:
        friction: rate of momentum refreshment; None for full refreshment at each step.

    Example:
        >>> BAOAB().order, BAOAB(friction=1.0).order
        (4, 2)
    """

    friction: float | None = None

    def __post_init__(self) -> None:
        if self.friction is not None:
            check_positive("friction", self.friction, "the rate of refreshment")

    @property
    def order(self) -> int:
        """The power p of h in the bias of averages."""
        return 4 if self.friction is None else 2

    @property
    def refinement(self) -> int:
        """4 for overdamped dynamics of time h^2/2, 2 for kinetic dynamics of time h."""
        return 4 if self.friction is None else 2

    def step(
        self,
        noise: Vector,
        state: IntegratorState,
        step_size: Scalar,
        target: IntegratorTarget,
    ) -> IntegratorState:
        """Kick, half drift, refreshment, half drift, kick."""
        return baoab(noise, state, step_size, self.friction, target)[0]

    def couple(
        self, noise: Float[Array, "steps d"], step_size: Scalar
    ) -> Float[Array, " d"]:
        """Return the unit-variance sum of the noises, weighted by their persistence."""
        if self.friction is None:
            return noise.sum(0) / 2
        eta = persistence(step_size / 2, self.friction)
        return (eta * noise[0] + noise[1]) / jnp.sqrt(1 + jnp.square(eta))


@dataclass(frozen=True)
class ULA:
    """The unadjusted Langevin algorithm x + h^2/2 s + h n, with a bias of order h^2.

    For the standard normal law the stationary variance is 1/(1 - h^2/4).

    Example:
        >>> ULA().refinement
        4
    """

    order: int = 2
    refinement: int = 4

    def __post_init__(self) -> None:
        check_count("order", self.order, "the power of the step size in the bias")
        why = "the number of steps of the finer chain in one of the other"
        check_count("refinement", self.refinement, why, least=2)

    def step(
        self,
        noise: Vector,
        state: IntegratorState,
        step_size: Scalar,
        target: IntegratorTarget,
    ) -> IntegratorState:
        """Return the state at x + h^2/2 s + h n."""
        place = state.place
        x = place.position - 0.5 * step_size**2 * place.gradient + step_size * noise
        return state._replace(place=target.evaluate(x))

    def couple(
        self, noise: Float[Array, "steps d"], step_size: Scalar
    ) -> Float[Array, " d"]:
        """Return the unit-variance sum of the noises."""
        return noise.sum(0) / 2


class StepSizeBias(NamedTuple):
    """Result of :func:`step_size_bias`, one entry per observed coordinate.

    Biases of means are in units of the standard deviation, biases of variances relative
    to the variance, both those of the chain with step h/2.

    - **mean**: bias of the mean.
    - **mean_error**: its standard error.
    - **variance**: bias of the variance.
    - **variance_error**: its standard error.
    """

    mean: Any
    mean_error: Any
    variance: Any
    variance_error: Any


@renamed(key="rng_key")
def step_size_bias(
    rng_key: PRNGKey,
    score_fn: VectorScore,
    starts: Float[Array, "chains d"],
    step_size: float,
    scheme: LangevinScheme = BAOAB(),
    *,
    num_steps: int = 1000,
    num_warmup: int = 100,
) -> StepSizeBias:
    """Return estimates of the bias of means and variances of unadjusted chains.

    Args:
        rng_key: random key.
        score_fn: gradient of the log density at one vector.
        starts: initial points of the pairs, for example draws of the unadjusted run; a
            few tens.
        step_size: the step h whose bias is estimated.
        scheme: the update.
        num_steps: steps of h per pair.
        num_warmup: steps before the averages.

    Raises:
        ValueError: for fewer than four pairs, numbers below 1, or a step at which the
            chain diverges.

    Example:
        >>> starts = jax.random.normal(jax.random.key(0), (64, 1))
        >>> ula = step_size_bias(
        ...     jax.random.key(1), lambda x: -x, starts, 0.8, ULA()
        ... )
        >>> exact = 1 / (1 - 0.8**2 / 4) - 1  # 0.19
        >>> bool(abs(ula.variance[0] - exact) < 0.04)
        True
    """
    check_key("rng_key", rng_key)
    check_rows_finite("starts", starts)
    starts = as_points("starts", starts, jnp.shape(starts)[1:])
    _check(len(starts), step_size, num_steps, num_warmup)

    def one(rng_key: PRNGKey, start: Vector, center: Vector) -> tuple:
        observe = lambda x: x - center  # noqa: E731
        numbers = (step_size, num_warmup, num_steps)
        return pair_averages(rng_key, score_fn, observe, start, scheme, *numbers)

    keys = jax.random.split(rng_key, len(starts))
    run = jax.jit(jax.vmap(one, (0, 0, None)))
    return extrapolate(run(keys, starts, starts.mean(0)), scheme.order)


def langevin_target(score_fn: VectorScore) -> IntegratorTarget:
    """Return the target of a score, for updates without energy differences."""
    return IntegratorTarget(
        evaluate=lambda x: PointState(x, -score_fn(x), None),
        difference=lambda start, end: jnp.zeros(()),
    )


def pair_averages(
    key: PRNGKey,
    score_fn: VectorScore,
    observe: Callable[[Vector], Array],
    start: Vector,
    scheme: LangevinScheme,
    step_size: Scalar,
    num_warmup: int,
    num_steps: int,
) -> tuple[Array, Array, Array, Array]:
    """Return averages of f and f^2 over a coupled pair: those of h, those of h/2."""
    target = langevin_target(score_fn)

    def body(state: tuple, inputs: tuple) -> tuple[tuple, None]:
        coarse, fine, sums = state
        key, keep = inputs
        noise = jax.random.normal(key, (scheme.refinement, start.size), start.dtype)
        joint = scheme.couple(noise, step_size)
        coarse = scheme.step(joint, coarse, step_size, target)

        def half(fine: IntegratorState, noise: Array) -> tuple[IntegratorState, Array]:
            fine = scheme.step(noise, fine, step_size / 2, target)
            return fine, observe(fine.place.position)

        fine, path = jax.lax.scan(half, fine, noise)
        seen = observe(coarse.place.position)
        now = (seen, seen**2, path.mean(0), jnp.square(path).mean(0))
        # not keep * b, which is NaN for warm-up steps that are not finite
        sums = [a + jnp.where(keep, b, 0.0) for a, b in zip(sums, now, strict=True)]
        return (coarse, fine, tuple(sums)), None

    key_momentum, key_steps = jax.random.split(key)
    momentum = jax.random.normal(key_momentum, start.shape, start.dtype)
    first = IntegratorState(target.evaluate(start), momentum)
    zero = jnp.zeros_like(observe(start))
    keys = jax.random.split(key_steps, num_warmup + num_steps)
    keep = jnp.arange(num_warmup + num_steps) >= num_warmup
    state = (first, first, (zero,) * 4)
    (_, _, sums), _ = jax.lax.scan(body, state, (keys, keep))
    a, b, c, d = (total / num_steps for total in sums)
    return a, b, c, d


def extrapolate(averages: tuple[Array, ...], order: int) -> StepSizeBias:
    """Return biases and standard errors from the averages of all pairs.

    Raises:
        ValueError: if an average is not finite.
    """
    coarse, coarse_square, fine, fine_square = averages
    if not bool(jnp.isfinite(jnp.stack(averages)).all()):
        raise ValueError(
            "`step_size` is too large: the chain diverges, so there is no bias to "
            "speak of. Halve it. Pairs that diverged: "
            f"{int((~jnp.isfinite(coarse)).any(-1).sum())} of {len(coarse)}."
        )
    gap = coarse - fine
    # difference of E[f^2] - E[f]^2, linearized: one term per pair
    square_gap = coarse_square - fine_square - gap * (coarse + fine).mean(0)
    variance = fine_square.mean(0) - jnp.square(fine.mean(0))
    shares = (gap / jnp.sqrt(variance), square_gap / variance)
    found = []
    for share in shares:
        share = share / (1 - 2.0**-order)
        found += [share.mean(0), share.std(0, ddof=1) / jnp.sqrt(len(share))]
    return StepSizeBias(*found)


def _check(num_pairs: int, step_size: float, num_steps: int, num_warmup: int) -> None:
    check_positive("step_size", step_size, "the step of the chains")
    check_count("num_steps", num_steps, "a number of steps")
    check_count("num_warmup", num_warmup, "a number of steps", least=0)
    if num_pairs < 4:
        raise ValueError(
            "`starts` must hold at least 4 points: standard errors come from the "
            f"spread of pairs. Got {num_pairs}."
        )
