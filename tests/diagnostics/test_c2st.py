"""The classifier two-sample test."""

import sys

import jax
import numpy as np
import pytest

from numpyro_score.diagnostics import ForestProtocol, MLPProtocol, c2st
from tests.targets import unchecked

KEY = jax.random.key(0)
PROTOCOLS = [pytest.param(MLPProtocol(), marks=pytest.mark.slow), ForestProtocol()]


@pytest.fixture(scope="module")
def pair():
    return np.asarray(jax.random.normal(KEY, (2, 400, 2)))


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_a_shift_gives_the_accuracy_of_the_best_rule(protocol, pair):
    """Unit normals at distance d are told apart with probability Phi(d/2)."""
    x, y = pair
    shift = np.array([3.0, 0.0])
    result = c2st(x, y + shift, protocol)
    best = 0.9332
    assert result.accuracy == pytest.approx(best, abs=4 * np.sqrt(0.06 / 800))
    assert len(result.folds) == 5
    assert result.accuracy == pytest.approx(np.mean(result.folds))
    assert result.protocol == protocol
    assert result.num_rows == 400


def test_mlp_protocol_runs_on_one_column(pair):
    x, y = pair[:, :100, :1]
    assert c2st(x, y + 9, MLPProtocol(num_folds=2)).accuracy > 0.97


def test_one_law_is_not_told_apart(pair):
    result = c2st(*pair, ForestProtocol())
    assert abs(result.accuracy - 0.5) < 4 * np.sqrt(0.25 / 800)


def test_units_do_not_matter(pair):
    x, y = pair
    scale = np.array([1e3, 1e-3])
    here = c2st(x, y + 1, ForestProtocol())
    there = c2st(x * scale + 5, (y + 1) * scale + 5, ForestProtocol())
    assert here.accuracy == pytest.approx(there.accuracy, abs=0.02)


def test_constant_columns_are_compared_too(pair):
    x, y = pair
    x, y = (np.concatenate([a, np.ones((400, 1))], 1) for a in (x, y))
    y[:, 2] = 2.0
    assert c2st(x, y, ForestProtocol()).accuracy == 1.0


def test_bad_samples_are_named(pair):
    x, y = pair
    shapes = r"one shape.*\(400, 2\) and \(399, 2\)"
    with unchecked(), pytest.raises(ValueError, match=shapes):
        c2st(x, y[1:], ForestProtocol())
    with pytest.raises(ValueError, match="at least 5 rows"):
        c2st(x[:4], y[:4], ForestProtocol())
    holes = y.copy()
    holes[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"`y` must be finite.*Got 1 rows of 400"):
        c2st(x, holes, ForestProtocol())


def test_missing_package_says_how_to_install(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match=r"pip install 'numpyro_score\[examples\]'"):
        c2st(*pair, ForestProtocol())


def test_a_large_offset_changes_nothing(pair):
    protocol = ForestProtocol()
    x, y = pair
    shifted = [(a.astype(float) + 1.7e9).tolist() for a in (x, y + 1.0)]
    expected = c2st(x, y + 1.0, protocol).accuracy
    with unchecked():  # lists are read too
        assert c2st(*shifted, protocol).accuracy == pytest.approx(expected, abs=0.03)
