r"""Check that the highest noise level of a given score hides how wide its data are.

By the probability flow draws start from, and densities end with, the law
:math:`N(m, 1 + \sigma_{max}^2)` on the unit scale, with m about the mean of the data
(:func:`~numpyro_score.solver.base.start_center`): that of x_t at the highest noise
level for data of sd 1. For normal data of sd s it is :math:`N(m, s^2 +
\sigma_{max}^2)`. The flow carries the difference to the data, which end with
:math:`\sqrt{(1 + \sigma_{max}^2) / (s^2 + \sigma_{max}^2)}` times their sd. Trainers
standardize their data; of functions that others wrote only this is known.

The Jacobian of the denoiser has eigenvalues :math:`s^2 / (s^2 + \sigma_{max}^2)`. The
check looks at their mean, for data that are narrow in all directions, and at the
largest one, for data that are wide in one, as those of modes far apart are.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.score.identity import IdentityKey
from numpyro_score.typing import Position

# sd by which draws are off: 4 % of the probability is elsewhere, 2 Phi(.05) - 1
MAX_OFFSET = 0.1
MAX_WIDTH_ERROR = 0.05  # of the sd of draws: 2.4 % is elsewhere, .05 (2 / (pi e))^1/2
# s^2 / (s^2 + sigma_max^2), for s of 10 sigma_max; keeps 1 - share from 0
MAX_SHARE = 0.99
# of the power iteration: in 1000 directions, one that is wider than the others by a
# factor of 1.5 in variance keeps all but 1000 * 1.5^(-2 * 20) = 1e-4 of the norm
NUM_ROUNDS = 20
SIGNS = 1.0, -1.0  # of the two sides of a central difference


def warn_of_start(score: Any) -> None:
    """Warn, once for each score, of data that the highest noise level does not hide.

    Mean and sd of the data are those of the denoiser at the highest level. Scores that
    are traced are not checked.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel` of a function.
    """
    if not is_traced(score):
        with jax.ensure_compile_time_eval():
            _warn_once(IdentityKey.of(score))


@lru_cache(maxsize=32)
def _warn_once(key: IdentityKey) -> None:
    score = key.tree
    level = jnp.asarray(score.sde.sigma_max, float)
    measured = _measure(score, level)
    if is_traced(*measured):
        return
    mean, widest, offset = (float(value) for value in measured)
    narrow, wide = (_width_ratio(level, share) for share in (widest, mean))
    ratio = narrow if 1 - narrow > wide - 1 else wide
    if offset > MAX_OFFSET or abs(ratio - 1) > MAX_WIDTH_ERROR:
        highest, direction = f"{float(level):.4g}", "narrow" if ratio < 1 else "wide"
        where = " in the widest direction" if ratio == narrow else ""
        warn_caller(
            f"The highest noise level of this score, {highest}, does not hide where "
            "its data lie: draws and densities by the flow start from a normal law of "
            f"variance 1 + {highest}^2. Data end up to {offset:.2g} of their sd off, "
            f"and {100 * abs(ratio - 1):.0f} % too {direction}{where}. Give a process "
            "with a higher `sigma_max`, or a score of data that are scaled "
            "(`standardize`)."
        )


def _measure(score: Any, level: Array) -> tuple[Array, Array, Array]:
    """Return mean and largest eigenvalue of the Jacobian of D, and the error of m.

    The last, from how far D moves m, in sd of x_t in the widest direction.
    """

    def along(direction: Position) -> Position:
        """Return the derivative of D along a direction, over one sd of the noise."""
        sides = [_denoise(score, center + s * level * direction, level) for s in SIGNS]
        return (sides[0] - sides[1]) / (2 * level)

    center = score.start_center(level)
    noise = jax.random.normal(jax.random.key(0), score.event_shape)  # any
    mean = jnp.vdot(along(noise), noise) / jnp.vdot(noise, noise)
    direction, widest = noise / jnp.linalg.norm(noise), mean
    for _ in range(NUM_ROUNDS):
        image = along(direction)
        widest = jnp.vdot(direction, image)  # of what is symmetric in the Jacobian
        length = jnp.linalg.norm(image)
        direction = image / jnp.maximum(length, jnp.finfo(image.dtype).tiny)
    left = 1 - jnp.clip(widest, 0, MAX_SHARE)
    moved = _denoise(score, center, level) - center
    return mean, widest, jnp.linalg.norm(moved) / (level * jnp.sqrt(left))


@jax.jit
def _denoise(score: Any, x: Position, level: Array) -> Position:
    return score.denoise_standardized(x, level)


def _width_ratio(level: Array, share: float) -> float:
    """Return the sd of draws over that of data, of a share s^2 / (s^2 + level^2)."""
    left = 1 - min(max(share, 0.0), MAX_SHARE)
    return float(jnp.sqrt((1 + level**2) * left) / level)
