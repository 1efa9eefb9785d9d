r"""Weighted particles from much noise to little: twisted sequential Monte Carlo.

The target at time t is :math:`p_t(x_t)\, p(\theta)\, e^{T(x_t, \theta, t)}` for learned
sites x, ordinary sites theta and the :mod:`twist <numpyro_score.infer.twisted.twist>`
T. From level r to the next level r', in standardized units of x/alpha, in which learned
sites stay from the first level to the last, a particle is drawn from
Normal(m_q, v), with the reverse step of the prior Normal(m_p, v) and

.. math:: m_q = m_p + (r^2 - r'^2)\, \nabla T,

and its log weight grows by
:math:`\log N(x'; m_p, v) - \log N(x'; m_q, v) + T(x', t') - T(x, t)` (Wu et al. 2023,
algorithm 1). At the last level T is the log likelihood itself. If reweighting by the
twist would leave less than three quarters of the effective sample size, it is raised to
the largest power that does not (adaptive tempering, Jasra et al. 2011). The noise of
neighboring particles is a randomized quasi-Monte Carlo set
(:mod:`numpyro_score.smc.rqmc`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_score.infer.twisted.failures import (
    Failure,
    count_failures,
    first_failure,
)
from numpyro_score.infer.twisted.guidance import Guidance
from numpyro_score.infer.twisted.initial_distribution import (
    Starts,
    initial_gaussians,
    initial_log_weight,
    max_signal_to_noise,
    sample_initial,
)
from numpyro_score.infer.twisted.random_walk import (
    RandomWalk,
    random_walk_metropolis,
)
from numpyro_score.infer.twisted.reverse_step import ReverseStep
from numpyro_score.infer.twisted.site_checks import check_ordinary
from numpyro_score.infer.twisted.twist import (
    Twist,
    TwistEvaluation,
    TwistRegularization,
    is_finite,
    likelihood_failures,
)
from numpyro_score.smc.resampling import resample
from numpyro_score.smc.rqmc import normal_like, rqmc_normal, sort_particles
from numpyro_score.smc.tempering import next_twist_power
from numpyro_score.smc.weights import ParticleWeights
from numpyro_score.typing import PRNGKey, SiteValues, Time

# on which the twist's regularization is measured: a variance within (2 / 32)^1/2 = 25 %
NUM_CALIBRATION_PARTICLES = 32
# share of N: Chopin and Papaspiliopoulos 2020, chapter 10; measured:
# `python -m tests.benchmarks.constants --only resampling`
RESAMPLE_ESS = 0.5
# share of the present ESS that the twist's power keeps: increments with an sd of .58
# means (1 / .75 - 1 = .58^2); lower: more uneven weights; not tuned
TARGET_ESS = 0.75


class Particles(NamedTuple):
    """Positions, learned sites in units of the solver, and the twist there."""

    z: SiteValues
    evaluation: TwistEvaluation


class SamplerState(NamedTuple):
    """Particles between two levels, their weights, and the power of the twist."""

    particles: Particles
    weights: ParticleWeights
    power: Float[Array, ""]
    log_factor: Float[Array, ""]


class LevelSettings(NamedTuple):
    """Settings that a run adapts to its particles, with levels as first axis.

    Another run that takes them as they are estimates the evidence without bias.

    - **power**: of the twist.
    - **regularization**: of the twist.
    - **walk**: by which ordinary sites move.
    """

    power: Float[Array, "*levels"]
    regularization: TwistRegularization
    walk: RandomWalk


class SamplerStep(NamedTuple):
    """From one time to the next."""

    number: Array
    t: Array
    t_next: Array
    last: Array
    key: PRNGKey


class SMCResult(NamedTuple):
    """Weighted particles at the lowest level.

    - **z**: unconstrained latents of the particles, in physical units.
    - **weights**: their weights, and the evidence.
    - **ess**: effective sample size after each level, before resampling.
    - **power**: of the twist, by level.
    - **accept_prob**: mean acceptance of the moves of ordinary sites, by level.
    - **failures**: particles that lost their weight, by level and kind of failure.
    - **initial_ess**: effective sample size of the start.
    - **signal_to_noise**: sd of the data along their longest axis over the sd of the
      noise at the start.
    - **initial_log_weight**: log of the mean weight of the start, whose constant is
      not known. It is missing in ``weights.log_evidence``; their sum estimates the
      evidence up to that constant, and without bias where nothing is adapted.
    - **settings**: what was adapted; None without weights.
    """

    z: SiteValues
    weights: ParticleWeights
    ess: Float[Array, " levels"]
    power: Float[Array, " levels"]
    accept_prob: Float[Array, " levels"]
    failures: Int[Array, "levels kinds"]
    initial_ess: Float[Array, ""]
    signal_to_noise: Float[Array, ""]
    initial_log_weight: Float[Array, ""]
    settings: LevelSettings | None = None


def twisted_smc(
    key: PRNGKey,
    twist: Twist,
    ts: Float[Array, " ts"],
    num_particles: int,
    report: Callable[[Any], None] | None = None,
    settings: LevelSettings | None = None,
) -> SMCResult:
    """Return weighted particles of the posterior, with the evidence.

    Args:
        key: random key.
        twist: what the data say about noisy points.
        ts: decreasing times.
        num_particles: number of particles.
        report: called on the host with the number of levels done since the last call.
        settings: of another run at the same times; None adapts them to the particles.
    """
    key_start, key_levels = jax.random.split(key)
    starts = initial_gaussians(twist.learned, ts[0])
    particles, log_weight = jax.vmap(lambda key: _start(key, twist, ts[0], starts))(
        jax.random.split(key_start, num_particles)
    )
    weights = ParticleWeights.uniform(num_particles, proper=True).reweight(log_weight)
    initial, zero = weights.log_evidence, jnp.zeros(())
    weights = weights._replace(log_evidence=zero)
    start = SamplerState(particles, weights, zero, zero)
    index = jnp.arange(len(ts))
    steps = SamplerStep(
        index,
        ts[jnp.maximum(index - 1, 0)],  # the first step stays, and only weighs
        ts,
        index == len(ts) - 1,
        jax.random.split(key_levels, len(ts)),
    )

    def body(state: SamplerState, given: tuple) -> tuple[SamplerState, tuple]:
        step, fixed = given
        _report(report, step, len(ts))
        return _smc_step(state, step, twist, fixed)

    state, levels = jax.lax.scan(body, start, (steps, settings))
    ess, accept_prob, failures, settings = levels
    return SMCResult(
        jax.vmap(twist.values)(state.particles.z),
        state.weights,
        ess,
        settings.power,
        accept_prob,
        failures,
        weights.ess,
        max_signal_to_noise(starts),
        initial,
        settings,
    )


def _report(
    report: Callable[[Any], None] | None, step: SamplerStep, count: int
) -> None:
    """Tell the host about progress, twenty times in a run."""
    if report is not None:
        every = max(1, count // 20)
        done = (step.number % every == every - 1) | step.last
        jax.lax.cond(
            done,
            lambda: jax.debug.callback(report, 1 + step.number % every),
            lambda: None,
        )


def _start(
    key: PRNGKey, twist: Twist, t: Time, starts: Starts
) -> tuple[Particles, Float[Array, ""]]:
    """Return one particle of the highest level, which has seen no data, and its weight.

    The log target begins with the log prior of the ordinary sites, which were drawn
    from it.
    """
    z = sample_initial(key, twist, t, starts)
    center = twist.denoise(twist.learned_of(z), t)
    zero, none = jnp.zeros(()), jax.tree.map(jnp.zeros_like, center)
    log_prior = zero
    if twist.ordinary:
        log_prior = -twist.prior.value(twist.values({**z, **center}))
    evaluation = TwistEvaluation(center, log_prior, zero, none, jnp.zeros((), int))
    log_weight = initial_log_weight(z, twist.learned, t, starts)
    return Particles(z, evaluation), log_weight


def sample_guided(
    key: PRNGKey,
    twist: Twist,
    ts: Float[Array, " ts"],
    num_particles: int,
    guidance: Guidance,
    report: Callable[[Any], None] | None = None,
) -> SMCResult:
    """Return particles that guidance alone has moved: no weights, no evidence.

    Raises:
        ValueError: for a model with ordinary sites.
    """
    check_ordinary(twist.ordinary)
    key_start, key_levels = jax.random.split(key)
    starts = initial_gaussians(twist.learned, ts[0])
    z = jax.vmap(lambda key: sample_initial(key, twist, ts[0], starts))(
        jax.random.split(key_start, num_particles)
    )
    count = len(ts) - 1
    number = jnp.arange(count)
    keys = jax.random.split(key_levels, count)
    steps = SamplerStep(number, ts[:-1], ts[1:], number == count - 1, keys)

    def body(z: SiteValues, step: SamplerStep) -> tuple[SiteValues, Array]:
        _report(report, step, count)
        noise = normal_like(step.key, _first(z), num_particles)
        regularization = _regularization(twist, z, step.t)

        def move(noise: SiteValues, z: SiteValues) -> tuple[SiteValues, Array]:
            evaluation = guidance.evaluate(
                twist, z, step.t, step.t_next, regularization
            )
            moved = _propagate(noise, z, evaluation, 1.0, step, twist)[0]
            return moved, evaluation.failure

        moved, failure = jax.vmap(move)(noise, z)
        return moved, count_failures(failure, jax.vmap(is_finite)(z))

    z, failures = jax.lax.scan(body, z, steps)
    z = jax.vmap(twist.values)(z)
    weights = ParticleWeights.uniform(num_particles, proper=True)
    # a draw that is not a number is no draw; the others keep equal weights
    finite = jax.vmap(is_finite)(z)
    weights = weights.reweight(jnp.where(finite, 0.0, -jnp.inf))
    none = jnp.full(count, jnp.nan)
    reach = max_signal_to_noise(starts)
    zero = jnp.zeros(())
    return SMCResult(z, weights, none, none, none, failures, weights.ess, reach, zero)


def _resample_sorted(
    key: PRNGKey, state: SamplerState
) -> tuple[Particles, ParticleWeights, Float[Array, "size axes"]]:
    """Return particles in the order of neighbors, their weights, and principal axes."""
    center = state.particles.evaluation.denoised
    order = sort_particles(center, state.weights.log_weight)
    ancestors, weights = resample(
        key, state.weights, ess_threshold=RESAMPLE_ESS, order=order.rank
    )
    particles = jax.tree.map(lambda leaf: leaf[ancestors], state.particles)
    return particles, weights, order.axes


def _smc_step(
    state: SamplerState,
    step: SamplerStep,
    twist: Twist,
    fixed: LevelSettings | None,
) -> tuple[SamplerState, tuple]:
    """Resample if need be, move and weigh the particles; then move ordinary sites."""
    key_resample, key_move, key_walk = jax.random.split(step.key, 3)
    particles, weights, axes = _resample_sorted(key_resample, state)
    like, size = _first(particles.evaluation.denoised), len(weights.log_weight)
    noise = rqmc_normal(key_move, like, size, axes)
    move = partial(_propagate, power=state.power, step=step, twist=twist)
    z, log_ratio = jax.vmap(move)(noise, particles.z, particles.evaluation)
    log_ratio = log_ratio - particles.evaluation.log_target(state.power)
    regularization = (
        _regularization(twist, z, step.t_next)
        if fixed is None
        else fixed.regularization
    )

    def evaluate(z: SiteValues) -> TwistEvaluation:
        return _evaluate(twist, z, step.t_next, step.last, regularization)

    evaluation = evaluate(z)

    def log_increment(power: Array) -> Array:
        return log_ratio + evaluation.log_target(power)

    if fixed is None:  # the power that these particles bear, 1 at the last level
        power = next_twist_power(
            log_increment, weights, state.power, target_ess=TARGET_ESS
        )
        power = jnp.where(step.last, 1.0, power)
    else:
        power = fixed.power
    failures = _count_failures(evaluation.failure, log_increment(power), weights)
    weights = weights.reweight(log_increment(power))
    state = SamplerState(Particles(z, evaluation), weights, power, state.log_factor)
    state, walk, accept_prob = _walk(key_walk, state, twist, evaluate, fixed)
    settings = LevelSettings(power, regularization, walk)
    return state, (weights.ess, accept_prob, failures, settings)


def _walk(
    key: PRNGKey,
    state: SamplerState,
    twist: Twist,
    evaluate: Callable[[SiteValues], TwistEvaluation],
    fixed: LevelSettings | None,
) -> tuple[SamplerState, RandomWalk, Float[Array, ""]]:
    """Return the state after a move of ordinary sites, the walk, and its acceptance."""
    if not twist.ordinary:
        walk = RandomWalk(jnp.zeros((0, 0)), state.log_factor)
        return state, walk, jnp.ones(())
    particles, log_weight = state.particles, state.weights.log_weight
    if fixed is not None:
        walk = fixed.walk
    else:
        walk = RandomWalk.of(particles.z, log_weight, twist.ordinary, state.log_factor)
    z, evaluation, accept_prob = random_walk_metropolis(
        key,
        particles.z,
        particles.evaluation,
        twist.ordinary,
        evaluate,
        state.power,
        walk,
    )
    mean = jnp.sum(jnp.exp(log_weight) * accept_prob)
    state = state._replace(
        particles=Particles(z, evaluation), log_factor=walk.adapted_log_factor(mean)
    )
    return state, walk, mean


def _count_failures(
    failure: Array, log_increment: Array, weights: ParticleWeights
) -> Int[Array, " kinds"]:
    """Return how many particles with weight lose it in this step, by kind."""
    overflow = (failure == Failure.NONE) & ~jnp.isfinite(log_increment)
    failure = jnp.where(overflow, int(Failure.TWIST), failure)
    return count_failures(failure, jnp.isfinite(weights.log_weight))


def _propagate(
    noise: SiteValues,
    z: SiteValues,
    evaluation: TwistEvaluation,
    power: Array | float,
    step: SamplerStep,
    twist: Twist,
) -> tuple[SiteValues, Float[Array, ""]]:
    """Return learned sites one level lower, and log N(m_p, v) - log N(m_q, v)."""
    moved, shifted, log_ratio = dict(z), {}, jnp.zeros(())
    learned = twist.learned.items()
    steps = {name: ReverseStep.of(law, step.t, step.t_next) for name, law in learned}
    for name, reverse in steps.items():
        pull = power * reverse.mean_shift(evaluation.gradient[name])
        log_ratio = log_ratio - jnp.vdot(pull, noise[name] + 0.5 * pull)
        shifted[name] = noise[name] + pull
    product = twist.covariance_product(z, step.t, shifted)
    for name, reverse in steps.items():
        center = evaluation.denoised[name]
        moved[name] = reverse.sample(z[name], center, shifted[name], product[name])
    return moved, log_ratio


def _first(batch: SiteValues) -> SiteValues:
    """Return the sites of the first particle."""
    return jax.tree.map(lambda leaf: leaf[0], batch)


def _regularization(twist: Twist, z: SiteValues, t: Time) -> TwistRegularization:
    return twist.regularization(
        jax.tree.map(lambda leaf: leaf[:NUM_CALIBRATION_PARTICLES], z), t
    )


def _evaluate(
    twist: Twist,
    z: SiteValues,
    t: Time,
    last: Array,
    regularization: TwistRegularization,
) -> TwistEvaluation:
    """Look at all particles; at the last level the twist is the likelihood itself."""
    evaluation = jax.vmap(lambda z: twist.evaluate(z, t, regularization))(z)
    log_twist, failure = jax.lax.cond(
        last,
        lambda: jax.vmap(lambda z: _log_likelihood(twist, z))(z),
        lambda: (evaluation.log_twist, evaluation.failure),
    )
    return evaluation._replace(log_twist=log_twist, failure=failure)


def _log_likelihood(
    twist: Twist, z: SiteValues
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the log likelihood at clean latents, and why it fails if it does."""
    log_likelihood = twist.log_likelihood(twist.values(z))
    at_point = (Failure.SCORE, ~is_finite(z))
    checks = [at_point, *likelihood_failures(log_likelihood)]
    return log_likelihood, first_failure(checks)
