r"""Variance-preserving process of a table of discrete betas (Ho et al. 2020, DDPM).

Step k = 0, ..., K - 1 of the table has :math:`\alpha_k^2 = \prod_{j \le k} (1 -
\beta_j)` (often ``alphas_cumprod``) and :math:`\sigma_k^2 = 1 - \alpha_k^2`. It is the
time t = (k + 1)/K of the process here; between steps the logarithm of the noise level
:math:`\sigma/\alpha` is linear in t.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from numpyro_score.checks import (
    check_count,
    check_numbers,
    check_positive,
    is_real,
)
from numpyro_score.sde.base import SDE
from numpyro_score.typing import Real, Time

MAX_LEVEL = float(1 / np.finfo(np.float32).eps)  # beyond, float32 loses alpha x_0
MAX_BETA = 0.999  # Nichol and Dhariwal 2021, section 3.2: the last step of the cosine


@dataclass(frozen=True)
class DiscreteVP(SDE):
    r"""Variance-preserving process of a table of betas, as DDPM's.

    The lowest noise level is that of step 0, at t = 1/K: unlike
    :class:`~numpyro_score.sde.VP`, whose t = 0 has no noise, the process has no time
    below it.

    Args:
        betas: share of the variance that each step replaces by noise.

    Raises:
        ValueError: unless there are at least two betas, all in (0, 1), and the last
            noise level fits float32.

    Example:
        >>> process = DiscreteVP.linear(1000)
        >>> round(process.sigma_min, 4), round(process.sigma_max)
        (0.01, 157)
        >>> round(float(process.step(0.5)))  # counted from 0
        499
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _check_betas(self.betas))
        highest = np.exp(_log_levels(self.betas)[-1])
        if highest > MAX_LEVEL:
            raise ValueError(
                "`betas` must leave some signal at the last step: at a noise level "
                f"sigma/alpha above {MAX_LEVEL:.1e} float32 has none. A table of "
                "alphas_cumprod is taken by DiscreteVP.from_alphas_cumprod; of betas "
                "rescaled to zero terminal signal drop the last. "
                f"Got the level {highest:.3g} from {self.betas[0]}, ..., "
                f"{self.betas[-1]}."
            )

    @classmethod
    def linear(
        cls, num_steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> "DiscreteVP":
        """Return the process of equally spaced betas (Ho et al. 2020, section 4).

        Example:
            >>> DiscreteVP.linear(3, 0.1, 0.3).betas
            (0.1, 0.2, 0.3)
        """
        _check_ends(num_steps, beta_min, beta_max)
        return cls(tuple(np.linspace(beta_min, beta_max, num_steps).tolist()))

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012
    ) -> "DiscreteVP":
        """Return the process of equally spaced square roots of betas.

        Of latent diffusion (Rombach et al. 2022); the defaults are Stable Diffusion's.

        Example:
            >>> [round(b, 4) for b in DiscreteVP.scaled_linear(3, 0.01, 0.09).betas]
            [0.01, 0.04, 0.09]
        """
        _check_ends(num_steps, beta_min, beta_max)
        roots = np.linspace(beta_min**0.5, beta_max**0.5, num_steps)
        return cls(tuple((roots**2).tolist()))

    @classmethod
    def cosine(cls, num_steps: int = 1000, offset: float = 0.008) -> "DiscreteVP":
        r"""Return the process with :math:`\alpha = \cos(\pi (u + s) / 2 (1 + s))`.

        Up to a factor, with betas of at most 0.999 (Nichol and Dhariwal 2021, eq. 17).

        Example:
            >>> round(DiscreteVP.cosine(1000).betas[-1], 3)
            0.999
        """
        check_count("num_steps", num_steps, "the length of the table", least=2)
        check_positive("offset", offset, "the distance of the first step from no noise")
        u = np.linspace(0.0, 1.0, num_steps + 1)
        signal = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls(tuple(np.minimum(1 - signal[1:] / signal[:-1], MAX_BETA).tolist()))

    @classmethod
    def from_alphas_cumprod(cls, values: Sequence[float] | Any) -> "DiscreteVP":
        r"""Return the process of a table of :math:`\alpha_k^2`, first step first.

        Raises:
            ValueError: unless the values decrease within (0, 1): noise grows with k.

        Example:
            >>> process = DiscreteVP.from_alphas_cumprod([0.9, 0.45])
            >>> [round(beta, 3) for beta in process.betas]
            [0.1, 0.5]
        """
        table = _as_table("values", values)
        steps = np.diff(table)
        if not (steps < 0).all() or not 0 < table[-1] <= table[0] < 1:
            raise ValueError(
                "`values` must decrease within (0, 1): they are squared signal scales, "
                "and noise grows with the step. Reverse a table that starts at noise. "
                f"Got {table[0]}, ..., {table[-1]}, "
                f"{int((steps >= 0).sum())} steps up."
            )
        return cls(tuple((1 - table / np.concatenate([[1.0], table[:-1]])).tolist()))

    def __repr__(self) -> str:
        ends = f"{self.betas[0]:.4g}, ..., {self.betas[-1]:.4g}"
        return f"DiscreteVP({self.num_steps} betas {ends})"

    @property
    def num_steps(self) -> int:
        """Length K of the table."""
        return len(self.betas)

    @property
    def sigma_min(self) -> float:  # type: ignore[override]  # here it follows from betas
        """Noise level of step 0."""
        return float(np.exp(_log_levels(self.betas)[0]))

    @property
    def sigma_max(self) -> float:
        """Noise level of step K - 1."""
        return float(np.exp(_log_levels(self.betas)[-1]))

    @property
    def t_min(self) -> float:
        """Time of step 0, 1/K."""
        return 1 / self.num_steps

    @property
    def t_max(self) -> float:
        """Time of step K - 1, 1."""
        return 1.0

    def step(self, t: Time) -> Real:
        """Return the fractional step K t - 1, from 0 to K - 1."""
        k = self.num_steps * jnp.asarray(t, float) - 1
        return jnp.clip(k, 0.0, self.num_steps - 1.0)

    def bracket(self, t: Time) -> tuple[Int[Array, "..."], Real]:
        """Return the step below t and the weight of the one above.

        The weights interpolate linearly in the noise level, to which expected noise
        is proportional where it is low.
        """
        low, excess, _, width = self._interval(t)
        return low, jnp.expm1(excess * width) / jnp.expm1(width)

    def _interval(self, t: Time) -> tuple[Int[Array, "..."], Real, Real, Real]:
        """Return the step below t, the rest of t, the log level and its increase."""
        k = self.step(t)
        low = jnp.clip(jnp.floor(k), 0, self.num_steps - 2).astype(int)
        logs = jnp.asarray(_log_levels(self.betas), k.dtype)
        return low, k - low, logs[low], logs[low + 1] - logs[low]

    def log_alpha(self, t: Time) -> Real:
        """Return -log(1 + level^2)/2."""
        return -0.5 * jnp.log1p(jnp.square(self.noise_level(t)))

    def sigma(self, t: Time) -> Real:
        """Return level / sqrt(1 + level^2)."""
        level = self.noise_level(t)
        return level / jnp.sqrt(1 + jnp.square(level))

    def noise_level(self, t: Time) -> Real:
        """Return sigma/alpha, whose logarithm is linear between steps."""
        _, excess, log_level, width = self._interval(t)
        return jnp.exp(log_level + excess * width)

    def time(self, noise_level: Time) -> Real:
        """Return the t of a noise level, the inverse of :meth:`noise_level`."""
        value = jnp.log(jnp.asarray(noise_level, float))
        logs = jnp.asarray(_log_levels(self.betas), value.dtype)
        k = jnp.interp(value, logs, jnp.arange(self.num_steps, dtype=value.dtype))
        return (k + 1) / self.num_steps


def as_process(process: SDE | Sequence[float] | Any) -> SDE:
    """Return a process, or the one of a table of betas.

    Raises:
        TypeError: for a name or a class.
        ValueError: for a table that is no table of betas, or begins at the last step.

    Example:
        >>> as_process(np.linspace(1e-4, 0.02, 1000)) == DiscreteVP.linear(1000)
        True
    """
    if isinstance(process, SDE):
        return process
    if process is None or isinstance(process, type | str) or callable(process):
        raise TypeError(
            "`process` must be a noise process, such as VP(), or a table of betas, "
            "such as DiscreteVP.linear(1000).betas: it says what noise x_t has at a "
            f"time. Got {process!r}."
        )
    table = DiscreteVP(_check_betas(process))
    _check_order(table.betas)
    return table


def _check_order(betas: tuple[float, ...]) -> None:
    """Raise for betas that decrease at every step."""
    if all(after < before for before, after in pairwise(betas)):
        raise ValueError(
            "`betas` must not decrease at every step: noise is added in larger and "
            "larger shares, from the first step to the last. Reverse a table that "
            "starts at noise, give alphas_cumprod to DiscreteVP.from_alphas_cumprod, "
            "or pass DiscreteVP(betas) if they are meant. "
            f"Got {betas[0]}, ..., {betas[-1]}."
        )


@lru_cache(maxsize=64)
def _log_levels(betas: tuple[float, ...]) -> np.ndarray:
    """Return log sqrt((1 - a)/a) of the cumulative product a, in float64."""
    log_signal = np.cumsum(np.log1p(-np.asarray(betas)))
    return 0.5 * (np.log(-np.expm1(log_signal)) - log_signal)


def _as_table(name: str, values: Any) -> np.ndarray:
    if isinstance(values, Set):
        raise ValueError(f"`{name}` must be a list in order of the steps. Got a set.")
    check_numbers(name, [] if values is None else values, "one for each step")
    table = np.asarray(values, float)
    if table.ndim != 1 or len(table) < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"`{name}` must be a list of at least 2 finite numbers: one for each step. "
            f"Got shape {table.shape}, {int((~np.isfinite(table)).sum())} not finite."
        )
    return table


def _check_betas(betas: Any) -> tuple[float, ...]:
    table = _as_table("betas", betas)
    if not ((table > 0) & (table < 1)).all():
        raise ValueError(
            "`betas` must lie in (0, 1): each is the share of the variance that a step "
            "replaces by noise, so that noise grows and some signal is left. "
            f"Got values from {table.min()} to {table.max()}."
        )
    return tuple(table.tolist())


def _check_ends(num_steps: int, beta_min: float, beta_max: float) -> None:
    check_count("num_steps", num_steps, "the length of the table", least=2)
    are_real = is_real(beta_min) and is_real(beta_max)
    if not are_real or not 0 < beta_min <= beta_max < 1:
        raise ValueError(
            "`beta_min` and `beta_max` must satisfy 0 < beta_min <= beta_max < 1: they "
            f"are the first and the last beta. Got {beta_min}, {beta_max}."
        )
