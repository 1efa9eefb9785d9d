"""The benchmark of tempering runs, and its densities are what they say."""

import jax
import numpy as np
import pytest

from tests.benchmarks import tempering


def test_evidence_of_a_well_agrees_with_draws():
    """The integral by importance sampling from a normal law."""
    target = tempering.many_well(2)
    x = 2.0 * np.random.default_rng(0).normal(size=(200_000, 2))
    log_q = -0.5 * np.square(x / 2).sum(-1) - np.log(2 * np.pi * 4)
    log_p = np.asarray(jax.vmap(target.log_density)(x))
    weights = np.exp(log_p - log_q)
    assert abs(np.log(weights.mean()) - target.log_evidence) < 0.03
    right = (weights * target.mode(x)).sum() / weights.sum()
    assert abs(right - target.shares[1]) < 0.02


def test_modes_of_mixtures_are_told_apart():
    target = tempering.two_gaussians()
    x = np.stack([np.full(10, -1.0), np.full(10, 1.0)])
    assert target.mode(x).tolist() == [0, 1]
    assert target.shares.sum() == pytest.approx(1)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ParallelTempering:UserWarning")
def test_benchmark_runs(capsys):
    arguments = ["--only", "10-d", "--num-warmup", "100", "--num-samples", "100"]
    rows = tempering.print_table(tempering.parse(arguments))
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert np.isfinite(rows["two Gaussians, 10-d", "tempering"].log_evidence_error)
