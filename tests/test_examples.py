"""The examples run from start to end at a tiny size."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = (
    "--train-steps 20 --width 8 --level 0.5 --no-progress-bar --num-warmup 8 "
    "--num-samples 10 --num-chains 2 --num-digits 2"
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load("01_digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("digits") / "figures"


def tiny(digits: ModuleType, folder: Path) -> argparse.Namespace:
    return digits.parse([*TINY.split(), "--output", str(folder)])


@pytest.fixture(scope="module")
def rows(digits, folder) -> list[list[str]]:
    return digits.main(tiny(digits, folder))


def test_table_compares_the_priors_on_every_task(rows):
    assert [row[:2] for row in rows] == [
        [task, prior]
        for task in ("inpainting", "deblurring")
        for prior in ("learned", "Gaussian")
    ]
    for row in rows:
        numbers = np.array(" ".join(row[2:]).replace("±", " ").split(), float)
        assert len(numbers) == 6
        assert np.isfinite(numbers).all()


def test_figures_are_written(rows, folder):
    tasks = ("inpainting", "deblurring")
    expected = {f"{task}_{plot}.png" for task in tasks for plot in ("trace", "rank")}
    expected |= {"losses.png", "posteriors.png"}
    assert {path.name for path in folder.iterdir()} == expected
    assert min(path.stat().st_size for path in folder.iterdir()) > 1000


def test_held_out_digits_differ_from_each_other_and_from_the_training_set(digits):
    data = digits.split_digits(digits.parse([]))
    assert sorted(data.labels[:10]) == list(range(10))
    train = {image.tobytes() for image in data.train}
    assert not any(image.tobytes() in train for image in data.test)


def test_operators_lose_information(digits):
    for task in (digits.inpainting(), digits.blurring()):
        assert np.linalg.matrix_rank(task.operator) == len(task.operator) < 64
        assert task.shape[0] * task.shape[1] == len(task.operator)
    hidden = digits.inpainting().hidden
    np.testing.assert_array_equal(hidden, (digits.inpainting().operator == 0).all(0))


def test_baseline_is_calibrated_where_its_prior_is_true(digits):
    """Data from the baseline's own prior: its intervals hold what they promise."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(64, 64)) / 4
    train = rng.normal(size=(4000, 64)) @ factor.T
    level_sd, results = 0.5, []
    task = digits.blurring()
    for row in rng.normal(size=(100, 64)) @ factor.T:
        truth = row + level_sd * rng.normal(size=64)
        noise = digits.NOISE * rng.normal(size=len(task.operator))
        y = task.operator @ truth + noise
        fit = digits.Fit(truth, y, *[np.zeros(0)] * 3)
        results.append(digits.judge_gaussian(task, fit, train, level_sd))
    coverage = np.array([result.coverage for result in results])
    error = coverage.std(0) / np.sqrt(len(results))
    assert (np.abs(coverage.mean(0) - digits.INTERVALS) < 4 * error + 0.01).all()
    ratio = np.mean([r.error for r in results]) / np.mean([r.variance for r in results])
    assert abs(ratio - 1) < 0.15


def test_coverage_counts_the_truths_inside_the_intervals(digits):
    draws = np.random.default_rng(0).normal(size=(4, 500, 64))
    truth = np.where(np.arange(64) < 16, 5.0, np.where(np.arange(64) < 32, 1.0, 0.0))
    fit = digits.Fit(truth, np.zeros(0), draws, np.zeros(0), np.zeros(0))
    result = digits.judge_draws(fit, np.ones(64, bool))
    assert result.coverage == (0.5, 0.75)
    assert abs(result.error - (25 + 1) / 4) < 0.1
    assert abs(result.variance - 1) < 0.1
