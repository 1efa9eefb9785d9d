"""Weights: how they begin, descend and are averaged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from numpyro_score.train.state import ScoreMatchingState
from numpyro_score.typing import PRNGKey

LEARNING_RATE = 2e-3  # peak of the default schedule
EMA_EXPONENT = 6.94  # the average is 10 % of the run wide (Karras et al. 2024, eq. 124)


def build(net: Callable | nnx.Module, key: PRNGKey) -> tuple[Any, nnx.GraphDef]:
    """Return weights and structure of a net, or of the net that a callable builds."""
    module = net if isinstance(net, nnx.Module) else net(rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(module)
    return params, graphdef


def default_optimizer() -> optax.GradientTransformation:
    """Return Adam on gradients clipped to norm 1; ``apply_gradients`` sets its rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def apply_gradients(
    optim: optax.GradientTransformation | None, state: ScoreMatchingState, grads: Any
) -> ScoreMatchingState:
    r"""Return the state after one step along ``grads``.

    The default rate falls as a cosine over the run. The weights' average has the power
    profile :math:`\beta_k = (1 - 1/k)^{\gamma + 1}` (Karras et al. 2024, eq. 123).
    """
    updates, opt_state = (optim or default_optimizer()).update(
        grads, state.opt_state, state.params
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
