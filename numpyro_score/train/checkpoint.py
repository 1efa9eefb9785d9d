"""Checkpoints of a run: what was done so far, on disk, complete or not at all.

The record holds the random
key, so a resumed run equals the uninterrupted one: bit for bit on a CPU.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from numpyro_score.checkpoint import (
    CheckpointFolder,
    arrays_to_tree,
    check_fingerprint,
    key_data,
    tree_to_arrays,
)
from numpyro_score.data.rows import ArrayDataset, IterableDataset
from numpyro_score.train.fit import FitOptions, FitState, fit_plan
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
        path = Path(self.path).absolute()
        path.mkdir(parents=True, exist_ok=True)
        check_fingerprint(path, fingerprint, REFUSAL)
        return OpenCheckpoints(CheckpointFolder(path, self.keep), self.every)


@dataclass(frozen=True)
class OpenCheckpoints:
    """Checkpoints of a run that is going on."""

    folder: CheckpointFolder
    every: int

    def latest(self, record: FitState, key: PRNGKey) -> FitState:
        """Return the last saved record, or ``record`` if there is none.

        Args:
            record: the record of a run that has not begun.
            key: a key of the run's implementation.
        """
        steps = self.folder.steps()
        if not steps:
            return record
        saved = self.folder.restore(steps[-1], tree_to_arrays(record))
        return arrays_to_tree(record, saved, key)

    def save(self, record: FitState, plan: FitOptions) -> None:
        """Save the record if its turn has come or the run has ended."""
        done = int(record.taken)
        if done % (self.every * plan.block) and plan.should_continue(record):
            return
        self.folder.save(done, record)

    def close(self) -> None:
        """Finish writing."""
        self.folder.close()


def run_with_checkpoints(
    trainer: Any,
    record: FitState,
    plan: FitOptions,
    data: ArrayDataset | IterableDataset,
    key: PRNGKey,
    checkpoint: str | os.PathLike | Checkpoints,
) -> FitState:
    """Run the blocks that no checkpoint holds yet, saving on the way."""
    if not isinstance(checkpoint, Checkpoints):
        checkpoint = Checkpoints(checkpoint)
    saved = checkpoint.open(fingerprint(key, plan.num_steps, data, record))
    record = saved.latest(record, key)
    if isinstance(data, IterableDataset):
        data.skip(int(record.taken))
    try:
        return fit_plan(trainer, record, plan, data, saved.save)
    finally:
        saved.close()


def fingerprint(
    key: PRNGKey, num_steps: int, data: ArrayDataset | IterableDataset, start: FitState
) -> dict[str, Any]:
    """Return what tells one run from another: key, length, batches and data."""
    table = isinstance(data, ArrayDataset)
    rows = jax.tree.leaves(data.rows) if isinstance(data, ArrayDataset) else []
    digest = hashlib.sha256()
    for leaf in [*rows, *tree_to_arrays(start.state.params).values()]:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return {
        "key": np.asarray(key_data(key)).tolist(),
        "num_steps": num_steps,
        "batch_size": data.batch_size if isinstance(data, ArrayDataset) else None,
        "data and initial weights" if table else "initial weights": digest.hexdigest(),
    }
