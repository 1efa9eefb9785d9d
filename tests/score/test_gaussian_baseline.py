"""Nets that add to a normal law, and go over to it off the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import MLP, ScoreMatching, io
from numpyro_score.loss import DenoisingScoreMatching, FlowMatching, PerCoordinate
from numpyro_score.nn import Energy
from numpyro_score.score.gaussian_baseline import GaussianBaseline
from numpyro_score.score.preconditioning import EDM, BoundedScore, VPrediction

RNG = np.random.default_rng(0)
FACTOR = np.array([[1.0, 0.0, 0.0], [2.0, 0.1, 0.0], [0.5, -0.3, 0.02]])
ROWS = (RNG.normal(size=(4000, 3)) @ FACTOR.T).astype(np.float32)
NET = MLP(3, width=16, depth=1)


def untrained(data=ROWS, net=NET, **options):
    trainer = ScoreMatching(net, **{"gaussian_baseline": True} | options)
    return trainer.get_score(trainer.init(jax.random.key(0), data))


@pytest.mark.parametrize("parametrization", [BoundedScore(), EDM()])
def test_an_untrained_score_is_that_of_the_normal_law_at_every_level(parametrization):
    score = untrained(parametrization=parametrization)
    scale = np.asarray(score.standardize.scale, float)
    covariance, mean = np.cov(ROWS.T, bias=True), ROWS.mean(0)
    x = np.array([0.3, 1.0, -0.2])
    for level in (0.01, 0.1, 1.0, 10.0):
        noisy = covariance + np.diag(np.square(level * scale))
        want = -np.linalg.solve(noisy, x - mean)
        got = score.score(jnp.asarray(x, float), score.sde.time(level))
        np.testing.assert_allclose(got, want, rtol=0.01, atol=0.01 * abs(want).max())


def test_the_net_fades_where_no_data_are():
    baseline = GaussianBaseline(jnp.eye(2), jnp.array([1.0, 0.5]), jnp.array(4.0))

    def denoise(x, net):
        level = jnp.array(1.0)
        return baseline.denoise(lambda y, noise: net, x, level, EDM())

    def weight(x):
        return (denoise(x, jnp.ones(2)) - denoise(x, jnp.zeros(2)))[0] * 2**0.5

    # at x = (a, 0) and level 1 the mean of c_in^2 y^2 is a^2 / 4, beyond 4 from a = 4
    assert weight(jnp.array([3.9, 0.0])) == pytest.approx(1.0, abs=1e-6)
    assert weight(jnp.array([4 * 2**0.5, 0.0])) == pytest.approx(np.exp(-1), rel=1e-4)
    assert weight(jnp.array([12.0, 0.0])) < 1e-6
    far = jnp.array([12.0, 8.0])
    np.testing.assert_allclose(denoise(far, jnp.ones(2)), far / jnp.array([2, 5.0]))


def test_an_mlp_takes_it_for_narrow_rows():
    wide = RNG.normal(size=(4000, 3)) @ [[1.0, 0.9, 0.0], [0.0, 0.44, 0.0], [0, 0, 1]]
    for data, options, takes in (
        (ROWS, {}, True),
        (wide, {}, False),
        (ROWS, {"loss": FlowMatching()}, False),
        (ROWS, {"parametrization": VPrediction()}, False),
        (ROWS, {"net": Energy(NET)}, False),
        (ROWS, {"gaussian_baseline": False}, False),
        (wide, {"gaussian_baseline": True}, True),
        (ROWS[:, :1], {"net": MLP(1, width=16, depth=1)}, False),
    ):
        score = untrained(data, **({"gaussian_baseline": None} | options))
        assert (score.denoiser.gaussian_baseline is not None) is takes


def test_it_is_chosen_for_vectors_with_one_level_per_row():
    assert untrained().denoiser.gaussian_baseline is not None
    assert untrained(gaussian_baseline=False).denoiser.gaussian_baseline is None
    with pytest.raises(ValueError, match="at most 256 numbers without context"):
        untrained(RNG.normal(size=(10, 2, 2)))
    with pytest.raises(ValueError, match="one noise level per row"):
        untrained(loss=DenoisingScoreMatching(noise=PerCoordinate()))


def test_it_is_saved(tmp_path):
    score = untrained()
    io.save(score, tmp_path / "score")
    loaded, x = io.load(tmp_path / "score"), jnp.array([[9.0, 0.0, 1.0]])
    np.testing.assert_array_equal(loaded.score(x), score.score(x))
    assert "added to a Gaussian law" in repr(loaded)


def test_a_normal_law_is_trusted_at_its_lowest_level_after_training():
    trainer = ScoreMatching(MLP(3, width=32, depth=1), gaussian_baseline=True)
    score = trainer.run(jax.random.key(0), 100, ROWS, progress_bar=False).score
    assert score.level_in_use == score.sde.sigma_min


def test_few_rows_train_with_the_default_batch():
    trainer = ScoreMatching(NET)
    result = trainer.run(jax.random.key(0), 2, ROWS[:20], progress_bar=False)
    whole = trainer.run(
        jax.random.key(0), 2, ROWS[:20], batch_size=20, progress_bar=False
    )
    np.testing.assert_array_equal(result.losses, whole.losses)
