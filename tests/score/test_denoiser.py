"""Score, denoiser and noise: Tweedie's formula with exact laws; preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.score.preconditioning import (
    SIGMA_SCORE,
    BoundedScore,
    precondition,
)
from numpyro_score.sde import tweedie
from tests.sde.test_sde import ONE_OF_EACH
from tests.targets import GAUSSIAN, MIXTURE

TIMES = jnp.array([0.1, 0.5, 0.9])


def noisy_points(law, sde):
    """Return x_t for every time: shape (times, points, dimensions)."""
    x0 = law.sample(jax.random.key(0), (20,))
    alpha, sigma = (s[:, None, None] for s in sde.marginal(TIMES))
    return alpha * x0 + sigma * jax.random.normal(jax.random.key(1), x0.shape)


def over_points(fn, sde, points):
    """Return fn(x, marginal) at all points and times."""

    def one(x, t):
        return fn(x, sde.marginal(t))

    return jax.jit(jax.vmap(jax.vmap(one, (0, None))))(points, TIMES)


@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("sde", ONE_OF_EACH, ids=lambda s: type(s).__name__)
def test_tweedie_on_exact_laws(sde, law):
    """Posterior mean by conjugacy and score by density agree with the conversions."""

    def errors(x, marginal):
        alpha, sigma = marginal
        denoised = law.denoised(x, alpha, sigma)
        score = jax.grad(law.log_density)(x, alpha, sigma)
        noise = tweedie.noise_from_denoised(x, denoised, marginal)
        unit = sigma * jnp.abs(score).max() + 1
        from_score = tweedie.denoised_from_score(x, score, marginal)
        from_denoised = tweedie.score_from_denoised(x, denoised, marginal)
        return jnp.stack(
            [
                jnp.abs(from_score - denoised).max() * alpha / sigma / unit,
                jnp.abs(from_denoised - score).max() * sigma / unit,
                jnp.abs(noise + sigma * score).max() / unit,
            ]
        )

    worst = over_points(errors, sde, noisy_points(law, sde)).max((0, 1))
    assert np.all(np.asarray(worst) < 1e-4)


def test_denoised_is_the_conditional_mean():
    """By regression: the residual x_0 - D is uncorrelated with functions of x_t."""
    alpha, sigma = 0.8, 0.6
    x0 = MIXTURE.sample(jax.random.key(2), (20_000,))
    x_t = alpha * x0 + sigma * jax.random.normal(jax.random.key(3), x0.shape)
    residual = x0 - jax.vmap(lambda x: MIXTURE.denoised(x, alpha, sigma))(x_t)
    for feature in (jnp.ones_like(x_t), x_t, jnp.sin(3 * x_t), x_t[:, ::-1] ** 2):
        product = np.asarray(residual * feature)
        z = product.mean(0) / (product.std(0) / np.sqrt(len(product)))
        assert np.all(np.abs(z) < 5)


# Preconditioning


def test_preconditioning_is_that_of_edm_above_the_score_level():
    """Karras et al. 2022, table 1, for data of unit standard deviation."""
    level = jnp.array([3.0, 10.0, 80.0])
    c = BoundedScore()(level)
    np.testing.assert_allclose(c.skip, 1 / (1 + level**2), rtol=1e-6)
    np.testing.assert_allclose(c.out, level / jnp.sqrt(1 + level**2), rtol=1e-3)
    np.testing.assert_allclose(c.input, 1 / jnp.sqrt(1 + level**2), rtol=1e-6)
    np.testing.assert_allclose(c.noise, jnp.log(level) / 4, rtol=1e-6)


def test_output_of_the_net_is_the_score_at_low_levels():
    """D = x + level^2 s to first order, so out / level^2 tends to a constant."""
    level = jnp.array([1e-4, 1e-3])
    c = BoundedScore()(level)
    scale = c.out / level**2
    np.testing.assert_allclose(scale, 1 / SIGMA_SCORE, rtol=1e-3)
    np.testing.assert_allclose(c.skip, 1.0, atol=1e-5)


@pytest.mark.parametrize("level", [0.02, 0.5, 5.0])
def test_a_silent_net_is_right_for_normal_data(level):
    x = jnp.array([0.3, -2.0])
    denoised = precondition(lambda x, noise: 0.0 * x, x, level)
    np.testing.assert_allclose(denoised, x / (1 + level**2), rtol=1e-5)


@pytest.mark.parametrize("level", [0.5, 2.0, 20.0])
def test_input_and_target_of_the_net_have_unit_variance(level):
    x0 = jax.random.normal(jax.random.key(4), (50_000,))
    x = x0 + level * jax.random.normal(jax.random.key(5), x0.shape)
    c = BoundedScore()(level)
    target = (x0 - c.skip * x) / c.out
    np.testing.assert_allclose(jnp.var(c.input * x), 1.0, rtol=0.03)
    np.testing.assert_allclose(jnp.var(target), 1.0, rtol=0.05)


def test_net_sees_scaled_input_and_logarithm_of_the_level():
    seen = {}

    def net(x, noise):
        seen.update(x=x, noise=noise)
        return x

    precondition(net, jnp.array([2.0]), 3.0)
    np.testing.assert_allclose(seen["x"], 2.0 / np.sqrt(10), rtol=1e-6)
    np.testing.assert_allclose(seen["noise"], np.log(3.0) / 4, rtol=1e-6)
