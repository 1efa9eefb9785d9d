"""Objectives are minimal at the true score: one suite for all of them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, RectifiedFlow
from numpyro_score.loss import (
    DenoisingScoreMatching,
    EDMWeight,
    FlowMatchingWeight,
    LikelihoodWeight,
    SigmaSquaredWeight,
)
from numpyro_score.loss.denoising import denoising_error
from numpyro_score.loss.noise_levels import LogUniform
from tests.targets import MIXTURE, z_scores

LOSSES = [DenoisingScoreMatching(), DenoisingScoreMatching(LogUniform())]
SDE = VE(sigma_min=0.05, sigma_max=10.0)


def true_denoiser(x, level):
    return MIXTURE.denoised(x, 1.0, level)


DIRECTIONS = {  # errors of a denoiser, about as large at a level as it can be wrong
    "scale": lambda x, level: true_denoiser(x, level),
    "shift": lambda x, level: jnp.array([1.0, -0.5]),
    "toward the point": lambda x, level: x - true_denoiser(x, level),
    "smooth": lambda x, level: jnp.sin(jnp.array([[2.0, 1.0], [-1.0, 3.0]]) @ x + 0.7),
    "one level": lambda x, level: jnp.exp(-(jnp.log(level) ** 2)) * jnp.tanh(x),
}


def slopes_and_curvatures(loss, direction, num_batches=64, batch_size=256):
    """Return first and second derivatives of the loss at the true denoiser, per batch.

    Derivatives in e of D + e w h, where w = level / sqrt(1 + level^2) keeps the
    weights of the levels from making the mean heavy-tailed.
    """

    def one(key):
        key_data, key_loss = jax.random.split(key)
        x0 = MIXTURE.sample(key_data, (batch_size,))

        def value(size):
            def denoise(x, level):
                error = level / jnp.sqrt(1 + level**2) * direction(x, level)
                return true_denoiser(x, level) + size * error

            return loss(key_loss, jax.vmap(denoise), x0, SDE)

        slope = jax.grad(value)
        return slope(0.0), jax.grad(slope)(0.0)

    keys = jax.random.split(jax.random.key(0), num_batches)
    return jax.jit(jax.vmap(one))(keys)


def assert_minimal(loss, direction):
    slopes, curvatures = map(np.asarray, slopes_and_curvatures(loss, direction))
    assert z_scores(slopes, 0.0) < 4.5
    assert curvatures.mean() > 10 * curvatures.std() / np.sqrt(len(curvatures))


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_is_minimal_at_the_true_score(loss, direction):
    assert_minimal(loss, direction)


@dataclass(frozen=True)
class NegativeWeight:
    """A mutant that is maximal at the true score."""

    def __call__(self, key, denoise, x0, sde):
        return -DenoisingScoreMatching()(key, denoise, x0, sde)


@dataclass(frozen=True)
class NoisyTarget:
    """A mutant that regresses on the noisy point halfway, not on x_0."""

    def __call__(self, key, denoise, x0, sde):
        key_level, key_noise = jax.random.split(key)
        levels = jnp.exp(jax.random.uniform(key_level, (len(x0),), minval=-2.0))
        x = x0 + levels[:, None] * jax.random.normal(key_noise, x0.shape)
        target = 0.9 * x0 + 0.1 * x
        return denoising_error(target, denoise(x, levels), EDMWeight()(levels, sde))


@dataclass(frozen=True)
class WrongLevel:
    """A mutant that tells the denoiser a variance instead of a standard deviation."""

    def __call__(self, key, denoise, x0, sde):
        def mistaken(x, level):
            return denoise(x, level**2)

        return DenoisingScoreMatching()(key, mistaken, x0, sde)


@pytest.mark.parametrize("mutant", [NegativeWeight(), NoisyTarget(), WrongLevel()])
def test_wrong_objective_is_caught(mutant):
    with pytest.raises(AssertionError):
        assert_minimal(mutant, DIRECTIONS["toward the point"])


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_of_the_best_denoiser_of_normal_data_is_one(loss):
    """E (D - x0)^2 = level^2 / (1 + level^2), whose product with the weight is 1."""

    def one(key):
        key_data, key_loss = jax.random.split(key)
        x0 = jax.random.normal(key_data, (256, 2))
        best = jax.vmap(lambda x, level: x / (1 + level**2))
        return loss(key_loss, best, x0, SDE)

    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 200))
    assert z_scores(values, 1.0) < 4.5
    assert values.std() < 0.15


@pytest.mark.parametrize("event_shape", [(), (2,), (2, 3)])
def test_loss_takes_any_event_shape(event_shape):
    x0 = jax.random.normal(jax.random.key(2), (16, *event_shape))
    best = jax.vmap(lambda x, level: x / (1 + level**2))
    value = DenoisingScoreMatching()(jax.random.key(3), best, x0, SDE)
    assert value.shape == ()
    assert 0.2 < value < 5.0


def test_denoising_error_is_the_weighted_mean_square():
    x0 = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    denoised = jnp.array([[1.0, 4.0], [0.0, 4.0]])
    value = denoising_error(x0, denoised, jnp.array([1.0, 2.0]))
    assert float(value) == (1.0 * 4 / 2 + 2.0 * 9 / 2) / 2


@pytest.mark.parametrize(
    ("weighting", "exact"),
    [
        (EDMWeight(), lambda t: 1 + (1 - t) ** 2 / t**2),
        (SigmaSquaredWeight(), lambda t: (1 - t) ** 2 / t**2),
        # g^2 alpha^2 / sigma^4 with g^2 = 2 t / (1 - t) of the straight path
        (LikelihoodWeight(), lambda t: 2 * (1 - t) / t**3),
        (FlowMatchingWeight(), lambda t: 1 / t**2),
    ],
    ids=lambda part: type(part).__name__,
)
def test_weights_are_those_of_the_straight_path(weighting, exact):
    t = np.array([0.1, 0.5, 0.8])
    got = weighting(jnp.asarray(t / (1 - t), float), RectifiedFlow())
    np.testing.assert_allclose(got, exact(t), rtol=1e-4)
