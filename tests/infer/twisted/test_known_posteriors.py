"""ScoreSDE against posteriors and evidence that are known; mutants are not right."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp

from numpyro_score import VE, VP, ScoreDistribution, ScoreModel, ScoreSDE
from numpyro_score.infer.twisted import sampler as sampler_module
from numpyro_score.smc.rqmc import normal_like
from tests.infer.twisted.problems import (
    EVIDENCE,
    LONG,
    NORMAL,
    NUM_DRAWS,
    PROCESS,
    Y,
    conjugate,
    scalar,
)
from tests.targets import MIXTURE, LinearProblem, Mixture, sliced_wasserstein, z_scores


# slow: laws that need many particles, and mutants beside them
@pytest.fixture(scope="module")
def problem():
    return LinearProblem.draw(1, 8, 4)


def linear_model(problem):
    process = VE(0.02, 230.0)
    weights, locs = (
        jnp.asarray(problem.weights, float),
        jnp.asarray(problem.locs, float),
    )

    def score(x, t):
        variance = 1 + process.sigma(t) ** 2
        square = jnp.sum((x - locs) ** 2, 1)
        shares = jax.nn.softmax(jnp.log(weights) - 0.5 * square / variance)
        return (shares @ locs - x) / variance

    law = ScoreModel.from_fn(score, process, (locs.shape[1],))

    def model(operator, sd, y):
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(operator @ x, sd).to_event(1), obs=y)

    values = problem.operator, problem.sd, problem.y
    return model, tuple(jnp.asarray(value, float) for value in values)


@pytest.mark.slow
def test_mixture_posterior_and_evidence(problem):
    model, args = linear_model(problem)
    inference = scalar(model, *args, levels=100)
    draws = np.asarray(inference.get_samples()["x"], float)
    exact, again = (problem.sample_posterior(seed, NUM_DRAWS) for seed in (1, 2))
    floor = sliced_wasserstein(again, exact)
    assert sliced_wasserstein(draws, exact) < 1.5 * floor
    assert abs(inference.log_evidence - problem.log_evidence()) < 0.1


MODES, SHARES, MODE_SD = jnp.array([-1.0, 1.0]), jnp.array([0.3, 0.7]), 0.3


def two_modes_score(x, t):
    """Score of a prior of two modes with the noise of PROCESS."""
    variance = MODE_SD**2 + PROCESS.sigma(t) ** 2

    def log_density(x):
        return jax.nn.logsumexp(jnp.log(SHARES) - (x - MODES) ** 2 / (2 * variance))

    return jax.grad(log_density)(x)


SHARP = {
    "Student": (lambda x: dist.StudentT(2.0, x, 0.05), [-0.2]),
    "Cauchy": (lambda x: dist.Cauchy(x, 0.02), [0.1]),
    "Laplace": (lambda x: dist.Laplace(x, 0.03), [-0.2]),
    "outliers": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.9, 0.1])),
            dist.Normal(x[..., None], jnp.array([0.03, 1.0])),
        ),
        [-0.2],
    ),
    "scale": (lambda x: dist.StudentT(3, 0, jnp.exp(x)), [0.4]),
    "several": (lambda x: dist.StudentT(2.0, x, 0.1), [-0.2, -0.1, -0.3, 1.5, -0.25]),
}


def check_two_modes(noise, y):
    """Compare shares of modes and evidence with quadrature."""
    score = ScoreModel.from_fn(two_modes_score, PROCESS, ())

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", noise(x), obs=y)

    inference = scalar(model, jnp.array(y), num_particles=2000, num_samples=2000)
    grid = jnp.linspace(-4, 4, 200_001)
    sd = (MODE_SD**2 + PROCESS.sigma_min**2) ** 0.5
    prior = dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(MODES, sd))
    log_joint = prior.log_prob(grid) + sum(noise(grid).log_prob(value) for value in y)
    density = jnp.exp(log_joint - log_joint.max())
    evidence = jnp.log(density.mean() * 8) + log_joint.max()
    share = (density * (grid > 0)).sum() / density.sum()
    assert inference.log_evidence_error < 0.15
    assert abs(inference.log_evidence - evidence) < 0.2
    assert abs((inference.get_samples()["x"] > 0).mean() - share) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("law", SHARP)
def test_sharp_heavy_tailed_likelihoods_have_their_evidence(law):
    """A power of such a likelihood is a spike: few particles were left, 2 nats off."""
    check_two_modes(*SHARP[law])


STEEP = {
    "no count": (lambda x: dist.Poisson(jnp.exp(3 * x)), [0]),
    "a failure": (lambda x: dist.Bernoulli(logits=15 * x), [0]),
    "failures": (lambda x: dist.Bernoulli(logits=4 * x), [0] * 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", STEEP)
def test_steep_likelihoods_have_their_evidence(law):
    """At the mean alone they are steps, which lose the near tail of a far mode."""
    check_two_modes(*STEEP[law])


@dataclass(frozen=True)
class Mutant:
    """A mistake in the sampler: what to replace, by what."""

    name: str
    attribute: str
    replacement: Any


def without_correction(noise, z, evaluation, power, step, twist):
    """A guided proposal whose density ratio is forgotten."""
    moved, log_ratio = PROPAGATE(noise, z, evaluation, power, step, twist)
    return moved, jnp.zeros_like(log_ratio)


def without_exact_end(twist, z, t, last, beta):
    """A twist that stays off: the likelihood is never used itself."""
    evaluation = EVALUATE(twist, z, t, last, beta)
    return evaluation._replace(log_twist=0.5 * evaluation.log_twist)


PROPAGATE, EVALUATE = sampler_module._propagate, sampler_module._evaluate
MUTANTS = [
    Mutant("no proposal correction", "_propagate", without_correction),
    Mutant("end not exact", "_evaluate", without_exact_end),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail(mutant, monkeypatch):
    monkeypatch.setattr(sampler_module, mutant.attribute, mutant.replacement)

    def fresh(y):  # another function, so that the program is compiled anew
        conjugate(y)

    inference = scalar(fresh, Y, num_moves=0)
    wrong = abs(inference.log_evidence - EVIDENCE)
    off = z_scores(inference.get_samples()["x"], 1.0)
    print(f"{mutant.name}: log Z off by {wrong:.3f}, mean off by {off:.1f} se")
    assert wrong > 0.05 or off > 5


def as_noise(learned, t):
    """A start at noise, whatever the data."""
    starts = INITIAL_GAUSSIANS(learned, t)
    return {k: s._replace(shrinkage=0 * s.shrinkage) for k, s in starts.items()}


def unweighted(z, learned, t, starts):
    return jnp.zeros(())


INITIAL_GAUSSIANS = sampler_module.initial_gaussians


APART = Mixture((0.3, 0.7), ((-20.0,), (20.0,)), (1.0, 1.0))


STARTS = [
    (LONG, "initial_log_weight", sampler_module.initial_log_weight, True),
    (APART, "initial_log_weight", sampler_module.initial_log_weight, True),
    (LONG, "initial_gaussians", as_noise, False),
    (APART, "initial_log_weight", unweighted, False),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ScoreSDE")
@pytest.mark.parametrize(("law", "name", "change", "right"), STARTS)
def test_data_that_noise_does_not_hide(law, name, change, right, monkeypatch):
    """Evidence of y = x_0 + 10 n = 25; mutants start wrong, with equal weights."""
    monkeypatch.setattr(sampler_module, name, change)
    if name == "initial_gaussians":
        monkeypatch.setattr(sampler_module, "initial_log_weight", unweighted)

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(law.score_model(PROCESS)))
        numpyro.sample("y", dist.Normal(x[0], 10.0), obs=y)

    locs = np.array(law.locs if law is APART else [law.mean])[:, 0]
    scales = np.array(law.scales if law is APART else law.sd[:1])
    weights = np.array(law.weights if law is APART else [1.0])
    densities = np.exp(dist.Normal(locs, np.hypot(scales, 10.0)).log_prob(25.0))
    exact = np.log(weights @ densities)
    inference = scalar(model, jnp.array(25.0), num_particles=4000, levels=100)
    error = abs(inference.log_evidence - exact)
    print(f"log Z off by {error:.3f}")
    assert np.isfinite(error)
    assert (error < 0.05) == right


def vague(y):
    x = numpyro.sample("x", ScoreDistribution(MIXTURE.score_model(PROCESS)))
    numpyro.sample("y", dist.Normal(x[0], 3.0), obs=y)


def independent_noise(key, like, size, axes):
    return normal_like(key, like, size)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, independent_noise])
def test_even_noise_makes_shares_of_modes_vary_less(mutant, monkeypatch):
    if mutant is not None:
        monkeypatch.setattr(sampler_module, "rqmc_normal", mutant)
    size, chains = 400, 48
    options = {"num_samples": size, "num_particles": size, "num_chains": chains}

    def fresh(y):
        vague(y)

    inference = scalar(fresh, Y, num_moves=0, **options)
    draws = inference.get_samples(group_by_chain=True)["x"]
    shares = np.asarray(draws[..., 0] > -0.3).mean(1)
    variance = shares.mean() * (1 - shares.mean()) / size  # of independent draws
    if mutant is None:
        assert shares.var() < 0.5 * variance
    else:
        assert shares.var() > 0.5 * variance


def unknown_scale(y):
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, sd).expand(y.shape), obs=y)


@pytest.mark.slow
def test_ordinary_site_agrees_with_quadrature():
    y = np.array([2.0, 2.3, 1.2])
    x, log_sd = np.linspace(-6, 6, 1201), np.linspace(-6, 2.5, 1000)
    X, S = np.meshgrid(x, np.exp(log_sd), indexing="ij")
    log_joint = -0.5 * X**2 - 0.5 * S**2 + np.log(S) + np.log(2) - np.log(2 * np.pi)
    for value in y:
        log_joint += -0.5 * ((value - X) / S) ** 2 - np.log(S * np.sqrt(2 * np.pi))
    mass = np.exp(log_joint)
    evidence = np.log(mass.sum() * (x[1] - x[0]) * (log_sd[1] - log_sd[0]))
    mass /= mass.sum()
    inference = scalar(
        unknown_scale, jnp.asarray(y, float), num_samples=4000, num_particles=4000
    )
    draws = inference.get_samples()
    for values, grid in ((draws["x"], X), (draws["sd"], S)):
        for power in (1, 2):
            # draws share ancestors: a tenth of the standard deviation is generous
            expected = (mass * grid**power).sum()
            assert np.all(z_scores(values**power, expected, 0.02) < 5)
    assert abs(inference.log_evidence - evidence) < 0.1


def square(y):
    x = numpyro.sample("x", ScoreDistribution(MIXTURE.score_model(PROCESS)))
    numpyro.sample("y", dist.Normal(jnp.sum(x**2), 0.2), obs=y)


def rate(y):
    x = numpyro.sample("x", ScoreDistribution(MIXTURE.score_model(PROCESS)))
    numpyro.sample("y", dist.Poisson(jnp.exp(x[0] * x[1] + 1)), obs=y)


def log_square(x):
    return -0.5 * ((1.0 - (x**2).sum(1)) / 0.2) ** 2


def log_rate(x):
    log_mean = x[:, 0] * x[:, 1] + 1
    return 9 * log_mean - np.exp(log_mean)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "y", "log_likelihood"), [(square, 1.0, log_square), (rate, 9, log_rate)]
)
def test_nonlinear_likelihood_agrees_with_quadrature(model, y, log_likelihood):
    axis = np.linspace(-4, 4, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    prior = jax.vmap(lambda x: MIXTURE.log_density(x, 1.0, PROCESS.sigma_min))
    log_joint = np.asarray(prior(jnp.asarray(grid, float)), float)
    log_joint = log_joint + log_likelihood(grid)
    mass = np.exp(log_joint - log_joint.max())
    mass /= mass.sum()
    inference = scalar(
        model, jnp.asarray(y), num_samples=4000, num_particles=4000, levels=100
    )
    draws = np.asarray(inference.get_samples()["x"], float)
    mean = mass @ grid
    sd = np.sqrt(mass @ grid**2 - mean**2)
    assert np.all(np.abs(draws.mean(0) - mean) < 0.1 * sd)
    assert np.all(np.abs(draws.std(0) / sd - 1) < 0.1)
    share = mass[grid[:, 0] > -0.3].sum()
    assert abs((draws[:, 0] > -0.3).mean() - share) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("y", "law"), [((2.0, 0.9), dist.Normal), ((2.0, -0.9), partial(dist.StudentT, 50))]
)
def test_evidence_of_quadratic_observations(y, law):
    """Curved in every direction: few probes, or first-order widths, lose nats."""

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(MIXTURE.score_model(PROCESS)))
        locs = jnp.stack([jnp.sum(x**2), x[0] * x[1]])
        numpyro.sample("y", law(locs, 0.2).to_event(1), obs=y)

    axis = np.linspace(-4, 4, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    prior = jax.vmap(lambda x: MIXTURE.log_density(x, 1.0, PROCESS.sigma_min))
    locs = np.stack([(grid**2).sum(1), grid[:, 0] * grid[:, 1]], axis=1)
    log_joint = np.asarray(prior(jnp.asarray(grid, float)), float)
    log_joint += np.asarray(law(locs, 0.2).log_prob(np.array(y)), float).sum(1)
    exact = logsumexp(log_joint) + 2 * np.log(axis[1] - axis[0])
    inference = scalar(model, jnp.array(y))
    assert float(inference.log_evidence_error) < 0.15
    assert abs(float(inference.log_evidence) - exact) < 0.2
    share = np.exp(log_joint - logsumexp(log_joint))[grid[:, 0] > -0.3].sum()
    draws = np.asarray(inference.get_samples()["x"])
    assert abs((draws[:, 0] > -0.3).mean() - share) < 0.06


@pytest.mark.slow
def test_evidence_of_a_cube_a_product_and_a_square():
    """The cube rises on both sides of points where it is flat."""
    means, shares, sd, sde = np.array([[1, 1, 0], [-1, 0, 1]]), (0.6, 0.4), 0.6, VP()

    def score(x, t):
        variance = jnp.square(sde.alpha(t) * sd) + jnp.square(sde.sigma(t))
        away = sde.alpha(t) * jnp.asarray(means) - x
        logits = jnp.log(jnp.array(shares)) - 0.5 * jnp.sum(away**2, -1) / variance
        return jax.nn.softmax(logits) @ away / variance

    law = ScoreModel.from_fn(score, sde, (3,))

    def locs(x):
        square = jnp.sum(x**2, -1)
        return jnp.stack([x[..., 0] ** 3, x[..., 1] * x[..., 2], square], -1)

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(locs(x), 0.15).to_event(1), obs=y)

    y, rng = jnp.array([0.8, 0.2, 1.6]), np.random.default_rng(0)
    draws = means[rng.choice(2, 1_000_000, p=shares)]
    draws = draws + sd * rng.normal(size=draws.shape)
    log_likelihood = dist.Normal(locs(jnp.asarray(draws)), 0.15).log_prob(y).sum(-1)
    exact = logsumexp(np.asarray(log_likelihood, float)) - np.log(len(draws))
    inference = scalar(model, y, num_samples=2000, num_particles=2000)
    assert float(inference.log_evidence_error) < 0.1
    assert abs(float(inference.log_evidence) - exact) < 0.1


@pytest.mark.slow
def test_several_learned_sites_in_plates():
    """Two laws, one of them in a plate, a joint Normal: a Gaussian posterior."""

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(NORMAL))
        with numpyro.plate("rows", 2):
            z = numpyro.sample("z", ScoreDistribution(NORMAL))
            numpyro.sample("y", dist.Normal(x + z, 0.5), obs=y)

    y = jnp.array([1.0, -0.5])
    design = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    covariance = np.linalg.inv(np.eye(3) + design.T @ design / 0.25)
    mean = covariance @ design.T @ np.asarray(y) / 0.25
    inference = scalar(model, y, num_samples=4000, num_particles=4000)
    draws = inference.get_samples()
    stacked = np.concatenate([draws["x"][:, None], draws["z"]], -1)
    assert np.all(z_scores(stacked, mean, 0.01) < 5)
    assert np.allclose(np.cov(stacked.T), covariance, atol=0.05)


@pytest.mark.slow
def test_random_field_agrees_with_the_wiener_filter():
    """A Gaussian random field with a steep spectrum, every second point seen."""
    size, noise = 16, 0.3
    process = VE(0.003, 20.0)
    place = np.arange(size)
    covariance = np.exp(-0.5 * ((place[:, None] - place) / 2.0) ** 2)
    values, vectors = np.linalg.eigh(covariance + 1e-4 * np.eye(size))
    values, vectors = jnp.asarray(values, float), jnp.asarray(vectors, float)

    def score(x, t):
        return -vectors @ ((vectors.T @ x) / (values + process.sigma(t) ** 2))

    law = ScoreModel.from_fn(score, process, (size,))

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(x[::2], noise).to_event(1), obs=y)

    y = np.sin(place[::2] / 2.0) + 0.3
    prior = covariance + (1e-4 + process.sigma_min**2) * np.eye(size)
    seen = np.eye(size)[::2]
    gain = prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + noise**2 * np.eye(8))
    mean, posterior = gain @ y, prior - gain @ seen @ prior
    inference = scalar(
        model, jnp.asarray(y, float), num_samples=20_000, num_particles=20_000
    )
    draws = np.asarray(inference.get_samples()["x"], float)
    error = np.linalg.norm(draws.mean(0) - mean) / np.linalg.norm(mean)
    assert error < 0.01
    ratio = draws.std(0) / np.sqrt(np.diag(posterior))
    assert np.all(np.abs(ratio - 1) < 0.04)
    assert abs(ratio.mean() - 1) < 0.02


@pytest.mark.slow
def test_curves_of_a_gaussian_process_have_their_posterior_and_evidence():
    """64 strongly correlated numbers, eigenvalues from 28 to 0: the exact Gaussian."""
    rng, times = np.random.default_rng(0), np.linspace(0, 1, 64)
    covariance = np.exp(-0.5 * ((times[:, None] - times) / 0.2) ** 2)
    variance, axes = np.linalg.eigh(covariance)
    variance = np.maximum(variance, 0.0)

    def score(u, t):
        basis = jnp.asarray(axes, float)
        noisy = jnp.asarray(variance, float) + PROCESS.sigma(t) ** 2
        return -basis @ ((basis.T @ u) / noisy)

    law, seen, sd = (
        ScoreModel.from_fn(score, PROCESS, (64,)),
        [3, 14, 25, 37, 48, 60],
        0.3,
    )
    curve = axes @ (np.sqrt(variance) * rng.normal(size=64))
    y = curve[seen] + sd * rng.normal(size=6)

    def model(y):
        f = numpyro.sample("f", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(f[jnp.array(seen)], sd).to_event(1), obs=y)

    prior = covariance + PROCESS.sigma_min**2 * np.eye(64)
    evidence = prior[np.ix_(seen, seen)] + sd**2 * np.eye(6)
    gain = prior[:, seen] @ np.linalg.inv(evidence)
    posterior_sd = np.sqrt(np.diag(prior - gain @ prior[seen]))
    log_evidence = -0.5 * y @ np.linalg.solve(evidence, y)
    log_evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * evidence)[1]
    inference = scalar(model, jnp.asarray(y, float), num_particles=400, levels=60)
    assert abs(inference.log_evidence - log_evidence) < 3 * inference.log_evidence_error
    assert inference.log_evidence_error < 0.1
    effective = float(inference.get_extra_fields()["effective_num_ancestors"][0])
    assert effective > 100
    draws = np.asarray(inference.get_samples()["f"], float)
    offset = (draws.mean(0) - gain @ y) / posterior_sd
    assert np.all(np.abs(offset) < 3 / np.sqrt(effective))
    ratio = draws.std(0) / posterior_sd
    assert np.all(np.abs(ratio - 1) < 3 / np.sqrt(2 * effective))


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_scores_that_claim_negative_variance_leave_the_posterior_right(shape):
    # denoisers of a score that is 1 % too strong fall above the level of 10
    def score(x, t):
        return -1.01 * x / (1 + PROCESS.noise_level(t) ** 2)

    law = ScoreModel.from_fn(score, PROCESS, event_shape=shape)

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(jnp.exp(x[0]), 0.3), obs=y)

    options = {"num_samples": 400, "num_particles": 400, "levels": 40}
    sampler = ScoreSDE(model, covariance="jacobian", progress_bar=False, **options)
    sampler.run(jax.random.key(1), 1.6)
    draws = np.asarray(sampler.get_samples()["x"])[:, 0]

    grid = np.linspace(-6, 6, 20001)
    density = np.exp(-(grid**2) / 2 - (1.6 - np.exp(grid)) ** 2 / (2 * 0.3**2))
    density /= density.sum()
    mean = density @ grid
    sd = np.sqrt(density @ (grid - mean) ** 2)
    assert abs(draws.mean() - mean) < 0.3 * sd
    assert abs(np.log(draws.std() / sd)) < 0.25
