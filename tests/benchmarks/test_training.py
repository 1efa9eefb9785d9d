"""The training benchmark runs, and its two contestants do the same work."""

import jax
import numpy as np
import pytest

from numpyro_score import MLP
from tests.benchmarks import training

pytestmark = pytest.mark.slow

TINY = ["--num-steps=20", "--batch-size=16", "--num-rows=100", "--width=8", "--depth=1"]


def test_benchmark_prints_a_ratio(capsys):
    ratio = training.main(training.parse_args([*TINY, "--repeats=2"]))
    assert ratio > 0
    assert "ratio to it" in capsys.readouterr().out


def test_contestants_learn_alike():
    """Same law of losses, though the random numbers differ."""
    sizes = training.make_data(500), 300, 64
    config = MLP(2, width=16, depth=1)
    ends = [
        np.asarray(make(config, *sizes)(jax.random.key(0)))[-100:].mean()
        for make in (training.by_package, training.by_hand)
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0.1)
