"""What NumPyro's MCMC asks of a kernel, for every kernel of the package.

A new kernel joins by one entry in ``KERNELS`` and inherits all tests. Where a limit is
NumPyro's own, ``NUTS`` stands beside, to show that it has the same.
"""

import pickle
import warnings
from dataclasses import replace

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import MCMC, Predictive, log_likelihood

from numpyro_score import AnnealedLangevin, ParallelTempering, ScoreLangevin
from numpyro_score.kernel import AcceptRule
from tests.kernel.all_kernels import (
    DATA,
    KERNELS,
    assert_close,
    assert_same,
    donates,
    draws_of,
    first_of,
    learned,
    ordinary,
    sampler,
)

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")


@pytest.mark.long
@donates
@pytest.mark.slow
def test_chain_methods_agree(make):
    """Given the same keys, every method runs the same chains.

    By default vectorized chains share what they adapt, which other methods cannot.
    """
    kernel, draws = make(learned), {}
    # of these few annealed draws, those of key 0 all stay where they are
    key = jax.random.key(int(isinstance(kernel, AnnealedLangevin)))
    if isinstance(kernel, ScoreLangevin):
        kernel = replace(kernel, share_adaptation=False)
    for method in ("sequential", "parallel", "vectorized", jax.vmap):
        # short: rounding, which differs between programs, grows along a chain
        short = {"num_warmup": 4, "num_samples": 6}
        mcmc = sampler(kernel, num_chains=2, chain_method=method, **short)
        mcmc.run(key, DATA)
        draws[str(method)] = draws_of(mcmc)
    expected = draws.pop("sequential")
    # in so few draws one chain may have refused every move
    assert all((np.std(values, axis=1) > 0).any() for values in expected.values())
    assert expected["scale"].shape == (2, 6)
    for got in draws.values():
        assert_close(got, expected)


@pytest.mark.long
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
@pytest.mark.parametrize("make", [ScoreLangevin, AnnealedLangevin, ParallelTempering])
@pytest.mark.parametrize("num_chains", [1, 40])
def test_a_run_that_goes_on_with_other_data_is_refreshed(make, num_chains):
    kernel, other, first = make(ordinary), DATA + 30.0, jax.random.key(0)
    keys = first if num_chains == 1 else jax.random.split(first, num_chains)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few particles
        state = kernel.init(keys, 200, None, (DATA,), {})
        sample = jax.jit(kernel.sample)
        state = sample(state, (DATA,), {})
        gone_on = sample(state, (other,), {})
        refreshed = sample(kernel.refresh(state, (other,), {}), (other,), {})
    assert_same(gone_on.z, refreshed.z)
    for name in ("potential_energy", "log_evidence"):  # NaN where there is none
        got = np.asarray(getattr(gone_on, name, 0.0))
        np.testing.assert_array_equal(got, np.asarray(getattr(refreshed, name, 0.0)))
    assert int(gone_on.data) != int(state.data)
    assert int(sample(state, (DATA,), {}).data) == int(state.data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:AnnealedLangevin. the 40 particles:UserWarning")
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
        num_steps = 5 + 2 * num_steps  # draws of the prior, and moves of two rungs
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
