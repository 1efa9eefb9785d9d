"""Scores of functions whose data the highest noise level does not hide."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, ScoreModel

KEY = jax.random.key(0)


def normal(mean, sd, sde):
    """Exact score of Normal(mean, sd)."""

    def score(x, t):
        alpha, sigma = sde.marginal(t)
        return (alpha * mean - x) / ((alpha * sd) ** 2 + sigma**2)

    return ScoreModel.from_fn(score, sde, (2,))


@pytest.mark.parametrize(
    ("mean", "sd", "sde", "message"),
    [
        (100.0, 1.0, VE(0.01, 20.0), "centred at 100 end 5 of their sd off, and 0 %"),
        (-10.0, 0.1, VE(0.01, 20.0), "centred at 10 end 0.5 of their sd off"),
        (0.0, 20.0, VE(0.01, 20.0), "and 29 % too narrow"),
        (0.0, 0.1, VE(0.01, 1.0), "and 41 % too wide"),
        (0.0, 1.0, VE(0.01, 2.0), None),
        (1.0, 1.0, VE(0.01, 20.0), None),
        (10.0, 1.0, VE(0.01, 1000.0), None),
        (10.0, 1.0, VP(), None),
    ],
)
def test_hidden_data_or_a_warning(mean, sd, sde, message):
    score = normal(mean, sd, sde)
    if message is None:
        draws = score.sample(KEY, (4000,))
        np.testing.assert_allclose(draws.mean(), mean, atol=0.1 * sd)
        np.testing.assert_allclose(draws.std(), sd, rtol=0.05)
        return
    with pytest.warns(UserWarning, match=message):
        draws = score.sample(KEY, (4000,))
    found = re.search(r"and (\d+) % too (narrow|wide)", message)
    if found:
        change = float(found[1]) / 100 * (-1 if found[2] == "narrow" else 1)
        np.testing.assert_allclose(draws.std(), (1 + change) * sd, rtol=0.05)
    with warnings.catch_warnings():  # once for each score
        warnings.simplefilter("error")
        score.sample(KEY, (10,))


def test_densities_warn_and_traced_scores_do_not():
    with pytest.warns(UserWarning, match="`sigma_max`"):
        normal(50.0, 1.0, VE(0.01, 20.0)).log_prob(jnp.zeros(2))
    jax.jit(lambda mean: normal(mean, 1.0, VE(0.01, 20.0)).log_prob(jnp.zeros(2)))(50.0)
