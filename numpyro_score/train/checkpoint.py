"""Checkpoints of training: the state of a run on disk.

Orbax renames a finished folder into place, so that a process killed at any moment
leaves the last complete checkpoint. The state holds the random key: a resumed run
equals the uninterrupted one, on a CPU bit for bit.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.checkpoint import RunFolder, key_data
from numpyro_score.checks import check_count, check_kind
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
    """Folder of the checkpoints of a run, their number and their interval.

    Args:
        path: folder of one run; made if it does not exist.
        keep: number of the latest checkpoints that are kept.
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
        check_kind("path", self.path, (str, os.PathLike), "a folder's name")
        check_count("keep", self.keep, "the number of checkpoints that are kept")
        check_count("every", self.every, "the number of blocks between checkpoints")

    def open(self, fingerprint: dict[str, Any]) -> "OpenCheckpoints":
        """Return the checkpoints of a run with this fingerprint.

        Raises:
            ValueError: if the folder holds checkpoints of another run.
        """
        folder = RunFolder.open(Path(self.path), fingerprint, REFUSAL, self.keep)
        return OpenCheckpoints(folder, self.every)


@dataclass(frozen=True)
class OpenCheckpoints:
    """Checkpoints of a run in progress."""

    folder: RunFolder
    every: int

    def latest(self, run: FitState, key: PRNGKey) -> FitState:
        """Return the last complete state, or ``run`` if there is none.

        Args:
            run: the state before the first step.
            key: a key of the run's implementation.
        """
        steps = self.folder.steps()
        return self.folder.load(steps[-1], run, key) if steps else run

    def save(self, run: FitState, options: FitOptions) -> None:
        """Save the state after every ``every`` blocks and at the end of the run."""
        taken = int(run.taken)
        interval = self.every * options.block_length
        if taken % interval and options.should_continue(run):
            return
        self.folder.save(taken, run)

    def close(self) -> None:
        """Finish writing."""
        self.folder.close()


def run_with_checkpoints(
    problem: ScoreMatchingProblem,
    run: FitState,
    data: ArrayDataset | IterableDataset,
    options: FitOptions,
    key: PRNGKey,
    checkpoint: str | os.PathLike | Checkpoints,
) -> FitState:
    """Return the state after a run that continues from its last checkpoint.

    Args:
        problem: the loss.
        run: the state before the first step.
        data: source of batches.
        options: settings of the run.
        key: random key of the run.
        checkpoint: folder of the run, or :class:`Checkpoints`.

    Raises:
        ValueError: if the folder holds checkpoints of another run.
    """
    if not isinstance(checkpoint, Checkpoints):
        checkpoint = Checkpoints(checkpoint)
    saved = checkpoint.open(fingerprint(problem, run, data, options, key))
    run = saved.latest(run, key)
    if isinstance(data, IterableDataset):
        data.skip(int(run.taken))
    try:
        return fit(problem, run, data, options, save=saved.save)
    finally:
        saved.close()


def _first_batch(data: ArrayDataset | IterableDataset) -> Batch:
    """Return the first batch of a run."""
    if isinstance(data, ArrayDataset):
        return data.batch(jnp.zeros((), int), jax.random.key(0))  # shapes only
    return data.peek()


def fingerprint(
    problem: ScoreMatchingProblem,
    run: FitState,
    data: ArrayDataset | IterableDataset,
    options: FitOptions,
    key: PRNGKey,
) -> dict[str, Any]:
    """Return the identity of a run as JSON: key, length, data and all settings.

    Functions without a name, such as those of an optimizer, are identified by the
    program of a training step.
    """
    state, is_array = run.state, isinstance(data, ArrayDataset)
    rows = data.rows if isinstance(data, ArrayDataset) else None
    initial = digest((rows, state.params, state.ema_params, state.step))
    fixed = state.fixed
    maps = fixed.standardize, fixed.standardize_context, fixed.linear_baseline
    batch = jax.eval_shape(lambda: _first_batch(data))
    settings = ("parametrization", "net", "drop_context", "compute_dtype")
    return {
        "key": np.asarray(key_data(key)).tolist(),
        "num_steps": options.num_steps,
        "batch_size": data.batch_size if isinstance(data, ArrayDataset) else None,
        "validation": digest(options.validation),
        "patience": options.patience,
        "process": describe(problem.sde),
        "loss": describe(problem.objective),
        **{name: describe(getattr(problem, name)) for name in settings},
        "accumulate": options.accumulate,
        "optimizer": digest(state.opt_state),
        "support": describe(fixed.support),
        "standardization": digest((*maps, fixed.gaussian_baseline)),
        "data and initial weights" if is_array else "initial weights": initial,
        "program of a training step": digest_program(
            options.step(problem), state, batch
        ),
    }
