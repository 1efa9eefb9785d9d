"""Draws given one observation, judged by the exact score of the model."""

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import MLP, VE
from numpyro_score.consistency.model import init_model
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import NPSE, OneStepPosterior
from numpyro_score.infer.amortized.draw_check import (
    MOVED_LIMITS,
    ExactDensity,
    breaks_identities,
    draw_errors,
    find_errors,
    outlier_words,
    warn_of_wrong_draws,
)
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from tests.npse_models import ExactDenoiser, exact_gaussian, gaussian_posterior
from tests.targets import unchecked

KEY = jax.random.key(0)
Y = np.array([0.4, -1.0, -2.0])
JUDGED = FitVerdict((), 0)  # of a posterior that was fitted with `check=True`
MEAN, PRECISION = np.array([1.0, 2.0]), np.array([[2.0, 0.9], [0.9, 1.0]])
COVARIANCE = np.linalg.inv(PRECISION)


class Law(NamedTuple):
    """Exact draws (rng, count) of a law, and its score at any points."""

    draw: Callable
    score: Callable


def curve(width):
    """Return x and y = x^2, or y = x where the width is small, with normal noise."""
    power = 2 if width > 0.01 else 1

    def draw(rng, count):
        x = rng.normal(size=count)
        return np.stack([x, x**power + width * rng.normal(size=count)], 1)

    def score(z):
        error = (z[:, 1] - z[:, 0] ** power) / width**2
        slope = power * z[:, 0] ** (power - 1)
        return np.stack([slope * error - z[:, 0], -error], 1)

    return Law(draw, score)


def draw_funnel(rng, count):
    v = 3 * rng.normal(size=count)
    return np.stack([v, np.exp(v / 2) * rng.normal(size=count)], 1)


def funnel_score(z):
    v, x = z.T
    precision = np.exp(-v)
    return np.stack([-v / 9 - 0.5 + 0.5 * x**2 * precision, -x * precision], 1)


LAWS = {
    "normal": Law(
        lambda rng, count: rng.multivariate_normal(MEAN, COVARIANCE, count),
        lambda z: (MEAN - z) @ PRECISION,
    ),
    "two modes": Law(
        lambda rng, count: (
            rng.normal(size=(count, 1)) + 6 * rng.choice([-1, 1], size=(count, 1))
        ),
        lambda z: 6 * np.tanh(6 * z) - z,
    ),
    "Student": Law(
        lambda rng, count: rng.standard_t(1.5, size=(count, 2)),
        lambda z: -2.5 * z / (1.5 + z**2),
    ),
    "skewed": Law(
        lambda rng, count: np.log(rng.gamma(0.3, size=(count, 3))),
        lambda z: 0.3 - np.exp(z),
    ),
    "funnel": Law(draw_funnel, funnel_score),
    "banana": curve(0.1),
    "nearly equal": curve(1e-4),
}


def is_found(z, score):
    """Whether draws with these scores are found to be wrong."""
    errors = draw_errors(z, score)
    return breaks_identities(z, score) if errors is None else bool(errors.words("abc"))


@pytest.mark.parametrize("count", [64, 256, 1000])
@pytest.mark.parametrize("law", LAWS)
def test_exact_draws_of_any_law_are_right(law, count):
    for seed in range(40):
        z = LAWS[law].draw(np.random.default_rng(seed), count)
        assert not is_found(z, LAWS[law].score(z))


@pytest.mark.parametrize("law", sorted(LAWS.keys() - {"funnel", "Student"}))  # no scale
def test_shifted_draws_of_any_law_are_found(law):
    for seed in range(10):
        z = LAWS[law].draw(np.random.default_rng(seed), 1000)
        low, high = np.quantile(z, [0.16, 0.84], axis=0)
        shifted = z + (high - low) * np.where(np.arange(z.shape[1]) == 0, 1, 0)
        assert is_found(shifted, LAWS[law].score(shifted))


@pytest.mark.parametrize(("offset", "factor"), [(3.0, 1.0), (0.0, 3.0), (-8.0, 0.3)])
def test_sizes_are_those_of_wrong_draws(offset, factor):
    sd = np.sqrt(np.diag(COVARIANCE))
    z = np.random.default_rng(0).multivariate_normal(
        MEAN + offset * sd, factor**2 * COVARIANCE, 1000
    )
    errors = draw_errors(z, LAWS["normal"].score(z))
    noise = 4 * factor / np.sqrt(1000)
    np.testing.assert_allclose(errors.offset, offset, atol=noise)
    np.testing.assert_allclose(np.exp(errors.log_ratio), factor, rtol=0.1)
    words = errors.words(("a", "b"))
    assert ("sd (high)" in words, "sd (low)" in words) == (offset > 0, offset < 0)
    assert ("too wide" in words, "too narrow" in words) == (factor > 1, factor < 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShiftedDenoiser:
    """The exact one of the Gaussian model, given an observation that is off."""

    def __call__(self, x, level, context):
        return ExactDenoiser()(x, level, context + jnp.array([1.0, 1.0, 0.0]))


def shifted_gaussian(verdict=JUDGED):
    exact = exact_gaussian()
    score = replace(exact.score, denoiser=ShiftedDenoiser())
    return replace(exact, score=score, verdict=verdict)


def test_exact_posterior_is_silent():
    posterior = replace(exact_gaussian(), verdict=JUDGED)
    assert posterior.sample(KEY, Y)["x"].shape == (1000, 2)


def test_wrong_posterior_warns_with_the_sizes():
    posterior = shifted_gaussian()
    with pytest.warns(UserWarning, match="are not those of the posterior") as record:
        draws = posterior.sample(KEY, Y)["x"]
    mean, covariance = gaussian_posterior(Y)
    offset = (np.asarray(draws).mean(0) - mean) / np.sqrt(np.diag(covariance))
    (warning,) = record
    words = r"x\[0\] is off by about ([0-9.]+) sd \(high\)"
    found = re.search(words, str(warning.message))
    assert float(found[1]) == pytest.approx(offset[0], abs=0.15)


def test_draws_given_each_of_many_observations_are_judged():
    """Rows of the exact posterior are silent; those that are wrong are named."""
    ys = np.stack([Y, Y + 1.0, Y - 2.0])
    exact = replace(exact_gaussian(), verdict=JUDGED)
    draws = exact.sample_each(KEY, ys)["x"]  # warnings are errors
    means = [gaussian_posterior(y)[0] for y in ys]
    np.testing.assert_allclose(draws.mean(1), means, atol=0.1)
    words = r"Given 3 of the 3 .* in row 0, x\[0\] is off by .* sd \(high\)"
    with pytest.warns(UserWarning, match=words):
        shifted_gaussian().sample_each(KEY, ys)


def test_posteriors_are_compiled_with_other_functions():
    """Known observations are checked there; traced ones, and draws, are not."""
    posterior = shifted_gaussian()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        draws = posterior.sample(KEY, Y, 100)["x"]
    compiled = jax.jit(lambda y: posterior.sample(KEY, y, 100)["x"])(Y)
    np.testing.assert_allclose(compiled, draws, rtol=1e-4, atol=1e-4)
    density = posterior.log_prob({"x": draws[:2]}, Y)
    inside = jax.jit(lambda x: posterior.log_prob({"x": x}, Y))(draws[:2])
    np.testing.assert_allclose(inside, density, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["importance", "sample_plate"])
def test_what_cannot_be_compiled_says_so(name):
    posterior = exact_gaussian()

    def run(y):
        return getattr(posterior, name)(KEY, y, 100)

    with unchecked(), pytest.raises(TypeError, match=f"known when `{name}` is called"):
        jax.jit(run)(Y if name == "importance" else Y[None])


@pytest.mark.parametrize("case", ["unchecked", "few draws"])
def test_draws_that_are_not_judged(case):
    posterior = shifted_gaussian(None if case == "unchecked" else JUDGED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample(KEY, Y, 63 if case == "few draws" else 1000)


def test_wrong_one_step_posterior_warns():
    net = MLP(2, width=8, depth=1, context_size=3)
    unit = Affine.identity((2,)), (2,), Affine.identity((3,))
    untrained = init_model(KEY, net, VE(), *unit)
    posterior = OneStepPosterior(untrained, exact_gaussian().simulator)
    with pytest.warns(UserWarning, match="from which this was distilled"):
        posterior.sample(KEY, Y)
    replace(posterior, check=False).sample(KEY, Y)  # warnings are errors


def smooth():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(2 * x, 0.5))


def steps():
    """A density that jumps in its latent: Stein's identities do not hold."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(jnp.floor(2 * x), 0.5))


def no_density():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.deterministic("y", x**2)


@pytest.mark.parametrize("model", [smooth, steps, no_density])
def test_models_without_a_density_are_not_judged(model):
    simulator = NPSE(model, "y").simulator()
    z = 5 + jax.random.normal(KEY, (1000, 1))
    loud = pytest.warns(UserWarning, match="not those of the posterior")
    with nullcontext() if model is no_density else loud:
        warn_of_wrong_draws(simulator, z, jnp.full(1, 3.0))


def exact_draws_of_steps(y, num_samples):
    grid = np.linspace(-6, 6, 200_001)
    log_density = -(grid**2) / 2 - 2 * (y - np.floor(2 * grid)) ** 2
    weights = np.exp(log_density - log_density.max())
    return np.random.default_rng(0).choice(grid, num_samples, p=weights / weights.sum())


@pytest.mark.parametrize("y", [-2.2, 0.5, 3.0])
def test_exact_draws_of_a_density_that_jumps_are_silent(y):
    """Its gradient misses the steps: Stein's identities alone would warn."""
    z = exact_draws_of_steps(y, 1000)[:, None]
    simulator = NPSE(steps, "y").simulator()
    warn_of_wrong_draws(simulator, jnp.asarray(z), jnp.full(1, y))
    wide = z.mean() + 3 * (z - z.mean())
    with pytest.warns(UserWarning, match="x is about .* times too wide"):
        warn_of_wrong_draws(simulator, jnp.asarray(wide), jnp.full(1, y))


def bounded():
    """A density that is zero for x below y."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.validation_enabled(False):
        numpyro.sample("y", dist.Uniform(-jnp.exp(x), jnp.exp(x)))


def test_draws_of_density_zero_are_loud():
    simulator = NPSE(bounded, "y").simulator()
    x = np.random.default_rng(0).normal(size=20_000)
    exact = x[np.random.default_rng(1).uniform(size=x.size) < np.exp(-x) / 20]
    exact = exact[exact > np.log(0.5)][:200, None]
    y = jnp.full(1, 0.5)
    wrong = np.where(np.arange(len(exact))[:, None] % 10 == 0, -3.0, exact)
    with pytest.warns(UserWarning, match="10% of them have a density of zero"):
        warn_of_wrong_draws(simulator, jnp.asarray(wrong), y)


def failing():
    """A simulator that fails for x above 1: the posterior is cut off there."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.validation_enabled(False):
        numpyro.sample("y", dist.Normal(jnp.where(x > 1, jnp.nan, x), 1.0))


def test_simulators_that_fail_are_judged_without_a_further_warning():
    simulator = NPSE(failing, "y").simulator()
    x = np.random.default_rng(0).normal(0.5, 0.5**0.5, 4000)
    x = x[x < 1][:1000, None]
    warn_of_wrong_draws(simulator, jnp.asarray(x), jnp.ones(1))
    with pytest.warns(UserWarning, match="% of them have a density of zero"):
        warn_of_wrong_draws(simulator, jnp.asarray(x + 0.3), jnp.ones(1))


def flat_gradient():
    """A density whose gradient is nowhere finite, as of a square root at 0."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    zero = jnp.sqrt(0.0 * x)
    numpyro.sample("y", dist.Normal(x + zero, 1.0))


@pytest.mark.parametrize(
    ("model", "z", "message"),
    [
        (smooth, np.zeros((500, 1)), "some number is the same in most of them"),
        (smooth, np.repeat([[1.4], [99.0]], [450, 50], axis=0), "10% of them have"),
        (flat_gradient, 7.0 + np.linspace(-1, 1, 500)[:, None], "is off by about"),
        (flat_gradient, np.linspace(-1, 1.2, 500)[:, None], None),
    ],
)
def test_draws_of_one_value_and_scores_that_are_lost(model, z, message):
    simulator = NPSE(model, "y").simulator()
    loud = pytest.warns(UserWarning, match=message) if message else nullcontext()
    with loud:
        warn_of_wrong_draws(simulator, jnp.asarray(z), jnp.zeros(1))


def wild(rng):
    """Normal draws, of which one in thirty is far off."""
    far = rng.uniform(size=(1000, 1)) < 1 / 30
    return np.where(far, 400.0, rng.normal(1.5, 0.25, (1000, 1)))


def test_a_few_wild_draws_are_loud():
    """By the averages of Stein's identities they are noise."""
    simulator = NPSE(smooth, "y").simulator()
    z = jnp.asarray(wild(np.random.default_rng(0)))
    with pytest.warns(UserWarning, match="[34]% of them have a density .* far below"):
        warn_of_wrong_draws(simulator, z, jnp.full(1, 3.0))


@pytest.mark.parametrize(
    ("offset", "factor", "message"),
    [
        (0.1, 1.1, None),
        (-0.1, 0.9, None),
        (0.7, 1.0, r"x is off by about 0\.[678] sd \(high\)"),
        (0.0, 1.65, r"x is about 1\.[567] times too wide"),
        (0.0, 0.6, r"x is about 1\.[567] times too narrow"),
    ],
)
def test_errors_above_half_an_sd_are_loud(offset, factor, message):
    """The posterior given y = 3 is N(24 / 17, 1 / 17); 1,000 draws suffice."""
    simulator = NPSE(smooth, "y").simulator()
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(1000, 1))
        z = jnp.asarray(24 / 17 + (offset + factor * noise) / 17**0.5)
        expected = (
            pytest.warns(UserWarning, match=message) if message else nullcontext()
        )
        with expected:
            warn_of_wrong_draws(simulator, z, jnp.full(1, 3.0))


def skewed():
    numpyro.sample("x", dist.Gamma(0.3))
    numpyro.sample("y", dist.Normal(0, 1))


def test_small_errors_of_skewed_laws_are_silent():
    """Stein's identities exaggerate them: the score is exponential in z = log x.

    The sd of x is 1.38 times that of its law; with twice these errors it is 1.9 times.
    """
    simulator = NPSE(skewed, "y").simulator()
    for seed in range(5):
        z = np.log(np.random.default_rng(seed).gamma(0.3, size=(1000, 1)))
        low, middle, high = np.quantile(z, [0.16, 0.5, 0.84])
        z = middle + 1.05 * (z - middle) + 0.05 * (high - low) / 2
        warn_of_wrong_draws(simulator, jnp.asarray(z), jnp.zeros(1))


def test_draws_given_several_observations_are_judged_by_all():
    """y_i ~ N(2 x, .5): the precision given five is 1 + 5 * 16, given one 1 + 16."""
    y = jnp.array([1.0, 2.0, 3.0, 2.5, 1.5])
    simulator = NPSE(smooth, "y").simulator()
    noise = np.random.default_rng(0).normal(size=(1000, 1))
    mean = 8 * float(y.sum()) / 81
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_wrong_draws(simulator, jnp.asarray(mean + noise / 9), y)
    too_wide = jnp.asarray(mean + noise / 17**0.5)
    with pytest.warns(UserWarning, match=r"x is about 2\.\d times too wide. Pass few"):
        warn_of_wrong_draws(simulator, too_wide, y, "Pass fewer.")


def sure():
    x = numpyro.sample("x", dist.Normal(0, 0.2))
    numpyro.sample("y", dist.Normal(2 * x, 0.5))


def test_several_observations_have_one_prior():
    """It disagrees with them: precision 25 + 5 * 16, and not 5 * (25 + 16)."""
    noise = np.random.default_rng(0).normal(size=(1000, 1))
    z = jnp.asarray(5 * 8 * 8 / 105 + noise / 105**0.5)
    simulator = NPSE(sure, "y").simulator()
    warn_of_wrong_draws(simulator, z, jnp.full(5, 8.0))  # warnings are errors


def test_rare_observation_is_loud():
    """The posterior is right on average, and far off where simulations are rare."""

    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jnp.exp(2 * x), 1.0))

    posterior = NPSE(model, "y").fit(KEY, 2000, num_steps=1000, progress_bar=False)
    assert posterior.verdict.ok
    posterior.sample(KEY, 3.0)
    with pytest.warns(UserWarning, match=r"x is .* sd|x is .* times too wide"):
        posterior.sample(KEY, 700.0)


def test_draws_that_are_too_wide_in_the_units_of_the_model_are_found():
    """A log-normal law: .3 sd and a fourth too wide in z are 1.7 of its sd."""
    exact = 0.7 * np.random.default_rng(0).normal(size=(1000, 1))
    density = ExactDensity(
        np.zeros(1000), -exact, True, lambda: True, lambda z, root: exact, 1
    )
    wide = 0.2 + 1.25 * exact
    assert find_errors(("z",), wide, density) == ""
    found = find_errors(("z",), wide, density._replace(constrain=np.exp))
    assert re.fullmatch(r"z .*times too wide \(of its values in the model\)", found)
    assert find_errors(("z",), exact, density._replace(constrain=np.exp)) == ""


@pytest.mark.parametrize(("count", "shift"), [(5, 40.0), (9, -1e4), (1, 1e6)])
def test_a_few_draws_far_away_are_found(count, shift):
    """Steps do not lead back from there, and they are fewer than one in a hundred."""
    exact = np.random.default_rng(0).normal(size=(1000, 2))
    z = exact.copy()
    z[:count, 1] += shift
    density = ExactDensity(
        -(z**2).sum(1) / 2, -z, False, lambda: False, lambda z, root: z, 2
    )
    words = rf"0\.{count}% of them have a density .* by which b is .* times too wide"
    assert re.fullmatch(words, find_errors("ab", z, density))
    z[:, 1] = exact[:, 1]  # of low density by another number that is not judged
    assert outlier_words("ab", np.arange(1000) < count, z) == ""


@pytest.mark.parametrize(
    ("ratio", "offset", "words"),
    [
        (0.72, 0.0, r"z is about 1\.\d times too narrow"),
        (1.0, -0.5, r"z is off by about 0\.\d sd \(low\)"),
        (1.0, 0.0, ""),
    ],
)
def test_estimates_beyond_the_limits_are_not_passed_for_their_errors(
    ratio, offset, words
):
    """As of shared latents given local ones: steps decide."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(1000, 1))
    z = offset + ratio * exact
    score = 2.0 * rng.normal(size=z.shape) - z
    errors = draw_errors(z, score)
    assert errors.is_clear
    assert errors.words(("z",), MOVED_LIMITS) == ""
    density = ExactDensity(
        np.zeros(1000), score, False, lambda: False, lambda z, root: exact, 1
    )
    assert re.fullmatch(words, find_errors(("z",), z, density))
