r"""Inverse temperatures of parallel tempering: rounds, barrier, and their adaptation.

With rejection rates :math:`r_k` of swaps between neighbors the communication barrier is
:math:`\Lambda(\beta_k) = \sum_{j<k} r_j` (Syed, Bouchard-Côté, Deligiannidis and Doucet
2022, eq. 26). Rejections are alike, and restarts most frequent, where neighbors stand
at equal steps of it (their corollary 2).
"""

import math

import jax.numpy as jnp
from jax.scipy.special import erfinv
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.kernel.adaptation import LAST_SHARE

MIN_WARMUP = 4  # iterations: even and odd pairs twice
# least iterations of the first round: a rate is within .5 / 16^1/2 = 1/8
FIRST_ROUND = 16
RUNGS_PER_BARRIER = 2.5  # Syed et al. 2022, section 5.3: 2 Λ, with room for its error
# keeps the barrier increasing where all swaps are accepted: at most .06 over 64 pairs
MIN_REJECTION = 1e-3
MAX_REJECTION = 1 - 1e-6  # below the largest float32, 1 - 6e-8: erfinv(1) is infinite

Rungs = Float[Array, " rungs"]
Pairs = Float[Array, "*chains pairs"]


def round_ends(num_warmup: int) -> tuple[int, ...]:
    """Return after how many iterations each round of warm-up ends, each twice as long.

    In the last one, 15 % of warm-up, nothing but the step sizes is adapted.

    Args:
        num_warmup: iterations of warm-up, at least ``MIN_WARMUP``.

    Raises:
        ValueError: for a warm-up that does not hold one round.

    Example:
        >>> round_ends(150)
        (18, 54, 128, 150)
    """
    if num_warmup < MIN_WARMUP:
        raise ValueError(
            f"`num_warmup` must be at least {MIN_WARMUP}, one round of swaps of even "
            "and odd pairs: temperatures, step sizes and metrics are adapted in "
            f"rounds. Use several hundred. Got {num_warmup}."
        )
    adapted = num_warmup - int(LAST_SHARE * num_warmup)
    count = max(1, int(math.log2(adapted / FIRST_ROUND + 1)))
    shares = [(2 ** (j + 1) - 1) / (2**count - 1) for j in range(count)]
    return (*(int(adapted * share) for share in shares), num_warmup)


def first_inverse_temperatures(
    log_likelihoods: Float[Array, " draws"], num_rungs: int, size: int
) -> Rungs:
    """Return inverse temperatures from 0 to 1, geometric above the first.

    The first above 0 is that at which a typical difference of log likelihoods between
    draws of the prior, the median absolute deviation, counts for one nat.

    Args:
        log_likelihoods: of draws of the prior; infinite and NaN ones do not count.
        num_rungs: how many.
        size: length of the array; what is beyond ``num_rungs`` is 1.
    """
    finite = jnp.where(jnp.isfinite(log_likelihoods), log_likelihoods, jnp.nan)
    deviation = jnp.nanmedian(jnp.abs(finite - jnp.nanmedian(finite)))
    steps = max(num_rungs - 2, 1)
    # at most as steep as equal steps, at least what float32 resolves
    coldest = 1 / jnp.clip(deviation, num_rungs - 1.0, 1e20)
    exponent = jnp.clip((num_rungs - 1.0 - jnp.arange(size)) / steps, 0.0, None)
    return jnp.where(jnp.arange(size) == 0, 0.0, coldest**exponent)


def barrier_steps(rejection: Pairs, active: Bool[Array, "*chains pairs"]) -> Pairs:
    r"""Return the barrier between neighbors, corrected where rejections saturate.

    A swap over the local barrier :math:`\lambda` is accepted by the difference of two
    energies; where these are normal, :math:`r = \mathrm{erf}(\lambda\sqrt\pi/2)`, which
    is :math:`\lambda` for small :math:`\lambda` (Predescu et al. 2004).

    Args:
        rejection: rejection rate of each pair.
        active: which pairs are in use.

    Example:
        >>> steps = barrier_steps(jnp.array([0.1, 0.99]), jnp.array([True, True]))
        >>> [round(float(step), 2) for step in steps]
        [0.1, 2.06]
    """
    rejection = jnp.clip(rejection, MIN_REJECTION, MAX_REJECTION)
    return jnp.where(active, 2 / math.sqrt(math.pi) * erfinv(rejection), 0.0)


def wanted_rungs(barrier: Array, block: int, most: int) -> Int[Array, ""]:
    """Return the number of rungs for a barrier: one, and a multiple of ``block``.

    Args:
        barrier: the global barrier.
        block: how many rungs explore together.
        most: the largest number.
    """
    blocks = jnp.ceil(RUNGS_PER_BARRIER * barrier / block)
    return jnp.clip(1 + block * blocks.astype(int), 1 + block, most)


def even_steps(
    betas: Rungs, steps: Pairs, num_rungs: Array, num_next: Array
) -> tuple[Rungs, Rungs]:
    """Return inverse temperatures at equal steps of the barrier, and where they stand.

    The barrier is interpolated between the old temperatures, linearly in
    log(1 + beta / beta_1), which is linear near 0 and logarithmic beyond.

    Args:
        betas: the old inverse temperatures; 1 beyond the last rung.
        steps: the barrier between neighbors, 0 beyond the last rung.
        num_rungs: number of rungs before.
        num_next: number of rungs after.

    Returns:
        The new ones, and their places among the old ones as fractional indices.
    """
    size = len(betas)
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)])
    rung = jnp.arange(size)
    # beyond the last rung the barrier goes on, so that it is increasing
    barrier = barrier + jnp.maximum(rung - num_rungs + 1, 0)
    total = barrier[num_rungs - 1]
    wanted = total * jnp.minimum(rung / (num_next - 1), 1.0)
    place = jnp.interp(wanted, barrier, rung.astype(float))
    place = jnp.where(rung >= num_next - 1, num_rungs - 1.0, place)
    coordinate = jnp.interp(wanted, barrier, jnp.log1p(betas / betas[1]))
    betas_next = betas[1] * jnp.expm1(coordinate)
    betas_next = jnp.where(rung >= num_next - 1, 1.0, jnp.clip(betas_next, 0.0, 1.0))
    return betas_next.at[0].set(0.0), place


def interpolate(values: Array, place: Rungs) -> Array:
    """Return values at fractional indices of the first axis, linearly."""
    low = jnp.floor(place).astype(int)
    high = jnp.minimum(low + 1, len(values) - 1)
    share = (place - low).reshape(-1, *[1] * (values.ndim - 1))
    return (1 - share) * values[low] + share * values[high]


def expected_restart_rate(
    rejection: Pairs, active: Bool[Array, "*chains pairs"]
) -> Array:
    r"""Return restarts per iteration, :math:`1 / (2 + 2\sum_k r_k / (1 - r_k))`.

    Syed et al. 2022, theorem 1, for non-reversible swaps and local moves that forget.
    """
    rejection = jnp.clip(rejection, 0.0, MAX_REJECTION)
    return 1 / (2 + 2 * jnp.where(active, rejection / (1 - rejection), 0.0).sum(-1))
