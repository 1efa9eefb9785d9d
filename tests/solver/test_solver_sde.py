"""Solvers of the reverse SDE: weak orders from the exact law of their output, mutants.

On Gaussian data a solver is linear in its start and its noise, so mean and variance of
what it returns follow from derivatives, without Monte Carlo error.
"""

from dataclasses import dataclass
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, SubVP
from numpyro_score.solver import (
    Ancestral,
    DPMSolverSDE,
    Euler,
    EulerMaruyama,
    PredictorCorrector,
    Solver,
    StochasticHeun,
    adaptive,
    sample,
    solve,
)
from numpyro_score.solver.adaptive import AdaptiveSDE
from numpyro_score.solver.base import integrate_levels
from numpyro_score.solver.runge_kutta import heun_step
from tests.targets import MIXTURE, Gaussian, assert_law

LAW = Gaussian((0.7,), (0.5,))
TOP, BOTTOM = 100.0, 0.1


def denoise(x, level):
    return LAW.denoised(x, 1.0, level)


def grid(solver, num_steps):
    """Return levels of the grid on which a solver's order is defined."""
    if not isinstance(solver, EulerMaruyama):
        return jnp.geomspace(TOP, BOTTOM, num_steps + 1)
    sde = solver.sde
    ts = jnp.linspace(sde.t_max, float(sde.time(BOTTOM)), num_steps + 1)
    return sde.noise_level(ts)


def final_law(solver, levels):
    """Return mean and variance of a solver's output, exactly."""

    def run(x, noises):
        def body(carry, inputs):
            noise, *levels = inputs
            draw = lambda key, shape, dtype: noise.reshape(shape)  # noqa: E731
            with mock.patch("jax.random.normal", draw):
                x, solver_state = solver.step(
                    None, carry[0], *levels, denoise, carry[1]
                )
            return (x, solver_state), None

        steps = (noises, levels[:-1], levels[1:])
        (x, _), _ = jax.lax.scan(body, (x, solver.init(x)), steps)
        return x[0]

    zero = jnp.zeros(1), jnp.zeros(len(levels) - 1)
    by_start, by_noise = jax.grad(run, (0, 1))(*zero)
    variance = by_start[0] ** 2 * (1 + levels[0] ** 2) + jnp.square(by_noise).sum()
    return run(*zero), variance


def variance_error(solver, num_steps):
    with jax.enable_x64(True):
        mean_and_variance = jax.jit(final_law, static_argnums=0)
        _, variance = mean_and_variance(solver, grid(solver, num_steps))
        return abs(float(variance) - float(LAW.variances(1.0, BOTTOM)[0]))


def weak_order(solver, counts=(120, 480)):
    few, many = (variance_error(solver, n) for n in counts)
    return np.log(few / many) / np.log(counts[1] / counts[0])


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (EulerMaruyama(VP()), 1),
        (EulerMaruyama(SubVP()), 1),
        (EulerMaruyama(VE(0.05, TOP)), 1),
        (Ancestral(), 1),
        (StochasticHeun(0.5), 2),
        (DPMSolverSDE(1), 1),
        (DPMSolverSDE(2), 2),
        (DPMSolverSDE(3), 2),
    ],
    ids=repr,
)
def test_weak_order_is_the_one_claimed(solver, order):
    assert weak_order(solver) == pytest.approx(order, abs=0.3)


@dataclass(frozen=True)
class ChurnAtOldLevel(Solver):
    """A mutant: noise is added but the denoiser sees the level before."""

    def init(self, x):
        return ()

    def step(self, key, x, level, level_next, denoise, solver_state):
        raised = level * (level / level_next) ** 0.5
        noise = jax.random.normal(key, x.shape, x.dtype)
        x = x + jnp.sqrt(raised**2 - level**2) * noise
        blind = lambda x, at: denoise(x, jnp.where(at == raised, level, at))  # noqa: E731
        return heun_step(x, raised, level_next, blind), solver_state


@dataclass(frozen=True)
class ReverseMutant(Solver):
    """Euler-Maruyama for VE whose drift is ``pull`` times the right one."""

    pull: float
    noise: float = 1.0

    def init(self, x):
        return ()

    def step(self, key, x, level, level_next, denoise, solver_state):
        variance = level**2 - level_next**2
        score = (denoise(x, level) - x) / level**2
        noise = jax.random.normal(key, x.shape, x.dtype)
        return x + self.pull * variance * score + self.noise * variance**0.5 * noise, ()


def test_reverse_mutant_without_a_fault_is_right():
    assert variance_error(ReverseMutant(pull=1.0), 480) < 0.03


@pytest.mark.parametrize(
    "mutant",
    [
        ReverseMutant(pull=0.0),  # no g^2 s in the drift
        ReverseMutant(pull=0.5),  # the drift of the flow with the SDE's noise
        ReverseMutant(pull=-1.0),  # a step of the wrong sign
        ReverseMutant(pull=1.0, noise=2**0.5),  # noise scaled twice
    ],
    ids=repr,
)
def test_mutant_has_the_wrong_law(mutant):
    assert variance_error(mutant, 480) > 0.1


def test_churn_needs_the_raised_level():
    assert weak_order(ChurnAtOldLevel()) < 1.3


def test_ancestral_step_is_the_discrete_chain_of_ddpm():
    # Ho et al. 2020: x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) n, run backwards
    sde = VP()
    ts = jnp.linspace(sde.t_max, sde.t_min, 101)
    alphas = sde.alpha(ts)
    x = jnp.array([0.3])
    for i in (0, 40, 80, 98):
        beta = 1 - (alphas[i] / alphas[i + 1]) ** 2
        rest, rest_next = 1 - alphas[i] ** 2, 1 - alphas[i + 1] ** 2
        denoised = LAW.denoised(x, alphas[i], jnp.sqrt(rest))
        noise = (x - alphas[i] * denoised) / jnp.sqrt(rest)
        mean = (x - beta / jnp.sqrt(rest) * noise) / jnp.sqrt(1 - beta)
        sd = jnp.sqrt(rest_next / rest * beta)
        key = jax.random.key(i)
        expected = mean + sd * jax.random.normal(key, (1,))
        levels = sde.noise_level(ts)
        got, _ = Ancestral().step(
            key, x / alphas[i], levels[i], levels[i + 1], denoise, ()
        )
        np.testing.assert_allclose(alphas[i + 1] * got, expected, rtol=2e-4, atol=2e-5)


def test_first_order_exponential_rule_is_ancestral_sampling():
    key, x = jax.random.key(0), jnp.array([3.0])
    solver = DPMSolverSDE(order=1)
    got, _ = solver.step(key, x, 5.0, 2.0, denoise, solver.init(x))
    expected, _ = Ancestral().step(key, x, 5.0, 2.0, denoise, ())
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def score():
    return MIXTURE.score_model(VE())


@dataclass(frozen=True)
class FixedCorrector(Solver):
    """A mutant: corrector steps of one size at all levels."""

    def init(self, x):
        return ()

    def step(self, key, x, level, level_next, denoise, solver_state):
        key, key_correct = jax.random.split(key)
        x, _ = Ancestral().step(key, x, level, level_next, denoise, ())
        noise = jax.random.normal(key_correct, x.shape, x.dtype)
        score = (denoise(x, level_next) - x) / level_next**2
        return x + 0.05 * score + 0.1**0.5 * noise, ()


def test_corrections_keep_the_law_of_their_level():
    """Steps of length eps have the variance v / (1 - eps / 2v) in a Gaussian."""
    solver, level, size = PredictorCorrector(Euler(), num_corrections=25), 0.8, 4000
    variance = 0.5**2 + level**2
    x = 0.7 + variance**0.5 * jax.random.normal(jax.random.key(0), (size, 1))
    keys = jax.random.split(jax.random.key(1), size)
    x = integrate_levels(keys, denoise, x, jnp.full(2, level), solver)
    wanted = variance / (1 - solver.signal_to_noise**2)
    error = 5 * (2 / size) ** 0.5
    np.testing.assert_allclose(x.var(), wanted, rtol=error)
    np.testing.assert_allclose(x.mean(), 0.7, atol=5 * (wanted / size) ** 0.5)


@pytest.mark.slow
def test_corrector_needs_the_signal_to_noise_rule(score):
    key = jax.random.key(0)
    solver = PredictorCorrector()
    ts = solver.default_times(score.sde)
    draws = sample(key, score, (4000,), solver=solver, ts=ts)
    assert_law(draws, MIXTURE, sigma=VE().sigma_min, slack=0.02)
    broken = solve(key, score, (4000,), solver=FixedCorrector(), ts=ts).draws
    finite = bool(jnp.isfinite(broken).all())
    assert not finite or abs(float(broken.var()) - 1) > 0.2


def test_adaptive_sde_has_the_drift_and_the_noise_of_its_rate(monkeypatch):
    seen = []

    def no_solve(terms, method, x, length, controller, max_steps):
        seen.append((terms, length))
        return x, jnp.zeros((), int)

    monkeypatch.setattr(adaptive, "adaptive_solve", no_solve)
    tau, level, s, x = 0.5, jnp.array(2.0), 0.3, jnp.array([3.0, -1.0])
    key, count = jax.random.key(0), jnp.zeros((), int)
    AdaptiveSDE(noise_rate=tau).step(
        key, x, level, jnp.array(0.5), lambda x, r: r + 0 * x, count
    )
    (((drift, diffusion), length),) = [(terms.terms, length) for terms, length in seen]
    assert float(length) == pytest.approx(np.log(4.0))
    now = 2 * np.exp(-s)  # the level, and here the denoised point
    np.testing.assert_allclose(
        drift.vector_field(s, x, None), (1 + tau**2) * (now - x), rtol=1e-5
    )
    np.testing.assert_allclose(
        diffusion.vector_field(s, x, None).as_matrix(),
        np.sqrt(2) * tau * now * np.eye(2),
        rtol=1e-5,
    )


@pytest.mark.slow
def test_adaptive_sde_recovers_the_mixture(score):
    solution = solve(jax.random.key(1), score, (4000,), solver=AdaptiveSDE())
    assert_law(solution.draws, MIXTURE, sigma=VE().sigma_min, slack=0.02)
    assert len(set(solution.num_evaluations.tolist())) > 1  # each path has its steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral(eta=1.5), r"`eta` must lie between 0 \(DDIM\) and 1"),
        (lambda: StochasticHeun(churn=-1.0), "`churn` must not be negative"),
        (lambda: DPMSolverSDE(order=4), "`order` must be an integer from 1 to 3"),
        (lambda: DPMSolverSDE(noise_rate=0.0), "`noise_rate` must be positive"),
        (lambda: AdaptiveSDE(rtol=0.0), "`rtol` must be positive"),
        (
            lambda: PredictorCorrector(num_corrections=0),
            "`num_corrections`.*at least 1",
        ),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
