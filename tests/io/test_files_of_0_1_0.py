"""Files written by version 0.1.0 load, and mean what they meant.

``tests/files_0_1_0`` was written by that version: one score for each parametrization
(one with a support, one with a linear baseline, one of a VP process), a posterior, a
one-step posterior, and what they returned at one point, in ``expected.json``.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import io
from numpyro_score.infer import NPSE, OneStepPosterior

FILES = Path(__file__).resolve().parents[1] / "files_0_1_0"
EXPECTED = json.loads((FILES / "expected.json").read_text())
SCORES = {
    "score_Bounded": "BoundedScore",
    "score_Clean": "DataPrediction",
    "score_EDM": "EDM",
    "score_Flow": "VelocityPrediction",
    "score_Noise": "NoisePrediction",
    "score_Score": "ScorePrediction",
    "score_V": "VPrediction",
}


def uniform_normal_model():
    x = numpyro.sample("x", dist.Uniform(-1.0, 2.0))
    numpyro.sample("y", dist.Normal(x, 0.5))


@pytest.mark.parametrize(("name", "parametrization"), SCORES.items())
def test_score_means_the_same(name, parametrization):
    score = io.load(FILES / name)
    assert type(score.denoiser.parametrization).__name__ == parametrization
    context = jnp.linspace(1.0, 2.0, 64)[3:4]
    value = score.score(jnp.full(2, 0.5), 0.5, context)
    np.testing.assert_allclose(value, EXPECTED[name], rtol=1e-4, atol=1e-5)


def test_posterior_draws_the_same():
    posterior = NPSE(uniform_normal_model, "y").load(FILES / "posterior")
    draws = posterior.sample(jax.random.key(1), 0.3, 4)["x"]
    np.testing.assert_allclose(draws, EXPECTED["posterior"], rtol=1e-3, atol=1e-4)


def test_one_step_posterior_draws_the_same():
    simulator = NPSE(uniform_normal_model, "y").simulator()
    posterior = OneStepPosterior.load(FILES / "one_step", simulator)
    draws = posterior.sample(jax.random.key(1), 0.3, 4)["x"]
    np.testing.assert_allclose(draws, EXPECTED["one_step"], rtol=1e-3, atol=1e-4)
