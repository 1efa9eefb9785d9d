"""The metric from draws and gradients: its values, and what it does with bad input."""

from functools import partial

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import MCMC

from numpyro_score import ScoreLangevin
from numpyro_score.kernel.adaptation import AdaptationSettings
from numpyro_score.kernel.fisher_metric import (
    AdaptedMetric,
    FisherMoments,
    Snapshots,
    _best_diagonal,
    geometric_mean,
    inverse_gradient_sqrt,
    spiked_eigenvalue,
    spiked_eigenvalues,
)
from numpyro_score.kernel.whitening import LowRankSqrt

PRECISION = np.array([[4.0, 1.5], [1.5, 1.0]])


def moments(draws, gradients, valid=None):
    """Return the moments of one chain's draws in unit coordinates."""
    d = draws.shape[-1]
    found = FisherMoments.zero(jnp.zeros((1, d)))
    valid = np.ones(len(draws), bool) if valid is None else valid
    unit = jnp.eye(d)
    update = jax.jit(FisherMoments.update)
    for x, g, ok in zip(draws, gradients, valid, strict=True):
        found = update(found, unit, unit, x[None], g[None], ok[None], 0.0)
    return found


def adapted(found, dense):
    d = found.mean.shape[-1]
    return found.adapted((jnp.eye(d),) * 3, dense)


def assert_usable(matrices):
    covariance, mass_sqrt, sqrt = map(np.asarray, matrices)
    assert np.isfinite(covariance).all()
    assert (np.linalg.eigvalsh(covariance) > 0).all()
    # single precision, after a correction of a variance by up to a million
    np.testing.assert_allclose(mass_sqrt @ sqrt.T, np.eye(len(sqrt)), atol=0.1)


def test_gaussian_metric_is_found_whatever_the_law_of_the_draws():
    """Draws in a corner far from the mean, of a covariance that is not the target's."""
    draws = np.random.default_rng(0).normal(size=(100, 2)) * [0.1, 0.2] + [7.0, -3.0]
    metric = adapted(moments(draws, draws @ PRECISION), True)
    np.testing.assert_allclose(
        metric.matrices[0], np.linalg.inv(PRECISION), rtol=0.05, atol=0.05
    )


def test_metric_without_correlations_is_diagonal():
    draws = np.random.default_rng(0).normal(size=(200, 2))
    metric = adapted(moments(draws, draws * [4.0, 1.0]), None)
    assert not metric.correlated
    expected = [0.25, 1.0]
    np.testing.assert_allclose(np.diag(metric.matrices[0]), expected, rtol=0.02)
    assert metric.matrices[0][0, 1] == 0


def test_draws_with_a_divergence_or_nan_count_for_nothing():
    draws = np.random.default_rng(0).normal(size=(40, 2))
    spoiled = np.concatenate([draws, np.full((3, 2), np.nan)])
    gradients = np.concatenate([draws @ PRECISION, np.full((3, 2), np.inf)])
    valid = np.arange(43) < 40
    plain = moments(draws, draws @ PRECISION)
    for a, b in zip(plain, moments(spoiled, gradients, valid), strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("dense", [True, None])
@pytest.mark.parametrize(
    "case", ["constant gradient", "no motion", "duplicated", "few draws", "no draws"]
)
def test_degenerate_windows_give_a_metric(case, dense):
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(20, 4))
    gradients = draws.copy()
    valid = np.ones(20, bool)
    if case == "constant gradient":
        gradients[:, 1] = 3.0
    if case == "no motion":
        draws[:], gradients[:] = 1.0, 2.0
    if case == "duplicated":
        draws[:, 1], gradients[:, 1] = draws[:, 0], gradients[:, 0]
    if case == "few draws":
        draws = gradients = rng.normal(size=(20, 30))
    if case == "no draws":
        valid[:] = False
    assert_usable(adapted(moments(draws, gradients, valid), dense).matrices)


def test_low_rank_metric_finds_a_direction_in_many_dimensions():
    d = 60
    rng = np.random.default_rng(0)
    direction = rng.normal(size=d) / np.sqrt(d)
    direction /= np.linalg.norm(direction)
    stretch = np.eye(d) + 99 * np.outer(direction, direction)
    draws = rng.multivariate_normal(np.zeros(d), stretch, size=160)
    gradients = np.linalg.solve(stretch, draws.T).T
    snapshots = Snapshots.zero(jnp.zeros((1, d)))
    snapshots = snapshots._replace(
        draws=jnp.asarray(draws[None]),
        gradients=jnp.asarray(gradients[None]),
        valid=jnp.ones((1, 160), bool),
    )
    before = LowRankSqrt.diagonal(jnp.ones(d), 40)
    metric = snapshots.adapted((before, before, before), None)
    assert metric.correlated
    seen = jax.vmap(metric.matrices[2].whiten)(jnp.eye(d))  # S^T, row by row
    covariance = np.asarray(seen @ seen.T)
    assert 60 < direction @ covariance @ direction < 160
    left = np.linalg.eigvals(np.linalg.solve(stretch, covariance)).real
    assert left.min() > 0.3
    assert left.max() < 3


@pytest.mark.parametrize("case", ["few draws", "duplicated", "constant", "no draws"])
def test_degenerate_windows_give_a_low_rank_metric(case):
    d, size = 60, 20
    draws = np.random.default_rng(0).normal(size=(size, d))
    if case == "duplicated":
        draws[:, 1] = draws[:, 0]
    gradients = draws.copy()
    if case == "constant":
        gradients[:, :3] = 2.0
    snapshots = Snapshots.zero(jnp.zeros((1, d)))
    capacity = snapshots.valid.shape[-1]
    fill = partial(np.pad, pad_width=((0, capacity - size), (0, 0)))
    valid = (np.arange(capacity) < size) & (case != "no draws")
    snapshots = snapshots._replace(
        draws=jnp.asarray(fill(draws)[None]),
        gradients=jnp.asarray(fill(gradients)[None]),
        valid=jnp.asarray(valid[None]),
    )
    before = LowRankSqrt.diagonal(jnp.ones(d), 40)
    covariance, _, sqrt = snapshots.adapted((before, before, before), None).matrices
    seen = np.asarray(jax.vmap(sqrt.whiten)(jnp.eye(d)))
    eigenvalues = np.linalg.eigvalsh(seen @ seen.T)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(covariance))
    assert eigenvalues.min() > 0
    if case != "constant":  # unit laws; without a force a direction has no variance
        assert eigenvalues.min() > 0.1
        assert eigenvalues.max() < 10


def test_metric_that_is_not_finite_is_not_taken_over():
    before = (jnp.eye(2),) * 3
    for spoiled in (jnp.nan, jnp.inf):
        wrong = jnp.full((2, 2), spoiled)
        metric = AdaptedMetric((wrong, wrong, wrong), jnp.asarray(3.0), True)
        np.testing.assert_array_equal(metric.or_else(before).matrices[0], jnp.eye(2))
    right = AdaptedMetric((2 * jnp.eye(2),) * 3, jnp.asarray(3.0), True)
    assert right.or_else(before).matrices[0][0, 0] == 2
    assert right.or_else(before).leading == 3


def test_variances_that_rounding_makes_negative_leave_a_diagonal():
    rounded = jnp.diag(jnp.array([1.0, -1e-6]))
    for cov, cov_gradient in ((rounded, jnp.eye(2)), (jnp.eye(2), rounded)):
        scale = _best_diagonal(cov, cov_gradient, jnp.eye(2), jnp.eye(2))
        assert bool(jnp.isfinite(scale).all())
        assert bool((scale > 0).all())


def test_low_rank_root_and_its_inverse_undo_each_other():
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 2)))[0]
    sqrt = LowRankSqrt(jnp.arange(1.0, 7.0), basis, jnp.array([0.1, 5.0]))
    y = jnp.arange(6.0)
    undone = sqrt.inverse().whiten(sqrt.unwhiten(y))
    np.testing.assert_allclose(undone, y, atol=1e-4)


def test_start_takes_the_geometric_mean_of_gradients():
    gradient = jnp.array([[1.0, 0.0, jnp.inf], [16.0, 0.0, jnp.nan]])
    np.testing.assert_allclose(inverse_gradient_sqrt(gradient), [0.5, 1.0, 1.0])


def test_eigenvalue_of_a_sample_is_that_of_the_law():
    assert float(spiked_eigenvalue(jnp.array([1.4, 0.7]), 10.0)) == 1.0  # noise
    seen = 5.0 * (1 + 0.1 / 4.0)  # Baik and Silverstein, d / n = 0.1
    values = jnp.ones(10).at[0].set(seen)
    np.testing.assert_allclose(float(spiked_eigenvalue(values, 100.0)), 5.0, rtol=1e-4)


def test_small_and_large_eigenvalues_of_a_sample_are_those_of_the_law():
    exact = np.array([0.05, 0.2, *np.ones(36), 4.0, 30.0])
    rows = np.random.default_rng(1).normal(size=(400, 40)) * np.sqrt(exact)
    found = spiked_eigenvalues(jnp.linalg.eigvalsh(rows.T @ rows / 400), 400.0)
    np.testing.assert_allclose(found, exact, rtol=0.15)
    few = spiked_eigenvalues(jnp.array([0.0, 1e-3, 2.0]), 2.0)
    np.testing.assert_allclose(few, 1.0)


def test_windows_cover_the_warmup():
    for num_warmup in (1, 5, 19, 24, 100, 1000):
        windows = AdaptationSettings(num_warmup, fisher=True).windows()
        assert windows[0, 0] == 0
        assert windows[-1, 1] == num_warmup - 1
        assert (windows[1:, 0] == windows[:-1, 1] + 1).all()


def test_fixed_step_keeps_the_units_of_its_metric():
    settings = AdaptationSettings(100, adapt_step_size=False, fisher=True)
    state = settings.init(jnp.zeros(2), 1.0, None)
    gradient = jnp.array([[9.0, 9.0]])
    begun = settings.begin(state, jnp.zeros((1, 2)), gradient, rescale=True)
    np.testing.assert_array_equal(begun.inverse_mass_matrix, jnp.ones(2))
    adapting = AdaptationSettings(100, fisher=True)
    begun = adapting.begin(state, jnp.zeros((1, 2)), gradient, rescale=True)
    np.testing.assert_allclose(begun.inverse_mass_matrix, [1 / 9, 1 / 9], rtol=1e-6)


def test_metric_of_another_name_is_refused():
    with pytest.raises(ValueError, match="`metric` must be 'fisher' or 'welford'"):
        ScoreLangevin(potential_fn=jnp.sum, metric="dense")


# a whole run: one dimension, one chain, a start ten sd away


def run(potential, d, far, num_chains=4):
    rng = np.random.default_rng(0)
    start = jnp.asarray(far * rng.uniform(-1, 1, size=(num_chains, d)))
    mcmc = MCMC(
        ScoreLangevin(potential_fn=potential),
        num_warmup=500,
        num_samples=1000,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = start if num_chains > 1 else start[0]
    mcmc.run(jax.random.key(0), init_params=start, extra_fields=("diverging",))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True))
    return draws, mcmc


def check(draws):
    if len(draws) == 1:  # R-hat compares the halves
        draws = draws.reshape(2, -1, *draws.shape[2:])
    for x in np.moveaxis(draws, -1, 0):
        assert arviz.rhat(x) < 1.02
        assert arviz.ess(x) > 400
        assert abs(x.mean()) < 5 * x.std() / np.sqrt(arviz.ess(x, method="mean"))


def test_one_chain_in_one_dimension():
    draws, mcmc = run(lambda z: 0.5 * jnp.square(z / 3).sum(), 1, 30.0, num_chains=1)
    check(draws)
    np.testing.assert_allclose(draws.std(), 3.0, rtol=0.15)
    assert mcmc.last_state.adapt_state.num_steps >= 3


def test_geometric_mean_maps_the_force_to_the_draws():
    """M with M G M = C, of covariances C of draws and G of gradients."""
    rng = np.random.default_rng(0)
    cov, force = (a @ a.T + np.eye(4) for a in rng.normal(size=(2, 4, 4)))
    values, vectors = geometric_mean(jnp.asarray(cov), jnp.asarray(force), 0.0)
    mean = np.asarray((vectors * values) @ vectors.T, float)
    np.testing.assert_allclose(mean @ force @ mean, cov, rtol=1e-3, atol=1e-3)


def test_low_rank_metric_is_that_of_its_matrices():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(5, 2)))[0]
    scale, stretch = rng.uniform(0.5, 2.0, 5), np.array([3.0, 0.2])
    sqrt = LowRankSqrt(*(jnp.asarray(a, float) for a in (scale, basis, stretch)))
    root = (np.eye(5) + (basis * (stretch - 1)) @ basis.T) @ np.diag(scale)
    y = rng.normal(size=5)
    options = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(sqrt.whiten(jnp.asarray(y)), root @ y, **options)
    np.testing.assert_allclose(sqrt.unwhiten(jnp.asarray(y)), root.T @ y, **options)
    inverse = sqrt.inverse().whiten(jnp.asarray(y))
    np.testing.assert_allclose(inverse, np.linalg.solve(root.T, y), **options)
    found = sqrt.whiten_scaled(jnp.asarray(y)[None])[0]
    np.testing.assert_allclose(found, np.linalg.solve(root.T, scale * y), **options)
    cov = sqrt.covariance()
    dense = np.diag(scale) @ (np.eye(5) + (basis * (cov.stretch - 1)) @ basis.T)
    np.testing.assert_allclose(dense @ np.diag(scale), root.T @ root, **options)
