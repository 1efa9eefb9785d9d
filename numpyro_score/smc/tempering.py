"""Adaptive tempering: how far a distribution may move for a given loss of ESS."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.smc.weights import (
    LogWeights,
    ParticleWeights,
    effective_sample_size,
    nan_to_zero_weight,
)

NUM_BISECTIONS = 30  # resolves the interval to 1e-9 of its length


def next_tempering_param(
    log_increment: Callable[[Array], LogWeights],
    weights: ParticleWeights,
    lowest: Array,
    highest: Array,
    *,
    target_ess: Array | float,
) -> Float[Array, ""]:
    """Return the largest beta at which the effective sample size reaches a target.

    Bisection between ``lowest`` and ``highest`` (Jasra et al. 2011); ``highest`` if it
    reaches the target, ``lowest`` if nothing does.

    Args:
        log_increment: log incremental weights as a function of beta.
        weights: weights before.
        lowest: smallest beta.
        highest: largest beta.
        target_ess: what the effective sample size may not fall below.
    """

    def keeps(beta: Array) -> Array:
        return _ess_after(log_increment, weights, beta) >= target_ess

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        good = keeps(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low, _ = jax.lax.fori_loop(0, NUM_BISECTIONS, halve, (lowest, highest))
    return jnp.where(keeps(highest), highest, low)


def next_twist_power(
    log_increment: Callable[[Array], Array],
    weights: ParticleWeights,
    power: Array,
    *,
    target_ess: float,
) -> Float[Array, ""]:
    r"""Return the power :math:`\beta \in [0, 1]` of the twist at the next level.

    The largest one, from half of the present power on, whose weights keep the target.
    If none does, since the step itself and not the twist has changed the weights, the
    best of three: that one, the present power, and 1. (A power far from the present one
    would change all weights at once.)

    Args:
        log_increment: log incremental weights as a function of the power.
        weights: weights before.
        power: power at the present level.
        target_ess: share of the present effective sample size to keep.
    """
    one, least = jnp.ones(()), target_ess * weights.ess
    largest = next_tempering_param(
        log_increment, weights, 0.5 * power, one, target_ess=least
    )
    choices = jnp.stack([largest, power, one])
    ess = jax.vmap(lambda beta: _ess_after(log_increment, weights, beta))(choices)
    return jnp.where(ess[0] >= least, largest, choices[jnp.argmax(ess)])


def _ess_after(
    log_increment: Callable, weights: ParticleWeights, beta: Array
) -> Float[Array, ""]:
    increment = nan_to_zero_weight(log_increment(beta))
    return effective_sample_size(weights.log_weight + increment)
