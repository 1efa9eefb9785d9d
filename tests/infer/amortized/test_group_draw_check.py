"""Draws of a hierarchical posterior, judged by the exact density of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm, truncnorm

from numpyro_score.infer import NPSE
from numpyro_score.infer.amortized.group_draw_check import (
    missing_share,
    warn_of_wrong_groups,
)
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


def judge_of(model, y):
    """Return a function that warns of wrong draws of mu and z."""
    simulator = NPSE(model, "y", plate="groups").simulator()
    sites = group_sites(simulator)
    shared = shared_simulator(simulator, sites)
    local = local_simulator(simulator, sites)

    def judge(mu, z):
        contexts = jax.vmap(shared.observed.flatten)({"y": jnp.asarray(y)})
        warn_of_wrong_groups(shared, local, mu, z, contexts)

    return judge


@pytest.fixture(scope="module")
def judge():
    return judge_of(uniform_noise, Y)


VAGUE_Y = np.array([2.0, -4.0, 1.0, 5.0, -3.0, 0.0, 4.0, -1.0], np.float32)
VAGUE_SD = 3.0  # of y given z, which have sd 1 given mu


def vague_groups(num_groups=2):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("groups", num_groups):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("y", dist.Normal(z, VAGUE_SD))


def vague_draws(offset, ratio, seed=0):
    """Return draws of mu, off by so many sd and too wide, and right ones of z."""
    rng = np.random.default_rng(seed)
    information = 1 / (1 + VAGUE_SD**2)
    sd = (1 + len(VAGUE_Y) * information) ** -0.5
    mean = sd**2 * information * VAGUE_Y.sum()
    mu = mean + sd * (offset + ratio * rng.normal(size=NUM_DRAWS))
    precision = 1 + VAGUE_SD**-2
    loc = (mu + VAGUE_Y[:, None] / VAGUE_SD**2) / precision
    z = loc + precision**-0.5 * rng.normal(size=loc.shape)
    return mu[:, None].astype(np.float32), z[..., None].astype(np.float32)


@pytest.fixture(scope="module")
def judge_vague():
    return judge_of(vague_groups, VAGUE_Y)


@pytest.mark.parametrize(
    ("offset", "ratio", "words"),
    [
        (0.7, 1.0, r"off by about 0\.\d sd \(high\)"),
        (-0.7, 1.0, r"off by about 0\.\d sd \(low\)"),
        (0.0, 1.6, r"about 1\.\d times too wide"),
        (0.0, 0.6, r"about \d\.\d times too narrow"),
    ],
)
def test_errors_are_loud_where_groups_say_little(judge_vague, offset, ratio, words):
    """Four fifths of the information are missing: steps at fixed z see a fifth."""
    with pytest.warns(UserWarning, match=rf"sd\): mu is {words}"):
        judge_vague(*vague_draws(offset, ratio))


@pytest.mark.parametrize("seed", range(10))
def test_right_draws_are_silent_where_groups_say_little(judge_vague, seed):
    judge_vague(*vague_draws(0.0, 1.0, seed))


def test_missing_information_of_normal_groups_is_the_closed_form():
    """B = 1 - (marginal precision) / (precision given all z)."""
    mu, z = vague_draws(0.0, 1.0)
    count = len(VAGUE_Y)
    score = (z[..., 0] - mu[:, 0]).sum(0)[:, None] - mu
    expected = 1 - (1 + count / (1 + VAGUE_SD**2)) / (1 + count)
    assert abs(missing_share(mu, score) - expected) < 0.03


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
