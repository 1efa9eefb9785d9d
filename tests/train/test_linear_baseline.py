"""Learning what a linear prediction from the context leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import MLP, VE, ScoreMatching, io
from numpyro_score.train.linear_baseline import MIN_RESIDUAL_SCALE, ridge

NET = MLP(2, width=8, depth=1, context_size=3)
COEFFICIENTS = np.array([[1.0, 0.0], [-0.5, 2.0], [0.0, 0.3]])
SPREAD = np.array([0.5, 1.0])


def linear(rows, key=0):
    """x given c is Normal(c A + 1, SPREAD)."""
    key_c, key_x = jax.random.split(jax.random.key(key))
    c = 5 + 2 * jax.random.normal(key_c, (rows, 3))
    return c @ COEFFICIENTS + 1 + SPREAD * jax.random.normal(key_x, (rows, 2)), c


@pytest.fixture(scope="module")
def state():
    x, c = linear(4000)
    return ScoreMatching(NET, VE(0.01, 300.0), linear_baseline=True).init(
        jax.random.key(1), x, context=c
    )


def test_residual_sets_the_scale(state):
    np.testing.assert_allclose(state.fixed.standardize.scale, SPREAD, rtol=0.05)


def test_score_of_a_linear_model_needs_no_training(state):
    """A fresh net returns zero: the denoiser is that of a unit Gaussian residual."""
    score = ScoreMatching(NET, VE(0.01, 300.0), linear_baseline=True).get_score(state)
    c = jnp.array([4.0, 8.0, 5.0])
    mean, x = c @ COEFFICIENTS + 1, jnp.array([3.0, 12.0])
    got = score.score(x, score.sde.time(0.5), c)
    exact = -(x - mean) / (SPREAD**2 * (1 + 0.25))
    np.testing.assert_allclose(got, exact, rtol=0.08)
    draws = score.sample(jax.random.key(2), (4000,), context=c)
    error = SPREAD / np.sqrt(4000)
    np.testing.assert_array_less(abs(draws.mean(0) - mean), 4 * error + 0.05)
    np.testing.assert_allclose(draws.std(0), SPREAD, rtol=0.06)


def test_penalty_grows_where_nothing_can_be_predicted():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(60, 40)), rng.normal(size=(60, 2))
    coefficients, spread = ridge(features, targets)
    least_squares = np.linalg.lstsq(features, targets)[0]
    assert np.abs(coefficients).max() < 0.3 * np.abs(least_squares).max()
    assert np.all((spread > 0.8) & (spread < 1.3))


def test_scale_has_a_floor_where_the_context_says_everything():
    c = jax.random.normal(jax.random.key(0), (200, 3))
    state = ScoreMatching(NET, linear_baseline=True).init(
        jax.random.key(1), c[:, :2], context=c
    )
    want = MIN_RESIDUAL_SCALE * c[:, :2].std(0)
    np.testing.assert_allclose(state.fixed.standardize.scale, want, rtol=1e-4)


def test_baseline_is_saved(state, tmp_path):
    score = ScoreMatching(NET, VE(0.01, 300.0), linear_baseline=True).get_score(state)
    io.save(score, tmp_path / "score")
    x, c = jnp.ones(2), jnp.ones(3)
    loaded = io.load(tmp_path / "score")
    assert np.array_equal(loaded.score(x, 0.5, c), score.score(x, 0.5, c))


def test_center_needs_a_context():
    with pytest.raises(ValueError, match=r"`linear_baseline=True` needs a `context`"):
        ScoreMatching(MLP(2, width=8, depth=1), linear_baseline=True).init(
            jax.random.key(0), linear(64)[0]
        )
