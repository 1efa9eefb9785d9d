"""Conditional laws of vectors, from a score with one noise level per coordinate.

A trainer of such scores, draws of some numbers of vectors given the others, and the
verdict on these draws, for joint laws of a model's sites as for tables.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.data.standardize import Affine
from numpyro_score.infer.amortized.fit_verdict import (
    MIN_ROWS,
    NUM_DRAWS,
    CoordinateFit,
    FitVerdict,
    judge_fit,
    judge_integers,
)
from numpyro_score.infer.amortized.rank_regression import predict_scores
from numpyro_score.loss import DenoisingScoreMatching, PerCoordinate
from numpyro_score.nn import MLP
from numpyro_score.score.model import ScoreModel
from numpyro_score.train import ScoreMatching
from numpyro_score.train.score_matching import check_trainer
from numpyro_score.typing import PRNGKey

MAX_POINTS = 2**15  # that one program draws at once: 4 MB at 32 columns

Vectors = Float[np.ndarray, "_ size"]
Draws = Float[np.ndarray, "_ draws size"]


def conditional_trainer(trainer: ScoreMatching | None, net: MLP) -> ScoreMatching:
    """Return a trainer of conditional laws of standardized rows.

    Args:
        trainer: the trainer, or None for the default.
        net: the net of the default.

    Raises:
        TypeError: for a trainer of another kind.
        ValueError: for a trainer without levels per coordinate.
    """
    check_trainer(trainer)
    trainer = trainer or ScoreMatching(
        net,
        loss=DenoisingScoreMatching(noise=PerCoordinate()),
        standardize=lambda x: Affine.identity(x.shape[1:]),
    )
    if not getattr(trainer.loss, "per_coordinate", False):
        raise ValueError(
            "`trainer` must have loss=DenoisingScoreMatching(noise=PerCoordinate()): "
            "what is drawn are conditional laws of the rows. "
            f"Got {trainer.loss}."
        )
    return trainer


def draw_rows(
    key: PRNGKey, score: ScoreModel, u: np.ndarray, num_draws: int
) -> Float[np.ndarray, "draws rows columns"]:
    """Return draws of rows given their numbers that are not NaN.

    Args:
        key: random key.
        score: score of rows, with one noise level per coordinate.
        u: rows, NaN where a number is missing.
        num_draws: number of draws of each row.
    """
    is_open = np.isnan(u).any(1)
    rows = jnp.asarray(u[is_open], float)
    draws = np.repeat(u[None], num_draws, axis=0)
    size = max(1, MAX_POINTS // num_draws)
    size = min(size, 1 << max(len(rows) - 1, 0).bit_length())  # few shapes to compile
    parts = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        padding = jnp.full((size - len(block), u.shape[1]), jnp.nan)
        keys = jax.random.split(jax.random.fold_in(key, start), size)
        block = jnp.concatenate([block, padding])
        parts.append(np.asarray(_draw_block(score, block, keys, num_draws=num_draws)))
    if parts:
        drawn = np.concatenate(parts)[: len(rows)].transpose(1, 0, 2)
        draws[:, is_open] = np.where(np.isnan(u[is_open]), drawn, u[is_open])
    return draws


@partial(jax.jit, static_argnames="num_draws")
def _draw_block(
    score: ScoreModel, rows: Array, keys: PRNGKey, *, num_draws: int
) -> Float[Array, "rows draws columns"]:
    """Return draws given the numbers of each row; compiled once per shape."""

    def one(row: Array, key: PRNGKey) -> Array:
        return score.condition(row).sample(key, (num_draws,))

    return jax.vmap(one)(rows, keys)


def judge_conditionals(
    rng_key: PRNGKey,
    score: ScoreModel,
    names: tuple[str, ...],
    masks: tuple[Bool[np.ndarray, " size"], ...],
    rows: Vectors,
    held_out: Vectors,
    integers: Callable[[np.ndarray], np.ndarray],
    log_joint: Callable[[Draws], Float[np.ndarray, "_ points"] | None] | None = None,
) -> FitVerdict:
    """Return the verdict on draws of some numbers of vectors given all others.

    Args:
        rng_key: random key.
        score: the score.
        names: of the numbers of a vector.
        masks: which numbers are drawn given the others; together, all of them.
        rows: vectors on which it was trained, for the regression on ranks; NaN where
            a number is missing.
        held_out: other vectors of the same law. Draws by a mask are judged where what
            it hides is known.
        integers: the integers that vectors stand for, NaN where a number is real.
        log_joint: of draws by the first mask, see
            :func:`~numpyro_score.infer.amortized.fit_verdict.joint_densities`.
    """
    fits: list[CoordinateFit] = []
    keys, most = jax.random.split(rng_key, len(masks)), 0
    for number, (key, hidden) in enumerate(zip(keys, masks, strict=True)):
        given, true = (x[~np.isnan(x[:, hidden]).any(1)] for x in (rows, held_out))
        most = max(most, len(true))
        if not hidden.any() or len(true) < MIN_ROWS:
            continue
        key_draw, key_ties = jax.random.split(key)
        known = np.where(hidden, np.nan, true)
        draws = draw_rows(key_draw, score, known, NUM_DRAWS).transpose(1, 0, 2)
        densities = log_joint(draws) if log_joint and number == 0 else None
        hidden_names = [n for n, flag in zip(names, hidden, strict=True) if flag]
        verdict = judge_fit(
            np.random.default_rng(np.asarray(jax.random.key_data(key_ties))),
            tuple(hidden_names),
            true[:, hidden],
            draws[:, :, hidden],
            given[:, hidden],
            # a missing number of standardized rows counts as their mean
            predict_scores(
                given[:, hidden], *(np.nan_to_num(x[:, ~hidden]) for x in (given, true))
            ),
            densities,
        )
        fits += verdict.coordinates
        codes, drawn = integers(true)[:, hidden], integers(draws)[..., hidden]
        fits += [
            judge_integers(name, codes[:, j], drawn[..., j])
            for j, name in enumerate(hidden_names)
            if not np.isnan(codes[:, j]).any()
        ]
    return FitVerdict(tuple(fits), most)
