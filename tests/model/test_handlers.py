"""A model seen through noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import transforms
from numpyro.infer.util import log_density

from numpyro_score import VE, VP, ScoreDistribution
from numpyro_score.model.handlers import noise_level
from tests.targets import GAUSSIAN, z_scores

A = jnp.array([[1.0, -0.5], [0.3, 0.8], [0.0, 1.0]])
Y = jnp.array([0.4, -1.0, 0.7])
NOISE = 0.3
MEAN, SD = jnp.array(GAUSSIAN.mean), jnp.array(GAUSSIAN.sd)


def make_model(sde, y=Y):
    learned = ScoreDistribution(GAUSSIAN.score_model(sde))

    def model():
        numpyro.sample("s", dist.HalfNormal(2.0))
        x = numpyro.sample("x", learned)
        seen = numpyro.deterministic("seen", x)
        numpyro.sample("y", dist.Normal(A @ seen, NOISE).to_event(1), obs=y)

    return model


def reverse_step(sde, t):
    """Return (a, q, v) with x_t = a z + sqrt(q) n for z of the learned law, variance v.

    The learned law is that at the lowest noise level, which is the model's prior.
    """
    alpha, sigma = sde.marginal(t)
    alpha_0, sigma_0 = sde.marginal(sde.t_min)
    a = alpha / alpha_0
    return a, sigma**2 - (a * sigma_0) ** 2, (alpha_0 * SD) ** 2 + sigma_0**2


def expected_point(x, sde, t):
    """Return E[z | x_t = x], by conjugacy."""
    a, q, v = reverse_step(sde, t)
    mean = sde.alpha(sde.t_min) * MEAN
    return (mean / v + a * x / q) / (1 / v + a**2 / q)


def traced(model, values=None):
    seeded = handlers.seed(model, 0)
    if values is not None:
        seeded = handlers.substitute(seeded, data=values)
    return handlers.trace(seeded).get_trace()


@pytest.mark.parametrize("sde", [VE(), VP()], ids=lambda s: type(s).__name__)
def test_noisy_point_is_recorded_and_the_denoised_one_used(sde):
    t = sde.time(0.7)
    trace = traced(noise_level(make_model(sde), t))
    x = trace["x"]["value"]
    expected = expected_point(x, sde, t)
    np.testing.assert_allclose(trace["seen"]["value"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(trace["seen"]["value"] - x).max() > 1e-2


def test_noisy_point_has_the_marginal_law():
    sde = VE()
    t = sde.time(0.7)
    model = make_model(sde)

    def draw(key):
        noisy = handlers.seed(noise_level(model, t), key)
        return handlers.trace(noisy).get_trace()["x"]["value"]

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 2000))
    variance = SD**2 + 0.7**2
    assert np.all(z_scores(draws, MEAN, 0.02) < 5)
    assert np.all(z_scores((draws - MEAN) ** 2, variance, 0.03 * variance) < 5)


@pytest.mark.parametrize("sde", [VE(), VP()], ids=lambda s: type(s).__name__)
def test_gradient_of_the_likelihood_goes_through_the_denoiser(sde):
    """The term of diffusion posterior sampling in closed form for a Gaussian.

    With D(x) linear of slope J = a v / (a^2 v + q) per coordinate, it is
    J A^T (y - A D) / noise^2; the prior's gradient is the score at t.
    """
    t = sde.time(0.7)
    alpha, sigma = sde.marginal(t)
    noisy = noise_level(make_model(sde), t)
    x, s = jnp.array([0.9, -0.2]), jnp.array(1.0)

    def joint(x):
        return log_density(noisy, (), {}, {"x": x, "s": s})[0]

    a, q, v = reverse_step(sde, t)
    slope = a * v / (a**2 * v + q)
    residual = Y - A @ expected_point(x, sde, t)
    guidance = slope * (A.T @ residual) / NOISE**2
    expected = guidance + GAUSSIAN.score(x, alpha, sigma)
    np.testing.assert_allclose(jax.jit(jax.grad(joint))(x), expected, rtol=2e-3)
    without_jacobian = A.T @ residual / NOISE**2 + GAUSSIAN.score(x, alpha, sigma)
    assert np.abs(without_jacobian / expected - 1).max() > 0.1


def test_ordinary_and_observed_sites_are_untouched():
    sde = VE()
    model = make_model(sde)
    values = {"s": jnp.array(1.3), "x": jnp.array([0.5, 0.5])}
    plain = traced(model, values)
    noisy = traced(noise_level(model, sde.time(0.7)), values)
    assert plain["s"]["fn"] is not None
    assert float(noisy["s"]["value"]) == float(plain["s"]["value"])
    assert type(noisy["s"]["fn"]) is type(plain["s"]["fn"])
    np.testing.assert_array_equal(noisy["y"]["value"], Y)
    assert set(noisy) == set(plain)


def test_observed_learned_site_is_data_without_noise():
    sde = VE()
    learned = ScoreDistribution(GAUSSIAN.score_model(sde))

    def model():
        x = numpyro.sample("x", learned, obs=jnp.array([1.0, 2.0]))
        numpyro.deterministic("seen", x)

    trace = traced(noise_level(model, sde.time(0.7)))
    np.testing.assert_array_equal(trace["seen"]["value"], [1.0, 2.0])


@pytest.mark.parametrize("sde", [VE(), VP()], ids=lambda s: type(s).__name__)
def test_lowest_level_is_the_default_and_the_model_itself(sde):
    values = {"s": jnp.array(1.0), "x": jnp.array([0.5, -0.4])}
    trace = traced(noise_level(make_model(sde)), values)
    np.testing.assert_allclose(trace["seen"]["value"], values["x"], rtol=1e-5)


def test_time_may_be_traced():
    sde = VE()
    model = make_model(sde)
    values = {"s": jnp.array(1.0), "x": jnp.array([0.5, -0.4])}

    @jax.jit
    def seen(t):
        return traced(noise_level(model, t), values)["seen"]["value"]

    for level in (0.1, 2.0):
        t = sde.time(level)
        expected = expected_point(values["x"], sde, t)
        np.testing.assert_allclose(seen(t), expected, rtol=1e-3)


def test_plates_and_masks_are_kept():
    sde = VE()
    learned = ScoreDistribution(GAUSSIAN.score_model(sde))

    def model():
        with numpyro.plate("rows", 3):
            x = numpyro.sample("x", learned.mask(jnp.array([True, True, False])))
            numpyro.deterministic("seen", x)

    t = sde.time(0.7)
    trace = traced(noise_level(model, t))
    x = trace["x"]["value"]
    assert x.shape == (3, 2)
    expected = expected_point(x, sde, t)
    np.testing.assert_allclose(trace["seen"]["value"], expected, rtol=1e-3)
    assert float(trace["x"]["fn"].log_prob(x)[2]) == 0.0


def test_transformed_learned_site_is_refused():
    learned = ScoreDistribution(GAUSSIAN.score_model(VE()))

    def model():
        transformed = dist.TransformedDistribution(learned, transforms.ExpTransform())
        numpyro.sample("x", transformed)

    message = "Site 'x' transforms a ScoreDistribution"
    with pytest.raises(TypeError, match=message):
        traced(noise_level(model, 0.5))
