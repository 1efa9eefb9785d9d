"""Warnings of chains that do not move or that drift to infinity, while they run.

A compiled program cannot raise, so the host is called back: at the end of warm-up, and
100 and 1000 transitions after it.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.kernel.state import ScoreLangevinState
from numpyro_score.run_verdict import call_when_due

MIN_ACCEPT_PROB = 1e-3  # mean acceptance: a chain of 1000 draws moves about once
# a chain that accepts 5 % moves in these by a chance of 1 - .95^100 = 99.4 %
MIN_TRANSITIONS = 100
MAX_POSITION = 1e8  # beyond, neighboring float32 numbers are 8 apart
FLAT = 1e-3  # of z dU/dz, whose mean is 1 for every proper density
# between neighboring potentials: acceptance is off by e^.1, 10 %
MAX_ROUNDING_NATS = 0.1


def warn_on_failure(state: ScoreLangevinState, may_stay: float = 0.0) -> None:
    """Warn, when the program runs, of chains that are stuck or drift to infinity.

    A stuck chain accepts less than one proposal in a thousand; an unadjusted one is
    stuck if every step diverged. A chain drifts to infinity where the
    posterior is flat: steps and metric grow in warm-up until they overflow. A potential
    is too large for its precision where neighboring values are a tenth of a nat apart.

    Args:
        state: of one chain or of a batch of chains, after a transition.
        may_stay: share of the chains that may be stuck without a warning, as a few of
            many weighted particles may.
    """
    plan = state.plan
    if not jax.tree.leaves(state.z):
        return  # a model without latent sites
    drawn = state.i - plan.num_warmup
    due = (drawn == MIN_TRANSITIONS) | (drawn == 10 * MIN_TRANSITIONS)
    # a short warm-up says little
    due |= (drawn == 0) & (plan.num_warmup >= MIN_TRANSITIONS)
    stuck = state.mean_accept_prob < MIN_ACCEPT_PROB
    if plan.by_energy:
        stuck = state.mean_accept_prob <= 0
    stuck &= stuck.mean() > may_stay
    _warn_when_due(due, (stuck, state.z, state.z_grad, state.potential_energy))


def _failures(chains: tuple[Array, Any, Any, Array]) -> tuple[Array, Array, Array]:
    """Return which chains are stuck, which are away, and how potentials are rounded."""
    stuck, z, gradient, potential = chains
    away = _is_away(z, gradient, stuck.shape)
    return stuck, away, jnp.finfo(potential.dtype).eps * jnp.abs(potential)


def _is_away(z: Any, gradient: Any, batch: tuple[int, ...]) -> Array:
    r"""Return whether each chain is far out with nothing that holds it there.

    A latent of large scale is far out too, but :math:`z\, \partial_z U` is then of the
    order of a usual number; it is 0 where the density is flat, and about -z where it
    grows, as that of a flat law of positive numbers in log coordinates.
    """
    x, force = (
        jnp.concatenate([jnp.reshape(leaf, (*batch, -1)) for leaf in leaves], axis=-1)
        for leaves in map(jax.tree.leaves, (z, gradient))
    )
    pull = x * force
    is_free = (jnp.abs(pull) < FLAT) | (pull < -FLAT * MAX_POSITION)
    is_free |= ~jnp.isfinite(x)
    return (is_free & ~(jnp.abs(x) <= MAX_POSITION)).any(axis=-1)


def _warn(failures: tuple[Any, Any, Any]) -> None:
    stuck, away, spacing = map(np.ravel, failures)
    coarsest = np.where(away, 0.0, spacing).max()
    if MAX_ROUNDING_NATS < coarsest < np.inf:
        warnings.warn(
            f"The potential is so large that its precision resolves {coarsest:.1g} "
            "nats only: energy errors, acceptance and step size mean little. Use "
            'double precision: jax.config.update("jax_enable_x64", True) at the start.',
            stacklevel=2,
        )
    if away.any():
        warnings.warn(
            f"{away.sum()} of {away.size} chain(s) are beyond {MAX_POSITION:.0e} in "
            "unconstrained space: the posterior is flat there, so it is improper and "
            "the draws mean nothing, or its scales differ too much. Give its sites "
            "proper priors, check that the data enter the likelihood, or rescale them.",
            stacklevel=2,
        )
    if stuck.any():
        warnings.warn(
            f"{stuck.sum()} of {stuck.size} chain(s) accepted next to no proposal and "
            "stand still: their draws are copies. Start elsewhere by `init_params` or "
            "`init_strategy`, lengthen `num_warmup`, lower `step_size` if it is fixed, "
            "or check that the score is finite and fits the model.",
            stacklevel=2,
        )


_warn_when_due = call_when_due(_warn, _failures)
