"""Guidance without weights: DPS and its siblings, which are approximate."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import VE, ScoreDistribution
from numpyro_score.infer.twisted.guidance import (
    DPS,
    MomentMatching,
    PseudoinverseGuidance,
)
from numpyro_score.infer.twisted.twist import Twist, TwistRegularization
from tests.infer.twisted.problems import Y, conjugate, scalar
from tests.targets import Gaussian, z_scores


def test_dps_needs_a_positive_scale():
    with pytest.raises(ValueError, match="`scale` must be positive"):
        DPS(scale=0.0)


@pytest.mark.parametrize(("y", "noise"), [(2.0, 0.5), (-1.0, 1.5)])
def test_guided_steps_of_a_normal_law_are_exact(y, noise):
    """With D = u (1 + r_0^2) / (1 + r^2) and one observation y of x_0."""
    sde = VE(0.1, 20.0)

    def model():
        law = ScoreDistribution(Gaussian((0.0,), (1.0,)).score_model(sde))
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(x[0], noise), obs=y)

    twist, u = Twist.of(model, (), {}), 0.8
    levels = jnp.array([1.5, 1.2])
    t, t_next = sde.time(levels)
    point = {"x": jnp.array([u])}
    settings = TwistRegularization(jnp.ones(()), jnp.zeros(()))
    slope = (1 + 0.1**2) / (1 + 1.5**2)
    error = y - slope * u
    found = DPS(0.3).evaluate(twist, point, t, t_next, settings)
    moved = (1.5**2 - 1.2**2) * found.gradient["x"]  # -zeta grad |e|^2 / |e|
    np.testing.assert_allclose(moved, 2 * 0.3 * slope * np.sign(error), rtol=1e-4)
    found = PseudoinverseGuidance().evaluate(twist, point, t, t_next, settings)
    variance = noise**2 + 1.5**2 / (1 + 1.5**2)
    expected = slope * error / variance
    np.testing.assert_allclose(found.gradient["x"], expected, rtol=1e-4)


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
