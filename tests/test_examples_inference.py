"""The examples of inference backends run from start to end at a tiny size."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.slow


def load(name):
    spec = importlib.util.spec_from_file_location(name[3:], EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def run(name, tiny, folder):
    """Return what the example's `main` returns."""
    example = load(name)
    return example.main(example.parse([*tiny.split(), "--output", str(folder)]))


def test_epidemic_runs(tmp_path, capsys):
    tiny = "--num-simulations 500 --train-steps 200 --num-draws 100 --num-checks 20"
    posteriors = run("03_epidemic", tiny, tmp_path)
    assert (tmp_path / "epidemic.png").exists()
    printed = capsys.readouterr().out
    assert "R0" in printed
    assert printed.count("20 simulations that were not trained on:\nCalibration(") == 2
    # even so short a training knows the sign of growth; NUTS knows more
    beta = {title: float(np.mean(draws["beta"])) for title, draws in posteriors.items()}
    assert 1.5 < beta["equations, NUTS"] < 2.1
    for draws in posteriors.values():
        assert all((np.asarray(values) > 0).all() for values in draws.values())


@pytest.mark.filterwarnings("ignore:.*k-hat:UserWarning")
def test_schools_run(tmp_path, capsys):
    tiny = "--num-simulations 500 --train-steps 200 --num-draws 100 --num-checks 20"
    draws = run("04_schools", tiny, tmp_path)
    assert (tmp_path / "calibration.png").exists()
    assert "Pareto k-hat" in capsys.readouterr().out
    assert draws["NPSE"]["theta"].shape == (100, 8)


@pytest.mark.filterwarnings("ignore:ScoreDistribution uses noise level")  # few steps
def test_blind_deblurring_runs(tmp_path, capsys):
    tiny = (
        "--train-steps 50 --width 16 --num-images 1 --num-particles 20 --num-chains 1 "
        "--levels 10"
    )
    with pytest.warns(UserWarning, match="ScoreSDE.*Raise `num_particles`"):
        (fit,) = run("05_blind_deblurring", tiny, tmp_path)
    assert (tmp_path / "restored.png").exists()
    assert "log evidence" in capsys.readouterr().out
    assert fit.draws["image"].shape == (20, 8, 8)
    assert (fit.draws["width"] > 0).all()


@pytest.mark.filterwarnings("ignore:(AnnealedLangevin|ParallelTempering):UserWarning")
def test_two_modes_run(tmp_path, capsys):
    tiny = "--num-warmup 50 --num-samples 100 --num-chains 2 --num-particles 40"
    results, share = run("06_two_modes", tiny, tmp_path)
    assert (tmp_path / "two_modes.png").exists()
    assert "true share" in capsys.readouterr().out
    # the yardstick is a run of full length: one mode, and odds of two known priors
    assert 0.83 < share < 0.92
    # local moves stay where a chain began, at any length
    by_chain = results["NUTS"].faster.mean(1)
    assert ((by_chain < 0.05) | (by_chain > 0.95)).all()
    assert results["ParallelTempering"].faster.shape == (2, 100)


def test_missing_cells_are_filled(tmp_path, capsys):
    tiny = "--train-steps 20 --num-draws 100 --num-patterns 2"
    qualities = run("07_missing_cells", tiny, tmp_path)
    assert (tmp_path / "missing_cells.png").exists()
    assert "90% interval" in capsys.readouterr().out
    # a score that is hardly trained is about the normal law, whose intervals hold
    for quality in qualities.values():
        assert abs(quality.coverage[8] - 0.9) < 0.1
        assert 0.2 < quality.crps < 0.6


def test_quality_of_draws_from_the_truth_s_own_law():
    example = load("07_missing_cells")
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=(2000, 4)), rng.normal(size=(100, 2000, 4))
    frames = [pd.DataFrame(x) for x in (truth, np.where(truth > 9, truth, np.nan))]
    tables = example.Tables(pd.DataFrame(draws[0]), *frames, frames[0])
    quality = example.judge(draws, tables, 500)
    np.testing.assert_allclose(quality.coverage, example.SHARES, atol=0.03)
    assert abs(quality.crps - 1 / np.sqrt(np.pi)) < 0.02  # of a standard normal law
    assert (quality.error < 0.02).all()


@pytest.mark.filterwarnings("ignore:ScoreDistribution uses noise level")  # few steps
@pytest.mark.filterwarnings("ignore:ScoreSDE:UserWarning")  # few particles
def test_profiles_run(tmp_path, capsys):
    tiny = "--train-steps 200 --width 32 --num-curves 2 --num-particles 50 --levels 15"
    fits = run("08_profiles", tiny, tmp_path)
    assert (tmp_path / "profiles.png").exists()
    assert "posterior means" in capsys.readouterr().out
    for fit in fits:
        assert fit.draws["learned prior"].shape == (50, 48)
        assert np.isfinite(fit.draws["Gaussian process"]).all()
    # even so short a training finds most of the hills from a dozen readings
    truth = np.stack([fit.truth for fit in fits])
    means = np.stack([fit.draws["learned prior"].mean(0) for fit in fits])
    assert np.square(means - truth).mean() < 0.5 * np.square(truth).mean()


def test_both_orders_of_the_rates_give_the_same_light():
    example = load("06_two_modes")
    hours = example.HOURS
    got = example.light(1.8, 12.0, 0.06, 0.3)
    np.testing.assert_allclose(got, example.light(1.8, 12.0, 0.3, 0.06), rtol=1e-6)
    after = np.maximum(hours - 1.8, 0)
    expected = 12 * (np.exp(-0.06 * after) - np.exp(-0.3 * after)) / (0.3 - 0.06)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The learned prior:UserWarning")  # few steps
@pytest.mark.filterwarnings("ignore:The draws of this run:UserWarning")  # few draws
def test_batches_run(tmp_path, capsys):
    tiny = "--num-warmup 300 --num-samples 200 --train-steps 50"
    draws = run("09_batches", tiny, tmp_path)
    assert (tmp_path / "batches.png").exists()
    assert "Learned prior against both batches" in capsys.readouterr().out
    both, learned = draws["both batches, NUTS"], draws["second, learned prior"]
    # whitened draws are nearly normal: even a short training is near
    for name in ("intercept", "explained"):
        exact, other = np.asarray(both[name]), np.asarray(learned[name])
        assert abs(other.mean() - exact.mean()) < 0.6 * exact.std()
        assert 0.7 < other.std() / exact.std() < 1.4


@pytest.mark.filterwarnings("ignore:ScoreDistribution uses noise level")  # few steps
@pytest.mark.filterwarnings("ignore:ScoreSDE:UserWarning")  # few particles
@pytest.mark.filterwarnings("ignore:The function.*worse:UserWarning")
def test_a_foreign_score_runs(tmp_path, capsys):
    tiny = "--train-steps 3000 --width 128 --num-digits 1 --num-particles 20"
    tiny += " --levels 10"
    (fit,) = run("10_foreign_score", tiny, tmp_path)
    assert (tmp_path / "foreign_score.png").exists()
    assert "RMSE enlarged" in capsys.readouterr().out
    assert fit["image"].shape == (20, 64)
    assert (fit["noise"] > 0).all()


@pytest.mark.filterwarnings("ignore:The draws of this run:UserWarning")  # few draws
def test_growth_runs(tmp_path, capsys):
    runs = run("11_growth", "--num-warmup 200 --num-samples 100", tmp_path)
    assert (tmp_path / "growth.png").exists()
    assert "gradients per ESS" in capsys.readouterr().out
    # known from the data: 242 g in the middle of the weeks, 6.2 g per day
    for result in runs.values():
        assert abs(result.draws["weight_mean"].mean() - 242.0) < 5
        assert abs(result.draws["growth_mean"].mean() - 6.2) < 0.3
