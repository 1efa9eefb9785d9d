r"""Sequences of noise levels: geometric, of Karras et al., and of the cosine path.

A *noise level* is the ratio :math:`\sigma(t) / \alpha(t)` of a Gaussian path
:math:`x_t = \alpha(t) x_0 + \sigma(t) n`. Grids are decreasing arrays of levels; a
process turns levels into times with ``sde.time``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_positive, is_real


def check_levels(sigma_min: float, sigma_max: float) -> None:
    """Raise unless ``0 < sigma_min < sigma_max``, which is finite."""
    are_real = is_real(sigma_min) and is_real(sigma_max)
    if not are_real or not 0 < sigma_min < sigma_max < float("inf"):
        raise ValueError(
            "`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max < inf: "
            "they are the lowest and the highest noise level. "
            f"Got sigma_min={sigma_min}, sigma_max={sigma_max}."
        )


def _unit_grid(sigma_min: float, sigma_max: float, num_levels: int) -> Array:
    """Return 0, ..., 1 after checking what every grid needs."""
    check_levels(sigma_min, sigma_max)
    why = "the size of a grid, which has a first and a last level"
    check_count("num_levels", num_levels, why, least=2)
    return jnp.linspace(0.0, 1.0, num_levels)


def geometric(
    sigma_min: float, sigma_max: float, num_levels: int
) -> Float[Array, " levels"]:
    """Levels equally spaced in log sigma, decreasing (Song and Ermon 2019).

    Example:
        >>> [round(float(s), 3) for s in geometric(0.1, 10.0, 3)]
        [10.0, 1.0, 0.1]
    """
    u = _unit_grid(sigma_min, sigma_max, num_levels)
    return sigma_max * (sigma_min / sigma_max) ** u


def karras(
    sigma_min: float, sigma_max: float, num_levels: int, rho: float = 7.0
) -> Float[Array, " levels"]:
    r"""Levels equally spaced in :math:`\sigma^{1/\rho}` (Karras et al. 2022, eq. 5).

    Example:
        >>> karras(1.0, 3.0, 3, rho=1.0)
        Array([3., 2., 1.], dtype=float32)
    """
    check_positive("rho", rho, "a power")
    u = _unit_grid(sigma_min, sigma_max, num_levels)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (start + u * (end - start)) ** rho


def cosine(
    sigma_min: float, sigma_max: float, num_levels: int
) -> Float[Array, " levels"]:
    r"""Levels :math:`\tan(\phi)` with equally spaced angles (Nichol and Dhariwal 2021).

    On the path :math:`\alpha = \cos\phi, \sigma = \sin\phi` the ratio is the tangent.

    Example:
        >>> [round(float(s), 3) for s in cosine(0.5, 2.0, 3)]
        [2.0, 1.0, 0.5]
    """
    u = _unit_grid(sigma_min, sigma_max, num_levels)
    start, end = jnp.arctan(sigma_max), jnp.arctan(sigma_min)
    return jnp.tan(start + u * (end - start))
