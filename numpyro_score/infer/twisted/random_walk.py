"""Random-walk Metropolis moves of the ordinary sites of weighted particles.

Given the learned sites the target is known up to a constant, so that a symmetric
proposal is accepted with the ratio of twists. Its covariance is that of the weighted
particles times 2.38^2/d (Roberts et al. 1997), times a factor adapted to the
acceptance.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.infer.twisted.twist import TwistEvaluation
from numpyro_score.model.denoising import SiteValues
from numpyro_score.typing import PRNGKey

TARGET_ACCEPT = 0.3  # between 0.44 in one dimension and 0.234 in many
ROBBINS_MONRO_GAIN = 1.0  # of the logarithm of the factor per unit of acceptance missed


class ProposalScale(NamedTuple):
    """The logarithm of the factor of the proposal."""

    log_factor: Float[Array, ""]

    @classmethod
    def init(cls) -> "ProposalScale":
        """Begin with the factor 1."""
        return cls(jnp.zeros(()))

    def update(self, accept_prob: Array) -> "ProposalScale":
        """Return a larger factor after too many acceptances."""
        return ProposalScale(
            self.log_factor + ROBBINS_MONRO_GAIN * (accept_prob - TARGET_ACCEPT)
        )


def random_walk_metropolis(
    key: PRNGKey,
    z: SiteValues,
    evaluation: TwistEvaluation,
    log_weight: Array,
    names: tuple[str, ...],
    evaluate: Callable[[SiteValues], TwistEvaluation],
    power: Array,
    scale: ProposalScale,
) -> tuple[SiteValues, TwistEvaluation, ProposalScale, Float[Array, ""]]:
    """Return particles, what is proposed there, the scale, and the mean acceptance.

    Args:
        key: random key.
        z: latents of all particles.
        evaluation: of the twist at z.
        log_weight: normalized log weights.
        names: the ordinary sites.
        evaluate: evaluates the twist at all particles.
        power: of the twist in the target.
        scale: factor of the proposal.
    """
    key_move, key_accept = jax.random.split(key)
    ordinary = {name: z[name] for name in names}
    flat = jax.vmap(lambda z: ravel_pytree(z)[0])(ordinary)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], ordinary))[1]
    step = jnp.exp(scale.log_factor) * 2.38 / jnp.sqrt(flat.shape[1])
    noise = jax.random.normal(key_move, flat.shape, flat.dtype)
    moved = flat + step * noise @ _root(flat, log_weight).T
    proposal = {**z, **jax.vmap(unravel)(moved)}
    proposed = evaluate(proposal)
    log_ratio = proposed.log_target(power) - evaluation.log_target(power)
    log_ratio = jnp.nan_to_num(log_ratio, nan=-jnp.inf)
    accept_prob = jnp.exp(jnp.minimum(log_ratio, 0.0))
    accept = jax.random.uniform(key_accept, accept_prob.shape) < accept_prob
    z, evaluation = _choose(accept, (proposal, proposed), (z, evaluation))
    mean = jnp.sum(jnp.exp(log_weight) * accept_prob)
    return z, evaluation, scale.update(mean), mean


def _root(flat: Array, log_weight: Array) -> Float[Array, "d d"]:
    """Return a root of the weighted covariance, kept positive."""
    weight = jnp.exp(log_weight)[:, None]
    centered = flat - jnp.sum(weight * flat, 0)
    covariance = centered.T @ (weight * centered)
    floor = 1e-6 * jnp.trace(covariance) / len(covariance) + 1e-12
    return jnp.linalg.cholesky(covariance + floor * jnp.eye(len(covariance)))


def _choose(accept: Array, yes: Any, no: Any) -> Any:
    """Return for each particle one of two trees."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(accept.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)
