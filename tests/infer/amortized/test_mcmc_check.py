"""Draws judged by where exact MCMC steps take them."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.infer.amortized.draw_check import (
    MOVED_LIMITS,
    moved_errors,
    moved_words,
)
from numpyro_score.infer.amortized.mcmc_check import barker_moves, scale_root

NUM_DRAWS = 256


class Law(NamedTuple):
    """Exact draws (rng, count) of a law, and its log density."""

    draw: Callable
    log_density: Callable


def draw_funnel(rng, count):
    v = 3 * rng.normal(size=count)
    return np.stack([v, np.exp(v / 2) * rng.normal(size=count)], 1)


def draw_curve(rng, count):
    x = rng.normal(size=count)
    return np.stack([x, x**2 + 0.1 * rng.normal(size=count)], 1)


def draw_modes(rng, count):
    return rng.normal(size=(count, 1)) + 6 * rng.choice([-1, 1], size=(count, 1))


LAWS = {
    "normal": Law(
        lambda rng, count: rng.normal(size=(count, 5)) * 10.0 ** np.arange(5),
        lambda z: -0.5 * ((z / 10.0 ** jnp.arange(5)) ** 2).sum(),
    ),
    "two modes": Law(
        draw_modes,
        lambda z: jnp.logaddexp(-((z[0] - 6) ** 2) / 2, -((z[0] + 6) ** 2) / 2),
    ),
    "Cauchy": Law(
        lambda rng, count: rng.standard_cauchy((count, 2)),
        lambda z: -jnp.log1p(z**2).sum(),
    ),
    "skewed": Law(
        lambda rng, count: np.log(rng.gamma(0.3, size=(count, 3))),
        lambda z: (0.3 * z - jnp.exp(z)).sum(),
    ),
    "funnel": Law(
        draw_funnel,
        lambda z: -(z[0] ** 2) / 18 - z[0] / 2 - z[1] ** 2 * jnp.exp(-z[0]) / 2,
    ),
    "banana": Law(
        draw_curve, lambda z: -(z[0] ** 2) / 2 - 50 * (z[1] - z[0] ** 2) ** 2
    ),
    "uniform": Law(
        lambda rng, count: rng.uniform(size=(count, 2)),
        lambda z: jnp.where((z > 0) & (z < 1), 0.0, -jnp.inf).sum(),
    ),
}


@partial(jax.jit, static_argnums=0)
def move(log_density, rng_key, z, root):
    return barker_moves(log_density, rng_key, z, root)


def words(law, z, seed):
    """Return in words how draws differ from where steps take them."""
    return moved_words("abcde", z, moved(law, z, seed))


def moved(law, z, seed):
    """Return where steps take draws."""
    key = jax.random.key(seed)
    return np.asarray(move(LAWS[law].log_density, key, z, scale_root(z)))


@pytest.mark.parametrize("shift", [-9.0, 9.0])
@pytest.mark.parametrize("law", ["normal", "banana"])
def test_a_few_wild_draws_are_found(law, shift):
    """They decide the sd, and its standard error: without swaps they passed."""
    rng = np.random.default_rng(0)
    z = LAWS[law].draw(rng, 1000)
    low, high = np.quantile(z, [0.16, 0.84], axis=0)
    z[rng.integers(0, 400, 16), 0] += (shift * (high - low) / 2)[0]
    after = moved(law, z, 0)
    assert "too wide" not in moved_errors(z, after).words("abcde", MOVED_LIMITS)
    assert re.search(
        r"a is about 1\.[45] times too wide", moved_words("abcde", z, after)
    )


@pytest.mark.parametrize("law", LAWS)
def test_exact_draws_of_any_law_are_silent(law):
    for seed in range(30):
        z = LAWS[law].draw(np.random.default_rng(seed), 256)
        after = moved(law, z, seed)
        assert not moved_words("abcde", z, after)
        few = (np.sinh(np.clip(x, -50, 50)) for x in (z, after))  # decide there
        assert not moved_words("abcde", *few)


@pytest.mark.parametrize("law", ["two modes", "skewed"])
def test_steps_keep_the_law(law):
    """Quantiles of many exact draws stay, within four standard errors of each."""
    levels, count = np.array([0.05, 0.3, 0.7, 0.95]), 20_000
    z = LAWS[law].draw(np.random.default_rng(0), count)
    after = move(LAWS[law].log_density, jax.random.key(0), z, scale_root(z))
    edges = np.quantile(LAWS[law].draw(np.random.default_rng(1), 10 * count), levels)
    share = (np.asarray(after)[..., None] < edges).mean((0, 1))
    error = np.sqrt(levels * (1 - levels) / count)
    np.testing.assert_array_less(np.abs(share - levels), 4 * error)


@pytest.mark.parametrize("law", sorted(LAWS.keys() - {"Cauchy"}))  # nearly scale-free
def test_shifted_draws_are_found(law):
    for seed in range(5):
        z = LAWS[law].draw(np.random.default_rng(seed), 1000)
        low, high = np.quantile(z, [0.16, 0.84], axis=0)
        z[:, 0] += (high - low)[0]
        assert "sd (high)" in words(law, z, seed)


@pytest.mark.parametrize("factor", [0.2, 5.0, 100.0])
def test_draws_of_a_wrong_width_are_found_with_its_size(factor):
    """A hundred times too wide: the steps end on their way, with a smaller size."""
    z = factor * LAWS["normal"].draw(np.random.default_rng(0), 1000)
    found = words("normal", z, 0)
    assert ("too wide" in found, "too narrow" in found) == (factor > 1, factor < 1)
    size = float(found.split("about ")[1].split(" times")[0])
    assert size < 1.35 * max(factor, 1 / factor)
    assert size > min(max(factor, 1 / factor) / 1.35, 3)
