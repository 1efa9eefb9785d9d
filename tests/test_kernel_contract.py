"""What NumPyro's MCMC asks of a kernel, for every kernel of the package.

A new kernel joins by one entry in ``KERNELS`` and inherits all tests. Where a limit is
NumPyro's own, ``NUTS`` stands beside, to show that it has the same.
"""

import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import (
    MCMC,
    NUTS,
    Gibbs,
    Predictive,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
    log_likelihood,
)

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.kernel import AcceptRule

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")

FAMILY: dict[str, Callable] = {  # what is common to them is in the default run once
    "MALA": partial(ScoreLangevin, num_steps=1, friction=None),
    "kinetic": partial(ScoreLangevin, num_steps=3, adjusted=False, friction=1.0),
}


def tempering(
    model: Any, *, init_strategy: Callable | None = None, **options: Any
) -> ParallelTempering:
    """Make few rungs, with the options of Langevin kernels for those of local moves."""
    local = partial(ScoreLangevin, **options)
    return ParallelTempering(
        model, num_rungs=3, local=local, init_strategy=init_strategy
    )


KERNELS: dict[str, Callable] = {
    "ScoreLangevin": ScoreLangevin,
    "AnnealedLangevin": partial(AnnealedLangevin, levels=2, steps_per_level=2),
    "ParallelTempering": tempering,
}
DATA = jnp.array([0.5, -1.0, 2.0])
SDE = VE(sigma_min=0.1)


# models, at the top level so that they can be pickled


def normal_score(x: Any, t: Any) -> Any:
    return -x / (1 - SDE.sigma_min**2 + SDE.sigma(t) ** 2)


LEARNED = ScoreModel.from_fn(normal_score, SDE, (2,))


def ordinary(y: Any) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.deterministic("ratio", loc / scale)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(loc, scale), obs=y)


def learned(y: Any) -> None:
    x = numpyro.sample("x", ScoreDistribution(LEARNED))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.deterministic("total", x.sum())
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x.sum(), scale), obs=y)


def first_of(kernels: dict[str, Callable]) -> list[Any]:
    """Return the names; those after the first are slow."""
    first, *others = kernels
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.fixture(params=first_of(KERNELS | FAMILY))
def make(request) -> Callable:
    """Make a kernel of a model, with options."""
    return (KERNELS | FAMILY)[request.param]


@pytest.fixture(params=first_of(KERNELS))
def make_one(request) -> Callable:
    """The same, where members of one family cannot differ."""
    return KERNELS[request.param]


def sampler(kernel: Any, **options: Any) -> MCMC:
    defaults = {"num_warmup": 10, "num_samples": 8, "progress_bar": False}
    return MCMC(kernel, **(defaults | options))


def draws_of(mcmc: MCMC) -> dict[str, Any]:
    return mcmc.get_samples(group_by_chain=True)


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), got, expected)
    assert all(jax.tree.leaves(same)), same


def assert_close(got: Any, expected: Any) -> None:
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, expected
    )


def assert_moved(draws: dict[str, Any]) -> None:
    for values in draws.values():
        assert np.isfinite(values).all()
        assert (np.std(values, axis=1) > 0).all()


# chain methods and keys


# NumPyro gives away buffers that a batch of chains cannot reuse, for NUTS too
donates = pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")


@donates
@pytest.mark.slow
def test_chain_methods_agree(make):
    """Given the same keys, every method runs the same chains.

    By default vectorized chains share what they adapt, which other methods cannot.
    """
    kernel, draws = make(learned), {}
    if isinstance(kernel, ScoreLangevin):
        kernel = replace(kernel, share_adaptation=False)
    for method in ("sequential", "parallel", "vectorized", jax.vmap):
        # short: rounding, which differs between programs, grows along a chain
        short = {"num_warmup": 4, "num_samples": 6}
        mcmc = sampler(kernel, num_chains=2, chain_method=method, **short)
        mcmc.run(jax.random.key(0), DATA)
        draws[str(method)] = draws_of(mcmc)
    expected = draws.pop("sequential")
    # in so few draws one chain may have refused every move
    assert all((np.std(values, axis=1) > 0).any() for values in expected.values())
    assert expected["scale"].shape == (2, 6)
    for got in draws.values():
        assert_close(got, expected)


@pytest.mark.slow
def test_typed_and_legacy_keys_agree(make_one):
    draws = []
    for make in (jax.random.key, jax.random.PRNGKey):
        mcmc = sampler(make_one(learned), num_chains=2, chain_method="vectorized")
        mcmc.run(make(0), DATA)
        draws.append(draws_of(mcmc))
    assert_same(*draws)


@pytest.mark.slow
def test_batch_of_keys(make_one):
    draws = []
    for key in (jax.random.key(3), jax.random.split(jax.random.key(3), 2)):
        mcmc = sampler(make_one(learned), num_chains=2, chain_method="vectorized")
        mcmc.run(key, DATA)
        draws.append(draws_of(mcmc))
    assert_same(*draws)


# initial values


METHODS = [
    "vectorized",
    pytest.param("sequential", marks=pytest.mark.slow),
    pytest.param("parallel", marks=pytest.mark.slow),
]


START = {"loc": jnp.array([-1.0, 2.0]), "scale": jnp.array([0.5, -0.5])}
LOCAL = {name: make for name, make in KERNELS.items() if make is not tempering}


def test_first_state_has_init_params(make_one):
    keys = jax.random.split(jax.random.key(0), 2)
    state = make_one(ordinary).init(keys, 10, START, (DATA,), {})
    assert_same(state.z, START)
    one = jax.tree.map(lambda x: x[0], START)
    state = make_one(ordinary).init(keys[0], 10, one, (DATA,), {})
    assert_same(state.z, one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", first_of(LOCAL))
def test_init_params(name, method):
    """Chains without a step stay; those of other temperatures would come by."""
    start = START
    frozen = LOCAL[name](ordinary, step_size=1e-10, adapt_step_size=False)
    mcmc = sampler(frozen, num_chains=2, chain_method=method)
    mcmc.run(jax.random.key(0), DATA, init_params=start)
    draws = draws_of(mcmc)
    assert np.allclose(draws["loc"], start["loc"][:, None], atol=1e-6)
    assert np.allclose(draws["scale"], np.exp(start["scale"])[:, None], atol=1e-6)


VALUES = {"x": jnp.array([0.3, 0.4]), "scale": 0.7}
STRATEGIES = {
    "uniform": init_to_uniform,
    "uniform with radius": init_to_uniform(radius=0.1),
    "sample": init_to_sample,
    "median": init_to_median(num_samples=3),
    "mean": init_to_mean,
    "feasible": init_to_feasible,
    "value": init_to_value(values=VALUES),
}


QUICK = {"feasible", "value"}
SOME = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in STRATEGIES
]


@pytest.mark.parametrize("name", SOME)
def test_init_strategy(make_one, name):
    kernel = make_one(learned, init_strategy=STRATEGIES[name])
    state = kernel.init(jax.random.key(0), 10, model_args=(DATA,))
    assert state.z["x"].shape == (2,)
    constrained = kernel.get_constrain_fn((DATA,), {})(state.z)
    if name == "value":
        assert_close({k: constrained[k] for k in VALUES}, VALUES)
    if name == "feasible":
        assert_close(state.z, {"x": jnp.zeros(2), "scale": jnp.zeros(())})
    if name == "uniform with radius":
        assert all(jnp.abs(z).max() <= 0.1 for z in state.z.values())


def test_learned_sites_start_at_a_draw_of_their_law():
    def model():
        sde = VE(sigma_min=0.1)
        score = ScoreModel.from_fn(
            lambda x, t: -(x - 50.0) / (1 + sde.sigma(t) ** 2), sde, ()
        )
        numpyro.sample("x", ScoreDistribution(score))

    keys = jax.random.split(jax.random.key(0), 3)
    starts = ScoreLangevin(model).init(keys, 0).z["x"]
    assert starts.shape == (3,)
    assert len(set(starts.tolist())) == 3
    assert (jnp.abs(starts - 50) < 10).all()


# what is collected


def test_extra_fields(make):
    fields = ("potential_energy", "adapt_state.step_size", "z.scale")
    mcmc = sampler(make(learned), num_chains=2, chain_method="vectorized")
    mcmc.run(jax.random.key(0), DATA, extra_fields=(*fields, "~z.total"))
    extra = mcmc.get_extra_fields(group_by_chain=True)
    collected = {"diverging", "accept_prob", "num_steps", "accept_rule", *fields}
    assert set(extra) == collected
    assert {extra[name].shape for name in extra} == {(2, 8)}
    assert (extra["adapt_state.step_size"] > 0).all()
    draws = draws_of(mcmc)
    assert set(draws) == {"x", "scale"}
    assert np.allclose(np.exp(extra["z.scale"]), draws["scale"])


def test_thinning(make_one):
    draws = []
    for thinning in (1, 4):
        mcmc = sampler(make_one(learned), thinning=thinning)
        mcmc.run(jax.random.key(0), DATA)
        draws.append(draws_of(mcmc))
    every, thinned = draws
    assert_same(thinned, jax.tree.map(lambda x: x[:, 3::4], every))


@pytest.mark.slow
def test_progress_bar_changes_no_draw(make_one, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # where NumPyro turns the bar off
        monkeypatch.delenv(name, raising=False)
    draws = []
    for progress_bar in (False, True):
        mcmc = sampler(make_one(learned), progress_bar=progress_bar)
        assert mcmc.progress_bar == progress_bar
        mcmc.run(jax.random.key(0), DATA)
        draws.append(draws_of(mcmc))
    assert_close(*draws)


# warm-up and resuming


def test_warmup_then_run_is_one_run(make):
    once = sampler(make(learned))
    once.run(jax.random.key(0), DATA)
    twice = sampler(make(learned))
    twice.warmup(jax.random.key(0), DATA)
    twice.run(twice.post_warmup_state.rng_key, DATA)
    assert_same(draws_of(twice), draws_of(once))


def test_warmup_is_collected(make_one):
    mcmc = sampler(make_one(learned))
    mcmc.warmup(jax.random.key(0), DATA, collect_warmup=True)
    assert draws_of(mcmc)["x"].shape == (1, 10, 2)


@pytest.mark.parametrize("num_chains", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_blocks_through_fresh_objects_are_one_long_run(make, num_chains):
    options = {"num_chains": num_chains, "chain_method": "vectorized"}
    long = sampler(make(learned), num_samples=12, **options)
    long.run(jax.random.key(0), DATA)
    blocks, state = [], None
    for _ in range(3):
        block = sampler(make(learned), num_samples=4, **options)
        block.post_warmup_state = state
        key = jax.random.key(0) if state is None else state.rng_key
        block.run(key, DATA)
        state = pickle.loads(pickle.dumps(block.last_state))
        blocks.append(draws_of(block))
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *blocks)
    assert_same(joined, draws_of(long))


# data and compilation


@pytest.mark.parametrize("jit_model_args", [False, True])
@pytest.mark.slow
def test_changed_data_leaves_no_stale_potential(make_one, jit_model_args):
    other = DATA + 30.0
    expected = sampler(make_one(ordinary), jit_model_args=jit_model_args)
    expected.run(jax.random.key(0), other)
    mcmc = sampler(make_one(ordinary), jit_model_args=jit_model_args)
    for y in (DATA, other):
        mcmc.run(jax.random.key(0), y)
    assert_same(draws_of(mcmc), draws_of(expected))


def test_resumed_chain_sees_its_new_data(make_one):
    """As with NumPyro's HMC, `refresh` makes a state fit other data."""
    kernel, other = make_one(ordinary), DATA + 30.0
    mcmc = sampler(kernel)
    mcmc.warmup(jax.random.key(0), DATA)
    state = mcmc.post_warmup_state
    refreshed = kernel.refresh(state, (other,), {})
    fresh = ScoreLangevin(ordinary)
    fresh = fresh.init(jax.random.key(0), 0, init_params=state.z, model_args=(other,))
    assert_same(refreshed.z, state.z)
    assert float(refreshed.potential_energy) == float(fresh.potential_energy)
    assert float(refreshed.potential_energy) > float(state.potential_energy) + 100


@pytest.mark.slow
def test_refreshed_level_keeps_its_noise_and_temperature():
    """In warm-up a level's potential is kept, not that of the posterior."""
    kernel = AnnealedLangevin(learned, levels=3, steps_per_level=2)
    sample = jax.jit(lambda state: kernel.sample(state, (DATA,), {}))
    refresh = jax.jit(lambda state: kernel.refresh(state, (DATA,), {}))
    for keys in (jax.random.key(0), jax.random.split(jax.random.key(0), 40)):
        state = kernel.init(keys, 10, None, (DATA,), {})
        for _ in range(8):
            again = refresh(state)
            assert_close(again.chain.z_grad, state.chain.z_grad)
            assert_close(again.potential_energy, state.potential_energy)
            state = sample(state)


def compiled(caplog, run: Callable) -> list[str]:
    """Return the names of the programs that a run compiles."""
    caplog.clear()
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, logger="jax"):
        run()
    messages = (record.getMessage() for record in caplog.records)
    found = (re.match(r"Compiling (\S+) with", message) for message in messages)
    return [match.group(1) for match in found if match]


LOOP = "jit(_fori_collect_loop)"


@pytest.mark.slow
@pytest.mark.parametrize("make", [NUTS, *KERNELS.values()])
def test_second_run_compiles_nothing_of_its_own(make, caplog):
    """NumPyro compiles its loop at every run; a kernel may add nothing to that."""
    mcmc = sampler(make(ordinary))
    keys = jax.random.split(jax.random.key(0), 3)
    first, second, third = keys[0], keys[1], keys[2]
    mcmc.run(first, DATA)
    assert compiled(caplog, lambda: mcmc.run(second, DATA)) == [LOOP]
    mcmc.post_warmup_state = mcmc.last_state
    assert compiled(caplog, lambda: mcmc.run(third, DATA)) == [LOOP]


class Counted:
    """A model that counts how often it is traced."""

    def __init__(self, model: Callable) -> None:
        self.model, self.traces = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self.model(*args, **kwargs)


def test_number_of_traces_does_not_grow_with_draws(make):
    traces = []
    for num_samples in (8, 50):
        model = Counted(learned)
        mcmc = sampler(make(model), num_samples=num_samples)
        mcmc.run(jax.random.key(0), DATA)
        traces.append(model.traces)
    assert traces[0] == traces[1]


def test_run_inside_jit(make):
    @jax.jit
    def run(key, y):
        mcmc = sampler(make(learned))
        mcmc.run(key, y)
        return mcmc.get_samples()

    expected = sampler(make(learned))
    expected.run(jax.random.key(0), DATA)
    assert_close(run(jax.random.key(0), DATA), expected.get_samples())


@donates
@pytest.mark.slow
def test_run_inside_vmap(make_one):
    def run(key, y):
        mcmc = sampler(make_one(learned))
        mcmc.run(key, y)
        return mcmc.get_samples()["x"]

    keys = jax.random.split(jax.random.key(0), 2)
    assert jax.vmap(run, (0, None))(keys, DATA).shape == (2, 8, 2)


# pickling


def test_pickled_run_goes_on(make):
    mcmc = sampler(make(learned))
    mcmc.run(jax.random.key(0), DATA)
    copy = pickle.loads(pickle.dumps(mcmc))
    assert_same(draws_of(copy), draws_of(mcmc))
    for each in (mcmc, copy):
        each.post_warmup_state = each.last_state
        each.run(each.post_warmup_state.rng_key, DATA)
    assert_same(draws_of(copy), draws_of(mcmc))


@pytest.mark.slow
def test_pickled_kernel_runs(make):
    draws = []
    for each in (make(learned), pickle.loads(pickle.dumps(make(learned)))):
        mcmc = sampler(each)
        mcmc.run(jax.random.key(0), DATA)
        draws.append(draws_of(mcmc))
    assert_same(*draws)


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
    mcmc.run(jax.random.key(0), DATA)
    assert np.allclose(draws_of(mcmc)["twice"], 2 * DATA)
    assert draws_of(mcmc)["twice"].shape == (2, 8, 3)


# what users do with draws


@pytest.fixture(scope="module", params=first_of(KERNELS))
def finished(request) -> MCMC:
    mcmc = sampler(
        KERNELS[request.param](learned),
        num_warmup=50,
        num_chains=2,
        chain_method="vectorized",
    )
    mcmc.run(jax.random.key(0), DATA, extra_fields=("potential_energy",))
    return mcmc


def test_predictive_and_log_likelihood(finished):
    draws = finished.get_samples()
    predicted = Predictive(learned, draws)(jax.random.key(1), jnp.zeros(5))
    assert predicted["y"].shape == (16, 5)
    assert log_likelihood(learned, draws, DATA)["y"].shape == (16, 3)


def test_print_summary(finished, capsys):
    finished.print_summary()
    text = capsys.readouterr().out
    assert "x[0]" in text
    assert "Number of divergences: " in text


def test_arviz(finished):
    data = arviz.from_numpyro(finished, log_likelihood=True)
    assert data["posterior"]["x"].shape == (2, 8, 2)
    assert set(data["posterior"].data_vars) == {"x", "scale", "total"}
    assert data["log_likelihood"]["y"].shape == (2, 8, 3)
    stats = data["sample_stats"]
    assert stats["diverging"].shape == (2, 8)
    assert stats["acceptance_rate"].shape == (2, 8)
    num_steps = finished.sampler.num_steps
    if num_steps is None:  # adapted in warm-up
        num_steps = np.asarray(finished.last_state.adapt_state.num_steps)
        assert (num_steps >= 3).all()
    if isinstance(finished.sampler, ParallelTempering):
        num_steps = 1 + 2 * num_steps  # a draw of the prior, and moves of two rungs
    assert (stats["n_steps"] == num_steps).all()
    assert (stats["accept_rule"] == AcceptRule.LINE_INTEGRAL).all()
    assert np.isfinite(stats["lp"]).all()


def test_diagnostics_string(make_one):
    kernel = make_one(ordinary, step_size=0.25)
    state = kernel.init(jax.random.key(0), 10, model_args=(DATA,))
    assert kernel.get_diagnostics_str(state) in (
        "8 steps of size 2.50e-01. acc. prob=0.00",
        "beta 0.00. acc. prob=0.00",
        "3 rungs, barrier nan, 0 restarts. acc. prob=0.00",
    )


# clouds of many weighted chains


@pytest.mark.slow
def test_cloud_is_pickled_resumed_and_compiled():
    """What holds for a few chains holds for a cloud with its weights."""
    options = {"num_chains": 40, "chain_method": "vectorized", "num_samples": 4}
    make = KERNELS["AnnealedLangevin"]
    long = sampler(make(learned), **(options | {"num_samples": 8}))
    long.run(jax.random.key(0), DATA)
    first = sampler(make(learned), **options)
    first.run(jax.random.key(0), DATA)
    second = pickle.loads(pickle.dumps(first))
    second.post_warmup_state = second.last_state
    second.run(second.last_state.rng_key, DATA)
    joined = [draws_of(first), draws_of(second)]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *joined)
    assert_same(joined, draws_of(long))
    assert_same(second.last_state.weights, first.last_state.weights)

    @jax.jit
    def run(key, y):
        mcmc = sampler(make(learned), **options)
        mcmc.run(key, y)
        return mcmc.get_samples(), mcmc.last_state.weights.log_evidence

    draws, log_evidence = run(jax.random.key(0), DATA)
    assert_close(draws, first.get_samples())
    assert_close(log_evidence, first.last_state.weights.log_evidence)


# chains spread over devices

SHARDED = """
import sys, warnings
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.test_kernel_contract import DATA, KERNELS, draws_of, learned, sampler

warnings.simplefilter("ignore")
name, out = sys.argv[1:]
start = {"x": np.linspace(-1, 1, 16).reshape(8, 2), "scale": np.linspace(-1, 1, 8)}
start = jax.tree.map(lambda x: x.astype(np.float32), start)
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("chains",))
spread = NamedSharding(mesh, PartitionSpec("chains"))
placed = {"one": jax.devices()[0], "four": spread}
draws = {}
for where, place in placed.items():
    kernel = KERNELS[name](learned)
    mcmc = sampler(kernel, num_chains=8, chain_method="vectorized")
    mcmc.run(jax.random.key(0), DATA, init_params=jax.device_put(start, place))
    draws |= {f"{where}_{k}": v for k, v in draws_of(mcmc).items()}
    draws[f"{where}_devices"] = len(mcmc.last_state.z["x"].sharding.device_set)
np.savez(out, **draws)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_chains_spread_over_devices_are_the_same(name, tmp_path, root):
    """Up to rounding: XLA compiles another program for four devices."""
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, name, str(tmp_path / "draws.npz")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "draws.npz") as draws:
        assert (int(draws["one_devices"]), int(draws["four_devices"])) == (1, 4)
        for site in ("x", "scale", "total"):
            assert_close(draws[f"one_{site}"], draws[f"four_{site}"])
