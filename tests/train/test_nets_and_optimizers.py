"""Nets of other kinds are refused by name; optimizers get the loss they ask for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.nnx import bridge

from numpyro_score import MLP, ScoreMatching
from numpyro_score.data.rows import Batch
from numpyro_score.train.optimizer import TrainStep

DATA = jax.random.normal(jax.random.key(0), (64, 2))
NET = MLP(2, width=8, depth=1)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, noise, context=None):
        return linen.Dense(2)(x)


class Stacked(nnx.Module):
    """A linear layer with one more on top."""

    def __init__(self, layer, *, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.layer = layer(rngs)

    def __call__(self, x, noise, context=None):
        return self.layer(self.linear(x))


def stacked(layer):
    return lambda *, rngs: Stacked(layer, rngs=rngs)


def train(num_steps=20, **options):
    trainer = ScoreMatching(**{"net": NET, **options})
    return trainer.run(
        jax.random.key(1), num_steps, DATA, batch_size=32, progress_bar=False
    )


# nets


LINEN = (
    "`net` must be an `nnx.Module`, or build one when called with `rngs=`: a Linen "
    "module does not hold its weights. Pass `net = flax.nnx.bridge.ToNNX(module, "
    "rngs).lazy_init(x, noise)`, x one point and noise a number, after "
    "`net.to_nnx__rngs = None`. Got the Linen module LinenNet."
)
STATE = (
    "`net` must hold nothing but weights: the score of a point must not depend on "
    "other points, on chance or on calls before. Use `LayerNorm` or `GroupNorm` in "
    "place of `BatchNorm`, and `patience` or `optax.adamw` in place of `Dropout`. Got "
)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (LinenNet(), LINEN),
        (LinenNet, LINEN),
        (
            stacked(lambda rngs: nnx.BatchNorm(2, rngs=rngs)),
            STATE + "BatchStat at `layer.mean`.",
        ),
        (
            stacked(lambda rngs: nnx.Dropout(0.5, rngs=rngs)),
            STATE + "RngCount at `layer.rngs.count`.",
        ),
        (
            Stacked(lambda rngs: nnx.Dropout(0.5, rngs=rngs), rngs=nnx.Rngs(0)),
            STATE + "RngCount at `layer.rngs.count`.",
        ),
        (
            lambda *, rngs: lambda x, noise, context: x,
            "`net` must be an `nnx.Module`, or build one when called with `rngs=`. "
            "Got one that builds function.",
        ),
    ],
)
def test_net_with_more_than_weights_is_refused_before_training(net, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        train(net=net)


def test_remedies_train():
    linen_net = bridge.ToNNX(LinenNet(), nnx.Rngs(0)).lazy_init(jnp.zeros(2), 0.0)
    linen_net.to_nnx__rngs = None
    normalized = stacked(lambda rngs: nnx.LayerNorm(2, rngs=rngs))
    for net in (linen_net, normalized):
        result = train(net=net)
        assert np.isfinite(result.losses).all()
        assert jnp.isfinite(result.score.score(DATA)).all()


# optimizers


def test_rate_falls_where_the_loss_is_on_a_plateau():
    """The loss never falls by half, so that each step halves the rate."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.5)
    result = train(num_steps=4, optim=optax.chain(optax.sgd(1e-3), plateau))
    assert float(result.state.opt_state[1].scale) == 0.5**3
    assert float(result.state.opt_state[1].best_value) == float(result.losses[0])


def test_line_search_sees_the_loss_of_the_batch():
    """On one batch and its noise, every step of L-BFGS lowers the loss."""
    trainer = ScoreMatching(NET, optim=optax.lbfgs())
    state = trainer.init(jax.random.key(1), DATA)
    step = jax.jit(trainer.update)
    losses = []
    for _ in range(10):
        state, loss = step(state._replace(rng_key=jax.random.key(2)), DATA)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_optimizer_that_takes_no_loss_trains_as_before():
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))
    for optim in (optax.adam(1e-3), sam):
        assert np.isfinite(train(optim=optim).losses).all()


def test_loss_as_a_function_is_that_of_the_gradient():
    trainer = ScoreMatching(NET, accumulate=4)
    state = trainer.init(jax.random.key(1), DATA)
    args = (state, jax.random.key(2), Batch(DATA))
    step = TrainStep(trainer._problem, accumulate=4)
    loss, grads = step.loss_and_gradient(*args)
    value, slope = jax.value_and_grad(step.batch_loss)(state.params, *args)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        slope,
        grads,
    )
