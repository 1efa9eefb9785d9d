"""The verdict on an amortized posterior: silent on exact ones, loud with the size."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import MLP
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import NPSE
from numpyro_score.infer.amortized import storage
from numpyro_score.infer.amortized.calibration import cross_verdict
from numpyro_score.infer.amortized.fit_verdict import (
    CoordinateFit,
    FitKind,
    FitVerdict,
    _far_test,
    held_out_verdict,
    judge_fit,
    judge_integers,
    num_rows,
    with_verdict,
)
from numpyro_score.infer.amortized.rank_regression import predict_scores
from numpyro_score.infer.amortized.simulator import Simulations
from numpyro_score.loss import DenoisingScoreMatching, TargetScore
from tests.npse_models import exact_gaussian

NUM_DRAWS = 31
NOISE = 0.5  # sd of y given x; x is standard normal
SD = NOISE / np.sqrt(1 + NOISE**2)


def judged(law, num_simulations=300, seed=0):
    """Return the verdict on draws of ``law(rng, rows)`` -> z, y, draws, as of x."""
    rng = np.random.default_rng(seed)
    z, y, draws = law(rng, num_simulations)
    z_train, y_train, _ = law(rng, 1000)
    predictions = predict_scores(z_train, y_train, y)
    return judge_fit(rng, ("x",), z, draws, z_train, predictions)


def gaussian(width=1.0, offset=0.0, gain=1.0):
    """Draws of the posterior of a Gaussian model, wrong by as much as is said."""

    def law(rng, rows):
        z = rng.normal(size=(rows, 1))
        y = z + NOISE * rng.normal(size=(rows, 1))
        mean = gain * y / (1 + NOISE**2) + offset * width * SD
        noise = rng.normal(size=(rows, NUM_DRAWS, 1))
        return z, y, mean[:, None] + width * SD * noise

    return law


def returns_the_prior(rng, rows):
    z, y, _ = gaussian()(rng, rows)
    return z, y, rng.normal(size=(rows, NUM_DRAWS, 1))


def two_modes(rng, rows):
    """x = s |y| exactly, with a sign that is not observed; the posterior is exact."""
    z = rng.normal(size=(rows, 1))
    y = np.abs(z) + 0.1 * rng.normal(size=(rows, 1))
    grid = np.linspace(-5, 5, 1001)
    density = np.exp(-0.5 * grid**2 - 0.5 * np.square((y - np.abs(grid)) / 0.1))
    levels = np.cumsum(density, axis=1) / density.sum(axis=1, keepdims=True)
    uniform = rng.random((rows, NUM_DRAWS))
    draws = [
        np.interp(u, level, grid) for u, level in zip(uniform, levels, strict=True)
    ]
    return z, y, np.stack(draws)[..., None]


def skewed(rng, rows):
    """A log rate given heavy-tailed counts: its posterior is exact, and skewed at 0."""
    z = np.log(rng.gamma(0.5, 20.0, size=(rows, 1)))
    y = rng.poisson(np.exp(z)).astype(float)
    draws = rng.gamma(0.5 + y[:, None], 20 / 21, size=(rows, NUM_DRAWS, 1))
    return z, y, np.log(draws)


def permuted(rng, rows):
    """The right posterior of another observation."""
    z, y, draws = gaussian()(rng, rows)
    return z, y, np.roll(draws, 1, axis=0)


@pytest.mark.parametrize("law", [gaussian(), two_modes, skewed])
def test_exact_posteriors_pass(law):
    verdicts = [judged(law, seed=seed) for seed in range(3)]
    assert all(verdict.ok for verdict in verdicts)
    assert set(verdicts[0].describe().values()) == {"no finding"}
    assert abs(verdicts[0].coordinates[0].response) < 0.2


def test_false_alarms_are_rare():
    """The p-values are at least uniform, so that findings are as rare as they say."""
    p_values = [judged(gaussian(), 100, seed).p_value for seed in range(100)]
    share = np.mean(np.array(p_values) < 0.05)
    assert share < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


@pytest.mark.parametrize(
    ("law", "name", "number", "words"),
    [
        (gaussian(width=1.4), "width", 1.4, "too wide by about"),
        (gaussian(width=0.6), "width", 0.6, "too narrow by about"),
        (gaussian(offset=0.4), "mean", 0.4, "mean off by 0.4 sd (high)"),
        (gaussian(offset=-0.4), "mean", -0.4, "mean off by 0.4 sd (low)"),
    ],
)
def test_errors_are_named_with_direction_and_size(law, name, number, words):
    verdict = judged(law)
    (finding,) = verdict.findings
    assert finding.name == name
    assert abs(finding.number - number) < 0.15
    assert words in str(finding)
    assert "num_steps" in finding.remedy


def test_percentages_follow_the_width():
    """Within two standard errors of 300 simulations."""
    for width, seed in ((1.4, 0), (1.8, 1), (0.7, 2)):
        text = judged(gaussian(width), seed=seed).describe()["x"]
        percent = int(text.split("about ")[1].split(" %")[0])
        assert abs(percent - 100 * abs(width - 1)) < 12 * width


def test_the_prior_is_told_from_the_posterior():
    """Its ranks are uniform: only the observation tells."""
    verdict = judged(returns_the_prior)
    assert verdict.findings[0].name == "information"
    fit = verdict.coordinates[0]
    assert 0.9 < fit.error < 1.2
    assert abs(fit.baseline - SD) < 0.1
    assert "a regression on ranks has" in fit.words
    assert abs(fit.width - 1) < 0.15


def test_posteriors_of_other_observations_are_caught():
    assert "information" in {f.name for f in judged(permuted).findings}


@pytest.mark.parametrize(("gain", "how"), [(0.8, "little"), (1.2, "much")])
def test_posteriors_that_follow_too_little_or_too_much(gain, how):
    """Widths and means are right on average, the error is below a regression's."""
    width = np.sqrt(1 + (gain - 1) ** 2 / (1 + NOISE**2) / SD**2)
    verdict = judged(gaussian(width=float(width), gain=gain), 300)
    assert f"follows the observation too {how}" in str(verdict)


@pytest.mark.parametrize("width", [1.0, 1.4, 0.7])
def test_the_joint_density_tells_widths_that_ranks_do_not(width):
    """The posterior given part of the data is calibrated, but wider than need be."""
    rng, size = np.random.default_rng(0), 3
    square = np.square(rng.normal(size=(300, 16, size))).sum(-1)
    square[:, 1:] *= width**2
    flat = rng.normal(size=(300, size)), rng.normal(size=(300, NUM_DRAWS, size))
    fit = judge_fit(rng, ("a", "b", "c"), *flat, flat[0], 0 * flat[0], -square / 2)
    joint = fit.coordinates[-1]
    assert abs(joint.width - max(width, 1.0)) < 0.1
    assert fit.ok == (width <= 1)
    assert ("joint density of the draws: as if too wide" in str(fit)) == (width > 1)


def blurred_codes(blur, size=300):
    """A code that follows from y, drawn as a neighbor with probability ``blur``."""
    rng = np.random.default_rng(0)
    truth = rng.integers(5, size=size)
    other = rng.choice([-1, 1], size=(size, 1))  # the neighbor that is near
    wrong = rng.random((size, NUM_DRAWS)) < blur
    return truth.astype(float), 1.0 * truth[:, None] + other * wrong


@pytest.mark.parametrize("blur", [0.0, 0.1, 0.3])
def test_codes_equal_draws_as_often_as_these_each_other(blur):
    truth, draws = blurred_codes(blur)
    fit = judge_integers("n", truth, draws)
    unequal = 2 * blur * (1 - blur)
    assert fit.width == pytest.approx(unequal / blur if blur else 1.0, abs=0.1)
    assert (fit.p_value < 1e-4) == (blur > 0)
    assert ("as if too wide" in fit.words) == (blur > 0)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_codes_with_their_own_chance_are_found_as_often_as_chance_has_it(share):
    rng, found = np.random.default_rng(2), 0
    for _ in range(500):
        codes = np.where(rng.random((100, 1 + NUM_DRAWS)) < share, 1.0, 0.0)
        found += judge_integers("n", codes[:, 0], codes[:, 1:]).p_value < 0.05
    assert found < 45  # 25 expected, sd 5


def test_few_wild_draws_are_found():
    """A tenth of the draws are 10 sd wide: the interquartile range stays."""
    rng = np.random.default_rng(3)
    z, y = rng.normal(size=(300, 1)), np.zeros((300, 1))
    draws = rng.normal(size=(300, NUM_DRAWS, 1))
    assert judge_fit(rng, ("x",), z, draws, z, y).coordinates[0].p_value > 0.01
    wild = np.where(rng.random(draws.shape) < 0.1, 10 * draws, draws)
    fit = judge_fit(rng, ("x",), z, wild, z, y)
    assert "x: too wide" in str(fit)
    assert _far_test(z[:, 0], wild[:, :, 0]) < 1e-6


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("width", [1.0, 2.0, 0.5])
def test_distances_tell_widths_within_modes(width, size):
    """Two modes 4 sd from their middle: ranks and residuals hardly see their width."""
    rng = np.random.default_rng(0)

    def draw(width, *shape):
        modes = 4 * rng.choice([-1, 1], size=(*shape, 1))
        return modes + width * rng.normal(size=(*shape, size))

    z, draws = draw(1.0, 300), draw(width, 300, NUM_DRAWS)
    names = ("a", "b", "c")[:size]
    fit = judge_fit(rng, names, z, draws, z, 0 * z)
    assert (
        fit.coordinates[-1].name
        == f"distance to the nearest draw of {', '.join(names)}"
    )
    assert fit.ok == (width == 1)
    assert np.abs(np.log2(fit.coordinates[-1].width / width)) < 0.5
    how = {1.0: "no finding", 2.0: "too wide", 0.5: "too narrow"}[width]
    assert how in str(fit)


def test_few_simulations_are_not_judged():
    verdict = judged(gaussian(width=3.0), 39)
    assert verdict.ok
    assert "not judged: 39" in verdict.headline == str(verdict)


def test_the_cost_is_a_tenth_of_the_training():
    rows = num_rows(10_000, 1_000_000, 64)
    assert rows * NUM_DRAWS * 64 < 0.1 * 3 * 1_000_000 < (rows + 1) * NUM_DRAWS * 64
    assert num_rows(50, 10**9, 64) == 50
    assert num_rows(10**4, 10**9, 64) == 300


@pytest.fixture(scope="module")
def simulated():
    simulations = exact_gaussian().simulator.simulate(jax.random.key(3), 700)
    z, context, _ = simulations
    return Simulations(z[:600], context[:600]), Simulations(z[600:], context[600:])


@pytest.fixture(scope="module")
def verdicts(simulated):
    """Verdicts on the exact posterior, and on that of a shifted observation."""
    train, held_out = simulated
    moved = held_out._replace(context=held_out.context + 1.0)
    key, posterior = jax.random.key(0), exact_gaussian()
    return [
        held_out_verdict(key, posterior, train, part, 10**6)
        for part in (held_out, moved)
    ]


def test_posteriors_are_judged_by_their_own_draws(verdicts):
    right, wrong = verdicts
    assert right.ok
    assert right.num_simulations == 100
    assert [fit.name for fit in right.coordinates] == ["x[0]", "x[1]", FitKind.DENSITY]
    assert {finding.name for finding in wrong.findings} >= {"mean"}


def test_verdicts_are_warned_of_shown_and_kept(verdicts, simulated, monkeypatch):
    _, wrong = verdicts
    path = "numpyro_score.infer.amortized.fit_verdict.held_out_verdict"
    monkeypatch.setattr(path, lambda *args: wrong)
    train, held_out = simulated
    with pytest.warns(UserWarning, match=r"fails on held-out[^-]*\n- .*mean off by"):
        posterior = with_verdict(
            jax.random.key(0), exact_gaussian(), train, held_out, 10
        )
    assert posterior.verdict is wrong
    assert "verdict" in repr(posterior)
    assert "poor (" in repr(posterior)
    config = wrong.to_config()
    assert FitVerdict.from_config(config) == wrong
    for fit in config["coordinates"]:
        del fit["kind"]  # as in files of earlier versions
    assert FitVerdict.from_config(config) == wrong
    assert hash(jax.tree.structure(posterior)) is not None


def test_calibration_says_direction_and_size():
    rng = np.random.default_rng(0)
    z, y, draws = gaussian(width=1.5)(rng, 300)
    layout = NPSE(lambda: two_sites(), "y").simulator().latents
    verdict = cross_verdict(layout, Simulations(z, y), draws)
    assert "too wide by about" in verdict.describe()["x"]


def two_sites():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1))


def poisson():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Poisson(jnp.exp(3 * x)))


@pytest.mark.slow
def test_a_fit_that_returns_the_prior_warns_and_the_file_keeps_it(tmp_path):
    """Counts that are only shifted and scaled are all 0 but for a few."""
    net = MLP(1, width=16, depth=1, context_size=1)
    loss = DenoisingScoreMatching(target=TargetScore())
    options = {"loss": loss, "standardize_context": Affine.context}
    npse = NPSE(poisson, "y", net=net, **options)
    with pytest.warns(UserWarning, match="information"):
        posterior = npse.fit(
            jax.random.key(0), 2000, num_steps=200, patience=None, progress_bar=False
        )
    posterior.save(tmp_path / "posterior")
    assert npse.load(tmp_path / "posterior").verdict == posterior.verdict
    replace(posterior, verdict=None).save(tmp_path / "without")
    assert npse.load(tmp_path / "without").verdict is None


@pytest.mark.parametrize(
    "config",
    [5, {}, {"coordinates": 3, "num_simulations": 1}, {"coordinates": []}],
)
def test_altered_verdicts_are_refused(config, monkeypatch):
    monkeypatch.setattr(storage, "_read_layout", lambda *_: {"verdict": config})
    with pytest.raises(ValueError, match="entry `verdict`: not a verdict"):
        storage.read_verdict("folder", "score")


def test_verdicts_with_entries_of_other_types_are_refused(monkeypatch):
    fit = asdict(CoordinateFit("x", 0.5, 1.0, 0.0, 0.0, 0.5, 0.5, 0.0))
    config = {"coordinates": [fit | {"width": "wide"}], "num_simulations": 90}
    monkeypatch.setattr(storage, "_read_layout", lambda *_: {"verdict": config})
    with pytest.raises(ValueError, match="entry `verdict`: not a verdict"):
        storage.read_verdict("folder", "score")
    config["coordinates"] = [fit]
    assert storage.read_verdict("folder", "score").coordinates[0].name == "x"
