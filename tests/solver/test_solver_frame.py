"""The frame around the solvers: options, flags, encoding, adaptive steps, variance."""

from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, RectifiedFlow, ScoreModel
from numpyro_score.solver import (
    RK4,
    AdamsBashforth,
    Adaptive,
    Ancestral,
    Cosine,
    DPMSolverPP,
    Euler,
    Geometric,
    Karras,
    Solver,
    Uniform,
    UniPC,
    decode,
    encode,
    expectation,
    integrate,
    sample,
    solve,
)
from tests.targets import GAUSSIAN, MIXTURE, Gaussian, assert_law

NUM_DRAWS = 2000
KEY = jax.random.key(0)
WIDE = VE(0.05, 50.0)


@pytest.fixture(scope="module")
def score():
    return MIXTURE.score_model(WIDE)


@pytest.fixture(scope="module")
def solution(score):
    return solve(KEY, score, (NUM_DRAWS,), solver=DPMSolverPP(), trajectory=True)


def test_probability_flow_keeps_the_marginals(solution):
    ts = DPMSolverPP().default_times(WIDE)
    for step in (4, 12, 20, 28, 32):
        draws = solution.trajectory[step]
        assert_law(draws, MIXTURE, sigma=WIDE.sigma(ts[step]), slack=0.02)


def test_start_has_the_variance_of_unit_data_and_noise():
    low = Gaussian((0.0,), (1.0,)).score_model(VE(0.01, 1.0))  # noise hides no data
    keys = integrate.draw_keys(KEY, NUM_DRAWS, antithetic=False)
    start = integrate.draw_prior(
        keys, low, jnp.array([low.sde.t_max]), None, solver=Euler()
    )
    error = 5 * (2 / NUM_DRAWS) ** 0.5
    np.testing.assert_allclose(start.x.var(), 1 + 1.0**2, rtol=error)


def test_trajectory_has_the_scale_of_its_times():
    """VP keeps the variance of a standard normal law at 1."""
    normal = Gaussian((0.0,), (1.0,)).score_model(VP())
    found = solve(KEY, normal, (NUM_DRAWS,), solver=DPMSolverPP(), trajectory=True)
    error = 5 * (2 / NUM_DRAWS) ** 0.5
    np.testing.assert_allclose(found.trajectory.var(1), 1.0, rtol=error)


def test_trajectory_ends_at_the_draws(solution):
    assert solution.trajectory.shape == (33, NUM_DRAWS, 2)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.draws)
    assert solution.failed_step.shape == (NUM_DRAWS,)
    assert (np.asarray(solution.failed_step) == -1).all()


def test_sample_returns_the_draws_of_solve(score, solution):
    draws = sample(KEY, score, (NUM_DRAWS,), solver=DPMSolverPP())
    np.testing.assert_allclose(draws, solution.draws, atol=1e-5)


@pytest.mark.slow
def test_progress_bar_changes_nothing(score, solution):
    same = solve(
        KEY,
        score,
        (NUM_DRAWS,),
        solver=DPMSolverPP(),
        trajectory=True,
        progress_bar=True,
    )
    np.testing.assert_allclose(same.draws, solution.draws, atol=1e-5)
    np.testing.assert_allclose(same.trajectory, solution.trajectory, atol=1e-4)
    assert int(same.num_evaluations) == 32


def test_devices_share_the_draws_and_change_nothing(score, solution):
    devices = jax.devices()
    assert len(devices) == 2
    shared = solve(KEY, score, (NUM_DRAWS,), solver=DPMSolverPP(), devices=devices)
    assert len(shared.draws.sharding.device_set) == 2
    np.testing.assert_allclose(shared.draws, solution.draws, atol=1e-5)
    with pytest.raises(ValueError, match=r"`devices` must divide.* 2 devices, 3 draws"):
        solve(KEY, score, (3,), solver=DPMSolverPP(), devices=devices)


def test_second_call_compiles_nothing(score):
    def call(seed):
        return sample(jax.random.key(seed), score, (7,), solver=Euler())

    call(0)
    compiled = integrate.solve_compiled._cache_size()
    call(1)
    assert integrate.solve_compiled._cache_size() == compiled


def temporary_bytes(score, num_steps):
    ts = Geometric()(WIDE, num_steps)

    @jax.jit
    def run(key):
        return solve(key, score, (1000,), solver=Ancestral(), ts=ts).draws

    return run.lower(KEY).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_constant_in_the_number_of_steps(score):
    few, many = temporary_bytes(score, 16), temporary_bytes(score, 512)
    assert many - few < 512 * 100  # the grid itself, but not one array per step


@dataclass(frozen=True)
class Counted(Solver):
    """Counts how often a solver really calls the denoiser."""

    solver: Solver
    calls: list

    def __hash__(self):
        return id(self)

    def init(self, x):
        return self.solver.init(x)

    def step(self, key, x, level, level_next, denoise, solver_state):
        def counting(x, level):
            jax.debug.callback(self.calls.append, level)
            return denoise(x, level)

        return self.solver.step(key, x, level, level_next, counting, solver_state)


@pytest.mark.parametrize("solver", [UniPC(), RK4()], ids=repr)
def test_evaluations_are_counted_right(score, solver):
    counted = Counted(solver, [])
    ts = Geometric()(WIDE, 10)
    solution = solve(KEY, score, (1,), solver=counted, ts=ts)
    jax.effects_barrier()
    expected = solve(KEY, score, (1,), solver=solver, ts=ts).num_evaluations
    assert len(counted.calls) == int(expected) == int(solution.num_evaluations)


def test_denoise_last_returns_means():
    sharp = Gaussian((0.0,), (0.05,)).score_model(VE(0.1, 20.0))
    options = {"solver": DPMSolverPP(), "ts": Geometric()(sharp.sde, 60)}
    noisy = sample(KEY, sharp, (NUM_DRAWS,), **options)
    clean = sample(KEY, sharp, (NUM_DRAWS,), denoise_last=True, **options)
    gain = 0.05**2 / (0.05**2 + 0.1**2)
    np.testing.assert_allclose(clean, gain * noisy, atol=1e-5)
    assert float(noisy.std()) == pytest.approx((0.05**2 + 0.1**2) ** 0.5, rel=0.1)
    count = solve(KEY, sharp, (2,), denoise_last=True, **options).num_evaluations
    assert int(count) == 61


def test_overflow_is_flagged_at_its_step():
    broken = ScoreModel.from_fn(
        lambda x, t: jnp.where(WIDE.sigma(t) < 1.0, jnp.nan, -x), WIDE, (2,)
    )
    ts = WIDE.time(jnp.array([8.0, 4.0, 2.0, 0.5, 0.2]))
    solution = solve(KEY, broken, (3,), solver=Euler(), ts=ts)
    assert solution.failed_step.tolist() == [3, 3, 3]
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(KEY, broken, (3,), solver=Euler(), ts=ts)


def test_noise_level_zero_is_no_place_to_stop():
    vp = MIXTURE.score_model(VP())
    ts = jnp.linspace(1.0, 0.0, 11)
    with pytest.raises(ValueError, match="no noise to remove"):
        sample(KEY, vp, (3,), solver=DPMSolverPP(), ts=ts)


def test_too_long_steps_warn(score):
    ts = Geometric()(WIDE, 2)
    for solver in (AdamsBashforth(4), RK4()):
        with pytest.warns(UserWarning, match=r"2 of 2 steps are too long for"):
            solve(KEY, score, (2,), solver=solver, ts=ts)


@pytest.mark.parametrize("sde", [VE(), VP(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("grid", [Geometric(), Uniform(), Karras(), Cosine()], ids=repr)
def test_grids_run_from_noise_to_data(sde, grid):
    ts = np.asarray(grid(sde, 12))
    assert ts.shape == (13,)
    assert (np.diff(ts) < 0).all()
    np.testing.assert_allclose(ts[[0, -1]], [sde.t_max, sde.t_min], atol=2e-5)


# Encoding


@pytest.mark.parametrize(
    "solver",
    [
        RK4(),
        pytest.param(UniPC(), marks=pytest.mark.slow),
        pytest.param(Adaptive(rtol=1e-5, atol=1e-5), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_encoding_is_invertible(score, solver):
    x = MIXTURE.sample(jax.random.key(1), (50,))
    x = x + WIDE.sigma_min * jax.random.normal(jax.random.key(2), x.shape)
    ts = (
        solver.default_times(WIDE)
        if isinstance(solver, Adaptive)
        else Geometric()(WIDE, 128)
    )
    noise = encode(score, x, solver=solver, ts=ts)
    assert float(jnp.abs(noise - x).max()) > 10
    back = decode(score, noise, solver=solver, ts=ts)
    np.testing.assert_allclose(back, x, atol=0.005)


@pytest.mark.slow
def test_data_is_encoded_as_the_prior(score):
    x = MIXTURE.sample(jax.random.key(1), (NUM_DRAWS,))
    x = x + WIDE.sigma_min * jax.random.normal(jax.random.key(2), x.shape)
    noise = encode(score, x, solver=RK4(), ts=Geometric()(WIDE, 32))
    scale = float(WIDE.prior_scale())
    assert_law(noise, Gaussian((0.0, 0.0), (scale, scale)))
    # a start without sigma_max is another law
    start = jax.random.normal(KEY, (NUM_DRAWS, 2))
    wrong = decode(score, start, solver=RK4(), ts=Geometric()(WIDE, 32))
    assert float(wrong.std()) < 0.7


def test_a_noisy_path_is_not_run_backwards(score):
    with pytest.raises(TypeError, match="`solver` must solve the probability flow"):
        encode(score, jnp.zeros((1, 2)), solver=Ancestral())


# Adaptive steps


@pytest.fixture(scope="module")
def adaptive(score):
    joint = solve(KEY, score, (NUM_DRAWS,), solver=Adaptive())
    own = solve(KEY, score, (NUM_DRAWS,), solver=Adaptive(shared_steps=False))
    return joint, own


@pytest.mark.slow
def test_adaptive_solutions_recover_the_law(adaptive):
    for solution in adaptive:
        assert_law(solution.draws, MIXTURE, sigma=WIDE.sigma_min, slack=0.02)


@pytest.mark.slow
def test_joint_control_takes_the_same_steps_for_all(adaptive):
    joint, own = (np.asarray(s.num_evaluations) for s in adaptive)
    assert np.unique(joint).size == 1
    assert np.unique(own).size > 1
    assert joint.max() <= own.max()


@pytest.mark.slow
def test_tighter_tolerance_is_closer_to_the_truth(score):
    x = WIDE.sigma_max * jnp.linspace(-1.5, 1.5, 40)[:, None] * jnp.ones(2)
    exact = decode(score, x, solver=RK4(), ts=Geometric()(WIDE, 512))

    def error(solver):
        return float(jnp.abs(decode(score, x, solver=solver) - exact).max())

    dopri = diffrax.Dopri5()
    assert error(Adaptive(dopri, rtol=1e-5, atol=1e-5)) < 1e-3
    assert error(Adaptive(rtol=0.1, atol=0.1)) > 1e-3


@dataclass(frozen=True)
class Autonomous(Adaptive):
    """A mutant: the field does not see the noise level change."""

    def step(self, key, x, level, level_next, denoise, solver_state):
        frozen = lambda x, _: denoise(x, level)  # noqa: E731
        return super().step(key, x, level, level_next, frozen, solver_state)


@pytest.mark.slow
def test_adaptive_steps_need_the_noise_level(score):
    draws = solve(KEY, score, (NUM_DRAWS,), solver=Autonomous()).draws
    assert float(draws.std()) < 0.7


def test_too_many_steps_are_flagged(score):
    solution = solve(KEY, score, (2,), solver=Adaptive(max_steps=2))
    assert solution.failed_step.tolist() == [0, 0]


# Variance


def test_antithetic_draws_of_a_symmetric_law_mirror_each_other():
    score = Gaussian((0.0,), (0.5,)).score_model(VE())
    for solver in (DPMSolverPP(), Ancestral()):
        draws = solve(KEY, score, (10,), solver=solver, antithetic=True).draws
        np.testing.assert_allclose(draws[0::2], -draws[1::2], atol=1e-6)
        assert len(np.unique(np.abs(draws))) == 5


@pytest.mark.slow
def test_antithetic_pairs_reduce_the_variance_of_the_mean(score):
    draws = solve(KEY, score, (NUM_DRAWS,), solver=DPMSolverPP(), antithetic=True).draws
    assert_law(draws[::2], MIXTURE, sigma=WIDE.sigma_min, slack=0.02)
    estimate = expectation(draws, draws, antithetic=True)
    assert (np.asarray(estimate.variance_ratio) > 2).all()
    z = np.asarray(estimate.mean / estimate.standard_error)
    assert (np.abs(z) < 5).all()


def gaussian_draws(num=400):
    x = GAUSSIAN.sample(jax.random.key(3), (num,))
    return x, jax.vmap(GAUSSIAN.score)(x)


def test_errors_of_means_are_standard_errors():
    x, scores = gaussian_draws(100)
    plain = expectation(x, x)
    np.testing.assert_allclose(plain.mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(plain.standard_error, x.std(0, ddof=1) / 10, rtol=1e-4)
    pairs = 0.5 * (x[0::2] + x[1::2])
    exact = pairs.std(0, ddof=1) / np.sqrt(50)
    got = expectation(x, x, antithetic=True).standard_error
    np.testing.assert_allclose(got, exact, rtol=1e-4)
    # what a regression of x^2 on scores leaves, which has 100 - 1 - d free numbers
    design = np.concatenate([np.ones((100, 1)), scores], axis=1)
    _, squares, _, _ = np.linalg.lstsq(design, np.asarray(x**2), rcond=None)
    exact = np.sqrt(squares / (99 - x.shape[1]) / 100)
    got = expectation(x**2, x, scores).standard_error
    np.testing.assert_allclose(got, exact, rtol=1e-3)


def test_control_variates_are_exact_for_polynomials_of_gaussians():
    x, scores = gaussian_draws()
    linear = expectation(x, x, scores)
    np.testing.assert_allclose(linear.mean, GAUSSIAN.means(), atol=1e-5)
    second = GAUSSIAN.variances() + GAUSSIAN.means() ** 2
    square = expectation(x**2, x, scores, degree=2)
    np.testing.assert_allclose(square.mean, second, atol=1e-4)
    assert (np.asarray(square.variance_ratio) > 1e4).all()


@pytest.mark.slow
def test_control_variates_reduce_the_variance_and_keep_the_mean(solution, score):
    draws = solution.draws
    scores = score.score(draws)
    estimate = expectation(draws**2, draws, scores, degree=2)
    variances = MIXTURE.variances(sigma=WIDE.sigma_min) + MIXTURE.means() ** 2
    assert (np.asarray(estimate.variance_ratio) > 1.5).all()
    bias = 0.02  # of the solver, which control variates leave
    excess = np.abs(estimate.mean - variances) - bias
    assert (excess < 5 * estimate.standard_error).all()


def test_expectations_say_what_they_need():
    x, scores = gaussian_draws(3)
    with pytest.raises(ValueError, match=r"`degree` must be 1 or 2.*Got 3"):
        expectation(x, x, scores, degree=3)
    with pytest.raises(ValueError, match="`values` must have an even number of rows"):
        expectation(x, x, antithetic=True)
    with pytest.raises(ValueError, match="`draws` must outnumber the controls"):
        expectation(x, x, scores)


@pytest.mark.parametrize("antithetic", [False, True])
def test_keys_of_starts_and_steps_are_all_different(antithetic):
    """But for those of a pair of opposite noise."""
    keys = integrate.draw_keys(KEY, 6, antithetic=antithetic)
    rows = np.concatenate(
        [np.asarray(jax.random.key_data(k)) for k in (keys.starts, keys.steps)]
    )
    assert len(np.unique(rows, axis=0)) == (6 if antithetic else 12)
    if antithetic:
        np.testing.assert_array_equal(rows[::2], rows[1::2])
        assert keys.signs.tolist() == [1.0, -1.0] * 3
