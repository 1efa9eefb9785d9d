"""The example of few evaluations runs from start to end at a tiny size."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "02_two_moons.py"
TINY = "--train-steps 20 --width 8 --num-rows 300 --num-draws 40 --budgets 4"


@pytest.mark.slow
def test_two_moons_runs(tmp_path):
    spec = importlib.util.spec_from_file_location("two_moons", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    curve = example.main(example.parse([*TINY.split(), "--output", str(tmp_path)]))
    assert [point.num_evaluations for point in curve.points] == [4] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "draws.png"}
