"""The benchmark of constants runs, and leaves every constant as it was."""

import pytest

from numpyro_score.infer.twisted import linear_solve
from tests.benchmarks import constants

pytestmark = pytest.mark.slow


def test_benchmark_runs(capsys):
    before = linear_solve.NUM_KRYLOV
    [rows] = constants.main(["--only", "krylov"]).values()
    assert before == linear_solve.NUM_KRYLOV
    assert rows[0][1] > 0.1 > 0.01 > rows[-1][1]  # errors of the solution
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "*" in line] == [f"{before}*"]


def test_constants_exist():
    for measure in constants.MEASURES.values():
        assert getattr(measure.module, measure.name) in measure.values
