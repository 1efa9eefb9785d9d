r"""Replica exchange: local moves at every temperature, and swaps between neighbors.

On :math:`\pi_\beta(z) \propto p(z)\, e^{\beta \ell(z)}` two neighbors swap with
probability :math:`\min(1, e^{(\beta' - \beta)(\ell(z) - \ell(z'))})`: their prior
densities cancel.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.kernel.adaptation import AdaptationSettings
from numpyro_score.kernel.state import ScoreLangevinState
from numpyro_score.kernel.tempered_potential import (
    TemperedPoint,
    TemperedPotential,
)
from numpyro_score.kernel.tempering_adaptation import (
    TemperingAdaptState,
)
from numpyro_score.kernel.tempering_state import Replicas
from numpyro_score.kernel.transition import Dynamics, transition
from numpyro_score.typing import PRNGKey

# The metric of a rung averages over modes: in a mode with a share w of the draws the
# curvature is up to 1 / w, and steps that suit the others are too long by w^(-1/2),
# 3 for a tenth. How often states stay in small modes is the last column of
# python -m tests.benchmarks.tempering --only mirrored [--short-share 0].
SHORT_STEP = 1 / 3
SHORT_SHARE = 1 / 4  # of the transitions: what the other modes lose at most


class LocalMetric(NamedTuple):
    """Adapted quantities of a transition: step size and metric.

    - **step_size**: in units of the metric.
    - **mass_matrix_sqrt_inv**: the matrix S of it, or its diagonal.
    """

    step_size: Array
    mass_matrix_sqrt_inv: Array


def _local_transition(
    key: PRNGKey,
    z: Any,
    point: TemperedPoint,
    potential: TemperedPotential,
    step_size: Array,
    sqrt: Array,
    dynamics: Dynamics,
) -> tuple[Any, TemperedPoint, Array, Array]:
    """Return z, its point, acceptance and divergence after one Langevin transition.

    Args:
        key: random key.
        z: where it starts.
        point: prior and likelihood there.
        potential: at the inverse temperature of the state.
        step_size: step, in units of the metric.
        sqrt: the matrix S of the metric, or its diagonal.
        dynamics: the member of the family.
    """
    value, grad, _ = potential.combine(point)
    none = jnp.zeros(())
    metric: Any = LocalMetric(step_size, sqrt)
    carried: Any = point  # what the transition hands to the potential and back
    state = ScoreLangevinState(
        i=jnp.zeros((), int),
        z=z,
        z_grad=grad,
        potential_energy=value,
        learned=carried,
        momentum=jnp.zeros(sqrt.shape[-1], sqrt.dtype),
        num_steps=none,
        energy_error=none,
        accept_prob=none,
        mean_accept_prob=none,
        diverging=none,
        accept_rule=none,
        adapt_state=metric,
        moments=None,
        plan=AdaptationSettings(0),
        rng_key=key,
    )
    state = transition(state, potential, dynamics)
    carried = state.learned
    return state.z, carried, state.accept_prob, state.diverging


class Exploration(NamedTuple):
    """States while they are moved, and how they fared, by chain and rung."""

    z: Any
    point: TemperedPoint
    accept_prob: Float[Array, "chains rungs"]
    diverging: Bool[Array, "chains rungs"]


def _explore_once(
    j: Array,
    state: Exploration,
    settings: tuple,
    potential: TemperedPotential,
    dynamics: Dynamics,
) -> Exploration:
    """Return one state after its j-th local transition, if it takes so many.

    Some take a shorter step, whatever the state: a mixture of kernels of one law.
    """
    beta, step_size, sqrt, num, key = settings
    key, key_step = jax.random.split(jax.random.fold_in(key, j))
    factor = jnp.where(jax.random.bernoulli(key_step, SHORT_SHARE), SHORT_STEP, 1.0)
    moved = Exploration(
        *_local_transition(
            key,
            state.z,
            state.point,
            potential.at(beta),
            factor * step_size,
            sqrt,
            dynamics,
        )
    )
    moved = moved._replace(
        accept_prob=state.accept_prob + moved.accept_prob / num,
        diverging=state.diverging | moved.diverging,
    )
    return jax.tree.map(lambda a, b: jnp.where(j < num, a, b), moved, state)


def explore(
    keys: PRNGKey,
    replicas: Replicas,
    adapt_state: TemperingAdaptState,
    potential: TemperedPotential,
    dynamics: Dynamics,
    block: int,
) -> Exploration:
    """Return the states after the local transitions at every rung but the first.

    Rungs are moved in blocks of all chains together, as many as are in use.

    Args:
        keys: one per chain.
        replicas: of a batch of chains.
        adapt_state: of a batch of chains.
        potential: at any inverse temperature.
        dynamics: the member of the family.
        block: rungs per block.
    """
    num_chains, size = adapt_state.inverse_temperatures.shape
    zero = jnp.zeros((num_chains, size))
    start = Exploration(replicas.z, replicas.point, zero, jnp.zeros_like(zero, bool))
    settings = (
        adapt_state.inverse_temperatures,
        adapt_state.step_sizes,
        adapt_state.mass_matrix_sqrt_inv,
        adapt_state.num_transitions,
        jax.vmap(partial(jax.random.split, num=size))(keys),
    )

    move = partial(_explore_once, potential=potential, dynamics=dynamics)

    def move_block(b: Array, state: Exploration) -> Exploration:
        first = 1 + b * block
        cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=block, axis=1)
        part, given = jax.tree.map(lambda x: cut(x, first), (state, settings))
        each = jax.vmap(jax.vmap(move, (None, 0, 0)), (None, 0, 0))
        part = jax.lax.fori_loop(
            0, given[3].max(), lambda j, part: each(j, part, given), part
        )
        paste = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        return jax.tree.map(paste, state, part)

    blocks = -(-(adapt_state.num_rungs.max() - 1) // block)
    return jax.lax.fori_loop(0, blocks, move_block, start)


def propose_draws(
    key: PRNGKey,
    replicas: Replicas,
    drawn: tuple[Any, TemperedPoint],
    betas: Float[Array, " rungs"],
    last: Int[Array, ""],
) -> Replicas:
    r"""Return one chain's states after draws of the prior were proposed to them.

    Each is proposed at one rung k, and accepted with probability
    :math:`\min(1, e^{\beta_k (\ell(z') - \ell(z))})`: its prior density is that of the
    proposal, and cancels (Tierney 1994, independence chains). Where every mode of the
    posterior lies in one of the prior, local moves cannot lead there from another one,
    and what limits crossings is how many draws of the prior are tried.

    Args:
        key: random key.
        replicas: of one chain.
        drawn: draws of the prior, with prior and likelihood there.
        betas: inverse temperatures.
        last: the rung of the posterior.
    """
    rung = jnp.arange(len(betas))
    # the higher the rung, the fewer draws of the prior it accepts; not tuned
    shares = jnp.where((rung > 0) & (rung <= last), 1 / jnp.maximum(rung, 1), 0.0)

    def propose(replicas: Replicas, proposed: tuple) -> tuple[Replicas, None]:
        key, z, point = proposed
        key_rung, key_accept = jax.random.split(key)
        k = jax.random.categorical(key_rung, jnp.log(shares))
        gain = betas[k] * (point.log_likelihood - replicas.point.log_likelihood[k])
        accepted = jnp.log(jax.random.uniform(key_accept)) < gain
        accepted &= jnp.isfinite(point.log_likelihood)
        new = Replicas(z, point, jnp.ones((), bool))
        put = partial(_put, k=k, accepted=accepted)
        return jax.tree.map(put, replicas, new), None

    keys = jax.random.split(key, len(drawn[1].log_likelihood))
    return jax.lax.scan(propose, replicas, (keys, *drawn))[0]


def _put(x: Array, new: Array, k: Array, accepted: Array) -> Array:
    """Return the array with another k-th entry, if that was accepted."""
    return x.at[k].set(jnp.where(accepted, new, x[k]))


def swap_probability(
    betas: Float[Array, " rungs"],
    point: TemperedPoint,
    active: Bool[Array, " pairs"],
) -> Float[Array, " pairs"]:
    r"""Return :math:`\min(1, e^{(\beta' - \beta)(\ell(z) - \ell(z'))})` of all pairs.

    The prior density of both states stands in numerator and denominator, and cancels.
    A state of no likelihood, or of an undefined one, stays where it is.

    Args:
        betas: inverse temperatures.
        point: prior and likelihood of the state at each.
        active: which pairs are in use.
    """
    log_likelihood = point.log_likelihood
    log_ratio = jnp.diff(betas) * (log_likelihood[:-1] - log_likelihood[1:])
    usable = active & jnp.isfinite(log_likelihood[:-1])
    usable &= ~jnp.isnan(log_ratio)
    return jnp.where(usable, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)


def swap(
    key: PRNGKey,
    replicas: Replicas,
    accept_prob: Float[Array, " pairs"],
    parity: Int[Array, ""],
    last: Int[Array, ""],
) -> tuple[Replicas, Int[Array, ""]]:
    """Return one chain's states after swaps of the even or odd pairs, and restarts.

    Args:
        key: random key.
        replicas: of one chain.
        accept_prob: acceptance probability of each pair.
        parity: 0 for even pairs, 1 for odd ones.
        last: the rung of the posterior.
    """
    pair = jnp.arange(len(accept_prob))
    accepted = jax.random.uniform(key, accept_prob.shape) < accept_prob
    accepted &= pair % 2 == parity
    up = jnp.concatenate([accepted, jnp.zeros(1, bool)])
    down = jnp.concatenate([jnp.zeros(1, bool), accepted])
    source = jnp.arange(len(up)) + up - down
    replicas = jax.tree.map(lambda x: x[source], replicas)
    # a state arrives at the posterior, and turns back from there or from the prior
    restarts = replicas.from_prior[last].astype(int)
    from_prior = replicas.from_prior.at[last].set(False).at[0].set(True)
    return replicas._replace(from_prior=from_prior), restarts
