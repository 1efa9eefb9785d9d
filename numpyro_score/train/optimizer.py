"""Weights: how they begin, descend and are averaged."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from numpyro_score.train.state import ScoreMatchingState
from numpyro_score.typing import PRNGKey, Scalar

LEARNING_RATE = 2e-3  # peak of the default schedule
EMA_EXPONENT = 6.94  # the average is 10 % of the run wide (Karras et al. 2024, eq. 124)


def build(net: Callable | nnx.Module, key: PRNGKey) -> tuple[Any, nnx.GraphDef]:
    """Return weights and structure of a net, or of the net that a callable builds."""
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
    """Raise for a net with state that is not trained, which the score would lose."""
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
    """Return Adam on gradients clipped to norm 1; ``apply_gradients`` sets its rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def _accepted(update: Callable, extra: dict[str, Any]) -> dict[str, Any]:
    """Return those of the extra arguments that an optimizer takes."""
    parameters = signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}


def apply_gradients(
    optim: optax.GradientTransformation | None,
    state: ScoreMatchingState,
    loss: Scalar,
    grads: Any,
    loss_fn: Callable[[Any], Scalar],
) -> ScoreMatchingState:
    r"""Return the state after one step along ``grads``.

    Optimizers that ask for the loss, such as ``reduce_on_plateau`` and ``lbfgs``, get
    that of the batch, as a number and as a function of the weights.

    The default rate falls as a cosine over the run. The weights' average has the power
    profile :math:`\beta_k = (1 - 1/k)^{\gamma + 1}` (Karras et al. 2024, eq. 123).
    """
    optimizer = optim or default_optimizer()
    extra = {"value": loss, "grad": grads, "value_fn": loss_fn}
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, **_accepted(optimizer.update, extra)
    )
    if optim is None:
        progress = jnp.minimum(state.step / state.num_steps, 1.0)
        rate = -0.5 * LEARNING_RATE * (1 + jnp.cos(jnp.pi * progress))
        updates = jax.tree.map(lambda u: rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    share = 1 - (1 - 1 / step) ** (EMA_EXPONENT + 1)
    return state._replace(
        params=params,
        ema_params=optax.incremental_update(params, state.ema_params, share),
        opt_state=opt_state,
        step=step,
    )
