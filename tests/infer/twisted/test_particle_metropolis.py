"""Particle-independent Metropolis-Hastings: closed forms, unbiasedness, mutants."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import (
    VE,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreModel,
    diagnostics,
    to_datatree,
)
from numpyro_score.infer.twisted import particle_metropolis
from numpyro_score.infer.twisted.failures import Failure
from numpyro_score.infer.twisted.independent_chains import (
    EqualDraws,
    IndependentChains,
    collect_chains,
)
from numpyro_score.infer.twisted.particle_metropolis import (
    FixedRun,
    ParticleMetropolisState,
)
from numpyro_score.infer.twisted.pilot_runs import (
    MAX_PARTICLES,
    choose_num_particles,
    log_estimate,
    pilot_runs,
)
from numpyro_score.infer.twisted.sampler import SMCResult, twisted_smc
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.run_verdict import RunSpan
from numpyro_score.smc.evidence import RatioOfMeans
from numpyro_score.smc.weights import ParticleWeights

KEY = jax.random.key(3)
NORMAL = ScoreModel.from_fn(
    lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
)
Y = jnp.array(2.0)
LOG_EVIDENCE = float(dist.Normal(0, 2**0.5).log_prob(2.0))


def conjugate(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.deterministic("twice", 2 * x)
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


KERNEL = ParticleMetropolis(conjugate, num_particles=4, levels=60)


def run(kernel, y, num_chains=1, chain_method="sequential", num=1000, extra_fields=()):
    mcmc = MCMC(
        kernel,
        num_warmup=10,
        num_samples=num,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(KEY, y, extra_fields=extra_fields)
    return mcmc


def mean_and_error(values):
    """Return the mean of a chain and its standard error, from its effective size."""
    values = np.asarray(values)
    ess = numpyro.diagnostics.effective_sample_size(values[None])
    return values.mean(), values.std() / np.sqrt(ess)


def test_conjugate_posterior_and_evidence():
    mcmc = run(KERNEL, Y)
    x, state = mcmc.get_samples()["x"], mcmc.last_state
    mean, error = mean_and_error(x)
    assert abs(mean - 1) < 3 * error
    second, error = mean_and_error((x - 1) ** 2)
    assert abs(second - 0.5) < 3 * error
    assert abs(state.log_evidence - LOG_EVIDENCE) < 3 * state.log_evidence_error
    assert state.log_evidence_error < 0.05
    tree = to_datatree(mcmc)
    assert tree.attrs["exactness"].startswith("exact for the learned law")
    assert tree.attrs["verdict"] == "ok"
    assert tree.attrs["log_evidence"] == pytest.approx(
        float(state.log_evidence), abs=1e-5
    )
    error = tree.attrs["log_evidence_error"]
    assert error == pytest.approx(float(state.log_evidence_error), rel=1e-4)
    assert tree["log_likelihood"]["y"].sizes == {"chain": 1, "draw": 1000}


def steep(y):
    """Sharp in a way that the twist, exact for Normal likelihoods, does not know."""
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.factor("y", -jnp.abs(1e3 * jnp.sin(20 * (x - y))))


def test_chains_that_hardly_accept_are_found():
    """Two particles are too few for narrow modes that the twist does not know."""
    kernel = ParticleMetropolis(steep, num_particles=2, levels=10)
    with pytest.warns(UserWarning, match=r"not to be trusted:\n- stuck: .*num_part"):
        mcmc = run(kernel, Y, num=200)
    found = diagnostics.verdict(mcmc)
    assert [finding.name for finding in found.findings] == ["stuck"]
    assert found.findings[0].number < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("chain_method", ["sequential", "vectorized"])
def test_chains_that_hardly_accept_warn_once(chain_method):
    kernel = ParticleMetropolis(steep, num_particles=2, levels=10)
    with pytest.warns(UserWarning, match="not to be trusted") as caught:
        run(kernel, Y, num_chains=2, chain_method=chain_method, num=200)
    messages = [str(warning.message) for warning in caught]
    assert sum("not to be trusted:\n- stuck" in text for text in messages) == 1


def chains(accept_prob, squares=600.0):
    accept_prob = np.array(accept_prob)
    whole = partial(np.full, accept_prob.shape)
    rows = EqualDraws(whole(200), whole(1.0), whole(squares))
    return IndependentChains(accept_prob, rows, None)


def test_rows_of_equal_draws_are_few_effective_ones():
    rows = EqualDraws.zero()
    for accepted in (True, False, False, True, True, False):
        rows = rows.add(jnp.array(accepted))
    assert (int(rows.num_draws), float(rows.length)) == (6, 2)
    assert rows.effective_size == 6**2 / (3**2 + 1 + 2**2)
    assert chains([0.5, 0.4]).judge().ok
    (finding,) = chains([0.5, 0.4], squares=100.0**2).judge().findings
    assert finding.name == "slow"
    assert (finding.number, finding.threshold) == (400**2 / 20_000, 20)


@pytest.mark.slow
def test_rows_are_those_of_the_draws_after_warm_up():
    state = run(KERNEL, Y, num=200)
    x, rows = state.get_samples()["x"], state.last_state.equal_draws
    lengths = np.diff(np.flatnonzero(np.append(np.append(1, np.diff(x)), 1)))
    assert int(rows.num_draws) == lengths.sum() == 200
    assert float(rows.squares) == np.square(lengths).sum()
    assert float(rows.length) == lengths[-1]
    longer = MCMC(KERNEL, num_warmup=0, num_samples=120, progress_bar=False)
    longer.post_warmup_state = state.last_state
    longer.run(jax.random.key(1), Y)
    assert int(longer.last_state.equal_draws.num_draws) == 120


def test_reports_of_chains_are_one_warning():
    collector = collect_chains(3)
    collector.receive(chains(0.5))
    collector.receive(chains([0.02]))
    with pytest.warns(UserWarning, match="a chain accepts is 0.02"):
        collector.receive(chains(0.4))
    collector.receive(chains([0.5, 0.4, 0.3]))  # together, and fine
    with pytest.warns(UserWarning, match=r"\(1 of 2 runs\)"):  # two runs, mapped
        collector.receive(chains([[0.5, 0.4, 0.3], [0.5, 0.01, 0.3]]))


def test_evidence_of_chains_is_pooled():
    """Two chains, with evidence e^0 and e^1, each from two equal runs."""
    state = KERNEL.init(KEY, 0, model_args=(Y,))
    log_b = jnp.zeros(2)
    sums = jax.vmap(lambda a, b: RatioOfMeans.zero().add(a, b))(jnp.arange(2.0), log_b)
    sums = jax.vmap(RatioOfMeans.add)(sums, jnp.arange(2.0), log_b)
    pooled = state._replace(evidence=sums).pooled
    assert float(pooled.log_evidence) == pytest.approx(np.log((1 + np.e) / 2), rel=1e-5)
    share = 1 / (1 + np.exp(-1))  # chains without errors of their own, that disagree
    exact = np.sqrt(2 * 2 * (share - 0.5) ** 2)
    assert float(pooled.log_evidence_error) == pytest.approx(exact, rel=1e-4)


def quadrature(log_likelihood):
    """Return the evidence of a Normal(0, 2) sum of x and m, on a grid."""
    grid = np.linspace(-30, 30, 200_001)
    log_prior = dist.Normal(0, 2**0.5).log_prob(grid)
    density = np.exp(np.asarray(log_prior + log_likelihood(grid), float))
    return density.sum() * (grid[1] - grid[0])


def mixed(y):
    """An ordinary site and a heavy tail: walk, power and regularization all adapt.

    A factor: a Student site would be widened, with a bias too small to be seen.
    """
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.factor("y", dist.StudentT(3, x + m, 0.3).log_prob(y))


def bias_of_four_particles(model, evidence, levels, adapt):
    """Return the bias of 1000 estimates at N = 4, in standard errors."""
    pilots = pilot_runs(model, (Y,), {}, levels, None, 4)
    twist = Twist.of(model, (Y,), {}, pilots.covariances)
    settings = None if adapt else pilots.settings

    @jax.jit
    @jax.vmap
    def estimate(key):
        run = twisted_smc(key, twist, pilots.ts, 4, settings=settings)
        return log_estimate(run), run.initial_log_weight

    runs = estimate(jax.random.split(jax.random.key(1), 1000))
    a, b = (np.exp(np.asarray(value, float)) for value in runs)
    values = a / b.mean()
    assert values.std() > 0.01 * evidence
    return (values.mean() - evidence) / (values.std() / 1000**0.5)


def test_evidence_of_four_particles_is_unbiased():
    # the mean of 20 000 runs lies .002 above for 60 levels: the steps' own error
    bias = bias_of_four_particles(conjugate, np.exp(LOG_EVIDENCE), 60, adapt=False)
    assert abs(bias) < 3


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [False, True])
def test_only_runs_that_adapt_nothing_are_unbiased(adapt):
    evidence = quadrature(lambda grid: dist.StudentT(3, grid, 0.3).log_prob(2.0))
    bias = bias_of_four_particles(mixed, evidence, 25, adapt)
    assert abs(bias) > 5 if adapt else abs(bias) < 3


def fake_run(key, twist, ts, num_particles, settings):
    """Return particles at 0 or 1 with equal probability, with the evidence 1 or 3."""
    one = jax.random.bernoulli(key)
    weights = ParticleWeights.uniform(num_particles, proper=True)
    weights = weights._replace(log_evidence=jnp.where(one, jnp.log(3.0), 0.0))
    z = {"x": jnp.full(num_particles, jnp.where(one, 1.0, 0.0))}
    none, zero = jnp.zeros(len(ts)), jnp.zeros(())
    failures = jnp.zeros((len(ts), len(Failure)), int)
    return SMCResult(z, weights, none, none, none, failures, zero, zero, zero)


def share_of_ones(monkeypatch):
    """Return the share of draws at 1 in a chain over fake runs, and its error."""
    monkeypatch.setattr(particle_metropolis, "twisted_smc", fake_run)
    twist = Twist.of(conjugate, (Y,), {})
    minus, zero = jnp.asarray(-jnp.inf), jnp.zeros(())
    fixed = FixedRun(jnp.zeros(2), None, None)
    start = ParticleMetropolisState(
        jnp.zeros((), int),
        {"x": jnp.asarray(0.5)},
        minus,
        jnp.full(4, 0.25),
        zero,
        zero,
        RatioOfMeans.zero(),
        EqualDraws.zero(),
        None,
        RunSpan.zero(),
        fixed,
        KEY,
    )

    def body(state, _):
        state = particle_metropolis._iterate(state, twist)
        return state, (state.z["x"], state.accept_prob)

    state, (draws, accept_prob) = jax.lax.scan(body, start, length=4000)
    assert accept_prob[0] == 1  # the first run in any case
    assert set(np.unique(draws)) == {0.0, 1.0}
    np.testing.assert_allclose(state.mean_accept_prob, accept_prob.mean(), rtol=1e-3)
    return state.log_evidence, *mean_and_error(draws)


def test_runs_are_accepted_by_their_evidence(monkeypatch):
    log_evidence, share, error = share_of_ones(monkeypatch)
    assert abs(share - 0.75) < 3 * error
    np.testing.assert_allclose(log_evidence, np.log(2), atol=0.04)


def test_acceptance_without_evidence_has_the_wrong_law(monkeypatch):
    def constant(run):
        return 0 * run.weights.log_evidence

    monkeypatch.setattr(particle_metropolis, "log_estimate", constant)
    _, share, error = share_of_ones(monkeypatch)
    assert abs(share - 0.75) > 10 * error


@pytest.fixture(scope="module")
def sequential():
    return run(KERNEL, Y, num_chains=2, num=20).get_samples(True)


@pytest.mark.parametrize(
    "chain_method",
    ["vectorized", pytest.param("parallel", marks=pytest.mark.slow)],
)
def test_chain_methods_agree(chain_method, sequential):
    mcmc = run(KERNEL, Y, num_chains=2, chain_method=chain_method, num=20)
    draws = mcmc.get_samples(True)
    assert set(draws) == {"x", "twice"}
    assert draws["x"].shape == (2, 20)
    np.testing.assert_allclose(draws["x"], sequential["x"], atol=1e-4)
    np.testing.assert_allclose(draws["twice"], 2 * draws["x"], atol=1e-6)
    assert not np.allclose(draws["x"][0], draws["x"][1])
    assert mcmc.last_state.log_evidence.shape == (2,)


@pytest.mark.slow
def test_particles_are_chosen_and_runs_go_on():
    kernel = ParticleMetropolis(conjugate, levels=60)
    mcmc = run(kernel, Y, num=20, extra_fields=("log_evidence", "mean_accept_prob"))
    fields, state = mcmc.get_extra_fields(), mcmc.last_state
    assert fields["accept_prob"].shape == fields["log_evidence"].shape == (20,)
    assert fields["log_evidence"][-1] == state.log_evidence
    assert state.weights.shape == (16,)  # the sd is .03 there, so that 16 are enough
    np.testing.assert_allclose(state.weights.sum(), 1, rtol=1e-5)
    assert "16 particles, log evidence" in kernel.get_diagnostics_str(state)
    mcmc.post_warmup_state = state
    mcmc.run(jax.random.key(9), Y)
    assert int(mcmc.last_state.i) == int(state.i) + 20
    assert int(mcmc.last_state.evidence.num_pairs) == 50


def test_a_run_that_goes_on_with_other_data_forgets_the_first():
    """The evidence of the first data is larger, and would refuse all proposals."""
    mcmc = run(KERNEL, jnp.array(0.0), num=100)
    mcmc.post_warmup_state, other = mcmc.last_state, 9.0
    mcmc.run(KEY, jnp.array(other))
    x, state = mcmc.get_samples()["x"], mcmc.last_state
    assert (np.asarray(x[5:]) > 1.5).all()
    exact = dist.Normal(0, 2**0.5).log_prob(other)
    assert abs(state.log_evidence - exact) < 4 * state.log_evidence_error
    assert int(state.evidence.num_pairs) == 100


def test_number_of_particles_follows_the_variance():
    def trial(size, sd=1.0):
        return sd * np.array([-1.0, 1.0]) * (64 / size) ** 0.5

    assert choose_num_particles(trial) == 64
    assert choose_num_particles(lambda size: trial(size, 0.1)) == 16
    with pytest.warns(UserWarning, match="Raise `num_particles` beyond"):
        size = choose_num_particles(lambda size: np.array([-np.inf, 0.0]))
    assert size == MAX_PARTICLES


def test_ratio_of_means_has_the_error_of_its_pairs():
    rng = np.random.default_rng(0)
    a, b = np.exp(rng.normal(size=(2, 200))) * np.exp(-50.0)
    sums = RatioOfMeans.zero()
    assert np.isnan(sums.value)
    for pair in np.log(np.stack([a, b], 1)).astype(np.float32):
        sums = sums.add(*map(jnp.asarray, pair))
        if sums.num_pairs == 1:
            assert np.isinf(sums.error)
    np.testing.assert_allclose(sums.value, np.log(a.mean() / b.mean()), rtol=1e-3)
    terms = a / a.mean() - b / b.mean()
    np.testing.assert_allclose(sums.error, terms.std(ddof=1) / 200**0.5, rtol=1e-3)


def test_a_run_without_weight_counts_as_zero():
    zero, minus = jnp.zeros(()), jnp.asarray(-jnp.inf)
    sums = RatioOfMeans.zero().add(minus, zero).add(zero, zero)
    np.testing.assert_allclose(sums.value, np.log(0.5), rtol=1e-6)


def with_discrete(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(x + k, 1), obs=y)


def without_learned(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


def impossible(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)
    numpyro.factor("never", jnp.where(x < 1e6, -jnp.inf, 0.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_discrete, "Site 'k' is a discrete latent site"),
        (without_learned, "must have a latent site with a ScoreDistribution"),
        (impossible, "All particles of an SMC run have zero weight"),
    ],
)
def test_models_that_have_no_runs_are_refused(model, message):
    kernel = ParticleMetropolis(model, num_particles=4, levels=5)
    with pytest.raises(ValueError, match=message):
        kernel.init(KEY, 0, model_args=(Y,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_particles": 1}, ValueError, "`num_particles` must be .* at least 2"),
        ({"levels": 0}, ValueError, "`levels` must be"),
        ({"covariance": "exact"}, ValueError, "`covariance` must be"),
    ],
)
def test_options_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ParticleMetropolis(conjugate, **options)


def test_traced_arguments_are_refused():
    kernel = ParticleMetropolis(conjugate, num_particles=4, levels=5)
    with pytest.raises(ValueError, match="must be known when a chain starts"):
        jax.jit(lambda y: kernel.init(KEY, 0, model_args=(y,)).i)(Y)


def test_initial_values_are_checked_and_kept_until_a_run_is_accepted():
    state = KERNEL.init(KEY, 0, {"x": jnp.array(0.5)}, model_args=(Y,))
    assert state.z["x"] == 0.5
    assert state.log_estimate == -jnp.inf
    assert np.isfinite(KERNEL.init(KEY, 0, model_args=(Y,)).z["x"])
    with pytest.raises(ValueError, match="`init_params`"):
        KERNEL.init(KEY, 0, {"x": jnp.ones(2)}, model_args=(Y,))


def test_levels_must_decrease():
    kernel = ParticleMetropolis(conjugate, num_particles=4, levels=(1.0, 2.0))
    with pytest.raises(ValueError, match="`levels` must decrease"):
        kernel.init(KEY, 0, model_args=(Y,))
