"""One step of an optimization: gradient of a batch, update, average of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from numpyro_score.data.rows import Batch
from numpyro_score.train.state import TrainState
from numpyro_score.typing import Params, PRNGKey, Scalar

LEARNING_RATE = 2e-3  # peak of the default schedule
EMA_EXPONENT = 6.94  # the average is 10 % of the run wide (Karras et al. 2024, eq. 124)


@runtime_checkable
class Problem(Protocol):
    """A loss to minimize. Instances are hashable: they are static under ``jit``."""

    def loss(self, params: Params, fixed: Any, key: PRNGKey, batch: Batch) -> Scalar:
        """Return the loss of a batch.

        Args:
            params: weights; the only argument that is differentiated.
            fixed: arrays and structures that stay as they are during a run.
            key: random key.
            batch: rows of the data.
        """


@dataclass(frozen=True)
class TrainStep:
    """One step of an optimizer on a batch: (state, batch) -> (state, loss).

    Hashable, and static under ``jit``.

    Args:
        problem: the loss.
        optimizer: an Optax optimizer; None for :func:`default_optimizer` at a rate that
            falls as a cosine over the run.
        accumulate: number of equal parts into which a batch is split, one after the
            other, to save memory.
        ema: whether ``ema_params`` is an average; else it equals ``params``.
    """

    problem: Problem
    optimizer: optax.GradientTransformation | None = None
    accumulate: int = 1
    ema: bool = True

    def init(
        self, params: Params, fixed: Any, rng_key: PRNGKey, num_steps: int | None = None
    ) -> TrainState:
        """Return the state before the first step.

        Args:
            params: initial weights.
            fixed: see :class:`Problem`.
            rng_key: random key of all steps.
            num_steps: number of steps over which the default learning rate falls to
                zero; None for a constant rate.
        """
        return TrainState(
            params=params,
            ema_params=params,
            opt_state=(self.optimizer or default_optimizer()).init(params),
            step=jnp.zeros((), int),
            num_steps=jnp.asarray(jnp.inf if num_steps is None else num_steps, float),
            rng_key=rng_key,
            fixed=fixed,
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalar]:
        """Return the next state and the loss of the batch.

        Raises:
            ValueError: unless ``accumulate`` divides the size of the batch.
        """
        rng_key, key = jax.random.split(state.rng_key)
        loss, grads = self._accumulated_gradient(state, key, batch)
        state = state._replace(rng_key=rng_key)
        return apply_gradients(self.optimizer, state, grads, ema=self.ema), loss

    def _accumulated_gradient(
        self, state: TrainState, key: PRNGKey, batch: Batch
    ) -> tuple[Scalar, Params]:
        """Return loss and gradient, averaged over the parts of a batch."""
        value_and_grad = jax.value_and_grad(self.problem.loss)
        gradient = partial(value_and_grad, state.params, state.fixed)
        parts, size = self.accumulate, len(batch.x)
        if parts == 1:
            return gradient(key, batch)
        if size % parts:
            raise ValueError(
                "`accumulate` must divide the batch size: all parts are of equal size. "
                f"Got {parts} parts of {size} rows."
            )
        split = jax.tree.map(
            lambda part: part.reshape(parts, size // parts, *part.shape[1:]), batch
        )

        def body(total: Any, inputs: tuple) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(*inputs)), None

        shapes = jax.eval_shape(gradient, key, batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (jax.random.split(key, parts), split))
        return jax.tree.map(lambda leaf: leaf / parts, total)


def build(net: Callable | nnx.Module, key: PRNGKey) -> tuple[Params, nnx.GraphDef]:
    """Return weights and structure of a net, or of the net that a callable builds.

    Args:
        net: a module, or a callable that returns one when called with ``rngs=``.
        key: random key of the initial weights.
    """
    module = net if isinstance(net, nnx.Module) else net(rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(module)
    return params, graphdef


def default_optimizer() -> optax.GradientTransformation:
    """Return Adam on gradients clipped to norm 1, before multiplication by a rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def apply_gradients(
    optimizer: optax.GradientTransformation | None,
    state: TrainState,
    grads: Params,
    *,
    ema: bool = True,
) -> TrainState:
    r"""Return the state after one step along ``grads``.

    The rate of the default optimizer at step k of n is
    :math:`\frac{1}{2} (1 + \cos(\pi k / n))` times ``LEARNING_RATE``. The average of
    the weights gives step k the share :math:`1 - (1 - 1/k)^{\gamma + 1}`, with
    :math:`\gamma` = ``EMA_EXPONENT`` (Karras et al. 2024, eq. 123).
    """
    updates, opt_state = (optimizer or default_optimizer()).update(
        grads, state.opt_state, state.params
    )
    if optimizer is None:
        progress = jnp.minimum(state.step / state.num_steps, 1.0)
        rate = -0.5 * LEARNING_RATE * (1 + jnp.cos(jnp.pi * progress))
        updates = jax.tree.map(lambda u: rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    average = params
    if ema:
        share = 1 - (1 - 1 / step) ** (EMA_EXPONENT + 1)
        average = optax.incremental_update(params, state.ema_params, share)
    return state._replace(
        params=params, ema_params=average, opt_state=opt_state, step=step
    )
