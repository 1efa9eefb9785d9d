"""Warm-up: metrics and step sizes against the values that they are defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import ScoreLangevin
from numpyro_score.kernel.adaptation import (
    AdaptationSettings,
    EnergyVarianceEstimate,
    regularized_covariance,
)
from numpyro_score.kernel.annealed_smc import LOG_STEP_GAIN, _adapt_step_size
from numpyro_score.kernel.whitening import WelfordState, unwhiten, whiten

DRAWS = np.random.default_rng(0).normal(size=(50, 3, 2)) @ [[1.0, 0.5], [0.0, 2.0]]
DENSE, DIAGONAL = jnp.eye(2), jnp.ones(2)


def moments_of(draws, like):
    state = WelfordState.zero(like).for_chains(draws.shape[1])
    return jax.lax.scan(lambda m, x: (m.merge(x), None), state, jnp.asarray(draws))[0]


def test_whitened_coordinates_have_unit_covariance():
    root = jnp.array([[2.0, 0.0], [1.0, 3.0]])  # S, of the covariance S^T S
    columns = jax.vmap(lambda y: unwhiten(root, y))(jnp.eye(2))
    np.testing.assert_allclose(columns.T @ columns, root.T @ root)
    gradient = jnp.array([1.0, -1.0])
    # the potential changes by the same in both coordinates
    for y in jnp.eye(2):
        np.testing.assert_allclose(
            whiten(root, gradient) @ y, gradient @ unwhiten(root, y)
        )


@pytest.mark.parametrize("like", [DENSE, DIAGONAL], ids=["dense", "diagonal"])
def test_scatter_is_about_the_mean_of_each_chain(like):
    moments = moments_of(DRAWS, like)
    means = DRAWS.mean(0)
    scatter = sum(np.cov(DRAWS[:, k].T, bias=True) for k in range(3)) * len(DRAWS)
    wanted = scatter if like.ndim == 2 else np.diagonal(scatter)
    np.testing.assert_allclose(moments.mean, means, atol=1e-5)
    np.testing.assert_allclose(moments.scatter, wanted, rtol=1e-4)


@pytest.mark.parametrize("like", [DENSE, DIAGONAL], ids=["dense", "diagonal"])
def test_distances_between_chains_count_where_they_have_mixed(like):
    pooled = np.cov(DRAWS.reshape(-1, 2).T, bias=True) * 150
    apart = DRAWS + np.array([[-50.0], [0.0], [50.0]])  # one chain each
    within = sum(np.cov(DRAWS[:, k].T, bias=True) for k in range(3)) * len(DRAWS)
    for draws, wanted in ((DRAWS, pooled), (apart, within)):
        mean, scatter, number = moments_of(draws, like).total()
        wanted = wanted if like.ndim == 2 else np.diagonal(wanted)
        np.testing.assert_allclose(scatter, wanted, rtol=1e-3)
        np.testing.assert_allclose(mean, draws.mean((0, 1)), atol=1e-4)
        assert number == 150


def test_metric_is_the_shrunk_covariance():
    one_chain = DRAWS[:, :1]
    covariance, _, root = regularized_covariance(moments_of(one_chain, DENSE))
    n = len(one_chain)
    exact = np.cov(one_chain[:, 0].T)
    shrunk = n / (n + 5) * exact + 1e-3 * 5 / (n + 5) * np.eye(2)
    np.testing.assert_allclose(covariance, shrunk, rtol=1e-4)
    np.testing.assert_allclose(root.T @ root, shrunk, rtol=1e-4)


@pytest.mark.parametrize("step_size", [0.3, 0.5, 0.9])
def test_step_size_of_a_goal_follows_the_sixth_power(step_size):
    goal, variance = 0.5, 1e-3  # the step at which errors have this variance
    errors = jnp.full(4, variance**0.5 * (step_size / goal) ** 3)
    estimate = EnergyVarianceEstimate.zero()
    for _ in range(3):
        estimate = estimate.update(errors, jnp.asarray(step_size), variance)
    np.testing.assert_allclose(estimate.step_size(), goal, rtol=1e-5)


def test_energy_errors_far_from_the_goal_count_less_and_old_ones_too():
    """A step that is off by e^1.5, whose variance is off by e^9, counts e^(-1/2)."""
    one, memory = jnp.ones(()), 1 - 1 / 50
    estimate = EnergyVarianceEstimate.zero().update(jnp.ones(4), one, 1.0)
    estimate = estimate.update(jnp.full(4, np.exp(4.5)), one, 1.0)
    weight = np.exp(-0.5)
    mean = (memory + weight * np.exp(9.0)) / (memory + weight)
    np.testing.assert_allclose(estimate.step_size(), mean ** (-1 / 6), rtol=1e-4)


def test_chains_that_accept_least_count_most_at_first():
    """By the harmonic mean of exp(-error); below one in a hundred counts as that."""
    errors = jnp.log(jnp.array([1.0, 2.0, 4.0]))
    settings = AdaptationSettings(1000, fisher=True)
    for window, expected in ((0, 3 / 7), (2, 3 / 7), (3, 1.75 / 3)):
        found = settings._accept_prob(errors, jnp.ones(3, bool), jnp.array(window))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    lost = jnp.array([jnp.nan, 0.0, -1.0])  # refused, and accepted for sure
    found = settings._accept_prob(lost, jnp.ones(3, bool), jnp.array(0))
    np.testing.assert_allclose(found, 3 / 102, rtol=1e-4)
    found = settings._accept_prob(lost, jnp.ones(3, bool), jnp.array(5))
    np.testing.assert_allclose(found, 2 / 3, rtol=1e-4)


def test_trajectories_are_a_quarter_period_of_the_widest_direction():
    settings = AdaptationSettings(1000, num_steps=None, friction=0.8)
    state = settings.init(jnp.zeros(2), 0.5, None)
    state = state._replace(scale=jnp.array(4.0))
    first = settings._update_length(state)
    assert int(first.num_steps) == 8  # in the first window nothing is known of it
    later = settings._update_length(state._replace(window_idx=jnp.array(1)))
    assert int(later.num_steps) == 13  # pi / 2 times 4 over steps of .5 is 12.6
    np.testing.assert_allclose(later.friction, 0.8 / 4)
    for size, steps in ((1e-3, 64), (100.0, 3)):
        limit = state._replace(window_idx=jnp.array(1), step_size=jnp.array(size))
        assert int(settings._update_length(limit).num_steps) == steps


@pytest.mark.parametrize("plan", [{}, {"fisher": True}, {"energy_variance": 0.1}])
def test_chains_lost_in_rounding_do_not_count(plan):
    """Their energy errors are chance; only if all are lost, all count."""
    settings = AdaptationSettings(100, adapt_mass_matrix=False, **plan)
    state = settings.init(jnp.zeros(2), 1.0, None)
    z = jnp.zeros((3, 2))

    def step_size(errors, resolved):
        args = jnp.asarray(errors), jnp.zeros(3, bool), z, z, state
        return float(
            settings.update(jnp.zeros((), int), *args, jnp.asarray(resolved)).step_size
        )

    alone = step_size([0.2, 0.2, 0.2], [True] * 3)
    lost = step_size([0.2, 0.2, 9e3], [True, True, False])
    np.testing.assert_allclose(lost, alone, rtol=1e-5)
    assert step_size([0.2, 0.2, 9e3], [True] * 3) != pytest.approx(alone, rel=1e-3)
    all_lost = step_size([0.2, 0.2, 9e3], [False] * 3)
    assert all_lost == step_size([0.2, 0.2, 9e3], [True] * 3)


def test_divergent_proposals_are_no_draws_of_the_metric():
    settings = AdaptationSettings(200, fisher=True)
    z = jnp.asarray(DRAWS[0])
    state = settings.init(z[0], 1.0, None)
    state = settings.begin(state, z, z, rescale=False)
    state = state._replace(window_idx=jnp.array(1))
    i, errors = jnp.asarray(settings.windows()[1, 0]), jnp.full(3, 0.2)

    def moments(place, diverging):
        moved = z.at[1].set(place)
        args = errors, jnp.asarray(diverging), moved, moved, state, jnp.ones(3, bool)
        return jax.tree.leaves(settings.update(i, *args).mm_state)

    left_out, the_same = (moments(x, [False, True, False]) for x in (1e6, 5.0))
    for a, b in zip(left_out, the_same, strict=True):
        np.testing.assert_allclose(a, b)
    counted = moments(1e6, [False] * 3)
    pairs = zip(counted, left_out, strict=True)
    assert not all(np.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("accept_prob", [0.1, 0.9])
def test_annealed_steps_grow_where_too_many_are_accepted(accept_prob):
    kernel = ScoreLangevin(potential_fn=lambda z: 0.5 * z @ z, step_size=0.2)
    state = kernel.init(jax.random.key(0), 10, jnp.zeros(2))
    state = state._replace(accept_prob=jnp.asarray(accept_prob))
    step_size = _adapt_step_size(state, pooled=False).adapt_state.step_size
    miss = accept_prob - state.plan.target_accept_prob
    np.testing.assert_allclose(step_size, 0.2 * np.exp(LOG_STEP_GAIN * miss))


def test_rejected_momentum_is_turned_round():
    kernel = ScoreLangevin(
        potential_fn=lambda z: 0.5 * z @ z,
        num_steps=1,
        step_size=100.0,  # rejects
        friction=1e-9,  # and refreshes nothing
        adapt_step_size=False,
    )
    state = kernel.init(jax.random.key(0), 0, jnp.ones(2))
    after = kernel.sample(state, (), {})
    np.testing.assert_array_equal(after.z, state.z)
    np.testing.assert_allclose(after.momentum, -state.momentum, atol=1e-2)
