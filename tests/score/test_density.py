"""Densities by the probability flow, against exact ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, RectifiedFlow, SubVP
from numpyro_score.data.standardize import Affine
from numpyro_score.score import density
from numpyro_score.score.density import bits_per_dimension, solver_log_prob
from numpyro_score.solver import (
    RK4,
    AdamsBashforth,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Geometric,
    Heun,
    UniPC,
)
from tests.targets import GAUSSIAN, MIXTURE, Gaussian, z_scores

WIDE = VE(sigma_max=500.0)  # the prior is off by about mean / sigma_max nats


def points(law, sde, t, num=20):
    """Return draws of the law at time t."""
    alpha, sigma = sde.marginal(t)
    x0 = law.sample(jax.random.key(0), (num,))
    return alpha * x0 + sigma * jax.random.normal(jax.random.key(1), x0.shape)


def exact(law, sde, x, t):
    alpha, sigma = sde.marginal(t)
    return jax.vmap(lambda x: law.log_density(x, alpha, sigma))(x)


@pytest.mark.parametrize(
    ("sde", "law"),
    [
        (WIDE, GAUSSIAN),
        (WIDE, MIXTURE),
        (VP(), MIXTURE),
        (SubVP(), MIXTURE),
        (RectifiedFlow(), MIXTURE),
    ],
    ids=lambda v: type(v).__name__,
)
def test_density_is_the_exact_one(sde, law):
    x = points(law, sde, sde.t_min)
    # at the default of 1e-4, rounding decides which of a dozen steps are accepted
    density = law.score_model(sde).log_prob(x, rtol=1e-5, atol=1e-5)
    atol = 5e-3 if sde is WIDE else 1e-3
    np.testing.assert_allclose(density, exact(law, sde, x, sde.t_min), atol=atol)


def test_density_at_other_times():
    sde = VP()
    model, ts = MIXTURE.score_model(sde), jnp.array([0.05, 0.3, 0.6, 1.0])
    x = jnp.stack([points(MIXTURE, sde, t, 3) for t in ts])
    density = model.log_prob(x, ts[:, None])
    expected = jnp.stack(
        [exact(MIXTURE, sde, *pair) for pair in zip(x, ts, strict=True)]
    )
    np.testing.assert_allclose(density, expected, atol=5e-3)
    np.testing.assert_allclose(model.log_prob(x[1], ts[1]), expected[1], atol=5e-3)


@pytest.mark.parametrize(
    "law",
    [Gaussian(0.5, 2.0), Gaussian(((0.0, 0.5), (-0.5, 0.2)), ((1.0, 0.5), (0.8, 1.2)))],
    ids=lambda law: str(law.event_shape),
)
def test_density_of_any_event_shape(law):
    x = law.sample(jax.random.key(2), (2, 3))
    density = law.score_model(WIDE).log_prob(x)
    assert density.shape == (2, 3)
    sigma = WIDE.sigma_min
    expected = jax.vmap(jax.vmap(lambda x: law.log_density(x, 1.0, sigma)))(x)
    np.testing.assert_allclose(density, expected, atol=5e-3)


GRID = jnp.stack(jnp.meshgrid(*[jnp.linspace(-4, 4, 50)] * 2), -1).reshape(-1, 2)
CELL = (8 / 49) ** 2
BASE = MIXTURE.score_model(VP(sigma_min=0.1))
MOVED = dataclasses.replace(
    BASE, standardize=Affine(jnp.array([3.0, -2.0]), jnp.array([100.0, 0.01]))
)


def mass(model, divergence=None):
    """Return the integral of the density over a grid that holds nearly all of it."""
    scale = model.standardize.scale
    x = model.standardize.loc + scale * GRID
    density = jnp.exp(model.log_prob(x, divergence=divergence))
    return float(density.sum() * CELL * scale.prod())


@pytest.mark.parametrize("model", [BASE, MOVED], ids=["unit scale", "other units"])
def test_density_integrates_to_one(model):
    assert abs(mass(model) - 1) < 5e-3


class ForgetfulAffine(Affine):
    """A mutant whose Jacobian is left out of densities."""

    def log_abs_det_jacobian(self):
        return jnp.zeros(())


jax.tree_util.register_dataclass(ForgetfulAffine, ["loc", "scale"], [])


@dataclasses.dataclass(frozen=True)
class FlippedTrace(density.ExactDivergence):
    """A mutant with the sign of the trace wrong."""

    def scale(self, size):
        return -super().scale(size)


def test_forgotten_jacobian_is_caught():
    affine = ForgetfulAffine(MOVED.standardize.loc, 100 * jnp.ones(2))
    mutant = dataclasses.replace(MOVED, standardize=affine)
    assert mass(mutant) > 100


def test_trace_of_the_wrong_sign_is_caught():
    assert abs(mass(BASE, FlippedTrace()) - 1) > 0.5


# Hutchinson's estimate

MATRIX = jax.random.normal(jax.random.key(3), (6, 6)) / 2
COVARIANCE = MATRIX @ MATRIX.T + 0.3 * jnp.eye(6)


def denoise(x, level):
    """Return the denoiser of Normal(0, COVARIANCE), whose Jacobian is not diagonal."""
    return COVARIANCE @ jnp.linalg.solve(COVARIANCE + level**2 * jnp.eye(6), x)


@dataclasses.dataclass(frozen=True)
class Signs:
    """Given probes, which may be traced."""

    vectors: jax.Array

    def probes(self, size):
        return self.vectors

    def scale(self, size):
        return 1.0


def test_hutchinson_is_unbiased_for_a_correlated_law():
    x = jnp.linspace(-1.0, 1.0, 6)
    signs = jax.random.rademacher(jax.random.key(4), (400, 1, 6), float)

    def log_density(vectors):
        return density.flow_log_density(
            denoise, x, 0.05, 50.0, divergence=Signs(vectors), rtol=1e-3, atol=1e-3
        )

    values = jax.jit(jax.vmap(log_density))(signs)
    covariance = np.asarray(COVARIANCE + 0.05**2 * jnp.eye(6), float)
    quadratic = np.asarray(x) @ np.linalg.solve(covariance, np.asarray(x))
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    assert values.std() > 0.05  # one probe is noisy
    assert z_scores(values, -0.5 * (quadratic + log_det), 0.02) < 5


def test_frozen_probes_make_the_density_deterministic():
    model = GAUSSIAN.score_model(WIDE)
    frozen = density.HutchinsonDivergence(num_probes=4)
    one = model.log_prob(jnp.ones(2), divergence=frozen)
    again = model.log_prob(
        jnp.ones(2), divergence=density.HutchinsonDivergence(num_probes=4)
    )
    assert float(one) == float(again)
    # signs give the trace of a diagonal Jacobian without error
    np.testing.assert_allclose(one, model.log_prob(jnp.ones(2)), atol=1e-3)


def test_probes_are_signs_that_differ_by_seed():
    one = density.HutchinsonDivergence(num_probes=100).probes(10)
    assert one.shape == (100, 10)
    np.testing.assert_array_equal(jnp.abs(one), 1.0)
    assert abs(one.mean()) < 5 / np.sqrt(1000)
    other = density.HutchinsonDivergence(num_probes=100, seed=1).probes(10)
    assert not np.array_equal(one, other)


def test_exact_trace_and_many_probes_agree():
    x = jnp.ones(6)
    denoised, trace = density.denoise_and_divergence(
        denoise, x, 0.5, density.ExactDivergence()
    )
    np.testing.assert_allclose(denoised, denoise(x, 0.5), rtol=1e-5)
    expected = jnp.trace(jax.jacobian(lambda x: denoise(x, 0.5))(x))
    np.testing.assert_allclose(trace, expected, rtol=1e-5)
    probes = density.HutchinsonDivergence(num_probes=20_000)
    _, estimate = density.denoise_and_divergence(denoise, x, 0.5, probes)
    np.testing.assert_allclose(estimate, expected, atol=0.1)


def test_no_probe_is_refused():
    with pytest.raises(
        ValueError, match=r"`num_probes` must be an integer of at least 1.*Got 0"
    ):
        density.HutchinsonDivergence(num_probes=0)


# Failure


def test_density_that_cannot_be_integrated_is_nan():
    """Tolerances below the precision of numbers need more steps than allowed."""
    model = MIXTURE.score_model(WIDE)
    assert np.isnan(model.log_prob(jnp.ones(2), rtol=1e-12, atol=1e-12))


def test_second_density_compiles_nothing():
    traces = []

    def score_fn(x, t):
        traces.append(t)
        return GAUSSIAN.score(x, *WIDE.marginal(t))

    model = type(BASE).from_fn(score_fn, WIDE, (2,))
    model.log_prob(jnp.zeros((3, 2)))
    before = len(traces)
    model.log_prob(jnp.ones((3, 2)))
    assert len(traces) == before


@pytest.mark.parametrize(
    ("solver", "bound"),
    [
        (DPMSolverPP(2), 0.01),
        *(
            pytest.param(solver, bound, marks=pytest.mark.slow)
            for solver, bound in [
                (Euler(), 0.15),
                (Heun(), 0.01),
                (RK4(), 1e-3),
                (AdamsBashforth(3), 5e-3),
                (UniPC(2), 2e-3),
            ]
        ),
    ],
    ids=lambda v: str(v),
)
def test_every_route_of_the_flow_has_its_density(solver, bound):
    sde = VP()
    score, x = MIXTURE.score_model(sde), points(MIXTURE, sde, sde.t_min)
    ts = Geometric()(sde, 128)
    error = solver_log_prob(score, x, solver=solver, ts=ts) - exact(
        MIXTURE, sde, x, sde.t_min
    )
    assert jnp.sqrt((error**2).mean()) < bound


def test_density_by_a_solver_in_units_of_data_and_with_probes():
    sde, scale = VE(), Affine(jnp.array([1.0, -1.0]), jnp.array([3.0, 0.5]))
    unit = MIXTURE.score_model(sde)
    score = dataclasses.replace(unit, standardize=scale)
    x = scale.inverse(points(MIXTURE, sde, sde.t_min))
    ts = Geometric()(sde, 64)
    value = solver_log_prob(score, x, solver=RK4(), ts=ts)
    np.testing.assert_allclose(value, score.log_prob(x), atol=5e-3)
    # in two dimensions the mean over all sign vectors is the trace itself
    signs = density.HutchinsonDivergence(num_probes=256)
    probed = solver_log_prob(score, x, solver=RK4(), ts=ts, divergence=signs)
    assert 0 < jnp.abs(probed - value).max() < 0.5


def test_density_by_a_solver_at_a_time_where_the_signal_is_small():
    sde = VP()
    t = sde.time(1.5)
    ts = sde.time(jnp.geomspace(sde.sigma_max, 1.5, 65))
    x = points(MIXTURE, sde, t)
    value = solver_log_prob(MIXTURE.score_model(sde), x, solver=RK4(), ts=ts)
    assert sde.alpha(t) < 0.6
    np.testing.assert_allclose(value, exact(MIXTURE, sde, x, t), atol=2e-3)


def test_density_by_a_solver_with_noise_is_refused():
    with pytest.raises(TypeError, match="cannot be run backwards"):
        solver_log_prob(MIXTURE.score_model(VE()), jnp.zeros(2), solver=EulerMaruyama())


def test_bits_per_dimension():
    """Pixels that are even over 2 of 256 values carry one bit each."""
    log_density = jnp.log(jnp.array(128.0)) * 3
    bits = bits_per_dimension(log_density, 3, bin_width=1 / 256)
    np.testing.assert_allclose(bits, 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="`bin_width` must be positive"):
        bits_per_dimension(log_density, 3, bin_width=0.0)
