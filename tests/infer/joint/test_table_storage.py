"""Learned tables in folders: what comes back, and what is refused."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest

from numpyro_score import MLP, ScoreModel
from numpyro_score.data.columns import Column
from numpyro_score.infer.amortized.fit_verdict import CoordinateFit, FitVerdict
from numpyro_score.infer.joint.conditionals import conditional_trainer
from numpyro_score.infer.joint.learn_table import LearnedTable
from numpyro_score.infer.joint.table_storage import (
    ARRAYS,
    TableParts,
    describe_table,
    read_table,
)
from numpyro_score.io import folder
from numpyro_score.io.models import SITES
from numpyro_score.sde import VE

KEY = jax.random.key(3)
COLUMNS = (
    Column("real"),
    Column("share", 0.0, 1.0),
    Column("below", high=3.0),
    Column("count", 0.0, is_integer=True),
)
FIT = CoordinateFit("share", 0.2, 1.1, 0.1, 0.0, 0.5, 0.5, 0.0)


@pytest.fixture(scope="module")
def untrained():
    size = len(COLUMNS)
    trainer = conditional_trainer(None, MLP(size, width=4, depth=1))
    rows = np.random.default_rng(0).normal(size=(20, size))
    score = trainer.get_score(trainer.init(KEY, rows))
    loc, scale = np.linspace(-1, 1, size), np.linspace(0.5, 2, size)
    verdict = FitVerdict((FIT,), 50)
    return LearnedTable(score, COLUMNS, loc, scale, -9 * scale, 8 * scale, verdict)


def test_saved_table_is_the_same(untrained, tmp_path):
    untrained.save(tmp_path / "table")
    loaded = LearnedTable.load(tmp_path / "table")
    assert repr(loaded) == repr(untrained)
    assert (loaded.columns, loaded.verdict) == (COLUMNS, untrained.verdict)
    nan = np.nan
    frame = pd.DataFrame(
        {
            "real": [nan, 0.3],
            "share": [0.2, nan],
            "below": [1.0, -2.0],
            "count": [nan, 1],
        }
    )
    tables = untrained, loaded
    first, second = (table.impute_array(KEY, frame, 3) for table in tables)
    np.testing.assert_array_equal(first, second)
    frame = frame.fillna(0.5).round({"count": 0})
    first, second = (table.log_prob(frame) for table in tables)
    np.testing.assert_array_equal(first, second)
    with pytest.raises(FileExistsError, match="`path` must not exist"):
        untrained.save(tmp_path / "table")


def test_columns_beside_another_score_are_refused(untrained, tmp_path):
    trainer = conditional_trainer(None, MLP(3, width=4, depth=1))
    rows = np.random.default_rng(0).normal(size=(20, 3))
    score = trainer.get_score(trainer.init(KEY, rows))
    replace(untrained, score=score).save(tmp_path / "table")
    with pytest.raises(ValueError, match="must hold a score of all sites beside it"):
        LearnedTable.load(tmp_path / "table")


def test_functions_are_not_saved(untrained, tmp_path):
    score = ScoreModel.from_fn(lambda x, t: -x, VE(), event_shape=(len(COLUMNS),))
    with pytest.raises(TypeError, match="`score` must come from ScoreMatching"):
        replace(untrained, score=score).save(tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_altered_tables_are_refused(untrained, tmp_path):
    untrained.save(tmp_path / "one")
    replace(untrained, verdict=None).save(tmp_path / "two")
    for file in (tmp_path / "two" / SITES).iterdir():
        shutil.copy(file, tmp_path / "one" / SITES)
    with pytest.raises(ValueError, match="were saved together"):
        LearnedTable.load(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="must be a folder made by"):
        LearnedTable.load(tmp_path / "three")


def verdict(num_simulations=50, coordinates=None, **entries):
    """Return the description of a verdict with other entries."""
    fit = FitVerdict((FIT,), 50).to_config()["coordinates"][0] | entries
    found = [fit] if coordinates is None else coordinates
    return {"coordinates": found, "num_simulations": num_simulations}


@pytest.mark.parametrize(
    ("name", "values"), [("scale", 0.0), ("scale", -1.0), ("low", 9.0)]
)
def test_arrays_that_are_no_scale_are_refused(untrained, tmp_path, name, values):
    table = replace(untrained, **{name: np.full(len(COLUMNS), values)})
    table.save(tmp_path / "table")
    with pytest.raises(ValueError, match=r"`columns` in .*header.json must be columns"):
        LearnedTable.load(tmp_path / "table")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("kind", "score", "`kind` in .* must be 'learned table'"),
        ("columns", [], "`columns` in .* must be a list of columns"),
        ("columns", "a", "`columns` in .* must be a list of columns"),
        ("columns[0].name", 3, r"`columns\[0\].name` in .* must be text"),
        ("columns[1].low", "0", r"`columns\[1\].low` in .* must be a number"),
        ("columns[1].low", 2.0, r"low end is below its high end"),
        ("columns[1].name", "real", "columns of different names"),
        ("columns[3].is_integer", 1, "must be true or false"),
        ("verdict", {}, "`verdict` in .* cannot be built"),
        ("verdict", verdict(num_simulations=float("inf")), "`num_simulations` must"),
        ("verdict", verdict(coordinates={}), "`coordinates` must be a list"),
        ("verdict", verdict(p_value=10**400), "`p_value` must be real numbers"),
        ("verdict", verdict(p_value=float("nan")), r"`p_value` must lie in \[0, 1\]"),
        ("verdict", verdict(name=[]), "`name` must be a site and index"),
    ],
)
def test_headers_that_describe_no_table_are_refused(
    untrained, tmp_path, entry, value, message
):
    parts = {name: getattr(untrained, name) for name in ARRAYS}
    arrays, header = describe_table(TableParts(COLUMNS, parts, None))
    name, _, field = entry.partition("[")
    if field:
        header[name][int(field[0])][field[3:]] = value
    else:
        header[name] = value
    folder.write(tmp_path / SITES, arrays, header)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / SITES)


def test_no_rows_are_no_draws(untrained):
    with pytest.raises(ValueError, match="`num_samples` must be an integer"):
        untrained.sample(KEY, 0)


def test_integers_with_a_real_support_are_imputed_as_real_numbers(untrained):
    columns = (Column("real"), Column("share", 0.0), *COLUMNS[2:])
    table = replace(untrained, columns=columns)
    frame = pd.DataFrame(
        {
            "real": [0.1],
            "share": pd.array([None], "Int64"),
            "below": [1.0],
            "count": [1],
        }
    )
    (copy,) = table.impute(KEY, frame)
    assert copy["share"].dtype == float
    assert copy["share"][0] == table.impute_array(KEY, frame)[0, 0, 1]
