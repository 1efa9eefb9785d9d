"""What users hand to training: exact values, or a message that names the column."""

import re
import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from numpyro_score import MLP, ScoreMatching
from numpyro_score.data.inputs import check_resolution, column_names, read_rows
from numpyro_score.data.rows import ArrayDataset, Batch
from numpyro_score.data.standardize import NORMAL_IQR, Affine, exact_moments

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(size=(200, 2))
TRAINER = ScoreMatching(MLP(2, width=4, depth=1))


@pytest.fixture(autouse=True, scope="module")
def without_type_checker():
    """Let our own checks see what users pass, who run without beartype."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def scale(data, **options):
    return TRAINER.init(KEY, data, **options).fixed.standardize


def dataset(*, dims=("chain", "draw")):
    a, b = ROWS.reshape(4, 50, 2)[..., 0], ROWS.reshape(4, 50, 2)[..., 1:]
    return xr.Dataset({"a": (dims, a), "b": ((*dims, "k"), b)})


FORMS = {
    "rows in a list": lambda path: ROWS.tolist(),
    "frame": lambda path: pd.DataFrame(ROWS, columns=["a", "b"]),
    "nullable frame": lambda path: pd.DataFrame(ROWS).astype("Float64"),
    "dataset": lambda path: dataset(),
    "dataset of other dimensions": lambda path: xr.Dataset(
        {"a": ("row", ROWS[:, 0]), "b": ("row", ROWS[:, 1])}
    ),
    "tree": lambda path: xr.DataTree.from_dict({"/posterior": dataset()}),
    "array of xarray": lambda path: xr.DataArray(ROWS),
    "memory map": lambda path: memory_map(path),
    "bare masked array": lambda path: np.ma.masked_array(ROWS),
}


def memory_map(path):
    np.save(path / "rows.npy", ROWS)
    return np.load(path / "rows.npy", mmap_mode="r")


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_rows_are_equal(form, tmp_path):
    data = FORMS[form](tmp_path)
    np.testing.assert_array_equal(read_rows("data", data), ROWS)
    np.testing.assert_allclose(scale(data).scale, ROWS.std(0), rtol=1e-6)


def test_tables_train_as_their_rows_do():
    runs = [
        TRAINER.run(KEY, 2, data, batch_size=8, progress_bar=False).losses
        for data in (ROWS, pd.DataFrame(ROWS), dataset())
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_columns_have_names():
    assert column_names(pd.DataFrame({"x": [1.0], "y": [2.0]}), ROWS) == ["x", "y"]
    assert column_names(dataset(), ROWS) == ["a", "b"]
    wide = xr.Dataset({"w": (("row", "k"), ROWS)})
    assert column_names(wide, ROWS) == ["w[0]", "w[1]"]
    assert column_names(ROWS.reshape(100, 2, 2), ROWS.reshape(100, 2, 2))[1] == "0,1"


OFFSET = np.array([1.7e9, 0.0]) + 30 * ROWS
REFUSED = {
    "offset": (OFFSET, r"`data` must be resolved by float32.*Columns \['0'\].* sd 2"),
    "offset in float32": (
        OFFSET.astype(np.float32),
        r"`data` must be resolved by float32.*Columns \['0'\]",
    ),
    "offset in integers": (
        np.round(OFFSET).astype(np.int64),
        r"`data` must be resolved by float32.*Columns \['0'\]",
    ),
    "offset in a frame": (
        pd.DataFrame(OFFSET, columns=["time", "x"]),
        r"Columns \['time'\]: column 'time' is near 1[67]",
    ),
    "missing values": (
        pd.DataFrame({"a": [1.0, None, 3.0], "b": [1.0, 2.0, 4.0]}),
        r"`data` must be finite.*Got 1 bad rows of 3, the first at \[1\]",
    ),
    "missing values of a nullable column": (
        pd.DataFrame({"a": [1, None, 3], "b": [2, 3, 5]}).astype("Int64"),
        "Got 1 bad rows of 3",
    ),
    "column of text": (
        pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}),
        r"`data` must have columns of real numbers.*Got columns .*'b'",
    ),
    "column of dates": (
        pd.DataFrame({"a": [1.0, 2.0], "b": pd.to_datetime([0, 1])}),
        r"`data` must have columns of real numbers.*'b': 'datetime",
    ),
    "tree without posterior": (
        xr.DataTree.from_dict({"/prior": dataset()}),
        r"a group `posterior`.*Got groups \['prior'\]",
    ),
    "variables of other dimensions": (
        xr.Dataset({"a": ("row", ROWS[:, 0]), "b": ("other", ROWS[:9, 1])}),
        r"share the dimensions of their draws.*'b': \('other',\)",
    ),
    "masked values": (
        np.ma.masked_array(ROWS, mask=ROWS > 1),
        r"`data` must not have masked values.*masked values of 400",
    ),
    "constant column": (
        np.stack([ROWS[:, 0], np.full(200, 0.1)], 1),
        r"vary in every column.*Constant columns: \[1\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(case):
    data, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        TRAINER.run(KEY, 2, data, batch_size=2, progress_bar=False)


def test_contexts_and_batches_are_resolved_too():
    with pytest.raises(ValueError, match="`context` must be resolved"):
        TRAINER.run(KEY, 2, ROWS, context=OFFSET, batch_size=2, progress_bar=False)
    with pytest.raises(ValueError, match="`data` must be resolved"):
        TRAINER.run(KEY, 2, iter([OFFSET] * 3), progress_bar=False)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_moderate_offsets_are_exact(offset):
    """Float32 resolves these; its mean over the rows would be off."""
    many = offset + np.random.default_rng(1).normal(size=(100_000, 2))
    affine = Affine.per_dimension(jnp.asarray(many, jnp.float32))
    np.testing.assert_allclose(affine.loc, many.mean(0), atol=2e-3)
    np.testing.assert_allclose(affine.scale, many.std(0), rtol=1e-5)


def test_resolution_limit_is_a_hundredth_of_the_sd():
    names, unit = ["0"], np.array([[-1.0], [1.0]])
    eps = float(np.finfo(np.float32).eps)
    check_resolution("data", 0.99 * 0.01 / eps - 1 + unit, names)
    with pytest.raises(ValueError, match="resolved by float32"):
        check_resolution("data", 1.01 * 0.01 / eps + unit, names)


def test_pixels_share_one_scale():
    images = np.random.default_rng(0).normal(size=(20, 2, 2))
    images[:, 0, 0] = 1.0 + 1e-7 * np.arange(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_resolution("data", images, ["0"] * 4)


def test_cauchy_rows_are_scaled_by_quartiles():
    rows = np.random.default_rng(0).standard_cauchy((4000, 2)) + 5
    rows[:, 1] = ROWS[:1].ravel()[0] + np.random.default_rng(2).normal(size=4000)
    with pytest.warns(UserWarning, match=r"heavy tails.*Columns \[0\], extremes"):
        affine = Affine.per_dimension(jnp.asarray(rows))
    quartiles = np.quantile(rows[:, 0], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(affine.loc[0], quartiles[1], rtol=1e-5)
    width = (quartiles[2] - quartiles[0]) / NORMAL_IQR
    np.testing.assert_allclose(affine.scale[0], width, rtol=1e-5)
    np.testing.assert_allclose(affine.scale[1], rows[:, 1].std(), rtol=1e-5)
    # the law's own quartiles are 5 - 1, 5 and 5 + 1
    np.testing.assert_allclose(affine.scale[0], 2 / NORMAL_IQR, rtol=0.1)


def test_lighter_tails_keep_their_sd():
    rows = np.random.default_rng(0).standard_t(4, (4000, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        affine = Affine.per_dimension(jnp.asarray(rows))
    np.testing.assert_allclose(affine.scale, rows.std(0), rtol=1e-5)


def warned(data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TRAINER.init(KEY, data)
    return [str(warning.message) for warning in caught]


def test_discrete_columns_are_named():
    counts = np.random.default_rng(0).poisson(3.0, 200)
    frame = pd.DataFrame({"x": ROWS[:, 0], "count": counts})
    [message] = warned(frame)
    assert re.search(r"discrete columns.*dequantize.*\['count'\]", message)
    uniform = np.random.default_rng(1).uniform(-0.5, 0.5, 200)
    assert warned(frame.assign(count=counts + uniform)) == []


def test_equal_columns_are_named():
    frame = pd.DataFrame({"a": ROWS[:, 0], "b": ROWS[:, 1]})
    assert warned(frame) == []
    [message] = warned(frame.assign(b=frame.a))
    assert "Equal columns: [('a', 'b')]" in message


def test_moments_of_integers_do_not_overflow():
    rows = np.full((3, 1), 2**62) + np.array([[0], [2**40], [2**41]])
    mean, sd = exact_moments(rows)
    np.testing.assert_allclose(sd, 2**40 * np.sqrt(2 / 3), rtol=1e-9)
    np.testing.assert_allclose(mean, 2**62 + 2**40, rtol=1e-15)


def test_batches_have_every_row_alike_with_its_context():
    rows = Batch(jnp.arange(5.0), 10 * jnp.arange(5.0))
    batch = ArrayDataset(rows, 5000).batch(jnp.array(0), jax.random.key(0))
    counts = np.bincount(np.asarray(batch.x, int), minlength=5)
    assert np.abs(counts - 1000).max() < 5 * (5000 * 0.2 * 0.8) ** 0.5
    np.testing.assert_array_equal(batch.context, 10 * batch.x)
