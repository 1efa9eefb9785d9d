"""The kinds of models on which NumPyro tests its own kernels, here with ours.

Every model is run by every kernel of the package and held against what is known of its
posterior, in closed form or by the parameters that made the data.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC, init_to_value
from numpyro.infer.reparam import TransformReparam

from numpyro_score import AnnealedLangevin, ScoreLangevin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals"),
    pytest.mark.filterwarnings("ignore:Some donated buffers"),  # NumPyro's
]

KERNELS: dict[str, Callable] = {
    "ScoreLangevin": ScoreLangevin,
    "AnnealedLangevin": partial(AnnealedLangevin, levels=5, num_steps=8, friction=0.5),
}
KEY = jax.random.key(0)


@pytest.fixture(params=KERNELS)
def make(request) -> Callable:
    return KERNELS[request.param]


def run(kernel: Any, *args: Any, **options: Any) -> MCMC:
    start = options.pop("init_params", None)
    defaults = {
        "num_warmup": 600,
        "num_samples": 1500,
        "num_chains": 4,
        "chain_method": "vectorized",
        "progress_bar": False,
    }
    mcmc = MCMC(kernel, **(defaults | options))
    mcmc.run(KEY, *args, init_params=start)
    return mcmc


def draws_of(kernel: Any, *args: Any, **options: Any) -> dict[str, Any]:
    return run(kernel, *args, **options).get_samples()


# laws in closed form


@pytest.mark.parametrize("num_steps", [1, 8])
def test_normal_known_up_to_a_constant(num_steps):
    kernel = ScoreLangevin(
        potential_fn=lambda z: 0.5 * jnp.sum(((z - 1.0) / 2.0) ** 2),
        num_steps=num_steps,
    )
    draws = run(kernel, init_params=jnp.zeros((4, 1))).get_samples()
    assert float(draws.mean()) == pytest.approx(1.0, abs=0.2)
    assert float(draws.std()) == pytest.approx(2.0, abs=0.2)


def test_correlated_normal(make):
    covariance = jnp.array([[6.0, 5.7], [5.7, 6.0]])

    def model():
        numpyro.sample("x", dist.MultivariateNormal(jnp.array([1.0, -1]), covariance))

    x = draws_of(make(model, dense_mass=True))["x"]
    assert np.allclose(x.mean(0), [1.0, -1.0], atol=0.3)
    assert np.allclose(np.cov(x.T), covariance, rtol=0.2)


def test_improper_location(make):
    data = dist.Normal(2.0, 0.1).sample(KEY, (50,))

    def model(data):
        loc = numpyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(loc, 0.1), obs=data)

    start = {"loc": jnp.linspace(1.0, 3.0, 4)}
    draws = draws_of(make(model), data, init_params=start)["loc"]
    assert float(draws.mean()) == pytest.approx(float(data.mean()), abs=0.01)
    assert float(draws.std()) == pytest.approx(0.1 / 50**0.5, rel=0.15)


def test_beta_bernoulli(make):
    def model(data):
        p = numpyro.sample("p", dist.Beta(1.1, 1.1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(p).to_event(1), obs=data)

    data = dist.Bernoulli(jnp.array([0.9, 0.1])).sample(KEY, (1000,))
    draws = draws_of(make(model), data)["p"]
    exact = (1.1 + data.sum(0)) / (2.2 + len(data))
    assert np.allclose(draws.mean(0), exact, atol=0.005)


def test_dirichlet_categorical(make):
    truth = jnp.array([0.1, 0.6, 0.3])

    def model(data):
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("y", dist.Categorical(p), obs=data)

    data = dist.Categorical(truth).sample(KEY, (2000,))
    draws = draws_of(make(model), data)["p"]
    exact = (1 + jnp.bincount(data, length=3)) / (3 + len(data))
    assert np.allclose(draws.mean(0), exact, atol=0.005)


# regressions and scales


def test_gamma_and_truncated_scales(make):
    def model(data):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        scale = numpyro.sample("scale", dist.TruncatedNormal(0.0, 1.0, low=0.1))
        numpyro.sample("y", dist.Normal(rate, scale), obs=data)

    data = dist.Normal(3.0, 0.7).sample(KEY, (300,))
    draws = draws_of(make(model), data)
    assert float(draws["rate"].mean()) == pytest.approx(3.0, abs=0.15)
    assert float(draws["scale"].mean()) == pytest.approx(0.7, abs=0.1)
    assert (draws["scale"] > 0.1).all()


METHODS = ["sequential", "parallel", "vectorized", pytest.param(jax.vmap, id="vmap")]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_logistic_regression(make, method):
    x = jax.random.normal(KEY, (1000, 3))
    truth = jnp.array([1.0, 2.0, 3.0])
    y = dist.Bernoulli(logits=x @ truth).sample(jax.random.key(1))

    def model(y):
        beta = numpyro.sample("beta", dist.Normal(0, 2).expand([3]).to_event(1))
        numpyro.deterministic("double", 2 * beta)
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    options = {"num_chains": 2, "num_samples": 500}
    draws = draws_of(make(model), y, chain_method=method, **options)
    assert draws["beta"].shape == (1000, 3)
    assert np.allclose(draws["beta"].mean(0), truth, atol=0.5)
    assert np.allclose(draws["double"], 2 * draws["beta"])


def test_change_point(make):
    """A rate that changes once; the day is a number between two ends."""
    counts = np.repeat([20, 40], [40, 30]) + np.random.default_rng(0).integers(
        -6, 7, 70
    )

    def model(counts):
        alpha = 1 / counts.mean()
        first = numpyro.sample("first", dist.Exponential(alpha))
        second = numpyro.sample("second", dist.Exponential(alpha))
        day = numpyro.sample("day", dist.Uniform(0, 1)) * len(counts)
        share = jax.nn.sigmoid(2 * (jnp.arange(len(counts)) - day))
        rate = first + (second - first) * share
        numpyro.sample("y", dist.Poisson(rate), obs=counts)

    start = {"first": jnp.log(25.0), "second": jnp.log(35.0), "day": jnp.array(0.2)}
    start = jax.tree.map(lambda x: jnp.full(4, x), start)
    draws = draws_of(make(model), jnp.asarray(counts), init_params=start)
    assert float(draws["first"].mean()) == pytest.approx(20, abs=2)
    assert float(draws["second"].mean()) == pytest.approx(40, abs=3)
    assert float(70 * draws["day"].mean()) == pytest.approx(39.5, abs=3)


@pytest.mark.parametrize("with_logits", [True, False])
def test_binomial_is_stable_at_its_ends(make, with_logits):
    def model(data):
        p = numpyro.sample("p", dist.Beta(1.0, 1.0))
        if with_logits:
            law = dist.Binomial(data["n"], logits=jnp.log(p) - jnp.log1p(-p))
        else:
            law = dist.Binomial(data["n"], probs=p)
        numpyro.sample("y", law, obs=data["x"])

    data = {"n": 5_000_000, "x": 3849}
    exact = (data["x"] + 1) / (data["n"] + 2)
    # the binomial coefficient is 10^7 nats, and single precision rounds that to nats
    with jax.enable_x64(True):
        draws = draws_of(make(model), data, num_warmup=1500)["p"]
        assert float(draws.mean()) == pytest.approx(exact, rel=0.02)


def test_scales_far_apart(make):
    """Coordinates that differ by four orders of magnitude need a metric."""
    sd = jnp.array([1e-2, 1.0, 1e2])

    def model():
        numpyro.sample("x", dist.Normal(jnp.zeros(3), sd).to_event(1))

    draws = draws_of(make(model), num_warmup=1500)["x"]
    assert np.allclose(draws.std(0) / sd, 1.0, atol=0.15)


# what is special


def test_transformed_site_by_reparameterization(make):
    def model():
        config = {"x": TransformReparam()}
        with numpyro.handlers.reparam(config=config):
            law = dist.TransformedDistribution(
                dist.Normal(0, 1), dist.transforms.AffineTransform(3.0, 2.0)
            )
            numpyro.sample("x", law)

    draws = draws_of(make(model))["x"]
    assert float(draws.mean()) == pytest.approx(3.0, abs=0.2)
    assert float(draws.std()) == pytest.approx(2.0, abs=0.2)


def test_empty_model(make):
    mcmc = run(make(lambda: None), num_warmup=10, num_samples=10)
    assert mcmc.get_samples() == {}


def beta_bernoulli_run(make: Callable, key: Any, data: Any) -> Any:
    """A whole run as a pure function."""

    def model(data):
        p = numpyro.sample("p", dist.Beta(1.1, 1.1))
        numpyro.sample("y", dist.Bernoulli(p), obs=data)

    mcmc = MCMC(make(model), num_warmup=300, num_samples=500, progress_bar=False)
    mcmc.run(key, data)
    return mcmc.get_samples()["p"]


@pytest.mark.parametrize("mapping", ["jit", "vmap", "pmap"])
def test_run_is_a_pure_function(make, mapping):
    data = dist.Bernoulli(jnp.array([0.2, 0.8])).sample(KEY, (500,)).T
    exact = (1.1 + data.sum(1)) / (2.2 + 500)
    keys = jax.random.split(KEY, 2)
    one = partial(beta_bernoulli_run, make)
    if mapping == "jit":
        draws = jnp.stack([jax.jit(one)(k, y) for k, y in zip(keys, data, strict=True)])
    else:
        draws = {"vmap": jax.vmap, "pmap": jax.pmap}[mapping](one)(keys, data)
    assert np.allclose(draws.mean(1), exact, atol=0.01)


@pytest.mark.parametrize("progress_rate", [None, 20])
def test_progress_bar_of_any_rate(make, progress_rate, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # where NumPyro turns the bar off
        monkeypatch.delenv(name, raising=False)

    def model():
        numpyro.sample("x", dist.Normal(0, 1))

    draws = []
    for progress_bar in (True, False):
        mcmc = MCMC(
            make(model),
            num_warmup=10,
            num_samples=10,
            progress_bar=progress_bar,
            progress_rate=progress_rate,
        )
        mcmc.run(KEY)
        draws.append(mcmc.get_samples()["x"])
    assert np.allclose(*draws, atol=1e-3)


def test_given_start_and_strategy_agree(make):
    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    options = {"num_warmup": 10, "num_samples": 5, "num_chains": 1}
    value = {"x": jnp.array(0.3)}
    by_value = draws_of(make(model), 1.0, init_params=value, **options)
    strategy = init_to_value(values=value)
    by_strategy = draws_of(make(model, init_strategy=strategy), 1.0, **options)
    assert np.allclose(by_value["x"], by_strategy["x"])


def test_extra_fields_by_chain(make):
    def model():
        numpyro.sample("x", dist.Normal(0, 1).expand([5]).to_event(1))

    mcmc = MCMC(
        make(model),
        num_warmup=10,
        num_samples=10,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(KEY, extra_fields=("accept_prob", "num_steps", "potential_energy"))
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (2, 10, 5)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert {fields[name].shape for name in fields} == {(2, 10)}
    energy = 0.5 * jnp.sum(mcmc.get_samples()["x"] ** 2, -1) + 2.5 * jnp.log(2 * jnp.pi)
    assert np.allclose(mcmc.get_extra_fields()["potential_energy"], energy, atol=1e-4)
