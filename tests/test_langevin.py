"""The splittings: reversible, volume preserving, of known order and known variance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.stats import kstest, kurtosis

from numpyro_score import langevin
from numpyro_score.kernel.threefry import next_key_and_words, standard_normal
from numpyro_score.langevin import (
    IntegratorState,
    IntegratorTarget,
    PointState,
    baoab,
    leapfrog,
    obab,
    persistence,
    refresh,
)

KEY = 7


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def target_of(potential_fn: Callable) -> IntegratorTarget:
    def visit(y):
        value, gradient = jax.value_and_grad(potential_fn)(y)
        return PointState(y, gradient, value)

    return IntegratorTarget(visit, lambda a, b: b.aux - a.aux)


def quartic(y):
    return 0.25 * jnp.sum(y**4) + 0.5 * jnp.square(y[0] - 2 * y[1])


def swirl(y) -> PointState:
    """A force that is no gradient; its energy does not matter."""
    return PointState(y, jnp.stack([y[0] + y[1] ** 2, y[1] - y[0] ** 3]), jnp.zeros(()))


TARGETS = {
    "gradient": target_of(quartic),
    "any force": IntegratorTarget(swirl, lambda a, b: jnp.zeros(())),
}


def euler(
    phase: IntegratorState, step_size: float, target: IntegratorTarget
) -> tuple[IntegratorState, Any]:
    """A mutant: the momentum moves by the gradient at the old position alone."""
    place, momentum = phase
    place_next = target.evaluate(place.position + step_size * momentum)
    return IntegratorState(
        place_next, momentum - step_size * place.gradient
    ), jnp.zeros(())


def flow(step: Callable, target: IntegratorTarget) -> Callable:
    """Return the step as a map of (position, momentum) in one vector."""

    def one(x):
        y, p = jnp.split(x, 2)
        (place, momentum), _ = step(IntegratorState(target.evaluate(y), p), 0.3, target)
        return jnp.concatenate([place.position, momentum])

    return one


def check_reversible(step: Callable, target: IntegratorTarget) -> None:
    flip = jnp.array([1.0, 1.0, -1.0, -1.0])
    x = jnp.array([0.3, -1.0, 0.7, 0.2])
    move = flow(step, target)
    assert jnp.abs(flip * move(flip * move(x)) - x).max() < 1e-12


def check_volume(step: Callable, target: IntegratorTarget) -> None:
    x = jnp.array([0.3, -1.0, 0.7, 0.2])
    volume = jnp.linalg.det(jax.jacobian(flow(step, target))(x))
    assert abs(volume - 1) < 1e-12


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("check", [check_reversible, check_volume])
def test_leapfrog_keeps_phase_space(check, name):
    check(leapfrog, TARGETS[name])


@pytest.mark.parametrize("check", [check_reversible, check_volume])
def test_mutant_euler_does_not_keep_phase_space(check):
    with pytest.raises(AssertionError):
        check(euler, TARGETS["gradient"])


def order(error_of: Callable[[float], Any]) -> float:
    steps = np.geomspace(0.01, 0.04, 5)
    errors = np.abs([float(error_of(h)) for h in steps])
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def phase_of(target: IntegratorTarget) -> IntegratorState:
    return IntegratorState(
        target.evaluate(jnp.array([0.8, -0.5])), jnp.array([0.4, 1.1])
    )


def test_energy_error_of_one_leapfrog_has_order_three():
    target = target_of(quartic)
    error = jax.jit(lambda h: leapfrog(phase_of(target), h, target)[1])
    assert order(error) == pytest.approx(3, abs=0.05)


def test_energy_error_is_that_of_the_hamiltonian():
    target = target_of(quartic)
    before = phase_of(target)
    after, error = leapfrog(before, 0.2, target)
    energies = [
        quartic(phase.place.position) + 0.5 * jnp.sum(phase.momentum**2)
        for phase in (before, after)
    ]
    assert float(error) == pytest.approx(float(energies[1] - energies[0]), abs=1e-14)


def test_baoab_without_refreshment_is_the_leapfrog():
    target = target_of(quartic)
    expected, error = leapfrog(phase_of(target), 0.3, target)
    noise = jax.random.normal(jax.random.key(KEY), (2,))
    got, got_error = baoab(noise, phase_of(target), 0.3, 1e-15, target)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(a - b).max() < 1e-6
    assert float(got_error) == pytest.approx(float(error), abs=1e-6)


@pytest.mark.parametrize("friction", [None, 2.0])
def test_order_of_the_energy_error_of_baoab(friction):
    """The error grows as h^3 whatever the refreshment; step sizes rely on it."""
    target = target_of(quartic)
    noise = jax.random.normal(jax.random.key(KEY), (1000, 2))

    @jax.jit
    def root_mean_square(h):
        start = phase_of(target)
        error = jax.vmap(lambda n: baoab(n, start, h, friction, target)[1])(noise)
        return jnp.sqrt(jnp.mean(error**2))

    assert order(root_mean_square) == pytest.approx(3.0, abs=0.1)


# refreshment


def test_refreshment_keeps_the_share_eta():
    noise, momentum = jnp.array([0.3, 0.4]), jnp.array([1.0, -2.0])
    assert jnp.allclose(refresh(noise, momentum, 0.0), noise)
    kept = refresh(noise, momentum, 0.6)
    assert jnp.allclose(kept, 0.6 * momentum + 0.8 * noise, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [200_000, 99_999])
def test_noise_is_standard_normal(dtype, size):
    _, words = next_key_and_words(jax.random.key(KEY))
    noise = standard_normal(words, 0, size, dtype)
    assert noise.dtype == dtype
    noise = np.asarray(noise, float)
    assert kstest(noise, "norm").pvalue > 1e-3
    assert abs(kurtosis(noise)) < 5 * np.sqrt(24 / size)
    halves = noise[: size // 2], noise[-(size // 2) :]  # the two of each pair
    for f in (np.abs, np.square, np.positive):
        correlation = np.corrcoef(*map(f, halves))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size // 2)


def test_persistence_composes_over_time():
    assert float(persistence(0.2, 3.0)) == pytest.approx(np.exp(-0.6))
    half = persistence(0.1, 3.0)
    assert float(half**2) == pytest.approx(float(persistence(0.2, 3.0)))


def test_overdamped_step_in_both_conventions():
    """x + h^2/2 s + h n is x + eps s + sqrt(2 eps) n with eps = h^2/2."""
    h, target, noise = 0.7, target_of(quartic), jnp.array([0.3, -1.1])
    start = phase_of(target)
    end, _ = obab(noise, start, h, None, target)
    score, epsilon = -start.place.gradient, h**2 / 2
    expected = start.place.position + epsilon * score + jnp.sqrt(2 * epsilon) * noise
    assert jnp.abs(end.place.position - expected).max() < 1e-14


# stationary laws in a Gaussian, exactly: the step is linear in state and noise

SD = 0.8


def gaussian(y):
    return 0.5 * jnp.sum(jnp.square(y / SD))


def stationary_variance(step: Callable, step_size: float, friction: Any) -> float:
    """Solve the Lyapunov equation of the step for the variance of the position.

    Raises:
        AssertionError: if the step diverges.
    """
    target = target_of(gaussian)

    def move(x, noise):
        phase = IntegratorState(target.evaluate(x[:1]), x[1:])
        end, _ = step(noise, phase, step_size, friction, target)
        return jnp.concatenate([end.place.position, end.momentum])

    origin = jnp.zeros(2)
    A = np.asarray(jax.jacobian(move)(origin, jnp.zeros(1)))
    assert np.abs(np.linalg.eigvals(A)).max() < 1, "the step diverges"
    noise = np.asarray(move(origin, jnp.ones(1)))
    system = np.eye(4) - np.kron(A, A)
    return np.linalg.solve(system, np.kron(noise, noise))[0]


def obab_variance(h: float) -> float:
    return SD**2 / (1 - (h / SD) ** 2 / 4)


def baoab_variance(h: float) -> float:
    return SD**2


SPLITTINGS = [(obab, obab_variance), (baoab, baoab_variance)]


@pytest.mark.parametrize(("step", "variance"), SPLITTINGS, ids=["obab", "baoab"])
@pytest.mark.parametrize("friction", [None, 0.5, 4.0])
@pytest.mark.parametrize("h", [0.1, 0.6, 1.2])
def test_stationary_variance_in_a_gaussian(step, variance, friction, h):
    """Leimkuhler and Matthews 2013: BAOAB is exact, OBABO (and ULA) is not."""
    assert stationary_variance(step, h, friction) == pytest.approx(variance(h))


def uphill(momentum, gradient, step_size):
    """A mutant kick: x - eps score, down in density."""
    return momentum + 0.5 * step_size * gradient


def weak_noise(noise, momentum, eta):
    """A mutant refreshment: noise sqrt(eps) in place of sqrt(2 eps)."""
    return eta * momentum + jnp.sqrt((1 - jnp.square(eta)) / 2) * noise


MUTANTS = {"kick": uphill, "refresh": weak_noise}


@pytest.mark.parametrize(("step", "variance"), SPLITTINGS, ids=["obab", "baoab"])
@pytest.mark.parametrize("friction", [None, 0.5])
@pytest.mark.parametrize("name", ["kick", "refresh"])
def test_mutants_miss_the_variance(monkeypatch, name, step, variance, friction):
    monkeypatch.setattr(langevin, name, MUTANTS[name])
    with pytest.raises(AssertionError):
        test_stationary_variance_in_a_gaussian(step, variance, friction, 0.6)


def test_stability_limit_is_twice_the_scale():
    stationary_variance(baoab, 1.99 * SD, 0.5)
    with pytest.raises(AssertionError, match="diverges"):
        stationary_variance(baoab, 2.01 * SD, 0.5)


def test_places_carry_what_was_evaluated():
    """The end of a step is where the next starts, with nothing evaluated twice."""
    target = target_of(quartic)
    end, _ = leapfrog(phase_of(target), 0.3, target)
    fresh = target.evaluate(end.place.position)
    assert jnp.allclose(ravel_pytree(end.place)[0], ravel_pytree(fresh)[0], atol=1e-15)
