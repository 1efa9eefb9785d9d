"""Checkpoints of a run: what was done so far, on disk, complete or not at all.

Written by orbax, which renames a finished folder into place, so that a process killed
at any moment leaves the last complete checkpoint behind. The record holds the random
key, so a resumed run equals the uninterrupted one: bit for bit on a CPU.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.checkpoint import RunFolder, key_data
from numpyro_score.checks import check_integer
from numpyro_score.data.rows import ArrayDataset, Batch, IterableDataset
from numpyro_score.fingerprint import describe, digest, digest_program
from numpyro_score.train.fit import FitOptions, FitState, fit
from numpyro_score.train.objective import ScoreMatchingProblem
from numpyro_score.typing import PRNGKey

REFUSAL = (
    "`checkpoint` must be a folder of this very run: another run's weights cannot be "
    "continued as if they were its own. Choose another folder, or pass `init_state`."
)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is saved, and how many checkpoints are kept.

    Args:
        path: folder of one run; made if it does not exist.
        keep: how many of the latest checkpoints are kept.
        every: blocks between checkpoints; a run has twenty blocks.

    Raises:
        ValueError: for counts below 1.

    Example:
        >>> Checkpoints("runs/first", keep=3).every
        1
    """

    path: str | os.PathLike
    keep: int = 2
    every: int = 1

    def __post_init__(self) -> None:
        check_integer("keep", self.keep, "the number of checkpoints that are kept")
        check_integer("every", self.every, "the number of blocks between checkpoints")
        if min(self.keep, self.every) < 1:
            raise ValueError(
                "`keep` and `every` must be at least 1: they count checkpoints and "
                f"blocks. Got keep={self.keep}, every={self.every}."
            )

    def open(self, fingerprint: dict[str, Any]) -> "OpenCheckpoints":
        """Return the checkpoints of this run, which must be empty or its own.

        Raises:
            ValueError: if the folder holds checkpoints of another run.
        """
        folder = RunFolder.open(Path(self.path), fingerprint, REFUSAL, self.keep)
        return OpenCheckpoints(folder, self.every)


@dataclass(frozen=True)
class OpenCheckpoints:
    """Checkpoints of a run that is going on."""

    folder: RunFolder
    every: int

    def latest(self, record: FitState, key: PRNGKey) -> FitState:
        """Return the last saved record that is whole, or ``record`` if there is none.

        Args:
            record: the record of a run that has not begun.
            key: a key of the run's implementation.
        """
        steps = self.folder.steps()
        return self.folder.load(steps[-1], record, key) if steps else record

    def save(self, record: FitState, plan: FitOptions) -> None:
        """Save the record if its turn has come or the run has ended."""
        done = int(record.taken)
        if done % (self.every * plan.block_length) and plan.should_continue(record):
            return
        self.folder.save(done, record)

    def close(self) -> None:
        """Finish writing."""
        self.folder.close()


def run_with_checkpoints(
    problem: ScoreMatchingProblem,
    record: FitState,
    data: ArrayDataset | IterableDataset,
    plan: FitOptions,
    key: PRNGKey,
    checkpoint: str | os.PathLike | Checkpoints,
) -> FitState:
    """Run the blocks that no checkpoint holds yet, saving on the way."""
    if not isinstance(checkpoint, Checkpoints):
        checkpoint = Checkpoints(checkpoint)
    saved = checkpoint.open(fingerprint(problem, record, data, plan, key))
    record = saved.latest(record, key)
    if isinstance(data, IterableDataset):
        data.skip(int(record.taken))
    try:
        return fit(problem, record, data, plan, save=saved.save)
    finally:
        saved.close()


def first_batch(data: ArrayDataset | IterableDataset) -> Batch:
    """Return the first rows of a run."""
    if isinstance(data, ArrayDataset):
        return data.batch(jnp.zeros((), int), jax.random.key(0))
    return data.peek()


def fingerprint(
    problem: ScoreMatchingProblem,
    start: FitState,
    data: ArrayDataset | IterableDataset,
    plan: FitOptions,
    key: PRNGKey,
) -> dict[str, Any]:
    """Return what tells one run from another: key, length, data and all settings.

    Code without a name of its own, such as an optimizer's, counts by the program of a
    training step.
    """
    state, table = start.state, isinstance(data, ArrayDataset)
    rows = data.rows if isinstance(data, ArrayDataset) else None
    begin = digest((rows, state.params, state.ema_params, state.step))
    fixed = state.fixed
    affines = fixed.standardize, fixed.standardize_context, fixed.linear_baseline
    batch = jax.eval_shape(lambda: first_batch(data))
    settings = ("parametrization", "net", "drop_context", "compute_dtype")
    return {
        "key": np.asarray(key_data(key)).tolist(),
        "num_steps": plan.num_steps,
        "batch_size": data.batch_size if isinstance(data, ArrayDataset) else None,
        "validation": digest(plan.validation),
        "patience": plan.patience,
        "process": describe(problem.sde),
        "loss": describe(problem.objective),
        **{name: describe(getattr(problem, name)) for name in settings},
        "accumulate": plan.accumulate,
        "optimizer": digest(state.opt_state),
        "support": describe(fixed.support),
        "standardization": digest(affines),
        "data and initial weights" if table else "initial weights": begin,
        "program of a training step": digest_program(plan.step(problem), state, batch),
    }
