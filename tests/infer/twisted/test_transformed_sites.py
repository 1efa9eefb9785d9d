"""Learned sites under transforms, in the samplers that add noise to them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions.transforms import AffineTransform, ExpTransform
from numpyro.infer import MCMC

from numpyro_score import AnnealedLangevin
from numpyro_score.infer import ParticleMetropolis, to_datatree
from numpyro_score.model.reparam import separate_transforms
from tests.infer.twisted.problems import learned, scalar


def moved(y):
    """x of N(10, 2^2), y = 11 with noise 1."""
    law = dist.TransformedDistribution(learned(), AffineTransform(10.0, 2.0))
    x = numpyro.sample("x", law)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def latent_location(y):
    """x of N(q, 1), q of N(0, 1), y = 3 with noise 1."""
    q = numpyro.sample("q", dist.Normal(0.0, 1.0))
    law = dist.TransformedDistribution(learned(), AffineTransform(q, 1.0))
    x = numpyro.sample("x", law)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def log_normal_in_a_plate(y):
    """log x of N(1, .5^2), log y with noise .5: two of them."""
    transforms = [AffineTransform(1.0, 0.5), ExpTransform()]
    with numpyro.plate("i", 2):
        x = numpyro.sample("x", dist.TransformedDistribution(learned(), transforms))
        numpyro.sample("y", dist.LogNormal(jnp.log(x), 0.5), obs=y)


# model, observation, moments of x (of its log for the last), log evidence
CASES = [
    (moved, 11.0, 10.8, 0.8**0.5, dist.Normal(10.0, 5**0.5).log_prob(11.0)),
    (latent_location, 3.0, 2.0, (2 / 3) ** 0.5, dist.Normal(0.0, 3**0.5).log_prob(3.0)),
    (
        log_normal_in_a_plate,
        jnp.array([2.0, 8.0]),
        0.5 + 0.5 * np.log([2.0, 8.0]),
        0.125**0.5,
        dist.LogNormal(1.0, 0.5**0.5).log_prob(jnp.array([2.0, 8.0])).sum(),
    ),
]


@pytest.mark.parametrize(("model", "y", "mean", "sd", "log_evidence"), CASES)
def test_noise_is_added_before_the_transform(model, y, mean, sd, log_evidence):
    inference = scalar(model, y, num_moves=0)  # moves would mend a wrong start
    x = inference.get_samples()["x"]
    x = jnp.log(x) if model is log_normal_in_a_plate else x
    np.testing.assert_allclose(x.mean(0), mean, atol=0.15 * sd)
    np.testing.assert_allclose(x.std(0), sd, rtol=0.1)
    assert abs(inference.log_evidence - log_evidence) < 0.1


def test_chains_see_a_latent_location():
    kernel = ParticleMetropolis(latent_location, num_particles=64, levels=30)
    mcmc = MCMC(kernel, num_warmup=10, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(0), 3.0)
    samples = mcmc.get_samples()
    for name, mean in (("x", 2.0), ("q", 1.0)):
        assert abs(samples[name].mean() - mean) < 0.2
        assert samples[name].std() == pytest.approx((2 / 3) ** 0.5, rel=0.2)
    np.testing.assert_allclose(
        samples["x"], samples["q"] + samples["x_base"], atol=1e-5
    )
    assert set(to_datatree(mcmc)["posterior"].data_vars) == {"q", "x", "x_base"}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "y", "mean", "sd", "log_evidence"), CASES[1:])
def test_annealing_adds_noise_before_the_transform(model, y, mean, sd, log_evidence):
    mcmc = MCMC(
        AnnealedLangevin(model),
        num_warmup=300,
        num_samples=20,
        num_chains=500,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), y)
    x = mcmc.get_samples()["x"]
    x = jnp.log(x) if model is log_normal_in_a_plate else x
    np.testing.assert_allclose(x.mean(0), mean, atol=0.15 * sd)
    np.testing.assert_allclose(x.std(0), sd, rtol=0.1)
    state = mcmc.last_state
    assert abs(state.log_evidence - log_evidence) < 4 * state.log_evidence_error
    assert state.log_evidence_error < 0.2


def exponential(y):
    law = dist.TransformedDistribution(learned(), ExpTransform())
    numpyro.sample("y", dist.Normal(numpyro.sample("x", law), 1.0), obs=y)


def test_sites_whose_transform_is_that_of_their_support_keep_their_name():
    assert set(scalar(exponential, 2.0, num_samples=10).get_samples()) == {"x"}


def test_separated_models_are_equal_if_the_models_are():
    one, other = separate_transforms(moved), separate_transforms(exponential)
    assert one == separate_transforms(moved) == separate_transforms(one)
    assert hash(one) == hash(separate_transforms(moved))
    assert one != other
    assert one.__name__ == "moved"
