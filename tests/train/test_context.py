"""Conditional scores: contexts, left-out contexts, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_score import MLP, VE, RectifiedFlow, ScoreMatching, ScoreModel

NUM_ROWS, NUM_STEPS = 4000, 1500


@pytest.fixture(scope="module")
def result():
    """x given c is Normal(c/100 - 3, 0.5), c is Normal(300, 100)."""
    key_c, key_x = jax.random.split(jax.random.key(0))
    c = 300 + 100 * jax.random.normal(key_c, (NUM_ROWS, 1))
    x = c / 100 - 3 + 0.5 * jax.random.normal(key_x, (NUM_ROWS, 1))
    net = MLP(1, width=32, depth=2, context_size=1, optional_context=True)
    trainer = ScoreMatching(net, drop_context=0.3)
    return trainer.run(
        jax.random.key(1),
        NUM_STEPS,
        x,
        context=c,
        validation=x[:500],
        validation_context=c[:500],
        progress_bar=False,
    )


@pytest.mark.parametrize("c", [200.0, 400.0])
def test_conditional_score_is_learned(result, c):
    score, sde = result.score, result.score.sde
    x = jnp.linspace(-1, 1, 9)[:, None] + c / 100 - 3
    t = sde.time(0.3)
    # one sd of data is about 1.1, so noise 0.3 is .3 * scale in physical units
    variance = 0.25 + (0.3 * score.standardize.scale) ** 2
    exact = -(x - (c / 100 - 3)) / variance
    got = score.score(x, t, jnp.array([c]))
    assert jnp.abs(got - exact).max() < 0.3 * jnp.abs(exact).max()


def test_marginal_score_is_learned_beside(result):
    score, sde = result.score, result.score.sde
    x = jnp.linspace(-2, 2, 9)[:, None]
    variance = 1.25 + (0.3 * score.standardize.scale) ** 2
    got = score.score(x, sde.time(0.3))
    assert jnp.abs(got + x / variance).max() < 0.3 * 2 / 1.25


def test_draws_follow_their_context(result):
    draws = result.score.sample(jax.random.key(2), (500,), context=jnp.array([400.0]))
    standard_error = 0.5 / np.sqrt(500)
    assert abs(draws.mean() - 1.0) < 5 * standard_error + 0.05
    assert abs(draws.std() - 0.5) < 0.1


def test_validation_uses_its_context(result):
    assert result.validation_losses.shape == (20,)
    assert result.validation_losses[-1] < result.validation_losses[0]


@pytest.mark.slow
@pytest.mark.slow
def test_context_scale_does_not_matter():
    """Contexts are standardized, so units drop out up to rounding."""
    x = jax.random.normal(jax.random.key(0), (64, 2))
    c = x[:, :1] + 1.0
    trainer = ScoreMatching(MLP(2, width=8, depth=1, context_size=1))

    def train(context):
        return trainer.run(
            jax.random.key(1), 20, x, context=context, batch_size=32, progress_bar=False
        )

    raw, scaled = train(c), train(1024.0 * c)
    np.testing.assert_allclose(raw.losses, scaled.losses, rtol=1e-4)
    np.testing.assert_allclose(
        raw.score.score(x[0], 0.5, c[0]),
        scaled.score.score(x[0], 0.5, 1024.0 * c[0]),
        rtol=1e-3,
        atol=1e-5,
    )


def test_constant_context_is_left_alone():
    x = jax.random.normal(jax.random.key(0), (64, 2))
    trainer = ScoreMatching(MLP(2, width=8, depth=1, context_size=2))
    context = jnp.stack([jnp.full(64, 7.0), x[:, 0]], 1)
    state = trainer.init(jax.random.key(1), x, context=context)
    assert state.fixed.standardize_context.scale[0] == 1.0


DATA = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)


def run(trainer=None, data=DATA, **kwargs):
    trainer = trainer or ScoreMatching(MLP(2, width=8, depth=1, context_size=1))
    return trainer.run(
        jax.random.key(0), 2, data, batch_size=16, progress_bar=False, **kwargs
    )


def test_context_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"`context` must have one row per row"):
        run(context=DATA[:10, :1])


def test_context_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"`data's context` must be finite"):
        run(context=np.full((64, 1), np.nan))


def test_missing_context_is_refused_by_the_net():
    with pytest.raises(ValueError, match=r"`context` must have the size"):
        run()


def test_context_that_comes_late_is_refused():
    trainer = ScoreMatching(MLP(2, width=8, depth=1))
    state = trainer.init(jax.random.key(0), DATA)
    with pytest.raises(ValueError, match=r"`context` must be given for every row"):
        trainer.update(state, DATA, context=DATA)


def test_dropping_needs_a_net_that_can_do_without():
    net = MLP(2, width=8, depth=1, context_size=1)
    with pytest.raises(ValueError, match=r"`context` must have the size"):
        run(ScoreMatching(net, drop_context=0.1), context=DATA[:, :1])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_bad_share_is_refused(share):
    with pytest.raises(ValueError, match=r"`drop_context` must lie in \[0, 1\)"):
        ScoreMatching(MLP(2), drop_context=share)


class Recorder(nnx.Module):
    """Somebody's net, with the call (x, noise, context)."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, noise, context):
        return self.linear(jnp.concatenate([x, noise[None], context]))


def test_any_module_takes_a_context():
    result = run(ScoreMatching(Recorder), context=DATA[:, :1])
    assert result.score.score(jnp.asarray(DATA[0]), 0.5, jnp.ones(1)).shape == (2,)


@pytest.mark.parametrize("sde", [VE(), RectifiedFlow()], ids=["VE", "RectifiedFlow"])
def test_velocity_is_the_probability_flow(sde):
    score = ScoreModel.from_fn(
        lambda x, t: -x / (sde.alpha(t) ** 2 * 0.5 + sde.sigma(t) ** 2), sde, (2,)
    )
    x = jnp.array([[0.5, -1.0], [2.0, 0.1]])
    t = sde.time(0.7)
    flow = sde.probability_flow(lambda x, t: score.score(x, t))
    np.testing.assert_allclose(
        score.velocity(x, t), jax.vmap(lambda x: flow.drift(x, t))(x), rtol=1e-4
    )
