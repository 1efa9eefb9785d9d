"""What training carries, reports and returns."""

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.reprs import repr_lines, short_number
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey


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
    - **standardize_context**: map of contexts to the unit scale, or None.
    - **support**: the set that data live in; None for all reals.
    - **center**: coefficients that predict the data from their context, or None.
    """

    params: Any
    ema_params: Any
    opt_state: Any
    step: Array
    num_steps: Array
    standardize: Affine
    graphdef: nnx.GraphDef
    rng_key: PRNGKey
    standardize_context: Affine | None = None
    support: Support | None = None
    center: Array | None = None


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
    """What a callback receives after every block of steps.

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
    state: ScoreMatchingState
