"""Where chains start, for every kernel of the package."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)

from numpyro_score import VE, ScoreDistribution, ScoreLangevin, ScoreModel
from tests.kernel.all_kernels import (
    DATA,
    KERNELS,
    assert_close,
    assert_same,
    draws_of,
    first_of,
    learned,
    ordinary,
    sampler,
    tempering,
)

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")


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
