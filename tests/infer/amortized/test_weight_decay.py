"""Runs that overfit are repeated with weight decay."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from numpyro_score.data.rows import Batch
from numpyro_score.infer.amortized.weight_decay import (
    LEARNING_RATE,
    adamw_cosine,
    fit_with_weight_decay,
    overfits,
)
from numpyro_score.train import Checkpoints
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.state import ScoreMatchingRunResult

KEY = jax.random.key(0)
FALLING, EARLY, LOWER, LOWEST = (
    [3.0, 2.0, 1.5],
    [2.0, 3.0, 3.0],
    [1.0, 3.0, 3.0],
    [1.9, 0.5, 0.6],
)


CTRL_C: list[float] = []


@dataclass(frozen=True)
class Scripted:
    """A trainer whose runs return the next of some curves of held-out loss."""

    optim: Any = None
    curves: Any = field(default=())
    calls: list = field(default_factory=list)

    def fit(self, rng_key, data, options, *, batch_size, checkpoint):
        losses = self.curves[len(self.calls)]
        if losses is CTRL_C:
            raise KeyboardInterrupt
        self.calls.append((self.optim, checkpoint, options.num_steps))
        return ScoreMatchingRunResult(None, jnp.zeros(1), jnp.array(losses), None)


def run(*curves, patience=2, checkpoint=None, **settings):
    trainer = Scripted(curves=curves, calls=[], **settings)
    data = Batch(jnp.zeros((10, 1)))
    options = FitOptions(100, validation=data, patience=patience)
    result = fit_with_weight_decay(
        trainer, KEY, data, options, batch_size=5, checkpoint=checkpoint
    )
    return result.validation_losses.tolist(), trainer.calls


@pytest.mark.parametrize(
    ("curves", "best", "num_runs"),
    [
        ((FALLING,), FALLING, 1),
        ((EARLY, FALLING), FALLING, 2),
        ((EARLY, LOWER, EARLY), LOWER, 3),
        ((EARLY, EARLY), EARLY, 2),
        ((EARLY, LOWEST), LOWEST, 2),
        ((EARLY, LOWER, LOWEST), LOWEST, 3),
    ],
)
def test_runs_end_when_decay_no_longer_helps(curves, best, num_runs):
    got, calls = run(*curves)
    np.testing.assert_allclose(got, best)
    assert len(calls) == num_runs
    assert calls[0][0] is None
    assert all(optim is not None for optim, *_ in calls[1:])
    assert [num_steps for *_, num_steps in calls] == [100, 25, 25][:num_runs]


def test_one_run_without_patience_or_with_an_optimizer():
    assert len(run(EARLY, patience=None)[1]) == 1
    assert len(run(EARLY, optim=optax.sgd(0.1))[1]) == 1


@pytest.mark.parametrize("wrap", [str, Path, Checkpoints])
def test_every_run_has_its_own_checkpoints(wrap):
    _, calls = run(EARLY, LOWER, LOWEST, checkpoint=wrap("runs/a"))
    folders = [getattr(saved, "path", saved) for _, saved, _ in calls]
    assert [str(folder) for folder in folders] == ["runs/a", "runs/a-1", "runs/a-2"]


def test_overfitting_is_exhausted_patience():
    result = ScoreMatchingRunResult(None, None, jnp.array(EARLY), None)
    assert overfits(result, 2)
    assert not overfits(result, 3)


def test_interrupt_of_a_repetition_keeps_the_run_before():
    with pytest.warns(UserWarning, match="the result is the best run before"):
        best, calls = run(EARLY, LOWER, CTRL_C)
    assert (best, len(calls)) == (LOWER, 2)
    with pytest.raises(KeyboardInterrupt):
        run(CTRL_C)


@pytest.mark.parametrize("decay", [1.0, 4.0])
def test_a_step_without_gradient_shrinks_weights_by_rate_times_decay(decay):
    """The rate falls by a cosine, to a half in the middle of the run."""
    optimizer = adamw_cosine(decay, 10)
    weights, none = jnp.array([2.0, -1.0]), jnp.zeros(2)
    state, shares = optimizer.init(weights), []
    for _ in range(6):
        step, state = optimizer.update(none, state, weights)
        shares.append(-step / weights)
    np.testing.assert_allclose(shares[0], LEARNING_RATE * decay, rtol=1e-4)
    np.testing.assert_allclose(shares[5], 0.5 * LEARNING_RATE * decay, rtol=1e-4)
