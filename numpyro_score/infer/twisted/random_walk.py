"""Random-walk Metropolis moves of the ordinary sites of weighted particles.

Given the learned sites the target is known up to a constant, so that a symmetric
proposal is accepted with the ratio of twists. Its covariance is that of the weighted
particles times 2.38^2/d (Roberts et al. 1997), times a factor adapted to the
acceptance.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.infer.twisted.twist import TwistEvaluation
from numpyro_score.typing import PRNGKey, SiteValues

# between .44 in one dimension and .234 in many (Roberts and Rosenthal 2001)
TARGET_ACCEPT = 0.3
# acceptance falls by .48 per unit at .3: a level keeps 1 - .48 of an error
LOG_STEP_GAIN = 1.0
FLOOR = 1e-6  # of correlations, whose root exists then: 8 float32 roundings


class RandomWalk(NamedTuple):
    """The proposal of a random walk: its covariance, and the logarithm of its factor.

    - **covariance**: of the ordinary sites, unconstrained and flat.
    - **log_factor**: of the proposal's standard deviation.
    """

    covariance: Float[Array, "*levels d d"]
    log_factor: Float[Array, "*levels"]

    @classmethod
    def of(
        cls,
        z: SiteValues,
        log_weight: Array,
        names: tuple[str, ...],
        log_factor: Array,
    ) -> "RandomWalk":
        """Return the walk with the covariance of weighted particles.

        Args:
            z: latents of all particles.
            log_weight: normalized log weights.
            names: the ordinary sites.
            log_factor: logarithm of the factor.
        """
        flat = _flatten(z, names)
        weight = jnp.exp(log_weight)[:, None]
        centered = flat - jnp.sum(weight * flat, 0)
        return cls(centered.T @ (weight * centered), log_factor)

    def adapted_log_factor(self, accept_prob: Array) -> Float[Array, ""]:
        """Return the logarithm of a larger factor after too many acceptances."""
        return self.log_factor + LOG_STEP_GAIN * (accept_prob - TARGET_ACCEPT)

    @property
    def root(self) -> Float[Array, "d d"]:
        """A root of the proposal's covariance, kept positive."""
        size = len(self.covariance)
        sd = jnp.sqrt(jnp.diag(self.covariance))
        # numbers on which all particles agree take steps that are small for the others
        least = jnp.sqrt(FLOOR * jnp.mean(jnp.square(sd)))
        sd = jnp.where(sd > 0, sd, jnp.where(least > 0, least, FLOOR))
        correlation = self.covariance / sd / sd[:, None]
        root = sd[:, None] * jnp.linalg.cholesky(correlation + FLOOR * jnp.eye(size))
        # the best factor for a normal law (Gelman, Roberts and Gilks 1996)
        return jnp.exp(self.log_factor) * 2.38 / jnp.sqrt(size) * root


def random_walk_metropolis(
    key: PRNGKey,
    z: SiteValues,
    evaluation: TwistEvaluation,
    names: tuple[str, ...],
    evaluate: Callable[[SiteValues], TwistEvaluation],
    power: Array,
    walk: RandomWalk,
) -> tuple[SiteValues, TwistEvaluation, Float[Array, " particles"]]:
    """Return particles, what is proposed there, and their acceptance probabilities.

    Args:
        key: random key.
        z: latents of all particles.
        evaluation: of the twist at z.
        names: the ordinary sites.
        evaluate: evaluates the twist at all particles.
        power: of the twist in the target.
        walk: the proposal.
    """
    key_move, key_accept = jax.random.split(key)
    ordinary, flat = {name: z[name] for name in names}, _flatten(z, names)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], ordinary))[1]
    noise = jax.random.normal(key_move, flat.shape, flat.dtype)
    proposal = {**z, **jax.vmap(unravel)(flat + noise @ walk.root.T)}
    proposed = evaluate(proposal)
    log_ratio = proposed.log_target(power) - evaluation.log_target(power)
    log_ratio = jnp.nan_to_num(log_ratio, nan=-jnp.inf)
    accept_prob = jnp.exp(jnp.minimum(log_ratio, 0.0))
    accept = jax.random.uniform(key_accept, accept_prob.shape) < accept_prob
    choose = partial(jax.vmap(jnp.where), accept)
    z, evaluation = jax.tree.map(choose, (proposal, proposed), (z, evaluation))
    return z, evaluation, accept_prob


def _flatten(z: SiteValues, names: tuple[str, ...]) -> Float[Array, "particles d"]:
    """Return the ordinary sites of each particle as one row."""
    return jax.vmap(lambda z: ravel_pytree(z)[0])({name: z[name] for name in names})
