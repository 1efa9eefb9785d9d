"""The benchmark of coverage runs, on few digits and particles."""

import pytest

from tests.benchmarks import coverage


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ScoreSDE")  # far too few particles
def test_benchmark_runs(capsys):
    sizes = "--num-digits 2 --num-particles 32 --num-levels 4 --train-steps 100"
    coverage.main(sizes.split())
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split()[:2] for row in rows] == [
        ["inpainting", "learned"],
        ["inpainting", "Gaussian"],
        ["deblurring", "learned"],
        ["deblurring", "Gaussian"],
    ]
