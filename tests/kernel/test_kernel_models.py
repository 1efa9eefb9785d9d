"""Kinds of NumPyro models, for every kernel of the package."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import NUTS, Gibbs

from numpyro_score import ScoreDistribution
from tests.kernel.all_kernels import (
    DATA,
    KERNELS,
    LEARNED,
    assert_close,
    draws_of,
    learned,
    ordinary,
    sampler,
    tempering,
)

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")


def assert_moved(draws: dict[str, Any]) -> None:
    for values in draws.values():
        assert np.isfinite(values).all()
        assert (np.std(values, axis=1) > 0).all()


# blocks of Gibbs
@pytest.mark.slow
def test_gibbs_blocks(make):
    """NUTS on the ordinary site, a Langevin kernel on the learned one."""

    def model():
        x = numpyro.sample("x", ScoreDistribution(LEARNED))
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x.sum() + loc, 1.0), obs=2.0)

    blocks = [(make(model), ["x"]), (NUTS(model), ["loc"])]
    mcmc = sampler(Gibbs(blocks), num_warmup=300, num_samples=4000)
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples()
    # x1 + x2 + loc ~ N(0, 3) and y = 2 with variance 1: the sum has mean 2 3/4
    assert float(draws["x"].mean()) == pytest.approx(0.5, abs=0.12)
    assert float(draws["loc"].mean()) == pytest.approx(0.5, abs=0.12)
    assert float(draws["loc"].var()) == pytest.approx(0.75, abs=0.12)


def test_wrapped_model(make_one):
    def shifted(model):
        return partial(numpyro.handlers.condition, data={"scale": 1.0})(model)

    kernel = make_one(learned).wrap_model(shifted)
    state = kernel.init(jax.random.key(0), 10, model_args=(DATA,))
    assert set(state.z) == {"x"}


def test_constrain_fn(make_one):
    constrain = make_one(ordinary).get_constrain_fn((DATA,), {})
    got = constrain({"loc": jnp.array(0.5), "scale": jnp.array(0.0)})
    assert_close(got, {"loc": 0.5, "scale": 1.0, "ratio": 0.5})


# models of every kind
def plates(y: Any) -> None:
    with numpyro.plate("columns", 2):
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        with numpyro.plate("rows", 3):
            x = numpyro.sample("x", ScoreDistribution(LEARNED))
            numpyro.sample("y", dist.Normal(x.sum(-1) + loc, 1.0), obs=y[:, None])


def rows(y: Any) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("rows", 12, subsample_size=3):
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def chosen_rows(y: Any) -> None:
    data = {"rows": jnp.array([1, 5, 9])}
    numpyro.handlers.substitute(rows, data=data)(y)


def supports(y: Any) -> None:
    simplex = numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    ordered = dist.TransformedDistribution(
        dist.Normal(0, 1).expand([3]).to_event(1),
        dist.transforms.OrderedTransform(),
    )
    ordered = numpyro.sample("ordered", ordered)
    numpyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    numpyro.sample("interval", dist.Uniform(-1.0, 2.0))
    upper = numpyro.sample("upper", dist.HalfNormal(1.0))
    numpyro.sample("below", dist.Uniform(0.0, upper))
    numpyro.sample("y", dist.Normal(ordered + simplex, 1.0).to_event(1), obs=y)


def enumerated(y: Any) -> None:
    p = numpyro.sample("p", dist.Beta(2, 2))
    x = numpyro.sample("x", ScoreDistribution(LEARNED))
    with numpyro.plate("rows", len(y)):
        k = numpyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(jnp.where(k, x[0], x[1]), 1.0), obs=y)


def parameters(y: Any) -> None:
    scale = numpyro.param("scale", 2.0, constraint=constraints.positive)
    count = numpyro.primitives.mutable("count", {"runs": 0})
    count["runs"] += 1
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(loc, scale).expand([3]), obs=y)


def improper(y: Any) -> None:
    loc = numpyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(loc, 1.0).expand([3]), obs=y)


def reparameterized(y: Any) -> None:
    config = {"x": numpyro.infer.reparam.LocScaleReparam(0)}
    with numpyro.handlers.reparam(config=config):
        x = numpyro.sample("x", dist.Normal(1.0, 2.0))
    numpyro.sample("y", dist.Normal(x, 1.0).expand([3]), obs=y)


KINDS = [
    improper,
    *(
        pytest.param(model, marks=pytest.mark.slow)
        for model in (plates, chosen_rows, enumerated, parameters, reparameterized)
    ),
]


@pytest.mark.parametrize("model", KINDS)
def test_model_of_every_kind(make_one, model):
    options = {"num_chains": 2, "chain_method": "vectorized"}
    if model is improper and make_one is tempering:
        with pytest.raises(ValueError, match="Site 'loc' has an improper prior"):
            sampler(make_one(model)).run(jax.random.key(0), DATA)
        return
    mcmc = sampler(make_one(model), num_warmup=300, num_samples=60, **options)
    mcmc.run(jax.random.key(0), DATA)
    assert_moved(draws_of(mcmc))
    assert not mcmc.get_extra_fields()["diverging"].all()


@pytest.mark.slow
def test_supports_are_kept(make_one):
    mcmc = sampler(make_one(supports), num_warmup=300, num_samples=100)
    mcmc.run(jax.random.key(0), DATA)
    draws = mcmc.get_samples()
    assert (np.std(draws["simplex"], axis=0) > 0).all()
    assert np.allclose(draws["simplex"].sum(-1), 1, atol=1e-5)
    assert (np.diff(draws["ordered"], axis=-1) > 0).all()
    assert np.allclose((draws["cholesky"] ** 2).sum(-1), 1, atol=1e-5)
    assert ((draws["interval"] > -1) & (draws["interval"] < 2)).all()
    assert ((draws["below"] > 0) & (draws["below"] < draws["upper"])).all()


@pytest.mark.parametrize("make", [NUTS, *KERNELS.values()])
def test_random_rows_are_refused(make):
    mcmc = sampler(make(rows))
    with pytest.raises(ValueError, match="do not support subsampling"):
        mcmc.run(jax.random.key(0), DATA)


@pytest.mark.parametrize("make", [NUTS, *KERNELS.values()])
def test_discrete_sites_without_enumeration_are_refused(make):
    def model(y):
        numpyro.sample("k", dist.Poisson(3.0))

    mcmc = sampler(make(model))
    with pytest.raises(RuntimeError, match="site k does not have enumerate support"):
        mcmc.run(jax.random.key(0), DATA)


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_model_without_latent_sites(make_one, method):
    def model(y):
        numpyro.deterministic("twice", 2 * y)
        numpyro.sample("y", dist.Normal(0, 1).expand([3]), obs=y)

    mcmc = sampler(make_one(model), num_chains=2, chain_method=method)
    if make_one is KERNELS["AnnealedLangevin"]:
        with pytest.raises(ValueError, match="no latent site"):
            mcmc.run(jax.random.key(0), DATA)
        return
    mcmc.run(jax.random.key(0), DATA)
    assert np.allclose(draws_of(mcmc)["twice"], 2 * DATA)
    assert draws_of(mcmc)["twice"].shape == (2, 8, 3)
