"""One-step maps and straightened flows against the law they are to draw from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

from numpyro_score import MLP, VE, ScoreModel
from numpyro_score.consistency import (
    consistency_distillation,
    consistency_training,
    distill,
    reflow,
)
from numpyro_score.data.support import Support
from numpyro_score.diagnostics import sliced_wasserstein
from numpyro_score.guidance import train_discriminator
from numpyro_score.solver import DPMSolverPP, Euler, decode
from tests.targets import MIXTURE, Gaussian, unchecked

KEY = jax.random.key(0)
SDE = VE(0.02, 20.0)
NET = MLP(2, width=64, depth=1)
GAUSSIAN = Gaussian((0.5, -0.5), (0.5, 1.0))


@pytest.fixture(scope="module")
def distilled():
    score = GAUSSIAN.score_model(SDE)
    return distill(KEY, score, 300, net=NET, num_paths=1000, batch_size=128)


def test_training_shows_steps_and_loss(capsys):
    score = GAUSSIAN.score_model(SDE)
    options = {"net": MLP(2, width=4, depth=1), "batch_size": 8}
    for show in (True, False):
        distill(KEY, score, 3, num_paths=8, progress_bar=show, **options)
        assert ("3/3" in capsys.readouterr().err) is show
    with unchecked(), pytest.raises(TypeError, match="`progress_bar` must be True or"):
        distill(KEY, score, 3, num_paths=8, progress_bar="no", **options)


@pytest.mark.slow
def test_every_training_shows_its_steps(capsys):
    score, data = GAUSSIAN.score_model(SDE), GAUSSIAN.sample(KEY, (40,))
    options = {"net": MLP(2, width=4, depth=1), "batch_size": 8}
    consistency_distillation(KEY, score, data, 3, **options)
    assert "3/3" in capsys.readouterr().err
    consistency_training(KEY, data, SDE, 3, **options)
    assert "3/3" in capsys.readouterr().err
    reflow(KEY, score, 3, num_pairs=8, **options)
    assert "3/3" in capsys.readouterr().err
    train_discriminator(KEY, score, data, 20, **options)
    printed = capsys.readouterr().err
    assert "20/20" in printed
    assert "validation" in printed


def test_consistency_is_the_identity_at_the_lowest_level(distilled):
    x = jnp.array([0.3, -2.0])
    np.testing.assert_allclose(distilled.model(x, SDE.sigma_min), x, atol=1e-6)


def test_points_of_one_path_have_one_end(distilled):
    # the path of a Gaussian through x at the top is known
    sd, mean = jnp.array(GAUSSIAN.sd), jnp.array(GAUSSIAN.mean)
    quantiles = jnp.array([[-1.0, 0.5], [0.2, 1.2], [1.5, -0.7]])
    end = mean + quantiles * jnp.sqrt(sd**2 + SDE.sigma_min**2)
    for level in (0.3, 2.0, 20.0):
        x = mean + quantiles * jnp.sqrt(sd**2 + level**2)
        u = jax.vmap(distilled.model.standardize.forward)(x)
        got = jax.vmap(lambda u, level=level: distilled.model(u, level))(u)
        got = jax.vmap(distilled.model.standardize.inverse)(got)
        np.testing.assert_allclose(got, end, atol=0.15)


def test_a_level_next_to_the_lowest_adds_next_to_no_noise(distilled):
    """Draws have the noise of the lowest; what is added is (r^2 - r_min^2)^1/2."""
    once = distilled.model.sample(KEY, (64,))
    twice = distilled.model.sample(KEY, (64,), levels=(1.0002 * SDE.sigma_min,))
    added = (twice - once) / distilled.model.standardize.scale
    assert 0 < float(added.std()) < 0.05 * SDE.sigma_min  # .02 of it


def test_losses_fall_and_every_step_has_one(distilled):
    losses = np.asarray(distilled.losses)
    assert losses.shape == (300,)
    assert losses[-50:].mean() < 0.3 * losses[:50].mean()


def test_levels_must_lie_in_the_range(distilled):
    with pytest.raises(ValueError, match="`levels` must lie between"):
        distilled.model.sample(KEY, (3,), levels=(50.0,))


def mode_error(draws):
    return float(jnp.abs(weigh(draws).mean(0) - jnp.array(MIXTURE.weights)).sum())


@jax.jit
@jax.vmap
def weigh(x):
    return MIXTURE.responsibilities(x, 1.0, SDE.sigma_min)


def mean_mode_error(sampler):
    """Return the error of the mode weights, mean over 32 sets of 10 000 draws."""
    keys = jax.random.split(jax.random.key(6), 32)
    return np.mean([mode_error(sampler(key, (10_000,))) for key in keys])


def distance(draws):
    fresh = MIXTURE.sample(jax.random.key(9), (len(draws),))
    return sliced_wasserstein(KEY, draws, fresh)


@pytest.mark.slow
@pytest.mark.parametrize("train", [distill, reflow])
def test_data_far_from_0_keep_their_mean(train):
    # draws that start around 0 are 2 of their sd off
    score = Gaussian((20.0, -20.0), (0.5, 1.0)).score_model(VE(0.02, 10.0))
    size = {"num_paths" if train is distill else "num_pairs": 1000}
    result = train(KEY, score, 300, net=NET, batch_size=128, progress_bar=False, **size)
    draws = (result.model if train is distill else result[0]).sample(KEY, (2000,))
    np.testing.assert_allclose(draws.mean(0), [20.0, -20.0], atol=0.25)


@pytest.fixture(scope="module")
def score():
    return MIXTURE.score_model(SDE)


@pytest.mark.slow
@pytest.mark.long
def test_one_step_draws_are_near_the_floor(score):
    model = distill(KEY, score, 3000).model
    one = model.sample(jax.random.key(1), (10_000,))
    two = model.sample(jax.random.key(2), (10_000,), levels=(0.8,))
    assert distance(MIXTURE.sample(jax.random.key(3), (10_000,))) < 0.03
    assert distance(one) < 0.03
    assert distance(two) < 0.03
    assert mean_mode_error(model.sample) < 2 * mean_mode_error(MIXTURE.sample)


@pytest.mark.slow
@pytest.mark.long
def test_steps_of_the_flow_teach_too_and_data_alone_less(score):
    data = MIXTURE.sample(jax.random.key(4), (10_000,))
    by_steps = consistency_distillation(KEY, score, data, 3000).model
    alone = consistency_training(KEY, data, SDE, 3000).model
    taught, self_taught = (
        distance(m.sample(jax.random.key(1), (10_000,))) for m in (by_steps, alone)
    )
    assert taught < 0.15
    assert taught < self_taught < 0.6


@pytest.mark.slow
@pytest.mark.long
def test_reflow_straightens_the_flow(score):
    straight, losses = reflow(KEY, score, 3000)
    ts = SDE.time(jnp.geomspace(20.0, 0.02, 3))
    few = straight.sample(jax.random.key(1), (10_000,), solver=Euler(), ts=ts)
    before = score.sample(jax.random.key(1), (10_000,), solver=Euler(), ts=ts)
    assert losses.shape == (3000,)
    assert distance(few) < 0.1
    assert distance(few) < 0.3 * distance(before)
    # the map from noise to draws stays the one of the old flow
    start = SDE.sigma_max * jax.random.normal(jax.random.key(5), (500, 2))
    old = decode(score, start, solver=DPMSolverPP())
    new = decode(straight, start, solver=DPMSolverPP())
    assert float(jnp.median(jnp.abs(old - new))) < 0.1


def test_scores_of_data_with_a_support_are_refused():
    positive = replace(
        ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (2,)),
        support=Support.of(constraints.positive, (2,)),
    )
    for call in (
        lambda: distill(jax.random.key(0), positive, 2),
        lambda: consistency_distillation(
            jax.random.key(0), positive, jnp.ones((9, 2)), 2
        ),
    ):
        with pytest.raises(TypeError, match=r"`score` must have no support.*Positive"):
            call()
