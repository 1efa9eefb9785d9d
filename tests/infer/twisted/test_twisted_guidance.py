"""Guidance without weights: DPS and its siblings, which are approximate."""

import numpy as np
import pytest

from numpyro_score.infer.twisted.guidance import (
    DPS,
    MomentMatching,
    PseudoinverseGuidance,
)
from tests.infer.twisted.problems import Y, conjugate, scalar
from tests.targets import z_scores


def test_dps_needs_a_positive_scale():
    with pytest.raises(ValueError, match="`scale` must be positive"):
        DPS(scale=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [MomentMatching(), PseudoinverseGuidance()])
def test_guidance_alone_is_right_for_a_gaussian_and_says_so(guidance, capsys):
    inference = scalar(conjugate, Y, guidance=guidance, num_samples=4000, levels=200)
    draws = inference.get_samples()["x"]
    assert np.all(z_scores(draws, 1.0, 0.02) < 5)
    assert np.all(z_scores((draws - 1.0) ** 2, 0.5, 0.02) < 5)
    inference.print_summary()
    assert f"Approximate by {type(guidance).__name__}" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="evidence needs weights"):
        _ = inference.log_evidence


@pytest.mark.slow
def test_dps_is_approximate_and_moves_towards_the_data():
    draws = scalar(conjugate, Y, guidance=DPS(0.05)).get_samples()["x"]
    assert 0.3 < draws.mean() < 2.5
