"""Starts at which the potential is so large that rounding hides its differences."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from numpyro.infer.util import initialize_model

from numpyro_score import AnnealedLangevin, ParallelTempering, ScoreLangevin
from numpyro_score.kernel import state as state_module
from numpyro_score.model.initialization import is_resolved

KEYS = jax.random.split(jax.random.key(0), 32)


def explosive():
    """A normal law, but for a term that overflows any precision beyond |x| = 1.2."""
    x = numpyro.sample("x", dist.Normal(0, 0.2))
    numpyro.factor("growth", -0.5 * jnp.square(x) ** 50)


def test_starts_are_drawn_again_where_rounding_hides_the_potential():
    first = initialize_model(
        jax.random.split(KEYS[0], 3)[1], explosive, dynamic_args=True
    )
    state = ScoreLangevin(explosive).init(KEYS, 100)
    assert bool(is_resolved(state.potential_energy).all())
    assert jnp.abs(state.z["x"]).max() < 1.2
    # half of the strategy's own draws are of this kind; those that are not stay
    keys = jax.vmap(lambda key: jax.random.split(key, 3)[1])(KEYS)
    plain = initialize_model(keys, explosive, dynamic_args=True).param_info
    kept = is_resolved(plain.potential_energy)
    assert 8 < int(kept.sum()) < 28
    np.testing.assert_array_equal(state.z["x"][kept], plain.z["x"][kept])
    assert float(first.param_info.z["x"]) == float(plain.z["x"][0])
    # alone and among others a chain starts at the same place, traced or not
    worst = int(jnp.argmin(kept))
    alone = ScoreLangevin(explosive).init(KEYS[worst], 100)
    traced = jax.jit(lambda key: ScoreLangevin(explosive).init(key, 100).z)(KEYS[worst])
    assert float(alone.z["x"]) == float(state.z["x"][worst]) == float(traced["x"])


@pytest.mark.parametrize("kernel", [AnnealedLangevin, ParallelTempering])
def test_other_kernels_start_there_too(kernel):
    state = kernel(explosive).init(KEYS, 100)
    assert np.isfinite(np.asarray(state.z["x"])).all()


def test_values_that_are_given_stay():
    strategy = numpyro.infer.init_to_value(values={"x": 1.5})
    state = ScoreLangevin(explosive, init_strategy=strategy).init(KEYS[:2], 100)
    np.testing.assert_array_equal(state.z["x"], 1.5)


def step_size(seed):
    """Return the step size of four chains, one of which can accept by chance only."""
    mcmc = MCMC(
        ScoreLangevin(explosive),
        num_warmup=200,
        num_samples=50,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = {"x": jnp.array([0.1, -0.2, 0.3, 1.9])}
    mcmc.run(jax.random.key(seed), init_params=start)
    return float(mcmc.last_state.adapt_state.step_size[0])


@pytest.mark.filterwarnings("ignore:1 of 4 chain:UserWarning")
@pytest.mark.filterwarnings("ignore:The potential is:UserWarning")
def test_chains_that_accept_by_chance_do_not_decide_the_step_size():
    assert 0.3 < step_size(0) < 5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutant_that_counts_every_chain_is_caught(monkeypatch):
    monkeypatch.setattr(
        state_module, "is_resolved", lambda potential: jnp.ones_like(potential, bool)
    )
    assert not 0.3 < step_size(0) < 5


def positive():
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(0.0, scale), obs=0.5)


def positive_pair():
    pair = numpyro.sample("pair", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(pair.sum(), 1.0), obs=0.5)


@pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals:UserWarning")  # few
@pytest.mark.filterwarnings("ignore:.*Out-of-support:UserWarning")  # NumPyro's own
@pytest.mark.parametrize("kernel", [ScoreLangevin, AnnealedLangevin, ParallelTempering])
@pytest.mark.parametrize(
    ("model", "values"),
    [(positive, {"scale": -1.0}), (positive_pair, {"pair": jnp.array([0.5, -1.5])})],
)
def test_strategies_that_start_outside_of_a_support(kernel, model, values):
    (name,) = values
    strategy = numpyro.infer.init_to_value(values=values)
    with pytest.raises(ValueError, match=f"`init_strategy` must start site '{name}'"):
        kernel(model, init_strategy=strategy).init(KEYS[:2], 100)


def far_scale(scale):
    """A normal law of unknown mean and sd, in units that the data are far from."""

    def model():
        mean = numpyro.sample("mean", dist.Normal(0.0, 10 * scale))
        sd = numpyro.sample("sd", dist.HalfNormal(5 * scale))
        y = scale * jnp.array([1.0, 2.5, 2.0, 3.0, 1.5])
        numpyro.sample("y", dist.Normal(mean, sd), obs=y)

    return model


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_starts_have_the_scale_of_the_prior_where_others_say_nothing(scale):
    state = ScoreLangevin(far_scale(scale)).init(KEYS, 100)
    assert bool(is_resolved(state.potential_energy).all())
    assert float(jnp.abs(state.z["mean"]).max()) < 50 * scale
    assert np.ptp(np.asarray(state.z["sd"])) > 0.5  # each chain has a draw of its own
    # a strategy that was chosen is kept
    strategy = numpyro.infer.init_to_uniform
    kept = ScoreLangevin(far_scale(scale), init_strategy=strategy).init(KEYS, 100)
    assert float(jnp.abs(kept.z["sd"]).max()) < 2


def narrow():
    """A density at a twentieth of the prior, and nowhere that `init_to_uniform` is."""
    end = numpyro.sample("end", dist.Uniform(0.0, 1.0))
    numpyro.factor("upper", jnp.where(end > 0.95, 0.0, -jnp.inf))


def test_starts_are_draws_of_the_prior_where_others_have_no_density():
    state = ScoreLangevin(narrow).init(KEYS, 100)
    assert bool((jax.nn.sigmoid(state.z["end"]) > 0.95).all())
    strategy = numpyro.infer.init_to_uniform
    with pytest.raises(RuntimeError, match=r"Without a finite .*: 'upper'"):
        ScoreLangevin(narrow, init_strategy=strategy).init(KEYS, 100)
