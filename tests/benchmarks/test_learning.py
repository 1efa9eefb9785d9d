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
