"""Points far from rows of data: beyond them, in a hole, or off their dependence."""

import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.data.far_points import choose_rows, largest_gap, remoteness

RNG = np.random.default_rng(0)


def normal(count):
    return RNG.normal(size=(count, 3))


def pairs(count):
    """Return two measurements of one number."""
    return RNG.normal(size=(count, 1)) + 0.05 * RNG.normal(size=(count, 2))


def ring(count):
    angle = RNG.uniform(0, 2 * np.pi, count)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + 0.05 * RNG.normal(size=(count, 2))


def two_modes(count):
    return 3 * RNG.choice([-1.0, 1.0], (count, 1)) + RNG.normal(size=(count, 1))


def sums(count):
    rows = RNG.normal(size=(count, 2))
    return np.concatenate([rows, rows.sum(1, keepdims=True)], axis=1)


def constant(count):
    return np.concatenate([RNG.normal(size=(count, 1)), np.ones((count, 1))], axis=1)


def binary(count):
    return (RNG.random((count, 8)) < 0.3).astype(float)


def counts(count):
    return RNG.poisson(np.exp(RNG.normal(size=(count, 1))), (count, 4)).astype(float)


def wide(count):
    """Return fewer rows than ten per number."""
    return RNG.normal(size=(count, 1)) + RNG.normal(size=(count, 200))


LAWS = [normal, pairs, ring, two_modes, sums, constant, binary, counts, wide]
FAR = [
    (normal, [7.0, 0.0, 0.0], "from their mean"),
    (pairs, [0.4, -0.4], "from their mean"),
    (ring, [0.0, 0.0], "to the nearest"),
    (ring, [0.3, 0.2], "to the nearest"),
    (ring, [0.0, 2.0], "from their mean"),
    (sums, [1.0, 1.0, 2.1], "from their mean"),
    (constant, [0.0, 1.1], "from their mean"),
    (wide, [19.0] + 199 * [0.0], "from their mean"),
]


@pytest.mark.parametrize(("law", "point", "words"), FAR)
def test_far_points_are_told_with_what_is_far(law, point, words):
    assert words in remoteness(np.array(point), law(1000)).words


@pytest.mark.parametrize("law", LAWS)
def test_fresh_rows_are_not_far(law):
    rows = law(1000)
    assert not any(remoteness(row, rows).words for row in law(100))


def test_equal_rows_are_far_from_others_alone():
    rows = np.ones((50, 2))
    assert not remoteness(rows[0], rows).words
    assert remoteness(2 * rows[0], rows).words


def test_repeated_rows_are_as_far_apart_as_single_ones():
    rows = ring(500)
    repeated = np.tile(rows, (2, 1))
    assert largest_gap(rows) == pytest.approx(largest_gap(repeated), rel=0.01)
    assert largest_gap(rows) > 0
    assert not remoteness(rows[0] + 0.01, repeated).words


@pytest.mark.parametrize(("shape", "kept"), [((31, 2), None), ((32, 2), 32)])
def test_few_rows_are_not_kept(shape, kept):
    chosen = choose_rows(jnp.zeros(shape))
    assert (None if chosen is None else len(chosen)) == kept
    assert choose_rows(jnp.zeros((5000, 128))).shape == (1024, 128)
