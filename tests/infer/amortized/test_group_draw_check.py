"""Draws of a hierarchical posterior, judged by the exact density of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm, truncnorm

from numpyro_score.infer import NPSE
from numpyro_score.infer.amortized.group_draw_check import warn_of_wrong_groups
from numpyro_score.infer.amortized.hierarchical import (
    group_sites,
    local_simulator,
    shared_simulator,
)

NUM_DRAWS = 1000
Y = np.array([2.3, 3.9, 1.6, 3.1], np.float32)  # far from the prior's mean


def uniform_noise(num_groups=2, y=None):
    """Given y_j the density of z_j is cut off at both ends."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("groups", num_groups):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Uniform(z - 1, z + 1), obs=y)


def exact_draws(seed=0):
    """Return draws of mu, by its density on a grid, and of z given mu."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-5, 5, 20_001)
    windows = norm.cdf(Y[:, None] + 1 - grid) - norm.cdf(Y[:, None] - 1 - grid)
    density = norm.pdf(grid) * windows.prod(0)
    mu = rng.choice(grid, NUM_DRAWS, p=density / density.sum())
    low, high = Y[:, None] - 1 - mu, Y[:, None] + 1 - mu
    z = truncnorm.rvs(low, high, random_state=rng) + mu
    return mu[:, None].astype(np.float32), z[..., None].astype(np.float32)


@pytest.fixture(scope="module")
def judge():
    """Return a function that warns of wrong draws of mu and z."""
    simulator = NPSE(uniform_noise, "y", plate="groups").simulator()
    sites = group_sites(simulator)
    shared = shared_simulator(simulator, sites)
    local = local_simulator(simulator, sites)

    def judge(mu, z):
        contexts = jax.vmap(shared.observed.flatten)({"y": jnp.asarray(Y)})
        warn_of_wrong_groups(shared, local, mu, z, contexts)

    return judge


@pytest.mark.parametrize("seed", [0, 1])
def test_right_draws_are_silent_where_densities_jump(judge, seed):
    judge(*exact_draws(seed))


def test_wrong_shared_draws_are_loud_where_densities_jump(judge):
    """A law of mu that is 1.5 sd off; z given mu is right, so z moves with it."""
    rng = np.random.default_rng(1)
    mu, _ = exact_draws()
    mu = mu + 1.5 * mu.std()
    low, high = Y[:, None] - 1 - mu[:, 0], Y[:, None] + 1 - mu[:, 0]
    z = (truncnorm.rvs(low, high, random_state=rng) + mu[:, 0])[..., None]
    with pytest.warns(UserWarning, match=r"sd\): mu is off by about .* sd \(high\)"):
        judge(mu, z.astype(np.float32))


def test_local_draws_of_density_zero_are_loud(judge):
    mu, z = exact_draws()
    z[2, :50] += 2.5
    match = "in group 2, given the shared sites, 5% of them have a density of zero"
    with pytest.warns(UserWarning, match=match):
        judge(mu, z)


def test_local_draws_that_are_too_narrow_are_loud(judge):
    """Inside the window, where no gradient tells."""
    mu, z = exact_draws()
    z[1] = z[1].mean() + 0.3 * (z[1] - z[1].mean())
    match = "in group 1, given the shared sites, z is about .* times too narrow"
    with pytest.warns(UserWarning, match=match):
        judge(mu, z)


def test_draws_that_have_collapsed_are_loud(judge):
    mu, z = exact_draws()
    match = "the same in most of them"
    with pytest.warns(UserWarning, match=match):
        judge(np.full_like(mu, mu.mean()), z)
