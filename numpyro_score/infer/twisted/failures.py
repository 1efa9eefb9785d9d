"""Why a particle lost its weight: kinds of failure, their counts and their messages.

A particle whose score, likelihood or weight is not a number gets zero weight. How many
did, at which level and why, is counted in the compiled program and read afterwards.
"""

from collections.abc import Sequence
from enum import IntEnum

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from numpyro_score.caller_warnings import warn_caller

WARN_SHARE = 0.01  # of N particles at one level: the Monte Carlo error of N = 10^4


class Failure(IntEnum):
    """Kinds of failure, in the order in which the computation meets them."""

    NONE = 0
    SCORE = 1
    LIKELIHOOD = 2
    ZERO_LIKELIHOOD = 3
    TWIST = 4
    GRADIENT = 5


# what is said of a kind, and what to do
MESSAGES = {
    Failure.SCORE: (
        "the learned score is NaN or infinite",
        "Check the score at large noise and far from its data, for example "
        "`score.score(x, t)`",
    ),
    Failure.LIKELIHOOD: (
        "the log likelihood is NaN",
        "Check the data for NaN and the model's parameters at draws of its prior",
    ),
    Failure.ZERO_LIKELIHOOD: (
        "the likelihood is zero",
        "Check the data against the support of the model; a likelihood that is zero "
        "in most places needs a smoother model or more `num_particles`",
    ),
    Failure.TWIST: (
        "the likelihood widened by the covariance of x_0 given x_t is NaN or infinite "
        "(a linear solve or the range of the floating-point numbers)",
        "Bring data and noise scales near 1, or compute in double precision by "
        "`jax.config.update('jax_enable_x64', True)`",
    ),
    Failure.GRADIENT: (
        "the gradient of the log likelihood is NaN or infinite",
        "Check the model for roots, norms and logarithms at 0, whose derivative is "
        "infinite",
    ),
}


def first_failure(checks: Sequence[tuple[Failure, Bool[Array, ""]]]) -> Int[Array, ""]:
    """Return the kind of the first check that holds, or ``Failure.NONE``.

    Example:
        >>> true, false = jnp.array(True), jnp.array(False)
        >>> checks = [(Failure.SCORE, false), (Failure.GRADIENT, true)]
        >>> Failure(int(first_failure(checks))).name
        'GRADIENT'
    """
    conditions = [failed for _, failed in checks]
    return jnp.select(conditions, [jnp.asarray(int(kind)) for kind, _ in checks], 0)


def count_failures(
    failure: Int[Array, " particles"], counted: Bool[Array, " particles"]
) -> Int[Array, " kinds"]:
    """Return how many of the counted particles failed, by kind.

    Example:
        >>> counted = jnp.array([True, True, False])
        >>> count_failures(jnp.array([0, 1, 1]), counted).tolist()
        [1, 1, 0, 0, 0, 0]
    """
    return jnp.bincount(jnp.where(counted, failure, len(Failure)), length=len(Failure))


def dead_run_message(counts: np.ndarray, level: str, num_dead: int, num: int) -> str:
    """Return the error for SMC runs without weight.

    Args:
        counts: particles at the level, by kind of failure, in the first such run.
        level: where the first such run lost its weight, and of how many.
        num_dead: number of runs without weight.
        num: number of runs.
    """
    kind = Failure(int(np.argmax(np.where(np.arange(len(counts)) > 0, counts, -1))))
    what, remedy = MESSAGES[kind]
    seen = ", ".join(
        f"{int(counts[kind])} {kind.name.lower()}" for kind in Failure if counts[kind]
    )
    return (
        f"All particles of an SMC run have zero weight, so that no draw can be "
        f"weighted: {what}. {remedy}. Got {num_dead} of {num} runs, the first at level "
        f"{level}; its particles there by cause: {seen}."
    )


def warn_of_failures(counts: np.ndarray, num_particles: int) -> None:
    """Warn for each kind that befell more than 1 % of the particles at a level.

    Zero likelihood is no failure at the last level, where it is that of the particle.
    Before, it is that of points that a particle may lead to, not of all of them.

    Args:
        counts: numbers of particles, levels and kinds along the last axes.
        num_particles: particles of one run.
    """
    levels = counts.reshape(-1, *counts.shape[-2:])
    worst = levels.max((0, 1))
    worst[Failure.ZERO_LIKELIHOOD] = 0
    for kind, (what, remedy) in MESSAGES.items():
        if worst[kind] > WARN_SHARE * num_particles:
            warn_caller(
                f"ScoreSDE: {what} at {int(worst[kind])} of {num_particles} particles "
                f"of one level, which got zero weight. {remedy}."
            )
    lost = int(levels[:, :-1, Failure.ZERO_LIKELIHOOD].max(initial=0))
    if lost > WARN_SHARE * num_particles:
        warn_caller(
            f"ScoreSDE: the likelihood is zero at {lost} of {num_particles} particles "
            "of one level before the last, which got zero weight and could have led to "
            "draws of the posterior: the evidence is too low, and shares of modes may "
            "be wrong. Use a likelihood without ends, such as Normal noise in the "
            "place of Uniform, or MCMC with ScoreLangevin."
        )
