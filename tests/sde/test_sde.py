"""Noise processes: one suite of identities for all of them."""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, RectifiedFlow, SubVP
from numpyro_score.sde import DiscreteVP
from numpyro_score.sde.discrete import as_process
from tests.targets import MIXTURE, ExactScore, assert_law, z_scores

PROCESSES = [
    VE(),
    VP(),
    SubVP(),
    RectifiedFlow(),
    VE(sigma_min=0.05, sigma_max=5.0),
    VP(beta_min=0.5, beta_max=8.0, sigma_min=0.05),
]
ONE_OF_EACH = PROCESSES[:4]
START, MIDDLE, END = 0.2, 0.4, 0.7  # times of simulations, in every process's range

over_processes = pytest.mark.parametrize("sde", PROCESSES, ids=repr)
over_kinds = pytest.mark.parametrize("sde", ONE_OF_EACH, ids=lambda s: type(s).__name__)


def beta(sde, t):
    return sde.beta_min + t * (sde.beta_max - sde.beta_min)


def beta_integral(sde, t):
    return sde.beta_min * t + 0.5 * t**2 * (sde.beta_max - sde.beta_min)


def published_drift_factor(sde, t):
    """Return f(x, t) / x as published, written without reference to alpha."""
    match sde:
        case VE():
            return 0.0 * t
        case VP() | SubVP():
            return -0.5 * beta(sde, t)
        case RectifiedFlow():
            return -1 / (1 - t)


def published_diffusion(sde, t):
    """Return g(t): Song et al. 2021, eqs. 9, 11, 13; Lipman et al. 2023."""
    match sde:
        case VE():
            ratio = sde.sigma_max / sde.sigma_min
            return sde.sigma_min * ratio**t * jnp.sqrt(2 * jnp.log(ratio))
        case VP():
            return jnp.sqrt(beta(sde, t))
        case SubVP():
            return jnp.sqrt(beta(sde, t) * (1 - jnp.exp(-2 * beta_integral(sde, t))))
        case RectifiedFlow():
            return jnp.sqrt(2 * t / (1 - t))


@over_processes
def test_drift_and_diffusion_are_the_published_ones(sde):
    x = jnp.array([1.5, -0.4])
    for t in (0.05, 0.3, 0.6, 0.95):
        drift = published_drift_factor(sde, jnp.array(t)) * x
        np.testing.assert_allclose(sde.drift(x, t), drift, rtol=1e-4, atol=1e-6)
        diffusion = published_diffusion(sde, jnp.array(t))
        np.testing.assert_allclose(sde.diffusion(t), diffusion, rtol=1e-3)


@over_processes
def test_time_inverts_noise_level(sde):
    levels = jnp.geomspace(sde.sigma_min, sde.sigma_max, 40)
    np.testing.assert_allclose(sde.noise_level(sde.time(levels)), levels, rtol=2e-3)
    np.testing.assert_allclose(sde.time(sde.sigma_min), sde.t_min, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sde.time(sde.sigma_max), sde.t_max, rtol=1e-4)
    assert 0 <= sde.t_min < sde.t_max <= 1


@over_processes
def test_noise_level_is_the_ratio_of_the_marginal(sde):
    alpha, sigma = sde.marginal(0.4)
    np.testing.assert_allclose(sde.noise_level(0.4), sigma / alpha, rtol=1e-6)
    np.testing.assert_allclose(jnp.log(alpha), sde.log_alpha(0.4), atol=1e-6)


@over_kinds
def test_ends_of_the_range_are_concrete_under_jit(sde):
    ends = jax.jit(lambda: jnp.array([sde.t_min, sde.t_max, sde.sigma_max]))()
    np.testing.assert_allclose(ends, [sde.t_min, sde.t_max, sde.sigma_max], rtol=1e-6)


# The marginals against simulation of the published SDE


def forward_grid(num_steps=400):
    return jnp.linspace(START, MIDDLE, num_steps + 1)


@jax.jit
def scan_euler_maruyama(key, x, ts, factors, diffusions):
    """Return the end of a linear SDE with tabulated drift factor and diffusion."""

    def step(carry, inputs):
        key, x = carry
        dt, factor, diffusion = inputs
        key, key_noise = jax.random.split(key)
        noise = jax.random.normal(key_noise, x.shape)
        x = x + factor * x * dt + diffusion * jnp.sqrt(dt) * noise
        return (key, x), None

    inputs = (jnp.diff(ts), factors, diffusions)
    return jax.lax.scan(step, (key, x), inputs)[0][1]


def euler_moments(sde, num_steps):
    """Return the factor of the mean and the added variance of Euler-Maruyama itself."""
    ts = forward_grid(num_steps)
    factors = np.asarray(jax.vmap(lambda t: published_drift_factor(sde, t))(ts), float)
    diffusions = np.asarray(jax.vmap(lambda t: published_diffusion(sde, t))(ts), float)
    factor, variance = 1.0, 0.0
    for k, (t, t_next) in enumerate(pairwise(np.asarray(ts, float))):
        growth = 1 + factors[k] * (t_next - t)
        variance = growth**2 * variance + diffusions[k] ** 2 * (t_next - t)
        factor = growth * factor
    return np.array([factor, variance])


def transition(process):
    """Return the same two numbers as the process's ``marginal`` implies them."""
    alpha, sigma = (float(s) for s in process.marginal(START))
    alpha_end, sigma_end = (float(s) for s in process.marginal(MIDDLE))
    factor = alpha_end / alpha
    return np.array([factor, sigma_end**2 - factor**2 * sigma**2])


def assert_marginal_matches(sde, marginal_of):
    """Check the marginal of one process against simulation of another's SDE."""
    ts = forward_grid()
    factors = jax.vmap(lambda t: published_drift_factor(sde, t))(ts[:-1])
    diffusions = jax.vmap(lambda t: published_diffusion(sde, t))(ts[:-1])
    x0 = 1.3
    alpha, sigma = marginal_of.marginal(START)
    start = alpha * x0 + sigma * jax.random.normal(jax.random.key(0), (20_000,))
    end = scan_euler_maruyama(jax.random.key(1), start, ts, factors, diffusions)
    alpha_end, sigma_end = marginal_of.marginal(MIDDLE)
    # the step's bias falls with the step: the coarse one is twice the difference
    bias_factor, bias_variance = 2 * abs(
        euler_moments(sde, 400) - euler_moments(sde, 800)
    )
    assert z_scores(end, alpha_end * x0, 1.5 * bias_factor * x0) < 5
    squares = (end - alpha_end * x0) ** 2
    slack = 1.5 * (bias_variance + 2 * bias_factor)
    assert z_scores(squares, sigma_end**2, min(slack, 0.02 * sigma_end**2)) < 5


@over_kinds
def test_marginal_matches_simulation(sde):
    assert_marginal_matches(sde, sde)


@over_kinds
def test_simulation_tends_to_the_marginal_at_first_order(sde):
    """Without Monte Carlo: the bias of the scheme's moments halves with its step."""
    exact = transition(sde)
    coarse, fine = (euler_moments(sde, n) - exact for n in (200, 400))
    moving = np.abs(coarse) > 1e-4  # VE's mean does not move
    assert moving.any()
    np.testing.assert_allclose(coarse[moving] / fine[moving], 2.0, rtol=0.1)
    assert np.all(np.abs(fine) < 0.05 * np.abs(exact) + 1e-6)


@dataclass(frozen=True)
class SubVPWithSigmaOfVP(SubVP):
    """The common mistake: sub-VP's process with VP's standard deviation."""

    def sigma(self, t):
        return jnp.sqrt(super().sigma(t))


@dataclass(frozen=True)
class VPWithFactorTwo(VP):
    """Another one: alpha = exp(-B) in place of exp(-B/2)."""

    def log_alpha(self, t):
        return 2 * super().log_alpha(t)


@pytest.mark.parametrize(
    ("sde", "mutant"), [(SubVP(), SubVPWithSigmaOfVP()), (VP(), VPWithFactorTwo())]
)
def test_wrong_marginal_is_caught(sde, mutant):
    with pytest.raises(AssertionError):
        assert_marginal_matches(sde, mutant)


def test_sigma_of_sub_vp_is_the_square_of_vp():
    t = jnp.linspace(0.01, 1.0, 20)
    np.testing.assert_allclose(SubVP().sigma(t), VP().sigma(t) ** 2, rtol=1e-5)
    np.testing.assert_allclose(SubVP().alpha(t), VP().alpha(t), rtol=1e-6)


# Reversal and probability flow, with an exact score


@over_kinds
def test_reverse_of_reverse_is_forward(sde):
    x, t = jnp.array([0.7, -1.1]), 0.4
    score_fn = ExactScore(MIXTURE, sde)
    backward = sde.reverse(score_fn)
    again = backward.reverse(score_fn)
    np.testing.assert_allclose(again.drift(x, t), sde.drift(x, t), atol=1e-5)
    np.testing.assert_allclose(again.diffusion(t), sde.diffusion(t))
    assert np.abs(backward.drift(x, t) - sde.drift(x, t)).max() > 0.1


@over_kinds
def test_reverse_and_flow_pull_by_the_score(sde):
    x, t = jnp.array([0.7, -1.1]), 0.4
    score_fn = ExactScore(MIXTURE, sde)
    pull = sde.diffusion(t) ** 2 * score_fn(x, t)
    reverse, flow = sde.reverse(score_fn), sde.probability_flow(score_fn)
    forward = sde.drift(x, t)
    np.testing.assert_allclose(reverse.drift(x, t), forward - pull, rtol=1e-5)
    np.testing.assert_allclose(flow.drift(x, t), forward - 0.5 * pull, rtol=1e-5)
    assert float(reverse.diffusion(t)) == float(sde.diffusion(t))
    assert float(flow.diffusion(t)) == 0.0


def fokker_planck_residual(sde, drift, square, x, t):
    """Return d/dt log p + div v + v . grad log p with v = drift - square score / 2.

    It is the Fokker-Planck equation over p, zero for every process with marginals p_t.
    ``square`` is the squared diffusion; negative for a process that runs back in time.
    """

    def log_density(x, t):
        return MIXTURE.log_density(x, *sde.marginal(t))

    def velocity(x):
        return drift(x, t) - 0.5 * square(t) * jax.grad(log_density)(x, t)

    change = jax.grad(log_density, argnums=1)(x, t)
    divergence = jnp.trace(jax.jacfwd(velocity)(x))
    residual = change + divergence + velocity(x) @ jax.grad(log_density)(x, t)
    return residual, change


def worst_residual(sde, drift, square):
    """Return the largest residual over points and times, over the largest change."""
    ts = jnp.array([0.15, 0.4, 0.8])
    x0 = MIXTURE.sample(jax.random.key(2), (10,))
    alpha, sigma = (s[:, None, None] for s in sde.marginal(ts))
    points = alpha * x0 + sigma * jax.random.normal(jax.random.key(3), x0.shape)

    def one(x, t):
        return fokker_planck_residual(sde, drift, square, x, t)

    residual, change = jax.jit(jax.vmap(jax.vmap(one, (0, None))))(points, ts)
    return float(jnp.max(jnp.abs(residual)) / jnp.max(jnp.abs(change)))


@over_kinds
def test_marginals_obey_the_fokker_planck_equation(sde):
    score_fn = ExactScore(MIXTURE, sde)
    flow, reverse = sde.probability_flow(score_fn), sde.reverse(score_fn)
    assert worst_residual(sde, sde.drift, lambda t: sde.diffusion(t) ** 2) < 1e-3
    assert (
        worst_residual(sde, reverse.drift, lambda t: -(reverse.diffusion(t) ** 2))
        < 1e-3
    )
    assert worst_residual(sde, flow.drift, lambda t: flow.diffusion(t) ** 2) < 1e-3
    # a flow that pulls by the whole g^2 score has other marginals
    assert worst_residual(sde, reverse.drift, jnp.zeros_like) > 0.1


def reverse_draws(sde, process, num_steps=250):
    """Carry exact draws at END down to START by Euler-Maruyama of a process."""
    keys = jax.random.split(jax.random.key(4), 3)
    alpha, sigma = sde.marginal(END)
    x = alpha * MIXTURE.sample(keys[0], (5_000,))
    x = x + sigma * jax.random.normal(keys[1], x.shape)
    ts = sde.time(jnp.geomspace(*sde.noise_level(jnp.array([END, START])), num_steps))

    def step(carry, pair):
        key, x = carry
        t, t_next = pair
        key, key_noise = jax.random.split(key)
        drift = jax.vmap(lambda x: process.drift(x, t))(x)
        noise = jax.random.normal(key_noise, x.shape)
        x = x + drift * (t_next - t)
        x = x + process.diffusion(t) * jnp.sqrt(t - t_next) * noise
        return (key, x), None

    return jax.lax.scan(step, (keys[2], x), (ts[:-1], ts[1:]))[0][1]


def assert_reverse_keeps_law(sde, process):
    draws = reverse_draws(sde, process)
    assert_law(draws, MIXTURE, *sde.marginal(START), slack=0.02)


@over_kinds
@pytest.mark.parametrize("method", ["reverse", "probability_flow"])
def test_backward_processes_keep_the_marginals(sde, method):
    assert_reverse_keeps_law(sde, getattr(sde, method)(ExactScore(MIXTURE, sde)))


MUTANTS = {
    "without the score": lambda s: -0.0 * s,
    "with the wrong sign": lambda s: -s,
    "with half the score": lambda s: 0.5 * s,
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_wrong_reverse_is_caught(mutant):
    sde = VP()
    score_fn = ExactScore(MIXTURE, sde)
    process = sde.reverse(lambda x, t: mutant(score_fn(x, t)))
    with pytest.raises(AssertionError):
        assert_reverse_keeps_law(sde, process)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VE(sigma_min=1.0, sigma_max=0.5), "sigma_min=1.0, sigma_max=0.5"),
        (lambda: VE(sigma_min=1.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: VE(sigma_min=-0.1), "sigma_min=-0.1"),
        (lambda: VE(sigma_min=float("nan")), "sigma_min=nan"),
        (lambda: RectifiedFlow(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: VP(sigma_min=1e4), "sigma_min=10000.0"),
        (lambda: SubVP(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: VP(beta_min=-1.0), "`beta_min` and `beta_max`.*beta_min=-1.0"),
        (lambda: SubVP(beta_min=3.0, beta_max=2.0), "beta_min=3.0, beta_max=2.0"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("offset", [0.008, 0.1])
def test_angles_of_the_cosine_table_are_even_from_the_offset_to_a_right_angle(offset):
    """alpha = cos phi / cos phi_0 at phi = (u + s) / (1 + s) of a right angle."""
    process, u = DiscreteVP.cosine(100, offset), np.array([0.1, 0.5, 0.9])
    angle = (np.array([0.0, *u]) + offset) / (1 + offset) * np.pi / 2
    expected = np.cos(angle[1:]) / np.cos(angle[0])
    np.testing.assert_allclose(process.alpha(jnp.array(u)), expected, rtol=1e-4)


def test_outputs_between_two_steps_are_linear_in_the_noise_level():
    process = DiscreteVP.linear(10)
    for t in (0.15, 0.62, 0.97):
        low, weight = process.bracket(t)
        levels = [process.noise_level((low + k + 1) / 10) for k in (0, 1)]
        mean = (1 - weight) * levels[0] + weight * levels[1]
        np.testing.assert_allclose(mean, process.noise_level(t), rtol=1e-4)


def test_a_table_of_betas_may_go_down_at_some_steps():
    table = as_process([0.1, 0.3, 0.2, 0.4])
    assert table.betas == (0.1, 0.3, 0.2, 0.4)
    with pytest.raises(ValueError, match="must not decrease at every step"):
        as_process([0.4, 0.3, 0.2])
