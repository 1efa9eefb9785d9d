"""The benchmark of an accelerator runs anywhere, in small."""

import pytest

from tests.benchmarks import gpu

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_benchmark_prints_all_parts(capsys):
    gpu.main(gpu.parse_args(["--small"]))
    printed = capsys.readouterr().out
    for part in ("Conjugate posterior", "Training", "amortized draws", "Effective"):
        assert part in printed
