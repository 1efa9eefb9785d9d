"""Energy nets are gradients; set transformers do not mind the order of items."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_score import MLP, ScoreMatching, io
from numpyro_score.nn import Energy, SetTransformer
from numpyro_score.score.preconditioning import EDM, BoundedScore, VelocityPrediction


def shaken(net, key=0, size=0.3):
    """Return a module whose weights are far from their start."""
    graphdef, params = nnx.split(net(rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    leaves = [
        leaf + size * jax.random.normal(k, leaf.shape)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


@pytest.fixture(scope="module")
def data():
    return jax.random.normal(jax.random.key(0), (64, 3)) * jnp.array([1.0, 2.0, 0.5])


def energy_score(
    data, parametrization=BoundedScore(), net=Energy(MLP(3, width=8, depth=1))
):
    trainer = ScoreMatching(shaken(net), parametrization=parametrization)
    return trainer.get_score(trainer.init(jax.random.key(0), data))


@pytest.mark.parametrize(
    "parametrization", [BoundedScore(), EDM(), VelocityPrediction()]
)
@pytest.mark.parametrize("t", [0.6])
def test_score_is_minus_the_gradient_of_the_energy(data, parametrization, t):
    score = energy_score(data, parametrization)
    gradient = jax.jit(jax.grad(lambda x: score.energy(x, t)))
    for x in data[:3]:
        np.testing.assert_allclose(
            gradient(x), -score.score(x, t), rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("linear_baseline", [False, True])
def test_energy_given_a_context_has_the_score_as_its_gradient(data, linear_baseline):
    context = 5.0 + 3.0 * data[:, :2]  # far from its unit scale
    net = shaken(Energy(MLP(3, width=8, depth=1, context_size=2)))
    trainer = ScoreMatching(net, linear_baseline=linear_baseline)
    score = trainer.get_score(trainer.init(jax.random.key(0), data, context=context))

    @jax.jit
    def both(x, c):
        gradient = jax.grad(lambda x: score.energy(x, 0.6, c))(x)
        return gradient, -score.score(x, 0.6, c)

    for x, c in zip(data[:3], context, strict=False):
        np.testing.assert_allclose(*both(x, c), rtol=2e-3, atol=2e-3)


def asymmetry(score, x, t=0.6):
    jacobian = jax.jit(jax.jacobian(lambda x: score.score(x, t)))(x)
    return jnp.abs(jacobian - jacobian.T).max() / jnp.abs(jacobian).max()


def test_energy_net_is_conservative_and_others_are_not(data):
    assert asymmetry(energy_score(data), data[0]) < 1e-4
    assert asymmetry(energy_score(data, net=MLP(3, width=8, depth=1)), data[0]) > 0.01


def test_energy_needs_an_energy_net(data):
    trainer = ScoreMatching(MLP(3, width=8, depth=1))
    score = trainer.get_score(trainer.init(jax.random.key(0), data))
    assert not score.has_energy
    with pytest.raises(TypeError, match=r"`energy` needs a net whose score is a grad"):
        score.energy(data[0])


@pytest.mark.slow
def test_energy_net_learns_a_gaussian_and_is_saved(tmp_path):
    """Differences of the energy are those of the exact log density."""
    x = 1.0 + 2.0 * jax.random.normal(jax.random.key(1), (4000, 1))
    trainer = ScoreMatching(Energy(MLP(1, width=16, depth=1)))
    result = trainer.run(jax.random.key(2), 800, x, progress_bar=False)
    score, t = result.score, result.score.sde.time(0.5)
    points = jnp.array([[-2.0], [1.0], [3.0]])
    energy = score.energy(points, t)
    exact = 0.5 * (points[:, 0] - 1.0) ** 2 / (4 + (0.5 * 2) ** 2)
    np.testing.assert_allclose(energy - energy[1], exact, atol=0.1)
    io.save(score, tmp_path / "score")
    np.testing.assert_array_equal(io.load(tmp_path / "score").energy(points, t), energy)


GROUPED = SetTransformer((5, 2), (0, 0, 1, 1, 1), width=8, depth=2, num_heads=2)
ITEMS = jax.random.normal(jax.random.key(3), (5, 2))


def exchange(net, order):
    """Return how much outputs differ from exchanged outputs."""
    order = jnp.array(order)
    return jnp.abs(net(ITEMS[order], 0.3) - net(ITEMS, 0.3)[order]).max()


def test_items_of_a_group_can_be_exchanged():
    net = shaken(GROUPED)
    assert exchange(net, [1, 0, 4, 2, 3]) < 1e-5
    assert exchange(net, [2, 1, 0, 3, 4]) > 1e-3, "not across groups"
    output = net(ITEMS, 0.3)
    moved = net(ITEMS.at[0].add(1.0), 0.3)
    assert (jnp.abs(moved - output).max(1) > 1e-5).all(), "items see each other"


def test_one_group_is_the_default_and_items_may_be_numbers():
    net = shaken(SetTransformer((5,), width=8, depth=1, num_heads=2))
    x, order = ITEMS[:, 0], jnp.array([4, 3, 2, 1, 0])
    np.testing.assert_allclose(net(x[order], 0.3), net(x, 0.3)[order], atol=1e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_set_transformer_trains_with_context():
    net = SetTransformer((3, 2), width=8, depth=1, num_heads=2, context_size=2)
    data = jax.random.normal(jax.random.key(0), (32, 3, 2))
    result = ScoreMatching(net).run(
        jax.random.key(1),
        4,
        data,
        context=data[:, 0],
        batch_size=16,
        progress_bar=False,
    )
    assert jnp.isfinite(result.losses).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_shape": (2, 2, 2)}, r"`event_shape` must be \(items,\)"),
        ({"event_shape": (3,), "groups": (0, 1)}, r"`groups` must give each item"),
        ({"event_shape": (3,), "width": 10}, r"`width` must be a multiple"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SetTransformer(**arguments)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`x` must have the shape that the set"):
        GROUPED(rngs=nnx.Rngs(0))(jnp.zeros((4, 2)), 0.0)
