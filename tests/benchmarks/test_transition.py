"""The benchmark of one transition runs, and prints what it returns."""

import pytest

from tests.benchmarks.transition import main

pytestmark = pytest.mark.slow


def test_benchmark_runs(capsys):
    ratios = main(["--length", "2", "--repeats", "1", "--chains", "2", "--steps", "1"])
    assert set(ratios) == {("eight schools", 2, 1), ("logistic regression", 2, 1)}
    assert all(ratio > 0 for ratio in ratios.values())
    table = capsys.readouterr().out
    assert all(f"{ratio:5.2f}" in table for ratio in ratios.values())
