"""One step of an optimization: gradient of a batch, update, average of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from numpyro_score.data.rows import Batch
from numpyro_score.train.state import TrainState
from numpyro_score.typing import Params, PRNGKey, Scalar

LEARNING_RATE = 2e-3  # peak; what it learns: python -m tests.benchmarks.learning
EMA_EXPONENT = 6.94  # relative width of the average 10 % (Karras et al. 2024, eq. 124)


@runtime_checkable
class TrainingProblem(Protocol):
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

    problem: TrainingProblem
    optimizer: optax.GradientTransformation | None = None
    accumulate: int = 1
    ema: bool = True

    def init(
        self, params: Params, fixed: Any, rng_key: PRNGKey, num_steps: int | None = None
    ) -> TrainState:
        """Return the state before the first step.

        Args:
            params: initial weights.
            fixed: see :class:`TrainingProblem`.
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
        loss, grads = self.loss_and_gradient(state, key, batch)

        def loss_fn(params: Params) -> Scalar:
            return self.batch_loss(params, state, key, batch)

        state = state._replace(rng_key=rng_key)
        state = apply_gradients(
            self.optimizer, state, loss, grads, loss_fn, ema=self.ema
        )
        return state, loss

    def loss_and_gradient(
        self, state: TrainState, key: PRNGKey, batch: Batch
    ) -> tuple[Scalar, Params]:
        """Return loss and gradient, averaged over the parts of a batch."""
        value_and_grad = jax.value_and_grad(self.problem.loss)
        gradient = partial(value_and_grad, state.params, state.fixed)
        if self.accumulate == 1:
            return gradient(key, batch)

        def body(total: Any, part: tuple[PRNGKey, Batch]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(*part)), None

        shapes = jax.eval_shape(gradient, key, batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, self._split(key, batch))
        return jax.tree.map(lambda leaf: leaf / self.accumulate, total)

    def batch_loss(
        self, params: Params, state: TrainState, key: PRNGKey, batch: Batch
    ) -> Scalar:
        """Return the loss at other weights, with the noise of the gradient.

        For optimizers that search along a line.
        """
        if self.accumulate == 1:
            return self.problem.loss(params, state.fixed, key, batch)

        @jax.checkpoint
        def one(part: tuple[PRNGKey, Batch]) -> Scalar:
            return self.problem.loss(params, state.fixed, *part)

        return jax.lax.map(one, self._split(key, batch)).mean()

    def _split(self, key: PRNGKey, batch: Batch) -> tuple[PRNGKey, Batch]:
        """Return one key and an equal share of the rows per part."""
        parts, size = self.accumulate, len(batch.x)
        if size % parts:
            raise ValueError(
                "`accumulate` must divide the batch size: all parts are of equal size. "
                f"Got {parts} parts of {size} rows."
            )
        return jax.random.split(key, parts), jax.tree.map(
            lambda part: part.reshape(parts, size // parts, *part.shape[1:]), batch
        )


def build(net: Callable | nnx.Module, key: PRNGKey) -> tuple[Params, nnx.GraphDef]:
    """Return weights and structure of a net, or of the net that a callable builds.

    Args:
        net: a module, or a callable that returns one when called with ``rngs=``.
        key: random key of the initial weights.

    Raises:
        TypeError: for a Linen module and for a net with state besides its weights.
    """
    _check_framework(net)
    module = net if isinstance(net, nnx.Module) else net(rngs=nnx.Rngs(key))
    if not isinstance(module, nnx.Module):
        raise TypeError(
            "`net` must be an `nnx.Module`, or build one when called with `rngs=`. "
            f"Got one that builds {type(module).__name__}."
        )
    graphdef, params = nnx.split(module)
    _check_variables(params)
    return params, graphdef


def _check_framework(net: Any) -> None:
    kind = net if isinstance(net, type) else type(net)
    if any(base.__module__.startswith("flax.linen") for base in kind.__mro__):
        raise TypeError(
            "`net` must be an `nnx.Module`, or build one when called with `rngs=`: "
            "a Linen module does not hold its weights. Pass `net = "
            "flax.nnx.bridge.ToNNX(module, rngs).lazy_init(x, noise)`, x one point and "
            "noise a number, after `net.to_nnx__rngs = None`. "
            f"Got the Linen module {kind.__name__}."
        )


def _check_variables(params: Any) -> None:
    """Raise for a net with variables that are not trained weights."""
    state = (nnx.BatchStat, nnx.RngState, nnx.Cache)
    for path, variable in nnx.to_flat_state(params):
        if isinstance(variable, state) or not jnp.issubdtype(
            variable.get_value().dtype, jnp.floating
        ):
            where = ".".join(map(str, path))
            raise TypeError(
                "`net` must hold nothing but weights: the score of a point must not "
                "depend on other points, on chance or on calls before. Use `LayerNorm` "
                "or `GroupNorm` in place of `BatchNorm`, and `patience` or "
                "`optax.adamw` in place of `Dropout`. "
                f"Got {type(variable).__name__} at `{where}`."
            )


def default_optimizer() -> optax.GradientTransformation:
    """Return Adam on gradients clipped to norm 1, before multiplication by a rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def _accepted(update: Callable, extra: dict[str, Any]) -> dict[str, Any]:
    """Return those of the extra arguments that an optimizer takes."""
    parameters = signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}


def apply_gradients(
    optimizer: optax.GradientTransformation | None,
    state: TrainState,
    loss: Scalar,
    grads: Params,
    loss_fn: Callable[[Params], Scalar],
    *,
    ema: bool = True,
) -> TrainState:
    r"""Return the state after one step along ``grads``.

    Optimizers that ask for the loss, such as ``reduce_on_plateau`` and ``lbfgs``, get
    that of the batch, as a number and as a function of the weights.

    The rate of the default optimizer at step k of n is
    :math:`\frac{1}{2} (1 + \cos(\pi k / n))` times ``LEARNING_RATE``. The average of
    the weights gives step k the share :math:`1 - (1 - 1/k)^{\gamma + 1}`, with
    :math:`\gamma` = ``EMA_EXPONENT`` (Karras et al. 2024, eq. 123).
    """
    transformation = optimizer or default_optimizer()
    extra = {"value": loss, "grad": grads, "value_fn": loss_fn}
    extra = _accepted(transformation.update, extra)
    updates, opt_state = transformation.update(
        grads, state.opt_state, state.params, **extra
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
        # the share is float64 where that is JAX's default, and weights are float32
        average = jax.tree.map(lambda x, like: x.astype(like.dtype), average, params)
    return state._replace(
        params=params, ema_params=average, opt_state=opt_state, step=step
    )
