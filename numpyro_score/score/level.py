r"""The lowest noise level at which a learned score can be trusted off its data.

Between and beyond its data a net has learned little, and at low noise levels nothing
holds its score there to that of a density. Samplers that know a learned law by its
score alone, and its changes by line integrals, then visit regions where the law has no
density. The density of the probability flow
(:func:`~numpyro_score.score.density.solver_log_prob`) does not, since higher levels
take part in it, at which the data reach everywhere. So the two are compared,

.. math:: \log p_r(a) + \int_a^b s(x, r) \cdot dx \quad\text{and}\quad \log p_r(b),

from rows a of the data to other rows b and to displaced points, at levels r from high
to low. The level in use is the last one before the line integrals first say a density
that is typical of the data where the flow says less, or before chains that know the
score alone first stay away from the data.

For draws :math:`\|r s(x, r)\|^2 / d` at levels from a tenth of the data's scale upwards
tells where data lie: it is that of unit noise near them and grows beyond. For a net
that has learned little it grows too late where data end soon, so each coordinate must
also be within the range of the data.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.data.covariance import shrunk_covariance
from numpyro_score.data.standardize import Affine
from numpyro_score.langevin import IntegratorTarget, PointState, metropolis_adjusted
from numpyro_score.score.density import solver_log_prob
from numpyro_score.score.identity import IdentityKey
from numpyro_score.solver import Heun
from numpyro_score.typing import PRNGKey, Scalar, Time

# in units of the data, up to 2 apart; at .3 a Gaussian law is 4 % wider than its data
LEVELS = (0.3, 0.2, 0.1, 0.05, 0.03)
NUM_LINES = 32  # of each kind; a median is then known within 1.25 / 32^1/2 = .22 sd
# of the 160 lines to displaced points: four, as single lines disagree by chance
MAX_DISAGREEING = 0.03
MAX_SHARE = 0.01  # of draws off the data: ten times that of the data, 1 - QUANTILE
NUM_NODES = 33  # of Gauss-Legendre quadrature, exact for polynomials of degree 65
NUM_STEPS = 32  # of the flow; 3 % off for a Gaussian law, in tests/score/test_level.py
MAX_EXCESS = 3.0  # nats: a factor of 20 in density
# of shifted points, in scales of the data, of which 2,048 normal rows reach 3.5
DISTANCES = (4.0, 8.0)
# of steps, one observed of a block: 15 relaxation times a half, at a step of .1
NUM_BLOCKS, BLOCK = 30, 10
TARGET = 0.574  # acceptance of adjusted Langevin; Roberts and Rosenthal 1998
# size of a dense covariance: its eigenvectors take .1 s on a CPU core, as d^3
MAX_DENSE = 256
SMALLEST = 1e-6  # variance of standardized rows: 8 float32 roundings
# of the draws of chains of which half start displaced, and their sd over that of the
# data: between those of right laws and of lost ones, which
# `python -m tests.benchmarks.learned_prior --chains --sizes 4000` prints
MAX_LOST, MAX_WIDTH = 0.02, 1.5
CHECKED = (0.1, 3.0)  # levels that tell where data lie, in units of the data
NUM_CHECKED = 6  # of these, evenly spaced: a factor of 30^1/5 = 2 apart
QUANTILE = 0.999  # of the data within limits; two of 2,048 rows are beyond
# of the range of the data: a posterior at an end of it has many times the share of the
# data's law beyond that end
MARGIN = 1.1
# Of n independent draws of the data's law a share of 1/n is beyond all n rows on
# average, and one of 7/n with probability exp(-7) = .1 %.
CHANCE = 7.0


# scores whose level is kept, each with its arrays, and these levels
MAX_KEPT = 8
_MEASURED: dict[IdentityKey, float] = {}


class DataRange(NamedTuple):
    r"""Limits of points where data lie; 99.9 % of the data are within each kind.

    No arrays, so that programs may take it as static.

    - **levels**: noise levels r.
    - **limits**: of :math:`\|r s(x, r)\|^2 / d` at these.
    - **low**, **high**: of the coordinates.
    - **max_share**: of draws beyond them that chance explains.
    """

    levels: tuple[float, ...]
    limits: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    max_share: float


def level_in_use(score: Any) -> float | None:
    """Return the lowest level at which a score is trusted, measured once for each.

    None for a score without rows of its data, for one that has no score but a velocity,
    and inside of a program that takes the score as an argument, unless the level was
    loaded with it.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.

    Example:
        >>> from numpyro_score import VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,),
        ...     data=jax.random.normal(jax.random.key(0), (100, 2)),
        ... )
        >>> level_in_use(score)
        0.01
    """
    if (known := known_level(score)) is not None or not _is_measurable(score):
        return known
    with jax.ensure_compile_time_eval():
        return _measure_level(IdentityKey.of(score))


def known_level(score: Any) -> float | None:
    """Return the level in use of a score if it was loaded or measured before, or None.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
    """
    if score.rows is None:
        return None
    measured: float | None = getattr(score.denoiser, "measured_level", None)
    return _MEASURED.get(IdentityKey.of(score)) if measured is None else measured


def data_range(score: Any, level: float) -> DataRange | None:
    """Return what draws at a noise level are compared with; None as for the level.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
        level: the noise level of the draws.

    Example:
        >>> from numpyro_score import VE, ScoreModel
        >>> score = ScoreModel.from_fn(lambda x, t: -x, VE(), event_shape=(2,))
        >>> data_range(score, 0.1) is None
        True
    """
    if not _is_measurable(score):
        return None
    with jax.ensure_compile_time_eval():
        return _measure_range(IdentityKey.of(score), level)


def _is_measurable(score: Any) -> bool:
    known = score.rows is not None and not score.velocity_only
    return known and not is_traced(score)


def is_off_data(
    score: Any, data_range: DataRange, x: Float[Array, "*batch"], alpha: Any = 1.0
) -> Bool[Array, "*rows"]:
    """Return whether unconstrained points are beyond the data of a score.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
        data_range: limits of its data.
        x: points alpha x_0 + noise of shape ``batch + event_shape``.
        alpha: of their time.
    """
    unit = _unit(score)
    u = x.reshape(-1, *score.event_shape)
    u = jax.vmap(score.standardize.forward)(u) / alpha
    levels, limits, low, high = (jnp.asarray(part, u.dtype) for part in data_range[:4])
    within = _energies(unit, u, levels) <= limits[:, None]  # false for NaN
    flat = u.reshape(len(u), -1)
    inside = (low <= flat) & (flat <= high)
    beyond = ~(within.all(0) & inside.all(1))
    return beyond.reshape(x.shape[: x.ndim - len(score.event_shape)])


def _measure_level(key: IdentityKey) -> float:
    unit, rows = _unit(key.tree), jnp.asarray(key.tree.rows)
    lowest = float(key.tree.sde.sigma_min)
    found = None
    for level in (*(level for level in LEVELS if level > lowest), lowest):
        limits = _measure_range(key, level)
        if not _agrees(unit, rows, level) or not _returns(unit, rows, level, limits):
            break
        found = level
    level = max(LEVELS[0], lowest) if found is None else found
    while len(_MEASURED) >= MAX_KEPT:
        _MEASURED.pop(next(iter(_MEASURED)), None)  # the oldest
    _MEASURED[key] = level
    return level


@lru_cache(maxsize=32)
def _measure_range(key: IdentityKey, level: float) -> DataRange:
    """Return limits that 99.9 % of the rows, with noise of the level, are within."""
    unit, rows = _unit(key.tree), jnp.asarray(key.tree.rows)
    low, high = max(CHECKED[0], level), CHECKED[1]
    levels = np.geomspace(low, max(low, high), NUM_CHECKED)
    levels = np.minimum(levels, float(unit.sde.sigma_max))
    noise = level * jax.random.normal(jax.random.key(1), rows.shape, rows.dtype)
    noisy = rows + noise
    energy = np.asarray(_energies(unit, noisy, jnp.asarray(levels, rows.dtype)))
    limits = _quantile(energy)
    jointly = _quantile((energy / limits[:, None]).max(0))
    limits = limits * jointly
    max_share = max(MAX_SHARE, CHANCE / len(rows))
    box = _coordinate_range(np.asarray(noisy).reshape(len(rows), -1))
    found = tuple(levels.tolist()), tuple(limits.tolist())
    return DataRange(*found, tuple(box[0].tolist()), tuple(box[1].tolist()), max_share)


def _coordinate_range(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ends of all coordinates, between which 99.9 % of points are with all.

    The distances from the median to the ends of one half of the rows, times a factor
    that the other half needs, and a margin.
    """
    one, other = rows[::2], rows[1::2]
    middle = np.median(one, axis=0)
    below, above = middle - one.min(0), one.max(0) - middle
    tiny = np.finfo(rows.dtype).tiny
    change = other - middle
    reach = np.maximum(change / (above + tiny), -change / (below + tiny)).max(1)
    factor = MARGIN * max(1.0, _quantile(reach))
    return middle - factor * below, middle + factor * above


def _quantile(x: np.ndarray) -> Any:
    return np.quantile(x, QUANTILE, axis=-1, method="higher")


def warn_of_level(score: Any, level: float) -> None:
    """Warn, once for each score, that its level in use is not the lowest.

    Args:
        score: a :class:`~numpyro_score.score.ScoreModel`.
        level: its level in use.
    """
    _warn_once(IdentityKey.of(score), level)


@lru_cache(maxsize=32)
def _warn_once(key: IdentityKey, level: float) -> None:
    widening = _widening(jnp.asarray(key.tree.rows), level)
    warn_caller(
        f"ScoreDistribution uses noise level {level:.2g} of this score, not its lowest "
        f"of {float(key.tree.sde.sigma_min):.2g}: below, line integrals of the score "
        "and its flow density differ between or beyond the data. The prior is the law "
        f"of the data with noise of {level:.2g} of their scale{widening}. Train longer "
        "or on more rows, or pass `t=score.sde.time(level)` to choose a level."
    )


def _widening(rows: Array, level: float) -> str:
    """Return how much noise widens the narrowest direction of rows, in words."""
    if rows[0].size > MAX_DENSE:
        return ""
    values, _ = _spectrum(IdentityKey.of(rows))
    ratio = (1 + level**2 / max(values[0], SMALLEST)) ** 0.5
    times = f"{ratio:.2g}" if ratio > 1.1 else f"{ratio:.4f}"  # not "1 times"
    return f", which is {times} times as wide along their narrowest direction"


def _unit(score: Any) -> Any:
    """Return the score of standardized points."""
    identity = Affine.identity(score.event_shape)
    return replace(score, standardize=identity, support=None, rows=None)


def _agrees(unit: Any, rows: Array, level: float) -> bool:
    """Return whether line integrals and flow density agree at a level."""
    by_line, by_flow = compare_densities(unit, rows, level)
    same, displaced = by_line[0] - by_flow[0], by_line[1:] - by_flow[1:]
    spread = (0.5 * unit.size) ** 0.5  # sd of the log density of a Gaussian law
    typical = by_line[1:] > -(MAX_EXCESS + 3 * spread)
    invented = typical & ~(displaced <= MAX_EXCESS)  # true for NaN
    known = np.median(np.abs(same)) <= max(1.0, 0.5 * spread)
    return bool(known and invented.mean() <= MAX_DISAGREEING)


def _returns(unit: Any, rows: Array, level: float, limits: DataRange) -> bool:
    """Return whether Langevin chains stay with the data, and come back to them."""
    draws = run_chains(unit, rows, level)
    most = max(MAX_LOST, CHANCE / len(rows))
    near = is_off_data(unit, limits, draws).mean() <= most
    sd = jnp.sqrt(rows.var(0) + level**2)
    return bool(near and (draws.std(0) <= MAX_WIDTH * sd).all())


def run_chains(unit: Any, rows: Array, level: float) -> Array:
    """Return draws of chains that know the law at a level by its score alone.

    Adjusted Langevin (Roberts and Tweedie 1996) in coordinates whitened by the
    covariance of the rows, accepted by the larger change of energy of Simpson's and the
    trapezoidal rule along each step: one of them may miss the force between two modes,
    and each miss would take a chain further out. Half of the
    chains start at rows, half at rows that were doubled or shifted by four scales.

    Args:
        unit: a score of standardized points.
        rows: standardized data.
        level: the noise level.

    Returns:
        Draws of the second half of the chains, of shape ``(draws, *event)``.
    """
    factor = jnp.asarray(_covariance_root(rows, level), rows.dtype)
    draws = _chains(unit, rows, jnp.asarray(level, rows.dtype), factor)
    return draws.reshape(-1, *rows.shape[1:])


def _covariance_root(rows: Array, level: float) -> np.ndarray:
    """Return a square root of the covariance of noisy rows; diagonal for large ones."""
    if rows[0].size > MAX_DENSE:
        return np.diag(np.sqrt(np.asarray(rows, float).var(0).ravel() + level**2))
    values, vectors = _spectrum(IdentityKey.of(rows))
    return vectors * np.sqrt(np.maximum(values, 0.0) + level**2)


@lru_cache(maxsize=8)
def _spectrum(key: IdentityKey) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues and eigenvectors of the covariance of rows."""
    rows = np.asarray(key.tree, float).reshape(len(key.tree), -1)
    values, vectors = np.linalg.eigh(shrunk_covariance(rows - rows.mean(0)))
    return values, vectors


class _Chains(NamedTuple):
    """Whitened positions with gradients, one chain a column, and log of their step."""

    place: PointState
    log_step: Array


@jax.jit
def _chains(unit: Any, rows: Array, level: Scalar, factor: Array) -> Array:
    """Return every tenth state of the chains in their second half."""
    key_points, key_run = jax.random.split(jax.random.key(2))
    starts, ends = _points(key_points, rows)
    kinds = ends.reshape(-1, NUM_LINES, factor.shape[0])
    _, _, _, doubled, shifted, _ = kinds
    first = starts[:NUM_LINES].reshape(kinds[0].shape)
    x = jnp.concatenate([first, kinds[0], doubled, shifted])
    target = _whitened_target(unit, unit.sde.time(level), factor)

    def step(chains: _Chains, inputs: tuple[Array, Array]) -> tuple[_Chains, None]:
        key, number = inputs
        return _langevin_step(key, chains, target, number), None

    def block(chains: _Chains, inputs: Any) -> tuple[_Chains, Array]:
        chains = jax.lax.scan(step, chains, inputs)[0]
        return chains, (factor @ chains.place.position).T

    keys = jax.random.split(key_run, (NUM_BLOCKS, BLOCK))
    numbers = jnp.arange(NUM_BLOCKS * BLOCK).reshape(NUM_BLOCKS, BLOCK)
    place = target.evaluate(jnp.linalg.solve(factor, x.T))
    # the best of a normal law of 2,500 numbers, 1.65^2 / 2 d^(-1/3); it grows for fewer
    start = _Chains(place, jnp.full(len(x), np.log(0.1), x.dtype))
    states = jax.lax.scan(block, start, (keys, numbers))[1]
    return states[NUM_BLOCKS // 2 :]


def _whitened_target(unit: Any, t: Time, factor: Array) -> IntegratorTarget:
    """Return the target that is known by its score alone, at x = factor y."""

    def gradient(y: Array) -> Array:
        points = (factor @ y).T
        score = unit.score(points.reshape(-1, *unit.event_shape), t)
        return -factor.T @ score.reshape(points.shape).T

    def difference(a: PointState, b: PointState) -> Array:
        middle = gradient(0.5 * (a.position + b.position))
        ends, move = a.gradient + b.gradient, b.position - a.position
        # kernels refuse steps over which these differ, but chains that start far out
        # come back by such steps
        simpson = ((ends + 4 * middle) * move).sum(0) / 6
        return jnp.maximum(simpson, (ends * move).sum(0) / 2)

    return IntegratorTarget(lambda y: PointState(y, gradient(y), None), difference)


def _langevin_step(
    key: PRNGKey, chains: _Chains, target: IntegratorTarget, number: Array
) -> _Chains:
    """Return chains after one adjusted Langevin step.

    ``exp(log_step)`` is the h of y + h s + sqrt(2 h) n.
    """
    key_noise, key_accept = jax.random.split(key)
    place, log_step = chains
    noise = jax.random.normal(key_noise, place.position.shape[::-1]).T
    noise, step = noise.astype(place.position.dtype), jnp.sqrt(2 * jnp.exp(log_step))
    end, accept, prob = metropolis_adjusted(key_accept, noise, place, step, target)
    place = jax.tree.map(lambda a, b: jnp.where(accept, a, b), end, place)
    log_step += (prob.mean() - TARGET) / jnp.sqrt(1.0 + number)
    return _Chains(place, log_step)


def compare_densities(
    unit: Any, rows: Float[Array, "rows *event"], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return log densities by line integrals and by the flow, of points of six kinds.

    Kinds are rows, midpoints of rows, shuffled rows, rows doubled, and rows shifted by
    four and by eight scales of the data; all with noise of the level. Lines begin at
    rows. Densities are relative to the median of these.

    Args:
        unit: a score of standardized points.
        rows: standardized data.
        level: the noise level.

    Returns:
        Two arrays of shape (kinds, lines), in nats.
    """
    start, integral, end = _lines(unit, rows, jnp.asarray(level, rows.dtype))
    start, integral, end = (np.asarray(part, float) for part in (start, integral, end))
    typical = np.median(start)
    shape = (-1, NUM_LINES)
    return (
        (start + integral - typical).reshape(shape),
        (end - typical).reshape(shape),
    )


@jax.jit
def _lines(unit: Any, rows: Array, level: Scalar) -> tuple[Array, Array, Array]:
    """Return log densities at starts, line integrals and log densities at ends."""
    key_points, key_noise = jax.random.split(jax.random.key(0))  # the same for all
    starts, ends = _points(key_points, rows)
    alpha, t = unit.sde.alpha(unit.sde.time(level)), unit.sde.time(level)
    noise = level * jax.random.normal(key_noise, (2, *starts.shape), rows.dtype)
    a, b = alpha * (starts + noise[0]), alpha * (ends + noise[1])
    nodes, weights = (0.5 * part for part in np.polynomial.legendre.leggauss(NUM_NODES))

    def add(total: Array, node: tuple[Array, Array]) -> tuple[Array, None]:
        place, weight = node
        slope = unit.score(a + place * (b - a), t) * (b - a)
        return total + weight * slope.reshape(len(a), -1).sum(1), None

    rule = jnp.asarray(nodes + 0.5, rows.dtype), jnp.asarray(weights, rows.dtype)
    integral = jax.lax.scan(add, jnp.zeros(len(a), rows.dtype), rule)[0]
    ts = unit.sde.time(jnp.geomspace(unit.sde.sigma_max, level, NUM_STEPS + 1))
    density = solver_log_prob(unit, jnp.concatenate([a, b]), solver=Heun(), ts=ts)
    return density[: len(a)], integral, density[len(a) :]


def _points(key: Array, rows: Array) -> tuple[Array, Array]:
    """Return starts and ends of lines without noise, kind after kind."""
    keys = jax.random.split(key, 5)
    shape = (NUM_LINES, *rows.shape[1:])

    def choose(key: Array) -> Array:
        return rows[jax.random.randint(key, (NUM_LINES,), 0, len(rows))]

    a, b, c = map(choose, keys[:3])
    flat = rows.reshape(len(rows), -1)
    mixed = jax.random.randint(keys[3], (NUM_LINES, flat.shape[1]), 0, len(rows))
    shuffled = jnp.take_along_axis(flat, mixed, 0).reshape(shape)
    direction = jax.random.normal(keys[4], (NUM_LINES, flat.shape[1]))
    direction /= jnp.linalg.norm(direction, axis=1, keepdims=True)
    low, high = jnp.quantile(flat, jnp.array([0.16, 0.84]), axis=0)  # a normal's sd
    shift = (0.5 * (high - low) * direction).reshape(shape)
    shifted = [c + distance * shift for distance in DISTANCES]
    doubled = 2 * a - rows.mean(0)
    ends = [b, 0.5 * (a + b), shuffled, doubled, *shifted]
    return jnp.tile(a, (len(ends), *[1] * (a.ndim - 1))), jnp.concatenate(ends)


@jax.jit
def _energies(unit: Any, u: Array, levels: Array) -> Array:
    """Return means over coordinates of squares of r s(u, r), 1 for unit noise."""

    def energy(level: Array) -> Array:
        t = unit.sde.time(level)
        alpha = unit.sde.alpha(t)
        noise = level * alpha * unit.score(alpha * u, t)
        return jnp.square(noise).reshape(len(u), -1).mean(1)

    return jax.lax.map(energy, levels)
