"""Training that is repeated with weight decay if it overfits.

With few simulations the held-out loss has an early minimum and training stops. It is
then repeated for a quarter of the steps with decoupled weight decay (Loshchilov and
Hutter 2019, algorithm 2), and again with more of it while the held-out loss decreases.
A run that does not overfit is not repeated.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import optax

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.data.rows import Batch
from numpyro_score.train import Checkpoints
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.state import ScoreMatchingRunResult
from numpyro_score.typing import PRNGKey

# The values were set together; tests/benchmarks/amortized.py measures the result.
WEIGHT_DECAYS = (1.0, 4.0)  # a step multiplies weights by 1 - learning rate * decay
LEARNING_RATE = 1e-3  # peak, of runs with decay
STEPS_DIVISOR = 4  # steps of the first run over those of a run with decay


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
        batch_size: int | None,
        checkpoint: str | os.PathLike | Checkpoints | None,
    ) -> ScoreMatchingRunResult:
        """Return the result of one run."""


def fit_with_weight_decay(
    trainer: ScoreTrainer,
    rng_key: PRNGKey,
    data: Batch,
    options: FitOptions,
    *,
    batch_size: int | None,
    checkpoint: str | os.PathLike | Checkpoints | None = None,
) -> ScoreMatchingRunResult:
    """Return the run with the lowest held-out loss, without or with weight decay.

    Args:
        trainer: the trainer; with ``optim`` set it runs once.
        rng_key: random key, the same for all runs.
        data: rows to train on.
        options: settings of the first run; without ``patience``, the number of blocks
            without a new lowest held-out loss after which a run stops, it is the only
            one.
        batch_size: rows per step; None for 256, or all if there are fewer.
        checkpoint: folder of the first run; a number is appended for later runs.

    Returns:
        The result of the best run.
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
        try:
            last = run(decaying, options, number)
        except KeyboardInterrupt:
            warn_caller(
                "Interrupted while training was repeated with weight decay: the result "
                "is the best run before."
            )
            break
        if not _min_validation_loss(last) < _min_validation_loss(best):
            break
        best = last
    return best


def adamw_cosine(decay: float, num_steps: int) -> optax.GradientTransformation:
    """Return AdamW with a cosine learning-rate schedule and gradients clipped to 1.

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


def _min_validation_loss(result: ScoreMatchingRunResult) -> float:
    """Return the lowest held-out loss of a run, ignoring NaN."""
    assert result.validation_losses is not None
    return float(jnp.nanmin(result.validation_losses))


def overfits(result: ScoreMatchingRunResult, patience: int) -> bool:
    """Return whether the lowest held-out loss is ``patience`` blocks from the end."""
    assert result.validation_losses is not None
    losses = result.validation_losses
    return len(losses) - 1 - int(jnp.nanargmin(losses)) >= patience


def _folder(checkpoint: Any, number: int) -> Any:
    """Return the checkpoint folder of a later run."""
    if checkpoint is None:
        return None
    if isinstance(checkpoint, Checkpoints):
        return replace(checkpoint, path=_folder(checkpoint.path, number))
    path = Path(checkpoint)
    return path.with_name(f"{path.name}-{number}")
