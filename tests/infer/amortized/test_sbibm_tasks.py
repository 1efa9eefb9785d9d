"""NPSE with its defaults reaches published accuracies on tasks of sbibm."""

import jax
import numpy as np
import pytest

from numpyro_score.diagnostics import ForestProtocol, c2st
from numpyro_score.infer import NPSE
from tests.benchmarks.sbibm_tasks import TASKS, read_observation, read_reference

NUM_DRAWS = 2000


def keep(draws, inside):
    """Return the first draws that lie inside the prior's support."""
    draws = draws[inside]
    assert len(draws) >= NUM_DRAWS
    return draws[:NUM_DRAWS].astype(np.float32)


def two_moons(rng, x):
    """x less a draw of the crescent fixes theta up to the sign of its sum."""
    count = 40 * NUM_DRAWS
    angle, radius = np.pi * rng.uniform(-0.5, 0.5, count), rng.normal(0.1, 0.01, count)
    arc = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    depth, difference = np.sqrt(2) * (x - [0.25, 0.0] - arc).T
    total = np.where(rng.uniform(size=count) < 0.5, depth, -depth)
    theta = np.stack([total - difference, total + difference], 1) / 2
    return keep(theta, (depth <= 0) & (np.abs(theta) < 1).all(1))


def gaussian_linear(rng, x):
    """Prior and likelihood both have the variance .1."""
    theta = x / 2 + np.sqrt(0.05) * rng.normal(size=(NUM_DRAWS, len(x)))
    return theta.astype(np.float32)


def gaussian_mixture(rng, x):
    """The likelihood itself, cut off at the prior's box."""
    scale = np.where(rng.uniform(size=(4 * NUM_DRAWS, 1)) < 0.5, 1.0, 0.1)
    theta = x + scale * rng.normal(size=(4 * NUM_DRAWS, 2))
    return keep(theta, (np.abs(theta) < 10).all(1))


@pytest.fixture(scope="module")
def files(root):
    return root / "tests" / "sbibm"


def accuracy(draws, other):
    count = min(len(draws), len(other))
    return c2st(draws[:count], other[:count], ForestProtocol()).accuracy


@pytest.mark.slow
def test_exact_draws_are_the_reference(files):
    """Of two moons; those for another observation are told apart."""
    reference = read_reference(files, "two_moons", 1)
    rng = np.random.default_rng(0)
    draws = two_moons(rng, reference.observation)
    assert abs(accuracy(reference.draws, draws) - 0.5) < 0.1
    shifted = two_moons(rng, reference.observation + 0.05)
    assert accuracy(reference.draws, shifted) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exact", "num_simulations", "published"),
    [
        pytest.param(two_moons, 1000, 0.570, marks=pytest.mark.long),
        pytest.param(gaussian_linear, 1000, 0.538, marks=pytest.mark.long),
        pytest.param(gaussian_mixture, 1000, 0.547, marks=pytest.mark.long),
    ],
)
def test_defaults_reach_published_accuracy(files, exact, num_simulations, published):
    """C2ST by a random forest, mean of ten observations."""
    name, rng = exact.__name__, np.random.default_rng(0)
    posterior = NPSE(TASKS[name].model, "x").fit(
        jax.random.key(0), num_simulations, check=False, progress_bar=False
    )
    found = []
    for i in range(1, 11):
        x = read_observation(files, name, i)
        draws = posterior.sample(jax.random.key(i), x, NUM_DRAWS)["theta"]
        found.append(accuracy(exact(rng, x), np.asarray(draws)))
    assert np.mean(found) < published
