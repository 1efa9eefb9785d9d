"""The benchmark of kernels runs, and prints what it returns."""

import numpy as np
import pytest

from tests.benchmarks.kernels import main

pytestmark = pytest.mark.slow


def test_benchmark_runs(capsys):
    options = ["--chains", "2", "--num-warmup", "200", "--num-samples", "100"]
    reports = main([*options, "--targets", "funnel", "--kernels", "MALA"])
    (report,) = reports.values()
    assert np.isfinite(report.ess_per_gradient)
    assert f"{report.ess_per_gradient:9.4f}" in capsys.readouterr().out
