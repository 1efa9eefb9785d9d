"""Random rows, missing observations and hidden random numbers are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.infer import MCMC

from numpyro_score import AnnealedLangevin, ScoreLangevin
from numpyro_score.kernel import ParallelTempering
from numpyro_score.model.potential import model_potential

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")  # few
KERNELS = (ScoreLangevin, AnnealedLangevin, ParallelTempering)


def run(kernel, *args):
    """Start four chains in NumPyro's manner."""
    mcmc = MCMC(
        kernel,
        num_warmup=60,
        num_samples=10,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *args)


def random_rows(y):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("rows", 100, subsample_size=10) as index:
        numpyro.sample("y", dist.Normal(mean, 1), obs=y[index])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_random_rows(kernel, as_array):
    with pytest.raises(
        ValueError, match=r"support subsampling.*'rows'.*10 of 100 rows"
    ):
        run(kernel(random_rows), as_array(np.zeros(100)))


def regression(y, known=None):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    law = dist.Normal(mean, 1)
    law = law if known is None else law.mask(known)
    numpyro.sample("y", law, obs=y)


@pytest.mark.filterwarnings("ignore:Out-of-support:UserWarning")  # NumPyro's own
@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_observations(kernel):
    y = np.array([0.5, np.nan, 1.0, np.nan])
    with pytest.raises(ValueError, match=r"Site 'y' has NaN in its observed.*2 of 4"):
        run(kernel(regression), y)


def observed_as_given(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


NO_ARRAYS = {
    "list": [1.0, 2.0],
    "text": "a",
    "column": pd.Series([1.0, 2.0]),
    "frame": pd.DataFrame({"y": [1.0, 2.0]}),
    "objects": np.array([1.0, None], object),
    "labels": np.array(["a", "b"]),
    "dates": np.array(["2020-01-01"], "M8[D]"),
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_observations_are_arrays(kind):
    with pytest.raises(TypeError, match="Site 'y' must be observed as an array of num"):
        model_potential(observed_as_given, (NO_ARRAYS[kind],), {})


def test_numbers_are_arrays():
    for y in (1.0, 2, True, np.float64(1), np.ones(2), jnp.ones(2, "bfloat16")):
        model_potential(observed_as_given, (y,), {})


def test_masked_observations_may_be_missing():
    known = np.array([True, False])
    potential = model_potential(regression, (np.array([0.5, np.nan]), known), {})
    assert np.isfinite(potential.value({"mean": jnp.zeros(())}))


def hidden(y, scale=1.0):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    noise = jax.random.normal(numpyro.prng_key(), y.shape)
    numpyro.sample("y", dist.Normal(mean + scale * noise, 1), obs=y)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hidden_random_numbers(kernel):
    with pytest.raises(ValueError, match="a chain would freeze one draw"):
        run(kernel(hidden), jnp.ones(3))


def test_keys_that_change_no_density_are_no_fault():
    potential = model_potential(hidden, (jnp.ones(3), 0.0), {})
    expected = 3 * 0.5 + 2 * np.log(2 * np.pi)
    assert float(potential.value({"mean": jnp.zeros(())})) == pytest.approx(expected)


def test_a_model_without_latents():
    def nothing(y):
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    with pytest.raises(ValueError, match="no latent site"):
        run(AnnealedLangevin(nothing), jnp.ones(3))
