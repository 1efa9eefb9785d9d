"""One Langevin transition, of one chain or of all: propose, then accept or reject.

While they move, the chains of a batch stand in the last axis of every array: sums over
coordinates, and all else, then run over chains in vector instructions, and a matrix
that is common to all chains multiplies them at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.kernel.state import ScoreLangevinState
from numpyro_score.kernel.threefry import next_key_and_words, standard_normal, uniform
from numpyro_score.kernel.whitening import Metric, RavelledPosition, unwhiten, whiten
from numpyro_score.langevin import (
    IntegratorState,
    PerChain,
    PointState,
    Target,
    baoab,
    leapfrog,
    obab,
    persistence,
    refresh,
)
from numpyro_score.model.potential import Evaluation, Potential

Flat = Float[Array, "d *chains"]
NoiseOf = Callable[[Any], Flat]  # the noise of a step, by its number

MAX_ENERGY_ERROR = 1000.0  # as in the HMC of NumPyro and Stan
MAX_QUADRATURE_ERROR = 1.0  # nats by which the change of a learned law may be unknown
LAST = -1  # the axis of chains while they move


class Dynamics(NamedTuple):
    """Which member of the family: see the table in ``ScoreLangevin``.

    With ``num_steps=None`` the state's adaptation tells number of steps and friction.
    """

    num_steps: Any
    friction: Any
    adjusted: bool


def transition(
    state: ScoreLangevinState,
    potential: Potential,
    dynamics: Dynamics,
    share_adaptation: bool = False,
) -> ScoreLangevinState:
    """Return the state after one transition, before adaptation.

    Args:
        state: of one chain, or of a batch of chains.
        potential: the target.
        dynamics: the member of the family.
        share_adaptation: whether the chains of a batch have one metric.
    """
    rng_key, words = next_key_and_words(state.rng_key)
    step_size = state.adapt_state.step_size
    batched = state.potential_energy.ndim > 0
    present = (state.z, state.evaluation, state.momentum)
    if batched:
        present = jax.tree.map(lambda x: jnp.moveaxis(x, 0, LAST), present)
    frame = WhitenedTarget.of(present[0], state, potential, batched, share_adaptation)
    start = frame.start(*present)
    momentum = start.momentum
    noise = partial(standard_normal, words, size=len(momentum), dtype=momentum.dtype)
    limit = MAX_QUADRATURE_ERROR if dynamics.adjusted else jnp.inf
    target = Target(frame.evaluate, partial(frame.difference, limit=limit))
    dynamics = _adapted(dynamics, state)
    trajectory = _adjusted if dynamics.adjusted else _unadjusted
    start, end, error = trajectory(noise, start, step_size, target, dynamics)

    z, evaluation = frame.to_latents(end.place)
    # a flat potential lets positions overflow at a finite value
    finite = jnp.isfinite(frame.coordinates.ravel(z)).all(axis=0)
    error += jnp.where(finite, 0.0, jnp.inf)
    diverging = ~jnp.less(error, MAX_ENERGY_ERROR)  # true for NaN
    accept = ~diverging
    if dynamics.adjusted:
        # by logarithms, or XLA hashes anew for every array that depends on the answer
        accept &= jnp.log(uniform(words)) < -error
    chosen = jax.tree.map(
        lambda a, b: jnp.where(accept, a, b),
        (z, evaluation, end.momentum),
        (*present[:2], flip_momentum(start.momentum)),
    )
    if batched:
        chosen = jax.tree.map(lambda x: jnp.moveaxis(x, LAST, 0), chosen)
    z, evaluation, momentum = chosen
    return state.move(z, evaluation)._replace(
        momentum=momentum,
        num_steps=jnp.broadcast_to(jnp.asarray(dynamics.num_steps), error.shape),
        energy_error=error,
        accept_prob=jnp.where(diverging, 0.0, jnp.exp(-jnp.maximum(error, 0.0))),
        diverging=diverging,
        rng_key=rng_key,
    )


def _adapted(dynamics: Dynamics, state: ScoreLangevinState) -> Dynamics:
    """Return the dynamics with numbers that adaptation found."""
    if dynamics.num_steps is not None:
        return dynamics
    adapted = state.adapt_state
    return dynamics._replace(num_steps=adapted.num_steps, friction=adapted.friction)


def fuse_on_cpu(
    move: Callable[[ScoreLangevinState], ScoreLangevinState], state: ScoreLangevinState
) -> ScoreLangevinState:
    """Return ``move(state)``, which XLA compiles for a CPU into one function.

    Small loops become one function, and so does this one of a single pass, whose length
    XLA cannot know. Otherwise, in a program with calls of the host, every array costs
    about a microsecond: more than the arithmetic of a small model.
    """

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return carry[0] + 1, move(carry[1])

    def proceed(carry: tuple[Array, Any]) -> Array:
        return carry[0] < 1 + (state.i < 0)

    return jax.lax.while_loop(proceed, body, (jnp.zeros((), int), state))[1]


def flip_momentum(momentum: Array) -> Array:
    """Turn a rejected momentum round, which keeps persistent momentum reversible."""
    return -momentum


class WhitenedTarget(NamedTuple):
    """Whitened displacements from where a transition starts, and the target in them.

    The detail of a place is its evaluation, with the gradient in the coordinates.
    """

    potential: Potential
    coordinates: RavelledPosition
    origin: Flat
    sqrt: Metric
    sqrt_axis: int | None
    batched: bool

    @classmethod
    def of(
        cls,
        z: Any,
        state: ScoreLangevinState,
        potential: Potential,
        batched: bool,
        shared: bool,
    ) -> "WhitenedTarget":
        """Return the frame at z, whose last axis is that of the chains."""
        sqrt = state.adapt_state.mass_matrix_sqrt_inv
        axis = None if shared else 0
        one = jax.tree.map(lambda x: x[..., 0], z) if batched else z
        coordinates = RavelledPosition.of(sqrt, one, state.potential_energy.shape)
        return cls(potential, coordinates, coordinates.ravel(z), sqrt, axis, batched)

    def start(self, z: Any, evaluation: Evaluation, momentum: Flat) -> IntegratorState:
        """Return the phase at the origin."""
        flat = self.coordinates.ravel(evaluation.grad)
        place = PointState(
            jnp.zeros_like(self.origin),
            self._scale(whiten, flat),
            evaluation._replace(grad=flat),
        )
        return IntegratorState(place, momentum)

    def evaluate(self, y: Flat) -> PointState:
        """Return the place at a displacement."""
        evaluate = self.potential.evaluate
        if self.batched:
            count = self.coordinates.batch[0]  # a model may have no latent sites
            evaluate = jax.vmap(evaluate, LAST, LAST, axis_size=count)
        evaluation = evaluate(self._position(y))
        flat = self.coordinates.ravel(evaluation.grad)
        return PointState(y, self._scale(whiten, flat), evaluation._replace(grad=flat))

    def difference(self, start: PointState, end: PointState, limit: float) -> PerChain:
        """Return the change of the potential, or infinity where it is in doubt."""
        before, after = start.aux, end.aux
        work = self.potential.learned_difference_with_error
        if self.batched:
            work = jax.vmap(work, (LAST, LAST), axis_size=len(before.value))
        change, doubt = work(before.learned, after.learned)
        # a symmetric refusal: the way back is refused too
        change = jnp.where(doubt <= limit, change, jnp.inf)
        return after.value - before.value + change

    def to_latents(self, place: PointState) -> tuple[Any, Evaluation]:
        """Return the position z of a place, and its evaluation."""
        detail = place.aux
        grad = self.coordinates.unravel(detail.grad)
        return self._position(place.position), detail._replace(grad=grad)

    def _position(self, y: Flat) -> Any:
        return self.coordinates.unravel(self.origin + self._scale(unwhiten, y))

    def _scale(self, scale: Callable, vector: Flat) -> Flat:
        if self.batched:
            scale = jax.vmap(scale, (self.sqrt_axis, LAST), LAST)
        return scale(self.sqrt, vector)


def _adjusted(
    noise: NoiseOf,
    start: IntegratorState,
    step_size: PerChain,
    target: Target,
    dynamics: Dynamics,
) -> tuple[IntegratorState, IntegratorState, PerChain]:
    """Return start (with its refreshed momentum), end and energy error of OBABO."""
    num_steps, friction, _ = dynamics
    # trajectories of several steps start afresh; a lone step keeps its persistence
    lone = isinstance(num_steps, int) and num_steps == 1
    eta = persistence(step_size, friction if lone else None)
    start = start._replace(momentum=refresh(noise(0), start.momentum, eta))
    end, error = leapfrog(start, step_size, target)

    def step(k: Any, phase: IntegratorState) -> tuple[IntegratorState, PerChain]:
        return obab(noise(k), phase, step_size, friction, target)

    return start, *_repeat(step, num_steps, end, error)


def _unadjusted(
    noise: NoiseOf,
    start: IntegratorState,
    step_size: PerChain,
    target: Target,
    dynamics: Dynamics,
) -> tuple[IntegratorState, IntegratorState, PerChain]:
    """Return start, end and energy error of BAOAB; the momentum persists."""

    def step(k: Any, phase: IntegratorState) -> tuple[IntegratorState, PerChain]:
        return baoab(noise(k), phase, step_size, dynamics.friction, target)

    end, error = step(0, start)
    return start, *_repeat(step, dynamics.num_steps, end, error)


def _repeat(
    step: Callable, num_steps: Any, phase: IntegratorState, error: PerChain
) -> tuple[IntegratorState, PerChain]:
    """Take the steps after the first and add up the energy errors."""

    def advance(
        k: Array, carry: tuple[IntegratorState, PerChain]
    ) -> tuple[IntegratorState, PerChain]:
        phase, total = carry
        phase, error = step(k, phase)
        return phase, total + error

    if isinstance(num_steps, int):
        if num_steps == 1:
            return phase, error
        ks = jnp.arange(1, num_steps, dtype=jnp.uint32)
        scan = jax.lax.scan(lambda c, k: (advance(k, c), None), (phase, error), ks)
        return scan[0]

    def body(
        k: Array, carry: tuple[IntegratorState, PerChain]
    ) -> tuple[IntegratorState, PerChain]:
        moved = advance(k.astype(jnp.uint32), carry)
        if jnp.ndim(num_steps) == 0:
            return moved
        # chains of other lengths: those that are done stand still
        active = k < num_steps
        return jax.tree.map(lambda a, b: jnp.where(active, a, b), moved, carry)

    last = jnp.max(num_steps)
    return jax.lax.fori_loop(jnp.ones_like(last), last, body, (phase, error))
