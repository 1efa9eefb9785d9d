r"""Score matching: training of a score on samples."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array

from numpyro_score.checks import (
    check_count,
    check_flags,
    check_floating,
    check_integer,
    check_key,
    check_kind,
    check_optional_callable,
    check_share,
)
from numpyro_score.data.context_scale import ContextMap
from numpyro_score.data.rows import (
    Batch,
    check_batch,
    check_training_data,
    make_dataset,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support, check_constraint
from numpyro_score.loss import DenoisingScoreMatching
from numpyro_score.loss.denoising import Loss
from numpyro_score.nn.coordinate_levels import (
    check_coordinate_levels,
    with_coordinate_levels,
)
from numpyro_score.nn.mlp import MLPModule
from numpyro_score.score.gaussian_baseline import MAX_SIZE, GaussianBaseline
from numpyro_score.score.model import ScoreModel
from numpyro_score.score.preconditioning import EDM, BoundedScore, Parametrization
from numpyro_score.sde import SDE, VE
from numpyro_score.train.checkpoint import Checkpoints, run_with_checkpoints
from numpyro_score.train.denoiser_covariance import denoiser_covariance
from numpyro_score.train.fit import FitOptions, FitState, evaluate, fit
from numpyro_score.train.held_out import hold_out_rows
from numpyro_score.train.linear_baseline import fit_linear_baseline
from numpyro_score.train.objective import ScoreMatchingProblem, keep_rows
from numpyro_score.train.optimizer import TrainStep, build, default_optimizer
from numpyro_score.train.state import (
    FixedParts,
    Progress,
    ScoreMatchingRunResult,
    TrainState,
)
from numpyro_score.typing import PRNGKey, Scalar


@dataclass(frozen=True)
class ScoreMatching:
    r"""Trainer of the score of data, by default by denoising score matching.

    Data are standardized. The score is that of a moving average of the weights with
    decay :math:`\beta_k = (1 - 1/k)^{\gamma + 1}` at step k (Karras et al. 2024, eq.
    123). Interface of ``numpyro.infer.SVI``.

    Args:
        net: a configuration such as :class:`~numpyro_score.nn.MLP`, another callable
            that returns an ``nnx.Module`` when called with ``rngs=``, or a module.
        sde: the noise process.
        loss: the objective.
        optim: an Optax optimizer, which may use the loss of the batch and line search;
            None for Adam with clipped gradients and a cosine schedule over the run.
        standardize: function of the data that returns an
            :class:`~numpyro_score.data.standardize.Affine`; None for one scale per
            number for rows of a table and one shared scale for images.
        support: support of the data, a NumPyro constraint such as
            ``constraints.positive``; the score is learned in unconstrained space. None
            for all reals.
        drop_context: share of each batch whose context is left out, so that one net
            learns the conditional and the marginal score (Ho and Salimans 2022). The
            net must accept ``context=None``: ``optional_context=True`` in ours.
        linear_baseline: True to learn the residual of a linear regression of the data
            on their context, for posteriors much narrower than the prior.
        parametrization: quantity that the net estimates, see
            :mod:`numpyro_score.score.preconditioning`.
        compute_dtype: type that the net computes in while it is trained, such as
            ``jnp.bfloat16``; weights, their averages and the loss stay in float32.
        accumulate: parts into which a batch is split, one after the other, to save
            memory; the step follows their mean gradient.
        standardize_context: function of the contexts that returns their map to the unit
            scale; None for mean 0 and sd 1 of every number.
            :meth:`ContextScale.fit
            <numpyro_score.data.context_scale.ContextScale.fit>` is for heavy tails.
        gaussian_baseline: whether the net's output is added to the denoiser of the
            normal law with the data's covariance, to which the score goes over off the
            data (:mod:`numpyro_score.score.gaussian_baseline`): for strongly correlated
            rows of at most 256 numbers, such as curves, without context. None chooses
            it for an ``MLP``, denoising score matching and rows whose smallest
            principal sd is below a tenth of the largest, in standardized units.

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
    support: Any = field(default=None, compare=False)  # as constraints are not hashable
    drop_context: float = 0.0
    parametrization: Parametrization = BoundedScore()
    compute_dtype: Any = None
    accumulate: int = 1
    linear_baseline: bool = False
    standardize_context: Callable[[Array], ContextMap] | None = None
    gaussian_baseline: bool | None = None

    def __post_init__(self) -> None:
        if self.support is not None:
            check_constraint(self.support)
        self._check_parts()
        check_flags(linear_baseline=self.linear_baseline)
        if self.gaussian_baseline is not None:
            check_flags(gaussian_baseline=self.gaussian_baseline)
        for name in ("standardize", "standardize_context"):
            make = getattr(self, name)
            check_optional_callable(name, make, "a function of rows, or None")
        check_share("drop_context", self.drop_context, "train the marginal score")

        check_count("accumulate", self.accumulate, "a number of parts of a batch")
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
    ) -> TrainState:
        """Return the state before the first step.

        Args:
            rng_key: random key of the weights and of all training noise.
            data: rows of shape ``event_shape``, in physical units.
            num_steps: length of the run, for the schedule; None for a constant rate.
            context: values that each row is conditioned on, or None.

        Raises:
            TypeError: if the net does not return floating-point numbers.
            ValueError: for data that are not finite, do not vary or do not fit.
        """
        check_key("rng_key", rng_key)
        rows = check_training_data(Batch(data, context))
        return self._init(rng_key, rows, num_steps)

    def update(
        self,
        state: TrainState,
        batch: ArrayLike | Batch,
        *,
        context: ArrayLike | None = None,
    ) -> tuple[TrainState, Scalar]:
        """Return the state after one step on a batch, and the loss of the batch."""
        self._check_state("state", state)
        step = TrainStep(self._problem, self.optim, self.accumulate)
        return step(state, _as_batch(batch, context))

    def evaluate(
        self,
        state: TrainState,
        batch: ArrayLike | Batch,
        *,
        context: ArrayLike | None = None,
    ) -> Scalar:
        """Return the loss of the averaged weights, with equal noise in every call."""
        return evaluate(self._problem, state, _as_batch(batch, context))

    def get_score(self, state: TrainState) -> ScoreModel:
        """Return the score of the averaged weights."""
        standardize = state.fixed.standardize
        return ScoreModel(
            self._problem.denoiser(state.ema_params, state.fixed),
            standardize,
            self.sde,
            standardize.loc.shape,
            state.fixed.support,
            getattr(self.loss, "paired", False),
            state.fixed.rows,
        )

    def run(
        self,
        rng_key: PRNGKey,
        num_steps: int,
        data: ArrayLike | Iterable,
        *,
        context: ArrayLike | None = None,
        data_score: ArrayLike | None = None,
        batch_size: int | None = None,
        validation: ArrayLike | Batch | None = None,
        validation_context: ArrayLike | None = None,
        validation_share: float | None = None,
        patience: int | None = None,
        checkpoint: str | os.PathLike | Checkpoints | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
        mesh: Mesh | None = None,
        progress_bar: bool = True,
        init_state: TrainState | None = None,
    ) -> ScoreMatchingRunResult:
        """Return the score, the losses and the state after ``num_steps`` steps.

        The steps run in compiled blocks of a twentieth of the run. If a loss is not
        finite, the run ends with a warning and the state before the block; after Ctrl-C
        likewise.

        Args:
            rng_key: random key.
            num_steps: number of steps.
            data: rows of shape ``event_shape``, in physical units; or an iterator of
                batches of equal shapes (arrays, or
                :class:`~numpyro_score.data.rows.Batch`), for data that do not fit into
                memory.
            context: values that each row is conditioned on, or None.
            data_score: gradient of the log density of the data at each row, where it
                is known; for :class:`~numpyro_score.loss.TargetScore`.
            batch_size: rows per step, drawn with replacement; None for 256, or all if
                there are fewer. An iterator brings its own.
            validation: held-out rows whose loss is recorded between blocks, also as a
                :class:`~numpyro_score.data.rows.Batch` with context and data score.
            validation_context: context of the held-out rows.
            validation_share: share of ``data`` that is held out without
                ``validation``; the score is then the one at its lowest loss. None for
                a tenth of 100 rows or more, if the run goes over each 200 times or
                more, since the net may then overfit; 0 for none.
            patience: blocks without a new lowest validation loss after which training
                stops; with it the score is the one at the lowest loss. None for never,
                or for 10 of rows that are held out by ``validation_share``.
            checkpoint: folder of this run, or :class:`Checkpoints`; the same call
                continues a run that was killed.
            callbacks: functions of :class:`~numpyro_score.train.Progress`, called
                after every block.
            mesh: devices over which the rows of each batch are split, along the mesh's
                first axis; all devices end with the same weights.
            progress_bar: whether to show progress.
            init_state: state to continue from, instead of new weights; of the same net
                and optimizer.

        Raises:
            FloatingPointError: if the loss is not finite in the first block.
            TypeError: if the net does not return floating-point numbers, and for
                callbacks, a mesh or a state of another kind.
            ValueError: for data that are not finite, do not vary, do not fit the net or
                are fewer than a batch, and for counts below 1.
        """
        check_integer("num_steps", num_steps, "the length of the run")
        if validation is not None:
            validation = _as_batch(validation, validation_context)
        options = FitOptions(
            num_steps,
            validation=validation,
            validation_share=validation_share,
            patience=patience,
            mesh=mesh,
            callbacks=callbacks,
            progress_bar=progress_bar,
        )
        return self.fit(
            rng_key,
            Batch(data, context, data_score),
            options,
            batch_size=batch_size,
            checkpoint=checkpoint,
            init_state=init_state,
        )

    def fit(
        self,
        rng_key: PRNGKey,
        data: Batch,
        options: FitOptions,
        *,
        batch_size: int | None = None,
        checkpoint: str | os.PathLike | Checkpoints | None = None,
        init_state: TrainState | None = None,
    ) -> ScoreMatchingRunResult:
        """Return the result of :meth:`run`, with its options as one object.

        Args:
            rng_key: random key.
            data: rows, or an iterator of batches in the place of ``x``.
            options: settings of the run; the optimizer and ``accumulate`` are those of
                this trainer.
            batch_size: rows per step; None as for :meth:`run`.
            checkpoint: folder of this run, or :class:`Checkpoints`.
            init_state: state to continue from, instead of new weights.
        """
        check_key("rng_key", rng_key)
        event_shape = None
        if init_state is not None:
            self._check_state("init_state", init_state)
            event_shape = self.get_score(init_state).data_shape
        source, first, block = make_dataset(
            *data,
            num_steps=options.num_steps,
            batch_size=batch_size,
            longest_block=options.block_length,
            event_shape=event_shape,
        )
        given = options.validation
        options = replace(options, optimizer=self.optim, accumulate=self.accumulate)
        options, source = hold_out_rows(options, source)
        validation = options.validation
        if validation is not None:
            validation = check_batch(validation, "validation", first.x.shape[1:])
        options = replace(options, validation=validation, block=block)
        state = init_state
        if state is None:
            state = self._init(rng_key, first, options.num_steps)
        if given is not None and validation is not None:
            # rows held out by the run may be too few to measure the level in use
            state = state._replace(fixed=keep_rows(state.fixed, validation))
        end = jnp.maximum(state.num_steps, state.step + options.num_steps)
        state = state._replace(num_steps=end)  # or the rate of a continued run is 0
        arguments = self._problem, options.init(state), source, options
        if checkpoint is None:
            run = fit(*arguments)
        else:
            run = run_with_checkpoints(*arguments, rng_key, checkpoint)
        return self._result(run, options)

    def _check_parts(self) -> None:
        """Raise unless process, loss and parametrization are objects of their kinds."""
        kinds = {
            "sde": (isinstance(self.sde, SDE), "a process, such as VE()"),
            "loss": (callable(self.loss), "an objective of `numpyro_score.loss`"),
            "parametrization": (callable(self.parametrization), "such as EDM()"),
            "net": (callable(self.net), "a configuration of a net, such as MLP(2)"),
            "optim": (
                self.optim is None
                or isinstance(self.optim, optax.GradientTransformation),
                "an optimizer of Optax, such as optax.adam(1e-3), or None",
            ),
        }
        for name, (is_right, kind) in kinds.items():
            if not is_right:
                raise TypeError(
                    f"`{name}` must be {kind}. Got {getattr(self, name)!r}."
                )

    def _check_state(self, name: str, state: Any) -> None:
        """Raise unless a state is of a trainer with this net and optimizer.

        Raises:
            TypeError: for anything but a state of training.
            ValueError: for the weights of another net, or another optimizer's state.
        """
        check_kind(name, state, TrainState, "a TrainState, from `init` or `run`")
        leaves, structure = jax.tree.flatten(state.params)
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        params, opt_state = _expected_state(self._net, self.optim, structure, shapes)
        if params is not None:
            _check_same(
                f"`{name}` must hold the weights of `net`: those of another net cannot "
                "be continued as its own.",
                state.params,
                params,
            )
        _check_same(
            f"`{name}` must hold the state of `optim`: averages of another optimizer "
            f"mean nothing to it. Go on with the first one, or restart it: "
            f"{name}._replace(opt_state=optim.init({name}.params)).",
            state.opt_state,
            opt_state,
        )

    @property
    def _net(self) -> Callable | nnx.Module:
        """The net, with one noise level per coordinate if the loss has that."""
        per_coordinate = getattr(self.loss, "per_coordinate", False)
        return with_coordinate_levels(self.net) if per_coordinate else self.net

    @property
    def _problem(self) -> ScoreMatchingProblem:
        return ScoreMatchingProblem(
            self.sde,
            self.loss,
            None if isinstance(self.net, nnx.Module) else self._net,
            self.parametrization,
            self.drop_context,
            self.compute_dtype,
        )

    def _init(self, rng_key: PRNGKey, rows: Batch, num_steps: int | None) -> TrainState:
        """Return the state before the first step, after checking the net's output."""
        rows = jax.tree.map(jnp.asarray, rows)
        support, x = None, rows.x
        if self.support is not None:
            support = Support.of(self.support, x.shape[1:])
            support.check(x)
            x = support.unconstrain(x)
        maps = self._maps_to_unit_scale(x, rows.context)
        key_net, rng_key = jax.random.split(rng_key)
        params, graphdef = build(self._net, key_net)
        fixed = FixedParts(graphdef, *maps[:2], support, maps[2])
        module = nnx.merge(graphdef, params)
        if self._problem.per_coordinate:
            check_coordinate_levels(module, self.net)
            if not self.linear_baseline:
                covariance = denoiser_covariance(maps[0], x, module)
                fixed = fixed._replace(covariance=covariance)
        fixed = keep_rows(fixed, rows)
        if self._may_have_gaussian_baseline(module, x, rows.context):
            standardized = np.asarray(fixed.standardize.forward(x))
            baseline = GaussianBaseline.fit(standardized)
            if self.gaussian_baseline or baseline.is_narrow:
                fixed = fixed._replace(gaussian_baseline=baseline)
        denoiser = self._problem.denoiser(params, fixed)
        denoiser.check(x[0], None if rows.context is None else rows.context[0])
        if self.drop_context > 0:
            denoiser.check(x[0], None)
        step = TrainStep(self._problem, self.optim)
        return step.init(params, fixed, rng_key, num_steps)

    def _maps_to_unit_scale(
        self, x: Array, context: Array | None
    ) -> tuple[Affine, ContextMap | None, Array | None]:
        """Return the maps of data and contexts, and the linear baseline."""
        default = Affine.per_dimension if x.ndim <= 2 else Affine.shared
        standardize = (self.standardize or default)(x)
        check_kind(
            "standardize", standardize, Affine, "a function that returns an Affine"
        )
        standardize.check("data")
        standardize_context: ContextMap | None = None
        if context is not None:
            standardize_context = (self.standardize_context or Affine.context)(context)
            standardize_context.check("context")
        if not self.linear_baseline:
            return standardize, standardize_context, None
        standardize, coefficients = fit_linear_baseline(
            standardize, standardize_context, x, context
        )
        return standardize, standardize_context, coefficients

    def _may_have_gaussian_baseline(
        self, module: nnx.Module, x: Array, context: Array | None
    ) -> bool:
        """Return whether the net may add to the normal law with the covariance of x.

        Raises:
            ValueError: if it is asked for where there is none.
        """
        possible = x.ndim == 2 and x.shape[-1] <= MAX_SIZE and context is None
        possible &= not self._problem.per_coordinate
        if self.gaussian_baseline is None:
            possible &= isinstance(module, MLPModule)
            possible &= isinstance(self.loss, DenoisingScoreMatching)
            return possible and isinstance(self.parametrization, BoundedScore | EDM)
        if self.gaussian_baseline and not possible:
            raise ValueError(
                "`gaussian_baseline=True` needs rows of at most "
                f"{MAX_SIZE} numbers without context, and one noise level per row: it "
                f"is the law of a vector with one covariance. Got rows of shape "
                f"{x.shape[1:]}{'' if context is None else ' with a context'}."
            )
        return self.gaussian_baseline

    def _result(self, run: FitState, options: FitOptions) -> ScoreMatchingRunResult:
        """Return the result of a run that has ended."""
        validation_losses = None
        if options.validation is not None:
            num_blocks = -(-int(run.taken) // options.block_length)
            validation_losses = jnp.asarray(run.validation_losses[:num_blocks])
        best = run.state._replace(ema_params=options.result_params(run))
        return ScoreMatchingRunResult(
            self.get_score(best),
            jnp.asarray(run.losses[: run.taken]),
            validation_losses,
            run.state,
        )


@lru_cache(maxsize=32)
def _expected_state(
    net: Any, optim: optax.GradientTransformation | None, structure: Any, shapes: tuple
) -> tuple[Any, Any]:
    """Return shapes of a net's weights and of an optimizer's state for given weights.

    Kept, as every ``update`` asks for them. None for the weights of a module.
    """
    params = None
    if not isinstance(net, nnx.Module):
        params = jax.eval_shape(lambda: build(net, jax.random.key(0))[0])
    optimizer = optim or default_optimizer()
    given = jax.tree.unflatten(structure, shapes)
    return params, jax.eval_shape(optimizer.init, given)


def check_trainer(trainer: Any) -> None:
    """Raise unless a trainer is one of scores, or None for the default."""
    kinds = (ScoreMatching, type(None))
    check_kind("trainer", trainer, kinds, "a ScoreMatching, or None for the default")


def _check_same(message: str, got: Any, expected: Any) -> None:
    """Raise unless two trees have leaves of the same names and shapes."""
    structure: Any = jax.tree.structure(got)
    shapes = [list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (got, expected)]
    if structure == jax.tree.structure(expected) and shapes[0] == shapes[1]:
        return  # names take long, and are looked up where trees differ

    def leaves(tree: Any) -> dict[str, tuple[int, ...]]:
        paths = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in paths}

    found, needed = leaves(got), leaves(expected)
    if found != needed:
        both = dict(sorted(found.items() ^ needed.items()))
        where = next(iter(both))
        raise ValueError(
            f"{message} Got {found.get(where, 'nothing')} at {where}, "
            f"expected {needed.get(where, 'nothing')}."
        )


def _as_batch(rows: ArrayLike | Batch, context: ArrayLike | None) -> Batch:
    """Return rows and their context as a batch; a batch as it is."""
    return rows if isinstance(rows, Batch) else Batch(rows, context)
