"""Random rows, impossible observations and hidden random numbers are refused."""

from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import condition, do, replay, seed, substitute, trace
from numpyro.infer import MCMC, init_to_value

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.infer import ScoreSDE
from numpyro_score.kernel.annealing_path import AnnealingPath
from numpyro_score.kernel.tempered_potential import temper_model
from numpyro_score.model.initialization import initialize_latents
from numpyro_score.model.potential import model_potential

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")  # few
SDE = VE()
NORMAL = ScoreModel.from_fn(lambda x, t: -x / (1 + SDE.sigma(t) ** 2), SDE, ())
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


X = jnp.arange(1.0, 6.0)
COLUMN, OUTER = X[:, None], r"counts under the laws of others, \(5, 5\) in all"
BERNOULLI = dist.Bernoulli(logits=X)
ROWS, TABLE = {"n": -1}, {"m": -2, "n": -1}
MISSHAPED = {
    "column": (dist.Normal(X, 1), COLUMN, {}, OUTER),
    "column of NumPy": (dist.Normal(X, 1), np.asarray(COLUMN), {}, OUTER),
    "column of law": (dist.Normal(COLUMN, 1), X, {}, OUTER),
    "column in a plate": (dist.Normal(X, 1), COLUMN, {"plates": ROWS}, OUTER),
    "column of one mean": (dist.Normal(0, 1), COLUMN, {"plates": ROWS}, OUTER),
    "column as event": (dist.Normal(X, 1).to_event(1), COLUMN, {}, OUTER),
    "column of counts": (BERNOULLI, jnp.ones((5, 1), int), {}, OUTER),
    "column of masks": (dist.Normal(X, 1).mask(COLUMN > 2), X, {}, OUTER),
    "columns behind a mask": (dist.Normal(X, 1).mask(COLUMN > 2), COLUMN, {}, OUTER),
    "column of weights": (dist.Normal(X, 1), X, {"scale": COLUMN}, OUTER),
    "other number": (dist.Normal(X, 1), jnp.ones(3), {}, "cannot be combined"),
    "other event": (dist.Normal(X, 1).to_event(1), jnp.ones(3), {}, "cannot be comb"),
    "no event": (dist.Normal(X, 1).to_event(1), jnp.ones(()), {}, "fewer axes than on"),
}
SHAPED = {
    "rows": (dist.Normal(X, 1), X, {"plates": ROWS}),
    "one mean": (dist.Normal(0, 1), COLUMN, {}),
    "one value": (dist.Normal(X, 1), jnp.ones(()), {}),
    "events": (dist.MultivariateNormal(X, jnp.eye(5)), jnp.ones((4, 5)), {}),
    "plates": (dist.Normal(COLUMN, 1), X, {"plates": TABLE}),
    "expanded": (dist.Normal(X, 1).expand([5, 5]), COLUMN, {}),
    "mask": (dist.Normal(0, 1).mask(X > 2), X, {"plates": ROWS}),
    "mask of rows": (dist.Normal(X, 1).mask(COLUMN > 2), jnp.ones((5, 5)), {}),
    "weights": (dist.Normal(0, 1), X, {"plates": ROWS, "scale": X}),
    "classes": (dist.Categorical(logits=jnp.ones((5, 3))), jnp.ones(5, int), {}),
    "counts": (dist.Multinomial(3, jnp.ones((5, 3)) / 3), jnp.ones((5, 3), int), {}),
}


def observed_in_shape(law, y, plates=None, scale=1.0):
    numpyro.sample("mean", dist.Normal(0, 1))
    with ExitStack() as stack:
        for name, dim in (plates or {}).items():
            stack.enter_context(numpyro.plate(name, 5, dim=dim))
        stack.enter_context(numpyro.handlers.scale(scale=scale))
        numpyro.sample("y", law, obs=y)


@pytest.mark.filterwarnings("ignore:Missing a plate statement:UserWarning")  # NumPyro's
@pytest.mark.parametrize("kind", MISSHAPED)
def test_values_that_count_under_the_laws_of_others(kind):
    law, y, options, message = MISSHAPED[kind]
    with pytest.raises(ValueError, match=f"Site 'y' must be observed in .*{message}"):
        model_potential(observed_in_shape, (law, y), options)


@pytest.mark.parametrize("kind", SHAPED)
def test_values_in_the_shape_of_their_law(kind):
    law, y, options = SHAPED[kind]
    model_potential(observed_in_shape, (law, y), options)


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


def counts(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


def trials(y):
    share = numpyro.sample("share", dist.Beta(1.0, 1.0))
    numpyro.sample("y", dist.Binomial(np.array([5, 5, 8]), share), obs=y)


def shares(y):
    concentration = numpyro.sample("concentration", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Dirichlet(concentration * jnp.ones(3)), obs=y)


def learned_counts(y):
    rate = numpyro.sample("rate", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Poisson(jnp.exp(rate)), obs=y)


OUTSIDE = {
    "negative": (counts, [1.0, -1.0, 2.0], "1 of 3 values, such as -1.0, outside of"),
    "fraction": (counts, [1.5, 0.5, 2.0], "2 of 3 values, such as 1.5"),
    "too many": (trials, [5, 6, 7], "1 of 3 values, such as 6"),
    "no sum of 1": (shares, [[0.2, 0.3, 0.6], [0.2, 0.3, 0.5]], "1 of 2 values"),
    "learned": (learned_counts, [-1.0], "1 of 1 values"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", OUTSIDE)
def test_observations_outside_of_every_support(kernel, kind):
    model, y, message = OUTSIDE[kind]
    with pytest.raises(ValueError, match=f"Site 'y' .* within the support.*{message}"):
        run(kernel(model), np.array(y))


def test_observations_outside_of_every_support_for_particles():
    sizes = {"num_samples": 10, "num_particles": 10, "levels": 5}
    particles = ScoreSDE(learned_counts, **sizes, progress_bar=False)
    with pytest.raises(ValueError, match="Site 'y' must be observed within"):
        particles.run(jax.random.key(0), jnp.array([-1.0]))
    with pytest.raises(ValueError, match="Site 'y' must be observed within"):
        run(ParticleMetropolis(learned_counts), jnp.array([-1.0]))


def below(y):
    end = numpyro.sample("end", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Uniform(0.0, jnp.where(end > 0.5, 2.0, 1.0)), obs=y)


def summed_out(y):
    size = numpyro.sample(
        "size", dist.DiscreteUniform(1, 9), infer={"enumerate": "parallel"}
    )
    share = numpyro.sample("share", dist.Beta(1.0, 1.0))
    numpyro.sample("y", dist.Binomial(size, share), obs=y)


def hidden_negative(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate).mask(y >= 0), obs=y)


@pytest.mark.filterwarnings("ignore:.*Out-of-support:UserWarning")  # NumPyro's own
def test_supports_that_latents_move_and_masked_values_are_no_fault():
    for y in (0.5, np.array([1.5]), jnp.array(3.0)):
        model_potential(below, (y,), {})
    model_potential(summed_out, (np.array(7),), {})
    known = model_potential(hidden_negative, (np.array([2, -1]),), {})
    assert np.isfinite(known.value({"rate": jnp.zeros(())}))


def uniform(y):
    end = numpyro.sample("end", dist.Uniform(0.0, 1.0))
    numpyro.sample("y", dist.Uniform(0.0, end), obs=y)


@pytest.mark.filterwarnings("ignore:.*Out-of-support:UserWarning")  # NumPyro's own
def test_numbers_and_numpy_arrays_under_a_moving_support():
    for y in (0.25, np.float32(0.25), np.array([0.25, 0.125]), jnp.array(0.25)):
        potential = model_potential(uniform, (y,), {})
        # at end 1/2 the density is 2 for each value, and the Jacobian 1/4
        expected = np.log(4) - np.size(y) * np.log(2)
        value = jax.jit(potential.value)({"end": jnp.zeros(())})
        assert float(value) == pytest.approx(expected, rel=1e-6)
        assert np.isfinite(
            ScoreLangevin(uniform)
            .init(jax.random.split(jax.random.key(0), 3), 10, None, (y,))
            .potential_energy
        ).all()


def complex_factor(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("y", y * x)


@pytest.mark.parametrize("model", [observed_as_given, complex_factor])
def test_complex_densities(model):
    with pytest.raises(TypeError, match="'y' must have a real log density"):
        model_potential(model, (np.complex64(1j),), {})


GIVEN = {
    "substitute": lambda model: substitute(model, {"x": jnp.ones(())}),
    "substitute_fn": lambda model: substitute(
        model, substitute_fn=init_to_value(values={"x": jnp.ones(())})
    ),
    "replay": lambda model: replay(model, trace(seed(model, 0)).get_trace()),
}


@pytest.mark.filterwarnings("ignore:init_to_uniform:UserWarning")
@pytest.mark.parametrize("given", GIVEN)
def test_latent_sites_with_values_of_their_own_are_refused(given):
    """Tempered chains and particles drew their prior as this value."""

    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=1.0)

    assert model_potential(model, (), {}).prototype.keys() == {"x"}
    with pytest.raises(ValueError, match="'x' is latent, but the model gives it a val"):
        model_potential(GIVEN[given](model), (), {})
    for fixed in (condition, do):
        model_potential(fixed(model, {"x": jnp.ones(())}), (), {})


def test_latent_sites_of_a_scan_may_have_values():
    def model():
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(x, 1))
            numpyro.sample("y", dist.Normal(x, 1), obs=jnp.ones(()))
            return x, x

        scan(step, jnp.zeros(()), None, length=3)

    assert model_potential(model, (), {}).prototype["x"].shape == (3,)


def seeded_in_a_scan():
    def step(x, _):
        x = numpyro.sample("x", dist.Normal(x, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=jnp.ones(()))
        return x, x

    scan(step, jnp.zeros(()), None, length=3)


def with_a_key():
    x = numpyro.sample("x", dist.Normal(0, 1), rng_key=jax.random.key(1))
    numpyro.sample("y", dist.Normal(x, 1), obs=1.0)


def ordinary():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=1.0)


OWN_KEYS = {
    "seed": seed(ordinary, 0),
    "scan": seed(seeded_in_a_scan, 0),
    "rng_key": with_a_key,
}


@pytest.mark.parametrize("name", OWN_KEYS)
def test_draws_of_the_prior_follow_the_key_of_the_sampler(name):
    """Of a model with keys of its own all draws were one: evidence was 26 nats off."""
    model = OWN_KEYS[name]
    tempered = temper_model(model, (), {}, num_nodes=3)
    path = AnnealingPath.of(model, (), {}, num_nodes=3, num_reverse=1)
    start = partial(initialize_latents, model=model, potential=path.potential(0.1, 1.0))
    starts = partial(start, init_strategy=None, model_args=(), model_kwargs={})
    for draw in (tempered.draw_prior, partial(path.sample_prior, t=0.1), starts):
        first, second = (draw(jax.random.key(number))["x"] for number in (1, 2))
        assert (first != second).all()


def test_particles_of_a_model_with_keys_of_its_own():
    def model():
        learned = numpyro.sample("learned", ScoreDistribution(NORMAL))
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x + learned, 1), obs=1.0)

    guided = ScoreSDE(seed(model, 0), num_samples=100, levels=10, progress_bar=False)
    guided.run(jax.random.key(0))
    truth = dist.Normal(0, 3**0.5).log_prob(1.0)
    assert abs(float(guided.log_evidence) - float(truth)) < 0.3
    assert float(guided.get_samples()["x"].std()) > 0.5
