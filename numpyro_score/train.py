r"""Learn a score from samples, with the interface of ``numpyro.infer.SVI``."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm.auto import trange

from numpyro_score.data import check_counts, check_data
from numpyro_score.estimator import NetDenoiser
from numpyro_score.loss import DenoisingScoreMatching, Loss
from numpyro_score.score import ScoreModel
from numpyro_score.sde import SDE, VE
from numpyro_score.standardize import Affine
from numpyro_score.typing import PRNGKey, Scalar

LEARNING_RATE = 2e-3  # peak of the default schedule
EMA_EXPONENT = 6.94  # the average is 10 % of the run wide (Karras et al. 2024, eq. 124)
NUM_BLOCKS = 20  # compiled blocks per run, between which progress is shown


class ScoreMatchingState(NamedTuple):
    """What training carries from step to step; a pytree.

    - **params**: weights being trained.
    - **ema_params**: their average, which makes the score.
    - **opt_state**: state of the optimizer.
    - **step**: number of steps taken.
    - **num_steps**: length of the run that the schedule aims at.
    - **standardize**: map to the unit scale.
    - **graphdef**: structure of the net; no arrays.
    - **rng_key**: key of the next step.
    """

    params: Any
    ema_params: Any
    opt_state: Any
    step: Array
    num_steps: Array
    standardize: Affine
    graphdef: nnx.GraphDef
    rng_key: PRNGKey


class ScoreMatchingRunResult(NamedTuple):
    """What a run returns.

    - **score**: the learned law.
    - **losses**: training loss of every step.
    - **validation_losses**: loss on the validation data after every block, or None.
    - **state**: state to go on from.
    """

    score: ScoreModel
    losses: Float[Array, " steps"]
    validation_losses: Float[Array, " blocks"] | None
    state: ScoreMatchingState


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
        optim: an Optax optimizer; None for Adam with clipped gradients and a cosine
            schedule over the run.
        standardize: function of the data that returns an
            :class:`~numpyro_score.standardize.Affine`; None for one scale per number
            for rows of a table and one shared scale for images.

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

    def init(
        self, rng_key: PRNGKey, data: Array, num_steps: int | None = None
    ) -> ScoreMatchingState:
        """Return the state before the first step.

        Args:
            rng_key: random key of the weights and of all training noise.
            data: rows of shape ``event_shape``, in physical units.
            num_steps: length of the run, for the schedule; None for a constant rate.

        Raises:
            TypeError: if the net does not return floating-point numbers.
            ValueError: for data that are not finite, do not vary or do not fit.
        """
        data = check_data(data)
        key_net, rng_key = jax.random.split(rng_key)
        params, graphdef = self._build(key_net)
        NetDenoiser(params, graphdef).check(data[0])
        default = Affine.per_dimension if data.ndim <= 2 else Affine.shared
        standardize = self.standardize or default
        return ScoreMatchingState(
            params=params,
            ema_params=params,
            opt_state=self._optimizer().init(params),
            step=jnp.zeros((), int),
            num_steps=jnp.asarray(jnp.inf if num_steps is None else num_steps, float),
            standardize=standardize(data),
            graphdef=graphdef,
            rng_key=rng_key,
        )

    def update(
        self, state: ScoreMatchingState, batch: Array
    ) -> tuple[ScoreMatchingState, Scalar]:
        """Take one step on a batch; return the new state and the batch's loss."""
        rng_key, key = jax.random.split(state.rng_key)
        loss_fn = partial(self._loss, state=state, key=key, batch=batch)
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = self._optimizer().update(
            grads, state.opt_state, state.params
        )
        if self.optim is None:
            progress = jnp.minimum(state.step / state.num_steps, 1.0)
            rate = -0.5 * LEARNING_RATE * (1 + jnp.cos(jnp.pi * progress))  # cosine
            updates = jax.tree.map(lambda u: rate * u, updates)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        share = 1 - (1 - 1 / step) ** (EMA_EXPONENT + 1)
        return state._replace(
            params=params,
            ema_params=optax.incremental_update(params, state.ema_params, share),
            opt_state=opt_state,
            step=step,
            rng_key=rng_key,
        ), loss

    def evaluate(self, state: ScoreMatchingState, batch: Array) -> Scalar:
        """Return the loss of the averaged weights, with the same noise every time."""
        key = jax.random.key(0)  # common random numbers make evaluations comparable
        return self._loss(state.ema_params, state=state, key=key, batch=batch)

    def get_score(self, state: ScoreMatchingState) -> ScoreModel:
        """Return the score of the averaged weights."""
        return ScoreModel(
            NetDenoiser(state.ema_params, state.graphdef),
            state.standardize,
            self.sde,
            state.standardize.loc.shape,
        )

    def run(
        self,
        rng_key: PRNGKey,
        num_steps: int,
        data: Array,
        *,
        batch_size: int = 256,
        validation: Array | None = None,
        progress_bar: bool = True,
        init_state: ScoreMatchingState | None = None,
    ) -> ScoreMatchingRunResult:
        """Train for ``num_steps`` steps on random batches.

        The data live on the device and the steps run in compiled blocks. If the loss
        stops being finite the run ends with a warning and the last good state.

        Args:
            rng_key: random key.
            num_steps: number of steps.
            data: rows of shape ``event_shape``, in physical units.
            batch_size: rows per step, drawn with replacement.
            validation: held-out rows whose loss is recorded between blocks.
            progress_bar: whether to show progress.
            init_state: state to go on from, instead of fresh weights.

        Raises:
            FloatingPointError: if the loss is not finite in the first block.
            TypeError: if the net does not return floating-point numbers.
            ValueError: for data that are not finite, do not vary, do not fit the net or
                are fewer than a batch, and for counts below 1.
        """
        event_shape = None if init_state is None else init_state.standardize.loc.shape
        data = check_data(data, event_shape=event_shape)
        check_counts(num_steps, batch_size, len(data))
        if validation is not None:
            validation = check_data(validation, "validation", data.shape[1:])
        state = init_state or self.init(rng_key, data, num_steps)
        end = jnp.maximum(state.num_steps, state.step + num_steps)
        state = state._replace(num_steps=end)  # else the rate of a continued run is 0
        block = -(-num_steps // NUM_BLOCKS)
        losses, validation_losses = [], []
        with trange(num_steps, disable=not progress_bar) as bar:
            for start in range(0, num_steps, block):
                count = min(block, num_steps - start)
                previous = state
                state, block_losses = _run_block(
                    self, state, data, count, block=block, batch_size=batch_size
                )
                block_losses = np.asarray(block_losses[:count])
                if not np.isfinite(block_losses).all():
                    _stop(start, block_losses)
                    state = previous
                    break
                losses.append(block_losses)
                message = f"loss {block_losses.mean():.4f}"
                if validation is not None:
                    validation_losses.append(_evaluate(self, state, validation))
                    message += f", validation {validation_losses[-1]:.4f}"
                bar.set_postfix_str(message, refresh=False)
                bar.update(count)
        return ScoreMatchingRunResult(
            self.get_score(state),
            jnp.concatenate(losses),
            jnp.stack(validation_losses) if validation_losses else None,
            state,
        )

    def _build(self, key: PRNGKey) -> tuple[Any, nnx.GraphDef]:
        """Return weights and structure of the net."""
        net = self.net
        if not isinstance(net, nnx.Module):
            net = net(rngs=nnx.Rngs(key))
        graphdef, params = nnx.split(net)
        return params, graphdef

    def _optimizer(self) -> optax.GradientTransformation:
        if self.optim is not None:
            return self.optim
        return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def _loss(
        self, params: Any, *, state: ScoreMatchingState, key: PRNGKey, batch: Array
    ) -> Scalar:
        denoiser = NetDenoiser(params, state.graphdef)
        x0 = jax.vmap(state.standardize.forward)(batch)
        return self.loss(key, jax.vmap(denoiser), x0, self.sde)


@partial(jax.jit, static_argnums=0, static_argnames=("block", "batch_size"))
def _run_block(
    trainer: ScoreMatching,
    state: ScoreMatchingState,
    data: Array,
    count: Array | int,
    *,
    block: int,
    batch_size: int,
) -> tuple[ScoreMatchingState, Array]:
    """Take ``count`` steps, at most ``block``; one program for any count."""

    def body(i: Array, carry: tuple) -> tuple:
        state, losses = carry
        rng_key, key = jax.random.split(state.rng_key)
        rows = jax.random.randint(key, (batch_size,), 0, len(data))
        state, loss = trainer.update(state._replace(rng_key=rng_key), data[rows])
        return state, losses.at[i].set(loss)

    state, losses = jax.lax.fori_loop(0, count, body, (state, jnp.zeros(block)))
    broken = ~jnp.isfinite(optax.tree.norm(state.params))  # after a finite loss
    return state, jnp.where(broken, losses.at[count - 1].set(jnp.nan), losses)


_evaluate = jax.jit(ScoreMatching.evaluate, static_argnums=0)


def _stop(start: int, block_losses: np.ndarray) -> None:
    """Say at which step the loss broke; raise if there is no good state to keep."""
    step = start + int(np.argmin(np.isfinite(block_losses)))
    message = (
        f"The loss is not finite at step {step}. Lower the learning rate, check the "
        "data for outliers, or check the net."
    )
    if start == 0:
        raise FloatingPointError(message)
    warnings.warn(
        f"{message} Training stopped; the result is the state after step {start}.",
        stacklevel=3,
    )
