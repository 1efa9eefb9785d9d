"""Training that meets overfitting with weight decay, in proportion to the need.

With few simulations a net learns them by heart: the held-out loss has its minimum early
and training stops. Then it is repeated for a quarter of the steps with decoupled weight
decay (Loshchilov and Hutter 2019, algorithm 2), and with more of it as long as that
helps. Where the first run does not overfit it is the only one.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from numpyro_score.train import (
    Checkpoints,
    ScoreMatching,
)
from numpyro_score.train.state import ScoreMatchingRunResult

WEIGHT_DECAYS = (
    1.0,
    4.0,
)  # times the learning rate: what a step takes off every weight
LEARNING_RATE = 1e-3  # peak, of runs with decay
STEPS_DIVISOR = 4  # a run with decay takes one of so many steps


def fit_with_weight_decay(
    trainer: ScoreMatching,
    rng_key: Any,
    num_steps: int,
    data: Any,
    *,
    patience: int | None,
    checkpoint: str | os.PathLike | Checkpoints | None = None,
    **options: Any,
) -> ScoreMatchingRunResult:
    """Run a trainer, again with weight decay while it overfits and decay helps.

    Args:
        trainer: the trainer; one with an optimizer of its own runs once.
        rng_key: random key, the same for all runs.
        num_steps: steps of the first run.
        data: what is trained on.
        patience: blocks without a new lowest held-out loss after which a run stops;
            None for one run.
        checkpoint: folder of the first run; those of others have a number added.
        options: of :meth:`ScoreMatching.run
            <numpyro_score.train.ScoreMatching.run>`, for every run.

    Returns:
        The run with the lowest held-out loss.
    """
    options["patience"] = patience
    best = trainer.run(rng_key, num_steps, data, checkpoint=checkpoint, **options)
    if patience is None or trainer.optim is not None or "init_state" in options:
        return best
    last, num_steps = best, max(num_steps // STEPS_DIVISOR, 1)
    for i, decay in enumerate(WEIGHT_DECAYS):
        if not overfits(last, patience):
            break
        last = replace(trainer, optim=adamw_cosine(decay, num_steps)).run(
            rng_key, num_steps, data, checkpoint=_folder(checkpoint, i + 1), **options
        )
        if not min_validation_loss(last) < min_validation_loss(best):
            break
        best = last
    return best


def adamw_cosine(decay: float, num_steps: int) -> optax.GradientTransformation:
    """Return Adam with weight decay, at a rate that falls as a cosine.

    Example:
        >>> optim = adamw_cosine(1.0, 10)
        >>> state = optim.init(jnp.ones(()))
        >>> update, _ = optim.update(jnp.zeros(()), state, jnp.ones(()))
        >>> round(float(update), 6)
        -0.001
    """
    rate = optax.cosine_decay_schedule(LEARNING_RATE, num_steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=decay)
    )


def min_validation_loss(result: ScoreMatchingRunResult) -> float:
    """Return the lowest held-out loss of a run."""
    assert result.validation_losses is not None
    return float(jnp.nanmin(result.validation_losses))


def overfits(result: ScoreMatchingRunResult, patience: int) -> bool:
    """Return whether a run stopped because its held-out loss had risen for so long."""
    assert result.validation_losses is not None
    losses = result.validation_losses
    return len(losses) - 1 - int(jnp.nanargmin(losses)) >= patience


def _folder(checkpoint: Any, number: int) -> Any:
    """Return the folder of a later run."""
    if checkpoint is None:
        return None
    if isinstance(checkpoint, Checkpoints):
        return replace(checkpoint, path=_folder(checkpoint.path, number))
    path = Path(checkpoint)
    return path.with_name(f"{path.name}-{number}")
