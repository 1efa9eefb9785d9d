"""Normal observations of coordinates: found and taken into the law, with evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import multivariate_normal

from numpyro_score import VE, VP, ScoreDistribution, ScoreModel, ScoreSDE
from numpyro_score.data.standardize import Affine
from numpyro_score.infer.twisted import coordinate_observations, run
from numpyro_score.infer.twisted.coordinate_observations import Conditioning
from numpyro_score.infer.twisted.run import partition_arguments
from numpyro_score.score.conditioning import NoisyDenoiser

MEAN = np.array([1.0, -2.0, 0.5])
COV = np.array([[4.0, 1.5, -0.6], [1.5, 1.0, 0.2], [-0.6, 0.2, 2.0]])
SCALE = np.sqrt(np.diag(COV))
UNIT = jnp.asarray(COV / np.outer(SCALE, SCALE), float)
Y = jnp.array([1.5, 3.0, 2.5])
KEY = jax.random.key(0)


def denoise(x, levels):
    return UNIT @ jnp.linalg.solve(UNIT + jnp.diag(levels**2), x)


def score_of(sde=VE()):
    standardize = Affine(jnp.asarray(MEAN, float), jnp.asarray(SCALE, float))
    return ScoreModel.from_coordinate_denoiser(
        denoise, (3,), sde, standardize=standardize
    )


SCORE = score_of()
ONE_LEVEL = ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (3,))


def conditioning(model, *args):
    static, arrays = partition_arguments(args, {})
    return Conditioning.of(model, static, arrays)


# what is found


def all_coordinates(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def slopes_and_offsets(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    with numpyro.plate("two", 2):
        numpyro.sample("y", dist.Normal(1 - 2 * x[::2], jnp.array([0.5, 3])), obs=y[:2])
    numpyro.sample("w", dist.Normal(x[0] / 5, 0.2), obs=y[2])


def missing_cells(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    y = y.at[1].set(jnp.nan)
    with numpyro.handlers.mask(mask=~jnp.isnan(y)):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def small_units(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(1e-6 * x, 1e-6), obs=1e-6 * y)


FOUND = {
    all_coordinates: ("y",),
    small_units: ("y",),
    slopes_and_offsets: ("w", "y"),
    missing_cells: ("y",),
}


@pytest.mark.parametrize("model", FOUND)
def test_observations_are_one_for_each_coordinate(model):
    given = conditioning(model, Y)
    assert (given.model.site, given.model.observed) == ("x", FOUND[model])
    value, sd, constant, _ = given.observations
    for x in (jnp.zeros(3), jnp.array([2.0, -1.0, 0.5])):
        total = sum_of_sites(model, x)
        is_seen = ~jnp.isnan(value)
        terms = dist.Normal(x, sd).log_prob(jnp.where(is_seen, value, 0.0))
        ours = jnp.where(is_seen, terms, 0.0)
        np.testing.assert_allclose(total, ours.sum() + constant, rtol=1e-5)


def sum_of_sites(model, x):
    """Return the log likelihood of a model at a point, without masked values."""
    seeded = numpyro.handlers.substitute(numpyro.handlers.seed(model, KEY), {"x": x})
    sites = numpyro.handlers.trace(seeded).get_trace(Y)
    observed = [s for s in sites.values() if s["type"] == "sample" and s["is_observed"]]
    terms = [s["fn"].log_prob(jnp.nan_to_num(s["value"])) for s in observed]
    return sum(jnp.sum(term) for term in terms)


# what is left to weights


def latent_scale(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x, s), obs=y)


def latent_offset(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x + m, 1.0), obs=y)


def curved(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(jnp.sin(x), 1.0), obs=y)


def cut_off(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(jnp.maximum(x, -3.0), 1.0), obs=y)


def rounded(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(x + jnp.floor(x), 1.0), obs=y)


def sums(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y[0])


def small_sums(y):
    """Not an observation of the middle coordinate, though they differ by 1e-6."""
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(1e-6 * x.sum(), 1e-6), obs=1e-6 * y[0])


def small_rounded(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(1e-6 * (x + jnp.floor(x)), 1e-6), obs=1e-6 * y)


def another_law(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.StudentT(3.0, x, 1.0), obs=y)


def half_weight(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    with numpyro.handlers.scale(scale=0.5):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def narrow(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(x, 0.05), obs=y)


def one_level(y):
    x = numpyro.sample("x", ScoreDistribution(ONE_LEVEL))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def transformed(y):
    law = dist.TransformedDistribution(
        ScoreDistribution(SCORE), dist.transforms.AffineTransform(1.0, 2.0)
    )
    x = numpyro.sample("x", law)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def several_points(y):
    with numpyro.plate("points", 1):
        x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)


def nothing(y):
    x = numpyro.sample("x", ScoreDistribution(SCORE))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0] + 0 * x[0])


LEFT = (
    latent_scale,
    latent_offset,
    curved,
    cut_off,
    rounded,
    sums,
    small_sums,
    small_rounded,
    another_law,
    half_weight,
    narrow,
    one_level,
    transformed,
    several_points,
    nothing,
)


@pytest.mark.parametrize("model", LEFT)
def test_other_observations_are_left_to_weights(model):
    assert conditioning(model, Y) is None


def test_values_that_are_no_numbers_are_left_to_weights():
    assert conditioning(all_coordinates, Y.at[0].set(jnp.nan)) is None


# posterior and evidence


def test_noisy_points_are_denoised_to_noisy_points():
    level = jnp.array([0.5, 0.0, 2.0])
    noisy = NoisyDenoiser(SCORE.denoiser, level, jnp.array(100.0))
    x, r = jnp.array([1.0, -2.0, 3.0]), 0.7
    own = UNIT + jnp.diag(level**2)
    exact = own @ jnp.linalg.solve(own + r**2 * jnp.eye(3), x)
    np.testing.assert_allclose(noisy(x, r), exact, rtol=1e-5)
    np.testing.assert_allclose(noisy(x, 0.0), x, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sde", [VE(), VP()])
def test_posterior_and_evidence_are_exact(sde, capsys):
    score, t, sd = score_of(sde), sde.time(0.3), jnp.array([0.6, 1.5, 2.0])

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score, t=t))
        numpyro.sample(
            "y", dist.Normal(2 * x[jnp.array([2, 0])] - 1, sd[:2]), obs=y[:2]
        )
        numpyro.sample("w", dist.Normal(x[0], sd[2]), obs=y[2])

    inference = ScoreSDE(
        model, num_samples=2000, num_particles=2000, levels=60, progress_bar=False
    )
    inference.run(KEY, Y)
    alpha = float(sde.alpha(t))
    law = alpha**2 * (COV + 0.09 * np.diag(np.diag(COV)))
    rows = np.array([[0, 0, 2], [2, 0, 0], [1, 0, 0.0]])
    spread = rows @ law @ rows.T + np.diag(np.square(sd))
    gain = law @ rows.T @ np.linalg.inv(spread)
    center = rows @ MEAN - np.array([1, 1, 0])
    mean = MEAN + gain @ (np.asarray(Y) - center)
    width = np.sqrt(np.diag(law - gain @ rows @ law))
    x = np.asarray(inference.get_samples()["x"])
    # the mean of 2000 draws has an error of .022 sd, their sd of .016
    np.testing.assert_allclose((x.mean(0) - mean) / width, 0, atol=0.08)
    np.testing.assert_allclose(x.std(0) / width, 1, atol=0.06)
    exact = multivariate_normal(center, spread).logpdf(np.asarray(Y))
    assert abs(inference.log_evidence - exact) < 0.02
    inference.print_summary()
    assert "Exactly observed: w, y by the law of x" in capsys.readouterr().out
    assert "w, y" in repr(inference)


@pytest.mark.slow
def test_other_sites_are_weighted_given_the_coordinates():
    def model(y):
        x = numpyro.sample("x", ScoreDistribution(SCORE))
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(x[:2], 1.0), obs=y[:2])
        numpyro.sample("w", dist.Normal(x[2], 0.5 + s), obs=y[2])

    results = []
    for covariance in (None, "jacobian"):
        inference = ScoreSDE(
            model,
            num_samples=4000,
            num_particles=4000,
            levels=40,
            covariance=covariance,
            progress_bar=False,
        )
        inference.run(KEY, Y)
        draws = inference.get_samples()
        columns = np.concatenate([draws["x"], draws["s"][:, None]], 1)
        results.append((columns, inference.log_evidence))
        assert ("exactly observed" in repr(inference)) == (covariance is None)
    (first, evidence), (second, reference) = results
    np.testing.assert_allclose(
        (first.mean(0) - second.mean(0)) / second.std(0), 0, atol=0.09
    )
    np.testing.assert_allclose(first.std(0) / second.std(0), 1, atol=0.08)
    assert abs(evidence - reference) < 0.05


@pytest.mark.slow
def test_second_run_compiles_nothing():
    inference = ScoreSDE(
        missing_cells, num_samples=50, num_particles=50, levels=5, progress_bar=False
    )
    inference.run(KEY, Y)
    sizes = [f._cache_size() for f in programs()]
    inference.run(KEY, 1.1 * Y)
    assert [f._cache_size() for f in programs()] == sizes


def programs():
    return run.run_chains, coordinate_observations._observe


def test_levels_beyond_the_highest_are_not_asked_of_a_noisy_law():
    """Its own noise adds to that of the point."""
    asked = []

    def denoise(x, level, context):
        asked.append(np.asarray(level))
        return x

    noisy = NoisyDenoiser(denoise, jnp.array([0.0, 3.0, 4.0]), jnp.array(4.5))
    noisy(jnp.zeros(3), 3.0)
    np.testing.assert_allclose(asked[0], [3.0, 18**0.5, 4.5], rtol=1e-6)
