"""Ends of columns of integers: codes have them, counts that thin out do not."""

import numpy as np
import pandas
import pytest

from numpyro_score.data.columns import (
    Column,
    atom_of,
    cell_points,
    dequantize,
    read_columns,
)

ROWS = 2000
CODES = {
    "rare top": (1.0, 4.0, (0.55, 0.3, 0.12, 0.03)),
    "rare bottom": (1.0, 4.0, (0.03, 0.12, 0.35, 0.5)),
    "rare top after a gap": (1.0, 5.0, (0.5, 0.4, 0.07, 0.0, 0.03)),
    "all alike": (1.0, 7.0, (1 / 7,) * 7),
    "rare flag": (1.0, 2.0, (0.999, 0.001)),
}


def ends(values: np.ndarray) -> tuple[float, float]:
    column = read_columns(pandas.DataFrame({"a": values}), {})[0]
    return column.low, column.high


@pytest.mark.parametrize("case", CODES)
def test_codes_end_at_their_lowest_and_highest(case):
    low, high, shares = CODES[case]
    counts = np.round(np.array(shares) * ROWS).astype(int)
    codes = np.repeat(np.arange(1, 1 + len(shares)), counts)
    if case == "rare flag":  # of zeros and ones
        codes, low, high = codes - 1, 0.0, 1.0
    assert ends(codes) == (low, high)


@pytest.mark.parametrize("law", ["poisson", "geometric", "binomial", "wide"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_do_not_end_at_their_highest(law, seed):
    rng = np.random.default_rng(seed)
    draws = {
        "poisson": rng.poisson(3.0, ROWS),
        "geometric": rng.geometric(0.3, ROWS),
        "binomial": rng.binomial(40, 0.3, ROWS),
        "wide": rng.poisson(1e4, ROWS),
    }[law]
    assert ends(draws)[1] == np.inf


def test_noise_is_narrow_where_cells_are_wide():
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {"code": rng.integers(0, 5, ROWS), "wide": rng.poisson(400.0, ROWS)}
    )
    code, wide = read_columns(frame, {})
    assert (code.is_coarse, wide.is_coarse) == (True, False)
    noise = dequantize(rng, (code, wide), 100_000)
    assert np.abs(noise).max() < 0.5
    # uniform: sd 12^(-1/2); the mean of four such numbers: half of it
    np.testing.assert_allclose(noise.std(0), [0.1443, 0.2887], rtol=0.01)


def test_points_fill_cells_evenly():
    columns = tuple(Column(name, is_integer=True, is_coarse=True) for name in "abc")
    points = cell_points(columns, 16)
    each = np.sort(points, axis=0)
    np.testing.assert_allclose(each, np.tile(np.arange(-7.5, 8)[:, None] / 16, 3))
    assert np.abs(np.corrcoef(points.T) - np.eye(3)).max() < 0.4
    assert (cell_points((Column("real"),), 4) == 0).all()


def test_a_value_of_many_rows_is_an_atom_unless_others_have_as_many():
    values = np.random.default_rng(0).normal(size=2000)
    assert atom_of(values) is None
    assert atom_of(np.round(4 * values) / 4) is None  # rounded: up to 10 % each
    with_atom = np.where(np.arange(2000) % 10 == 0, 0.5, values)
    assert atom_of(with_atom) == 0.5
    # two values of a fifth each, such as both ends of a range
    both = np.where(np.arange(2000) % 5 == 1, -0.5, with_atom)
    assert atom_of(np.where(np.arange(2000) % 5 == 0, 0.5, both)) in (-0.5, 0.5)
