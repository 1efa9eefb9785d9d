"""Truncated rounds for one observation, and the calibration of amortized posteriors."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

from numpyro_score import MLP, VE
from numpyro_score.infer import NPSE, OneStepPosterior
from numpyro_score.infer.amortized import truncation
from numpyro_score.infer.amortized.one_step import distill_posterior
from numpyro_score.infer.amortized.simulator import Simulations
from numpyro_score.infer.amortized.truncation import (
    highest_density_region,
    importance_resample,
    log_density,
    merge_rounds,
    simulate_truncated,
)
from tests.npse_models import (
    NOISE_SD,
    PRIOR_MEAN,
    PRIOR_SD,
    A,
    exact_gaussian,
    gaussian_model,
    gaussian_posterior,
)
from tests.targets import z_scores

KEY = jax.random.key(0)
Y = np.array([1.0, 0.5, -1.5])


class ExactPosterior(NamedTuple):
    """The posterior of the Gaussian model, with draws of its closed form."""

    score: Any
    simulator: Any
    latents: Any

    def sample(self, rng_key, observation, num_samples):
        mean, covariance = gaussian_posterior(observation)
        return {
            "x": jax.random.multivariate_normal(
                rng_key, mean, covariance, (num_samples,)
            )
        }


def exact_log_density(score, z, context):
    return multivariate_normal.logpdf(z, *gaussian_posterior(np.asarray(context)))


@pytest.fixture(scope="module")
def region():
    """The region of the Gaussian posterior, whose densities have a closed form."""
    exact = exact_gaussian()
    posterior = ExactPosterior(exact.score, exact.simulator, exact.latents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "log_density", exact_log_density)
        yield highest_density_region(KEY, posterior, Y)


def test_region_leaves_out_a_thousandth(region):
    mean, covariance = gaussian_posterior(Y)
    draws = np.random.default_rng(1).multivariate_normal(mean, covariance, 4000)
    share = 1 - region.contains(draws.astype(np.float32)).mean()
    assert 0 <= share < 0.004
    # of a Gaussian in two dimensions the region is an ellipse
    exact = multivariate_normal.logpdf(mean, mean, covariance) + np.log(1e-3)
    assert abs(region.threshold - exact) < 0.5
    assert not region.contains(np.array([mean + 6.0], np.float32)).any()


@pytest.fixture(scope="module")
def reference(region):
    """Prior draws inside the region."""
    z = np.random.default_rng(2).normal(PRIOR_MEAN, PRIOR_SD, (40_000, 2))
    z = z.astype(np.float32)
    return z[region.contains(z)]


def test_draws_inside_follow_the_truncated_prior(region, reference):
    inside = simulate_truncated(KEY, exact_gaussian().simulator, region, 1500)
    assert len(inside.z) == 1500
    assert region.contains(inside.z).all()
    spread = np.sqrt(reference.var(0) / len(reference) + inside.z.var(0) / 1500)
    assert (np.abs(inside.z.mean(0) - reference.mean(0)) < 4.5 * spread).all()


def test_earlier_simulations_outside_are_left_out(region):
    mean, _ = gaussian_posterior(Y)
    near = np.float32(mean + 0.1 * np.arange(8).reshape(8, 1))
    far = np.float32([mean - 0.1, mean + 9.0])
    pooled = merge_rounds(
        KEY, region, Simulations(far, -far, 3), Simulations(near, -near, 1)
    )
    inside = np.concatenate([far[:1], near])
    np.testing.assert_array_equal(np.sort(pooled.z, 0), inside)
    np.testing.assert_array_equal(pooled.context, -pooled.z)
    assert not np.array_equal(pooled.z, inside)  # in random order
    assert pooled.num_dropped == 4


def test_resampled_draws_follow_the_truncated_prior_too(region, reference):
    simulator = exact_gaussian().simulator
    got = np.asarray(importance_resample(KEY, simulator, region, 3000))
    assert len(np.unique(got, axis=0)) == len(got) == 3000
    assert region.contains(got).all()
    for power in (1, 2):
        a, b = (x**power for x in (got, reference))
        spread = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * spread).all()
        # the posterior, from which proposals come, is far from that
        posterior = (region.draws**power).mean(0)
        assert (np.abs(posterior - b.mean(0)) > 6 * spread).any()


@pytest.mark.slow
def test_regions_that_prior_draws_miss_are_filled(region, monkeypatch):
    monkeypatch.setattr(truncation, "MAX_BATCHES", 1)
    monkeypatch.setattr(truncation, "BATCH_SIZE", 1000)
    simulator = exact_gaussian().simulator
    filled = simulate_truncated(KEY, simulator, region, 2000)
    assert len(filled.z) == 2000
    noise = filled.context - filled.z @ A.T
    assert (np.abs(noise.std(0) / NOISE_SD - 1) < 0.07).all()
    with pytest.raises(ValueError, match=r"nor draws of the posterior have density"):
        simulate_truncated(KEY, simulator, replace(region, threshold=np.inf), 10)
    monkeypatch.setattr(truncation, "OVERSAMPLING", 1)
    with pytest.warns(UserWarning, match=r"fewer than the 2000 simulations"):
        simulate_truncated(KEY, simulator, region, 2000)


@pytest.mark.slow
def test_coarse_densities_are_close():
    mean, covariance = gaussian_posterior(Y)
    x = mean + np.array([[0.0, 0.0], [0.8, -0.6]])
    points, context = np.asarray(x, np.float32), jnp.asarray(Y, float)
    got = log_density(exact_gaussian().score, points, context)
    exact = multivariate_normal.logpdf(x, mean, covariance)
    assert np.abs(got - exact).max() < 0.1


def test_bad_rounds_are_refused():
    with pytest.raises(
        ValueError, match="`num_rounds` must be an integer of at least 1"
    ):
        NPSE(gaussian_model, "y").fit_rounds(KEY, Y, 1000, num_rounds=0)
    with pytest.raises(ValueError, match=r"Got \(2,\), expected \(3,\)"):
        NPSE(gaussian_model, "y").fit_rounds(KEY, Y[:2], 1000)


@pytest.mark.long
@pytest.mark.slow
def test_rounds_end_at_the_posterior():
    npse = NPSE(gaussian_model, "y", net=MLP(2, width=32, depth=2, context_size=3))
    posterior = npse.fit_rounds(
        KEY,
        Y,
        8000,
        num_rounds=2,
        progress_bar=False,
        training={"num_steps": 1500},
    )
    mean, covariance = gaussian_posterior(Y)
    draws = posterior.sample(jax.random.key(1), Y, 4000)["x"]
    sd = np.sqrt(np.diag(covariance))
    assert (z_scores(draws, mean, slack=0.15 * sd) < 4.5).all()
    assert (np.abs(draws.std(0) / sd - 1) < 0.15).all()


@pytest.mark.slow
def test_a_one_step_posterior_draws_in_one_step():
    one_step, losses = distill_posterior(
        KEY,
        exact_gaussian(VE(0.01, 100.0)),
        2000,
        num_simulations=4000,
        net=MLP(2, width=64, depth=2, context_size=3),
    )
    assert losses[-100:].mean() < 0.1 * losses[:20].mean()
    for y in (Y, Y + np.array([1.0, 0.5, 0.0])):
        mean, covariance = gaussian_posterior(y)
        draws = one_step.sample(jax.random.key(1), y, 2000)["x"]
        sd = np.sqrt(np.diag(covariance))
        assert (np.abs(draws.mean(0) - mean) < 0.3 * sd).all()
        assert (np.abs(draws.std(0) / sd - 1) < 0.3).all()


@pytest.mark.slow
def test_a_saved_one_step_posterior_is_the_same_after_loading(tmp_path, capsys):
    posterior = exact_gaussian(VE(0.01, 100.0))
    one_step, _ = distill_posterior(
        KEY,
        posterior,
        2,
        num_simulations=600,
        net=MLP(2, width=8, depth=1, context_size=3),
    )
    one_step.save(tmp_path / "student")
    loaded = OneStepPosterior.load(tmp_path / "student", posterior.simulator)
    loaded.print_summary(KEY, Y, 5)
    assert "Given y of shape (3,): 5 independent" in capsys.readouterr().out
    draws, again = (s.sample(KEY, Y, 5)["x"] for s in (one_step, loaded))
    np.testing.assert_array_equal(draws, again)
    assert loaded.consistency_model.config == one_step.consistency_model.config
    with pytest.raises(FileNotFoundError, match="which has no score"):
        NPSE(gaussian_model, "y").load(tmp_path / "student")
    with pytest.raises(FileNotFoundError, match=r"has no layout\.json"):
        OneStepPosterior.load(tmp_path / "nothing", posterior.simulator)


# Calibration


@pytest.mark.slow
def test_an_exact_posterior_is_calibrated(capsys):
    calibration = exact_gaussian().calibration(KEY, 300, num_samples=63)
    shown = capsys.readouterr().err
    assert "300/300" in shown  # simulations
    assert all(phase in shown for phase in ("draws", "densities", "ranks", "verdict"))
    assert "4/4" in shown
    assert set(calibration.sbc.ranks) == {"x", "log_joint"}
    assert calibration.sbc.test.p_value > 0.01
    assert calibration.tarp.test.p_value > 0.01
    assert calibration.lc2st is None
    assert type(calibration.plot()).__name__ == "PlotCollection"


@pytest.mark.slow
def test_a_posterior_that_is_too_narrow_is_found_out(capsys):
    posterior = exact_gaussian()
    score = replace(posterior.score, denoiser=Narrow(posterior.score.denoiser))
    calibration = replace(posterior, score=score).calibration(
        KEY,
        300,
        num_samples=63,
        observation=Y,
        num_null=30,
        classifier=QuadraticDiscriminantAnalysis(),
        progress_bar=False,
    )
    assert capsys.readouterr().err == ""
    assert calibration.sbc.test.p_value < 1e-3
    assert calibration.tarp.area < -0.05
    assert calibration.lc2st.p_value < 0.05


@jax.tree_util.register_pytree_node_class
class Narrow:
    """The denoiser of a law shrunk to half of its width around its mean."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __call__(self, x, level, context=None):
        mean = self.denoiser(jnp.zeros(2), 1e3, context)
        return mean + 0.5 * (
            self.denoiser(mean + 2 * (x - mean), 2 * level, context) - mean
        )

    def tree_flatten(self):
        return (self.denoiser,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
