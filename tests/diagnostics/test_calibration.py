"""SBC, TARP and local C2ST on a conjugate model, where the posterior is known.

Unit normals x in two dimensions are seen through unit noise: the posterior is
Normal(y / 2, 1/2). Mutants of it must be found.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from numpyro_score.diagnostics import (
    ecdf_band,
    lc2st,
    lc2st_latent,
    plot_pit,
    replicate,
    sbc_ranks,
    simulation_based_calibration,
    tarp,
    uniformity_test,
)
from numpyro_score.diagnostics.c2st import import_sklearn
from numpyro_score.diagnostics.uniformity import pit_datatree
from tests.targets import unchecked

KEY = jax.random.key(0)
NUM_DRAWS = 63
MUTANTS = {"narrow": (0.0, 0.6), "wide": (0.0, 1.6), "high": (0.7, 1.0)}


def simulate(key):
    x, noise = jax.random.normal(key, (2, 2))
    return x, x + noise


def posterior(shift=0.0, scale=1.0):
    def sample(key, y):
        noise = jax.random.normal(key, (NUM_DRAWS, 2))
        return y / 2 + shift + scale * jnp.sqrt(0.5) * noise

    return sample


def log_likelihood(x, y):
    return -0.5 * jnp.square(y - x).sum()


def replications(key, sample, num=400):
    return replicate(key, simulate, sample, num, batch_size=num)


@pytest.fixture(scope="module")
def right():
    return replications(KEY, posterior())


def mutant(right, shift, scale):
    """Return the draws bent about the posterior mean."""
    mean = right.observations[:, None] / 2
    return mean + shift + scale * (right.draws - mean)


def test_a_right_posterior_passes(right):
    result = sbc_ranks(KEY, right.truths, right.draws)
    assert result.test.p_value > 0.01
    assert result.num_draws == NUM_DRAWS
    assert result.ranks["x"].min() >= 0
    assert result.ranks["x"].max() <= NUM_DRAWS
    covered = tarp(KEY, right.truths, right.draws)
    assert covered.test.p_value > 0.01
    assert abs(covered.area_z) < 4
    inside = (covered.lower <= covered.coverage) & (covered.coverage <= covered.upper)
    assert inside.all()


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_posteriors_are_found(name, right):
    draws = mutant(right, *MUTANTS[name])
    assert sbc_ranks(KEY, right.truths, draws).test.p_value < 1e-4
    covered = tarp(KEY, right.truths, draws)
    assert covered.test.p_value < 1e-3
    outside = (covered.coverage < covered.lower) | (covered.coverage > covered.upper)
    assert outside.any()


def test_area_has_the_sign_of_the_width(right):
    narrow, wide = (
        tarp(KEY, right.truths, mutant(right, 0.0, scale)) for scale in (0.6, 1.6)
    )
    assert narrow.area_z < -4
    assert wide.area_z > 4


def test_the_prior_passes_unless_the_check_looks_at_the_data(right):
    draws = np.asarray(jax.random.normal(jax.random.key(1), right.draws.shape))
    blind = sbc_ranks(KEY, right.truths, draws)
    assert blind.test.p_value > 0.01
    seeing = sbc_ranks(
        KEY,
        right.truths,
        draws,
        observations=right.observations,
        quantities=log_likelihood,
    )
    assert seeing.test.p_values["quantity"] < 1e-6
    assert tarp(KEY, right.truths, draws).test.p_value > 0.01
    near = right.observations / 2
    assert tarp(KEY, right.truths, draws, references=near).test.p_value < 1e-6


def test_names_and_shapes_are_kept():
    rng = np.random.default_rng(0)
    truths = {"a": rng.normal(size=(20, 3)), "b": rng.normal(size=20)}
    draws = {"b": rng.normal(size=(20, 9)), "a": rng.normal(size=(20, 9, 3))}
    result = sbc_ranks(KEY, truths, draws)
    assert {k: v.shape for k, v in result.ranks.items()} == {"a": (20, 3), "b": (20,)}
    assert result.test.p_values["a"].shape == (3,)
    tree = pit_datatree(result.pit)
    assert tree["prior_sbc"]["a"].shape == (1, 20, 3)
    np.testing.assert_array_equal(tree["prior_sbc"]["b"][0], result.pit["b"])
    plot = plot_pit(result.pit)
    assert set(plot.viz["band"].data_vars) == {"a", "b"}


def test_ranks_of_integers_break_ties_evenly():
    """Counts that are all equal say nothing: every rank is as likely."""
    truths, draws = np.zeros(2000, int), np.zeros((2000, 9), int)
    result = sbc_ranks(KEY, truths, draws)
    counts = np.bincount(result.ranks["x"], minlength=10)
    assert len(counts) == 10
    assert np.all(np.abs(counts - 200) < 4 * np.sqrt(200 * 0.9))


@pytest.mark.parametrize("compiled", [True, False])
def test_every_simulation_has_noise_of_its_own(compiled):
    """In all blocks, of which the last is not full; its truth is not its noise."""
    found = replicate(
        KEY,
        lambda key: (jax.random.normal(key), jnp.zeros(())),
        lambda key, y: jax.random.normal(key, (1,)),
        5,
        batch_size=2,
        compiled=compiled,
        progress_bar=False,
    )
    assert found.truths.shape == (5,)
    assert len(np.unique([*found.truths, *found.draws[:, 0]])) == 10


def test_ties_of_different_sites_are_broken_independently():
    """All draws equal the truth, so that every rank is a uniform number."""
    sites = {"a": np.zeros(400), "b": np.zeros(400)}
    draws = {name: np.zeros((400, 9)) for name in sites}
    found = sbc_ranks(KEY, sites, draws)
    for values in (found.ranks, found.pit):
        correlation = np.corrcoef(values["a"], values["b"])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(400)


def test_rank_is_the_number_of_smaller_draws():
    truths = np.array([0.5, -9.0, 9.0])
    draws = np.array([[0.0, 1.0, 2.0]] * 3)
    result = sbc_ranks(KEY, truths, draws)
    np.testing.assert_array_equal(result.ranks["x"], [1, 0, 3])
    assert np.all(np.floor(result.pit["x"] * 4) == [1, 0, 3])


def test_driver_agrees_with_its_parts():
    options = {"batch_size": 30, "progress_bar": False}
    result = simulation_based_calibration(KEY, simulate, posterior(), 50, **options)
    key_replicate, key_ranks = jax.random.split(KEY)
    parts = replicate(key_replicate, simulate, posterior(), 50, batch_size=30)
    again = sbc_ranks(key_ranks, parts.truths, parts.draws)
    np.testing.assert_array_equal(result.ranks["x"], again.ranks["x"])


def test_functions_outside_jax_are_called_one_by_one(capsys):
    calls = []

    def sample(key, y):
        calls.append(np.asarray(y))  # fails under tracing
        return {"x": np.asarray(jax.random.normal(key, (5, 2)))}

    def named(key):
        x, y = simulate(key)
        return {"x": x}, y

    out = replicate(KEY, named, sample, 3, compiled=False, progress_bar=True)
    assert len(calls) == 3
    assert out.draws["x"].shape == (3, 5, 2)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.slow
def test_mcmc_is_calibrated():
    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=y)

    def sample(key, y):
        options = {"num_warmup": 200, "num_samples": 315, "thinning": 5}
        mcmc = MCMC(NUTS(model), progress_bar=False, **options)
        mcmc.run(key, y)
        return mcmc.get_samples()

    def named(key):
        x, y = simulate(key)
        return {"x": x}, y

    result = simulation_based_calibration(KEY, named, sample, 100, progress_bar=False)
    assert result.num_draws == 63
    assert result.test.p_value > 0.01


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated():
    """A hundred right posteriors: p-values below 0.05 are a few, and bands hold."""
    every = replicate(KEY, simulate, posterior(), 10_000, batch_size=10_000)
    alarms, left = [], []
    for j in range(100):
        truths, draws = (
            a[100 * j : 100 * (j + 1)] for a in (every.truths, every.draws)
        )
        ranked = sbc_ranks(KEY, truths, draws)
        covered = tarp(jax.random.key(j), truths, draws)
        alarms.append((ranked.test.p_value < 0.05, covered.test.p_value < 0.05))
        outside = (covered.coverage < covered.lower) | (
            covered.coverage > covered.upper
        )
        left.append(outside.any())
    assert np.all(np.mean(alarms, axis=0) < 0.14)  # 0.05 and four standard errors
    assert np.mean(left) < 0.14


def test_bands_and_tests_of_uniform_values():
    band = ecdf_band(50, 0.9)
    assert band.levels[0] == band.lower[0] == 0
    assert band.levels[-1] == band.upper[-1] == 1
    wide = ecdf_band(50, 0.99)
    assert np.all(wide.upper - wide.lower >= band.upper - band.lower)
    even = (np.arange(50) + 0.5) / 50
    both = uniformity_test({"even": even, "two": np.stack([even, even**3], 1)})
    assert both.p_values["two"].shape == (2,)
    assert both.p_value == pytest.approx(3 * both.p_values["two"][1])


# --- local C2ST -------------------------------------------------------------------


def quadratic():
    """A classifier that can learn shifts and scales, and how they depend on y."""
    linear_model = import_sklearn("linear_model")
    pipeline = import_sklearn("pipeline")
    preprocessing = import_sklearn("preprocessing")
    return pipeline.make_pipeline(
        preprocessing.PolynomialFeatures(2), linear_model.LogisticRegression()
    )


def local_test(key, wrongness, at, num=1000, *, num_null):
    """Test a posterior that is wrong by a shift of ``wrongness(y)``."""
    keys = jax.random.split(key, 4)
    run = replicate(keys[0], simulate, posterior(), num, batch_size=num)
    draws = run.draws[:, 0] + np.asarray(wrongness(run.observations))
    fresh = posterior()(keys[1], at) + wrongness(at)
    return lc2st(
        keys[2],
        run.truths,
        draws,
        run.observations,
        at,
        fresh,
        num_null=num_null,
        classifier=quadratic(),
    )


def to_the_right(y):
    """Wrong by 2 at y[0] = 2, right where y[0] = 0."""
    return jnp.stack([y[..., 0], jnp.zeros_like(y[..., 0])], -1)


def test_local_error_is_found():
    at = jnp.array([2.0, 0.0])
    result = local_test(KEY, to_the_right, at, num=400, num_null=19)
    assert result.p_value == pytest.approx(1 / 20)
    assert result.null.shape == (19,)


@pytest.mark.slow
def test_local_error_is_not_found_where_it_is_not():
    there = local_test(KEY, to_the_right, jnp.array([2.0, 0.0]), num_null=1)
    here = local_test(KEY, to_the_right, jnp.array([0.0, 0.0]), num_null=1)
    assert here.statistic < there.statistic / 10


def latents(key, shift, num=1000):
    """Truths mapped to noise by a posterior that is off by ``shift`` times y."""
    run = replicate(key, simulate, posterior(), num, batch_size=num)
    y = run.observations
    return (run.truths - y / 2 - shift * y) / np.sqrt(0.5), y


def test_latent_test_finds_what_is_not_noise():
    at = np.array([2.0, 0.0])
    options = {"num_null": 19, "classifier": quadratic()}
    wrong = lc2st_latent(KEY, *latents(KEY, 0.4, 400), at, **options)
    assert wrong.p_value == pytest.approx(1 / 20)
    assert wrong.probabilities.shape == (1000,)


def test_local_tests_do_not_depend_on_the_units_of_observations():
    y, noise = np.random.default_rng(0).normal(size=(2, 60, 2))
    noise = noise - 0.4 * y  # off, and more so far out
    options = {"num_null": 2, "classifier": quadratic()}
    at = np.array([2.0, 0.5])
    one, other = (
        lc2st_latent(KEY, noise, unit * y + 3, unit * at + 3, **options)
        for unit in (1.0, 100.0)
    )
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-3)
    assert np.ptp(one.probabilities) > 0.1


@pytest.mark.long
@pytest.mark.slow
def test_local_p_values_are_uniform_for_a_right_posterior():
    at = jnp.array([1.0, -1.0])
    none = jnp.zeros_like
    p_values = [
        local_test(k, none, at, num=300, num_null=9).p_value
        for k in jax.random.split(KEY, 30)
    ]
    options = {"num_null": 9, "classifier": quadratic(), "num_samples": 300}
    latent = [
        lc2st_latent(k, *latents(k, 0.0, 300), at, **options).p_value
        for k in jax.random.split(KEY, 30)
    ]
    for p in (p_values, latent):
        assert np.mean(p) == pytest.approx(0.55, abs=4 * 0.29 / np.sqrt(30))
        assert np.mean(np.array(p) <= 0.1) < 0.1 + 4 * np.sqrt(0.09 / 30)


@pytest.mark.slow
def test_default_classifier_finds_a_local_error():
    run = replications(KEY, posterior(), 1000)
    at = jnp.array([2.0, 0.0])
    draws = run.draws[:, 0] + np.asarray(to_the_right(run.observations))
    fresh = posterior()(KEY, at) + to_the_right(at)
    result = lc2st(KEY, run.truths, draws, run.observations, at, fresh, num_null=9)
    assert result.p_value == pytest.approx(1 / 10)


# --- bad input --------------------------------------------------------------------


def test_bad_arrays_are_named(right):
    truths, draws = right.truths, right.draws
    with pytest.raises(ValueError, match=r"same names.*\['a'\] and \['b'\]"):
        sbc_ranks(KEY, {"a": truths}, {"b": draws})
    with pytest.raises(ValueError, match=r"`draws` of 'x' must have the shape"):
        sbc_ranks(KEY, truths, draws[:, 0])
    holes = draws.copy()
    holes[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"`draws` must be finite in .x.*1 rows"):
        tarp(KEY, truths, holes)
    with pytest.raises(ValueError, match="`quantities` needs `observations`"):
        sbc_ranks(KEY, truths, draws, quantities=log_likelihood)
    with pytest.raises(ValueError, match=r"`prob` must lie in \(0, 1\).*Got 1\."):
        ecdf_band(10, 1.0)


@pytest.mark.parametrize("name", ["num_simulations", "batch_size"])
def test_bad_numbers_are_named(name):
    numbers = {"num_simulations": 5, "batch_size": 5, name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
        replicate(KEY, simulate, posterior(), **numbers)


BAD_LOCAL = {
    "`observations` must have a row": {"observations": np.zeros((9, 2))},
    "`observation` must have the shape": {"observation": np.zeros(3)},
    "`draws_at` must have the shape": {"draws_at": np.zeros((7, 3))},
    "`num_null` must be an integer of at least 1": {"num_null": 0},
    "`observation` must be finite": {"observation": np.full(2, np.nan)},
}


@pytest.mark.parametrize("message", BAD_LOCAL)
def test_bad_local_tests_are_named(message):
    rows = np.zeros((10, 2))
    good = {
        "truths": rows,
        "draws": rows,
        "observations": rows,
        "observation": rows[0],
        "draws_at": rows,
    }
    with unchecked(), pytest.raises(ValueError, match=message):
        lc2st(KEY, **{**good, **BAD_LOCAL[message]})
