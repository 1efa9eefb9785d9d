r"""Classifier-free guidance: extrapolation from the unconditional score.

.. math:: D = D_\varnothing + w\, (D_c - D_\varnothing),

and the same for scores (Ho and Salimans 2022, eq. 6, with w - 1 in place of w).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Array

from numpyro_score.checks import check_kind, check_weight, is_traced
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import Position, Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierFreeDenoiser:
    """Denoiser of :func:`classifier_free_guidance`."""

    conditional: Callable
    unconditional: Callable
    null_context: Array | None
    weight: Scalar

    def __call__(
        self, x: Position, level: Scalar, context: Array | None = None
    ) -> Position:
        """Return the extrapolated D at one standardized point; two evaluations."""
        free = self.unconditional(x, level, self.null_context)
        return free + self.weight * (self.conditional(x, level, context) - free)


def classifier_free_guidance(
    score: ScoreModel,
    weight: Scalar,
    *,
    unconditional: ScoreModel | None = None,
    null_context: Array | None = None,
) -> ScoreModel:
    """Return s + weight (s_c - s), with s the score without and s_c with context.

    Weight 1 is the conditional law and 0 the unconditional one, exactly. With other
    weights the law of the draws is *not* proportional to p(x) p(c | x)^weight, because
    adding noise and taking powers do not commute: do not use them for inference.

    Args:
        score: a score conditioned on a context.
        weight: factor of the difference of the scores.
        unconditional: a score without the context, trained on the same standardized
            data; None for ``score`` itself at ``null_context``.
        null_context: the context that training used for no context.

    Raises:
        ValueError: if both scores have different processes or standardizations.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_score import VE
        >>> def normal(loc):
        ...     return ScoreModel.from_fn(
        ...         lambda x, t: (loc - x) / (1 + VE().sigma(t) ** 2), VE(), ()
        ...     )
        >>> guided = classifier_free_guidance(
        ...     normal(1.0), 2.0, unconditional=normal(0.0)
        ... )
        >>> round(float(guided.score(jnp.array(0.0))), 2)
        2.0
    """
    check_kind("score", score, ScoreModel, "a ScoreModel")
    check_weight(weight)
    free = score if unconditional is None else unconditional
    if free.sde != score.sde or not _same_scale(score, free):
        raise ValueError(
            "`unconditional` must share the process and the standardization of "
            "`score`: their denoisers are subtracted. Train both with the same "
            f"`standardize`. Got {free.sde} and {score.sde}."
        )
    denoiser = ClassifierFreeDenoiser(
        score.denoiser, free.denoiser, null_context, weight
    )
    return replace(score, denoiser=denoiser)


def _same_scale(score: ScoreModel, other: ScoreModel) -> bool:
    leaves = jax.tree.leaves((score.standardize, other.standardize))
    if is_traced(leaves):
        return True
    pairs = zip(leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :], strict=True)
    return all(np.shape(a) == np.shape(b) and np.allclose(a, b) for a, b in pairs)
