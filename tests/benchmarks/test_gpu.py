"""The benchmark of an accelerator runs anywhere, in small."""

import pytest

from tests.benchmarks import gpu

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_benchmark_prints_all_parts(capsys):
    gpu.main(gpu.parse_args(["--small"]))
    printed = capsys.readouterr().out
    parts = "Conjugate posterior", "Training", "amortized draws", "Effective", "Digits"
    for part in parts:
        assert part in printed
    rows = printed.split("Digits restored")[1].split()
    assert [rows.count(word) for word in ("inpainting", "deblurring")] == [2, 2]
