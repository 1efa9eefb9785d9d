"""Scores of functions whose data the highest noise level does not hide."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import VE, VP, ScoreModel
from numpyro_score.guidance import classifier_guidance
from numpyro_score.score.density import ExactDivergence

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
        (100.0, 1.0, VE(0.01, 20.0), None),
        (-10.0, 0.1, VE(0.01, 20.0), None),
        (30.0, 20.0, VE(0.01, 20.0), "0.19 of their sd off, and 29 % too narrow"),
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


@pytest.mark.parametrize("sde", [VE(0.01, 40.0), VP()], ids=["VE", "VP"])
@pytest.mark.parametrize("size", [2, pytest.param(80, marks=pytest.mark.slow)])
def test_shares_of_modes_of_data_that_are_not_centred(sde, size):
    modes = jnp.stack([jnp.zeros(size), jnp.full(size, 12 / size**0.5)])
    log_share = jnp.log(jnp.array([0.9, 0.1]))

    def log_density(x, t):
        alpha, sigma = sde.marginal(t)
        squares = jnp.square(x - alpha * modes).sum(-1) / (alpha**2 + sigma**2)
        return jax.nn.logsumexp(log_share - squares / 2)

    score = ScoreModel.from_fn(jax.grad(log_density), sde, (size,))
    draws = score.sample(KEY, (20_000,))
    share = (draws.sum(1) > 6 * size**0.5).mean()
    # 4 sd of a mean of 20,000 draws; of draws that start around 0, .087 for VE
    np.testing.assert_allclose(share, 0.1, atol=0.0085)
    x = modes + 0.5
    exact = jax.vmap(log_density, (0, None))(x, sde.t_min)
    exact = exact - size / 2 * jnp.log(2 * jnp.pi)  # alpha^2 + sigma^2 is 1 up to 1e-4
    log_prob = score.log_prob(x, divergence=ExactDivergence())
    np.testing.assert_allclose(log_prob, exact, atol=0.05 + 0.002 * size)


def test_context_moves_the_start():
    sde = VE(0.01, 20.0)

    def denoise(x, t, context=0.0):
        return (x + context * sde.sigma(t) ** 2) / (1 + sde.sigma(t) ** 2)

    score = ScoreModel.from_denoiser(denoise, sde, (2,))
    mean = jnp.array([50.0, -300.0])
    draws = score.sample(KEY, (4000,), context=mean)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(score.log_prob(mean, context=mean), -1.838, atol=0.01)


def test_guided_function_starts_at_its_center():
    score = classifier_guidance(normal(50.0, 1.0, VE(0.01, 20.0)), lambda x, t: x[0])
    draws = score.sample(KEY, (4000,))
    # N(50, 1) times exp(x_0), without the noise that guidance leaves out
    np.testing.assert_allclose(draws.mean(0)[1], 50.0, atol=0.1)


def test_one_wide_direction_of_many_warns():
    sde, sd = VE(0.01, 80.0), jnp.ones(100).at[17].set(40.0)

    def score_fn(x, t):
        return -x / (jnp.square(sd) + sde.sigma(t) ** 2)

    score = ScoreModel.from_fn(score_fn, sde, (100,))
    with pytest.warns(UserWarning, match="11 % too narrow in the widest direction"):
        draws = score.sample(KEY, (4000,))
    np.testing.assert_allclose(draws.std(0)[17], 0.89 * 40, rtol=0.05)


def test_a_field_that_turns_is_not_wide():
    sde = VE(0.01, 20.0)
    turn = jnp.array([[0.0, 0.3], [-0.3, 0.0]])

    def score_fn(x, t):
        return -x / (1 + sde.sigma(t) ** 2) + turn @ x

    ScoreModel.from_fn(score_fn, sde, (2,)).log_prob(jnp.zeros(2))


def test_densities_warn_and_traced_scores_do_not():
    with pytest.warns(UserWarning, match="`sigma_max`"):
        normal(0.0, 20.0, VE(0.01, 20.0)).log_prob(jnp.zeros(2))
    jax.jit(lambda sd: normal(0.0, sd, VE(0.01, 20.0)).log_prob(jnp.zeros(2)))(20.0)
