"""The score model: conversions, units, shapes and errors."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, ScoreModel
from numpyro_score.data.standardize import Affine
from tests.sde.test_sde import ONE_OF_EACH
from tests.targets import GAUSSIAN, MIXTURE, Gaussian, z_scores

X = jnp.array([[0.3, -0.5], [-1.4, -0.9], [2.0, 1.0]])
AFFINE = Affine(jnp.array([3.0, -2.0]), jnp.array([100.0, 0.01]))


@pytest.fixture(scope="module")
def score():
    return MIXTURE.score_model(VP())


@pytest.mark.parametrize("sde", ONE_OF_EACH, ids=lambda s: type(s).__name__)
def test_methods_return_what_the_law_says(sde):
    model, t = MIXTURE.score_model(sde), 0.4
    alpha, sigma = sde.marginal(t)
    exact = jax.vmap(lambda x: MIXTURE.score(x, alpha, sigma))(X)
    denoised = jax.vmap(lambda x: MIXTURE.denoised(x, alpha, sigma))(X)
    np.testing.assert_allclose(model.score(X, t), exact, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.denoise(X, t), denoised, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.noise(X, t), -sigma * exact, rtol=1e-3, atol=1e-4)


def test_lowest_level_is_the_default_time(score):
    at_end = score.score(X, score.sde.t_min)
    np.testing.assert_array_equal(score.score(X), at_end)
    np.testing.assert_array_equal(score.denoise(X), score.denoise(X, score.sde.t_min))


@pytest.mark.parametrize("kind", ["score", "denoiser"])
def test_units_travel_with_the_model(score, kind):
    """x = loc + scale u: points shift and scale, scores scale inversely."""
    if kind == "denoiser":
        # as of a net, whose score is computed from the denoised point
        denoise = jax.tree_util.Partial(
            lambda x, level, context=None: MIXTURE.denoised(x, 1.0, level)
        )
        score = ScoreModel(denoise, Affine.identity((2,)), VP(), (2,))
    moved = dataclasses.replace(score, standardize=AFFINE)
    points = AFFINE.inverse(X)
    t = 0.3
    tight = {"rtol": 1e-3, "atol": 1e-4}
    scores = moved.score(points, t) * AFFINE.scale
    np.testing.assert_allclose(scores, score.score(X, t), **tight)
    denoised = AFFINE.forward(moved.denoise(points, t))
    np.testing.assert_allclose(denoised, score.denoise(X, t), **tight)
    np.testing.assert_allclose(moved.noise(points, t), score.noise(X, t), **tight)


def test_times_may_differ_by_point(score):
    ts = jnp.array([0.2, 0.5, 0.9])
    together = score.score(X, ts)
    for k in range(3):
        np.testing.assert_allclose(together[k], score.score(X[k], ts[k]), rtol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize(
    "law",
    [
        Gaussian(0.5, 2.0),
        GAUSSIAN,
        Gaussian(((0.0, 1.0), (2.0, 3.0)), ((1.0,) * 2,) * 2),
    ],
    ids=lambda law: str(law.event_shape),
)
def test_any_event_shape_and_batch(law, batch):
    model, t = law.score_model(VE()), 0.5
    x = law.sample(jax.random.key(0), batch)
    expected = law.score(x, *VE().marginal(t))
    assert model.score(x, t).shape == (*batch, *law.event_shape)
    np.testing.assert_allclose(model.score(x, t), expected, rtol=1e-3, atol=1e-4)
    assert model.size == int(np.prod(law.event_shape))


def test_model_is_a_pytree(score):
    moved = dataclasses.replace(score, standardize=AFFINE)
    points = AFFINE.inverse(X)
    jitted = jax.jit(lambda model, x, t: model.score(x, t))(moved, points, 0.3)
    np.testing.assert_allclose(jitted, moved.score(points, 0.3), rtol=1e-4)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), moved)
    both = jax.vmap(lambda model: model.standardize.scale)(stacked)
    np.testing.assert_array_equal(both[1], 2 * AFFINE.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextDenoiser:
    """Denoiser of Normal(context, 1)."""

    anchor: Any = None

    def __call__(self, x, level, context=None):
        return (x + level**2 * context) / (1 + level**2)


def test_context_reaches_the_denoiser():
    sde = VE(sigma_max=500.0)
    model = ScoreModel(ContextDenoiser(), Affine.identity((2,)), sde, (2,))
    context = jnp.array([3.0, -1.0])
    expected = (context - X) / (1 + sde.sigma(0.5) ** 2)
    np.testing.assert_allclose(model.score(X, 0.5, context), expected, rtol=1e-3)
    density = model.log_prob(context, None, context)
    np.testing.assert_allclose(density, -np.log(2 * np.pi), atol=1e-2)
    draws = model.sample(jax.random.key(0), (2000,), context=context)
    assert np.all(z_scores(draws, context, slack=0.05) < 5)


@pytest.mark.parametrize(
    ("score_fn", "error", "message"),
    [
        (lambda x, t: x[:1], ValueError, r"`score_fn`.*shape.*\(1,\), expected \(2,\)"),
        (lambda x, t: x.sum(), ValueError, r"`score_fn`.*Got \(\), expected \(2,\)"),
        (lambda x, t: x.astype(int), TypeError, "`score_fn`.*floating-point.*Got int"),
        (lambda x, t: (x, t), TypeError, "`score_fn`.*Got tuple"),
        (lambda x, t: None, TypeError, "`score_fn`.*Got NoneType"),
    ],
)
def test_foreign_function_with_wrong_output_is_refused(score_fn, error, message):
    with pytest.raises(error, match=message):
        ScoreModel.from_fn(score_fn, VE(), (2,))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
@pytest.mark.parametrize("method", ["score", "denoise", "noise", "log_prob"])
def test_point_of_another_shape_is_refused(score, method, shape):
    with pytest.raises(ValueError, match=r"`x` must end with .* event shape \(2,\)"):
        getattr(score, method)(jnp.zeros(shape))


def test_score_of_a_function_is_that_function_at_low_noise():
    """By way of the denoised point x + sigma^2 s, all digits of s would be lost."""
    sde = VE(0.001, 1e4)
    score = ScoreModel.from_fn(
        lambda x, t: -(x - 1000.5) / (1 + sde.sigma(t) ** 2), sde, ()
    )
    x = jnp.array([999.0, 1000.0, 1001.0])
    np.testing.assert_allclose(score.score(x), 1000.5 - x, rtol=1e-5)
