"""Noise levels: grids to integrate on and laws to train on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VP, RectifiedFlow, schedule
from numpyro_score.loss.noise_levels import LogNormal, LogUniform, UniformTime

GRIDS = {  # each is equally spaced after this transform
    schedule.geometric: np.log,
    schedule.karras: lambda s: s ** (1 / 7),
    schedule.cosine: np.arctan,
}
LAWS = [
    LogNormal(),
    LogNormal(loc=0.5, scale=0.7),
    LogUniform(),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
def test_grid_is_equally_spaced_in_its_coordinate(grid):
    levels = np.asarray(grid(0.05, 8.0, 9))
    np.testing.assert_allclose(levels[[0, -1]], [8.0, 0.05], rtol=1e-4)
    steps = np.diff(GRIDS[grid](levels.astype(float)))
    np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)
    assert (steps < 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.__name__)
def test_grid_refuses_bad_values(grid):
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max.*sigma_min=2"):
        grid(2.0, 1.0, 5)
    with pytest.raises(ValueError, match=r"`num_levels` must be .* at least 2.*Got 1"):
        grid(0.1, 1.0, 1)


def test_karras_refuses_a_power_that_is_not_positive():
    with pytest.raises(ValueError, match=r"`rho` must be positive.*Got 0"):
        schedule.karras(0.1, 1.0, 5, rho=0)


def test_log_normal_refuses_a_scale_that_is_not_positive():
    with pytest.raises(ValueError, match=r"`scale` must be positive.*Got -1"):
        LogNormal(scale=-1.0)


def distribution_function(law, log_levels):
    """Return P(log level <= value) before truncation, from its definition."""
    if isinstance(law, LogUniform):
        return log_levels
    return jax.scipy.stats.norm.cdf(log_levels, law.loc, law.scale)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_training_levels_fill_equally_likely_strata(law):
    low, high, num = 0.02, 30.0, 500
    levels = law.sample(jax.random.key(0), num, low, high)
    edges = distribution_function(law, jnp.log(jnp.array([low, high])))
    u = (distribution_function(law, jnp.log(levels)) - edges[0]) / jnp.diff(edges)
    within = np.asarray(u) * num - np.arange(num)  # uniform on [0, 1] in each stratum
    assert within.min() > -0.02
    assert within.max() < 1.02
    assert abs(within.mean() - 0.5) < 5 / np.sqrt(12 * num)
    assert abs(within.std() - np.sqrt(1 / 12)) < 0.03


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_training_levels_stay_in_an_extreme_range(law):
    levels = law.sample(jax.random.key(1), 1000, 1e-4, 1e5)
    assert np.isfinite(levels).all()
    assert levels.min() >= 1e-4
    assert levels.max() <= 1e5


@pytest.mark.parametrize("sde", [RectifiedFlow(0.5, 3.0), VP(sigma_min=0.5)], ids=str)
def test_times_of_training_levels_fill_strata_between_both_ends(sde):
    """Times of which a tenth or more lies below the lowest."""
    num = 400
    levels = UniformTime(sde).sample(jax.random.key(0), num, sde.sigma_min, 1e6)
    share = (np.asarray(sde.time(levels)) - sde.t_min) / (sde.t_max - sde.t_min)
    within = share * num - np.arange(num)  # uniform on [0, 1] in each stratum
    assert within.min() > -0.05
    assert within.max() < 1.05
    assert abs(within.mean() - 0.5) < 5 / np.sqrt(12 * num)
