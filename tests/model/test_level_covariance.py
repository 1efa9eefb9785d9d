"""One covariance of x_0 given x_t per level: exact values, and ScoreSDE with it."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import VE, ScoreDistribution, ScoreModel
from numpyro_score.infer import DPS, ScoreSDE
from numpyro_score.infer.twisted import run as run_module
from numpyro_score.infer.twisted.run import num_derivatives, partition_arguments
from numpyro_score.infer.twisted.sampler import twisted_smc
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.level_covariance import (
    LevelCovariance,
    _trace,
    measure_covariance,
)
from tests.targets import MIXTURE, STANDARD_NORMAL, Mixture

PROCESS = VE(0.05, 20.0)
PRIOR = np.array([[2.0, 0.9, 0.0], [0.9, 0.5, 0.1], [0.0, 0.1, 1.0]])
NORMAL = STANDARD_NORMAL.score_model(PROCESS)


def correlated() -> ScoreModel:
    covariance = jnp.asarray(PRIOR, float)

    def score(x, t):
        noisy = covariance + PROCESS.sigma(t) ** 2 * jnp.eye(3)
        return -jnp.linalg.solve(noisy, x)

    return ScoreModel.from_fn(score, PROCESS, (3,))


@pytest.fixture(scope="module")
def measured():
    score = correlated()
    return score, jax.jit(measure_covariance)(score)


@pytest.mark.parametrize("end", [0.05, 0.6])
@pytest.mark.parametrize("level", [0.7, 3.0, 20.0])
def test_gaussian_law_has_its_conditional_covariance(measured, level, end):
    """x_s = x_0 + s n, x_t = x_s + (t^2 - s^2)^(1/2) n: a Gaussian conditional."""
    score, covariance = measured
    law = ScoreDistribution(score, t=PROCESS.time(end))
    t = PROCESS.time(level)
    product = jax.jit(lambda v: covariance.product(law, t, v))(jnp.eye(3))
    prior = PRIOR + end**2 * np.eye(3)
    exact = (
        prior - prior @ np.linalg.inv(prior + (level**2 - end**2) * np.eye(3)) @ prior
    )
    error = np.linalg.norm(product - exact, 2) / np.linalg.norm(exact, 2)
    assert error < 0.12  # 1000 draws
    root = jax.jit(lambda v: covariance.product(law, t, v, root=True))(jnp.eye(3))
    assert np.allclose(root @ root, product, atol=1e-5)


def test_nothing_is_unknown_at_the_level_of_the_site(measured):
    score, covariance = measured
    for end in (0.05, 0.6):
        law = ScoreDistribution(score, t=PROCESS.time(end))
        at_end = covariance.product(law, law.t, jnp.ones((2, 3)))
        assert np.abs(at_end).max() < 1e-3 * end


@pytest.mark.parametrize("level", [0.3, 1.0, 4.0])
def test_trace_is_the_error_of_the_denoiser(level):
    """A mixture: the mean of |x_0 - D|^2 by other draws, not that of a Gaussian."""
    score = MIXTURE.score_model(PROCESS)
    covariance = jax.jit(measure_covariance)(score)
    law, t = ScoreDistribution(score), PROCESS.time(level)
    trace = float(jnp.trace(covariance.product(law, t, jnp.eye(2))))
    keys = jax.random.split(jax.random.key(5), 3)
    low = PROCESS.sigma_min
    clean = MIXTURE.sample(keys[0], (20_000,))
    clean = clean + low * jax.random.normal(keys[1], clean.shape)
    rise = level**2 - low**2
    noisy = clean + rise**0.5 * jax.random.normal(keys[2], clean.shape)

    @jax.jit
    @jax.vmap
    def error(clean, noisy):
        mean = score.reverse_transition(noisy, t, PROCESS.t_min)[0]
        return jnp.square(clean - mean).sum()

    exact = float(error(clean, noisy).mean())
    values = np.linalg.eigvalsh(np.cov(np.asarray(clean).T))
    gaussian = (values * rise / (values + rise)).sum()
    assert trace == pytest.approx(exact, rel=0.12)
    if level == 0.3:
        assert exact < 0.9 * gaussian  # so the scale is no formality


def test_trace_counts_all_axes_that_are_left_out():
    """l r^2 / (l + r^2) for 2, 1 and eight times 1/2, at r^2 = 2."""
    variance, rest, rise = map(jnp.array, ([2.0, 1.0], 0.5, 2.0))
    exact = 1.0 + 2 / 3 + 8 * 0.4
    assert float(_trace(variance, rest, rise, 10)) == pytest.approx(exact)


def test_large_laws_keep_their_variance():
    """300 numbers, more than there are axes: the rest shares one variance."""
    sd = np.r_[3.0, np.ones(299)]
    variance = jnp.asarray(sd**2, float)
    score = ScoreModel.from_fn(
        lambda x, t: -x / (variance + PROCESS.sigma(t) ** 2), PROCESS, (300,)
    )
    covariance = jax.jit(measure_covariance)(score)
    assert covariance.axes.shape == (300, 250)
    total = covariance.variance.sum() + 50 * covariance.rest
    assert float(total) == pytest.approx((sd**2).sum(), rel=0.1)
    law, unit = ScoreDistribution(score), jnp.zeros(300).at[0].set(1.0)
    along = covariance.product(law, PROCESS.time(3.0), unit)[0]
    assert float(along) == pytest.approx(4.5, rel=0.12)


def test_draws_that_are_not_finite_are_left_out():
    def score(x, t):
        good = -x / (1 + PROCESS.sigma(t) ** 2)
        return jnp.where(x > 1.5, jnp.nan, good)

    law = ScoreModel.from_fn(score, PROCESS, (1,))
    covariance = jax.jit(measure_covariance)(law)
    assert all(jnp.isfinite(leaf).all() for leaf in covariance)


# in ScoreSDE


def conjugate(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def bimodal(y):
    """Two modes beside each other, and y near neither."""
    x = numpyro.sample("x", ScoreDistribution(TWO))
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)


def counts(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)


LAW = Mixture((0.3, 0.7), ((-2.0,), (2.0,)), (0.5, 0.7))
TWO = LAW.score_model(PROCESS)
GRID = np.linspace(-8.0, 8.0, 4001)


def normal(x, loc, sd):
    return np.exp(-0.5 * ((x - loc) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def exact(model) -> tuple[float, float]:
    """Return log evidence and posterior mean by quadrature."""
    low = PROCESS.sigma_min
    if model is bimodal:
        prior = 0.3 * normal(GRID, -2, np.hypot(0.5, low))
        prior += 0.7 * normal(GRID, 2, np.hypot(0.7, low))
        joint = prior * normal(0.5, GRID, 1.0)
    else:
        prior = normal(GRID, 0.0, 1.0)
        other = np.exp(3 * GRID - np.exp(GRID)) / 6
        joint = prior * (normal(2.0, GRID, 1.0) if model is conjugate else other)
    total = joint.sum() * (GRID[1] - GRID[0])
    return float(np.log(total)), float((joint * GRID).sum() / joint.sum())


OBSERVED = {conjugate: 2.0, bimodal: 0.5, counts: 3.0}
MODELS = [
    conjugate,
    pytest.param(bimodal, marks=pytest.mark.slow),
    pytest.param(counts, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("model", MODELS)
def test_posterior_and_evidence(model):
    inference = ScoreSDE(
        model,
        num_samples=1000,
        num_particles=1000,
        levels=60,
        covariance="fixed",
        num_moves=0,
        progress_bar=False,
    )
    inference.run(jax.random.key(0), jnp.array(OBSERVED[model]))
    log_evidence, mean = exact(model)
    error = inference.log_evidence_error
    assert abs(inference.log_evidence - log_evidence) < 0.01 + 3 * error
    assert error < 0.08
    draws = np.asarray(inference.get_samples()["x"])
    few = float(inference.get_extra_fields()["effective_num_ancestors"].min())
    assert abs(draws.mean() - mean) < 4 * draws.std() / np.sqrt(few)


def test_evidence_is_unbiased_with_four_particles():
    """Mean of 1000 estimates at N = 4; a power of the twist stays 1 here."""
    args = (jnp.array(2.0),)
    static, arrays = partition_arguments(args, {})
    covariances = run_module.learned_covariances(arrays, conjugate, static)
    ts = PROCESS.time(jnp.geomspace(20.0, 0.05, 25))
    twist = Twist.of(conjugate, args, {}, covariances)

    @jax.jit
    @jax.vmap
    def estimate(key):
        result = twisted_smc(key, twist, ts, 4)
        return result.weights.log_evidence

    values = np.exp(np.asarray(estimate(jax.random.split(jax.random.key(1), 1000))))
    evidence = np.exp(exact(conjugate)[0])
    assert (
        abs(values.mean() - evidence) < 3 * values.std() / 1000**0.5 + 2e-3 * evidence
    )
    assert values.std() > 0


def observe(score):
    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x, 1.0).expand(y.shape), obs=y)

    return model


def test_each_score_is_measured_once(monkeypatch):
    calls, one = [], jnp.ones(1)

    def measure(score):
        calls.append(score.event_shape)
        return LevelCovariance(one[:, None], one, one[0], one, len(calls) * one)

    monkeypatch.setattr(run_module, "_measure", measure)
    static, arrays = partition_arguments((jnp.zeros(3),), {})

    def look(score):
        found = run_module.learned_covariances(arrays, observe(score), static)
        return float(found["x"].log_ratio[0])

    mine, other = (STANDARD_NORMAL.score_model(PROCESS) for _ in range(2))
    assert look(mine) == look(mine) == 1
    assert look(other) == 2
    del other  # another score may come to stand where it stood in memory
    gc.collect()
    assert look(STANDARD_NORMAL.score_model(PROCESS)) == 3


def test_a_score_that_the_model_makes_is_measured_with_its_arguments():
    def model(sd, y):
        score = ScoreModel.from_fn(
            lambda x, t: -x / (sd**2 + PROCESS.sigma(t) ** 2), PROCESS, (1,)
        )
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    variances = []
    for sd in (1.0, 3.0):
        args = jnp.array(sd), jnp.zeros(1)
        static, arrays = partition_arguments(args, {})
        found = run_module.learned_covariances(arrays, model, static)
        variances.append(float(found["x"].variance[0]))
    assert variances == pytest.approx([1.0, 9.0], rel=0.15)


@pytest.mark.parametrize(
    ("observed", "latent", "expected"), [(3, 1, 3), (100, 5, 5), (100, 70, 24)]
)
def test_derivatives_are_counted(observed, latent, expected):
    def model(y):
        law = ScoreModel.from_fn(lambda x, t: -x, PROCESS, (latent,))
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0).expand(y.shape), obs=y)

    static, arrays = partition_arguments((jnp.zeros(observed),), {})
    assert num_derivatives(arrays, model, static) == expected


@pytest.mark.parametrize(("observed", "used"), [(8, "jacobian"), (9, "fixed")])
def test_default_decides_by_the_number_of_derivatives(observed, used, monkeypatch):
    inference = ScoreSDE(observe(NORMAL), num_samples=10, progress_bar=False)
    assert "by the number of observations" in repr(inference)
    passed = []

    def stop(keys, ts, arrays, plan, size, covariances):
        passed.append(covariances)
        raise KeyboardInterrupt

    monkeypatch.setattr("numpyro_score.infer.twisted.score_sde.run_chains", stop)
    with pytest.raises(KeyboardInterrupt):
        inference.run(jax.random.key(0), jnp.zeros(observed))
    assert inference.covariance_used == used
    assert used in repr(inference)
    assert (passed[0] is None) == (used == "jacobian")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"covariance": "diagonal"},
            "`covariance` must be \"fixed\", .* Got 'diagonal'",
        ),
        ({"covariance": "fixed", "guidance": DPS()}, "guidance alone brings its own"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ScoreSDE(conjugate, num_samples=10, **options)
