"""Learned sites as normal noise pushed through the probability flow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import reparam, seed, trace
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density

from numpyro_score import VE, ScoreDistribution, ScoreModel
from numpyro_score.data.support import Support
from numpyro_score.model.reparam import ProbabilityFlowReparam
from numpyro_score.solver import RK4, Ancestral, Geometric, UniPC
from tests.targets import MIXTURE, Gaussian

KEY = jax.random.key(0)
SDE = VE(0.02, 20.0)
BEND = 0.8
FLOW = ProbabilityFlowReparam()


def banana_density():
    """Return the score of x1 ~ N(0, 1), x2 = b (x1^2 - 1) + 0.3 n, as a mixture."""
    # x1 on quadrature nodes: given x1 everything is Gaussian at every noise level
    nodes, weights = np.polynomial.hermite_e.hermegauss(160)
    keep = weights > 1e-12
    x1, weights = jnp.array(nodes[keep]), jnp.array(weights[keep])
    spread = 0.1  # of the nodes in x1, far below its own scale

    def log_density(x, sigma):
        locs = jnp.stack([x1, BEND * (x1**2 - 1)], axis=1)
        variances = jnp.array([spread, 0.3]) ** 2 + sigma**2
        squares = jnp.square(x - locs) / variances + jnp.log(variances)
        return jax.nn.logsumexp(jnp.log(weights) - 0.5 * squares.sum(1))

    return log_density


@pytest.fixture(scope="module")
def banana():
    log_prior = banana_density()
    gradient = jax.grad(log_prior)
    score = ScoreModel.from_fn(lambda x, t: gradient(x, SDE.sigma(t)), SDE, (2,))
    return score, log_prior


def quadrature(log_prior, log_likelihood, size=400):
    """Return posterior means and variances of both coordinates on a grid."""
    grid = jnp.meshgrid(jnp.linspace(-4, 4, size), jnp.linspace(-3, 9, size))
    x = jnp.stack([g.ravel() for g in grid], axis=1)
    log_joint = jax.vmap(lambda x: log_prior(x, SDE.sigma_min) + log_likelihood(x))(x)
    weights = jax.nn.softmax(log_joint)
    mean = weights @ x
    return mean, weights @ jnp.square(x - mean)


@pytest.mark.slow
def test_nuts_samples_a_learned_prior_exactly(banana):
    score, log_prior = banana
    y, noise = 1.0, 0.5

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x[1], noise), obs=y)

    solver = UniPC()
    flow = ProbabilityFlowReparam(solver, Geometric()(SDE, 40))
    kernel = NUTS(reparam(model, config={"x": flow}))
    mcmc = MCMC(
        kernel,
        num_warmup=300,
        num_samples=1000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    mean, variance = quadrature(
        log_prior, lambda x: dist.Normal(x[1], noise).log_prob(y)
    )
    for values, expected in [(x, mean), ((x - np.asarray(mean)) ** 2, variance)]:
        ess = numpyro.diagnostics.effective_sample_size(values)
        assert (ess > 200).all()
        error = values.std((0, 1)) / np.sqrt(ess)
        z = (values.mean((0, 1)) - np.asarray(expected)) / error
        assert (np.abs(z) < 5).all(), z
    # without the prior's bend x1 would have mean 0 and variance 1: two modes here
    assert float(variance[0]) > 1.3
    assert mcmc.get_extra_fields()["diverging"].mean() < 1e-3


def gaussian_model():
    score = Gaussian((0.5, -1.0), (0.5, 1.5)).score_model(SDE)
    return ScoreDistribution(score)


def test_law_is_the_learned_one():
    fn = gaussian_model()
    noise = jnp.array([[0.0, 0.0], [1.0, -2.0]])
    # the flow of a Gaussian is affine: quantiles go to quantiles
    sd = jnp.sqrt(jnp.array([0.5, 1.5]) ** 2 + SDE.sigma_min**2)
    top = jnp.sqrt(jnp.array([0.5, 1.5]) ** 2 + SDE.sigma_max**2)
    mean = jnp.array([0.5, -1.0])
    expected = mean + sd / top * (SDE.prior_scale() * noise - mean)
    flow = ProbabilityFlowReparam(RK4(), Geometric()(SDE, 32))
    np.testing.assert_allclose(flow.forward(fn, noise), expected, atol=1e-3)


def test_noise_can_be_recovered():
    fn = ScoreDistribution(MIXTURE.score_model(SDE))
    flow = ProbabilityFlowReparam(RK4(), Geometric()(SDE, 100))
    noise = jax.random.normal(jax.random.key(0), (20, 2))
    back = flow.inverse(fn, flow.forward(fn, noise))
    np.testing.assert_allclose(back, noise, atol=0.01)


def test_plates_and_expansions_keep_their_shapes():
    fn = gaussian_model()

    def model():
        with numpyro.plate("rows", 3):
            numpyro.sample("x", fn)
        numpyro.sample("w", fn.expand([4]).to_event(1))

    flow = reparam(model, config={"x": FLOW, "w": FLOW})
    sites = trace(seed(flow, 0)).get_trace()
    assert sites["x"]["type"] == sites["w"]["type"] == "deterministic"
    assert sites["x"]["value"].shape == (3, 2)
    assert sites["w"]["value"].shape == (4, 2)
    log_joint, _ = log_density(seed(flow, 0), (), {}, {})
    bases = [sites[name]["value"] for name in ("x_base", "w_base")]
    expected = sum(float(dist.Normal().log_prob(b).sum()) for b in bases)
    assert float(log_joint) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_reparameterized_is_refused():
    with pytest.raises(TypeError, match="`solver` must solve the probability flow"):
        ProbabilityFlowReparam(Ancestral())
    with (
        pytest.raises(TypeError, match="Site 'x' must be a ScoreDistribution"),
        seed(rng_seed=0),
        reparam(config={"x": FLOW}),
    ):
        numpyro.sample("x", dist.Normal())
    with (
        pytest.raises(ValueError, match="Site 'x' is observed"),
        seed(rng_seed=0),
        reparam(config={"x": FLOW}),
    ):
        numpyro.sample("x", gaussian_model(), obs=jnp.zeros(2))


def test_data_with_a_support_stay_in_it():
    """The flow runs in unconstrained space: z = log x is a standard normal law."""
    sigma = VE().sigma
    normal = ScoreModel.from_fn(lambda x, t: -x / (1 + sigma(t) ** 2), VE(), (2,))
    positive = replace(normal, support=Support.of(constraints.positive, (2,)))
    noise = jnp.array([[0.3, -1.2], [2.0, 0.0]])
    x = FLOW.forward(ScoreDistribution(positive), noise)
    z = FLOW.forward(ScoreDistribution(normal), noise)
    np.testing.assert_allclose(x, jnp.exp(z), rtol=1e-5)
    back = FLOW.inverse(ScoreDistribution(positive), x)
    np.testing.assert_allclose(back, noise, atol=2e-2)


def test_simplex_is_drawn_from_noise_of_its_unconstrained_shape():
    sigma = VE().sigma
    normal = ScoreModel.from_fn(lambda x, t: -x / (1 + sigma(t) ** 2), VE(), (2,))
    shares = replace(normal, support=Support.of(constraints.simplex, (3,)))

    def model():
        numpyro.sample("x", ScoreDistribution(shares))

    sites = trace(seed(reparam(model, {"x": FLOW}), KEY)).get_trace()
    assert sites["x_base"]["value"].shape == (2,)
    assert abs(float(sites["x"]["value"].sum()) - 1) < 1e-5


@pytest.mark.parametrize("strategy", [LocScaleReparam(0), LocScaleReparam()])
def test_parameters_that_a_learned_law_does_not_have(strategy):
    def model():
        numpyro.sample("x", gaussian_model())

    with pytest.raises(AttributeError, match="ScoreDistribution has no `loc`"):
        trace(seed(reparam(model, {"x": strategy}), KEY)).get_trace()
    assert not hasattr(gaussian_model(), "loc")
