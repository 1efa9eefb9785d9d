"""The training loop that consistency models and reflow share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from numpyro_score.consistency.model import ConsistencyModel
from numpyro_score.typing import PRNGKey

LEARNING_RATE = 2e-3  # peak of the cosine schedule
NUM_LEVELS = 32  # noise levels of a path


def fit(
    key: PRNGKey,
    model: Any,
    loss: Callable,
    rows: Any,
    num_steps: int,
    batch_size: int,
) -> tuple[Any, Array]:
    """Train with Adam and a cosine schedule; return the averaged model and losses.

    Args:
        key: random key.
        model: where to start, a pytree of weights.
        loss: (model, key, rows) -> loss of a batch.
        rows: array, or pytree of arrays, from whose rows batches are drawn.
        num_steps: number of steps.
        batch_size: rows per step.
    """
    count = len(jax.tree.leaves(rows)[0])
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps)),
    )

    @jax.jit
    def run(key: PRNGKey, model: Any, rows: Any) -> tuple[Any, Array]:
        def body(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
            model, average, state = carry
            step, key = inputs
            key_rows, key_loss = jax.random.split(key)
            index = jax.random.randint(key_rows, (batch_size,), 0, count)
            batch = jax.tree.map(lambda part: part[index], rows)
            value, grads = jax.value_and_grad(loss)(model, key_loss, batch)
            # the map to physical units is no weight
            updates, state = optimizer.update(_only_weights(grads), state, model)
            model = optax.apply_updates(model, updates)
            share = 1 - (1 - 1 / (step + 1)) ** 8  # a tenth of the run, as in training
            average = optax.incremental_update(model, average, share)
            return (model, average, state), value

        keys = jax.random.split(key, num_steps)
        start = (model, model, optimizer.init(model))
        (_, average, _), losses = jax.lax.scan(
            body, start, (jnp.arange(num_steps, dtype=float), keys)
        )
        return average, losses

    return run(key, model, rows)


def _only_weights(grads: Any) -> Any:
    """Set gradients of the fixed maps to zero; Adam then leaves them alone."""
    if not isinstance(grads, ConsistencyModel):
        return grads
    maps = grads.standardize, grads.standardize_context, grads.center
    standardize, context, center = jax.tree.map(jnp.zeros_like, maps)
    return replace(
        grads, standardize=standardize, standardize_context=context, center=center
    )


def sample_levels(key: PRNGKey, num: int, num_levels: int) -> Array:
    """Draw indices of levels, half of them the first, the highest noise."""
    key_first, key_any = jax.random.split(key)
    index = jax.random.randint(key_any, (num,), 0, num_levels)
    return jnp.where(jax.random.bernoulli(key_first, 0.5, (num,)), 0, index)
