"""Random numbers of transitions: one hash, for noise, acceptance and the next key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.kernel.threefry import (
    next_key_and_words,
    standard_normal,
    threefry2x32,
    uniform,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize("size", [6, 1001])
def test_noise_is_the_transform_of_box_and_muller(size):
    """Squares of a pair add up to -2 log u, and its angle is another number's."""
    _, words = next_key_and_words(KEY)
    half = (size + 1) // 2
    first, second = threefry2x32(
        words, jnp.arange(half, dtype=jnp.uint32), jnp.uint32(3)
    )
    u, v = ((np.asarray(w, float) + 0.5) / 2**32 for w in (first, second))
    noise = np.asarray(standard_normal(words, 3, size, jnp.float32), float)
    x, y = noise[:half], noise[half:]
    turn = 2 * np.pi * (v - 0.5)
    radius = np.sqrt(-2 * np.log(u))
    np.testing.assert_allclose(x, radius * np.cos(turn), atol=1e-5)
    np.testing.assert_allclose(y, (radius * np.sin(turn))[: len(y)], atol=1e-5)


def _from_the_middle(u):
    return np.abs(u - 0.5)


def test_numbers_of_a_transition_tell_nothing_of_each_other():
    """Noise of two steps, the number that accepts, the next key and what it draws."""
    keys = jax.random.split(KEY, 5000)
    following, words = next_key_and_words(keys)
    _, later = next_key_and_words(following)
    noise = [standard_normal(words, step, 2, jnp.float32) for step in (0, 1)]
    noise.append(standard_normal(later, 0, 2, jnp.float32))
    next_words = np.asarray(jax.random.key_data(following)).T / 2.0**32
    even = [uniform(words), uniform(later), *next_words]
    columns = [f(np.asarray(n)) for n in even for f in (np.array, _from_the_middle)]
    normal = jnp.concatenate(noise)
    columns += [f(np.asarray(n)) for n in normal for f in (np.array, np.square)]
    correlation = np.corrcoef(columns)
    off = correlation[~np.eye(len(columns), dtype=bool)]
    assert np.abs(off).max() < 5 / np.sqrt(5000)
    assert abs(columns[0].mean() - 0.5) < 5 / np.sqrt(12 * 5000)
    assert np.ptp(columns[0]) > 0.999
