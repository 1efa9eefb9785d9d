"""Solvers: every member draws from the law whose score it is given.

Orders are measured in test_solver_orders.py, noise in test_solver_sde.py, and the frame
that runs them in test_solver_frame.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, DPMSolverPP, RectifiedFlow, ScoreModel, SubVP, solver
from numpyro_score.data.standardize import Affine
from numpyro_score.solver.grid import default_times
from tests.targets import MIXTURE, ExactScore, assert_law, unchecked

SOLVERS = [  # solver, number of steps, bias allowed in standard deviations
    (solver.DPMSolverPP(2), 32, 0.02),
    (solver.UniPC(), 32, 0.02),
    (solver.Ancestral(), 100, 0.04),
    (solver.DPMSolverSDE(), 64, 0.03),
    (solver.DPMSolverPP(1), 100, 0.04),
    (solver.AdamsBashforth(), 32, 0.02),
    (solver.Euler(), 100, 0.05),
    (solver.Heun(), 32, 0.02),
    (solver.RK4(), 32, 0.02),
    (solver.Adaptive(), 1, 0.02),
    (solver.EulerMaruyama(), 200, 0.05),
    (solver.PredictorCorrector(), 200, 0.05),
    (solver.StochasticHeun(), 100, 0.03),
    (solver.AdaptiveSDE(), 1, 0.03),
]
QUICK = 4  # the others run with the slow tests, and the last with the long ones
LAST = len(SOLVERS) - 1
MEMBERS = [
    pytest.param(
        *case,
        id=repr(case[0]),
        marks=[pytest.mark.slow] * (k >= QUICK) + [pytest.mark.long] * (k == LAST),
    )
    for k, case in enumerate(SOLVERS)
]
SDE = VE(sigma_min=0.03)
KEY = jax.random.key(0)
SHAPE = (4000,)


@pytest.fixture(scope="module")
def score():
    return MIXTURE.score_model(SDE)


@pytest.mark.parametrize(("member", "num_steps", "slack"), MEMBERS)
def test_draws_follow_the_law(score, member, num_steps, slack):
    ts = default_times(SDE, num_steps)
    draws = solver.sample(KEY, score, SHAPE, solver=member, ts=ts)
    assert draws.shape == (*SHAPE, 2)
    assert_law(draws, MIXTURE, *SDE.marginal(SDE.t_min), slack=slack)


@pytest.mark.slow
@pytest.mark.parametrize("sde", [VP(), SubVP(), RectifiedFlow()], ids=repr)
def test_one_solver_serves_every_process(sde):
    draws = MIXTURE.score_model(sde).sample(KEY, SHAPE)
    assert_law(draws, MIXTURE, *sde.marginal(sde.t_min), slack=0.03)


def test_every_solver_is_in_the_list():
    listed = {type(member) for member, _, _ in SOLVERS}
    exported = {
        member
        for member in vars(solver).values()
        if isinstance(member, type) and issubclass(member, solver.Solver)
    }
    assert exported - {solver.Solver} == listed


def unscaled(x, t):
    return MIXTURE.score(x, *SDE.marginal(t)) / SDE.sigma(t)


def uphill(x, t):
    return -MIXTURE.score(x, *SDE.marginal(t))


def autonomous(x, t):
    return MIXTURE.score(x, *SDE.marginal(0.5))


@pytest.mark.parametrize("mutant", [unscaled, uphill, autonomous])
def test_wrong_score_is_caught(mutant):
    wrong = ScoreModel.from_fn(mutant, SDE, (2,))

    def draw_and_compare():
        draws = wrong.sample(KEY, (1000,))
        assert_law(draws, MIXTURE, *SDE.marginal(SDE.t_min), slack=0.02)

    with pytest.raises((AssertionError, FloatingPointError)):  # the last one overflows
        draw_and_compare()


def test_draws_come_in_physical_units(score):
    loc, scale = jnp.array([3.0, -2.0]), jnp.array([100.0, 0.01])
    moved = dataclasses.replace(score, standardize=Affine(loc, scale))
    draws = score.sample(KEY, (3, 2))
    assert draws.shape == (3, 2, 2)
    np.testing.assert_allclose(
        moved.sample(KEY, (3, 2)), loc + scale * draws, rtol=1e-5
    )


def test_same_key_same_draws(score):
    np.testing.assert_array_equal(score.sample(KEY, (5,)), score.sample(KEY, (5,)))
    other = score.sample(jax.random.key(1), (5,))
    assert not np.array_equal(other, score.sample(KEY, (5,)))
    assert score.sample(KEY).shape == (2,)


def test_sampling_twice_traces_the_score_once():
    traces = []

    def score_fn(x, t):
        traces.append(t)
        return MIXTURE.score(x, *SDE.marginal(t))

    model = ScoreModel.from_fn(score_fn, SDE, (2,))
    model.sample(KEY, (7,))
    before = len(traces)
    model.sample(jax.random.key(1), (7,))
    model.sample(KEY, (7,), solver=DPMSolverPP(order=2))  # an equal solver
    assert len(traces) == before


@pytest.mark.parametrize("name", ["heun", None, DPMSolverPP])
def test_what_is_no_solver_is_refused(score, name):
    message = "`solver` must be a Solver object such as"
    with unchecked(), pytest.raises(TypeError, match=message):
        solver.sample(KEY, score, (2,), solver=name)


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([1.0], r"`ts` must list at least two.*shape \(1,\)"),
        ([[1.0, 0.5]], r"`ts` must list at least two.*shape \(1, 2\)"),
        ([0.1, 0.5, 1.0], "`ts` must decrease"),
        ([1.5, 0.5, 0.1], "`ts` must lie between `t_min` and `t_max`.*Got 1.5"),
        ([1.0, 0.5, -0.1], "`ts` must lie between `t_min` and `t_max`.*Got -0.1"),
    ],
)
def test_times_that_lead_nowhere_are_refused(score, ts, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        score.sample(KEY, (2,), ts=jnp.array(ts))


def test_score_that_is_nan_somewhere_is_reported():
    def score_fn(x, t):
        exact = ExactScore(MIXTURE, SDE)(x, t)
        return jnp.where(SDE.sigma(t) < 0.1, jnp.nan, exact)

    broken = ScoreModel.from_fn(score_fn, SDE, (2,))
    with pytest.raises(FloatingPointError, match=r"not finite.*: 6 of 6\."):
        broken.sample(KEY, (3,))
