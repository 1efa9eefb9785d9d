"""Residuals of Gaussian likelihoods and the solves with their covariances."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import VE, ScoreDistribution, ScoreModel
from numpyro_score.infer.twisted import linear_solve as widening
from numpyro_score.infer.twisted.gaussian_likelihood import (
    is_gaussian,
    is_location_scale,
    location,
    whitened_residuals,
    widened_log_likelihood,
)
from numpyro_score.infer.twisted.linear_solve import (
    ResidualCovariance,
    solve_and_log_det,
)
from tests.infer.twisted.problems import scalar

LOCATION_SCALE = {
    "Student": lambda loc, scale: dist.StudentT(3.0, loc, scale),
    "Cauchy": dist.Cauchy,
    "Laplace": dist.Laplace,
    "logistic": dist.Logistic,
}
SHARES = {"Laplace": 0.5, "logistic": 3 / np.pi**2}


@pytest.mark.parametrize("law", LOCATION_SCALE)
def test_heavy_tails_are_widened_by_the_variance_of_the_location(law):
    """Without variance they are the likelihood, with masks, scales and events."""
    value, loc = jnp.array([0.5, jnp.nan, -3.0]), jnp.array([0.0, 1.0, 2.0])
    mask, make = jnp.array([True, False, True]), LOCATION_SCALE[law]
    fn = make(loc, 0.1).mask(mask).to_event(1)
    site = {"fn": fn, "value": value, "scale": 2.0}
    assert is_location_scale(site)
    assert not is_location_scale({"fn": dist.Normal(loc, 0.1)})
    for variance in (jnp.zeros(3), jnp.array([0.0, 9.0, 4.0])):
        wide = make(loc, jnp.sqrt(0.01 + SHARES.get(law, 1.0) * variance))
        expected = 2.0 * wide.log_prob(jnp.where(mask, value, 0.0))[mask].sum()
        found = widened_log_likelihood(site, variance)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(location(site), loc)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_mixtures_are_widened_in_each_component(batch):
    shares, loc, sd = jnp.array([0.9, 0.1]), jnp.array([0.5, 3.0]), 0.1
    fn = dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(loc, sd))
    value, variance = jnp.full(batch, 0.7), jnp.array([4.0, 1.0])
    site = {"fn": fn.expand(batch) if batch else fn, "value": value, "scale": None}
    assert is_location_scale(site)
    assert location(site).shape == (*batch, 2)
    exact = fn.log_prob(value).sum()
    none = widened_log_likelihood(site, jnp.zeros((*batch, 2)))
    assert float(none) == pytest.approx(float(exact), rel=1e-5)
    parts = dist.Normal(loc, jnp.sqrt(sd**2 + variance))
    wide = dist.MixtureSameFamily(dist.Categorical(shares), parts)
    some = widened_log_likelihood(site, jnp.broadcast_to(variance, (*batch, 2)))
    assert float(some) == pytest.approx(float(wide.log_prob(value).sum()), rel=1e-5)


def test_whitened_residuals_see_masks_scales_and_logarithms():
    value = jnp.array([1.0, jnp.nan])
    law = dist.Normal(0.0, 2.0).expand([2]).mask(jnp.array([True, False]))
    seen = whitened_residuals({"fn": law, "value": value, "scale": 4.0})
    assert seen.residual.tolist() == [1.0, 0.0]
    assert float(seen.log_scale) == pytest.approx(-4 * np.log(2.0))
    logs = whitened_residuals(
        {"fn": dist.LogNormal(0.0, 2.0), "value": jnp.exp(jnp.array(1.0))}
    )
    assert logs.residual.tolist() == [0.5]
    vector = dist.MultivariateNormal(jnp.zeros(2), jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    seen = whitened_residuals({"fn": vector, "value": jnp.array([2.0, 3.0])})
    assert seen.residual.tolist() == [1.0, 3.0]
    assert not is_gaussian({"fn": dist.Poisson(1.0)})


@pytest.mark.slow
@pytest.mark.parametrize("max_dense", [64, 3, 1], ids=["whole", "range", "Krylov"])
def test_widened_residuals_are_solved_alike_in_any_basis(max_dense, monkeypatch):
    """(I + J C J^T + b^T b)^{-1} e against dense algebra."""
    monkeypatch.setattr(widening, "MAX_DENSE", max_dense)
    rng = np.random.default_rng(0)
    jacobian, root, bend, e = (
        jnp.asarray(rng.normal(size=shape), float)
        for shape in ((9, 3), (3, 3), (2, 9), (9,))
    )
    uncertainty = ResidualCovariance(
        lambda u: jacobian @ u["x"],
        lambda v: {"x": jacobian.T @ v},
        lambda u: {"x": root @ (root.T @ u["x"])},
        bend,
    )
    whole = np.eye(9) + jacobian @ root @ root.T @ jacobian.T + bend.T @ bend
    solved = solve_and_log_det(e, {"x": jnp.zeros(3)}, uncertainty)
    exact, log_det = np.linalg.solve(whole, e), solved.log_det
    assert np.allclose(jacobian.T @ solved.solution, jacobian.T @ exact, atol=2e-3)
    assert float(solved.quadratic_form) == pytest.approx(float(e @ exact), abs=2e-3)
    if max_dense > 1:  # a random vector only estimates the determinant
        assert float(log_det) == pytest.approx(np.linalg.slogdet(whole)[1], abs=1e-2)
    else:
        assert 0.5 < float(log_det) / np.linalg.slogdet(whole)[1] < 2


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("max_dense", [64, 6, 1], ids=["whole", "range", "Krylov"])
def test_solve_keeps_its_digits_where_noise_is_small(max_dense, noise, monkeypatch):
    """J^T (I + B)^{-1} e for smooth curves, B up to 1e11, in single precision."""
    monkeypatch.setattr(widening, "MAX_DENSE", max_dense)
    grid = np.linspace(0.0, 1.0, 6)
    covariance = np.exp(-0.5 * (grid[:, None] - grid) ** 2 / 0.2**2)
    operator = np.eye(6) if max_dense == 64 else np.vstack([np.eye(6), np.eye(6)])
    y = operator @ np.linalg.cholesky(covariance) @ np.ones(6)
    uncertainty = ResidualCovariance(
        lambda u: jnp.asarray(operator / noise, jnp.float32) @ u["x"],
        lambda v: {"x": jnp.asarray(operator.T / noise, jnp.float32) @ v},
        lambda u: {"x": jnp.asarray(covariance, jnp.float32) @ u["x"]},
        jnp.zeros((0, len(y)), jnp.float32),
    )
    residual = jnp.asarray(y / noise, jnp.float32)
    sites = {"x": jnp.zeros(6, jnp.float32)}
    solved = solve_and_log_det(residual, sites, uncertainty)
    whole = operator @ covariance @ operator.T + noise**2 * np.eye(len(y))
    exact = operator.T @ np.linalg.solve(whole, y)
    gradient = operator.T @ np.asarray(solved.solution, float) / noise
    assert np.linalg.norm(gradient - exact) < 0.02 * np.linalg.norm(exact)
    quadratic = y @ np.linalg.solve(whole, y)
    assert float(solved.quadratic_form) == pytest.approx(quadratic, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("max_dense", [64, 4], ids=["range", "Krylov"])
def test_many_observations_are_widened_too(max_dense, monkeypatch):
    """200 Normal observations of 8 numbers: the exact Gaussian posterior."""
    monkeypatch.setattr(widening, "MAX_DENSE", max_dense)
    rng, process = np.random.default_rng(0), VE(0.02, 50.0)
    variance = np.linspace(0.2, 2.0, 8)

    def score(x, t):
        return -x / (jnp.asarray(variance, float) + process.sigma(t) ** 2)

    law = ScoreModel.from_fn(score, process, (8,))

    def model(operator, y):
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(operator @ x, 0.3).to_event(1), obs=y)

    operator = rng.normal(size=(200, 8)) / np.sqrt(8)
    y = operator @ rng.normal(size=8) + 0.3 * rng.normal(size=200)
    prior = np.diag(variance + process.sigma_min**2)
    evidence = operator @ prior @ operator.T + 0.09 * np.eye(200)
    gain = prior @ operator.T @ np.linalg.inv(evidence)
    mean, covariance = gain @ y, prior - gain @ operator @ prior
    log_evidence = -0.5 * y @ np.linalg.solve(evidence, y)
    log_evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * evidence)[1]
    inference = scalar(model, jnp.asarray(operator, float), jnp.asarray(y, float))
    draws = np.asarray(inference.get_samples()["x"], float)
    sd = np.sqrt(np.diag(covariance))
    assert inference.get_extra_fields()["power"].min() == 1.0  # nothing is tempered
    assert np.all(np.abs(draws.mean(0) - mean) < 0.25 * sd)
    assert np.all(np.abs(draws.std(0) / sd - 1) < 0.15)
    assert abs(inference.log_evidence - log_evidence) < 0.5
