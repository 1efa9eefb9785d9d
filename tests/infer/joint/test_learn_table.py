"""Tables: columns and supports, learning with missing values, imputation, scores."""

import sys
import warnings
from dataclasses import replace
from datetime import date
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from numpyro.distributions import constraints
from scipy.stats import lognorm, multivariate_normal, norm

from numpyro_score import MLP, ScoreMatching, ScoreModel
from numpyro_score.data.columns import (
    Column,
    pandas_column,
    read_columns,
    read_values,
    unconstrain_rows,
)
from numpyro_score.data.normal_em import draw_missing, fit_normal
from numpyro_score.infer import learn_table
from numpyro_score.infer.joint import conditionals
from numpyro_score.infer.joint.learn_table import (
    _order,
    _warn_of_columns_apart,
    _warn_of_few_rows,
    _warn_of_heavy_tails,
    _warn_of_remote,
)
from tests.targets import unchecked

INF = np.inf
COLUMNS = [  # column, values inside
    (Column("real"), [-3.0, 0.0, 7.5]),
    (Column("positive", 0.0), [1e-3, 1.0, 50.0]),
    (Column("above", 2.0), [2.5, 9.0]),
    (Column("below", high=3.0), [-40.0, 2.9]),
    (Column("share", 0.0, 1.0), [0.01, 0.5, 0.9]),
    (Column("whole", is_integer=True), [-2.0, 0.0, 5.0]),
    (Column("count", 0.0, is_integer=True), [0.0, 1.0, 30.0]),
    (Column("level", 1.0, 3.0, is_integer=True), [1.0, 2.0, 3.0]),
]


@pytest.mark.parametrize(("column", "values"), COLUMNS, ids=lambda c: str(c)[:20])
def test_columns_there_and_back(column, values):
    x = np.array([*values, np.nan])
    column.check(x)
    z = column.unconstrain(x)
    np.testing.assert_allclose(column.constrain(z)[:-1], values, rtol=1e-10)
    assert np.isnan(z[-1])
    step = 1e-6
    slope = (column.unconstrain(x + step) - column.unconstrain(x - step)) / (2 * step)
    np.testing.assert_allclose(
        column.log_derivative(x[:-1]), np.log(slope[:-1]), atol=1e-4
    )


def test_cells_of_integers_round_back():
    column = Column("count", 0.0, is_integer=True)
    x = np.repeat(np.arange(4.0), 5)
    noise = np.tile([-0.499, -0.2, 0.0, 0.3, 0.499], 4)
    np.testing.assert_array_equal(column.constrain(column.unconstrain(x, noise)), x)
    assert (column.constrain(np.array([-30.0, -800.0])) == 0.0).all()


def test_supports_by_type_and_by_constraint():
    frame = pd.DataFrame(
        {"a": [0.5], "n": [3], "b": [True], "p": [0.2], "k": pd.array([1], "Int64")}
    )
    supports = {
        "p": constraints.unit_interval,
        "k": constraints.integer_interval(1, 4),
        "a": constraints.less_than(1.0),
    }
    assert read_columns(frame, supports) == (
        Column("a", -INF, 1.0),
        Column("n", -INF, INF, True, True),
        Column("b", 0.0, 1.0, True, True),
        Column("p", 0.0, 1.0),
        Column("k", 1.0, 4.0, True, True),
    )
    for constraint in (constraints.positive, constraints.nonnegative):
        assert read_columns(frame[["a"]], {"a": constraint}) == (Column("a", 0.0),)


@pytest.mark.parametrize(
    ("frame", "supports", "error", "message"),
    [
        ({"a": ["x", "y"]}, {}, TypeError, "Column 'a' must hold numbers"),
        (
            {"a": pd.Categorical(["x", "y"])},
            {},
            TypeError,
            "an unordered category has no density",
        ),
        (
            {"a": pd.date_range("2020", periods=2)},
            {},
            TypeError,
            "'a' must hold numbers: replace a date by a number of days, or leave it",
        ),
        ({"a": [1j]}, {}, TypeError, "replace a complex number by two columns"),
        ({"a": [1.0]}, {"b": constraints.real}, ValueError, "`supports` name some"),
        ({"a": [1.0]}, {"a": constraints.simplex}, TypeError, "on single numbers"),
        ({"a": [1.0]}, {"a": constraints.real_vector}, TypeError, "single numbers"),
        ({"a": [1.0]}, {"a": "positive"}, TypeError, "on single numbers.*Got str"),
        ({"a": [1.0], 1: [1.0], "1": [2.0]}, {}, ValueError, "different names"),
        ({"a": [1.0]}, {"a": constraints.circular}, TypeError, "the ends of an angle"),
        ({"a": ["1.5", None]}, {}, TypeError, "text by pandas.to_numeric.*as '1.5'"),
        ({"a": [date(2020, 1, 1)]}, {}, TypeError, "replace a date by a number of day"),
        ({"a": [1.0, [2.0]]}, {}, TypeError, r"no density.*such as \[2.0\]"),
        (
            {"a": [1.0]},
            {"a": constraints.interval(np.zeros(2), 1.0)},
            TypeError,
            "on single numbers",
        ),
    ],
)
def test_wrong_columns_are_refused(frame, supports, error, message):
    frame = pd.DataFrame(frame)
    with pytest.raises(error, match=message):
        read_columns(frame, supports)


def test_other_tables_are_refused():
    with pytest.raises(TypeError, match="`frame` must be a DataFrame"):
        read_columns(np.zeros((3, 2)), {})
    twice = pd.DataFrame(np.zeros((2, 2)), columns=["a", "a"])
    with pytest.raises(ValueError, match="columns of different names"):
        read_columns(twice, {})
    with (
        unchecked(),
        pytest.raises(TypeError, match=r"`supports` must be a dict.*Got \['a'\]"),
    ):
        read_columns(pd.DataFrame({"a": [1.0]}), ["a"])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (Column("p", 0.0), [0.0, 1.0], "strictly between 0.0 and inf.*such as \\[0.0"),
        (Column("s", 0.0, 1.0), [0.5, 1.0], "Got 1 others, such as \\[1.0"),
        (Column("n", 0.0, is_integer=True), [0.5], "must hold integers"),
        (Column("n", 0.0, is_integer=True), [-1.0], "must hold integers"),
        (Column("r"), [np.inf], "Got 1 others"),
    ],
)
def test_values_outside_of_supports_are_named(column, values, message):
    with pytest.raises(ValueError, match=f"Column '{column.name}' {message}|{message}"):
        column.check(np.array(values))


def test_columns_in_any_order_with_missing_values():
    columns = (Column("a"), Column("b", 0.0, is_integer=True))
    frame = pd.DataFrame({"b": pd.array([1, None], "Int64"), "a": [0.5, np.nan]})
    np.testing.assert_array_equal(
        read_values(frame, columns), [[0.5, 1.0], [np.nan, np.nan]]
    )
    with pytest.raises(ValueError, match="the columns that were learned"):
        read_values(frame[["a"]], columns)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["x", "y"], "an unordered category.*Got dtype"),
        (pd.Categorical(["x", "y"]), "an unordered category.*Got dtype category"),
        (pd.period_range("2020", periods=2), "replace a date.*Got dtype period"),
        (pd.date_range("2020", periods=2), "replace a date by a number of days"),
        (pd.to_timedelta([1, 2]), "replace a time by a number of seconds"),
        ([1j, 2j], "replace a complex number by two columns"),
    ],
)
def test_frames_with_columns_of_another_type_are_refused(values, message):
    with pytest.raises(TypeError, match=f"Column 'a' must hold numbers.*{message}"):
        read_values(pd.DataFrame({"a": values}), (Column("a"),))


@pytest.mark.parametrize(
    ("values", "kind", "high"),
    [
        ([Decimal("1.5"), None, Decimal("2.5"), 3], False, np.inf),
        ([Decimal("1"), Decimal("NaN"), Decimal("1"), Decimal("2")], True, 2.0),
        ([Fraction(1, 2), np.float32(0.75), 1, None], False, np.inf),
        ([1, 2, None, 10**20], True, np.inf),
        ([True, None, np.False_], True, 1.0),
    ],
)
def test_columns_of_objects_are_numbers_or_flags(values, kind, high):
    """They were called unordered categories."""
    frame = pd.DataFrame({"a": pd.Series(values, dtype=object)})
    (column,) = read_columns(frame, {})
    assert column.is_integer == kind
    assert column.high == high or len(values) < 5  # ends need counts
    expected = frame["a"].to_numpy(float, na_value=np.nan)
    np.testing.assert_array_equal(read_values(frame, (column,))[:, 0], expected)


@pytest.mark.parametrize("unit", [1e-250, 1e250])
def test_columns_of_any_magnitude_have_an_sd(unit, monkeypatch):
    """Their squares are 0 or infinite in double precision."""
    seen = []

    def train(key, rng, u, *others):
        seen.append(u)
        raise StopIteration

    monkeypatch.setattr(sys.modules[learn_table.__module__], "_train", train)
    rows = np.random.default_rng(0).normal(3.0, 2.0, (100, 2)) * unit
    with pytest.raises(StopIteration):
        learn_table(jax.random.key(0), pd.DataFrame(rows, columns=["a", "b"]))
    np.testing.assert_allclose(seen[0].mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(seen[0].std(0), 1.0, rtol=1e-12)


def test_objects_that_are_numbers_are_read():
    frame = pd.DataFrame({"a": np.array([1.5, None], object)})
    np.testing.assert_array_equal(read_values(frame, (Column("a"),)), [[1.5], [np.nan]])


def test_normal_law_from_incomplete_rows():
    """Missing where the other column is high: complete rows would be biased."""
    rng = np.random.default_rng(0)
    rows = rng.multivariate_normal([0.0, 1.0], [[1.0, 0.8], [0.8, 1.0]], 20_000)
    rows[rows[:, 0] > 0, 1] = np.nan
    mean, covariance = fit_normal(rows)
    np.testing.assert_allclose(mean, [0.0, 1.0], atol=0.05)
    np.testing.assert_allclose(covariance, [[1.0, 0.8], [0.8, 1.0]], atol=0.05)
    filled = draw_missing(rng, rows)
    assert not np.isnan(filled).any()
    np.testing.assert_allclose(np.cov(filled.T), [[1, 0.8], [0.8, 1]], atol=0.05)
    np.testing.assert_array_equal(filled[~np.isnan(rows)], rows[~np.isnan(rows)])


# learning: one table for all, a normal law in unconstrained space

LOC, COV = (
    np.array([1.0, 0.5, 12.0]),
    np.array([[1.0, 0.6, 2.0], [0.6, 0.49, 0.9], [2.0, 0.9, 9.0]]),
)
SUPPORTS = {"b": constraints.positive}


def draw_rows(rng, size):
    z = rng.multivariate_normal(LOC, COV, size)
    return pd.DataFrame(
        {"a": z[:, 0], "b": np.exp(z[:, 1]), "n": np.round(z[:, 2]).astype(int)}
    )


@pytest.fixture(scope="module")
def table():
    frame = draw_rows(np.random.default_rng(1), 1500)
    frame["n"] = frame["n"].astype("Int64")
    frame.loc[:150, "b"] = np.nan
    frame.loc[100:300, "n"] = pd.NA
    return learn_table(
        jax.random.key(0), frame, supports=SUPPORTS, num_steps=60, progress_bar=False
    )


def conditional(values):
    seen = ~np.isnan(values)
    cross = COV[:, seen]
    gain = cross @ np.linalg.inv(COV[np.ix_(seen, seen)])
    return LOC + gain @ (values[seen] - LOC[seen]), COV - gain @ cross.T


def test_scores_of_tables_with_gaps_keep_rows(table):
    assert table.score.rows.shape == (150, 3)  # of which its trusted level is measured


@pytest.mark.slow
def test_imputed_values_follow_the_conditional_law(table):
    frame = pd.DataFrame(
        {"n": [14, 14, 9], "b": [np.nan, 2.0, np.nan], "a": [2.0, np.nan, np.nan]}
    )
    draws = table.impute_array(jax.random.key(1), frame, 1500)
    for i, values in enumerate(
        ([2.0, np.nan, 14.0], [np.nan, np.log(2.0), 14.0], [np.nan, np.nan, 9.0])
    ):
        mean, cov = conditional(np.array(values))
        z = draws[:, i].copy()
        z[:, 1] = np.log(z[:, 1])
        hidden = np.isnan(values)
        width = np.sqrt(np.diag(cov))[hidden]
        # 1500 rows leave errors of the law of .03-.05 sd, 1500 draws .03
        assert (np.abs(z.mean(0) - mean)[hidden] < 0.2 * width).all()
        np.testing.assert_allclose(z.std(0)[hidden], width, rtol=0.15)


def test_copies_keep_what_is_known(table):
    frame = pd.DataFrame(
        {"b": [1.5, np.nan], "n": pd.array([None, 11], "Int64"), "a": [np.nan, 1.0]},
        index=["x", "y"],
    )
    copies = table.impute(jax.random.key(0), frame, 3)
    assert len(copies) == 3
    for copy in copies:
        assert list(copy.columns) == ["b", "n", "a"]
        assert list(copy.index) == ["x", "y"]
        assert not copy.isna().any().any()
        assert copy.loc["x", "b"] == 1.5
        assert copy.loc["y", "n"] == 11
        assert (copy["b"] > 0).all()
        assert float(copy.loc["x", "n"]).is_integer()
    assert copies[0].loc["x", "a"] != copies[1].loc["x", "a"]
    assert frame.isna().sum().sum() == 3  # the given one stays as it is


def test_blocks_of_rows_have_their_own_noise(table, monkeypatch):
    monkeypatch.setattr(conditionals, "MAX_POINTS", 6)  # two rows of three draws
    rows = np.tile([np.nan, 0.3, 0.1], (4, 1))
    draws = conditionals.draw_rows(jax.random.key(3), table.score, rows, 3)
    assert draws.shape == (3, 4, 3)
    assert len(np.unique(draws[..., 0])) == 12


def test_held_out_rows_are_not_trained_on(table, monkeypatch):
    seen = []

    def fit(trainer, key, data, options):
        seen.append((np.asarray(data.x), np.asarray(options.validation.x)))
        return SimpleNamespace(score=table.score)

    monkeypatch.setattr(ScoreMatching, "fit", fit)
    frame = pd.DataFrame({"a": np.arange(40.0), "b": np.arange(40.0) ** 2})
    learn_table(jax.random.key(0), frame, progress_bar=False)
    ((data, held_out),) = seen
    assert len(data) == 36
    assert len(held_out) == 4
    whole = np.concatenate([data, held_out])
    exact = (np.arange(40.0) - 19.5) / np.std(np.arange(40.0))
    np.testing.assert_allclose(np.sort(whole[:, 0]), exact, atol=1e-5)


def test_equal_rows_are_held_out_together():
    x = np.tile(np.arange(50.0)[:, None] + 0.5, (4, 2))
    real, codes = (Column("x", is_integer=whole) for whole in (False, True))
    rng = np.random.default_rng(0)
    order, count = _order(rng, x, (real, real))
    assert sorted(order) == list(range(200))
    assert count == 40
    assert not set(x[order[:count], 0]) & set(x[order[count:], 0])
    order, count = _order(rng, x, (real, codes))
    assert set(x[order[:count], 0]) & set(x[order[count:], 0])


def test_floats_that_are_codes_are_integers():
    """As pandas writes integers with missing values; ties decide, not the type.

    An end that many rows have is one of the support.
    """
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "count": rng.poisson(2, 200).astype(float),
            "sum": rng.binomial(100, 0.5, 200),
            "code": rng.integers(1, 4, 200),
            "flag": rng.integers(0, 2, 200),
            "rare": (np.arange(200) % 67 == 0).astype(int),
            "whole": rng.integers(0, 10**6, 200).astype(float),
            "real": np.round(rng.normal(size=200), 1),
        }
    )
    frame.loc[3, "count"] = np.nan
    assert read_columns(frame, {}) == (
        Column("count", 0.0, INF, True, True),
        Column("sum", -INF, INF, True),
        Column("code", 1.0, 3.0, True, True),
        Column("flag", 0.0, 1.0, True, True),
        Column("rare", 0.0, 1.0, True, True),
        Column("whole"),
        Column("real"),
    )


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_columns_with_one_value_in_many_rows_are_refused(value):
    rng = np.random.default_rng(0)
    x = np.where(rng.random(200) < 0.3, value, rng.lognormal(size=200))
    frame = pd.DataFrame({"a": rng.normal(size=200), "spend": x})
    with pytest.raises(ValueError, match=f"one value in many rows.*spend': {value}"):
        learn_table(jax.random.key(0), frame)


def test_integers_keep_their_type(table):
    frame = draw_rows(np.random.default_rng(3), 6)
    for dtype in ("Int64", "int64"):
        given = frame.astype({"n": dtype})
        given.loc[0, "b"] = np.nan
        if dtype == "Int64":
            given.loc[1, "n"] = pd.NA
        (copy,) = table.impute(jax.random.key(0), given)
        assert copy["n"].dtype == dtype
        assert not copy.isna().any().any()


@pytest.mark.parametrize(
    ("dtype", "ends"),
    [("UInt8", (0, 255)), ("Int8", (-128, 127)), ("uint16", (0, 65535))],
)
def test_integers_that_their_type_cannot_hold_become_floats(dtype, ends):
    dtype = pd.Series([1], dtype=dtype).dtype
    assert pandas_column(np.array(ends, float), dtype).dtype == dtype
    for beyond in (ends[0] - 1.0, ends[1] + 1.0):
        values = np.array([1.0, beyond])
        np.testing.assert_array_equal(pandas_column(values, dtype), values)


@pytest.mark.parametrize("dtype", ["uint8", "UInt16"])
def test_unsigned_integers_are_not_negative(dtype):
    frame = pd.DataFrame({"n": np.arange(5, 105)}).astype(dtype)
    assert [(c.low, c.high) for c in read_columns(frame, {})] == [(0.0, np.inf)]


def test_values_beyond_all_rows_warn(table):
    frame = draw_rows(np.random.default_rng(3), 4).astype({"n": float})
    frame.loc[:, "n"] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.impute(jax.random.key(0), frame)
    frame.loc[1, "a"] = 1e3
    with pytest.warns(UserWarning, match=r"1 of 4 rows.*'a', such as \[1000.0\]"):
        table.impute(jax.random.key(0), frame)
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        table.log_prob(frame.fillna(12.0))


def test_columns_that_repeat_another_warn_by_name():
    frame = draw_rows(np.random.default_rng(0), 200)[["a", "b"]]
    frame["twice"] = 2 * frame["a"] + 1
    frame.loc[:150, "b"] = np.nan  # many missing values are no discrete column
    with pytest.warns(UserWarning, match="columns that are equal") as record:
        learn_table(
            jax.random.key(0), frame, num_steps=2, check=False, progress_bar=False
        )
    assert [str(r.message).count("[('a', 'twice')]") for r in record] == [1]


def test_values_that_contradict_each_other_warn():
    """a = 2 and b = -2, each usual, where a and b are nearly equal."""
    rows = np.random.default_rng(0).normal(size=(1000, 2))
    rows[:, 1] = rows[:, 0] + 0.1 * rows[:, 1]
    score = ScoreModel.from_coordinate_denoiser(lambda x, levels: x, (3,))
    data = np.column_stack([rows, np.zeros(1000)])
    score = replace(score, rows=jnp.asarray(data, float))
    new = np.random.default_rng(1).normal(size=(500, 3))
    new[:, 1] = new[:, 0] + 0.1 * new[:, 1]
    new[:, 2] = np.nan
    new[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_remote(score, new)
        _warn_of_remote(score, np.full((2, 3), np.nan))
    new[7] = 2.0, -2.0, np.nan
    with pytest.warns(UserWarning, match=r"1 of 499 rows hold .* first is row 7, with"):
        _warn_of_remote(score, new)


def test_verdict_sees_a_law_that_is_too_wide(table, monkeypatch):
    """The exact score of b given a, and one of b as if it did not depend on a."""
    frame = draw_rows(np.random.default_rng(4), 1000)[["a", "b"]]
    frame["b"] = frame["a"] + 0.1 * np.random.default_rng(5).normal(size=1000)
    sd = frame.std(ddof=0).to_numpy()
    cov = frame.cov(ddof=0).to_numpy() / np.outer(sd, sd)

    def learned(cov):
        def denoise(x, levels):
            return cov @ jnp.linalg.solve(cov + jnp.diag(levels**2), x)

        score = ScoreModel.from_coordinate_denoiser(denoise, (2,))
        monkeypatch.setattr(
            ScoreMatching, "fit", lambda *_, **__: SimpleNamespace(score=score)
        )
        return learn_table(jax.random.key(0), frame, progress_bar=False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = learned(jnp.asarray(cov, float))
    assert right.verdict.ok
    assert "no finding" in repr(right)
    with pytest.warns(UserWarning, match="table fails on held-out rows"):
        wrong = learned(jnp.eye(2))
    assert "information" in {finding.name for finding in wrong.verdict.findings}
    loose = cov + np.array([[0.0, 0.0], [0.0, 0.3**2]])
    with pytest.warns(UserWarning, match="b: too wide by about"):
        learned(jnp.asarray(loose, float))


@pytest.mark.parametrize("width", [0.1, 0.4])
def test_verdict_of_a_table_with_gaps_in_all_rows(width, monkeypatch):
    """Three columns, of which each row lacks one; the score takes sd .1 for b."""
    rng = np.random.default_rng(6)
    frame = pd.DataFrame({"a": rng.normal(size=1200), "c": rng.normal(size=1200)})
    frame["b"] = frame["a"] + 0.1 * rng.normal(size=1200)
    cov = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0 + width**2]])
    frame = frame.mask(np.eye(3, dtype=bool)[np.arange(1200) % 3])
    sd = frame.std(ddof=0).to_numpy()
    law = jnp.asarray(cov / np.outer(sd, sd), float)

    def denoise(x, levels):
        return law @ jnp.linalg.solve(law + jnp.diag(levels**2), x)

    score = ScoreModel.from_coordinate_denoiser(denoise, (3,))
    monkeypatch.setattr(
        ScoreMatching, "fit", lambda *_, **__: SimpleNamespace(score=score)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = learn_table(jax.random.key(0), frame, progress_bar=False)
    names = [fit.name for fit in table.verdict.coordinates]
    assert [name for name in names if len(name) == 1] == ["a", "c", "b"]
    assert len(names) == 6  # and distances to the nearest draw
    assert 50 < table.verdict.num_simulations < 120
    assert table.verdict.ok == (width == 0.1)
    assert bool(caught) == (width != 0.1)
    if caught:
        assert "b: too wide" in str(caught[0].message)


def test_rows_without_values_and_without_gaps(table):
    empty = pd.DataFrame(
        {"a": [np.nan] * 400, "b": [np.nan] * 400, "n": [np.nan] * 400}
    )
    draws = table.impute_array(jax.random.key(2), empty, 2)
    z = np.log(draws[..., 1]).ravel()
    assert abs(z.mean() - LOC[1]) < 0.15
    assert abs(z.std() - 0.7) < 0.1
    whole = draw_rows(np.random.default_rng(5), 4)
    np.testing.assert_array_equal(
        table.impute_array(jax.random.key(0), whole)[0], whole.to_numpy(float)
    )


@pytest.mark.slow
def test_log_density_of_rows_is_that_of_the_law(table):
    frame = draw_rows(np.random.default_rng(6), 40)
    z = frame.to_numpy(float)
    z[:, 1] = np.log(z[:, 1])
    exact = multivariate_normal(LOC, COV).logpdf(z) - z[:, 1]
    got = table.log_prob(frame)
    assert abs(float(np.mean(got - exact))) < 0.15
    assert np.std(got - exact) < 0.35
    odd = frame.iloc[:1].assign(a=8.0)
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        assert table.log_prob(odd)[0] < got.min()
    with pytest.raises(ValueError, match="no missing values"):
        table.log_prob(frame.mask(frame > 3))


def test_draws_of_whole_rows(table):
    rows = table.sample(jax.random.key(0), 800)
    assert set(rows) == {"a", "b", "n"}
    assert (rows["n"] == np.round(rows["n"])).all()
    assert abs(np.corrcoef(rows["a"], np.log(rows["b"]))[0, 1] - 0.6 / 0.7) < 0.06


def test_summary_has_every_column_and_the_verdict(table, capsys):
    table.print_summary(jax.random.key(0), 100)
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in "abn")
    assert "100 independent rows" in printed
    assert str(table.verdict) in printed


def test_unit_jacobian_of_one_column():
    """Exact value: one lognormal column, whose normal baseline needs no training."""
    rng = np.random.default_rng(0)
    z = norm.ppf((np.arange(800) + 0.5) / 800) * 0.5 + 3.0
    frame = pd.DataFrame({"x": rng.permutation(np.exp(z))})
    table = learn_table(
        jax.random.key(0),
        frame,
        supports={"x": constraints.positive},
        num_steps=1,
        progress_bar=False,
    )
    x = np.array([15.0, 20.0, 40.0])
    exact = lognorm(0.5, scale=np.exp(3.0)).logpdf(x)
    np.testing.assert_allclose(table.log_prob(pd.DataFrame({"x": x})), exact, atol=0.03)


def test_bad_tables_and_counts_are_refused(table):
    key = jax.random.key(0)
    small = draw_rows(np.random.default_rng(0), 19)
    with pytest.raises(ValueError, match="at least 20 rows"):
        learn_table(key, small)
    flat = draw_rows(np.random.default_rng(0), 50).assign(c=1.0, e=np.nan)
    with pytest.raises(ValueError, match=r"in every column.*Got \['c', 'e'\]"):
        learn_table(key, flat)
    with pytest.raises(ValueError, match="`trainer` must have loss"):
        learn_table(
            key, draw_rows(np.random.default_rng(0), 50), trainer=ScoreMatching(MLP(3))
        )
    with pytest.raises(
        ValueError, match="`num_samples` must be an integer of at least 1"
    ):
        table.impute(key, small, 0)
    with unchecked(), pytest.raises(TypeError, match="`rng_key` must be one random"):
        learn_table(0, small)
    with unchecked(), pytest.raises(TypeError, match="`check` must be True or False"):
        learn_table(key, small, check="no")
    with unchecked(), pytest.raises(TypeError, match="`trainer` must be a ScoreMatch"):
        learn_table(key, draw_rows(np.random.default_rng(0), 50), trainer=MLP(3))
    with pytest.raises(
        ValueError, match="`num_samples` must be an integer of at least 4"
    ):
        table.print_summary(key, num_samples=1)


@pytest.mark.slow
def test_codes_that_are_rounded_reals_are_learned_or_found():
    rng = np.random.default_rng(0)

    def rows(size):
        x = rng.normal(size=size)
        level = np.clip(np.round(x), -2, 2).astype(np.int8)
        return pd.DataFrame({"x": x, "y": x + rng.normal(size=size), "level": level})

    frame, options = rows(2000), {"progress_bar": False}
    with pytest.warns(UserWarning, match="share of equal draws of level: as if too wi"):
        learn_table(jax.random.key(0), frame, num_steps=2000, **options)
    table = learn_table(jax.random.key(0), frame, **options)
    assert table.verdict.ok
    fresh = rows(1000)
    (copy,) = table.impute(jax.random.key(1), fresh.assign(level=np.nan))
    assert (copy["level"] == fresh["level"]).mean() > 0.9


@pytest.mark.slow
def test_curves_are_imputed_where_missing_values_depend_on_the_other_column():
    """y = x^2 + .3 e, missing for half of x > 0 and a tenth of x < 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    y = x**2 + 0.3 * rng.normal(size=2000)
    y[rng.random(2000) < np.where(x > 0, 0.5, 0.1)] = np.nan
    table = learn_table(
        jax.random.key(0),
        pd.DataFrame({"x": x, "y": y}),
        check=False,
        progress_bar=False,
    )
    at = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    frame = pd.DataFrame({"x": at, "y": np.nan})
    draws = table.impute_array(jax.random.key(1), frame, 1000)[:, :, 1]
    # by a normal law, as filled at first before, y would be off by up to 1 for all x
    np.testing.assert_allclose(draws.mean(0), at**2, atol=0.12)
    np.testing.assert_allclose(draws.std(0), 0.3, rtol=0.6)


def test_columns_that_no_row_has_both_of_are_named():
    """Draws of one given the other were those of an unknown correlation, silently."""
    frame = draw_rows(np.random.default_rng(0), 100)
    first, second = (str(name) for name in frame.columns[:2])
    is_even = np.arange(100) % 2 == 0
    apart = frame.astype(float)
    apart[first] = apart[first].where(is_even)
    columns = read_columns(apart, {})
    _warn_of_columns_apart(read_values(apart, columns), columns)
    apart[second] = apart[second].mask(is_even)
    with pytest.warns(UserWarning, match=rf"both of two.*'{first}', '{second}', 0\)"):
        _warn_of_columns_apart(read_values(apart, columns), columns)


def test_tables_with_fewer_rows_than_columns_warn():
    """Intervals of 90 % of draws given 39 other columns had 83 %, from 30 rows."""
    with pytest.warns(UserWarning, match="fewer rows than columns.*30 rows, 40 col"):
        _warn_of_few_rows(np.zeros((30, 40)))
    _warn_of_few_rows(np.zeros((40, 40)))


@pytest.mark.parametrize("tail", ["cauchy", "log-normal"])
def test_columns_with_heavy_tails_are_named(tail):
    """Their sd measures a few extreme rows."""
    rng = np.random.default_rng(0)
    draw = {
        "cauchy": rng.standard_cauchy,
        "log-normal": lambda size: np.exp(3 * rng.normal(size=size)),
    }
    frame = pd.DataFrame({"a": rng.normal(size=300), "b": draw[tail](300)})
    frame.loc[:9, "b"] = np.nan
    columns = read_columns(frame, {})
    z = unconstrain_rows(rng, columns, read_values(frame, columns))
    with pytest.warns(UserWarning, match=r"heavy tails.*logarithm.*\['b'\]"):
        _warn_of_heavy_tails(z, columns)


def test_usual_columns_have_no_heavy_tails():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "student": rng.standard_t(3, size=1000),
            "skewed": rng.exponential(size=1000),
            "counts": rng.poisson(0.3, size=1000),
            "rare": rng.uniform(size=1000) < 0.02,
        }
    )
    columns = read_columns(frame, {})
    z = unconstrain_rows(rng, columns, read_values(frame, columns))
    _warn_of_heavy_tails(z, columns)
