"""Every solver of the probability flow has the order of convergence that it claims."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.solver import (
    RK4,
    AdamsBashforth,
    DPMSolverPP,
    Euler,
    Heun,
    Solver,
    UniPC,
)
from numpyro_score.solver.base import integrate_levels
from numpyro_score.solver.multistep import (
    STABILITY_LIMIT,
    History,
    adams_coefficients,
    adams_step,
    append,
    empty_history,
    lagrange_basis,
)
from tests.targets import Mixture

LAW = Mixture(weights=(0.3, 0.7), locs=((-1.0,), (0.5,)), scales=(0.3, 0.4))
TOP, BOTTOM = 200.0, 0.1  # far above the data's scale multistep rules start exactly
STARTS = (-1.3, -0.4, 0.2, 0.9, 1.7)
ORDERS = [
    (Euler(), 1),
    (Heun(), 2),
    (RK4(), 4),
    (AdamsBashforth(1), 1),
    (AdamsBashforth(2), 2),
    (AdamsBashforth(3), 3),
    (AdamsBashforth(4), 4),
    (DPMSolverPP(1), 1),
    (DPMSolverPP(2), 2),
    (DPMSolverPP(3), 3),
    (UniPC(1), 2),
    (UniPC(2), 3),
    (UniPC(3), 4),
]


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def denoise(x, level):
    return LAW.denoised(x, 1.0, level)


def solve(solver, num_steps, top=TOP):
    x = top * jnp.array(STARTS)[:, None]
    keys = jax.random.split(jax.random.key(0), len(x))
    levels = jnp.geomspace(top, BOTTOM, num_steps + 1)
    return np.asarray(integrate_levels(keys, denoise, x, levels, solver))


@pytest.fixture(scope="module")
def limit():
    return solve(RK4(), 3000)


def measured_order(solver, limit, counts=(60, 120, 240)):
    errors = [np.abs(solve(solver, n) - limit).max() for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


QUICK = (Heun(), AdamsBashforth(4), DPMSolverPP(3), UniPC(2))  # others: slow tests
CASES = [
    pytest.param(
        *case, id=repr(case[0]), marks=[pytest.mark.slow] * (case[0] not in QUICK)
    )
    for case in ORDERS
]


@pytest.mark.parametrize(("solver", "order"), CASES)
def test_order_is_the_one_claimed(solver, order, limit):
    assert measured_order(solver, limit) == pytest.approx(order, abs=0.35)


@dataclass(frozen=True)
class HeunAtOldLevel(Solver):
    """A mutant: the second slope is evaluated at the first level."""

    def init(self, x):
        return ()

    def step(self, key, x, level, level_next, denoise, solver_state):
        slope = (x - denoise(x, level)) / level
        end = x + (level_next - level) * slope
        slope_next = (end - denoise(end, level)) / level
        return x + (level_next - level) * (slope + slope_next) / 2, solver_state


@dataclass(frozen=True)
class ShippedThirdOrder(Solver):
    """A mutant: three values whose second difference lacks the factor 2."""

    def init(self, x):
        return empty_history(x, 3)

    def step(self, key, x, level, level_next, denoise, solver_state):
        history = append(solver_state, denoise(x, level), level)
        new = adams_step(x, history, level, level_next, order=3)
        two = adams_step(x, history, level, level_next, order=2)
        return two + 0.5 * (new - two), history


@pytest.mark.parametrize(
    ("mutant", "order"), [(HeunAtOldLevel(), 2), (ShippedThirdOrder(), 3)], ids=repr
)
def test_mutant_loses_its_order(mutant, order, limit):
    assert measured_order(mutant, limit) < order - 0.6


def test_adams_steps_are_exact_for_polynomials():
    # dx/dl = D - x with D = l^2 and l = -log sigma has the solution l^2 - 2 l + 2
    def exact(level):
        log = -jnp.log(level)
        return log**2 - 2 * log + 2 + level  # the homogeneous part is sigma itself

    levels = jnp.array([3.0, 2.0, 1.1, 0.4])
    history = empty_history(jnp.zeros(1), 3)
    for level in levels[:3]:
        history = append(history, jnp.log(level)[None] ** 2, level)
    predicted = adams_step(exact(levels[2])[None], history, *levels[2:], order=3)
    np.testing.assert_allclose(predicted, exact(levels[3]), rtol=1e-12)
    corrected = adams_step(exact(levels[1])[None], history, *levels[1:3], order=3)
    np.testing.assert_allclose(corrected, exact(levels[2]), rtol=1e-12)


def test_weights_of_one_step_are_the_exponential_rule():
    for rate, step in [(1.0, 0.7), (2.0, 3.0), (1.0, -0.5)]:
        [c] = adams_coefficients(jnp.zeros(1), jnp.array([True]), step, rate)
        assert float(c) == pytest.approx(-np.expm1(-rate * step), rel=1e-10)


def adams_coefficients_at(order, step, *, newest=0):
    nodes = step * (newest - jnp.arange(order))
    return np.asarray(adams_coefficients(nodes, jnp.ones(order, bool), step, 1.0))


def adams_bashforth_matrix(order, a, h):
    """Return the matrix that maps (x_n, ..., x_{n - order + 1}) one step on."""
    step = np.eye(order, k=-1)
    step[0] = a * adams_coefficients_at(order, h)
    step[0, 0] += np.exp(-h)
    return step


def unipc_matrix(order, a, h):
    """Return the same for the corrected point and the last order + 1 predicted ones."""
    step = np.eye(order + 2, k=-1)
    step[0] = np.exp(-h) * np.eye(order + 2)[0]
    step[0, 1:] += a * adams_coefficients_at(order + 1, h, newest=1)
    step[1] = np.exp(-h) * step[0]
    step[1, 1:-1] += a * adams_coefficients_at(order, h)
    return step


RULES = [(adams_bashforth_matrix, order) for order in (1, 2, 3, 4)]
RULES += [(unipc_matrix, order) for order in (1, 2, 3)]


@pytest.mark.parametrize(("matrix", "order"), RULES)
def test_rules_are_stable_up_to_their_limit(matrix, order):
    def largest(h):  # over all linear denoisers D = a x that a law can have
        steps = [matrix(order, a, h) for a in np.linspace(0, 1, 41)]
        return np.abs(np.linalg.eigvals(np.stack(steps))).max()

    limit = STABILITY_LIMIT[order]
    assert largest(min(limit, 12.0)) < 1 + 1e-6
    if limit < 12.0:
        assert largest(1.02 * limit) > 1 + 1e-3


def test_invalid_nodes_have_no_weight():
    polynomials = lagrange_basis(
        jnp.array([0.5]), jnp.array([0.0, -1.0, 0.0]), jnp.array([True, True, False])
    )
    np.testing.assert_allclose(polynomials[:, 0], [1.5, -0.5, 0.0])


def test_history_forgets_the_oldest():
    history = empty_history(jnp.zeros(1), 2)
    for value in (1.0, 2.0, 3.0):
        history = append(history, jnp.array([value]), jnp.exp(value))
    expected = History(jnp.array([[3.0], [2.0]]), jnp.array([3.0, 2.0]), 3)
    for got, want in zip(history, expected, strict=True):
        np.testing.assert_allclose(got, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamsBashforth(5), "`order` must be an integer from 1 to 4.*Got 5"),
        (lambda: DPMSolverPP(4), "`order` must be an integer from 1 to 3.*Got 4"),
        (lambda: UniPC(0), "`order` must be an integer from 1 to 3.*Got 0"),
    ],
)
def test_unknown_orders_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_second_step_extrapolates_by_the_ratio_of_steps(ratio):
    """2M replaces D by its linear extrapolation to the middle of the step."""
    solver, slope, offset, x = DPMSolverPP(order=2), 0.7, -0.2, jnp.array([1.5])
    first_step, h = 0.4, 0.4 * ratio
    levels = jnp.exp(jnp.array([1.0, 1.0 - first_step, 1.0 - first_step - h]))

    def denoise(x, level):
        return (offset - slope * jnp.log(level)) * jnp.ones_like(x)

    key = jax.random.key(0)
    x, history = solver.step(key, x, *levels[:2], denoise, solver.init(x))
    after, _ = solver.step(key, x, *levels[1:], denoise, history)
    middle = offset - slope * (1.0 - first_step - h / 2)
    exact = jnp.exp(-h) * x - jnp.expm1(-h) * middle
    np.testing.assert_allclose(after, exact, rtol=1e-5)
