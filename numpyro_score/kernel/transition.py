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
from jaxtyping import Array

from numpyro_score.checks import is_integer
from numpyro_score.kernel.state import ScoreLangevinState
from numpyro_score.kernel.step_halving import HalvingRecord, halved_step
from numpyro_score.kernel.threefry import next_key_and_words, standard_normal, uniform
from numpyro_score.kernel.whitening import LAST, Flat, Metric, WhitenedTarget, scales
from numpyro_score.langevin import (
    IntegratorState,
    IntegratorTarget,
    PerChain,
    baoab,
    leapfrog,
    obab,
    persistence,
    refresh,
)
from numpyro_score.model.potential import MAX_QUADRATURE_ERROR, Evaluation, Potential

NoiseOf = Callable[[Any], Flat]  # the noise of a step, by its number

MAX_ENERGY_ERROR = 1000.0  # as in the HMC of NumPyro and Stan


class Dynamics(NamedTuple):
    """Numbers that choose one of the integrators in the table of ``ScoreLangevin``.

    With ``num_steps=None`` number of steps and friction are adapted, in the state.
    """

    num_steps: Any
    friction: Any
    adjusted: bool
    max_step_halvings: int = 0

    @property
    def target_accept_prob(self) -> float:
        """The default acceptance that warm-up aims for: that of MALA, or of HMC."""
        return 0.574 if self.num_steps == 1 else 0.8


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
    dynamics = _adapted(dynamics, state)
    sqrt = state.adapt_state.mass_matrix_sqrt_inv

    def propose(sqrt: Metric) -> tuple[Any, ...]:
        return _propose(words, state, sqrt, potential, dynamics, share_adaptation)

    if state.plan.chooses_metric and not isinstance(sqrt, dict):
        # a diagonal metric costs a product per coordinate, no matrix
        z, evaluation, momentum, error, proposed, halving = jax.lax.cond(
            state.adapt_state.correlated.any(),
            propose,
            lambda m: propose(scales(m)),
            sqrt,
        )
    else:
        z, evaluation, momentum, error, proposed, halving = propose(sqrt)
    refused = _is_divergent(error)
    num_steps, diverging = dynamics.num_steps, refused
    if halving is not None:
        num_steps, diverging = halving.num_gradients, refused & ~halving.irreversible
    return state.move(z, evaluation)._replace(
        momentum=momentum,
        num_steps=jnp.broadcast_to(jnp.asarray(num_steps), error.shape),
        energy_error=error,
        accept_prob=jnp.where(refused, 0.0, jnp.exp(-jnp.maximum(error, 0.0))),
        diverging=diverging,
        rng_key=rng_key,
        halving=halving,
        proposed_energy=jnp.where(refused, jnp.inf, proposed),
    )


def _propose(
    words: Any,
    state: ScoreLangevinState,
    sqrt: Metric,
    potential: Potential,
    dynamics: Dynamics,
    share_adaptation: bool,
) -> tuple[Any, Evaluation, Array, Array, Array, HalvingRecord | None]:
    """Return position, evaluation and momentum after the accept step, and the error.

    Then come the known potential at the proposal, accepted or not, and what became of
    steps that are halved where need be, or None.
    """
    batched = state.potential_energy.ndim > 0
    present = (state.z, state.evaluation, state.momentum)
    if batched:
        present = jax.tree.map(lambda x: jnp.moveaxis(x, 0, LAST), present)
    shape = state.potential_energy.shape
    whitened = WhitenedTarget.of(present[0], sqrt, shape, potential, share_adaptation)
    start = whitened.start(*present)
    momentum = start.momentum
    noise = partial(standard_normal, words, size=len(momentum), dtype=momentum.dtype)
    limit = MAX_QUADRATURE_ERROR if dynamics.adjusted else jnp.inf
    target = IntegratorTarget(
        whitened.evaluate, partial(whitened.difference, limit=limit)
    )
    trajectory: Callable = _adjusted if dynamics.adjusted else _unadjusted
    if dynamics.max_step_halvings:
        trajectory = _halved
    step_size = state.adapt_state.step_size
    start, end, error, halving = trajectory(noise, start, step_size, target, dynamics)

    z, evaluation = whitened.to_latents(end.place)
    # a flat potential lets positions overflow at a finite value
    finite = jnp.isfinite(whitened.coordinates.ravel(z)).all(axis=0)
    error += jnp.where(finite, 0.0, jnp.inf)
    proposed = evaluation.value
    accept = ~_is_divergent(error)
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
    return *chosen, error, proposed, halving


def _is_divergent(error: Array) -> Array:
    return ~jnp.less(error, MAX_ENERGY_ERROR)  # true for NaN


def _adapted(dynamics: Dynamics, state: ScoreLangevinState) -> Dynamics:
    """Return the dynamics with numbers that adaptation found."""
    if dynamics.num_steps is not None:
        return dynamics
    adapted = state.adapt_state
    friction = None if dynamics.friction is None else adapted.friction
    return dynamics._replace(num_steps=adapted.num_steps, friction=friction)


def fuse_on_cpu(move: Callable[[Any], Any], state: Any) -> Any:
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


def _adjusted(
    noise: NoiseOf,
    start: IntegratorState,
    step_size: PerChain,
    target: IntegratorTarget,
    dynamics: Dynamics,
) -> tuple[IntegratorState, IntegratorState, PerChain, None]:
    """Return start (with its refreshed momentum), end and energy error of OBABO."""
    start = _refreshed(noise, start, step_size, dynamics)
    end, error = leapfrog(start, step_size, target)

    def step(k: Any, phase: IntegratorState) -> tuple[IntegratorState, PerChain]:
        return obab(noise(k), phase, step_size, dynamics.friction, target)

    return start, *_repeat(step, dynamics.num_steps, end, error), None


def _refreshed(
    noise: NoiseOf, start: IntegratorState, step_size: PerChain, dynamics: Dynamics
) -> IntegratorState:
    # trajectories of several steps start afresh; a lone step keeps its persistence
    lone = is_integer(dynamics.num_steps) and dynamics.num_steps == 1
    eta = persistence(step_size, dynamics.friction if lone else None)
    return start._replace(momentum=refresh(noise(0), start.momentum, eta))


def _halved(
    noise: NoiseOf,
    start: IntegratorState,
    step_size: PerChain,
    target: IntegratorTarget,
    dynamics: Dynamics,
) -> tuple[IntegratorState, IntegratorState, PerChain, HalvingRecord]:
    """Return start, end and energy error of halved steps, and the record of these."""
    start = _refreshed(noise, start, step_size, dynamics)
    eta = persistence(step_size, dynamics.friction)

    def move(phase: IntegratorState, record: HalvingRecord) -> tuple[Any, PerChain]:
        limit, active = dynamics.max_step_halvings, ~record.failed
        phase, error, found = halved_step(phase, step_size, target, limit, active)
        return (phase, record.then(found)), error

    def step(k: Any, carry: tuple[IntegratorState, HalvingRecord]) -> Any:
        phase, record = carry
        momentum = refresh(noise(k), phase.momentum, eta)
        return move(phase._replace(momentum=momentum), record)

    end, error = move(start, HalvingRecord.zero(start.momentum.shape[1:]))
    (end, record), error = _repeat(step, dynamics.num_steps, end, error)
    return start, end, error, record


def _unadjusted(
    noise: NoiseOf,
    start: IntegratorState,
    step_size: PerChain,
    target: IntegratorTarget,
    dynamics: Dynamics,
) -> tuple[IntegratorState, IntegratorState, PerChain, None]:
    """Return start, end and energy error of BAOAB; the momentum persists."""

    def step(k: Any, phase: IntegratorState) -> tuple[IntegratorState, PerChain]:
        return baoab(noise(k), phase, step_size, dynamics.friction, target)

    end, error = step(0, start)
    return start, *_repeat(step, dynamics.num_steps, end, error), None


def _repeat(
    step: Callable, num_steps: Any, phase: Any, error: PerChain
) -> tuple[Any, PerChain]:
    """Take the steps after the first and add up the energy errors."""

    def advance(k: Array, carry: tuple[Any, PerChain]) -> tuple[Any, PerChain]:
        phase, total = carry
        phase, error = step(k, phase)
        return phase, total + error

    if is_integer(num_steps):
        if num_steps == 1:
            return phase, error
        ks = jnp.arange(1, num_steps, dtype=jnp.uint32)
        scan = jax.lax.scan(lambda c, k: (advance(k, c), None), (phase, error), ks)
        return scan[0]

    def body(k: Array, carry: tuple[Any, PerChain]) -> tuple[Any, PerChain]:
        moved = advance(k.astype(jnp.uint32), carry)
        if jnp.ndim(num_steps) == 0:
            return moved
        # chains of other lengths: those that are done stand still
        active = k < num_steps
        return jax.tree.map(lambda a, b: jnp.where(active, a, b), moved, carry)

    last = jnp.max(num_steps)
    return jax.lax.fori_loop(jnp.ones_like(last), last, body, (phase, error))
