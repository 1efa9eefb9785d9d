"""Choosing a solver, and measuring quality against cost."""

import itertools
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP
from numpyro_score.diagnostics import (
    energy_distance,
    plot_work_precision,
    sliced_wasserstein,
    work_precision,
)
from numpyro_score.diagnostics.work_precision import WorkPrecision, WorkPrecisionPoint
from numpyro_score.solver import (
    RK4,
    DPMSolverPP,
    Euler,
    Geometric,
    Goal,
    UniPC,
    choose,
    decode,
    pilot_times,
    sample,
)
from numpyro_score.solver.adaptive import num_stages
from numpyro_score.solver.choose import Choice
from numpyro_score.solver.pilot import _shortest_path
from tests.targets import MIXTURE, assert_law, unchecked

KEY = jax.random.key(0)


@pytest.mark.parametrize("goal", Goal, ids=str)
def test_every_goal_has_a_choice(goal):
    choice = choose(goal, VE())
    assert isinstance(choice, Choice)
    assert choice.solver.num_evaluations(len(choice.ts) - 1, None) <= 64
    assert choice.solver.stochastic == (goal is Goal.DIVERSE)
    assert bool(choice.solver.is_stable(VE().noise_level(choice.ts)).all())


@pytest.mark.parametrize("goal", [Goal.BALANCED, Goal.DIVERSE], ids=str)
def test_choices_recover_the_law(goal):
    score = MIXTURE.score_model(VP())
    solver, ts = choose(goal, VP())
    draws = sample(KEY, score, (3000,), solver=solver, ts=ts)
    assert_law(draws, MIXTURE, sigma=VP().sigma_min, slack=0.03)


def test_budget_is_kept():
    solver, ts = choose(Goal.QUALITY, VE(), 17)
    assert int(solver.num_evaluations(len(ts) - 1, None)) == 17


def test_unknown_goals_and_no_budget_are_refused():
    with (
        unchecked(),
        pytest.raises(TypeError, match=r"`goal` must be one of Goal\.SPEED.*'fast'"),
    ):
        choose("fast", VE())
    with pytest.raises(ValueError, match="`num_evaluations` must be an integer"):
        choose(Goal.SPEED, VE(), 0)


def test_sliced_wasserstein_of_a_shift_in_one_dimension():
    x = jax.random.normal(KEY, (500, 1))
    assert sliced_wasserstein(KEY, x, x + 0.3) == pytest.approx(0.3, rel=1e-4)


def test_sliced_wasserstein_of_a_shift_in_two_dimensions():
    # a shift of length 1 is seen as |cos| of a random angle, 2 / pi on average
    x = jax.random.normal(KEY, (500, 2))
    shifted = x + jnp.array([0.6, 0.8])
    distance = sliced_wasserstein(KEY, x, shifted, 4000)
    assert distance == pytest.approx(2 / np.pi, abs=0.02)


def test_energy_distance_is_unbiased_and_matches_its_closed_form():
    x, y = jax.random.normal(KEY, (2, 2000, 1))
    assert abs(float(energy_distance(x, y))) < 0.01
    # two points at distance 3: 2 * 3 - 0 - 0
    assert float(energy_distance(jnp.zeros((9, 1)), jnp.full((9, 1), 3.0))) == 6.0


@pytest.mark.slow
def test_curve_falls_with_the_budget_to_its_floor():
    sde = VE(0.02, 20.0)
    reference = MIXTURE.sample(jax.random.key(1), (4000,))
    choices = [(Euler(), Geometric()), (UniPC(), Geometric())]
    curve = work_precision(
        KEY, MIXTURE.score_model(sde), reference, choices, (6, 24), num_repeats=2
    )
    euler_few, euler_many, unipc_few, unipc_many = curve.points
    assert [p.num_evaluations for p in curve.points] == [6, 24, 6, 24]
    assert euler_few.sliced_wasserstein > 2 * euler_many.sliced_wasserstein
    assert euler_many.sliced_wasserstein > 1.5 * unipc_many.sliced_wasserstein
    assert unipc_few.energy_distance > unipc_many.energy_distance
    assert unipc_many.sliced_wasserstein < 2 * curve.floor


def test_budgets_must_pay_for_a_step():
    with pytest.raises(ValueError, match="`budgets` must hold a number that pays"):
        work_precision(
            KEY,
            MIXTURE.score_model(VE()),
            jnp.zeros((4, 2)),
            [(Euler(), Geometric())],
            [0],
        )


def test_plot_has_a_line_per_solver_and_the_floor():
    points = [
        WorkPrecisionPoint(solver, Geometric(), n, 1 / n, 1 / n)
        for solver in (Euler(), DPMSolverPP())
        for n in (8, 16)
    ]
    ax = plot_work_precision(WorkPrecision(points, 0.01))
    assert len(ax.lines) == 3


def test_plots_say_how_to_install_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'numpyro_score\[plot\]'"):
        plot_work_precision(WorkPrecision([], 0.01))


def test_the_pilot_grid_is_the_shortest_path():
    errors = np.random.default_rng(0).uniform(size=(7, 7))

    def total(path):
        return sum(errors[i, j] for i, j in itertools.pairwise(path))

    paths = [(0, *middle, 6) for middle in itertools.combinations(range(1, 6), 2)]
    assert tuple(_shortest_path(errors, 3)) == min(paths, key=total)
    assert _shortest_path(errors, 6).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("solver", "order", "gain"), [(Euler(), 1, 0.8), (DPMSolverPP(), 2, 0.95)]
)
def test_a_pilot_run_finds_better_times_for_few_steps(solver, order, gain):
    """From the same noise, with the end of a fine grid as the truth."""
    score = MIXTURE.score_model(VE())
    noise = VE().sigma_max * jax.random.normal(KEY, (500, 2))
    truth = decode(score, noise, solver=RK4(), ts=Geometric()(VE(), 128))

    def error(ts):
        ends = decode(score, noise, solver=solver, ts=ts)
        return jnp.sqrt(jnp.square(ends - truth).mean())

    ts = pilot_times(KEY, score, 8, order=order)
    assert error(ts) < gain * error(Geometric()(VE(), 8))


def test_a_pilot_run_has_its_own_steps():
    with pytest.raises(ValueError, match="`num_steps` must be between 1 and 64"):
        pilot_times(KEY, MIXTURE.score_model(VE()), 65)


@pytest.mark.parametrize(
    ("method", "count"),
    [(diffrax.Tsit5(), 6), (diffrax.Dopri8(), 13), (diffrax.Heun(), 2)],
    ids=["last one reused", "another reused", "none reused"],
)
def test_stages_are_evaluations_of_a_step(method, count):
    assert num_stages(method) == count


def test_energy_distance_of_equal_samples_leaves_out_pairs_of_a_row_with_itself():
    x = jnp.array([[0.0], [1.0]])
    assert float(energy_distance(x, x)) == pytest.approx(2 * 0.5 - 1 - 1)
    assert float(energy_distance(x, x + 3)) == pytest.approx(2 * 3 - 1 - 1)
    assert sliced_wasserstein(KEY, x, x + 3) == pytest.approx(3.0, rel=1e-5)
