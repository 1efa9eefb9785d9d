"""Weights, resampling and one step down the path, against exact sums over particles."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import targets
from jax.scipy.special import logsumexp

from numpyro_score import VE, ScoreDistribution
from numpyro_score.kernel.annealed_smc import TARGET_ESS, AnnealingStep, smc_step
from numpyro_score.kernel.annealing_path import AnnealingPath
from numpyro_score.smc.resampling import resample
from numpyro_score.smc.weights import ParticleWeights

KEY = jax.random.key(0)
SLOPE = 1.2  # leaves exp(-SLOPE^2) = 24 % of the particles: below TARGET_ESS
LOG_WEIGHT = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))


def tilted():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("likelihood", SLOPE * x)


def step_number(last):
    zero = jnp.zeros(())
    one = jnp.ones(())
    return AnnealingStep(zero, zero, one, remaining=one, last=jnp.asarray(last))


def weights_of(log_weight):
    return ParticleWeights.uniform(len(log_weight), proper=True).reweight(
        log_weight - jnp.log(1 / len(log_weight))
    )


@pytest.mark.parametrize("last", [True, False])
def test_evidence_is_the_mean_of_the_tempered_likelihoods(last):
    size = 200
    x = jax.random.normal(KEY, (size,))
    path = AnnealingPath.of(tilted, (), {}, num_nodes=3, num_reverse=1)
    _, beta, weights = smc_step(
        KEY,
        {"x": x},
        jnp.zeros(()),
        ParticleWeights.uniform(size, proper=True),
        step_number(last),
        path,
    )
    tempered = beta * SLOPE * x
    ess = jnp.exp(2 * logsumexp(tempered) - logsumexp(2 * tempered))
    if last:
        assert beta == 1
    else:
        np.testing.assert_allclose(ess, TARGET_ESS * size, rtol=1e-2)
    exact = logsumexp(tempered) - np.log(size)
    np.testing.assert_allclose(weights.log_evidence, exact, rtol=1e-5)


def test_equal_weights_have_an_evidence_without_variance():
    uniform = ParticleWeights.uniform(4, proper=True)
    assert uniform.reset().log_evidence_variance == 0
    weights = weights_of(LOG_WEIGHT)
    relative = np.exp(LOG_WEIGHT) * 4  # the variance of a mean of four of them
    np.testing.assert_allclose(
        weights.reset().log_evidence_variance, relative.var() / 4, rtol=1e-5
    )
    np.testing.assert_allclose(weights.log_evidence, 0.0, atol=1e-6)


@pytest.mark.parametrize("force", [False, True])
def test_order_of_particles_is_that_of_their_weights(force):
    order = jnp.array([2, 0, 3, 1])
    weights = weights_of(LOG_WEIGHT)
    ancestors, after = resample(
        KEY, weights, ess_threshold=0.0, order=order, force=force
    )
    if not force:
        np.testing.assert_array_equal(ancestors, order)
        np.testing.assert_allclose(after.log_weight, LOG_WEIGHT[order], rtol=1e-5)
        return
    # by the cumulated weights in that order: 0.3, 0.4, 0.8, 1
    counts = np.bincount(ancestors, minlength=4)
    assert (np.abs(counts - 4 * np.exp(LOG_WEIGHT)) < 1).all()
    np.testing.assert_allclose(after.log_weight, -np.log(4), rtol=1e-6)


def test_offspring_are_of_the_heaviest_and_keep_their_first_ancestor():
    order = jnp.array([2, 0, 3, 1])
    alone = jnp.log(jnp.array([0.0, 1.0, 0.0, 0.0]))
    weights = weights_of(alone)._replace(eve=jnp.array([7, 5, 6, 4]))
    for force in (True, False):  # few effective particles, or told to
        ancestors, after = resample(
            KEY, weights, ess_threshold=0.5, order=order, force=force
        )
        np.testing.assert_array_equal(ancestors, 4 * [1])
        np.testing.assert_array_equal(after.eve, 4 * [5])


def test_particles_that_stay_keep_their_first_ancestor_in_the_new_order():
    order = jnp.array([2, 0, 3, 1])
    weights = weights_of(LOG_WEIGHT)._replace(eve=jnp.array([7, 5, 6, 4]))
    _, after = resample(KEY, weights, ess_threshold=0.0, order=order)
    np.testing.assert_array_equal(after.eve, [6, 7, 4, 5])


def test_infinite_and_undefined_weights_count_as_none():
    increment = jnp.array([jnp.inf, jnp.nan, 0.0, jnp.log(3.0)])
    weights = ParticleWeights.uniform(4, proper=True).reweight(increment)
    np.testing.assert_allclose(jnp.exp(weights.log_weight), [0, 0, 0.25, 0.75])
    np.testing.assert_allclose(weights.log_evidence, 0.0, atol=1e-6)  # (1 + 3) / 4


def test_reverse_steps_of_the_path_have_the_law_of_the_next_level():
    law, sde = targets.Gaussian((0.0,), (1.0,)), VE(0.01, 20.0)
    score = law.score_model(sde)

    def model():
        numpyro.sample("x", ScoreDistribution(score))

    path = AnnealingPath.of(model, (), {}, num_nodes=3, num_reverse=16)
    t, t_next, size = sde.time(3.0), sde.time(0.5), 4000
    x = (1 + 3.0**2) ** 0.5 * jax.random.normal(KEY, (size, 1))
    keys = jax.random.split(jax.random.key(1), size)
    moved = jax.jit(
        jax.vmap(lambda key, x: path.sample_reverse(key, {"x": x}, t, t_next)["x"])
    )(keys, x)
    # 5 standard errors of a variance, and the bias of steps that leave out Cov[x0 | xt]
    np.testing.assert_allclose(moved.var(), 1 + 0.5**2, rtol=5 * (2 / size) ** 0.5)
