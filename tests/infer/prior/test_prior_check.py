"""Learned priors against held-out draws: their scores, and their draws."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from numpyro_score import VE, VP, ScoreModel
from numpyro_score.data.support import Support
from numpyro_score.infer.prior.check import (
    check_prior,
    compare_draws,
    effective_share,
    shares_beyond,
    stein_check,
)
from numpyro_score.model.latents import LatentLayout, LatentSite
from numpyro_score.model.learned_prior import LearnedPrior
from tests.targets import Mixture

KEY = jax.random.key(0)
NORMAL = ScoreModel.from_fn(
    lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
)


def prior_of(score, level=0.1):
    """Return a prior of two real sites whose whitened law the score is."""
    real = Support.of(dist.constraints.real, ())
    latents = LatentLayout((LatentSite("a", real, ()), LatentSite("b", real, ())))
    return LearnedPrior(score, jnp.zeros(2), jnp.eye(2), latents, level)


def test_stein_check_sees_another_law():
    prior, rows = prior_of(NORMAL), np.random.default_rng(0).normal(size=(300, 2))
    assert stein_check(KEY, prior, rows).p_value > 0.01
    with pytest.warns(UserWarning, match=r"differs from held-out draws.*p = 0.0009"):
        fit = stein_check(KEY, prior, rows + 0.5)
    assert fit.num_rows == 300


def test_a_right_score_fits_rows_with_the_noise_of_its_level():
    rows = np.random.default_rng(1).normal(size=(300, 2))
    prior = prior_of(NORMAL, 2.0)
    assert stein_check(KEY, prior, rows).p_value > 0.05  # of variance 5, not 1


def test_processes_that_shrink_the_signal_leave_priors_in_units_of_the_draws():
    """With VP, x_t of draws of unit variance has the variance 1 at any time."""
    normal = ScoreModel.from_fn(lambda x, t: -x, VP(), event_shape=(2,))
    prior = prior_of(normal, 2.0)
    rows = np.random.default_rng(1).normal(size=(100, 2))
    assert stein_check(KEY, prior, rows).p_value > 0.05
    draws = prior.sample_whitened(KEY, (2000,))
    np.testing.assert_allclose(draws.var(0), 1.0, rtol=5 * (2 / 2000) ** 0.5)


@pytest.mark.parametrize("sde", [VE(), VP()], ids=str)
def test_draws_of_a_noisy_law_have_the_variance_of_clean_ones(sde):
    """One sd of x_t is one of the draws that were learned from."""
    t = sde.time(2.0)
    sd = jnp.hypot(sde.alpha(t), sde.sigma(t))
    values = prior_of(ScoreModel.from_fn(lambda x, t: -x, sde, (2,)), 2.0).constrain(
        sd * jnp.array([1.0, -2.0])
    )
    np.testing.assert_allclose([values["a"], values["b"]], [1.0, -2.0], rtol=1e-4)


WIDTH = 0.02  # of two modes, whose law has the variance 1
MODES = Mixture((0.5, 0.5), ((-1.0, 0.0), (1.0, 0.0)), (WIDTH, WIDTH))


def rows_of_modes(count, seed):
    rng = np.random.default_rng(seed)
    rows = WIDTH * rng.normal(size=(count, 2))
    rows[:, 0] += np.where(rng.random(count) < 0.5, -1, 1)
    return rows


def test_modes_that_the_noise_has_blurred_are_found():
    """The score is exact at either level; at .3 its law is not that of the draws."""
    score = MODES.score_model(VE(0.002, 20.0))
    train, held_out = rows_of_modes(1800, 0), rows_of_modes(200, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = check_prior(KEY, prior_of(score, 0.002), train, held_out, 200)
    assert max(fine.marginal, fine.neighbors) < 0.2
    with pytest.warns(UserWarning, match="noise level 0.3 differs.*b .unconstrained"):
        blurred = check_prior(KEY, prior_of(score, 0.3), train, held_out, 200)
    assert blurred.marginal > 0.3  # of b, whose sd is .3 in place of .02
    assert blurred.p_value > 0.01


def test_draws_beyond_all_that_were_learned_from_are_found():
    """The normal law of the same mean and variance as a skewed one."""
    rng = np.random.default_rng(2)
    rows = np.stack([rng.gamma(4.0, 0.5, 2000) - 2, rng.normal(size=2000)], axis=1)
    match = r"has [12]\.\d% of its draws below all draws that it was learned .* in a \("
    with pytest.warns(UserWarning, match=match):
        check_prior(KEY, prior_of(NORMAL), rows[200:], rows[:200], 200)


def funnel(count, seed, blur=0.0):
    rng = np.random.default_rng(seed)
    log_scale = 2 * rng.normal(size=count)
    x = np.exp(log_scale)[:, None] * rng.normal(size=(count, 3))
    rows = np.concatenate([log_scale[:, None], x], axis=1)
    return (rows + blur * rows.std(0) * rng.normal(size=rows.shape)) / (1 + blur**2)


def ridge(count, seed, blur=0.0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=count)
    rows = np.stack([a, a**2 + 0.05 * rng.normal(size=count)], axis=1)
    return rows + blur * rows.std(0) * rng.normal(size=rows.shape)


def skewed(count, seed, blur=0.0):
    rng = np.random.default_rng(seed)
    rows = rng.lognormal(0, 1.5, size=(count, 2))
    return rows + blur * rows.std(0) * rng.normal(size=rows.shape)


@pytest.mark.parametrize("law", [funnel, ridge, skewed])
def test_blurred_laws_are_told_from_exact_ones(law):
    train, held_out = law(3600, 0), law(400, 1)
    exact = compare_draws(train, held_out, law(2000, 2), 400)
    blurred = compare_draws(train, held_out, law(2000, 2, 0.2), 400)
    assert max(exact.marginal.max(), exact.neighbors) < exact.critical
    assert max(blurred.marginal.max(), blurred.neighbors) > blurred.critical


def test_exact_draws_of_many_laws_are_no_finding():
    rng = np.random.default_rng(0)
    laws = (
        lambda n: rng.normal(size=(n, 30)),
        lambda n: rng.standard_t(3, size=(n, 4)),
        lambda n: np.log(rng.gamma(0.5, size=(n, 2))),
        lambda n: np.round(rng.normal(size=(n, 2)), 1),
    )
    for law in laws:
        for count in (150, 2000):
            found = compare_draws(law(count), law(max(50, count // 10)), law(2000), 50)
            assert max(found.marginal.max(), found.neighbors) < found.critical


def test_draws_of_a_slow_chain_count_as_their_effective_number():
    rng = np.random.default_rng(0)
    chain, noise = np.zeros((400, 2)), np.sqrt(1 - 0.97**2)
    for i in range(1, 400):
        chain[i] = 0.97 * chain[i - 1] + noise * rng.normal(size=2)
    share = effective_share(chain)
    assert 1 / 400 <= share < 0.05  # .03 / 1.97 = .015
    assert effective_share(rng.normal(size=(2000, 2))) > 0.7
    order = rng.permutation(400)
    train, held_out = chain[order[50:]], chain[order[:50]]
    found = compare_draws(train, held_out, rng.normal(size=(2000, 2)), 50 * share)
    assert found.neighbors > 0.2  # neighbors of the chain are neighbors in space
    assert found.neighbors < found.critical


def test_draws_beyond_are_counted_at_each_end_of_each_number():
    rows = np.array([[0.0, -1.0], [1.0, 2.0], [0.5, 0.0]])
    drawn = np.array([[-0.1, 0.0], [1.1, 2.0], [1.2, 3.0], [0.0, 1.0]])
    np.testing.assert_allclose(shares_beyond(rows, drawn), [[0.25, 0.0], [0.5, 0.25]])
