"""ParallelTempering: posteriors of one mode and of several, evidence, bad input."""

import math
import os
import pickle
import subprocess
import sys
import warnings
from collections import namedtuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC
from numpyro.infer.util import potential_energy

from numpyro_score import (
    VE,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.kernel import parallel_tempering, print_tempering_summary
from numpyro_score.kernel.replica_exchange import (
    explore,
    propose_draws,
    swap,
    swap_probability,
)
from numpyro_score.kernel.stepping_stone import (
    Evidence,
    SteppingStones,
    average_log_evidence,
    estimate_evidence,
    is_full,
    missed_draws,
)
from numpyro_score.kernel.tempered_potential import (
    TemperedPoint,
    scale_by_beta,
    temper_model,
)
from numpyro_score.kernel.tempering_adaptation import (
    MAX_DENSE,
    PRIOR_DRAWS,
    RoundOptions,
    RoundStatistics,
    TemperingAdaptState,
    _mass_matrix,
    adapt_step_sizes,
    next_round,
)
from numpyro_score.kernel.tempering_schedule import (
    barrier_steps,
    even_steps,
    expected_restart_rate,
    first_inverse_temperatures,
    interpolate,
    round_ends,
    wanted_rungs,
)
from numpyro_score.kernel.tempering_state import Replicas, TemperingPlan
from numpyro_score.model.potential import Evaluation
from tests.targets import unchecked

SDE = VE(sigma_min=0.1)


def normal_score(x, t):
    return -x / (1 - SDE.sigma_min**2 + SDE.sigma(t) ** 2)


LEARNED = ScoreModel.from_fn(normal_score, SDE, ())


def ordinary(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


def learned(y):
    x = numpyro.sample("x", ScoreDistribution(LEARNED))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


def run(model, *args, seed=0, num_chains=4, extra_fields=(), **options):
    lengths = {"num_warmup": 200, "num_samples": 1000}
    lengths |= {name: options.pop(name) for name in tuple(lengths) if name in options}
    mcmc = MCMC(
        ParallelTempering(model, **options),
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
        **lengths,
    )
    mcmc.run(jax.random.key(seed), *args, extra_fields=extra_fields)
    return mcmc


# posteriors in closed form

TRUTH = float(dist.Normal(0, 2**0.5).log_prob(2.0))


def check_conjugate(mcmc):
    """Normal(1, 1/2), and the evidence within three of its standard errors."""
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    ess = numpyro.diagnostics.effective_sample_size(draws)
    assert ess > 400
    assert abs(draws.mean() - 1.0) < 4 * np.sqrt(0.5 / ess)
    assert abs(draws.var() - 0.5) < 4 * 0.5 * np.sqrt(2 / ess)
    evidence = average_log_evidence(mcmc.last_state.evidence)
    assert abs(float(evidence.log_evidence) - TRUTH) < 3 * float(evidence.error)
    assert float(evidence.error) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("model", [ordinary, learned])
def test_conjugate_posterior_and_evidence(model):
    mcmc = run(model, 2.0, num_rungs=4, num_warmup=300, num_samples=2000)
    check_conjugate(mcmc)
    # an evidence that forgets a factor
    stones = mcmc.last_state.stepping_stones
    wrong = stones._replace(log_up=stones.log_up + 0.2)
    mcmc._last_state = mcmc.last_state._replace(stepping_stones=wrong)
    with pytest.raises(AssertionError):
        check_conjugate(mcmc)


@pytest.mark.slow
def test_a_swap_rule_with_the_prior_in_it_is_caught(monkeypatch):
    """The prior cancels: with it the posterior is another one."""

    def with_prior(betas, point, active):
        joint = point.log_likelihood - point.prior.value
        return swap_probability(betas, point._replace(log_likelihood=joint), active)

    monkeypatch.setattr(parallel_tempering, "swap_probability", with_prior)
    mcmc = run(ordinary, 2.0, num_rungs=4, num_warmup=300, num_samples=2000)
    with pytest.raises(AssertionError):
        check_conjugate(mcmc)


@pytest.mark.slow
def test_errors_of_the_evidence_are_standard_errors():
    """Of 200 chains, each with an estimate of its own."""
    mcmc = run(ordinary, 2.0, num_rungs=3, num_chains=200, num_samples=400)
    state = mcmc.last_state
    z = (np.asarray(state.log_evidence) - TRUTH) / np.asarray(state.log_evidence_error)
    assert 0.6 < z.std() < 1.3
    assert abs(z.mean()) < 4 / np.sqrt(200)


DIMENSION, GAP = 10, 6.3


def two_modes():
    """Normals 6.3 sd apart with shares .3 and .7, the prior divided out."""
    prior = dist.Normal(0, 4).expand([DIMENSION]).to_event(1)
    x = numpyro.sample("x", prior)
    center = 0.5 * GAP / DIMENSION**0.5
    centers = dist.Normal(jnp.array([[-center], [center]]), 1.0)
    modes = jnp.log(jnp.array([0.3, 0.7])) + centers.log_prob(x).sum(-1)
    numpyro.factor("modes", jax.nn.logsumexp(modes) - prior.log_prob(x))


@pytest.mark.slow
def test_modes_far_apart_have_their_shares():
    fields = ("swap_accept_prob", "log_likelihood", "num_steps")
    mcmc = run(two_modes, num_warmup=1000, num_samples=8000, extra_fields=fields)
    along = np.asarray(mcmc.get_samples(group_by_chain=True)["x"]).sum(-1)
    assert abs((along > 0).mean() - 0.7) < 0.02
    assert split_gelman_rubin(along) < 1.01
    state = mcmc.last_state
    evidence = average_log_evidence(state.evidence)
    assert abs(float(evidence.log_evidence)) < 3 * float(evidence.error) < 0.2
    assert (state.restarts > 200).all()
    assert state.adapt_state.num_rungs.tolist() == [13] * 4
    extra = mcmc.get_extra_fields()
    # swaps are alike at all pairs, so their mean is one less the barrier's share
    expected = 1 - float(state.barrier.mean()) / 12
    assert float(extra["swap_accept_prob"].mean()) == pytest.approx(expected, abs=0.01)
    transitions = np.asarray(state.adapt_state.num_transitions[:, 1:13]).sum(1)
    assert transitions.max() < 16  # 12 rungs, of which few need a second one
    steps = np.asarray(extra["num_steps"]).reshape(4, -1)
    assert (steps == 5 + 4 * transitions[:, None]).all()


@pytest.mark.slow
def test_modes_of_the_prior_need_no_likelihood():
    """The docs' mixture as a prior: every draw at the hot end is independent."""

    def model():
        centers = jnp.array([-3.15, 3.15])
        mixing = dist.Categorical(probs=jnp.array([0.3, 0.7]))
        x = numpyro.sample("x", dist.MixtureSameFamily(mixing, dist.Normal(centers, 1)))
        numpyro.sample("y", dist.Normal(x, 50.0), obs=0.0)

    mcmc = run(model, num_rungs=3, num_samples=2000)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    assert abs((x > 0).mean() - 0.7) < 0.03
    assert split_gelman_rubin(x) < 1.01


@pytest.mark.slow
def test_sum_over_discrete_sites_is_tempered_as_a_whole():
    """The evidence of a mixture whose component is summed out by enumeration."""

    def model(y):
        loc = numpyro.sample("loc", dist.Normal(0, 2))
        sign = numpyro.sample(
            "sign", dist.Bernoulli(0.3), infer={"enumerate": "parallel"}
        )
        numpyro.sample("y", dist.Normal(jnp.where(sign == 1, loc, -loc), 0.5), obs=y)

    mcmc = run(model, 3.0, num_rungs=9, num_samples=4000)
    evidence = average_log_evidence(mcmc.last_state.evidence)
    truth = float(dist.Normal(0, (4 + 0.25) ** 0.5).log_prob(3.0))
    assert abs(float(evidence.log_evidence) - truth) < 3 * float(evidence.error) < 0.3
    assert abs(float((mcmc.get_samples()["loc"] > 0).mean()) - 0.3) < 0.03


@pytest.mark.slow
def test_reference_takes_the_place_of_an_improper_prior():
    """Flat in loc: the posterior is the likelihood, its integral the evidence."""

    def model(y):
        flat = dist.ImproperUniform(dist.constraints.positive, (), ())
        loc = numpyro.sample("loc", flat)
        shift = numpyro.sample("shift", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(loc + shift, 1), obs=y)

    reference = {"loc": dist.HalfNormal(5.0)}
    options = {"num_warmup": 400, "num_samples": 3000, "reference": reference}
    mcmc = run(model, 2.0, **options)
    # loc + e = 2 with e ~ N(0, 2), and loc > 0
    truth = math.log(float(jax.scipy.stats.norm.cdf(2 / 2**0.5)))
    evidence = average_log_evidence(mcmc.last_state.evidence)
    assert abs(float(evidence.log_evidence) - truth) < 3 * float(evidence.error) < 0.2
    loc = np.asarray(mcmc.get_samples(group_by_chain=True)["loc"])
    ess = numpyro.diagnostics.effective_sample_size(loc)
    exact = 2 + 2**0.5 * math.exp(-1) / math.sqrt(2 * math.pi) / math.exp(truth)
    assert abs(loc.mean() - exact) < 4 * loc.std() / np.sqrt(ess)


# chains on devices

PARALLEL = """
import jax, numpy as np
from numpyro.infer import MCMC
from numpyro_score import ParallelTempering
from tests.kernel.test_parallel_tempering import ordinary

draws = []
assert len(jax.devices()) == 2
for method in ("parallel", "vectorized"):
    mcmc = MCMC(
        ParallelTempering(ordinary), num_warmup=20, num_samples=20, num_chains=2,
        chain_method=method, progress_bar=False,
    )
    mcmc.run(jax.random.key(0), 2.0)
    draws.append(np.asarray(mcmc.get_samples(group_by_chain=True)["x"]))
np.testing.assert_allclose(*draws, rtol=1e-3, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.long
def test_chains_on_two_devices_are_the_vectorized_ones(root):
    flags = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", PARALLEL],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# prior and likelihood of a model


def everything(y, rows):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 2):
        loc = numpyro.sample("loc", dist.Normal(0, 3))
    numpyro.factor("bonus", -loc.sum())
    seen = numpyro.handlers.mask(mask=jnp.array([True, False, True]))
    with numpyro.plate("rows", 12, subsample_size=3), seen:
        numpyro.sample("y", dist.Normal(loc[0], scale), obs=y)


def test_prior_and_likelihood_add_up_to_the_model():
    y, rows = jnp.array([0.5, -1.0, 2.0]), jnp.array([1, 5, 9])
    model = numpyro.handlers.substitute(everything, data={"rows": rows})
    tempered = temper_model(model, (y, rows), {}, num_nodes=3)
    z = {"scale": jnp.array(0.3), "loc": jnp.array([0.2, -0.7])}
    point = tempered.potential.point(z)
    scale = jnp.exp(z["scale"])
    prior = dist.HalfNormal(1.0).log_prob(scale) + z["scale"]
    prior += dist.Normal(0, 3).log_prob(z["loc"]).sum()
    likelihood = 4 * dist.Normal(0.2, scale).log_prob(y[::2]).sum() + 0.5
    assert jnp.allclose(point.prior.value, -prior, rtol=1e-5)
    assert jnp.allclose(point.log_likelihood, likelihood, rtol=1e-5)
    gradient = jax.grad(lambda z: potential_energy(model, (y, rows), {}, z))(z)
    for beta, factor in ((1.0, 1.0), (0.0, 0.0)):
        value, grad, _ = tempered.potential.at(beta).evaluate(z)
        assert jnp.allclose(value, -prior - factor * likelihood, rtol=1e-5)
    grad = tempered.potential.evaluate(z).grad
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), grad, gradient)


def test_zero_likelihood_leaves_the_prior_alone():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("positive", jnp.where(x > 0, 0.0, -jnp.inf))

    potential = temper_model(model, (), {}, num_nodes=3).potential
    z = {"x": jnp.array(-1.0)}
    value, grad, point = potential.at(0.0).evaluate(z)
    assert float(value) == pytest.approx(-dist.Normal(0, 1).log_prob(-1.0))
    assert float(grad["x"]) == pytest.approx(-1.0)
    assert float(point.log_likelihood) == -math.inf


def test_reference_is_a_prior_whose_ratio_belongs_to_the_likelihood():
    def model():
        x = numpyro.sample("x", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=3.0)

    reference = {"x": dist.LogNormal(2.0, 0.5)}
    tempered = temper_model(model, (), {}, num_nodes=3, reference=reference)
    point = tempered.potential.point({"x": jnp.array(0.3)})
    q = dist.Normal(2.0, 0.5).log_prob(0.3)
    joint = dist.Normal(0, 1).log_prob(0.3) + dist.Normal(jnp.exp(0.3), 1).log_prob(3.0)
    assert jnp.allclose(point.prior.value, -q, rtol=1e-5)
    assert jnp.allclose(point.log_likelihood, joint - q, rtol=1e-5)
    draws = jax.vmap(tempered.draw_prior)(jax.random.split(jax.random.key(0), 1000))
    assert abs(float(draws["x"].mean()) - 2.0) < 0.1


# temperatures


def test_rounds_double_and_leave_the_end_to_step_sizes():
    ends = round_ends(1000)
    lengths = np.diff([0, *ends])
    assert ends[-1] == 1000
    assert lengths[-1] == 150
    assert np.allclose(lengths[1:-1] / lengths[:-2], 2, atol=0.1)
    assert round_ends(4) == (4, 4)


def test_first_temperatures_start_where_the_likelihood_counts_for_a_nat():
    values = jnp.concatenate([1e4 * jnp.arange(-5.0, 6.0), jnp.array([jnp.nan])])
    betas = first_inverse_temperatures(values, 5, 7)
    assert float(betas[0]) == 0
    assert float(betas[1] * 3e4) == pytest.approx(1.0)
    assert np.allclose(np.diff(np.log(betas[1:5])), np.log(3e4) / 3, rtol=1e-4)
    assert betas[4:].tolist() == [1, 1, 1]
    assert first_inverse_temperatures(values, 2, 2).tolist() == [0, 1]


def test_new_temperatures_stand_at_equal_steps_of_the_barrier():
    # the barrier of a Gaussian likelihood grows with the logarithm of beta
    betas = jnp.array([0.0, 0.001, 0.01, 0.1, 1.0, 1.0, 1.0])
    steps = jnp.array([0.2, 0.6, 0.6, 0.6, 0.0, 0.0])
    new, place = even_steps(betas, steps, jnp.array(5), jnp.array(6))
    assert float(new[0]) == 0
    assert new[5:].tolist() == [1, 1]
    assert (np.diff(new[:6]) > 0).all()
    at_place = jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)])
    assert np.allclose(np.diff(interpolate(at_place, place)[:6]), 0.4, atol=1e-5)
    same, stays = even_steps(betas, steps.at[:4].set(0.5), jnp.array(5), jnp.array(5))
    assert np.allclose(same, betas, rtol=1e-4)
    assert stays[:5].tolist() == pytest.approx([0, 1, 2, 3, 4], abs=1e-4)


def correlated(operator, y):
    d = operator.shape[1]
    x = numpyro.sample("x", dist.Normal(0, 1).expand([d]).to_event(1))
    numpyro.sample("y", dist.Normal(operator @ x, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("size", [2, 5])
def test_every_rung_learns_its_correlations(size):
    # precision I + beta A^T A, with scales from 1 to 100
    basis = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]
    operator = np.geomspace(0.1, 100, size)[:, None] * basis
    y = jnp.asarray(operator @ np.ones(size), float)
    kernel = ParallelTempering(correlated, num_rungs=6)
    mcmc = MCMC(kernel, num_warmup=600, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.asarray(operator, float), y)
    found = mcmc.last_state.adapt_state
    betas = np.asarray(found.inverse_temperatures)[1:]
    roots = np.asarray(found.mass_matrix_sqrt_inv)[1:]
    for beta, sqrt in zip(betas, roots, strict=True):
        exact = np.eye(size) + beta * operator.T @ operator
        eigenvalues = np.linalg.eigvalsh(sqrt @ exact @ sqrt.T)
        assert eigenvalues.min() > 0.5
        assert eigenvalues.max() < 2.0


def narrow_where_the_other_is_wide():
    x = numpyro.sample("x", dist.Normal(0, 5).expand([2]).to_event(1))
    scales = jnp.array([[0.01, 1.0], [1.0, 0.01]])
    modes = dist.Normal(jnp.array([[-3.0], [3.0]]), scales).to_event(1)
    log_shares = jnp.log(jnp.array([0.9, 0.1]))
    log_prior = dist.Normal(0, 5).log_prob(x).sum()
    numpyro.factor("f", jax.nn.logsumexp(modes.log_prob(x) + log_shares) - log_prior)


def test_states_move_in_a_small_mode_that_its_metric_does_not_suit():
    kernel = ParallelTempering(narrow_where_the_other_is_wide, num_rungs=2)
    potential = kernel._temper((), {}).potential
    chains = 100
    z = {"x": jnp.full((chains, 2, 2), 3.0)}
    point = jax.vmap(jax.vmap(potential.point))(z)
    sqrt = jnp.diag(jnp.array([0.9e4 + 0.1, 0.1e4 + 0.9]) ** -0.5)  # of both modes
    adapt_state = TemperingAdaptState(
        step_size=jnp.ones(chains),
        inverse_temperatures=jnp.broadcast_to(jnp.arange(2.0), (chains, 2)),
        num_rungs=jnp.full(chains, 2),
        step_sizes=jnp.ones((chains, 2)),
        mass_matrix_sqrt_inv=jnp.broadcast_to(sqrt, (chains, 2, 2, 2)),
        num_transitions=jnp.ones((chains, 2), int),
    )
    keys = jax.random.split(jax.random.key(0), chains)
    replicas = Replicas(z, point, jnp.zeros((chains, 2), bool))
    moved = explore(keys, replicas, adapt_state, potential, kernel._dynamics, 1)
    change = (moved.z["x"] != z["x"]).all(-1)
    assert 10 <= change[:, 1].sum() <= 40  # a quarter, if all of these are accepted
    assert not change[:, 0].any()


def test_metric_of_few_gradients_leaves_what_they_do_not_show():
    d, number = 40, 20
    rows = np.random.default_rng(0).normal(size=(number, d)) * 3.0
    scatter = jnp.asarray(rows.T @ rows, float)
    mass = np.asarray(_mass_matrix(jnp.eye(d), scatter, jnp.array(number)))
    shrunk = np.diag((rows**2).mean(0) ** (number / (number + PRIOR_DRAWS)))
    np.testing.assert_allclose(mass, shrunk, atol=2e-3 * mass.max())


def test_metric_without_gradients_stays():
    sqrt = jnp.array([[0.5, 0.0], [1.0, 2.0]])
    mass = _mass_matrix(sqrt, jnp.zeros((2, 2)), jnp.array(10))
    np.testing.assert_allclose(sqrt @ mass @ sqrt.T, np.eye(2), atol=1e-5)


def test_a_metric_without_a_root_leaves_metric_and_steps_as_they_were():
    """Of the last of four rungs: float32 does not hold its mass matrix."""
    scale = jnp.array([1.0, 1.0, 1.0, 1e-25])
    sqrt = scale[:, None, None] * jnp.eye(2)
    betas, count = jnp.array([0.0, 0.1, 0.5, 1.0]), jnp.array(4)
    steps = jnp.full(4, 0.3)
    state = TemperingAdaptState(steps[-1], betas, count, steps, sqrt, jnp.ones(4, int))
    statistics = RoundStatistics.zero(sqrt)._replace(
        num_draws=jnp.array(50),
        scatter=jnp.broadcast_to(50 * jnp.eye(2), sqrt.shape),
        rejection=jnp.full(3, 25.0),
    )
    state, _ = next_round(state, statistics, RoundOptions(None, 4, True, 1))
    np.testing.assert_allclose(state.step_sizes, 0.3, rtol=1e-4)
    np.testing.assert_allclose(state.mass_matrix_sqrt_inv, sqrt, rtol=1e-4)


def test_many_coordinates_have_diagonal_metrics():
    operator = jnp.diag(jnp.geomspace(0.1, 10.0, MAX_DENSE + 1))
    kernel = ParallelTempering(correlated, num_rungs=4)
    mcmc = MCMC(kernel, num_warmup=200, num_samples=10, progress_bar=False)
    mcmc.run(jax.random.key(0), operator, jnp.ones(MAX_DENSE + 1))
    scale = np.asarray(mcmc.last_state.adapt_state.mass_matrix_sqrt_inv)[-1]
    exact = 1 / np.sqrt(1 + np.square(np.diag(operator)))
    assert np.abs(np.log(scale / exact)).max() < 0.5


def test_number_of_rungs_follows_the_barrier():
    for barrier, expected in ((0.1, 5), (3.0, 9), (3.3, 13), (100.0, 33)):
        assert int(wanted_rungs(jnp.array(barrier), 4, 33)) == expected


def test_barrier_between_normal_energies():
    """Rejections of two normal energies are the error function of the barrier."""
    noise = np.random.default_rng(0).normal(size=(2, 400_000))
    for sd in (0.5, 2.0):
        ratio = sd * (noise[0] - noise[1])
        # energies at neighbors differ in mean by sd^2 for a step of one in beta
        accept = np.minimum(1, np.exp(ratio - sd**2)).mean()
        steps = barrier_steps(jnp.array([1 - accept]), jnp.array([True]))
        assert float(steps[0]) == pytest.approx(sd / math.sqrt(math.pi), rel=0.02)


def test_restart_rate_without_rejections_is_one_in_two():
    active = jnp.array([True, True, False])
    assert float(expected_restart_rate(jnp.zeros(3), active)) == 0.5
    rate = expected_restart_rate(jnp.array([0.5, 0.5, 0.9]), active)
    assert float(rate) == pytest.approx(1 / 6)


# swaps


def points(log_likelihood):
    none = jnp.zeros_like(log_likelihood)
    return TemperedPoint(Evaluation(none, {}, {}), log_likelihood, {})


def test_swaps_exchange_states_and_count_restarts():
    betas = jnp.array([0.0, 0.3, 1.0, 1.0])
    values = jnp.array([-1.0, -5.0, -2.0, 0.0])
    active = jnp.array([True, True, False])
    probability = swap_probability(betas, points(values), active)
    assert probability.tolist() == pytest.approx([1.0, math.exp(-0.7 * 3), 0.0])
    names = {"x": jnp.arange(4)}
    from_prior = jnp.array([True, True, False, False])
    replicas = Replicas(names, points(values), from_prior)
    key, always = jax.random.key(0), jnp.array([1.0, 1.0, 0.0])
    even, none = swap(key, replicas, always, jnp.array(0), jnp.array(2))
    assert even.z["x"].tolist() == [1, 0, 2, 3]
    assert int(none) == 0
    odd, one = swap(key, replicas, always, jnp.array(1), jnp.array(2))
    assert odd.z["x"].tolist() == [0, 2, 1, 3]
    assert int(one) == 1
    assert odd.from_prior.tolist() == [True, False, False, False]


def test_acceptance_of_several_moves_is_their_mean():
    """Of steps so short that every move is accepted."""
    kernel = ParallelTempering(ordinary, num_rungs=3)
    keys = jax.random.split(jax.random.key(0), 2)
    state = kernel.init(keys, 100, None, (2.0,), {})
    adapted = state.adapt_state
    adapted = adapted._replace(
        step_sizes=jnp.full_like(adapted.step_sizes, 1e-4),
        num_transitions=jnp.full_like(adapted.num_transitions, 3),
    )
    potential = kernel._temper((2.0,), {}).potential
    found = explore(keys, state.replicas, adapted, potential, kernel._dynamics, 2)
    np.testing.assert_allclose(found.accept_prob[:, 1:], 1.0, atol=1e-3)
    np.testing.assert_allclose(found.accept_prob[:, 0], 0.0)  # the prior is drawn from
    assert (found.z["x"][:, 1:] != state.replicas.z["x"][:, 1:]).all()


def test_states_without_likelihood_stay_where_they_are():
    betas, active = jnp.array([0.0, 0.5, 1.0]), jnp.array([True, True])
    for bad in (jnp.nan, -jnp.inf):
        values = jnp.array([bad, -5.0, -2.0])
        probability = swap_probability(betas, points(values), active)
        assert float(probability[0]) == 0.0


def propose_normal(num_chains, num_draws):
    """Propose draws of N(0, 1) to states of every law; the likelihood is N(z; 2, 1)."""
    keys = jax.random.split(jax.random.key(0), 3)
    betas = jnp.array([0.0, 0.2, 1.0, 1.0])  # the last is not in use
    z = jax.random.normal(keys[0], (num_chains, 4)) / jnp.sqrt(1 + betas)
    z = z + 2 * betas / (1 + betas)

    def states(z):
        point = jax.vmap(jax.vmap(points))(-0.5 * jnp.square(z - 2))
        return Replicas(z, point, jnp.zeros(z.shape, bool))

    drawn = states(jax.random.normal(keys[1], (num_chains, num_draws)))[:2]
    propose = jax.vmap(propose_draws, (0, 0, 0, None, None))
    each = jax.random.split(keys[2], num_chains)
    return z, propose(each, states(z), drawn, betas, jnp.array(2))


@pytest.mark.parametrize("num_draws", [0, 1, 4])
def test_proposed_draws_leave_every_law_as_it_is(num_draws):
    num_chains = 40_000
    before, after = propose_normal(num_chains, num_draws)
    z, changed = np.asarray(after.z), np.asarray(after.z != before)
    assert changed[:, [0, 3]].sum() == 0
    np.testing.assert_array_equal(after.from_prior, changed)
    np.testing.assert_allclose(
        after.point.log_likelihood, -0.5 * np.square(z - 2), rtol=1e-5
    )
    for k, beta in ((1, 0.2), (2, 1.0)):
        assert changed[:, k].mean() >= 0.05 * min(num_draws, 1)
        error = (z[:, k] - 2 * beta / (1 + beta)) * np.sqrt(1 + beta)
        assert abs(error.mean()) < 4 / np.sqrt(num_chains)
        assert abs(error.var() - 1) < 4 * np.sqrt(2 / num_chains)


def test_draws_without_likelihood_are_not_accepted():
    betas, last = jnp.array([0.0, 1.0]), jnp.array(1)
    states = Replicas(jnp.zeros(2), points(jnp.array([0.0, -50.0])), jnp.zeros(2, bool))
    for bad in (jnp.nan, -jnp.inf, jnp.inf):
        drawn = jnp.ones(1), points(jnp.full(1, bad))
        after = propose_draws(jax.random.key(0), states, drawn, betas, last)
        assert after.z.tolist() == [0.0, 0.0]
    drawn = jnp.ones(1), points(jnp.zeros(1))
    after = propose_draws(jax.random.key(0), states, drawn, betas, last)
    assert after.z.tolist() == [0.0, 1.0]


def modes_of_the_prior(y):
    """Ten modes of the prior, of which the data leave those with x near y or -y."""
    at = dist.Categorical(probs=jnp.full(10, 0.1))
    x = numpyro.sample(
        "x", dist.MixtureSameFamily(at, dist.Normal(10 * jnp.arange(-4.5, 5), 0.5))
    )
    numpyro.sample("y", dist.Normal(jnp.abs(x), 0.5), obs=y)


@pytest.mark.slow
def test_draws_of_the_prior_bring_modes_that_local_moves_cannot_reach():
    """Both modes have the share 1/2; more draws lead to more crossings."""
    restarts = {}
    for num_draws in (1, 5):
        mcmc = run(modes_of_the_prior, 35.0, num_prior_draws=num_draws, seed=3)
        restarts[num_draws] = int(mcmc.last_state.restarts.sum())
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    positive = (x > 0).astype(float)
    ess = numpyro.diagnostics.effective_sample_size(positive)
    assert ess > 400
    assert abs(positive.mean() - 0.5) < 4 * np.sqrt(0.25 / ess)
    assert split_gelman_rubin(x) < 1.02
    assert restarts[5] > 2 * restarts[1]


# evidence


def stones_of(energies, betas, restarts):
    """Add draws one by one, as the kernel does."""

    def add(stones, inputs):
        t, values = inputs
        stones = jax.lax.cond(is_full(t), lambda s: s.halve(), lambda s: s, stones)
        return stones.add(t, betas, values, jnp.zeros((), int)), None

    start = SteppingStones.zero(len(betas) - 1)
    ts = jnp.arange(len(energies))
    stones, _ = jax.jit(lambda: jax.lax.scan(add, start, (ts, energies)))()
    return stones._replace(restarts=jnp.asarray(restarts))


def normal_energies(key, betas, num_draws, noise=None):
    """Draw log likelihoods of x ~ N(0, 1), y = 2, at each temperature."""
    variance = 1 / (1 + betas)
    noise = jax.random.normal(key, (num_draws, len(betas))) if noise is None else noise
    x = 2 * betas * variance + jnp.sqrt(variance) * noise
    return dist.Normal(x, 1).log_prob(2.0)


BETAS = jnp.array([0.0, 0.3, 1.0])
ALL = jnp.array([True, True])


def test_stepping_stones_give_the_evidence():
    energies = normal_energies(jax.random.key(0), BETAS, 1000)
    evidence = estimate_evidence(stones_of(energies, BETAS, 500), ALL)
    steps = np.diff(BETAS)
    forward = np.log(np.exp(steps * energies[:, :-1]).mean(0)).sum()
    backward = -np.log(np.exp(-steps * energies[:, 1:]).mean(0)).sum()
    up = np.log(np.exp(steps / 2 * energies[:, :-1]).mean(0)).sum()
    down = np.log(np.exp(-steps / 2 * energies[:, 1:]).mean(0)).sum()
    assert float(evidence.log_evidence) == pytest.approx(up - down, abs=1e-4)
    assert float(evidence.gap) == pytest.approx(abs(forward - backward), abs=1e-4)
    assert abs(float(evidence.log_evidence) - TRUTH) < 3 * float(evidence.error)


@pytest.mark.parametrize("loc", [0.0, 1.0, -1.0])
def test_evidence_where_the_likelihood_is_zero(loc):
    """x ~ N(loc, 1) below 0 has a likelihood of 0: the posterior knows nothing of it.

    The estimate from the posterior down alone has lost the share of the rest.
    """
    key = jax.random.split(jax.random.key(2))
    share = jax.scipy.stats.norm.cdf(loc)
    lowest = jax.random.bernoulli(key[0], share, (4000, 1))
    ones = jnp.ones((4000, len(BETAS) - 1), bool)
    energies = jnp.where(jnp.hstack([lowest, ones]), -3.0, -jnp.inf)
    evidence = estimate_evidence(stones_of(energies, BETAS, 2000), ALL)
    truth = float(jnp.log(share)) - 3
    assert abs(float(evidence.log_evidence) - truth) < 3 * float(evidence.error)
    assert float(evidence.error) < 0.1
    assert float(evidence.gap) < 1e-3


@pytest.mark.parametrize("sd", [3.0, 10.0, 30.0])
def test_evidence_of_wide_priors_has_no_bias(sd):
    """200 estimates, x ~ N(0, sd), y = 2: down alone the variance is infinite."""
    betas = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1 / sd**2, 1.0, 6)])
    variance = 1 / (sd**-2 + betas)
    active, truth = jnp.ones(6, bool), dist.Normal(0, (1 + sd**2) ** 0.5).log_prob(2.0)

    def estimate(key):
        noise = jax.random.normal(key, (640, len(betas)))
        energies = dist.Normal(
            2 * betas * variance + jnp.sqrt(variance) * noise, 1
        ).log_prob(2.0)
        return estimate_evidence(stones_of(energies, betas, 320), active).log_evidence

    errors = jax.lax.map(estimate, jax.random.split(jax.random.key(3), 200)) - truth
    assert abs(errors.mean()) < 3 * errors.std() / 200**0.5


def test_a_place_that_only_higher_temperatures_have_seen_is_missed():
    """One visit at beta .3 of log likelihood 5, where all draws are below 0."""
    energies = normal_energies(jax.random.key(0), BETAS, 1000)
    assert float(missed_draws(stones_of(energies, BETAS, 500), BETAS, ALL)) == 0
    visited = energies.at[500, 1].set(5.0)
    log_ratio = jnp.log(jnp.exp(0.7 * visited[:, 1]).mean())
    missed = missed_draws(stones_of(visited, BETAS, 500), BETAS, ALL)
    assert float(missed) == pytest.approx(float(jnp.exp(3.5 - log_ratio)), rel=1e-3)
    chains = [visited, visited.at[600, 2].set(5.0), energies]
    stones = [stones_of(values, BETAS, 500) for values in chains]
    stones = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stones)
    several = missed_draws(stones, jnp.stack(3 * [BETAS]), jnp.stack(3 * [ALL]))
    # the second has been there, the third has no visit of its own; the first lacks it
    assert several[0] == pytest.approx(float(missed), rel=1e-3)
    assert several[1] > 20
    assert several[2] == 0
    alone = missed_draws(stones_of(chains[1], BETAS, 500), BETAS, ALL)
    assert float(alone) == 0


def test_error_is_that_of_independent_draws_and_grows_with_their_correlation():
    """200 estimates of 320 draws, independent or each repeated ten times."""
    keys = jax.random.split(jax.random.key(1), 200)
    for repeats, restarts in ((1, 160), (10, 16)):

        def estimate(key, repeats=repeats, restarts=restarts):
            noise = jax.random.normal(key, (320 // repeats, len(BETAS)))
            noise = jnp.repeat(noise, repeats, axis=0)
            energies = normal_energies(key, BETAS, 320, noise)
            return estimate_evidence(stones_of(energies, BETAS, restarts), ALL)

        evidence = jax.vmap(estimate)(keys)
        errors = np.asarray(evidence.log_evidence) - TRUTH
        stated = np.sqrt(np.mean(np.square(evidence.error)))
        assert 0.85 < stated / errors.std() < 1.6


@pytest.mark.parametrize(("restarts", "low", "high"), [(200, 0.9, 1.2), (30, 1.2, 1.8)])
def test_error_knows_states_that_live_longer_than_batches(restarts, low, high):
    """200 estimates by 21 rungs of 1280 draws, with a correlation time of 160 draws."""
    betas = jnp.linspace(0.0, 1.0, 21)
    decay, active = np.exp(-1 / 80), jnp.ones(20, bool)

    def estimate(key):
        noise = jax.random.normal(key, (1280, len(betas))) * (1 - decay**2) ** 0.5

        def step(before, new):
            after = decay * before + new
            return after, after

        start = jax.random.normal(jax.random.fold_in(key, 1), (len(betas),))
        _, noise = jax.lax.scan(step, start, noise)
        energies = normal_energies(key, betas, 1280, noise)
        return estimate_evidence(stones_of(energies, betas, restarts), active)

    evidence = jax.vmap(estimate)(jax.random.split(jax.random.key(1), 200))
    errors = np.asarray(evidence.log_evidence) - TRUTH
    stated = np.sqrt(np.mean(np.square(evidence.error))) / errors.std()
    assert low < stated < high  # .8 by batch means alone, .6 by 20 batches


def test_error_is_infinite_without_restarts():
    energies = normal_energies(jax.random.key(0), BETAS, 1000)
    for restarts, known in ((7, False), (8, True)):
        evidence = estimate_evidence(stones_of(energies, BETAS, restarts), ALL)
        assert bool(jnp.isfinite(evidence.error)) == known


def test_combined_error_sees_chains_that_disagree():
    agree = Evidence(jnp.full(4, -3.0), jnp.full(4, 0.1), jnp.full(4, 0.05))
    assert float(average_log_evidence(agree).error) == pytest.approx(0.05)
    apart = agree._replace(log_evidence=jnp.array([-3.0, -5.0, -3.1, -4.0]))
    # of the mean of four, with the variance 3 of Student's t for three degrees
    between = np.sqrt(3 * np.var([-3.0, -5.0, -3.1, -4.0], ddof=1) / 4)
    assert float(average_log_evidence(apart).error) == pytest.approx(between, rel=1e-5)
    assert float(average_log_evidence(apart).log_evidence) == pytest.approx(-3.775)
    lone = average_log_evidence(Evidence(*map(jnp.asarray, (-3.0, 0.1, 0.05))))
    assert float(lone.error) == pytest.approx(0.1)


# what is refused, and what is warned of


@pytest.mark.parametrize("num_rungs", [1, 0, -2])
def test_fewer_than_two_rungs_are_refused(num_rungs):
    with pytest.raises(ValueError, match="`num_rungs` must be an integer of at least"):
        ParallelTempering(ordinary, num_rungs=num_rungs)


def test_local_moves_that_are_biased_or_ignored_are_refused():
    local = partial(ScoreLangevin, adjusted=False)
    with pytest.raises(ValueError, match="`local` must be an adjusted ScoreLangevin"):
        ParallelTempering(ordinary, local=local)
    local = partial(ScoreLangevin, dense_mass=True)
    with pytest.raises(ValueError, match=r"`local` may have .* Got dense_mass"):
        ParallelTempering(ordinary, local=local)
    with pytest.raises(ValueError, match="`max_transitions` must be an integer"):
        ParallelTempering(ordinary, max_transitions=0)


@pytest.mark.parametrize("num_warmup", [0, 3])
def test_warmup_without_a_round_is_refused(num_warmup):
    kernel = ParallelTempering(ordinary)
    with pytest.raises(ValueError, match="`num_warmup` must be at least 4, one round"):
        kernel.init(jax.random.key(0), num_warmup, None, (2.0,), {})


def improper():
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x, 1), obs=0.0)


def scaled():
    with numpyro.handlers.scale(scale=2.0):
        x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=0.0)


def masked():
    with numpyro.handlers.mask(mask=False):
        x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=0.0)


def undefined():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("log", jnp.log(x - 1.0))


def impossible():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("far", jnp.where(x > 20, 0.0, -jnp.inf))


def unlikely():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("upper", jnp.where(x > 1, 0.0, -jnp.inf))


def broken():
    score = ScoreModel.from_fn(lambda x, t: x * jnp.nan, SDE, ())
    x = numpyro.sample("x", ScoreDistribution(score))
    numpyro.sample("y", dist.Normal(x, 1), obs=0.0)


def discrete():
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1), obs=0.0)


def unobserved():
    numpyro.sample("x", dist.Normal(0, 1))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"z": dist.Normal(0, 1)}, r"must name latent sites of the model, \['x'\]"),
        ({"y": dist.Normal(0, 1)}, "but 'y' is observed"),
        ({"x": dist.HalfNormal(1)}, "must have the site's event shape and support"),
        ({"x": dist.Normal(jnp.zeros(3), 1)}, "must have the site's batch shape"),
    ],
)
def test_reference_that_does_not_fit_is_refused(reference, message):
    kernel = ParallelTempering(improper, reference=reference)
    with pytest.raises(ValueError, match=message):
        kernel.init(jax.random.key(0), 100)


def test_reference_of_a_learned_site_is_refused():
    kernel = ParallelTempering(learned, reference={"x": dist.Normal(0, 1)})
    with pytest.raises(ValueError, match="a learned site, drawn by its own score"):
        kernel.init(jax.random.key(0), 100, None, (2.0,), {})


REFUSED = {
    improper: (ValueError, "Site 'x' has an improper prior"),
    scaled: (ValueError, "Site 'x' has a scaled or masked prior"),
    masked: (ValueError, "Site 'x' has a scaled or masked prior"),
    undefined: (ValueError, "log likelihood is NaN at most draws of the prior"),
    impossible: (ValueError, "likelihood is zero at all draws of the prior"),
    broken: (ValueError, "at site 'x' are not finite .* its score returns NaN"),
    discrete: (RuntimeError, "site k does not have enumerate support"),
    unlikely: (UserWarning, "likelihood is zero or NaN at .* of the draws"),
    unobserved: (UserWarning, "no observed site and no factor"),
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_models_that_cannot_be_tempered(model):
    error, message = REFUSED[model]
    kernel = ParallelTempering(model, num_rungs=3)
    with pytest.raises(error, match=message):
        kernel.init(jax.random.key(0), 100)


def test_kernel_is_configuration():
    kernel = ParallelTempering(ordinary, local=partial(ScoreLangevin, num_steps=3))
    assert kernel.num_steps == 3
    assert hash(kernel) == hash(kernel)
    again = pickle.loads(pickle.dumps(kernel))
    assert (again.num_steps, again.size) == (3, 65)
    same = ParallelTempering(ordinary, local=ScoreLangevin(ordinary, num_steps=3))
    assert same.num_steps == 3


def test_one_chain_warns_that_it_does_not_cross():
    """Two rungs of a sharp likelihood: the barrier is above their number."""

    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([20]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.003).to_event(1), obs=jnp.ones(20))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc = run(model, num_rungs=2, num_chains=1, num_warmup=400, num_samples=300)
        print_tempering_summary(mcmc)
    messages = [str(warning.message) for warning in caught]
    for expected in ("communication barrier", "has seen 0 restarts", "differ by"):
        assert sum(expected in message for message in messages) == 1, expected
    assert float(mcmc.last_state.log_evidence_error) == math.inf


def test_summary_is_printed(capsys):
    mcmc = run(ordinary, 2.0, num_rungs=3, num_chains=2, num_samples=100)
    print_tempering_summary(mcmc)
    text = capsys.readouterr().out
    for expected in ("Log evidence: -2.", "Communication barrier: 0.", "Restarts"):
        assert expected in text


def test_step_sizes_follow_the_acceptance_where_states_move():
    """Not at the prior, nor beyond the last rung; by less the longer a round is."""
    betas = jnp.array([[0.0, 0.5, 1.0, 1.0]])
    state = TemperingAdaptState(
        jnp.ones(1),
        betas,
        jnp.array([3]),
        jnp.full((1, 4), 2.0),
        jnp.ones((1, 4, 1)),
        jnp.ones((1, 4), int),
    )
    accepted = jnp.array([[0.9, 0.9, 0.5, 0.9]])
    for count in (1, 100):
        moved = adapt_step_sizes(state, accepted, jnp.array([count]), 0.6)
        gain = count**-0.6
        expected = 2 * np.exp(gain * np.array([0.0, 0.3, -0.1, 0.0]))
        np.testing.assert_allclose(moved.step_sizes[0], expected, rtol=1e-5)
        np.testing.assert_allclose(moved.step_size, expected[2], rtol=1e-5)


def test_a_likelihood_of_zero_is_nothing_at_the_prior():
    assert float(scale_by_beta(0.0, jnp.array(-jnp.inf))) == 0
    assert float(scale_by_beta(0.5, jnp.array(-3.0))) == -1.5


@pytest.mark.parametrize("num_before", [0, 1000])
def test_evidence_of_other_data_begins_anew(num_before):
    """Batches are filled from the first one, whatever was drawn with the first data."""
    energies = normal_energies(jax.random.key(0), BETAS, 500)
    plan, none = TemperingPlan(100), jnp.zeros(1, int)
    state_of = namedtuple("State", "i plan stepping_stones")

    def draw(carry, values):
        state = state_of(carry[0], plan, carry[1])
        state = ParallelTempering._count(None, state, BETAS[None], values, none)
        return (state.i, state.stepping_stones), None

    zero = jax.tree.map(lambda x: x[None], SteppingStones.zero(2))
    start = jnp.asarray(100 + num_before), zero
    with unchecked():
        _, found = jax.lax.scan(draw, start, energies[:, None])[0]
    expected = stones_of(energies, BETAS, 0)
    same = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(lambda a, b: same(a[0], b), found, expected)
