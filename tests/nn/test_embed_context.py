"""Contexts that are sets, series or images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_score import MLP, ScoreMatching, io
from numpyro_score.nn import ConvEmbedding, EmbedContext, SetEmbedding

SET = EmbedContext(
    MLP(2, width=8, depth=1, context_size=4), SetEmbedding(1, size=4, width=8)
)


def test_a_set_has_no_order_and_no_length():
    embed = SetEmbedding(2, size=3, width=8)(rngs=nnx.Rngs(0))
    items = jax.random.normal(jax.random.key(0), (5, 2))
    expected = embed(items)
    np.testing.assert_allclose(embed(items[::-1]), expected, atol=1e-6)
    np.testing.assert_allclose(embed(jnp.tile(items, (2, 1))), expected, atol=1e-6)
    assert jnp.abs(embed(items + 1.0) - expected).max() > 1e-3


def test_a_series_has_an_order():
    embed = ConvEmbedding((9,), num_features=2, size=3, channels=(4, 4))
    embed = embed(rngs=nnx.Rngs(0))
    series = jax.random.normal(jax.random.key(0), (9, 2))
    assert embed(series).shape == (3,)
    assert jnp.abs(embed(series[::-1]) - embed(series)).max() > 1e-3


@pytest.mark.slow
def test_saved_scores_remember_their_embedding(tmp_path):
    x = jax.random.normal(jax.random.key(0), (16, 2))
    context = jax.random.normal(jax.random.key(1), (16, 6))
    trainer = ScoreMatching(SET)
    score = trainer.get_score(trainer.init(jax.random.key(2), x, context=context))
    io.save(score, tmp_path / "score")
    loaded = io.load(tmp_path / "score")
    assert loaded.denoiser.config == SET
    expected = score.denoise(x, 0.5, context[0])
    np.testing.assert_array_equal(loaded.denoise(x, 0.5, context[0]), expected)


@pytest.mark.slow
def test_a_set_embedding_finds_the_mean():
    """x given six values is their mean, up to noise."""
    keys = jax.random.split(jax.random.key(0), 3)
    loc = jax.random.normal(keys[0], (4000, 1))
    context = loc + jax.random.normal(keys[1], (4000, 6))
    x = context.mean(1, keepdims=True)
    x = jnp.concatenate([x, -x], 1) + 0.1 * jax.random.normal(keys[2], (4000, 2))
    net = EmbedContext(
        MLP(2, width=32, depth=2, context_size=8), SetEmbedding(1, 8, 32)
    )
    result = ScoreMatching(net).run(
        jax.random.key(1), 1500, x, context=context, progress_bar=False
    )
    values = jnp.array([1.0, -0.5, 2.0, 0.3, 0.2, 0.0])
    draws = result.score.sample(jax.random.key(2), (500,), context=values)
    np.testing.assert_allclose(draws.mean(0), [0.5, -0.5], atol=0.1)
    assert (draws.std(0) < 0.25).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SetEmbedding(0), "`num_features` must be an integer"),
        (lambda: ConvEmbedding((2, 2, 2)), r"`grid` must be \(steps,\)"),
        (lambda: ConvEmbedding((4,), channels=()), "`channels` must list a layer"),
    ],
)
def test_bad_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_items_of_another_size_are_refused():
    embed = SetEmbedding(2, size=3, width=8)(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Got items of 1, expected 2"):
        embed(jnp.zeros((4, 1)))
