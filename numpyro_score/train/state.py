"""States and results of training."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.data.context_scale import ContextMap
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.reprs import repr_lines, short_number
from numpyro_score.score.gaussian_baseline import GaussianBaseline
from numpyro_score.score.model import LEVEL_ROUNDING, ScoreModel
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

    def print_summary(self) -> None:
        """Print what was learned, how far, and what was found about it.

        Below the lines of the repr stand the level in use, from which the score can be
        trusted off its data (:mod:`numpyro_score.score.level`; measured at first use),
        and findings with what to do: a run that ended early, a validation loss that
        was lowest in the first half of the run or is not finite, and a level in use
        above the lowest.

        Example:
            >>> import jax
            >>> from numpyro_score import MLP, ScoreMatching
            >>> trainer = ScoreMatching(MLP(2, width=8, depth=1))
            >>> result = trainer.run(
            ...     jax.random.key(0), 4, jax.numpy.eye(2), batch_size=2,
            ...     progress_bar=False,
            ... )
            >>> result.print_summary()
            ScoreMatchingRunResult
            ...
            Level in use: 0.01 standard deviations of the data, the lowest
            No finding.
        """
        level, lowest = self.score.level_in_use, float(self.score.sde.sigma_min)
        is_lowest = level <= LEVEL_ROUNDING * lowest
        where = "the lowest" if is_lowest else f"above the lowest, {lowest:.4g}"
        found = [*self._findings()]
        if not is_lowest:
            found.append(
                f"level: below {level:.4g} the score is no gradient of a density "
                "between or beyond the data. Add data or steps, or use this level."
            )
        print(
            f"{self!r}\nLevel in use: {level:.4g} standard deviations of the data, "
            f"{where}"
        )
        print("\n".join(f"- {text}" for text in found) or "No finding.")

    def _findings(self) -> Iterator[str]:
        """Yield what steps and losses say."""
        step, planned = int(self.state.step), float(self.state.num_steps)
        if step < planned:
            yield (
                f"early: the run ended at step {step:,} of {planned:,.0f}. If not for "
                "the loss of held-out rows, go on from `state` by `init_state`."
            )
        losses = self.validation_losses
        if losses is None or not len(losses):
            return
        if not jnp.isfinite(losses).all():
            yield "validation: a loss is not finite. Check the held-out rows."
        elif 2 * (int(jnp.argmin(losses)) + 1) <= len(losses):
            yield (
                f"overfit: the validation loss was lowest in block "
                f"{int(jnp.argmin(losses)) + 1} of {len(losses)}. Add data. Beside "
                "`validation`, pass `patience` for the weights of that block."
            )

    def __repr__(self) -> str:
        rows = self.score.summary() | {"losses": loss_trend(self.losses)}
        if self.validation_losses is not None:
            best, last = self.validation_losses.min(), self.validation_losses[-1]
            rows["validation"] = (
                f"{short_number(last)} at the end, {short_number(best)} at best"
            )
        return repr_lines(type(self).__name__, rows)


def loss_trend(losses: Float[Array, " steps"]) -> str:
    """Return the mean losses of the first and the last twentieth of a run.

    Example:
        >>> loss_trend(jnp.array([4.0, 2.0]))
        '4 at first, 2 at the end of 2 steps'
    """
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
