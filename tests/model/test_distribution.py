"""A learned law where NumPyro expects a distribution."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints, transforms
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_score import VE, VP, RectifiedFlow, ScoreDistribution
from tests.targets import (
    MIXTURE,
    STANDARD_NORMAL,
    Gaussian,
    assert_law,
    unchecked,
    z_scores,
)

SDE = VE(sigma_max=100.0)
KEY = jax.random.key(0)
X = jnp.array([[0.3, -0.5], [-1.4, -0.9], [2.0, 1.0]])


@pytest.fixture(scope="module")
def learned():
    return ScoreDistribution(MIXTURE.score_model(SDE), validate_args=True)


@pytest.fixture(scope="module")
def normal():
    return ScoreDistribution(STANDARD_NORMAL.score_model(SDE))


@jax.jit
def log_prob(distribution, x):
    return distribution.log_prob(x)


def exact(x, sigma=SDE.sigma_min):
    return jax.vmap(lambda x: MIXTURE.log_density(x, 1.0, sigma))(x)


def test_shapes_and_support(learned):
    assert (learned.batch_shape, learned.event_shape) == ((), (2,))
    assert learned.support.event_dim == 1
    assert bool(learned.support(X[0]))
    assert not bool(learned.support(X[0] * jnp.nan))
    assert learned.sample(KEY, (5, 3)).shape == (5, 3, 2)
    assert learned.sample(KEY).shape == (2,)


def test_density_is_the_exact_one(learned):
    np.testing.assert_allclose(log_prob(learned, X), exact(X), atol=5e-3)


def test_draws_follow_the_marginal_at_the_time_given(learned):
    draws = learned.sample(KEY, (4000,))
    assert_law(draws, MIXTURE, 1.0, SDE.sigma_min, slack=0.02)
    t = float(SDE.time(0.8))
    noisy = learned.marginal(t)
    assert_law(noisy.sample(KEY, (4000,)), MIXTURE, 1.0, 0.8, slack=0.02)
    np.testing.assert_allclose(log_prob(noisy, X), exact(X, 0.8), atol=5e-3)
    with pytest.raises(AssertionError):
        assert_law(draws, MIXTURE, 1.0, 0.8, slack=0.02)


def test_paths_that_shrink_data_do_not_shrink_their_law():
    """Straight paths have alpha = 1/(1 + r) at noise level r; data far from 0."""
    sde = RectifiedFlow(sigma_max=1000.0)
    score = Gaussian((5.0, 5.0), (0.2, 0.2)).score_model(sde)
    assert ScoreDistribution(score, t=0.3).score is score  # x_t, as it was asked for
    law = ScoreDistribution(score)
    assert law.score is ScoreDistribution(score).score
    sd = (0.2**2 + 0.01**2) ** 0.5
    x = jnp.array([[5.1, 4.8], [5.0, 5.4]])
    exact = dist.Normal(5.0, sd).expand([2]).to_event(1)
    np.testing.assert_allclose(law.log_prob(x), exact.log_prob(x), atol=0.05)
    slope = jax.grad(law.log_prob)(x[0])
    np.testing.assert_allclose(slope, (5.0 - x[0]) / sd**2, rtol=1e-3)
    draws = law.sample(KEY, (4000,))
    np.testing.assert_allclose(draws.mean(0), 5.0, atol=0.03)  # 4.95 with shrinkage
    preserving = STANDARD_NORMAL.score_model(VP())
    assert ScoreDistribution(preserving).score is preserving  # alpha is .99995


def test_gradient_is_the_score_and_hessian_its_jacobian(learned):
    gradient = jax.jit(jax.vmap(jax.grad(learned.log_prob)))(X)
    expected = jax.vmap(lambda x: MIXTURE.score(x, 1.0, SDE.sigma_min))(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(gradient, learned.score.score(X), rtol=1e-5, atol=1e-5)
    hessian = jax.jit(jax.hessian(learned.log_prob))(X[0])
    jacobian = jax.jacobian(learned.score.score)(X[0])
    np.testing.assert_allclose(hessian, jacobian, rtol=1e-4, atol=1e-4)


def test_gradient_agrees_with_differences_of_the_value(normal):
    """Value and gradient describe one law: no gradient beside a constant value."""
    h = 0.2
    ends = log_prob(normal, jnp.array([1.0 - h, 1.0 + h]))
    slope = jax.jit(jax.grad(normal.log_prob))(1.0)
    np.testing.assert_allclose((ends[1] - ends[0]) / (2 * h), slope, atol=5e-3)


def test_expanded(learned):
    expanded = learned.expand((4, 3))
    assert (expanded.batch_shape, expanded.event_shape) == ((4, 3), (2,))
    draws = expanded.sample(KEY, (2,))
    assert draws.shape == (2, 4, 3, 2)
    assert len(np.unique(draws[..., 0])) == draws[..., 0].size
    expected = jax.vmap(jax.vmap(exact))(draws)
    np.testing.assert_allclose(log_prob(expanded, draws), expected, atol=5e-3)


def test_to_event_sums(learned):
    event = learned.expand((3,)).to_event(1)
    assert (event.batch_shape, event.event_shape) == ((), (3, 2))
    np.testing.assert_allclose(log_prob(event, X), exact(X).sum(), atol=1e-2)


def test_mask_leaves_points_out(learned):
    masked = learned.expand((3,)).mask(jnp.array([True, False, True]))
    expected = jnp.array([1.0, 0.0, 1.0]) * exact(X)
    np.testing.assert_allclose(log_prob(masked, X), expected, atol=5e-3)


def test_transformed(learned):
    """log p(y) = log p(x) - log |det|, with y = exp(x)."""
    transformed = dist.TransformedDistribution(learned, transforms.ExpTransform())
    y = jnp.exp(X)
    expected = exact(X) - X.sum(-1)
    np.testing.assert_allclose(log_prob(transformed, y), expected, atol=5e-3)
    assert transformed.support.base_constraint is constraints.positive
    assert (transformed.sample(KEY, (6,)) > 0).all()


def model(y=None, num=3):
    distribution = ScoreDistribution(STANDARD_NORMAL.score_model(SDE))
    with numpyro.plate("rows", num):
        x = numpyro.sample("x", distribution)
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def test_plates_give_one_point_per_row():
    trace = handlers.trace(handlers.seed(model, KEY)).get_trace()
    x, y = trace["x"]["value"], trace["y"]["value"]
    assert x.shape == (3,)
    assert len(set(x.tolist())) == 3
    joint = jax.jit(lambda x, y: log_density(model, (y,), {}, {"x": x})[0])(x, y)
    expected = dist.Normal(0, 1).log_prob(x) + dist.Normal(x, 0.5).log_prob(y)
    np.testing.assert_allclose(joint, expected.sum(), atol=1e-2)


def test_subsampled_plate_scales_the_density(normal):
    def subsampled():
        with numpyro.plate("rows", 10, subsample_size=2):
            numpyro.sample("x", normal)

    x = jnp.array([0.5, -1.0])
    with handlers.seed(rng_seed=0):
        value, _ = log_density(subsampled, (), {}, {"x": x})
    expected = 5 * dist.Normal(0, 1).log_prob(x).sum()
    np.testing.assert_allclose(value, expected, atol=2e-2)


def test_predictive_draws_from_the_prior():
    draws = Predictive(model, num_samples=1500)(KEY)
    assert draws["x"].shape == (1500, 3)
    assert np.all(z_scores(draws["x"], 0.0, 0.02) < 5)
    assert np.all(z_scores(draws["y"] ** 2, 1.25, 0.03) < 5)


def test_distribution_is_a_pytree(learned):
    jitted = jax.jit(lambda d, key: d.sample(key, (3,)))(learned, KEY)
    np.testing.assert_allclose(jitted, learned.sample(KEY, (3,)), rtol=1e-4, atol=1e-5)
    ts = SDE.time(jnp.array([0.1, 0.8]))
    both = jax.vmap(lambda t: learned.marginal(t))(ts)
    densities = jax.jit(jax.vmap(lambda d: d.log_prob(X[0])))(both)
    expected = [float(exact(X[:1], sigma)[0]) for sigma in (0.1, 0.8)]
    np.testing.assert_allclose(densities, expected, atol=5e-3)


def test_values_are_validated_as_in_any_distribution(learned):
    with pytest.warns(UserWarning, match="Out-of-support"):
        learned.log_prob(X * jnp.nan)


@pytest.mark.parametrize("score", [None, lambda x, t: -x, dist.Normal(0, 1)])
def test_what_is_no_score_model_is_refused(score):
    with unchecked(), pytest.raises(TypeError, match="`score` must be a ScoreModel"):
        ScoreDistribution(score)


# Inference: prior Normal(0, 1) by its score, y = 2, sigma = 1, so Normal(1, 1/2) after


def conjugate(y, prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.slow
def test_variational_inference_finds_the_conjugate_posterior(normal):
    guide = AutoNormal(conjugate)
    svi = SVI(conjugate, guide, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=8))
    result = svi.run(KEY, 1500, 2.0, normal, progress_bar=False)
    draws = guide.sample_posterior(KEY, result.params, sample_shape=(4000,))["x"]
    assert abs(draws.mean() - 1.0) < 0.1
    assert abs(draws.var() - 0.5) < 0.1


def nuts_moments(prior):
    def model(y):  # MCMC hashes the model's arguments, and so would rebuild the prior
        conjugate(y, prior)

    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(KEY, 2.0)
    draws = mcmc.get_samples()["x"]
    return float(draws.mean()), float(draws.var())


@pytest.mark.slow
def test_nuts_with_a_learned_prior_is_right(normal):
    mean, variance = nuts_moments(normal)
    assert abs(mean - 1.0) < 0.12
    assert abs(variance - 0.5) < 0.12


@jax.custom_jvp
def fake_log_prob(x):
    return jnp.zeros_like(x)


fake_log_prob.defjvp(
    lambda primals, tangents: (0.0 * primals[0], -primals[0] * tangents[0])
)


@dataclass(frozen=True)
class FakePrior:
    """Makes the mutant: the right gradient beside a constant value."""

    def build(self):
        class Fake(dist.Distribution):
            support = constraints.real

            def sample(self, key, sample_shape=()):
                return jax.random.normal(key, sample_shape)

            def log_prob(self, value):
                return fake_log_prob(value)

        return Fake()


@pytest.mark.slow
def test_constant_value_with_a_gradient_ignores_the_prior():
    mean, _ = nuts_moments(FakePrior().build())
    assert mean > 1.6  # 2 is the likelihood's alone, 1 the posterior's


def test_the_process_is_that_of_the_score():
    """VP shrinks the signal: its marginal at t is alpha x_0 + sigma n."""
    sde = VP()
    noisy = ScoreDistribution(MIXTURE.score_model(sde), t=0.5)
    assert_law(noisy.sample(KEY, (4000,)), MIXTURE, *sde.marginal(0.5), slack=0.03)
