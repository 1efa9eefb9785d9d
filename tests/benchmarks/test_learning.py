"""The benchmark of learning runs, and prints what it promises."""

import pytest

from tests.benchmarks import learning


@pytest.mark.slow
def test_benchmark_runs(capsys):
    learning.main(learning.parse_args(["--num-steps", "20", "--only", "sliced, data"]))
    title, header, line = capsys.readouterr().out.splitlines()
    assert title == "2-d mixture, 20 steps of 256 rows"
    assert header.split() == [*map(str, learning.LEVELS), "noise", "mode", "s"]
    assert len(line.split("noise")[1].split()) == len(learning.LEVELS) + 3


@pytest.mark.slow
@pytest.mark.long
def test_learned_density_is_near_the_exact_one():
    """Within one percent at 12 000 steps, which take too long here."""
    arguments = ["--density", "--num-steps", "2000"]
    error, mass = learning.density(learning.parse_args(arguments))
    assert error < 0.03
    assert abs(mass - 1) < 0.003
