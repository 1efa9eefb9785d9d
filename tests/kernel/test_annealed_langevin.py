"""AnnealedLangevin: evidence, mode weights and draws against closed forms."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from numpyro.infer.util import potential_energy
from scipy.spatial.distance import pdist

from numpyro_score import VE, VP, AnnealedLangevin, ScoreDistribution, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.kernel.annealed_smc import (
    AnnealingStep,
    _anneal_chain,
    even_ess_share,
)
from numpyro_score.kernel.annealing_path import AnnealingPath
from numpyro_score.kernel.noise_levels import level_ratio, levels_from_data
from numpyro_score.model.handlers import temper
from numpyro_score.smc.evidence import has_few_ancestors
from numpyro_score.smc.resampling import resample, systematic
from numpyro_score.smc.tempering import next_tempering_param
from numpyro_score.smc.weights import ParticleWeights, effective_sample_size
from tests.targets import unchecked

SDE = VE(sigma_max=60.0)
CENTERS, WEIGHTS = jnp.array([-3.0, 3.0]), jnp.array([0.3, 0.7])


def mixture_score(x, t):
    """The score of a mixture of Normal(-3, .5) and Normal(3, .5) under noise."""

    def log_density(x):
        variance = 0.25 + SDE.sigma(t) ** 2
        terms = jnp.log(WEIGHTS) - 0.5 * (x - CENTERS) ** 2 / variance
        return jax.nn.logsumexp(terms)

    return jax.grad(log_density)(x)


def conjugate(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1), obs=y)


def learned_mixture(y):
    score = ScoreModel.from_fn(mixture_score, SDE, ())
    x = numpyro.sample("x", ScoreDistribution(score))
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x + b, 3.0), obs=y)


def cloud_of(model, y, *, num_chains=1000, num_warmup=100, seed=0, **options):
    mcmc = MCMC(
        AnnealedLangevin(model, **options),
        num_warmup=num_warmup,
        num_samples=1,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), y)
    jax.effects_barrier()  # warnings come from callbacks
    return mcmc.get_samples(), mcmc.last_state.weights


def check_evidence(cloud, truth):
    """The estimate lies within four of its own standard errors, which are small."""
    sd = float(jnp.sqrt(cloud.log_evidence_variance))
    assert 0 < sd < 0.1
    assert abs(float(cloud.log_evidence) - truth) < 4 * sd


SIGNED = jnp.array([1.0, -1.3, 0.8, 0.7, -0.9, -1.1])


def signs_summed_out(y):
    """Each y is N(loc, .5) with probability .3, else N(-loc, .5); loc is N(0, 2)."""
    loc = numpyro.sample("loc", dist.Normal(0, 2))
    with numpyro.plate("rows", len(y)):
        chance = dist.Bernoulli(0.3)
        sign = numpyro.sample("sign", chance, infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(jnp.where(sign == 1, loc, -loc), 0.5), obs=y)


def log_joint_of_signs(loc, beta=1.0):
    """Its log density with the sum over the signs at the power beta."""
    sides = jnp.stack([loc, -loc])[:, None]
    terms = jnp.log(jnp.array([[0.3], [0.7]])) + dist.Normal(sides, 0.5).log_prob(
        SIGNED
    )
    likelihood = jax.nn.logsumexp(terms, axis=0).sum()
    return dist.Normal(0, 2).log_prob(loc) + beta * likelihood


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_sum_over_discrete_sites_is_tempered_as_a_whole(beta):
    path = AnnealingPath.of(signs_summed_out, (SIGNED,), {}, num_nodes=3, num_reverse=1)
    loc = jnp.array(1.2)
    value = path.potential(0.0, beta).value({"loc": loc})
    assert np.isclose(value, -log_joint_of_signs(loc, beta), rtol=1e-5)


@pytest.mark.slow
def test_discrete_sites_leave_evidence_and_shares_right():
    draws, cloud = cloud_of(signs_summed_out, SIGNED, num_chains=2000, seed=1)
    loc = jnp.linspace(-6, 6, 4001)
    density = np.exp(jax.vmap(log_joint_of_signs)(loc))
    check_evidence(cloud, float(np.log(density.sum() * (loc[1] - loc[0]))))
    truth = density[loc > 0].sum() / density.sum()
    sd = (truth * (1 - truth) / float(cloud.effective_num_ancestors)) ** 0.5
    assert abs(np.mean(draws["loc"] > 0) - truth) < 4 * sd < 0.2


@pytest.mark.slow
def test_tempering_gives_posterior_and_evidence():
    draws, cloud = cloud_of(conjugate, 2.0)
    x = np.asarray(draws["x"])
    # posterior Normal(1, 1/2); 1000 all but independent draws
    assert abs(x.mean() - 1.0) < 4 * np.sqrt(0.5 / len(x))
    assert abs(x.var() - 0.5) < 4 * 0.5 * np.sqrt(2 / len(x))
    truth = float(dist.Normal(0, 2**0.5).log_prob(2.0))
    check_evidence(cloud, truth)
    with pytest.raises(AssertionError):  # an evidence that forgets a factor
        check_evidence(cloud._replace(log_evidence=cloud.log_evidence - 0.7), truth)


def exact_posterior(y):
    """Return log evidence and weight of the right mode by quadrature."""
    x = jnp.linspace(-30, 30, 8001)
    terms = jnp.log(WEIGHTS) + dist.Normal(CENTERS, 0.5).log_prob(x[:, None])
    log_joint = jax.nn.logsumexp(terms, axis=1)
    log_joint += dist.Normal(x, 10**0.5).log_prob(y)
    log_evidence = jax.nn.logsumexp(log_joint) + jnp.log(x[1] - x[0])
    mass = jax.nn.softmax(log_joint)
    return float(log_evidence), float(mass[x > 0].sum())


def check_mode_weight(draws, weight):
    share = float((draws["x"] > 0).mean())
    # resampled particles share ancestors: thrice the binomial error of all draws
    error = np.sqrt(weight * (1 - weight) / len(draws["x"]))
    assert abs(share - weight) < 3 * 3 * error / 2


@pytest.mark.slow
def test_learned_prior_gets_mode_weights_and_evidence():
    log_evidence, weight = exact_posterior(-1.0)
    draws, cloud = cloud_of(
        learned_mixture, -1.0, levels=40, num_warmup=200, num_chains=2000
    )
    check_mode_weight(draws, weight)
    check_evidence(cloud, log_evidence)


@pytest.mark.slow
def test_weights_of_the_wrong_sign_are_caught(monkeypatch):
    right = ParticleWeights.reweight
    monkeypatch.setattr(
        ParticleWeights, "reweight", lambda cloud, step: right(cloud, -step)
    )
    log_evidence, _ = exact_posterior(-1.0)
    _, cloud = cloud_of(
        learned_mixture, -1.0, levels=40, num_warmup=200, num_chains=2000
    )
    with pytest.raises(AssertionError):
        check_evidence(cloud, log_evidence)


@pytest.mark.slow
def test_few_chains_anneal_without_weights_and_say_so():
    mcmc = MCMC(
        AnnealedLangevin(conjugate, levels=5),
        num_warmup=200,
        num_samples=1000,
        progress_bar=False,
    )
    with pytest.warns(UserWarning, match="anneals 1 chain"):
        mcmc.run(jax.random.key(0), 2.0)
    assert mcmc.last_state.weights is None
    assert float(mcmc.last_state.beta) == 1.0
    assert abs(float(mcmc.get_samples()["x"].mean()) - 1.0) < 0.2


@pytest.mark.slow
def test_evidence_needs_draws_of_a_proper_prior():
    kernel = AnnealedLangevin(conjugate, levels=2)
    keys = jax.random.split(jax.random.key(0), 40)
    state = kernel.init(keys, 10, {"x": jnp.zeros(40)}, (2.0,), {})
    assert jnp.isnan(state.weights.log_evidence)

    def improper():
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, 1), obs=0.0)

    def scaled():
        with numpyro.handlers.scale(scale=3.0):
            x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)

    for model in (improper, scaled):
        with pytest.warns(UserWarning, match="the prior of 'x' is improper, scaled or"):
            state = AnnealedLangevin(model, levels=2).init(keys, 10)
        assert jnp.isnan(state.weights.log_evidence)


def test_temper_leaves_priors_and_their_jacobians_alone():
    def model():
        x = numpyro.sample("x", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=3.0)
        numpyro.factor("f", -x)

    z = jnp.array(0.3)
    for beta in (0.0, 0.4, 1.0):
        energy = potential_energy(temper(model, beta), (), {}, {"x": z})
        likelihood = dist.Normal(jnp.exp(z), 1).log_prob(3.0) - jnp.exp(z)
        exact = -dist.Normal(0, 1).log_prob(z) - beta * likelihood
        assert jnp.allclose(energy, exact, rtol=1e-5)


def test_systematic_resampling_is_unbiased():
    log_weight = jnp.log(jnp.array([0.1, 0.0, 0.25, 0.65]))
    keys = jax.random.split(jax.random.key(0), 4000)
    ancestors = jax.vmap(lambda key: systematic(key, log_weight))(keys)
    counts = jnp.stack([(ancestors == k).sum(1) for k in range(4)], 1)
    assert jnp.allclose(counts.mean(0), 4 * jnp.exp(log_weight), atol=0.04)
    assert (counts <= jnp.ceil(4 * jnp.exp(log_weight))).all()


def test_largest_step_keeps_the_effective_sample_size():
    log_likelihood = dist.Normal(0, 5).sample(jax.random.key(0), (500,))
    equal = ParticleWeights.uniform(500, proper=True)
    zero, one = jnp.zeros(()), jnp.ones(())
    beta = next_tempering_param(
        lambda b: b * log_likelihood, equal, zero, one, target_ess=250.0
    )
    ess = effective_sample_size(beta * log_likelihood)
    assert jnp.allclose(ess, 250.0, rtol=1e-2)
    assert (
        next_tempering_param(
            lambda b: 0 * log_likelihood, equal, zero, one, target_ess=250.0
        )
        == 1
    )


def test_cloud_counts_nan_as_zero_weight():
    cloud = ParticleWeights.uniform(4, proper=True)
    cloud = cloud.reweight(jnp.array([0.0, jnp.nan, 0.0, jnp.inf]))
    assert float(cloud.ess) == pytest.approx(2.0)
    assert float(cloud.log_evidence) == pytest.approx(np.log(0.5))


def test_error_sees_lost_ancestors():
    """Equal weights that descend from 2 of 4 draws are worth 2 draws."""
    weights = ParticleWeights.uniform(4, proper=True)
    assert float(weights.effective_num_ancestors) == pytest.approx(4.0)
    assert float(weights.total_log_evidence_variance) == pytest.approx(0.0, abs=1e-6)
    weights = weights.reweight(jnp.log(jnp.array([1.0, 1.0, 1e-9, 1e-9])))
    ancestors, weights = resample(jax.random.key(0), weights, ess_threshold=0.75)
    assert ancestors.tolist() == [0, 0, 1, 1] == weights.eve.tolist()
    assert float(weights.log_evidence_variance) == pytest.approx(1 / 2 - 1 / 4)
    for _ in range(3):  # nothing is lost in the weights, but ancestors die out
        ancestors, weights = resample(
            jax.random.key(1),
            weights,
            ess_threshold=0.75,
            force=True,
            order=jnp.array([3, 2, 1, 0]),
        )
    assert int(weights.num_ancestors) == 2
    weights = weights._replace(eve=jnp.zeros(4, int))
    assert float(weights.effective_num_ancestors) == pytest.approx(1.0)
    assert float(weights.total_log_evidence_variance) == pytest.approx(3 / 4)
    improper = weights._replace(log_evidence=jnp.asarray(jnp.nan))
    assert jnp.isnan(improper.total_log_evidence_variance)


def test_few_ancestors_are_below_ten_or_a_quarter():
    effective = jnp.array([9.9, 10.1])
    assert has_few_ancestors(effective, 1000).tolist() == [True, False]
    assert has_few_ancestors(jnp.array([3.9, 4.1]), 16).tolist() == [True, False]


def test_temperatures_are_spread_over_the_levels_left():
    """ESS of a step in beta is N / (1 + (length / levels)^2) for Normal log L."""
    log_likelihood = dist.Normal(0, 2).sample(jax.random.key(0), (4000,))
    weights = ParticleWeights.uniform(4000, proper=True)
    beta, sd = jnp.asarray(0.1), float(log_likelihood.std())
    share = even_ess_share(log_likelihood, weights, beta, jnp.asarray(5))
    length = 0.1 * sd * np.log(10)
    assert float(share) == pytest.approx(1 / (1 + (length / 5) ** 2), rel=1e-4)
    # impossible particles do not count, and few levels left may lose half at most
    holes = log_likelihood.at[:100].set(-jnp.inf)
    assert 0.9 < float(even_ess_share(holes, weights, beta, jnp.asarray(5))) < 1
    assert float(even_ess_share(100 * holes, weights, beta, jnp.asarray(1))) == 0.5
    assert float(even_ess_share(holes, weights, jnp.zeros(()), jnp.asarray(5))) == 0.5


FEATURES = np.random.default_rng(0).normal(size=(30, 6))
COEFFICIENTS = np.array([1.0, -0.5, 0.8, 0.3, -0.9, 0.6])
SQUARES = (FEATURES @ COEFFICIENTS) ** 2
SQUARES = SQUARES + 0.5 * np.random.default_rng(1).normal(size=30)


def sign_symmetric(squares):
    """Squares tell nothing of the sign; the prior favors positive coefficients."""
    w = numpyro.sample("w", dist.Normal(0.7, 1.0).expand([6]).to_event(1))
    mean = (jnp.asarray(FEATURES) @ w) ** 2
    numpyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=squares)


def sign_symmetric_evidence():
    """Return log evidence and share of the positive mode, by importance sampling."""
    log_masses = []
    with jax.enable_x64(True):
        features, squares = jnp.asarray(FEATURES), jnp.asarray(SQUARES)

        def log_joint(w):
            misfit = ((features @ w) ** 2 - squares) / 0.5
            log_prior = dist.Normal(0.7, 1.0).log_prob(w).sum()
            return log_prior - 0.5 * misfit @ misfit - 30 * jnp.log(0.5 * SQRT_2_PI)

        for sign in (1, -1):
            mode = jnp.asarray(sign * COEFFICIENTS)
            for _ in range(20):  # Newton
                hessian = jax.hessian(log_joint)(mode)
                mode = mode - jnp.linalg.solve(hessian, jax.grad(log_joint)(mode))
            covariance = -1.2 * jnp.linalg.inv(hessian)
            proposal = dist.MultivariateStudentT(
                8.0, mode, jnp.linalg.cholesky(covariance)
            )
            w = proposal.sample(jax.random.key(0), (50_000,))
            log_weight = jax.vmap(log_joint)(w) - proposal.log_prob(w)
            assert effective_sample_size(log_weight) > 30_000
            log_masses.append(float(jax.nn.logsumexp(log_weight) - jnp.log(len(w))))
    log_evidence = np.logaddexp(*log_masses)
    return log_evidence, np.exp(log_masses[0] - log_evidence)


SQRT_2_PI = np.sqrt(2 * np.pi)


@pytest.mark.slow
def test_lost_ancestors_are_seen():
    """Two modes of shares .86 and .14 in 6 dimensions: right, or with a warning."""
    log_evidence, share = sign_symmetric_evidence()
    squares = jnp.asarray(SQUARES, float)
    options = {"num_chains": 500, "steps_per_level": 2}
    with pytest.warns(UserWarning, match=r"effective number of \d\.\d draws"):
        _, weights = cloud_of(sign_symmetric, squares, num_warmup=100, **options)
    first_order = float(weights.log_evidence_variance) ** 0.5
    assert float(weights.total_log_evidence_variance) ** 0.5 > 2 * first_order
    options["steps_per_level"] = 25
    draws, weights = cloud_of(sign_symmetric, squares, num_warmup=1000, **options)
    error = float(weights.total_log_evidence_variance) ** 0.5
    assert error < 0.3
    assert abs(float(weights.log_evidence) - log_evidence) < 4 * error
    found = np.mean(np.asarray(draws["w"]) @ COEFFICIENTS > 0)
    ancestors = float(weights.effective_num_ancestors)
    assert ancestors > 20
    assert abs(found - share) < 3 * np.sqrt(share * (1 - share) / ancestors)


# levels and steps of Song and Ermon


def test_levels_follow_the_largest_distance_and_the_dimension():
    data = np.random.default_rng(0).normal(size=(1203, 24)) * 7 + 100
    levels = levels_from_data(jnp.asarray(data.reshape(-1, 4, 6)), 0.05)
    standard = (data - data.mean(0)) / data.std(0)
    assert levels[0] == pytest.approx(pdist(standard).max(), rel=1e-4)
    assert levels[-1] == 0.05
    ratios = np.divide(levels[:-1], levels[1:])
    assert np.allclose(ratios, ratios[0])
    assert level_ratio(24) / 1.05 < ratios[0] <= level_ratio(24)


@pytest.mark.parametrize("dimension", [100, 3072])
def test_shells_of_neighboring_levels_overlap_by_half(dimension):
    """Half of the draws of one level lie within three sd of the next shell's radius."""
    ratio = level_ratio(dimension)
    noise = np.random.default_rng(0).chisquare(dimension, 100_000) ** 0.5
    # Song and Ermon's shell: radius sqrt(D) sigma, sd sigma / sqrt(2)
    shell = ratio * np.sqrt(dimension)
    share = np.mean(np.abs(noise - shell) < 3 * ratio / np.sqrt(2))
    assert share == pytest.approx(0.5, abs=0.04)
    wider = (2 * ratio - 1) * np.sqrt(dimension)
    assert np.mean(np.abs(noise - wider) < 3 * ratio / np.sqrt(2)) < 0.1


def test_lowest_level_must_be_below_the_largest_distance():
    with pytest.raises(ValueError, match="`lowest` must be positive and below"):
        levels_from_data(jnp.eye(3), 10.0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")
@pytest.mark.slow
def test_steps_follow_the_rule_of_song_and_ermon():
    """h_i = sqrt(eps) sigma_i / sigma_L at learned sites, on every level."""
    levels, epsilon = [10.0, 1.0, 0.3, 0.1], 1e-4
    kernel = AnnealedLangevin(
        learned_mixture, levels=levels, adapt_step_size=False, step_size=epsilon**0.5
    )
    keys = jax.random.split(jax.random.key(0), 40)
    sample = jax.jit(lambda state: kernel.sample(state, (0.0,), {}))
    for key in (jax.random.key(0), keys):
        state = kernel.init(key, 10, None, (0.0,), {})
        lowest = SDE.noise_level(SDE.t_min)
        for level in [*levels[:4], float(lowest)][: state.plan.num_levels]:
            state = sample(state)
            adapted = state.adapt_state
            step = adapted.step_size * adapted.mass_matrix_sqrt_inv[-1]
            expected = epsilon**0.5 * level / lowest
            assert np.allclose(step, expected, rtol=1e-3)
            assert np.allclose(adapted.mass_matrix_sqrt_inv[0], 1.0)


def test_bad_levels_are_refused():
    with pytest.raises(ValueError, match="`levels` must be an integer"):
        AnnealedLangevin(conjugate, levels=0)
    with pytest.raises(ValueError, match="`step_size` must be positive"):
        AnnealedLangevin(conjugate, step_size=-1.0)
    key = jax.random.key(0)
    with (
        pytest.raises(ValueError, match="`num_warmup` must hold"),
    ):
        AnnealedLangevin(conjugate, levels=20).init(key, 10, None, (2.0,), {})
    with pytest.raises(ValueError, match="`levels` must decrease"):
        AnnealedLangevin(learned_mixture, levels=[1.0, 2.0]).init(
            key, 10, None, (2.0,), {}
        )


def test_learned_sites_must_share_a_process():
    def model():
        for name, sde in (("a", VE()), ("b", VP())):
            score = ScoreModel.from_fn(lambda x, t: -x, sde, ())
            numpyro.sample(name, ScoreDistribution(score))

    with pytest.raises(ValueError, match="share one noise process"):
        AnnealedLangevin(model).init(jax.random.key(0), 100)


def scaled_normal(noise, weight=1.0):
    """A learned normal site with the scale 3, observed through noise, and others."""
    sde = VE(0.1, 60.0)
    score = ScoreModel.from_fn(
        lambda x, t: -x / (9 * (1 + sde.sigma(t) ** 2)), sde, (2,)
    )
    score = replace(score, standardize=Affine(jnp.zeros(2), jnp.full(2, 3.0)))
    score = replace(score, denoiser=NormalDenoiser())

    def model():
        x = numpyro.sample("x", ScoreDistribution(score))
        with numpyro.handlers.scale(scale=weight):
            numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=jnp.array([2.0, 9]))

    return AnnealingPath.of(model, (), {}, num_nodes=3, num_reverse=1), sde


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormalDenoiser:
    def __call__(self, x, level, context=None):
        return x / (1 + level**2)


@pytest.mark.parametrize(("level", "noise"), [(2.0, 1.5), (0.5, 6.0)])
def test_noise_widens_a_normal_likelihood_by_the_variance_left(level, noise):
    """By C over the variance of an observation, in units of the data's sd of 3."""
    path, sde = scaled_normal(noise)
    z = {"x": jnp.array([1.0, -4.0]), "b": jnp.zeros(()), "flat": jnp.zeros(())}
    t = sde.time(jnp.array(level))
    found = jax.jit(path.likelihood_variance_inflation)(z, t)
    # of x at its own level of .1, given that at the level
    left = (level**2 - 0.1**2) * (1 + 0.1**2) / (1 + level**2)
    assert float(found) == pytest.approx(9 * left / noise**2, rel=1e-3)


def test_scales_of_steps_are_those_of_the_law_left_and_of_its_noise():
    path, sde = scaled_normal(1.0)
    z = {"x": jnp.zeros(2), "b": jnp.zeros(()), "flat": jnp.zeros(())}
    t = sde.time(jnp.array(2.0))
    left, noise = path.denoising_sd(z, t), path.ncsn_step_scales(z, t)
    np.testing.assert_allclose(left["x"], 3 * (4 / 5) ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(noise["x"], 3 * 2.0 / 0.1, rtol=1e-4)
    assert left["b"] == noise["b"] == 1


@pytest.mark.parametrize(("weight", "undrawn"), [(1.0, ["flat"]), (2.0, ["b", "flat"])])
def test_priors_that_are_improper_or_weighted_are_not_drawn(weight, undrawn):
    path, _ = scaled_normal(1.0, weight)
    assert sorted(path.undrawn_sites()) == undrawn


@pytest.mark.parametrize(
    ("gone", "last", "before", "power"),
    [(0.5, False, 0.0, 0.125), (0.5, False, 0.4, 0.4), (0.9, True, 0.1, 1.0)],
)
def test_power_of_the_likelihood_by_the_share_of_levels(gone, last, before, power):
    path = SimpleNamespace(sample_reverse=lambda key, z, t, s: z, learned={})
    step = AnnealingStep(0.5, 0.4, jnp.array(gone), 3, jnp.array(last))
    z = {"x": jnp.ones(2)}
    with unchecked():
        found, beta = _anneal_chain(jax.random.key(0), z, jnp.array(before), step, path)
    assert found == z
    assert float(beta) == pytest.approx(power)
