"""Nets: one suite for all configurations."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_score import MLP, UNet
from numpyro_score.nn.convolution import _conv_by_patches
from numpyro_score.nn.embedding import NoiseEmbedding, film, sinusoidal

NETS = [  # configuration, event shape, shape of the context or None
    (MLP(3, width=8, depth=2), (3,), None),
    (MLP(6, width=8, depth=1, context_size=4), (2, 3), (2, 2)),
    (UNet((5, 3, 2), channels=(4, 6), embedding_width=8), (5, 3, 2), None),
    (UNet((4, 4), channels=(8,), embedding_width=8, context_size=3), (4, 4), (3,)),
]
each_net = pytest.mark.parametrize(("config", "event_shape", "context_shape"), NETS)


@cache
def build(config):
    """Return structure and fresh weights of a net."""
    return nnx.split(config(rngs=nnx.Rngs(0)))


def nudged(params):
    """Return the weights moved off their start, where the last layers are zero."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    leaves = [leaf + 0.3 * rng.standard_normal(leaf.shape, "f4") for leaf in leaves]
    return jax.tree.unflatten(treedef, leaves)


def inputs(event_shape, context_shape):
    """Return a point, a noise input and a context, if the net takes one."""
    rng = np.random.default_rng(2)
    point = jnp.asarray(rng.standard_normal(event_shape, "f4"))
    if context_shape is None:
        return (point, jnp.array(0.3))
    return (
        point,
        jnp.array(0.3),
        jnp.asarray(rng.standard_normal(context_shape, "f4")),
    )


@partial(jax.jit, static_argnums=0)
def call(graphdef, params, *inputs):
    return nnx.merge(graphdef, params)(*inputs)


@each_net
def test_a_fresh_net_is_silent(config, event_shape, context_shape):
    point, *rest = inputs(event_shape, context_shape)
    output = call(*build(config), point, *rest)
    assert output.shape == event_shape
    assert output.dtype == point.dtype
    np.testing.assert_array_equal(output, 0.0)


@each_net
def test_every_weight_and_input_matters(config, event_shape, context_shape):
    graphdef, params = build(config)

    def value(params, inputs):
        output = call(graphdef, params, *inputs)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size).reshape(output.shape)))

    arguments = (nudged(params), inputs(event_shape, context_shape))
    gradients = jax.jit(jax.grad(value, (0, 1)))(*arguments)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-5, path


@each_net
def test_batching_by_vmap_changes_nothing(config, event_shape, context_shape):
    graphdef, params = build(config)
    params = nudged(params)
    point, *rest = inputs(event_shape, context_shape)
    points = jnp.stack([point, 2 * point, -point])
    batched = jax.vmap(lambda x: call(graphdef, params, x, *rest))(points)
    alone = call(graphdef, params, points[2], *rest)
    np.testing.assert_allclose(batched[2], alone, rtol=1e-4, atol=1e-5)
    assert np.abs(batched[0] - batched[2]).max() > 1e-3


def test_weights_follow_the_key():
    config, _, _ = NETS[0]
    one, same, other = (
        jax.tree.leaves(nnx.split(config(rngs=nnx.Rngs(seed)))[1]) for seed in (0, 0, 1)
    )
    assert all(map(np.array_equal, one, same))
    assert not all(map(np.array_equal, one, other))


@each_net
def test_point_of_another_shape_is_refused(config, event_shape, context_shape):
    net = nnx.merge(*build(config))
    with pytest.raises(ValueError, match=r"`x` must have .* Got .*\(7,\)"):
        net(jnp.zeros(7), 0.0)


@each_net
def test_context_of_another_size_is_refused(config, event_shape, context_shape):
    net = nnx.merge(*build(config))
    expected = 0 if context_shape is None else int(np.prod(context_shape))
    wrong = jnp.zeros(expected + 1)
    with pytest.raises(ValueError, match=f"`context`.*Got {wrong.size}, .*{expected}"):
        net(jnp.zeros(event_shape), 0.0, wrong)
    if expected:
        with pytest.raises(ValueError, match=f"`context`.*Got 0, expected {expected}"):
            net(jnp.zeros(event_shape), 0.0)


@pytest.mark.parametrize("name", ["size", "width", "depth"])
def test_mlp_without_numbers_or_layers_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .* at least 1"):
        MLP(**{"size": 2, name: 0})


def test_mlp_with_negative_context_is_refused():
    with pytest.raises(ValueError, match=r"`context_size` must be .* at least 0"):
        MLP(2, context_size=-1)


@pytest.mark.parametrize("event_shape", [(4,), (1, 4, 4, 3)])
def test_unet_for_other_than_images_is_refused(event_shape):
    with pytest.raises(ValueError, match=r"`event_shape` must be \(height, width\)"):
        UNet(event_shape)


@pytest.mark.parametrize("channels", [(), (8, 0)])
def test_unet_without_channels_is_refused(channels):
    with pytest.raises(ValueError, match="`channels` must"):
        UNet((4, 4), channels=channels)


def test_unet_tells_padding_from_black_pixels():
    """A channel of ones marks the image, so a padded border is known as such."""
    net = nnx.merge(*build(NETS[2][0]))
    padded = net._pad(jnp.zeros((5, 3, 2)))
    assert padded.shape == (6, 4, 3)
    np.testing.assert_array_equal(padded[..., 2].sum(), 15.0)
    np.testing.assert_array_equal(padded[..., :2], 0.0)


def test_unet_sees_the_whole_image():
    """A change of one corner reaches the opposite one, by way of the coarse scale."""
    config, event_shape, _ = NETS[2]
    graphdef, params = build(config)
    point, noise = inputs(event_shape, None)
    moved = point.at[0, 0].add(1.0)
    first, second = (call(graphdef, nudged(params), x, noise) for x in (point, moved))
    assert np.abs(first - second)[-1, -1].max() > 1e-5


# The embedding


def test_sinusoidal_features_tell_levels_apart():
    """Between any two levels, including neighbors of a fine grid, features differ."""
    levels = np.geomspace(0.01, 100.0, 200)
    features = jax.vmap(lambda c: sinusoidal(c, 32))(jnp.log(levels) / 4)
    assert features.shape == (200, 32)
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 0.05
    np.testing.assert_allclose((features**2).sum(-1), 16.0, rtol=1e-4)


def test_embedding_depends_on_level_and_context():
    embedding = NoiseEmbedding(8, context_size=2, rngs=nnx.Rngs(0))
    base = embedding(0.0, jnp.zeros(2))
    assert base.shape == (8,)
    assert np.abs(embedding(0.5, jnp.zeros(2)) - base).max() > 1e-3
    assert np.abs(embedding(0.0, jnp.ones(2)) - base).max() > 1e-3


def test_modulation_shifts_and_scales_every_feature():
    x = jnp.arange(6.0).reshape(3, 2)
    shift_and_scale = jnp.array([1.0, 2.0, 0.5, -1.0])
    expected = x * jnp.array([1.5, 0.0]) + jnp.array([1.0, 2.0])
    np.testing.assert_allclose(film(x, shift_and_scale), expected)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_patches_are_a_convolution(size):
    rng = np.random.default_rng(3)
    images = jnp.asarray(rng.standard_normal((2, 4, 6, 3), "f4"))
    kernel = jnp.asarray(rng.standard_normal((size, size, 3, 5), "f4"))
    by_xla = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(_conv_by_patches(images, kernel), by_xla, atol=1e-5)
