"""The state before the first step."""

from typing import Any

import jax
import jax.numpy as jnp

from numpyro_score.data.rows import Batch
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.train.linear_baseline import fit_linear_baseline
from numpyro_score.train.optimizer import build, default_optimizer
from numpyro_score.train.state import ScoreMatchingState
from numpyro_score.typing import PRNGKey


def init_state(
    trainer: Any, rng_key: PRNGKey, rows: Batch, num_steps: int | None
) -> ScoreMatchingState:
    """Return fresh weights and the maps to the unit scale, after checking the net.

    Args:
        trainer: a :class:`~numpyro_score.train.ScoreMatching`.
        rng_key: random key of the weights and of all training noise.
        rows: checked rows to standardize by.
        num_steps: length of the run, for the schedule; None for a constant rate.
    """
    x, support = rows.x, None
    if trainer.support is not None:
        support = Support.of(trainer.support, x.shape[1:])
        support.check(x)
        x = support.unconstrain(x)
    standardize = trainer.standardize or (
        Affine.per_dimension if x.ndim <= 2 else Affine.shared
    )
    given = rows.context is not None
    affine = standardize(x)
    affine.check("data")
    affine_context = Affine.context(rows.context) if given else None
    if affine_context is not None:
        affine_context.check("context")
    center = None
    if trainer.center:
        affine, center = fit_linear_baseline(affine, affine_context, x, rows.context)
    key_net, rng_key = jax.random.split(rng_key)
    params, graphdef = build(trainer.net, key_net)
    state = ScoreMatchingState(
        params=params,
        ema_params=params,
        opt_state=(trainer.optim or default_optimizer()).init(params),
        step=jnp.zeros((), int),
        num_steps=jnp.asarray(jnp.inf if num_steps is None else num_steps, float),
        standardize=affine,
        graphdef=graphdef,
        rng_key=rng_key,
        standardize_context=affine_context,
        support=support,
        center=center,
    )
    denoiser = trainer.get_denoiser(params, state)
    denoiser.check(x[0], rows.context[0] if given else None)
    if trainer.drop_context > 0:
        denoiser.check(x[0], None)
    return state
