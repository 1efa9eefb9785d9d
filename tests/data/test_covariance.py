"""The covariance of few rows, against that of the law they are drawn from."""

import numpy as np
import pytest

from numpyro_score.data.covariance import shrunk_covariance

RNG = np.random.default_rng(0)
TIMES = np.linspace(0, 1, 64)
SQUARE = np.square(TIMES[:, None] - TIMES)
LAWS = {  # covariances with unit variances, and as many rows as are drawn of them
    "smooth curves": (np.exp(-SQUARE / 0.08) + 1e-6 * np.eye(64), 500),
    "noisy curves, fewer than points": (np.exp(-SQUARE / 0.08) + 0.01 * np.eye(64), 50),
    "rough curves": (np.exp(-np.sqrt(SQUARE) / 0.3), 100),
    "independent": (np.eye(10), 50),
    "one row more than columns": (np.eye(10), 11),
    "correlated": (0.9 ** np.abs(np.subtract.outer(range(20), range(20))), 100),
}


def kl_divergence(law, estimate):
    """Return KL(N(0, law) || N(0, estimate)) in nats, with a floor for rounding."""
    size = len(law)
    floor = 1e-6 * np.eye(size)
    ratio = np.linalg.solve(estimate + floor, law + floor)
    return 0.5 * (np.trace(ratio) - size - np.linalg.slogdet(ratio)[1])


def ledoit_wolf(rows):
    from sklearn.covariance import ledoit_wolf as fit

    return fit(rows, assume_centered=True)[0]


@pytest.mark.parametrize("name", LAWS)
def test_few_rows_are_closer_to_their_law_than_with_other_shares(name):
    law, count = LAWS[name]
    law = law / law[0, 0]
    rows = RNG.multivariate_normal(np.zeros(len(law)), law, count)
    found = kl_divergence(law, shrunk_covariance(rows))
    sample = kl_divergence(law, rows.T @ rows / count)
    # that shrinks variances to their mean as well: equal ones cost it d / 2n nats less
    equal = len(law) / count
    assert found < 1.1 * kl_divergence(law, ledoit_wolf(rows)) + equal
    # smooth curves are known but for rounding, where a share of 1e-6 is nearly all
    assert found < 1.1 * sample + 6 * (name == "smooth curves")


def test_least_square_error_would_fill_the_narrow_directions_of_curves():
    law, count = LAWS["smooth curves"]
    rows = RNG.multivariate_normal(np.zeros(len(law)), law, count)
    found = kl_divergence(law, shrunk_covariance(rows))
    assert found < 0.1 * kl_divergence(law, ledoit_wolf(rows))


def test_many_rows_are_hardly_shrunk():
    rows = RNG.normal(size=(10_000, 2)) @ [[1.0, 0.5], [0.0, 1.0]]
    np.testing.assert_allclose(shrunk_covariance(rows), rows.T @ rows / 1e4, rtol=1e-5)


def test_equal_columns_are_kept_apart_by_the_smallest_share():
    column = RNG.normal(size=(40, 1))
    for share in (1e-6, 1e-4):
        found = shrunk_covariance(np.repeat(column, 2, axis=1), share)
        assert np.linalg.eigvalsh(found).min() == pytest.approx(
            share * np.square(column).mean(), rel=1e-3
        )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_two_and_three_rows(count):
    rows = RNG.normal(size=(count, 4))
    found = shrunk_covariance(rows)
    np.testing.assert_allclose(np.diag(found), np.square(rows).mean(0))
    assert np.linalg.eigvalsh(found).min() > 1e-6


def test_constant_columns_stay_constant():
    rows = np.concatenate([RNG.normal(size=(30, 2)), np.zeros((30, 1))], axis=1)
    found = shrunk_covariance(rows)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[2], 0)
