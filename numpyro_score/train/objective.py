"""One training step's loss: rows in physical units, as the objective sees them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.data.rows import Batch
from numpyro_score.loss.denoising import BatchDenoiseFn
from numpyro_score.score.denoiser import NetDenoiser
from numpyro_score.train.state import ScoreMatchingState
from numpyro_score.typing import PRNGKey, Scalar


def training_loss(
    trainer: Any,
    params: Any,
    state: ScoreMatchingState,
    key: PRNGKey,
    rows: Batch,
) -> Scalar:
    """Return the objective of a :class:`ScoreMatching` trainer at some weights."""
    check_context(trainer, state, rows)
    denoiser = trainer.get_denoiser(params, state, trainer.compute_dtype)
    x0, data_score = standardize_batch(state, rows)
    context = rows.context
    extra = {} if data_score is None else {"data_score": data_score}
    if trainer.drop_context > 0 and context is not None:
        key_drop, key = jax.random.split(key)
        denoise = drop_context(denoiser, context, key_drop, trainer.drop_context)
    elif context is not None:
        denoise = lambda x, level: jax.vmap(denoiser)(x, level, context)  # noqa: E731
    else:
        denoise = jax.vmap(denoiser)
    return trainer.loss(key, denoise, x0, trainer.sde, **extra)


def accumulated_gradient(
    trainer: Any, state: ScoreMatchingState, key: PRNGKey, rows: Batch
) -> tuple[Scalar, Any]:
    """Return loss and gradient, averaged over the parts of a batch one by one.

    Raises:
        ValueError: unless the parts can be of equal size.
    """
    value_and_grad = jax.value_and_grad(partial(training_loss, trainer))
    parts = trainer.accumulate
    if parts == 1:
        return value_and_grad(state.params, state, key, rows)

    def body(total: Any, inputs: tuple) -> tuple[Any, None]:
        return jax.tree.map(
            jnp.add, total, value_and_grad(state.params, state, *inputs)
        ), None

    shapes = jax.eval_shape(value_and_grad, state.params, state, key, rows)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, _split(key, rows, parts))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def accumulated_loss(
    trainer: Any, params: Any, state: ScoreMatchingState, key: PRNGKey, rows: Batch
) -> Scalar:
    """Return the loss at other weights, with the noise of :func:`accumulated_gradient`.

    For optimizers that search along a line.
    """
    if trainer.accumulate == 1:
        return training_loss(trainer, params, state, key, rows)

    @jax.checkpoint
    def one(part: tuple) -> Scalar:
        return training_loss(trainer, params, state, *part)

    return jax.lax.map(one, _split(key, rows, trainer.accumulate)).mean()


def _split(key: PRNGKey, rows: Batch, parts: int) -> tuple[PRNGKey, Batch]:
    """Return one key and an equal share of the rows per part."""
    size = len(rows.x)
    if size % parts:
        raise ValueError(
            "`accumulate` must divide the batch size: all parts are of equal size. "
            f"Got {parts} parts of {size} rows."
        )
    return jax.random.split(key, parts), jax.tree.map(
        lambda part: part.reshape(parts, size // parts, *part.shape[1:]), rows
    )


def standardize_batch(
    state: ScoreMatchingState, rows: Batch
) -> tuple[Array, Array | None]:
    r"""Return rows and their data scores on the unit scale.

    With x = T(z) and z = loc + scale u, the score of u is
    :math:`scale (J_T^\top \nabla \log p(x) + \nabla_z \log |\det J_T|)`.
    """
    z, data_score = rows.x, rows.data_score
    if state.support is not None:
        z = state.support.unconstrain(rows.x)
        data_score = None if data_score is None else _pull_back(state, z, data_score)
    if data_score is not None:
        data_score = state.standardize.scale * data_score
    return jax.vmap(state.standardize.forward)(z), data_score


def _pull_back(state: ScoreMatchingState, z: Array, data_score: Array) -> Array:
    """Return the score in unconstrained space of a law known by its score in x."""
    support = state.support
    assert support is not None

    def one(z: Array, score: Array) -> Array:
        def log_det(z: Array) -> Array:
            return support.log_abs_det_jacobian(z, support.constrain(z)).sum()

        _, pullback = jax.vjp(support.constrain, z)
        return pullback(score)[0] + jax.grad(log_det)(z)

    return jax.vmap(one)(z, data_score)


def drop_context(
    denoiser: NetDenoiser, context: Array, key: PRNGKey, share: float
) -> BatchDenoiseFn:
    """Return a denoiser that sees no context in a random ``share`` of the rows.

    The number of such rows is fixed, so the net runs once per row. Which rows they are
    is random, because stratified noise levels increase along the batch.
    """
    order = jax.random.permutation(key, len(context))
    count = max(1, round(share * len(context)))
    back = jnp.argsort(order)

    def denoise(x: Array, level: Array) -> Array:
        x, level = x[order], level[order]
        without = jax.vmap(denoiser)(x[:count], level[:count])
        given = jax.vmap(denoiser)(x[count:], level[count:], context[order[count:]])
        return jnp.concatenate([without, given])[back]

    return denoise


def check_context(trainer: Any, state: ScoreMatchingState, rows: Batch) -> None:
    """Raise if a context is missing or not expected, or if the objective mixes rows."""
    expected = state.standardize_context
    shape = None if expected is None else expected.loc.shape
    got = None if rows.context is None else jnp.shape(rows.context)[1:]
    if shape != got:
        raise ValueError(
            "`context` must be given for every row exactly if training began with it, "
            f"and in the same shape. Got {got}, expected {shape}."
        )
    if got is not None and getattr(trainer.loss, "batch_coupled", False):
        raise ValueError(
            "`loss` uses the whole batch as draws of one law, but each row has its own "
            "`context`: use an objective that looks at one row at a time, such as "
            f"DenoisingScoreMatching(). Got {trainer.loss}."
        )
