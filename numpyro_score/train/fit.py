"""Optimization in compiled blocks of steps, with validation, early stopping and saving.

One program serves every block of a run, and every run with the same problem and shapes.
The steps of a block stay on the device. Between blocks the loss is checked, the
validation loss recorded, progress reported and the state saved.
"""

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

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_callbacks,
    check_count,
    check_flags,
    check_integer,
    check_mesh,
    check_share,
)
from numpyro_score.data.rows import (
    ArrayDataset,
    Batch,
    IterableDataset,
    StackedBatches,
    check_counts,
)
from numpyro_score.train.optimizer import TrainingProblem, TrainStep
from numpyro_score.train.sharding import (
    batch_sharding,
    gather,
    shard,
    with_auto_axes,
)
from numpyro_score.train.state import Progress, TrainState
from numpyro_score.typing import Params, PRNGKey, Scalar

NUM_BLOCKS = 20  # of a run, one program for all: validation after each 5 % of it

Dataset = ArrayDataset | IterableDataset


class FitState(NamedTuple):
    """State of a run between two blocks; the content of a checkpoint.

    - **state**: state of the optimization.
    - **taken**: steps taken in this run.
    - **losses**: loss of every step, NaN for steps to come.
    - **validation_losses**: one per block, NaN for blocks to come.
    - **best_loss**: lowest validation loss so far.
    - **best_params**: averaged weights at that loss.
    - **blocks_since_best**: blocks since then.
    """

    state: TrainState
    taken: np.ndarray
    losses: np.ndarray
    validation_losses: np.ndarray
    best_loss: np.ndarray
    best_params: Params
    blocks_since_best: np.ndarray


@dataclass(frozen=True)
class FitOptions:
    """Options of a run of :func:`fit`.

    Args:
        num_steps: number of steps.
        optimizer: an Optax optimizer; None for Adam with clipped gradients and a cosine
            schedule over the run.
        ema: whether the result is an average of the weights over the steps.
        accumulate: number of parts into which a batch is split to save memory.
        validation: held-out rows whose loss is recorded after every block.
        validation_share: share of the rows that a trainer holds out in their place, see
            :func:`~numpyro_score.train.held_out.hold_out_rows`.
        patience: blocks without a new lowest validation loss after which the run stops;
            with it the result is the weights at the lowest loss. None to take all steps
            and return the last weights.
        mesh: devices that share the rows of each batch.
        callbacks: functions of :class:`~numpyro_score.train.Progress`, called after
            every block.
        progress_bar: whether to show progress.
        block: steps per block; None for a twentieth of the run.

    Raises:
        TypeError: for callbacks, a mesh or flags of another kind.
        ValueError: for ``patience`` below 1 or without held-out rows, a share outside
            of [0, 1), and a share beside ``validation``.
    """

    num_steps: int
    optimizer: optax.GradientTransformation | None = None
    ema: bool = True
    accumulate: int = 1
    validation: Batch | None = None
    validation_share: float | None = 0.0
    patience: int | None = None
    mesh: Mesh | None = None
    callbacks: Sequence[Callable[[Progress], None]] = ()
    progress_bar: bool = True
    block: int | None = None

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        object.__setattr__(self, "mesh", with_auto_axes(self.mesh))
        check_callbacks(self.callbacks)
        check_flags(progress_bar=self.progress_bar, ema=self.ema)
        if self.validation_share is not None:
            check_share("validation_share", self.validation_share, "are held out")
        if self.validation_share and self.validation is not None:
            raise ValueError(
                "`validation_share` holds out rows of `data`: give it or `validation`, "
                f"not both. Got validation_share={self.validation_share}."
            )
        held_out = self.validation is not None or self.validation_share
        if self.patience is not None and not held_out:
            raise ValueError(
                "`patience` needs `validation`: training stops when the loss on "
                f"held-out rows no longer falls. Got patience={self.patience}."
            )
        if self.patience is not None:
            check_count("patience", self.patience, "a number of blocks")

    @property
    def block_length(self) -> int:
        """Steps per block."""
        return self.block or -(-self.num_steps // NUM_BLOCKS)

    def step(self, problem: TrainingProblem) -> TrainStep:
        """Return one step of the optimizer on a problem."""
        return TrainStep(problem, self.optimizer, self.accumulate, self.ema)

    def init(self, state: TrainState) -> FitState:
        """Return the state of a run before its first step."""
        num_blocks = -(-self.num_steps // self.block_length)
        return FitState(
            state=state,
            taken=np.zeros((), int),
            losses=np.full(self.num_steps, np.nan, np.float32),
            validation_losses=np.full(num_blocks, np.nan, np.float32),
            best_loss=np.full((), np.inf, np.float32),
            best_params=state.ema_params,
            blocks_since_best=np.zeros((), int),
        )

    def should_continue(self, run: FitState) -> bool:
        """Return whether steps are left and patience is not exhausted."""
        patient = self.patience is None or run.blocks_since_best < self.patience
        return bool(run.taken < self.num_steps and patient)

    def result_params(self, run: FitState) -> Params:
        """Return the averaged weights, at the lowest validation loss with patience."""
        return run.state.ema_params if self.patience is None else run.best_params


def fit(
    problem: TrainingProblem,
    run: FitState,
    data: Dataset,
    options: FitOptions,
    *,
    save: Callable[[FitState, FitOptions], None] | None = None,
) -> FitState:
    """Return the state of a run after all its blocks, or after the last good one.

    The run ends early, with a warning, when a loss or the weights are not finite, when
    an iterator of batches ends and after Ctrl-C; silently when patience is exhausted.

    Args:
        problem: the loss.
        run: from :meth:`FitOptions.init`, or from a checkpoint.
        data: source of batches.
        options: settings of the run.
        save: called with the state and the options after every block.

    Raises:
        FloatingPointError: if the loss is not finite in the first block.
        ValueError: if ``data`` has no batch, or ``accumulate`` does not divide it.
    """
    mesh = options.mesh
    if mesh is None:
        return _fit_blocks(problem, run, data, options, save)
    options = replace(options, validation=shard(options.validation, mesh))
    run = run._replace(state=shard(run.state, mesh))
    data = data if isinstance(data, IterableDataset) else shard(data, mesh)
    run = _fit_blocks(problem, run, data, options, save)
    return run._replace(state=gather(run.state), best_params=gather(run.best_params))


def fit_params(
    key: PRNGKey,
    problem: TrainingProblem,
    params: Params,
    fixed: Any,
    data: Batch,
    options: FitOptions,
    *,
    batch_size: int,
) -> tuple[Params, Array]:
    """Return trained weights and the loss of every step, by :func:`fit` on an array.

    Args:
        key: random key.
        problem: the loss.
        params: initial weights.
        fixed: see :class:`~numpyro_score.train.optimizer.TrainingProblem`.
        data: rows, from which batches are drawn with replacement.
        options: settings of the run.
        batch_size: rows per step, at most all.
    """
    num_rows = len(data.x)
    check_integer("batch_size", batch_size, "the number of rows of a batch")
    batch_size = min(batch_size, num_rows)
    check_counts(options.num_steps, batch_size, num_rows)
    state = options.step(problem).init(params, fixed, key, options.num_steps)
    dataset = ArrayDataset(data, batch_size)
    run = fit(problem, options.init(state), dataset, options)
    return options.result_params(run), jnp.asarray(run.losses[: run.taken])


def _fit_blocks(
    problem: TrainingProblem,
    run: FitState,
    data: Dataset,
    options: FitOptions,
    save: Callable[[FitState, FitOptions], None] | None,
) -> FitState:
    """Return the state after the blocks that are left."""
    quiet = not options.progress_bar or jax.process_index() > 0
    run = _evaluate_initial(problem, run, options)
    with tqdm(total=options.num_steps, initial=int(run.taken), disable=quiet) as bar:
        return _run_blocks(problem, run, data, options, save, bar)


def _run_blocks(
    problem: TrainingProblem,
    run: FitState,
    data: Dataset,
    options: FitOptions,
    save: Callable[[FitState, FitOptions], None] | None,
    bar: tqdm,
) -> FitState:
    """Return the state after the blocks that are left, up to an interruption."""
    while options.should_continue(run):
        taken = int(run.taken)
        try:
            block = _block(problem, run.state, options, data, taken)
            if block is None:
                break
            run = _record_block(problem, run, options, *block)
            if save is not None:
                save(run, options)
            bar.update(int(run.taken) - taken)
            _report(run, options, taken, bar)
        except KeyboardInterrupt as interrupt:
            _keep_or_raise(int(run.taken), interrupt)
            break
    return run


def _evaluate_initial(
    problem: TrainingProblem, run: FitState, options: FitOptions
) -> FitState:
    """Set ``best_loss`` to the validation loss before training.

    With it, early stopping returns the initial weights if no block improves on them.
    """
    if options.patience is None or options.validation is None or run.taken > 0:
        return run
    loss = np.asarray(evaluate(problem, run.state, options.validation))
    return run._replace(best_loss=loss) if np.isfinite(loss) else run


def _keep_or_raise(taken: int, interrupt: KeyboardInterrupt) -> None:
    """Warn that a run ends with the last whole block; raise if there is none."""
    if taken == 0:
        interrupt.add_note(
            "Training: interrupted in its first block, so there is no result yet. "
            "Later blocks are kept; with `checkpoint` they are also on disk."
        )
        raise interrupt
    warn_caller(f"Interrupted after step {taken}: the result is that state.")


def _block(
    problem: TrainingProblem,
    state: TrainState,
    options: FitOptions,
    data: Dataset,
    taken: int,
) -> tuple[TrainState, np.ndarray] | None:
    """Return state and losses after the next block.

    None if the data ended, or if a loss is not finite.
    """
    block, mesh = options.block_length, options.mesh
    count = min(block, options.num_steps - taken)
    source: ArrayDataset | StackedBatches
    if isinstance(data, IterableDataset):
        batches = data.take(count)
        count = len(batches.x)
        if count == 0:
            _warn_of_end(taken, options.num_steps)
            return None
        source = StackedBatches(shard(_pad(batches, block), mesh, axis=1))
    else:
        source = data
    step = options.step(problem)
    state, losses = run_block(step, state, source, count, block=block, mesh=mesh)
    losses = np.asarray(losses)[:count]
    if not np.isfinite(losses).all():
        _warn_of_divergence(taken, losses)
        return None
    return state, losses


def _record_block(
    problem: TrainingProblem,
    run: FitState,
    options: FitOptions,
    state: TrainState,
    block_losses: np.ndarray,
) -> FitState:
    """Return the state of the run after one more block."""
    taken, block = int(run.taken), int(run.taken) // options.block_length
    losses = run.losses.copy()
    losses[taken : taken + len(block_losses)] = block_losses
    run = run._replace(state=state, losses=losses, taken=run.taken + len(block_losses))
    if options.validation is None:
        return run
    loss = np.asarray(evaluate(problem, state, options.validation))
    validation_losses = run.validation_losses.copy()
    validation_losses[block] = loss
    run = run._replace(validation_losses=validation_losses)
    if loss < run.best_loss:
        return run._replace(
            best_loss=loss,
            best_params=state.ema_params,
            blocks_since_best=0 * run.blocks_since_best,
        )
    return run._replace(blocks_since_best=run.blocks_since_best + 1)


def _report(run: FitState, options: FitOptions, taken: int, bar: tqdm) -> None:
    """Report a block that began at step ``taken`` to progress bar and callbacks."""
    step = int(run.taken)
    loss = float(run.losses[taken:step].mean())
    message, validation_loss = f"loss {loss:.4f}", None
    if options.validation is not None:
        validation_loss = float(run.validation_losses[taken // options.block_length])
        message += f", validation {validation_loss:.4f}"
    bar.set_postfix_str(message)
    for callback in options.callbacks:
        callback(Progress(step, loss, validation_loss, run.state))


@partial(jax.jit, static_argnums=0, static_argnames=("block", "mesh"))
def run_block(
    step: TrainStep,
    state: TrainState,
    source: ArrayDataset | StackedBatches,
    count: Array | int,
    *,
    block: int,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Array]:
    """Return state and losses after ``count`` steps; one program for any count.

    Args:
        step: one step of the optimizer.
        state: where to start.
        source: gives the batch of each step.
        count: number of steps, at most ``block``.
        block: length of the array of losses.
        mesh: devices that share the rows of each batch.

    Returns:
        The state, and losses of which the first ``count`` are set. The last of these is
        NaN if the weights are not finite after it.
    """

    def body(i: Array, carry: tuple) -> tuple:
        state, losses = carry
        rng_key, key = jax.random.split(state.rng_key)
        batch = source.batch(i, key)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        state, loss = step(state._replace(rng_key=rng_key), batch)
        return state, losses.at[i].set(loss)

    state, losses = jax.lax.fori_loop(0, count, body, (state, jnp.zeros(block)))
    broken = ~jnp.isfinite(optax.tree.norm(state.params))  # after a finite loss
    return state, jnp.where(broken, losses.at[count - 1].set(jnp.nan), losses)


@partial(jax.jit, static_argnums=0)
def evaluate(problem: TrainingProblem, state: TrainState, batch: Batch) -> Scalar:
    """Return the loss of the averaged weights, with the same noise in every call."""
    key = jax.random.key(0)  # common random numbers make evaluations comparable
    return problem.loss(state.ema_params, state.fixed, key, batch)


def _pad(batches: Batch, block: int) -> Batch:
    """Return a block of batches, the last one repeated to the compiled length."""
    missing = block - len(batches.x)
    return jax.tree.map(
        lambda part: np.concatenate([part, np.repeat(part[-1:], missing, 0)]), batches
    )


def _warn_of_divergence(start: int, block_losses: np.ndarray) -> None:
    """Warn that a loss is not finite; raise if no good state precedes it."""
    step = start + int(np.argmin(np.isfinite(block_losses)))
    message = (
        f"The loss is not finite at step {step}. Lower the learning rate, check the "
        "data for outliers, or check the net."
    )
    if start == 0:
        raise FloatingPointError(message)
    warn_caller(
        f"{message} Training stopped; the result is the state after step {start}."
    )


def _warn_of_end(taken: int, num_steps: int) -> None:
    """Warn that an iterator ended; raise if it had no batch."""
    if taken == 0:
        raise ValueError(
            "`data` must yield at least one batch: an iterator that has ended cannot "
            "be trained on. Got none."
        )
    warn_caller(
        f"The iterator of batches ended after {taken} of {num_steps} steps: the result "
        "is that state. The learning rate was still on its way down."
    )
