"""Amortized posteriors corrected by the model's density, and as starts for MCMC."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import multivariate_normal
from numpyro.infer import MCMC, NUTS

from numpyro_score import VE, ScoreLangevin, ScoreModel
from numpyro_score.infer import NPSE, AmortizedPosterior
from numpyro_score.infer.amortized.importance import NUM_STEPS, psis
from numpyro_score.score import solver_log_prob
from numpyro_score.solver import RK4, Geometric
from tests.npse_models import (
    NOISE_SD,
    PRIOR_MEAN,
    PRIOR_SD,
    A,
    exact_gaussian,
    gaussian_model,
    gaussian_posterior,
)
from tests.targets import Mixture

KEY = jax.random.key(0)
Y = np.array([1.0, 0.5, -1.5])
EVIDENCE = multivariate_normal.logpdf(
    Y, A @ PRIOR_MEAN, A @ np.diag(PRIOR_SD**2) @ A.T + NOISE_SD**2 * np.eye(3)
)


@pytest.fixture(scope="module")
def biased():
    """Posterior draws that are shifted and too wide, by known amounts."""
    mean, covariance = gaussian_posterior(Y)
    wrong = mean + np.array([0.3, -0.2]), 1.5 * covariance
    factor = np.linalg.cholesky(wrong[1])
    x = wrong[0] + np.random.default_rng(0).normal(size=(4000, 2)) @ factor.T
    log_q = multivariate_normal.logpdf(x, *wrong)
    simulator = NPSE(gaussian_model, "y").simulator()
    log_p = jax.vmap(simulator.log_joint, (0, None))(jnp.asarray(x), jnp.asarray(Y))
    return psis({"x": jnp.asarray(x)}, log_p - log_q)


def test_weights_correct_known_errors(biased):
    mean, covariance = gaussian_posterior(Y)
    assert biased.khat < 0.7
    assert 1000 < biased.ess < 3900
    weights = np.exp(biased.log_weights)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    sd = np.sqrt(np.diag(covariance))
    error = (weights @ np.asarray(biased.samples["x"]) - mean) / sd
    assert (np.abs(error) < 4.5 / np.sqrt(biased.ess)).all()
    again = biased.resample(jax.random.key(1), 4000)["x"]
    assert (np.abs((again.mean(0) - mean) / sd) < 6 / np.sqrt(biased.ess)).all()


def test_draws_that_do_not_repeat_themselves(biased):
    mean, covariance = gaussian_posterior(Y)
    few = np.asarray(biased.resample(KEY, 400, replace=False)["x"])
    assert len(np.unique(few, axis=0)) == 400
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs((few.mean(0) - mean) / sd) < 6 / np.sqrt(400)).all()
    with pytest.raises(ValueError, match="Got 4001 of 4000"):
        biased.resample(KEY, 4001, replace=False)


def test_evidence_and_its_error(biased):
    assert 1e-3 < biased.log_evidence_error < 0.05
    off = abs(biased.log_evidence - EVIDENCE)
    assert off < 4.5 * biased.log_evidence_error


def test_heavy_tails_are_reported():
    ratios = 1.2 * np.random.default_rng(0).exponential(size=500)  # k = 1.2
    ratios[0] = -np.inf
    with pytest.warns(UserWarning, match=r"Pareto k-hat is .*, above 0.7"):
        result = psis({"x": jnp.zeros(500)}, ratios)
    assert result.khat > 0.7


@pytest.mark.slow
def test_steps_of_the_density_suffice():
    law = Mixture(weights=(0.3, 0.7), locs=((-1.0, 0.0), (1.0, 0.5)), scales=(0.2, 0.4))
    sde = NPSE(gaussian_model, "y").sde
    score = law.score_model(sde)
    x = score.sample(KEY, (500,))
    ts = Geometric()(sde, NUM_STEPS)
    got = solver_log_prob(score, x, solver=RK4(), ts=ts)
    exact = jax.vmap(lambda x: law.log_density(x, *sde.marginal(sde.t_min)))(x)
    assert jnp.sqrt(jnp.square(got - exact).mean()) < 0.003


@pytest.mark.slow
def test_an_exact_posterior_needs_no_correction():
    result = exact_gaussian().importance(KEY, Y, 1000)
    assert result.khat < 0.5
    assert result.ess > 980
    assert abs(result.log_evidence - EVIDENCE) < 0.02


def scale_model(y=None):
    """Latents on supports, one of which is not learned."""
    loc = numpyro.sample("loc", dist.Uniform(-5.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(loc, scale).expand([8]).to_event(1), obs=y)


def untrained(latents):
    simulator = NPSE(scale_model, "y", latents).simulator()
    sde, size = VE(), simulator.latents.size
    score = ScoreModel.from_denoiser(
        lambda x, t, context=None: x / (1 + sde.sigma(t) ** 2), sde, (size,)
    )
    return AmortizedPosterior(score, simulator)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [NUTS, ScoreLangevin])
@pytest.mark.parametrize("latents", [None, "loc"])
def test_warm_starts_run_in_mcmc(kernel, latents):
    y = np.random.default_rng(0).normal(1.0, 0.5, size=8)
    starts = untrained(latents).warm_start(KEY, y, num_chains=2)
    assert {name: value.shape for name, value in starts.items()} == {
        "loc": (2,),
        "scale": (2,),
    }
    mcmc = MCMC(
        kernel(scale_model),
        num_warmup=300,
        num_samples=500,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), y, init_params=starts)
    draws = mcmc.get_samples()
    assert abs(draws["loc"].mean() - y.mean()) < 0.2
    assert (draws["scale"] > 0).all()


@pytest.mark.slow
def test_a_start_of_one_chain_has_no_leading_axis():
    starts = untrained("loc").warm_start(KEY, np.zeros(8))
    assert starts["loc"].shape == starts["scale"].shape == ()


def test_intractable_models_are_refused():
    posterior = replace(untrained("loc"), num_steps=2)
    with pytest.raises(ValueError, match=r"\['scale'\] are latent too"):
        posterior.importance(KEY, np.zeros(8))


def test_no_draw_with_a_density_is_an_error():
    with pytest.raises(ValueError, match="no draw of the posterior a positive density"):
        psis({"x": jnp.zeros(20)}, np.full(20, -np.inf))
