"""Posteriors given many observations, composed from the posteriors given one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score.data.standardize import Affine
from numpyro_score.infer.amortized.composition import (
    ComposedDenoiser,
    GaussianComposition,
    JacobianComposition,
    PosteriorFactors,
    _positive_part,
    inverse_covariance,
)
from numpyro_score.infer.amortized.prior_denoiser import factorized_prior_denoiser
from numpyro_score.infer.amortized.simulator import Simulator
from tests.npse_models import (
    NOISE_SD,
    PRIOR_MEAN,
    PRIOR_SD,
    A,
    ExactDenoiser,
    exact_gaussian,
    gaussian_posterior,
)

KEY = jax.random.key(0)
TRUTH = np.array([0.3, -1.0])
YS = TRUTH @ A.T + NOISE_SD * np.random.default_rng(0).normal(size=(30, 3))
LEVELS = (0.02, 0.3, 2.0, 30.0)
X = jnp.array([0.8, -2.5])
PRIOR_PRECISION = jnp.diag(PRIOR_SD**-2.0)
PRECISION = PRIOR_PRECISION + A.T @ A / NOISE_SD**2


def exact_denoised(x, level, ys):
    """E[x_0 | x_0 + level n = x, all ys], in float64."""
    mean, covariance = gaussian_posterior(ys)
    precision = np.linalg.inv(covariance)
    pull = precision @ mean + np.asarray(x, float) / level**2
    return np.linalg.solve(precision + np.eye(2) / level**2, pull)


def composed(composition, count):
    exact = ExactDenoiser()
    contexts = jnp.asarray(YS[:count], float)
    each = jnp.broadcast_to(PRECISION, (count, 2, 2))
    factors = PosteriorFactors(exact, exact, contexts, each, PRIOR_PRECISION)
    return ComposedDenoiser(factors, composition)


def sum_of_scores(x, level, count, prior_score):
    """The denoiser of the sum of scores, less n - 1 times a prior score."""
    exact = ExactDenoiser()
    scores = sum((exact(x, level, jnp.asarray(y)) - x) / level**2 for y in YS[:count])
    return x + level**2 * (scores - (count - 1) * prior_score(x, level))


def undiffused(x, level):
    return (PRIOR_MEAN - x) / PRIOR_SD**2


def diffused(x, level):
    return (ExactDenoiser()(x, level) - x) / level**2


def deviations(denoise, count):
    """Return errors of denoised points, in units of how far they are from x."""
    errors = []
    for level in LEVELS:
        exact = exact_denoised(X, level, YS[:count])
        got = np.asarray(denoise(X, level))
        errors.append(np.abs(got - exact).max() / np.abs(exact - X).max())
    return np.array(errors)


@pytest.mark.parametrize("composition", [GaussianComposition(), JacobianComposition()])
@pytest.mark.parametrize("count", [1, 30])
def test_composition_is_exact_for_gaussian_posteriors(composition, count):
    # float32 leaves 6e-5; a prior's precision without the noise's, 2e-2
    assert (deviations(composed(composition, count), count) < 1e-3).all()


@pytest.mark.parametrize("prior_score", [undiffused, diffused])
@pytest.mark.parametrize("count", [5, 30])
def test_sums_of_scores_are_wrong(prior_score, count):
    """The mutant: what the score at t = 0 suggests, used at all levels."""

    def denoise(x, level):
        return sum_of_scores(x, level, count, prior_score)

    errors = deviations(denoise, count)
    assert errors[0] < 0.3  # nearly right at low noise
    assert (errors[1:] > 0.3).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("composition", "count"),
    [
        pytest.param(GaussianComposition(), 1, marks=pytest.mark.long),
        pytest.param(GaussianComposition(), 5, marks=pytest.mark.long),
        (GaussianComposition(), 30),
        pytest.param(JacobianComposition(), 30, marks=pytest.mark.long),
    ],
)
def test_draws_given_many_observations_follow_the_closed_form(composition, count):
    posterior, ys = exact_gaussian(), YS[:count]
    draws = posterior.sample_plate(KEY, ys, 4000, composition=composition)["x"]
    mean, covariance = gaussian_posterior(ys)
    sd = np.sqrt(np.diag(covariance))
    noise = 1 / np.sqrt(4000)
    assert (np.abs(draws.mean(0) - mean) / sd < 4.5 * noise + 0.05).all()
    ratio = draws.var(0) / np.diag(covariance)
    assert (np.abs(ratio - 1) < 4.5 * np.sqrt(2) * noise + 0.08).all()


@pytest.mark.slow
def test_a_learned_prior_score_serves_as_well():
    posterior, ys = exact_gaussian(), YS[:5]
    draws = posterior.sample_plate(KEY, ys, 4000, learned_prior=True)["x"]
    mean, covariance = gaussian_posterior(ys)
    error = np.abs(draws.mean(0) - mean) / np.sqrt(np.diag(covariance))
    assert (error < 4.5 / np.sqrt(4000) + 0.05).all()


# The prior's denoiser


def mixed_prior():
    numpyro.sample("a", dist.Normal(1.0, 2.0))
    numpyro.sample("b", dist.Uniform(-1.0, 3.0))
    scale = numpyro.sample("c", dist.HalfNormal(0.5))
    numpyro.sample("y", dist.Normal(0.0, scale))


@pytest.fixture(scope="module")
def prior():
    standardize = Affine(jnp.array([1.0, 0.0, -1.0]), jnp.array([2.0, 1.8, 1.1]))
    simulator = Simulator.of(mixed_prior, "y")
    draws = simulator.draw_latents(jax.random.split(KEY, 2000))
    return factorized_prior_denoiser(simulator, standardize, draws)


@pytest.mark.parametrize("level", [0.01, 0.5, 3.0, 80.0])
def test_prior_denoiser_is_the_posterior_mean(prior, level):
    """Against sums over a long fine grid, in float64."""
    denoiser = prior
    x = jnp.array([0.7, -1.2, 0.4]) * np.sqrt(1 + level**2)
    got = np.asarray(denoiser(x, level))
    exact = float(x[0]) / (1 + level**2)
    assert abs(got[0] - exact) < 1e-3 * level + 1e-5
    grid = np.linspace(-30, 30, 600_001)
    uniform = 1.8 * grid  # logit of a uniform has a logistic law
    half_normal = -1.0 + 1.1 * grid  # log of a half normal
    logs = (
        -np.abs(uniform) - 2 * np.log1p(np.exp(-np.abs(uniform))),
        half_normal - np.exp(2 * np.clip(half_normal, -40, 10)) / (2 * 0.5**2),
    )
    for i, log_density in enumerate(logs, 1):
        log_weight = log_density - (grid - float(x[i])) ** 2 / (2 * level**2)
        weight = np.exp(log_weight - log_weight.max())
        exact = (weight * grid).sum() / weight.sum()
        assert abs(got[i] - exact) < 2e-3 * level + 1e-4


def hierarchical():
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(loc, 0.5))
    numpyro.sample("y", dist.Normal(loc, 1.0))


@pytest.mark.parametrize("latents", [None, "x"])
def test_priors_that_are_no_products_are_refused(latents):
    """Sites that depend on each other, or on one that is integrated out."""
    simulator = Simulator.of(hierarchical, "y", latents)
    draws = simulator.draw_latents(jax.random.split(KEY, 100))
    with pytest.raises(ValueError, match="prior that is a product"):
        factorized_prior_denoiser(
            simulator, Affine.identity((simulator.latents.size,)), draws
        )


def test_precisions_are_inverses_of_covariances_without_their_negative_part():
    u = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    exact = np.diag([3 / 2, 3 / 8])  # of n - 1 = 3
    np.testing.assert_allclose(inverse_covariance(u), exact, rtol=1e-4, atol=1e-6)
    turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    found = _positive_part(turn @ jnp.diag(jnp.array([2.0, -3.0])) @ turn.T)
    np.testing.assert_allclose(found, 2 * np.outer(turn[:, 0], turn[:, 0]), atol=1e-5)
