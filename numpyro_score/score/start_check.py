r"""Check that the highest noise level of a given score hides where its data lie.

By the probability flow draws start from, and densities end with, the law
:math:`N(0, 1 + \sigma_{max}^2)` on the unit scale: that of x_t at the highest noise
level for data of mean 0 and sd 1. For Gaussian data of mean m and sd s it is
:math:`N(m, s^2 + \sigma_{max}^2)`. The flow carries the difference to the data, which
end :math:`m / \sqrt{s^2 + \sigma_{max}^2}` of their sd off, and with
:math:`\sqrt{(1 + \sigma_{max}^2) / (s^2 + \sigma_{max}^2)}` times their sd. Trainers
standardize their data; of functions that others wrote only this is known.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.score.identity import IdentityKey

# sd by which draws are off: 4 % of the probability is elsewhere, 2 Phi(.05) - 1
MAX_OFFSET = 0.1
MAX_WIDTH_ERROR = 0.05  # of the sd of draws: 2.4 % is elsewhere, .05 (2 / (pi e))^1/2
# s^2 / (s^2 + sigma_max^2), for s of 10 sigma_max; keeps 1 - share from 0
MAX_SHARE = 0.99


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

    def denoise(x: Any) -> Any:
        return score.denoise_standardized(x, level)

    center = denoise(denoise(jnp.zeros(score.event_shape)))
    noise = level * jax.random.normal(jax.random.key(0), score.event_shape)  # any
    share = jnp.vdot(denoise(center + noise) - center, noise) / jnp.vdot(noise, noise)
    distance = jnp.abs(center).max()
    if is_traced(share, distance):
        return
    share = jnp.clip(share, 0, MAX_SHARE)
    offset = float(distance * jnp.sqrt(1 - share) / level)
    ratio = float(jnp.sqrt((1 + level**2) * (1 - share)) / level)
    if offset > MAX_OFFSET or abs(ratio - 1) > MAX_WIDTH_ERROR:
        highest, direction = f"{float(level):.4g}", "narrow" if ratio < 1 else "wide"
        warn_caller(
            f"The highest noise level of this score, {highest}, does not hide where "
            "its data lie: draws and densities by the flow start from "
            f"N(0, 1 + {highest}^2). Data centred at {float(distance):.3g} end "
            f"{offset:.2g} of their sd off, and {100 * abs(ratio - 1):.0f} % too "
            f"{direction}. Give a process with a higher `sigma_max`, or a score of "
            "data that are centred and scaled (`standardize`)."
        )
