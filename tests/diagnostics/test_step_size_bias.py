"""The bias of unadjusted chains against laws of which it is known."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy.special import digamma, polygamma

from numpyro_score import ScoreLangevin
from numpyro_score.diagnostics import (
    BAOAB,
    ULA,
    mark_exactness,
    step_size_bias,
    unadjusted_bias,
)
from numpyro_score.diagnostics.step_size_bias import extrapolate, langevin_target
from numpyro_score.kernel import AcceptRule
from numpyro_score.langevin import IntegratorState, persistence, refresh

KEY = jax.random.key(0)
SHAPE = 2.0  # log x for x of this gamma law: mean digamma(2), variance trigamma(2)
SD = np.sqrt(polygamma(1, SHAPE))


def gaussian_score(x):
    return -x


def skewed_score(x):
    return SHAPE - jnp.exp(x)


def skewed_starts(num):
    return jnp.log(jax.random.gamma(KEY, SHAPE, (num, 1)))


def exact_bias(step_size, num_nodes=61):
    """Return the bias of mean and variance of the overdamped chain, by quadrature.

    With x = y + h n / 2 for the newest noise n, y is a Markov chain on the line, whose
    law is iterated on a grid. Relative to the law's own sd and variance.
    """
    h = step_size
    y = np.linspace(-9.0, 5.0, 1401)
    n, weight = np.polynomial.hermite_e.hermegauss(num_nodes)
    weight = weight / weight.sum()
    x = y[:, None] + h / 2 * n
    y_next = y[:, None] + h * n + h**2 / 2 * (SHAPE - np.exp(x))
    place = np.clip((y_next - y[0]) / (y[1] - y[0]), 0, len(y) - 1.001)
    left = place.astype(int)
    share = place - left
    law = np.exp(SHAPE * y - np.exp(y))
    for _ in range(int(40 / h**2)):
        mass = (law / law.sum())[:, None] * weight
        law = np.zeros_like(y)
        np.add.at(law, left, mass * (1 - share))
        np.add.at(law, left + 1, mass * share)
    mass = (law / law.sum())[:, None] * weight
    mean = (mass * x).sum()
    variance = (mass * (x - mean) ** 2).sum()
    return (mean - digamma(SHAPE)) / SD, variance / SD**2 - 1


@pytest.mark.parametrize("scheme", [BAOAB(), BAOAB(0.7), ULA()], ids=str)
def test_coupled_noise_is_unit_noise_of_the_same_path(scheme):
    noise = jax.random.normal(KEY, (20_000, scheme.refinement, 1))
    joint = jax.vmap(lambda n: scheme.couple(n, 0.5))(noise)[:, 0]
    assert float(joint.var()) == pytest.approx(1.0, abs=0.05)
    sums = noise.sum((1, 2)) / np.sqrt(scheme.refinement)
    assert float(jnp.corrcoef(joint, sums)[0, 1]) > 0.95


@pytest.mark.parametrize("friction", [0.7, 3.0])
def test_coupled_noise_refreshes_once_as_two_halves_do(friction):
    first, second, momentum = jax.random.normal(KEY, (3, 5))
    joint = BAOAB(friction).couple(jnp.stack([first, second]), 0.5)
    half = persistence(0.25, friction)
    twice = refresh(second, refresh(first, momentum, half), half)
    once = refresh(joint, momentum, persistence(0.5, friction))
    np.testing.assert_allclose(once, twice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [2, 4])
def test_biases_are_those_of_pooled_moments_in_units_of_the_finer_chain(order):
    """Of E[x] and E[x^2] of each pair, where steps are halved once."""
    rows = np.random.default_rng(0).normal(2.0, 1.0, (4, 6, 3))
    coarse, spread, fine, other = rows
    squares = [coarse**2 + 1 + spread**2, fine**2 + 1 + other**2]
    bias = extrapolate(
        tuple(map(jnp.asarray, (coarse, squares[0], fine, squares[1]))), order
    )
    before, after = (
        sq.mean(0) - x.mean(0) ** 2
        for x, sq in zip((coarse, fine), squares, strict=True)
    )
    share = 1 - 2.0**-order  # what halving removes of h^order
    mean = (coarse.mean(0) - fine.mean(0)) / np.sqrt(after) / share
    np.testing.assert_allclose(bias.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(bias.variance, (before / after - 1) / share, rtol=1e-4)
    gaps = (coarse - fine) / np.sqrt(after) / share
    error = gaps.std(0, ddof=1) / np.sqrt(6)
    np.testing.assert_allclose(bias.mean_error, error, rtol=1e-4)


def test_ula_in_a_gaussian_has_its_closed_form_variance():
    """Variance 1 / (1 - h^2/4); extrapolation leaves out terms of h^4."""
    starts = jax.random.normal(KEY, (64, 2))
    found = step_size_bias(KEY, gaussian_score, starts, 0.4, ULA())
    exact = 1 / (1 - 0.4**2 / 4) - 1
    slack = 4 * found.variance_error + 0.4**4 / 4
    assert np.all(np.abs(found.variance - exact) < slack)
    assert np.all(found.variance > 10 * found.variance_error)
    assert np.all(np.abs(found.mean) < 4 * found.mean_error)


@pytest.mark.slow
@pytest.mark.parametrize("friction", [None, 1.0])
def test_the_splitting_has_no_bias_in_a_gaussian(friction):
    starts = jax.random.normal(KEY, (256, 1))
    options = {"num_steps": 3000}
    found = step_size_bias(KEY, gaussian_score, starts, 1.0, BAOAB(friction), **options)
    assert abs(found.variance[0]) < 4 * found.variance_error[0]
    assert found.variance_error[0] < 0.005
    assert abs(found.mean[0]) < 4 * found.mean_error[0]


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [0.8, 1.0])
def test_overdamped_bias_in_a_skewed_law(step_size):
    mean, variance = exact_bias(step_size)
    found = step_size_bias(
        KEY, skewed_score, skewed_starts(128), step_size, num_steps=2000
    )
    assert abs(found.mean[0] - mean) < 4 * found.mean_error[0] + 0.1 * abs(mean)
    slack = 4 * found.variance_error[0] + 0.1 * abs(variance)
    assert abs(found.variance[0] - variance) < slack
    assert abs(found.mean[0]) > 4 * found.mean_error[0]


@pytest.mark.slow
def test_kinetic_bias_in_a_skewed_law():
    """Against a run that is long enough to show the bias by itself."""
    scheme, h = BAOAB(1.0), 0.8
    starts = skewed_starts(4000)
    found = step_size_bias(KEY, skewed_score, starts[:200], h, scheme, num_steps=4000)

    def chain(key, start):
        target = langevin_target(skewed_score)

        def body(phase, key):
            phase = scheme.step(jax.random.normal(key, (1,)), phase, h, target)
            return phase, (phase.place.position, phase.place.position**2)

        first = IntegratorState(target.evaluate(start), jax.random.normal(key, (1,)))
        _, sums = jax.lax.scan(body, first, jax.random.split(key, 2000))
        return jax.tree.map(lambda a: a[100:].mean(), sums)

    first, second = jax.jit(jax.vmap(chain))(jax.random.split(KEY, 4000), starts)
    mean = (first.mean() - digamma(SHAPE)) / SD
    variance = (second.mean() - first.mean() ** 2) / SD**2 - 1
    error = first.std() / np.sqrt(4000) / SD
    slack = 4 * (error + found.mean_error[0]) + 0.25 * abs(mean)
    assert abs(found.mean[0] - mean) < slack
    assert np.sign(found.variance[0]) == np.sign(variance)
    assert abs(found.variance[0]) > 4 * found.variance_error[0]


# --- a whole run ------------------------------------------------------------------


def model(shape):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", dist.Gamma(shape))
    numpyro.deterministic("both", jnp.stack([z, jnp.log(x)]))


def run(**options):
    num_chains = options.pop("num_chains", 1)
    kernel = ScoreLangevin(model, adjusted=False, **options)
    mcmc = MCMC(
        kernel,
        num_warmup=100,
        num_samples=100,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, SHAPE)
    return mcmc


@pytest.mark.slow
def test_run_reports_the_bias_of_each_site():
    fixed = {"adapt_step_size": False, "adapt_mass_matrix": False}
    mcmc = run(step_size=1.0, friction=None, **fixed)
    found = unadjusted_bias(KEY, mcmc, SHAPE, num_pairs=128, num_steps=2000)
    mean, variance = exact_bias(1.0)
    error, spread = found.mean_error["both"], found.variance_error["both"]
    assert abs(found.mean["both"][1] - mean) < 4 * error[1] + 0.1 * abs(mean)
    slack = 4 * spread[1] + 0.1 * abs(variance)
    assert abs(found.variance["both"][1] - variance) < slack
    assert abs(found.variance["z"]) < 4 * found.variance_error["z"]
    np.testing.assert_allclose(found.mean["z"], found.mean["both"][0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_chains": 3},
        {"num_chains": 3, "share_adaptation": True, "dense_mass": True},
        {"friction": 1.0, "dense_mass": [("x", "z")]},
    ],
    ids=str,
)
def test_adapted_runs_have_little_bias(options):
    """Warm-up bounds the energy error, which keeps the bias small."""
    mcmc = run(**options)
    found = unadjusted_bias(KEY, mcmc, SHAPE, num_pairs=32, num_steps=500)
    for name in ("z", "x"):
        assert abs(found.mean[name]) < 0.05 + 4 * found.mean_error[name]


def test_bad_runs_are_named():
    def simple():
        numpyro.sample("x", dist.Normal(0, 1))

    def mcmc(kernel):
        return MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False)

    with pytest.raises(TypeError, match=r"ScoreLangevin kernel.*Got NUTS"):
        unadjusted_bias(KEY, mcmc(NUTS(simple)))
    with pytest.raises(ValueError, match="must have an unadjusted kernel"):
        unadjusted_bias(KEY, mcmc(ScoreLangevin(simple)))
    unadjusted = mcmc(ScoreLangevin(simple, adjusted=False))
    with pytest.raises(ValueError, match="`mcmc` must have run"):
        unadjusted_bias(KEY, unadjusted)
    match = "`num_pairs` must be an integer of at least 4"
    with pytest.raises(ValueError, match=match):
        unadjusted_bias(KEY, unadjusted, num_pairs=3)
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least"):
        unadjusted_bias(KEY, unadjusted, num_steps=0)


@pytest.mark.parametrize("rule", AcceptRule)
def test_exactness_is_written_into_the_tree(rule):
    rules = np.array([[0, 0], [0, int(rule)]])
    draws = {"posterior": {"x": rules * 1.0}, "sample_stats": {"accept_rule": rules}}
    tree = mark_exactness(arviz.from_dict(draws))
    assert tree.attrs["accept_rule"] == rule.name
    exact = tree["posterior"].attrs["exactness"].startswith("exact")
    assert exact == (rule != AcceptRule.UNADJUSTED)
    del draws["sample_stats"]
    with pytest.raises(ValueError, match=r"`accept_rule`.*\['posterior'\]"):
        mark_exactness(arviz.from_dict(draws))


def test_bad_numbers_are_named():
    starts = jnp.zeros((4, 1))
    with pytest.raises(ValueError, match="`starts` must hold at least 4 points"):
        step_size_bias(KEY, gaussian_score, starts[:3], 0.1)
    with pytest.raises(ValueError, match=r"`step_size` must be positive.*Got -1\.0"):
        step_size_bias(KEY, gaussian_score, starts, -1.0)
    with pytest.raises(ValueError, match="`num_steps` must be an integer"):
        step_size_bias(KEY, gaussian_score, starts, 1.0, num_steps=0)


def test_a_step_beyond_stability_is_named():
    with pytest.raises(ValueError, match=r"`step_size` is too large.*4 of 4"):
        step_size_bias(KEY, gaussian_score, jnp.ones((4, 1)), 3.0, num_steps=400)
