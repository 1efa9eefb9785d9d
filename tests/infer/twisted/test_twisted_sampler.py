"""The pieces of twisted SMC: steps, starts, moves, noise, weights of several runs."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import VE, VP, ScoreDistribution, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.infer.twisted import rejuvenation, replicates
from numpyro_score.infer.twisted.failures import Failure
from numpyro_score.infer.twisted.gaussian_likelihood import log_likelihood
from numpyro_score.infer.twisted.initial_distribution import InitialGaussian
from numpyro_score.infer.twisted.pilot_runs import log_estimate
from numpyro_score.infer.twisted.random_walk import RandomWalk, random_walk_metropolis
from numpyro_score.infer.twisted.rejuvenation import _move, _scales, rejuvenate
from numpyro_score.infer.twisted.replicates import SamplerSizes, run_chain
from numpyro_score.infer.twisted.reverse_step import ReverseStep
from numpyro_score.infer.twisted.run import count_devices, partition_arguments
from numpyro_score.infer.twisted.sampler import (
    Particles,
    SamplerState,
    SMCResult,
    _walk,
    twisted_smc,
)
from numpyro_score.infer.twisted.twist import (
    Twist,
    TwistEvaluation,
    TwistRegularization,
    averaged_log_likelihood,
)
from numpyro_score.model.denoising import (
    covariance_product,
    covariance_standard_error,
    to_physical_units,
    to_solver_units,
)
from numpyro_score.smc.evidence import combine_evidence
from numpyro_score.smc.rqmc import rqmc_normal, sort_particles
from numpyro_score.smc.tempering import next_twist_power
from numpyro_score.smc.weights import ParticleWeights
from tests.infer.twisted.problems import LONG, NORMAL, PROCESS, Y, conjugate
from tests.targets import STANDARD_NORMAL, Gaussian, unchecked, z_scores


def test_step_has_the_first_two_moments_of_the_reverse_process():
    """For a Gaussian law the step is exact in the mean, and near it in the variance."""
    law = ScoreDistribution(NORMAL)
    t, t_next = PROCESS.time(1.2), PROCESS.time(1.0)
    step = ReverseStep.of(law, t, t_next)
    twist = Twist.of(conjugate, (Y,), {})
    x = jnp.array(0.7)
    center = twist.denoise({"x": x}, t)["x"]

    def move(noise):
        cover = twist.covariance_product({"x": x}, t, {"x": noise})["x"]
        return step.sample(x, center, noise, cover)

    # x_s given x_t = x for x_s ~ N(0, 2), x_t = x_s + N(0, .44)
    precision = 1 / 2.0 + 1 / 0.44
    still, moved = move(jnp.zeros(())), move(jnp.ones(()))
    assert float(still) == pytest.approx(0.7 / 0.44 / precision, abs=1e-3)
    sd = float(moved - still)
    assert sd**2 == pytest.approx(1 / precision, rel=0.01)
    assert float(step.variance) < 0.93 / precision  # what the usual step has


def test_data_move_a_step_by_their_gradient_times_the_fall_of_the_variance():
    """The mean given y is m + (r^2 - r'^2) grad log p(y | u)."""
    sde, t, t_next = VP(), 0.6, 0.5
    law = ScoreDistribution(STANDARD_NORMAL.score_model(sde))
    step = ReverseStep.of(law, t, t_next)
    x, center, gradient = jnp.array([2.0]), jnp.array([0.5]), jnp.array([0.7])
    still, moved = (
        step.sample(x, center, noise, jnp.zeros(1))
        for noise in (jnp.zeros(1), step.mean_shift(gradient))
    )
    fall = sde.noise_level(t) ** 2 - sde.noise_level(t_next) ** 2
    np.testing.assert_allclose(moved - still, fall * gradient, rtol=1e-4)


def test_twist_is_the_likelihood_of_the_denoised_point_in_physical_units():
    """For u_0 given u Normal with variance C, y is normal about loc + scale alpha u."""
    sde, loc, scale, noise = VP(), 50.0, 3.0, 0.7
    score = dataclasses.replace(
        STANDARD_NORMAL.score_model(sde),
        standardize=Affine(jnp.array(loc), jnp.array(scale)),
    )

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score, t=0.3))
        numpyro.sample("y", dist.Normal(x, noise), obs=y)

    y, t, u = 53.0, 0.6, 0.8
    twist = Twist.of(model, (y,), {})
    point = {"x": jnp.array(u)}
    regularization = twist.regularization({"x": jnp.array([u])}, t)
    evaluation = twist.evaluate(point, t, regularization)
    high, low = sde.noise_level(t) ** 2, sde.noise_level(0.3) ** 2
    # x_s = loc + scale alpha_s u_s, with u_s of variance 1 + low and u_t = u_s + noise
    unit = scale * sde.alpha(0.3)
    share, rest = (1 + low) / (1 + high), (1 + low) * (high - low) / (1 + high)
    mean, variance = loc + unit * share * u, noise**2 + unit**2 * rest
    # without the factor (2 pi)^(-1/2)
    log_density = -0.5 * ((y - mean) ** 2 / variance + np.log(variance))
    assert float(evaluation.log_twist) == pytest.approx(float(log_density), rel=1e-4)
    slope = (y - mean) / variance * unit * share
    assert float(evaluation.gradient["x"]) == pytest.approx(float(slope), rel=1e-3)


def failures(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Bernoulli(logits=6 * x), obs=y)


def no_counts(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Poisson(jnp.exp(2 * x)), obs=y)


@pytest.mark.parametrize(
    ("model", "log_likelihood"),
    [
        (failures, lambda x: -np.logaddexp(0, 6 * x)),
        (no_counts, lambda x: -np.exp(2 * x)),
    ],
)
def test_twists_of_steep_sites_are_their_averages(model, log_likelihood):
    """At the mean they would be up to 9 nats too low."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    twist, points = Twist.of(model, (jnp.array(0),), {}), np.linspace(-3.0, 3.0, 5)
    one = TwistRegularization(jnp.ones(()), jnp.zeros(()))

    @jax.jit
    @jax.vmap
    def log_twist(u, t):
        return twist.evaluate({"x": u}, t, one).log_twist

    times = jnp.repeat(jnp.array([PROCESS.time(1.0), PROCESS.t_min]), 5)
    found, last = np.split(np.asarray(log_twist(jnp.tile(points, 2), times)), 2)
    for u, value in zip(points, found, strict=True):
        x = u / 2 + 0.5**0.5 * nodes  # x_0 given x_t = u, both of unit variance
        exact = np.log(weights @ np.exp(log_likelihood(x)) / weights.sum())
        assert abs(value - exact) < 0.5
        assert abs(value - exact) <= abs(log_likelihood(u / 2) - exact) + 0.05
    expected = log_likelihood(points / (1 + PROCESS.sigma_min**2))
    np.testing.assert_allclose(last, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
def test_power_of_other_sites_follows_from_the_variance_of_their_likelihood(share):
    """A Gaussian widened by w has the power 1 / (1 + w), and g^T C g = w (1 + w)."""
    score = STANDARD_NORMAL.score_model(VP())

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=2)

    twist = Twist.of(model, (), {})
    object.__setattr__(twist, "_log_likelihood_variance", lambda z, t: z["x"])
    variances = jnp.array([0.0, share * (1 + share), 1e6])  # the median counts
    found = twist.regularization({"x": variances}, 0.5).power
    assert float(found) == pytest.approx(1 / (1 + share), rel=1e-5)


def test_priors_that_depend_on_a_learned_site_pull_at_its_noisy_point():
    """Of b ~ N(x_0, s), with D = u (1 + r_0^2) / (1 + r^2) in the place of x_0."""
    sde, level = VE(0.1, 20.0), 1.5
    score = STANDARD_NORMAL.score_model(sde)

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        b = numpyro.sample("b", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(b, 1.0), obs=2.0)

    twist, slope = Twist.of(model, (), {}), (1 + 0.1**2) / (1 + level**2)
    z = {"x": jnp.array(0.8), "b": jnp.array(1.1)}
    settings = TwistRegularization(jnp.ones(()), jnp.zeros(()))
    found = twist.evaluate(z, sde.time(jnp.array(level)), settings)
    gap = 1.1 - 0.8 * slope
    np.testing.assert_allclose(found.gradient["x"], slope * gap / 0.25, rtol=1e-4)
    expected = dist.Normal(0, 0.5).log_prob(gap)
    np.testing.assert_allclose(found.log_prior, expected, rtol=1e-4)


def test_data_that_tell_nothing_have_their_own_density_as_evidence():
    """Whatever the weights of the start, whose constant is reported beside it."""
    sde = VE(0.1, 2.0)  # noise that does not hide two modes

    def log_density(x, level):
        places = (x - jnp.array([-1.5, 1.5])) / jnp.sqrt(0.09 + level**2)
        return jax.nn.logsumexp(-0.5 * jnp.square(places))

    score = ScoreModel.from_fn(
        lambda x, t: jax.grad(log_density)(x, sde.sigma(t)), sde, ()
    )

    def model():
        numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.3)

    twist, ts = Twist.of(model, (), {}), jnp.array([1.0, 0.5, 0.0])
    run = jax.jit(lambda key: twisted_smc(key, twist, ts, 32))(jax.random.key(0))
    assert abs(float(run.initial_log_weight)) > 1e-3
    evidence = dist.Normal(0.0, 1.0).log_prob(1.3)
    np.testing.assert_allclose(run.weights.log_evidence, evidence, atol=1e-4)


def test_acceptance_of_moves_is_that_of_particles_with_weight():
    """Half of the particles accept all moves and have all weight; the others none."""
    count = 64
    first = jnp.arange(count) < count // 2

    def evaluate(z):
        log_prior = jnp.where(first, 0.0, -1e9 * jnp.square(z["b"]))
        zeros = jnp.zeros(count)
        return TwistEvaluation({}, log_prior, zeros, {}, zeros.astype(int))

    z = {"b": jnp.where(first, jnp.linspace(-1.0, 1.0, count), 0.0)}
    log_weight = jnp.where(first, -jnp.log(count // 2), -jnp.inf)
    weights = ParticleWeights.uniform(count, proper=True)
    weights = weights._replace(log_weight=log_weight)
    one = jnp.ones(())
    state = SamplerState(Particles(z, evaluate(z)), weights, one, 0 * one)
    with unchecked():
        twist = SimpleNamespace(ordinary=("b",))
        state, _, accepted = _walk(jax.random.key(0), state, twist, evaluate, None)
    assert float(accepted) == pytest.approx(1.0)
    assert float(state.log_factor) == pytest.approx(1 - 0.3)


def test_curvature_of_residuals_is_half_of_the_second_derivative():
    score = STANDARD_NORMAL.score_model(VP())

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x**2 - 3 * x, 0.5), obs=2.0)

    twist, point, center = Twist.of(model, (), {}), jnp.array(0.7), jnp.array(0.3)
    z, mean = {"x": point}, {"x": center}
    residual = twist.terms_at(z, mean).residual
    found, odd = twist._residual_remainders(z, 0.5, mean, residual)
    keys = jax.random.split(jax.random.key(0), len(found))
    away = jax.vmap(lambda key: twist._displacement(key, z, 0.5, mean)["x"])(keys)
    unit = score.standardize.scale * score.sde.alpha(score.sde.t_min)
    # of (y - x^2 + 3 x) / s along v: -v^2 / s
    expected = -((unit * away) ** 2) / 0.5
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-2)
    np.testing.assert_allclose(odd, 0.0, atol=1e-2 * np.abs(expected).max())


def test_cube_is_not_certain_where_it_is_flat():
    """Slope and curvature are zero at the center: B is of the third order alone."""
    score = STANDARD_NORMAL.score_model(VP())

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x**3, 0.1), obs=2.0)

    twist, z, time = Twist.of(model, (), {}), {"x": jnp.array(0.0)}, 0.5
    center = twist.denoise(z, time)
    keys = jax.random.split(jax.random.key(0), 8)
    away = jax.vmap(lambda key: twist._displacement(key, z, time, center)["x"])(keys)
    unit = score.standardize.scale * score.sde.alpha(score.sde.t_min)
    variance = 0.1**2 + np.mean((unit * np.asarray(away)) ** 6)
    expected = dist.Normal(0.0, np.sqrt(variance)).log_prob(2.0)
    found = twist.evaluate(z, time, TwistRegularization(jnp.ones(()), jnp.zeros(())))
    expected = expected + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(found.log_twist, expected, rtol=1e-3)


def test_locations_of_heavy_tails_are_widened_to_second_order():
    score = STANDARD_NORMAL.score_model(VP())

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.StudentT(4.0, x**2 - 3 * x, 0.5), obs=2.0)

    twist, z, center = Twist.of(model, (), {}), {"x": jnp.array(0.7)}, jnp.array(0.3)
    spread = twist._spread(z, 0.5, {"x": center})
    shift, variance = spread.locations["y"]
    unit = score.standardize.scale * score.sde.alpha(score.sde.t_min)
    v, slope = unit * spread.away["x"], 2 * unit * center - 3
    np.testing.assert_allclose(shift, (v**2).mean(), rtol=1e-2)
    exact = ((slope * v) ** 2 + v**4).mean()
    np.testing.assert_allclose(variance, exact, rtol=2e-2)


@pytest.mark.parametrize(
    ("loc", "is_curved"),
    [
        (lambda x: x[0] - 2 * x[1], False),
        (lambda x: jnp.array([[1.0, 2.0], [0.0, 3.0]]) @ x, False),
        (lambda x: jax.lax.scan(lambda c, x: (0.5 * c + x,) * 2, 0.0, x)[1], False),
        (lambda x: x[0] * x[1], True),
        (lambda x: jnp.exp(x), True),
        (lambda x: jnp.abs(x), True),
    ],
)
def test_linear_residuals_need_no_probes(loc, is_curved):
    score = Gaussian((0.0, 0.0), (1.0, 1.0)).score_model(VP())

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        fn = dist.Normal(loc(x), 0.5)
        numpyro.sample("y", fn, obs=jnp.ones(fn.batch_shape))

    twist, z = Twist.of(model, (), {}), {"x": jnp.array([0.7, 0.2])}
    residual = twist.terms_at(z, z).residual
    even, odd = twist._residual_remainders(z, 0.5, z, residual)
    assert (twist.curved, len(even)) == (is_curved, 8 if is_curved else 0)
    assert even.shape == odd.shape


def test_points_without_a_likelihood_count_as_the_center():
    """A rate of minus one has none: the gradient is that of the other two points."""

    def log_likelihoods(center):
        return jnp.log(center["x"] ** 1.5)[None]

    center, away = {"x": jnp.array(1.0)}, {"x": jnp.array([0.5, 2.0])}
    value, slope = jax.value_and_grad(averaged_log_likelihood, argnums=1)(
        log_likelihoods, center, away
    )
    points = np.array([1.5, 3.0, 0.5, 1.0])
    assert float(value) == pytest.approx(np.log((points**1.5).mean()), rel=1e-5)
    exact = 1.5 * (points**0.5).sum() / (points**1.5).sum()
    assert float(slope["x"]) == pytest.approx(exact, rel=1e-5)


def test_physical_units_of_a_noisy_point_are_those_of_the_process():
    sde = VP()
    score = dataclasses.replace(
        STANDARD_NORMAL.score_model(sde),
        standardize=Affine(jnp.array(50.0), jnp.array(3.0)),
    )
    learned, u = {"x": ScoreDistribution(score, t=0.3)}, {"x": jnp.array(0.8)}
    for t, time in ((0.6, 0.6), (0.1, 0.3), (None, 0.3)):
        x = to_physical_units(learned, u, t)
        np.testing.assert_allclose(x["x"], 50 + 3 * sde.alpha(time) * 0.8, rtol=1e-6)
    back = to_solver_units(learned, to_physical_units(learned, u, 0.6), 0.6)
    np.testing.assert_allclose(back["x"], u["x"], rtol=1e-4)


def test_moves_of_ordinary_sites_keep_prior_times_power_of_the_twist():
    power, count = (
        jnp.array(2.0),
        4000,
    )  # precision 3 of the prior, 1/2 twice of the twist

    def evaluate(z):
        half = -0.5 * jnp.square(z["b"])
        zeros = jnp.zeros(count, int)
        return TwistEvaluation({}, 3.0 * half, 0.5 * half, {}, zeros)

    @jax.jit
    def move(key):
        key_start, key_move = jax.random.split(key)
        z = {"b": 0.5 * jax.random.normal(key_start, (count,))}
        even = jnp.full(count, -jnp.log(count))
        walk = RandomWalk.of(z, even, ("b",), jnp.zeros(()))
        z, evaluation, accept_prob = random_walk_metropolis(
            key_move, z, evaluate(z), ("b",), evaluate, power, walk
        )
        accepted = accept_prob.mean()
        return z, evaluation, walk.adapted_log_factor(accepted), accepted

    z, evaluation, log_factor, accepted = move(jax.random.key(0))
    assert z_scores(jnp.square(z["b"]), 0.25) < 4
    np.testing.assert_allclose(evaluation.log_prior, -1.5 * jnp.square(z["b"]))
    # of steps of 2.38 sd on a normal law: (2 / pi) arctan(2 / 2.38)
    assert float(accepted) == pytest.approx(0.445, abs=0.02)
    assert float(log_factor) == pytest.approx(float(accepted) - 0.3, rel=1e-4)


@pytest.mark.parametrize("sizes", [(1.0, 1e-6, 1e3), (1e-9, 2e-9, 1e-12)])
def test_moves_of_ordinary_sites_have_the_scale_of_each(sizes):
    """A floor under all variances made steps of a thousand sd of a small site."""
    unit, mix = np.array(sizes), np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]])
    particles = np.random.default_rng(0).normal(size=(4000, 3)) @ mix.T * unit
    z = {"b": jnp.asarray(particles, float)}
    walk = RandomWalk.of(z, jnp.full(4000, -jnp.log(4000)), ("b",), jnp.zeros(()))
    root = np.asarray(walk.root, float) / unit[:, None]
    np.testing.assert_allclose(root @ root.T, 2.38**2 / 3 * mix @ mix.T, atol=0.1)


def test_even_noise_is_normal_for_each_particle_and_fills_the_law_for_neighbors():
    axes = jnp.array([[0.6], [0.8]])

    @jax.jit
    @jax.vmap
    def draw(key):
        return rqmc_normal(key, {"x": jnp.zeros(2)}, 32, axes)["x"]

    noise = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    for particle in (0, 17):
        one = noise[:, particle]
        assert np.all(z_scores(one, 0.0) < 4)
        assert np.abs(np.cov(one.T) - np.eye(2)).max() < 0.1
    along = noise[:, 8:24] @ np.array([0.6, 0.8])  # of sixteen neighbors
    across = noise[:, 8:24] @ np.array([0.8, -0.6])
    assert along.mean(1).std() < 0.6 * across.mean(1).std()


def test_power_of_the_twist_stays_where_the_step_alone_costs_particles():
    """A lower power would change all weights by e^(50 n)."""
    cloud = ParticleWeights.uniform(100, proper=True)
    step = 1.5 * jax.random.normal(jax.random.key(0), (100,))
    twist = 100 * jax.random.normal(jax.random.key(1), (100,))

    @jax.jit
    def choose(power):
        return next_twist_power(
            lambda p: step + (p - power) * twist, cloud, power, target_ess=0.75
        )

    assert float(choose(1.0)) == 1.0


def test_start_of_a_gaussian_law_is_exact_where_noise_does_not_hide_it():
    law = ScoreDistribution(LONG.score_model(PROCESS))
    variance = jnp.array(LONG.sd) ** 2 + PROCESS.sigma_max**2

    @jax.jit
    def look(key):
        start = InitialGaussian.of(law, PROCESS.t_max)
        x = start.draw(key, (4000, 3))
        weight = jax.vmap(lambda x: start.log_weight(law, PROCESS.t_max, x))(x)
        return start.mean, start.signal_to_noise, x, weight

    mean, reach, x, weight = look(jax.random.key(0))
    assert np.allclose(mean, LONG.mean, atol=0.01)
    assert float(reach) == pytest.approx(2.0, rel=1e-3)
    assert np.all(z_scores((x - mean) ** 2, variance) < 4)
    assert np.ptp(weight) < 0.01


def test_draws_come_from_runs_in_proportion_to_their_evidence(monkeypatch):
    def smc(key, twist, ts, size, report):
        value = 2 * jax.random.uniform(key)
        weights = ParticleWeights.uniform(size, proper=True)
        weights = weights._replace(log_evidence=value)
        levels, failures = jnp.ones(len(ts)), jnp.zeros((len(ts), len(Failure)), int)
        z = {"x": jnp.full(size, value)}
        one = jnp.ones(())
        return SMCResult(z, weights, levels, levels, levels, failures, one, one, one)

    monkeypatch.setattr(replicates, "twisted_smc", smc)
    twist, sizes = Twist.of(conjugate, (Y,), {}), SamplerSizes(1000, 3, 8, 0)
    result = run_chain(jax.random.key(0), twist, jnp.array([1.0, 0.0]), sizes)
    x, log_evidence = result.samples["x"], result.log_evidence
    counts = (x[:, None] == log_evidence).sum(0)
    exact = 1000 * jax.nn.softmax(log_evidence)
    assert float(jnp.ptp(exact)) > 100
    np.testing.assert_allclose(counts, exact, atol=9)  # one for each particle


def test_moves_along_the_gradient_are_nearly_all_accepted_at_small_steps():
    wide = dataclasses.replace(
        NORMAL, standardize=Affine(jnp.zeros(()), jnp.array(30.0))
    )

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(wide))
        numpyro.sample("y", dist.Normal(x, 30.0), obs=y)

    twist = Twist.of(model, (20.0,), {})
    z = {"x": 10.0 + 30 / np.sqrt(2) * jax.random.normal(jax.random.key(0), (200,))}

    @jax.jit
    @jax.vmap
    def move(key, z):
        return _move(key, z, {"x": jnp.array(30.0)}, jnp.array(0.2), twist)

    moved, accept_prob = move(jax.random.split(jax.random.key(1), 200), z)
    # (without the force 0.89)
    assert float(accept_prob.mean()) > 0.98
    assert float(jnp.abs(moved["x"] - z["x"]).mean()) > 3.0


def test_likelihood_of_other_sites_has_their_scale():
    site = {"fn": dist.Exponential(jnp.array([2.0, 2.0])), "value": jnp.ones(2)}
    one = 2 * (np.log(2.0) - 2.0)
    assert float(log_likelihood(site)) == pytest.approx(one)
    assert float(log_likelihood(site | {"scale": 3.0})) == pytest.approx(3 * one)


@pytest.mark.slow
def test_asymmetry_is_the_error_of_a_covariance():
    """A rotating field of 1/r^2 times ((0, e), (-e, 0)) has entries e off."""
    turn = jnp.array([[0.0, 0.3], [-0.3, 0.0]])

    def law(twist):
        def score(x, t):
            level = PROCESS.sigma(t) ** 2
            return -x / (1 + level) + twist * turn @ x / level**2

        return ScoreDistribution(ScoreModel.from_fn(score, PROCESS, (2,)))

    x, t = {"x": jnp.ones((64, 2))}, PROCESS.time(2.0)
    assert float(covariance_standard_error({"x": law(0.0)}, x, t)) < 1e-5
    # entries of C - C^T are twice e, those of independent errors sqrt(2)
    expected = 0.3 * np.sqrt(2)
    assert float(covariance_standard_error({"x": law(1.0)}, x, t)) == pytest.approx(
        expected, rel=0.3
    )


def test_clouds_are_pooled_by_their_evidence():
    value, error = combine_evidence(
        jnp.log(jnp.array([1.0, 3.0])), jnp.array([0.0, 0.16])
    )
    assert float(value) == pytest.approx(np.log(2.0))
    assert float(error) == pytest.approx(0.5)  # of 1 and 3 the mean is 2 +- 1
    _, error = combine_evidence(jnp.zeros(2), jnp.array([0.0, 0.16]))
    assert float(error) == pytest.approx(0.5 * 0.4)
    _, error = combine_evidence(jnp.zeros(1), jnp.array([0.16]))
    assert float(error) == pytest.approx(0.4)


def test_devices_divide_the_chains():
    assert count_devices(1) == 1
    assert count_devices(4) % 2 == 0
    assert count_devices(3) in (1, 3)


def test_frame_keeps_numbers_and_gives_up_arrays():
    frame, arrays = partition_arguments((3, jnp.ones(2)), {"name": "a"})
    args, kwargs = frame.combine(arrays)
    assert args[0] == 3
    assert kwargs == {"name": "a"}
    assert frame == partition_arguments((3, jnp.zeros(2)), {"name": "a"})[0]


@pytest.mark.parametrize("own", [0.1, 0.5])
def test_covariance_of_clean_points_does_not_depend_on_the_level_of_the_site(own):
    """Of x_0 given x_t, r^2 / (1 + r^2) for a normal law."""
    sde = VE(0.1, 20.0)
    law = ScoreDistribution(STANDARD_NORMAL.score_model(sde), t=float(sde.time(own)))
    point, along = {"x": jnp.array(0.7)}, {"x": jnp.array(2.0)}
    for level in (0.8, 3.0):
        t = sde.time(jnp.array(level))
        found = covariance_product({"x": law}, point, t, along)["x"]
        np.testing.assert_allclose(found, 2 * level**2 / (1 + level**2), rtol=1e-3)


def test_particles_are_sorted_along_the_axis_of_those_with_weight():
    """Others, however far, and a common shift do not turn it."""
    rng = np.random.default_rng(0)
    along = rng.permutation(np.linspace(-3.0, 3.0, 40))
    points = 50 + np.outer(along, [0.6, 0.8]) + 0.01 * rng.normal(size=(40, 2))
    lost = 50 + np.array([[-80.0, 60.0], [80.0, -60.0]])
    weights = np.r_[np.full(40, -np.log(40)), -np.inf, -np.inf]
    order = sort_particles(
        {"x": jnp.asarray(np.r_[points, lost], float)}, jnp.asarray(weights, float)
    )
    axis = np.asarray(order.axes)[:, 0]
    assert abs(axis @ [0.6, 0.8]) == pytest.approx(1.0, abs=1e-3)
    rank = np.asarray(order.rank)
    steps = np.diff(along[rank[rank < 40]])
    assert (steps > 0).all() or (steps < 0).all()


def test_moves_have_the_scale_of_the_data_or_of_the_draws():
    score = dataclasses.replace(
        STANDARD_NORMAL.score_model(VP()),
        standardize=Affine(jnp.array(1.0), jnp.array(3.0)),
    )

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("b", dist.Normal(jnp.zeros(2), 1).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=0.0)

    b = jnp.array([[1.0, 5.0], [3.0, 5.0], [1.0, 5.0], [3.0, 5.0]])
    found = _scales(Twist.of(model, (), {}), {"x": 100 * b[:, 0], "b": b})
    assert float(found["x"]) == 3.0
    np.testing.assert_allclose(found["b"], [1.0, 1e-6])  # all draws agree on one


def test_moves_find_the_step_of_their_target_acceptance(monkeypatch):
    def move(key, z, scales, step, twist):
        return {"x": z["x"] + 1}, jnp.exp(-step)  # .574 at a step of .555

    monkeypatch.setattr(rejuvenation, "_move", move)
    twist, z = SimpleNamespace(learned={}), {"x": jnp.zeros((3, 2))}
    with unchecked():
        found = rejuvenate(jax.random.key(0), twist, z, 40)
    assert float(found.accept_prob) == pytest.approx(0.574, abs=1e-3)
    assert (found.z["x"] == 40).all()


def test_estimates_of_runs_have_the_weight_of_their_start():
    weights = SimpleNamespace(log_evidence=jnp.array([-1.0, jnp.nan]))
    start = jnp.array([0.25, 0.5])
    run = SimpleNamespace(weights=weights, initial_log_weight=start)
    with unchecked():
        assert log_estimate(run).tolist() == [-0.75, -jnp.inf]
