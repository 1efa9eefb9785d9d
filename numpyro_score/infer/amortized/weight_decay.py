"""Training that meets overfitting with weight decay, in proportion to the need.

With few simulations a net learns them by heart: the held-out loss has its minimum early
and training stops. Then it is repeated for a quarter of the steps with decoupled weight
decay (Loshchilov and Hutter 2019, algorithm 2), and with more of it as long as that
helps. Where the first run does not overfit it is the only one.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import optax

from numpyro_score.data.rows import Batch
from numpyro_score.train import Checkpoints
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.state import ScoreMatchingRunResult
from numpyro_score.typing import PRNGKey

WEIGHT_DECAYS = (1.0, 4.0)  # share of every weight per step, in learning rates
LEARNING_RATE = 1e-3  # peak, of runs with decay
STEPS_DIVISOR = 4  # of the steps of the first run, for runs with decay


@runtime_checkable
class ScoreTrainer(Protocol):
    """A trainer with an optimizer, such as :class:`~numpyro_score.train.ScoreMatching`.

    A dataclass: it is copied with another ``optim``.
    """

    @property
    def optim(self) -> optax.GradientTransformation | None:
        """The optimizer; None for the default one."""

    def fit(
        self,
        rng_key: PRNGKey,
        data: Batch,
        options: FitOptions,
        *,
        batch_size: int,
        checkpoint: str | os.PathLike | Checkpoints | None,
    ) -> ScoreMatchingRunResult:
        """Return the result of one run."""


def fit_with_weight_decay(
    trainer: ScoreTrainer,
    rng_key: PRNGKey,
    data: Batch,
    options: FitOptions,
    *,
    batch_size: int,
    checkpoint: str | os.PathLike | Checkpoints | None = None,
) -> ScoreMatchingRunResult:
    """Return the run of a trainer, without or with decay, of lowest validation loss.

    Runs with decay follow while a run overfits and decay lowers its loss.

    Args:
        trainer: the trainer; one with an optimizer of its own runs once.
        rng_key: random key, the same for all runs.
        data: rows to train on.
        options: settings of the first run; without ``patience`` it is the only one.
        batch_size: rows per step.
        checkpoint: folder of the first run; those of others have a number added.
    """

    def run(
        trainer: ScoreTrainer, options: FitOptions, number: int = 0
    ) -> ScoreMatchingRunResult:
        folder = _folder(checkpoint, number) if number else checkpoint
        return trainer.fit(
            rng_key, data, options, batch_size=batch_size, checkpoint=folder
        )

    last = best = run(trainer, options)
    patience = options.patience
    if patience is None or trainer.optim is not None:
        return best
    options = replace(options, num_steps=max(options.num_steps // STEPS_DIVISOR, 1))
    for number, decay in enumerate(WEIGHT_DECAYS, 1):
        if not overfits(last, patience):
            break
        optim = adamw_cosine(decay, options.num_steps)
        decaying: Any = replace(trainer, optim=optim)  # type: ignore[type-var]
        last = run(decaying, options, number)
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
