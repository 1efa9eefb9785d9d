"""The examples of inference backends run from start to end at a tiny size."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.slow


def run(name, tiny, folder):
    """Return what the example's `main` returns."""
    spec = importlib.util.spec_from_file_location(name[3:], EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.main(example.parse([*tiny.split(), "--output", str(folder)]))


def test_epidemic_runs(tmp_path, capsys):
    tiny = "--num-simulations 500 --train-steps 200 --num-draws 100"
    posteriors = run("03_epidemic", tiny, tmp_path)
    assert (tmp_path / "epidemic.png").exists()
    assert "R0" in capsys.readouterr().out
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
