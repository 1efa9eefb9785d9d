r"""Learn a score from samples, with the interface of ``numpyro.infer.SVI``."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array

from numpyro_score.checks import check_floating, check_integer, check_key
from numpyro_score.data.rows import Batch, check_batch, make_dataset
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import check_constraint
from numpyro_score.loss import DenoisingScoreMatching
from numpyro_score.loss.denoising import Loss
from numpyro_score.score.denoiser import NetDenoiser
from numpyro_score.score.model import ScoreModel
from numpyro_score.score.preconditioning import BoundedScore, Parametrization
from numpyro_score.sde import SDE, VE
from numpyro_score.train.checkpoint import Checkpoints, run_with_checkpoints
from numpyro_score.train.fit import NUM_BLOCKS, FitOptions, FitState, fit_plan
from numpyro_score.train.objective import (
    accumulated_gradient,
    accumulated_loss,
    training_loss,
)
from numpyro_score.train.optimizer import apply_gradients
from numpyro_score.train.start import init_state
from numpyro_score.train.state import (
    Progress,
    ScoreMatchingRunResult,
    ScoreMatchingState,
)
from numpyro_score.typing import PRNGKey, Scalar


@dataclass(frozen=True)
class ScoreMatching:
    r"""Train a net to denoise, and so to know the score of the data.

    Data are standardized inside; the weights' average follows the number of steps by
    the power law :math:`\beta_k = (1 - 1/k)^{\gamma + 1}` (Karras et al. 2024).

    Args:
        net: a configuration such as :class:`~numpyro_score.nn.MLP`, anything that
            builds an ``nnx.Module`` when called with ``rngs=``, or such a module.
        sde: the noise process.
        loss: the objective.
        optim: an Optax optimizer, which may ask for the loss of the batch and search
            along a line; None for Adam with clipped gradients and a cosine
            schedule over the run.
        standardize: function of the data that returns an
            :class:`~numpyro_score.data.standardize.Affine`; None for one scale per
            number for rows of a table and one shared scale for images.
        support: the set that data live in, a NumPyro constraint such as
            ``constraints.positive``; the score is learned in unconstrained space. None
            for all reals.
        drop_context: share of each batch whose context is left out, so that one net
            learns the conditional and the marginal score (Ho and Salimans 2022). The
            net must take ``context=None``: ``optional_context=True`` in ours.
        center: whether the net learns what is left of the data after a linear
            prediction from their context; for posteriors narrower than the prior.
        parametrization: what the net's output means.
        compute_dtype: type that the net computes in while it is trained, such as
            ``jnp.bfloat16``; weights, their averages and the loss stay in float32.
        accumulate: parts into which a batch is split, one after the other, to save
            memory; the step follows their mean gradient.

    Raises:
        TypeError: for a support without a bijection from the real numbers; by ``init``
            and ``run``, for a Linen module and for a net with state besides its
            weights, such as ``BatchNorm`` and ``Dropout``.
        ValueError: unless ``drop_context`` lies in [0, 1) and ``accumulate`` is at
            least 1.

    Example:
        >>> from numpyro_score.nn import MLP
        >>> data = jax.random.normal(jax.random.key(0), (512, 2))
        >>> trainer = ScoreMatching(MLP(2, width=16, depth=1))
        >>> result = trainer.run(jax.random.key(1), 20, data, progress_bar=False)
        >>> result.score.sample(jax.random.key(2), (5,)).shape
        (5, 2)
    """

    net: Callable | nnx.Module
    sde: SDE = VE()
    loss: Loss = DenoisingScoreMatching()
    optim: optax.GradientTransformation | None = None
    standardize: Callable[[Array], Affine] | None = None
    support: Any = field(default=None, compare=False)  # compiled code reads the state's
    drop_context: float = 0.0
    parametrization: Parametrization = BoundedScore()
    compute_dtype: Any = None
    accumulate: int = 1
    center: bool = False

    def __post_init__(self) -> None:
        if self.support is not None:
            check_constraint(self.support)
        if not 0 <= self.drop_context < 1:
            raise ValueError(
                "`drop_context` must lie in [0, 1): it is the share of rows that train "
                f"the marginal score. Got {self.drop_context}."
            )

        check_integer("accumulate", self.accumulate, "a number of parts of a batch")
        if self.accumulate < 1:
            raise ValueError(
                "`accumulate` must be at least 1: it counts parts of a batch. "
                f"Got {self.accumulate}."
            )
        if self.compute_dtype is not None:
            why = "the type that the net computes in"
            check_floating("compute_dtype", self.compute_dtype, why)

    def init(
        self,
        rng_key: PRNGKey,
        data: ArrayLike,
        num_steps: int | None = None,
        *,
        context: ArrayLike | None = None,
    ) -> ScoreMatchingState:
        """Return the state before the first step.

        Args:
            rng_key: random key of the weights and of all training noise.
            data: rows of shape ``event_shape``, in physical units.
            num_steps: length of the run, for the schedule; None for a constant rate.
            context: what each row is conditioned on, if anything.

        Raises:
            TypeError: if the net does not return floating-point numbers.
            ValueError: for data that are not finite, do not vary or do not fit.
        """
        check_key("rng_key", rng_key)
        return init_state(self, rng_key, check_batch(Batch(data, context)), num_steps)

    def update(
        self,
        state: ScoreMatchingState,
        batch: ArrayLike,
        *,
        context: ArrayLike | None = None,
    ) -> tuple[ScoreMatchingState, Scalar]:
        """Take one step on a batch; return the new state and the batch's loss."""
        return self.update_rows(state, Batch(batch, context))

    def update_rows(
        self, state: ScoreMatchingState, rows: Batch
    ) -> tuple[ScoreMatchingState, Scalar]:
        """Take one step on rows with all that belongs to them."""
        rng_key, key = jax.random.split(state.rng_key)
        loss, grads = accumulated_gradient(self, state, key, rows)

        def loss_fn(params: Any) -> Scalar:
            return accumulated_loss(self, params, state, key, rows)

        moved = state._replace(rng_key=rng_key)
        return apply_gradients(self.optim, moved, loss, grads, loss_fn), loss

    def evaluate(
        self,
        state: ScoreMatchingState,
        batch: ArrayLike,
        *,
        context: ArrayLike | None = None,
    ) -> Scalar:
        """Return the loss of the averaged weights, with the same noise every time."""
        return self.evaluate_rows(state, Batch(batch, context))

    def evaluate_rows(self, state: ScoreMatchingState, rows: Batch) -> Scalar:
        """Return the loss of the averaged weights on rows with what belongs to them."""
        key = jax.random.key(0)  # common random numbers make evaluations comparable
        return training_loss(self, state.ema_params, state, key, rows)

    def get_score(self, state: ScoreMatchingState) -> ScoreModel:
        """Return the score of the averaged weights."""
        return ScoreModel(
            self.get_denoiser(state.ema_params, state),
            state.standardize,
            self.sde,
            state.standardize.loc.shape,
            state.support,
            getattr(self.loss, "paired", False),
        )

    def run(
        self,
        rng_key: PRNGKey,
        num_steps: int,
        data: ArrayLike | Iterable,
        *,
        context: ArrayLike | None = None,
        data_score: ArrayLike | None = None,
        batch_size: int = 256,
        validation: ArrayLike | Batch | None = None,
        validation_context: ArrayLike | None = None,
        patience: int | None = None,
        checkpoint: str | os.PathLike | Checkpoints | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
        mesh: Mesh | None = None,
        progress_bar: bool = True,
        init_state: ScoreMatchingState | None = None,
    ) -> ScoreMatchingRunResult:
        """Train for ``num_steps`` steps on random batches.

        The data live on the device and the steps run in compiled blocks. If the loss
        stops being finite the run ends with a warning and the last good state; so it
        does when interrupted from the keyboard.

        Args:
            rng_key: random key.
            num_steps: number of steps.
            data: rows of shape ``event_shape``, in physical units; or an iterator of
                batches of equal shapes (arrays, or
                :class:`~numpyro_score.data.rows.Batch`), for data that do not fit into
                memory.
            context: what each row is conditioned on, if anything.
            data_score: gradient of the log density of the data at each row, where it
                is known; for :class:`~numpyro_score.loss.TargetScore`.
            batch_size: rows per step, drawn with replacement; an iterator brings its
                own.
            validation: held-out rows whose loss is recorded between blocks; or
                :class:`~numpyro_score.data.rows.Batch` with all that belongs to them.
            validation_context: context of the held-out rows.
            patience: blocks without a new lowest validation loss after which training
                stops; with it the score is the one at the lowest loss.
            checkpoint: folder of this run, or :class:`Checkpoints`; a run that was
                killed goes on from there when it is called again in the same way.
            callbacks: functions of :class:`~numpyro_score.train.Progress`, called
                after every block.
            mesh: devices over which the rows of each batch are split, along the mesh's
                first axis; all devices end with the same weights.
            progress_bar: whether to show progress.
            init_state: state to go on from, instead of fresh weights.

        Raises:
            FloatingPointError: if the loss is not finite in the first block.
            TypeError: if the net does not return floating-point numbers.
            ValueError: for data that are not finite, do not vary, do not fit the net or
                are fewer than a batch, and for counts below 1.
        """
        check_key("rng_key", rng_key)
        check_integer("num_steps", num_steps, "the length of the run")
        event_shape = None
        if init_state is not None:
            event_shape = self.get_score(init_state).data_shape
        source, first, block = make_dataset(
            data,
            context,
            data_score,
            num_steps=num_steps,
            batch_size=batch_size,
            longest_block=-(-num_steps // NUM_BLOCKS),
            event_shape=event_shape,
        )
        held_out = None
        if validation is not None:
            rows = Batch(validation, validation_context)
            rows = validation if isinstance(validation, Batch) else rows
            held_out = check_batch(rows, "validation", first.x.shape[1:])
        plan = FitOptions(
            num_steps,
            block,
            validation=held_out,
            patience=patience,
            mesh=mesh,
            progress_bar=progress_bar,
            callbacks=callbacks,
        )
        state = init_state or self.init(
            rng_key, first.x, num_steps, context=first.context
        )
        end = jnp.maximum(state.num_steps, state.step + num_steps)
        state = state._replace(num_steps=end)  # else the rate of a continued run is 0
        start = plan.start(state)
        if checkpoint is None:
            record = fit_plan(self, start, plan, source)
        else:
            record = run_with_checkpoints(
                self, start, plan, source, rng_key, checkpoint
            )
        return self._result(record, plan)

    def get_denoiser(
        self, params: Any, state: ScoreMatchingState, compute_dtype: Any = None
    ) -> NetDenoiser:
        """Return the net at some weights as a denoiser of standardized data."""
        return NetDenoiser(
            params,
            state.graphdef,
            state.standardize_context,
            None if isinstance(self.net, nnx.Module) else self.net,
            self.parametrization,
            compute_dtype,
            state.center,
        )

    def _result(self, record: FitState, plan: FitOptions) -> ScoreMatchingRunResult:
        """Return the result of a run that has ended."""
        state = record.state
        best = state
        if plan.patience is not None:
            best = state._replace(ema_params=record.best_params)
        validation_losses = None
        if plan.validation is not None:
            num_blocks = -(-int(record.taken) // plan.block)
            validation_losses = jnp.asarray(record.validation_losses[:num_blocks])
        return ScoreMatchingRunResult(
            self.get_score(best),
            jnp.asarray(record.losses[: record.taken]),
            validation_losses,
            state,
        )
