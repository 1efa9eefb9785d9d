"""The loop of a training run: compiled blocks of steps, and what happens in between."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm.auto import tqdm

from numpyro_score.data.rows import ArrayDataset, Batch, IterableDataset, StackedBatches
from numpyro_score.train.sharding import batch_sharding, gather, shard
from numpyro_score.train.state import Progress, ScoreMatchingState

NUM_BLOCKS = 20  # compiled blocks per run, between which progress is shown


class FitState(NamedTuple):
    """Everything that a run has done so far; what a checkpoint holds.

    - **state**: training state.
    - **taken**: steps taken in this run.
    - **losses**: loss of every step, NaN for steps to come.
    - **validation_losses**: one per block, NaN for blocks to come.
    - **best_loss**: lowest validation loss so far.
    - **best_params**: averaged weights at that loss.
    - **blocks_since_best**: blocks since then.
    """

    state: ScoreMatchingState
    taken: np.ndarray
    losses: np.ndarray
    validation_losses: np.ndarray
    best_loss: np.ndarray
    best_params: Any
    blocks_since_best: np.ndarray


@dataclass(frozen=True)
class FitOptions:
    """The fixed settings of a run."""

    num_steps: int
    block: int
    validation: Batch | None = None
    patience: int | None = None
    mesh: Mesh | None = None
    progress_bar: bool = True
    callbacks: Sequence[Callable[[Progress], None]] = ()

    def __post_init__(self) -> None:
        if self.patience is not None and self.validation is None:
            raise ValueError(
                "`patience` needs `validation`: training stops when the loss on "
                f"held-out rows no longer falls. Got patience={self.patience}."
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                "`patience` must be at least 1: it counts blocks without progress. "
                f"Got {self.patience}."
            )

    def start(self, state: ScoreMatchingState) -> FitState:
        """Return the record before the first step."""
        num_blocks = -(-self.num_steps // self.block)
        return FitState(
            state=state,
            taken=np.zeros((), int),
            losses=np.full(self.num_steps, np.nan, np.float32),
            validation_losses=np.full(num_blocks, np.nan, np.float32),
            best_loss=np.full((), np.inf, np.float32),
            best_params=state.ema_params,
            blocks_since_best=np.zeros((), int),
        )

    def should_continue(self, record: FitState) -> bool:
        """Whether steps are left and patience is not exhausted."""
        patient = self.patience is None or record.blocks_since_best < self.patience
        return bool(record.taken < self.num_steps and patient)


def fit_plan(
    trainer: Any,
    record: FitState,
    plan: FitOptions,
    data: ArrayDataset | IterableDataset,
    save: Callable[[FitState, FitOptions], None] | None = None,
) -> FitState:
    """Run the plan on the devices of its mesh, if any, and collect the result."""
    if plan.mesh is None:
        return fit_blocks(trainer, record, plan, data, save)
    plan = replace(plan, validation=shard(plan.validation, plan.mesh))
    record = record._replace(state=shard(record.state, plan.mesh))
    data = data if isinstance(data, IterableDataset) else shard(data, plan.mesh)
    record = fit_blocks(trainer, record, plan, data, save)
    return record._replace(
        state=gather(record.state), best_params=gather(record.best_params)
    )


def fit_blocks(
    trainer: Any,
    record: FitState,
    plan: FitOptions,
    data: ArrayDataset | IterableDataset,
    save: Callable[[FitState, FitOptions], None] | None = None,
) -> FitState:
    """Run the blocks that are left, save after each, and return what was done."""
    quiet = not plan.progress_bar or jax.process_index() > 0
    record = _evaluate_initial(trainer, record, plan)
    with tqdm(total=plan.num_steps, initial=int(record.taken), disable=quiet) as bar:
        while plan.should_continue(record):
            taken = int(record.taken)
            step = _block_or_stop(trainer, record.state, plan, data, taken)
            if step is None:
                break
            record = _record_block(trainer, record, plan, *step)
            if save is not None:
                save(record, plan)
            bar.update(int(record.taken) - taken)
            _report(record, plan, taken, bar)
    return record


def _evaluate_initial(trainer: Any, record: FitState, plan: FitOptions) -> FitState:
    """Let the start be the best weights of a run in which every block does harm."""
    if plan.patience is None or plan.validation is None or record.taken > 0:
        return record
    loss = np.asarray(evaluate(trainer, record.state, plan.validation))
    return record._replace(best_loss=loss) if np.isfinite(loss) else record


def _block_or_stop(
    trainer: Any,
    state: ScoreMatchingState,
    plan: FitOptions,
    data: ArrayDataset | IterableDataset,
    taken: int,
) -> tuple[ScoreMatchingState, np.ndarray] | None:
    """Take the next block of steps; None if interrupted, so that no work is lost."""
    try:
        return _block(trainer, state, plan, data, taken)
    except KeyboardInterrupt:
        if taken == 0:
            raise
        _warn(f"Interrupted after step {taken}: the result is that state.")
        return None


def _block(
    trainer: Any,
    state: ScoreMatchingState,
    plan: FitOptions,
    data: ArrayDataset | IterableDataset,
    taken: int,
) -> tuple[ScoreMatchingState, np.ndarray] | None:
    """Take the next block of steps; None if the data ended or the loss broke."""
    count = min(plan.block, plan.num_steps - taken)
    source: ArrayDataset | StackedBatches
    if isinstance(data, IterableDataset):
        batches = data.take(count)
        count = len(batches.x)
        if count == 0:
            _end(taken, plan.num_steps)
            return None
        source = StackedBatches(shard(_pad(batches, plan.block), plan.mesh, axis=1))
    else:
        source = data
    state, losses = run_block(
        trainer, state, source, count, block=plan.block, mesh=plan.mesh
    )
    losses = np.asarray(losses)[:count]
    if not np.isfinite(losses).all():
        _stop(taken, losses)
        return None
    return state, losses


def _record_block(
    trainer: Any,
    record: FitState,
    plan: FitOptions,
    state: ScoreMatchingState,
    block_losses: np.ndarray,
) -> FitState:
    """Return the record with one more block."""
    taken, block = int(record.taken), int(record.taken) // plan.block
    losses = record.losses.copy()
    losses[taken : taken + len(block_losses)] = block_losses
    record = record._replace(
        state=state, losses=losses, taken=record.taken + len(block_losses)
    )
    if plan.validation is None:
        return record
    loss = np.asarray(evaluate(trainer, state, plan.validation))
    validation_losses = record.validation_losses.copy()
    validation_losses[block] = loss
    record = record._replace(validation_losses=validation_losses)
    if loss < record.best_loss:
        return record._replace(
            best_loss=loss,
            best_params=state.ema_params,
            blocks_since_best=0 * record.blocks_since_best,
        )
    return record._replace(blocks_since_best=record.blocks_since_best + 1)


def _report(record: FitState, plan: FitOptions, taken: int, bar: tqdm) -> None:
    """Tell the progress bar and the callbacks of a block that began at ``taken``."""
    step = int(record.taken)
    loss = float(record.losses[taken:step].mean())
    message, validation_loss = f"loss {loss:.4f}", None
    if plan.validation is not None:
        validation_loss = float(record.validation_losses[taken // plan.block])
        message += f", validation {validation_loss:.4f}"
    bar.set_postfix_str(message)
    for callback in plan.callbacks:
        callback(Progress(step, loss, validation_loss, record.state))


@partial(jax.jit, static_argnums=0, static_argnames=("block", "mesh"))
def run_block(
    trainer: Any,
    state: ScoreMatchingState,
    source: ArrayDataset | StackedBatches,
    count: Array | int,
    *,
    block: int,
    mesh: Mesh | None = None,
) -> tuple[ScoreMatchingState, Array]:
    """Take ``count`` steps, at most ``block``; one program for any count."""

    def body(i: Array, carry: tuple) -> tuple:
        state, losses = carry
        rng_key, key = jax.random.split(state.rng_key)
        rows = source.batch(i, key)
        if mesh is not None:
            rows = jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))
        state, loss = trainer.update_rows(state._replace(rng_key=rng_key), rows)
        return state, losses.at[i].set(loss)

    state, losses = jax.lax.fori_loop(0, count, body, (state, jnp.zeros(block)))
    broken = ~jnp.isfinite(optax.tree.norm(state.params))  # after a finite loss
    return state, jnp.where(broken, losses.at[count - 1].set(jnp.nan), losses)


@partial(jax.jit, static_argnums=0)
def evaluate(trainer: Any, state: ScoreMatchingState, rows: Batch) -> Array:
    """Return the validation loss of a state."""
    return trainer.evaluate_rows(state, rows)


def _pad(batches: Batch, block: int) -> Batch:
    """Repeat the last batch, so that a short block fits the compiled program."""
    missing = block - len(batches.x)
    return jax.tree.map(
        lambda part: np.concatenate([part, np.repeat(part[-1:], missing, 0)]), batches
    )


def _stop(start: int, block_losses: np.ndarray) -> None:
    """Say at which step the loss broke; raise if there is no good state to keep."""
    step = start + int(np.argmin(np.isfinite(block_losses)))
    message = (
        f"The loss is not finite at step {step}. Lower the learning rate, check the "
        "data for outliers, or check the net."
    )
    if start == 0:
        raise FloatingPointError(message)
    _warn(f"{message} Training stopped; the result is the state after step {start}.")


def _end(taken: int, num_steps: int) -> None:
    if taken == 0:
        raise ValueError(
            "`data` must yield at least one batch: an iterator that has ended cannot "
            "be trained on. Got none."
        )
    _warn(
        f"The iterator of batches ended after {taken} of {num_steps} steps: the result "
        "is that state. The learning rate was still on its way down."
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)
