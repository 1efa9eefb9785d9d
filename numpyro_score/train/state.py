"""States and results of training."""

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.data.context_scale import ContextMap
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.reprs import repr_lines, short_number
from numpyro_score.score.gaussian_baseline import GaussianBaseline
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import Params, PRNGKey


class TrainState(NamedTuple):
    """State of an optimization between two steps; a pytree.

    - **params**: weights being trained.
    - **ema_params**: their moving average; the weights of the result.
    - **opt_state**: state of the optimizer.
    - **step**: number of steps taken.
    - **num_steps**: number of steps after which the learning rate is zero.
    - **rng_key**: key of the next step.
    - **fixed**: what the loss reads and no step changes; for a score
      :class:`FixedParts`.
    """

    params: Params
    ema_params: Params
    opt_state: Any
    step: Array
    num_steps: Array
    rng_key: PRNGKey
    fixed: Any


class FixedParts(NamedTuple):
    """Structure of the net and maps to the unit scale, fixed while a score is trained.

    - **graphdef**: structure of the net; no arrays.
    - **standardize**: map of (unconstrained) data to the unit scale.
    - **standardize_context**: map of contexts to the unit scale, or None.
    - **support**: support of the data; None for all reals.
    - **linear_baseline**: coefficients that predict the data from their context, of
      shape (context size, size of x), or None.
    - **covariance**: covariance of standardized data, of which the net learns what is
      not normal, or None.
    - **gaussian_baseline**: the normal law that the net adds to, or None.
    - **rows**: some standardized rows without context, which the score keeps; held-out
      ones where there are enough.
    """

    graphdef: nnx.GraphDef
    standardize: Affine
    standardize_context: ContextMap | None = None
    support: Support | None = None
    linear_baseline: Array | None = None
    gaussian_baseline: GaussianBaseline | None = None
    covariance: Array | None = None
    rows: Array | None = None


class ScoreMatchingRunResult(NamedTuple):
    """Result of :meth:`ScoreMatching.run <numpyro_score.train.ScoreMatching.run>`.

    - **score**: the learned score.
    - **losses**: training loss of every step.
    - **validation_losses**: loss of the averaged weights on the validation data after
      every block, or None.
    - **state**: state after the last step, to continue from.
    """

    score: ScoreModel
    losses: Float[Array, " steps"]
    validation_losses: Float[Array, " blocks"] | None
    state: TrainState

    def __repr__(self) -> str:
        rows = self.score.summary() | {"losses": _trend(self.losses)}
        if self.validation_losses is not None:
            best, last = self.validation_losses.min(), self.validation_losses[-1]
            rows["validation"] = (
                f"{short_number(last)} at the end, {short_number(best)} at best"
            )
        return repr_lines(type(self).__name__, rows)


def _trend(losses: Float[Array, " steps"]) -> str:
    """Return the mean losses of the first and the last twentieth of a run."""
    if not len(losses):
        return "no steps"
    few = max(len(losses) // 20, 1)
    first, last = short_number(losses[:few].mean()), short_number(losses[-few:].mean())
    return f"{first} at first, {last} at the end of {len(losses):,} steps"


class Progress(NamedTuple):
    """Argument of a callback, after every block of steps.

    - **step**: steps taken in this run.
    - **loss**: mean training loss of the block.
    - **validation_loss**: loss of the averaged weights on the validation data, or None.
    - **state**: the training state.

    Example:
        >>> import jax
        >>> from numpyro_score import MLP, ScoreMatching
        >>> def stop_on_nan(progress: Progress) -> None:
        ...     if not progress.loss < float("inf"):
        ...         raise FloatingPointError(f"step {progress.step}")
        >>> trainer = ScoreMatching(MLP(2, width=8, depth=1))
        >>> result = trainer.run(
        ...     jax.random.key(0),
        ...     4,
        ...     jax.numpy.eye(2),
        ...     batch_size=2,
        ...     callbacks=[stop_on_nan],
        ...     progress_bar=False,
        ... )
        >>> len(result.losses)
        4
    """

    step: int
    loss: float
    validation_loss: float | None
    state: TrainState
