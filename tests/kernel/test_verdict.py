"""The verdict names what is wrong with a run, and is silent when nothing is."""

import logging
import warnings
from functools import partial

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy import stats

from numpyro_score import AnnealedLangevin, ParallelTempering, ScoreLangevin
from numpyro_score.diagnostics import mark_verdict, verdict
from numpyro_score.kernel import run_in_blocks
from numpyro_score.kernel.run_moments import Point, RunMoments, Thinning, update_moments
from numpyro_score.kernel.stepping_stone import Crossings
from numpyro_score.kernel.verdict import (
    Chains,
    RunKind,
    RunRecord,
    Verdict,
    _chi2_quantile,
    _unmixed,
    combine,
    effective_sample_size,
    judge,
    measure_linearity,
    smallest_virial,
    split_r_hat,
)
from numpyro_score.kernel.whitening import LowRankSqrt, whiten_displacement
from numpyro_score.run_verdict import RunLength, RunSpan

CHAINS, DRAWS, SIZE = 4, 600, 3
STRIDE = Thinning.of(DRAWS).stride
UNIT = jnp.ones(SIZE)
LEARNED = RunKind(energy=False, learned=True)


@jax.jit
@jax.vmap
def moments_of(z, gradient, energy, diverging):
    """Return the moments of one chain, in coordinates that need no whitening.

    More draws than those of a run are those of several, one after the other.
    """
    thinning = Thinning.of(DRAWS)

    def step(carry, after):
        moments, before, drawn = carry
        *point, diverging = after
        args = moments, (UNIT, UNIT), before, Point(*point), diverging
        moments = update_moments((drawn - 1) % DRAWS + 1, thinning, *args)
        return (moments, Point(*point), drawn + 1), None

    start = Point(z[0], gradient[0], energy[0])
    carry = RunMoments.zero(jnp.zeros(SIZE + 1)), start, jnp.ones((), int)
    return jax.lax.scan(step, carry, (z, gradient, energy, diverging))[0][0]


def record_of(z, gradient=None, energy=None, diverging=None, **options):
    """Return the record of chains that drew z, by default from N(0, 1)."""
    gradient = z if gradient is None else gradient
    energy = 0.5 * np.square(noise(9)).sum(-1) if energy is None else energy
    none = np.zeros(z.shape[:2], bool)
    diverging = none if diverging is None else diverging
    run = z, gradient, energy[: len(z)], diverging
    moments = jax.tree.map(np.asarray, moments_of(*run))
    means = (moments.mean + moments.origin[:, None])[..., :-1]
    facts = {
        "step_size": np.ones(len(z)),
        "num_steps": np.full(len(z), 8),
        "whitened": (means, moments.gradient_mean),
        "scale": None,
        "tempering": None,
    }
    about = {
        "thinning": Thinning.of(DRAWS),
        "kind": RunKind(energy=True, learned=False),
    }
    about |= {name: options.pop(name) for name in about.keys() & options.keys()}
    return RunRecord(Chains(moments, **facts | options), **about)


def noise(seed=0):
    return np.random.default_rng(seed).normal(size=(CHAINS, DRAWS, SIZE))


def autoregression(rho, seed=0):
    """Stationary N(0, 1) chains whose effective size is (1 - rho)/(1 + rho) n."""
    innovations = noise(seed)
    z = innovations.copy()
    for k in range(1, DRAWS):
        z[:, k] = rho * z[:, k - 1] + np.sqrt(1 - rho**2) * innovations[:, k]
    return z


def names(record):
    return [finding.name for finding in judge(record).findings]


# the numbers


def test_moments_are_those_of_the_draws():
    z = noise() * np.array([1.0, 10.0, 0.1]) + 5
    record = record_of(z)
    z = z[:, STRIDE - 1 :: STRIDE]
    halves = z.reshape(2 * CHAINS, -1, SIZE)
    moments = record.chains.moments
    means = moments.mean + moments.origin[:, None]
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    close(means[..., :-1].reshape(-1, SIZE), halves.mean(1))
    variance = moments.scatter[..., :-1].reshape(-1, SIZE) / (halves.shape[1] - 1)
    close(variance, halves.var(1, ddof=1))
    close(moments.gradient_mean.reshape(-1, SIZE), halves.mean(1))
    close(moments.increments[:, 0], np.square(np.diff(z, axis=1)).sum(1))


def test_a_second_run_has_moments_of_its_own():
    first, second = 7 * noise(1) + 3, noise(2)
    second[:, 0] = first[:, -1]  # a run alone begins at its first draw
    both = np.concatenate([first, second], axis=1)
    energy, diverging = 0.5 * np.square(both).sum(-1), both[..., 0] > 3
    found = moments_of(both, both, energy, diverging)
    alone = moments_of(second, second, energy[:, DRAWS:], diverging[:, DRAWS:])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, alone)


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_r_hat_and_effective_size_agree_with_arviz(rho):
    z = autoregression(rho)
    record = record_of(z)
    z = z[:, STRIDE - 1 :: STRIDE]
    r_hat = [float(arviz.rhat(z[..., j], method="split")) for j in range(SIZE)]
    np.testing.assert_allclose(split_r_hat(record)[:-1], r_hat, rtol=1e-3)
    size = [float(arviz.ess(z[..., j], method="mean")) for j in range(SIZE)]
    # means of 4 x 14 batches know a variance to 19 %
    np.testing.assert_allclose(effective_sample_size(record)[:-1], size, rtol=0.5)


def test_linearity_is_one_for_a_gaussian_and_the_share_that_is_linear_otherwise():
    z = noise()
    assert measure_linearity(record_of(z)) == pytest.approx(1.0, abs=1e-5)
    half = record_of(z, gradient=z + noise(1))
    assert measure_linearity(half) == pytest.approx(0.5, abs=0.05)


# the findings


def test_independent_draws_leave_no_finding():
    for seed in range(10):
        assert judge(record_of(noise(seed))).ok


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_units_of_the_latents_do_not_matter(scale):
    """Squares of their squares are out of the range of single precision."""

    def judged(z):
        record = record_of(scale * z, z / scale)
        (chains,) = record.chains.groups(CHAINS)
        return judge(record._replace(chains=chains))

    assert judged(noise()).ok
    expected = effective_sample_size(record_of(autoregression(0.8)))
    (chains,) = record_of(scale * autoregression(0.8)).chains.groups(CHAINS)
    found = effective_sample_size(record_of(noise())._replace(chains=chains))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    apart = noise() + np.array([-4.0, 4.0])[np.arange(CHAINS) % 2, None, None]
    assert not judged(apart).ok


def test_chains_in_different_modes_are_told_from_chains_in_one():
    """Between modes no mean force acts; within one it grows with the distance."""
    offset = np.array([-3.0, -3.0, 3.0, 3.0])[:, None, None] * np.array([1.0, 0, 0])
    local = noise()
    assert names(record_of(local + offset, gradient=local))[0] == "modes"
    wide = np.array([0.1, 1, 1])
    assert names(record_of(local + offset, gradient=wide * (local + offset))) == [
        "unmixed"
    ]
    # chains with an R-hat of less than 1.05 overlap
    overlapping = record_of(local + offset / 12, gradient=local)
    assert _unmixed(overlapping, 1.02, 1.01, False).name == "unmixed"
    alone = record_of(local + offset, gradient=local, whitened=None)
    assert names(alone)[0] == "unmixed"


WEIGHTED = RunKind(energy=True, learned=False, weighted=True)


def particles(rho=0.0):
    """Sixty-four stationary chains, as particles whose weights set their places."""
    z = np.concatenate([autoregression(rho, seed) for seed in range(64 // CHAINS)])
    energy = np.random.default_rng(9).normal(size=(64, DRAWS)) ** 2
    return z, {"kind": WEIGHTED, "energy": energy}


@pytest.mark.parametrize("rho", [0.0, 0.95])
def test_weighted_particles_may_stay_where_they_are(rho):
    """Their weights have set the shares of modes; slow moves are no fault."""
    z, options = particles(rho)
    offset = np.where(np.arange(64) % 4 < 3, -3.0, 3.0)[:, None, None]
    assert names(record_of(z + offset * np.array([1.0, 0, 0]), z, **options)) == []


def test_few_weighted_particles_may_stand_still():
    z, options = particles()
    z[:3, 100:300] = z[:3, 100:101]  # 3 of 64 are less than 5 %
    assert names(record_of(z, **options)) == []
    z[:8, 100:300] = z[:8, 100:101]
    (finding,) = judge(record_of(z, **options)).findings
    assert finding.name == "stuck"
    assert finding.number > 150
    z[:8] = z[:8, :1]
    assert "copies" in judge(record_of(z, **options)).findings[0].remedy


def test_particles_that_are_still_on_the_way_are_found():
    z, options = particles()
    drift = np.linspace(-0.5, 0.5, DRAWS)[:, None] * np.array([0.0, 1.0, 0.0])
    (finding,) = judge(record_of(z + drift, z, **options)).findings
    assert finding.name == "unmixed"
    assert finding.number == pytest.approx(0.5, abs=0.1)


def test_few_particles_or_ancestors_are_found():
    z, options = particles()
    enough = {"ess": np.full(64, 7.0), "ancestors": np.full(64, 11.0)}
    assert names(record_of(z, **enough, **options)) == []
    few = {"ess": np.full(64, 6.0), "ancestors": np.full(64, 9.0)}
    assert names(record_of(z, **few, **options)) == ["ess", "ancestors"]
    nan = {"ess": np.full(64, np.nan), "ancestors": np.full(64, 64.0)}
    assert names(record_of(z, **nan, **options)) == ["ess"]


def test_the_virial_is_one_for_proper_densities():
    """By parts: the covariance of a latent and its gradient is 1, tails or not."""
    t = np.random.default_rng(0).standard_t(3, (CHAINS, DRAWS, SIZE))
    laws = (noise(), noise()), (t, 4 * t / (3 + t**2)), (1e3 + noise(), noise())
    for z, gradient in laws:
        virial = smallest_virial(record_of(z, gradient=gradient))
        assert virial == pytest.approx(1.0, abs=0.25)
    assert smallest_virial(record_of(noise(), gradient=-noise())) < -0.75
    offset = np.array([-30.0, -30.0, 30.0, 30.0])[:, None, None]
    apart = record_of(noise() + offset, gradient=noise())
    assert smallest_virial(apart) == pytest.approx(1.0, abs=0.25)


def test_chains_without_a_force_run_away():
    walk = np.cumsum(noise(), axis=1)
    for gradient in (0 * walk, -walk, np.exp(-np.abs(walk) - 5)):
        found = judge(record_of(walk, gradient=gradient)).findings
        assert found[0].name == "runaway"
        assert found[0].number < found[0].threshold == 0.1
        assert "proper prior" in found[0].remedy
    stuck = walk.copy()
    stuck[:2] = stuck[:2, :1]  # that some stand still must not hide it
    found = judge(record_of(stuck, gradient=0 * stuck)).findings
    assert found[0].name == "runaway"
    assert "stuck" in [finding.name for finding in found]
    walk[0, 299, 0] = np.inf  # an observed draw
    assert names(record_of(walk)) == ["runaway"]


def test_chains_with_diagonal_metrics_of_their_own_are_compared():
    """Each chain is whitened by its own scale, and seen in their geometric mean."""
    offset = np.array([-3.0, -3.0, 3.0, 3.0])[:, None, None] * np.array([1.0, 0, 0])
    local = noise()
    scale = np.array([0.5, 2.0, 1.0, 1.0])[:, None] * np.ones(SIZE)
    options = {"whitened": None, "scale": scale}
    modes = record_of(local + offset, gradient=local, **options)
    assert names(modes)[0] == "modes"
    gradient = np.array([0.1, 1, 1]) * (local + offset)
    assert names(record_of(local + offset, gradient=gradient, **options)) == ["unmixed"]


def test_tempered_chains_are_judged_by_mixing_and_restarts():
    kind = RunKind(energy=False, learned=False, tempered=True)

    def crossings(restarts=(50, 50, 50, 50), missed=(0.0,) * 4, gap=(0.0,) * 4):
        return Crossings(*map(np.array, (restarts, missed, gap)))

    few = record_of(noise(), kind=kind, tempering=crossings((9, 9, 9, 2)))
    (finding,) = judge(few).findings
    assert (finding.name, finding.number, finding.threshold) == ("restarts", 2, 6)
    lost = crossings(missed=(0.0, 0.0, 70.0, 0.0))
    (finding,) = judge(record_of(noise(), kind=kind, tempering=lost)).findings
    assert (finding.name, finding.number, finding.threshold) == ("missed", 70, 20)
    apart = crossings(gap=(0.2, 1.5, 0.9, 0.0))
    (finding,) = judge(record_of(noise(), kind=kind, tempering=apart)).findings
    assert (finding.name, finding.number, finding.threshold) == ("gap", 1.5, 1)
    offset = np.array([-3.0, -3.0, 3.0, 3.0])[:, None, None]
    apart = record_of(noise() + offset, kind=kind, tempering=crossings())
    (finding,) = judge(apart).findings
    assert finding.name == "unmixed"
    assert "num_rungs" in finding.remedy


def test_displacements_are_whitened_by_the_transposed_inverse():
    covariance = jnp.array([[2.0, 0.6], [0.6, 1.0]])
    sqrt = jnp.linalg.cholesky(covariance).T  # covariance is S^T S
    x = jnp.array([1.0, -2.0])
    y = whiten_displacement(jnp.linalg.inv(sqrt), x)
    np.testing.assert_allclose(y @ y, x @ jnp.linalg.solve(covariance, x), rtol=1e-5)
    diagonal = whiten_displacement({("a",): 1 / jnp.array([2.0, 4.0])}, x)
    np.testing.assert_allclose(diagonal, [0.5, -0.5])
    basis = jnp.array([[0.6], [0.8]])
    low_rank = LowRankSqrt(jnp.array([2.0, 0.5]), basis, jnp.array([3.0]))
    matrix = jax.vmap(low_rank.whiten, 1, 1)(jnp.eye(2))  # S
    y = whiten_displacement(low_rank.inverse(), x)
    np.testing.assert_allclose(matrix.T @ y, x, rtol=1e-5)


def test_halves_see_what_batches_do_not():
    """One excursion of a chain, far longer than a batch, leaves an R-hat of 1.1."""
    z = noise()[:2]
    z[0, 220:330] += 4
    assert names(record_of(z)) == ["unmixed"]


def test_a_chain_that_drifts_is_unmixed():
    drift = np.linspace(0, 4, DRAWS)[:, None]
    assert names(record_of(noise() + drift)) == ["unmixed"]


def test_slow_chains():
    # 4 x 600 draws are worth 23; their R-hat says so too
    found = judge(record_of(autoregression(0.98))).findings
    assert found[0].name in ("slow", "unmixed")
    assert judge(record_of(autoregression(0.5))).ok


def test_slow_chains_that_have_mixed():
    z = noise()
    # mixed, and yet slow: halves have a mean of zero, batches have not
    z[..., 0] = np.resize(np.repeat([1.0, -1.0], 75), DRAWS) + 0.01 * z[..., 0]
    assert names(record_of(z)) == ["slow"]


def test_curvature_counts_only_beside_another_finding():
    z = noise()
    curved = partial(record_of, z, gradient=z + 3 * noise(1))
    assert judge(curved()).ok
    heavy = curved(energy=100 * noise(2)[..., 0])
    assert names(heavy) == ["curved", "energy"]
    assert names(heavy._replace(kind=RunKind(energy=False, learned=False))) == []


def test_rows_of_rejections():
    z = noise()
    z[0, 100:180] = z[0, 100]
    assert names(record_of(z)) == ["stuck"]
    z = noise()
    z[0, 100:140] = z[0, 100]
    assert judge(record_of(z)).ok
    z[1] = z[1, 0]
    found = judge(record_of(z)).findings
    assert "copies" in found[-1].remedy
    assert found[0].name == "unmixed"


def with_lowest(record, drawn, proposed):
    lowest = np.tile([drawn, proposed], (CHAINS, 1))
    moments = record.chains.moments._replace(lowest=lowest)
    return record._replace(chains=record.chains._replace(moments=moments))


def test_refused_proposals_of_far_higher_density():
    record = record_of(noise())
    assert not names(with_lowest(record, 2.0, 2.0))
    assert not names(with_lowest(record, 2.0, -0.9))
    assert names(with_lowest(record, 2.0, -1.1)) == ["missed"]
    assert not names(with_lowest(record, np.inf, np.inf))  # no proposal was counted
    # the lowest of potentials with an sd of 30 lie nats apart
    energy = 1000 + 30 * noise(8)[..., 0]
    wide = record_of(noise(), energy=energy, kind=RunKind(energy=False, learned=False))
    assert not names(with_lowest(wide, 880.0, 840.0))
    assert names(with_lowest(wide, 880.0, 820.0)) == ["missed"]
    apart = record_of(autoregression(0.999))  # other findings say more
    assert "missed" not in names(with_lowest(apart, 2.0, -9.0))


def test_divergences_and_step_sizes():
    diverging = np.zeros((CHAINS, DRAWS), bool)
    diverging[:, :5] = True
    assert judge(record_of(noise(), diverging=diverging)).ok
    gradient = noise() + 5 * noise(1)
    assert judge(record_of(noise(), gradient, diverging=diverging)).ok  # at a wall
    tip = noise()
    tip[:, :6] = tip[:, :1]
    assert names(record_of(tip, gradient, diverging=diverging)) == [
        "curved",
        "divergent",
    ]
    assert judge(record_of(noise(), noise() + 5 * noise(1))).ok
    one = noise() + 5 * noise(1) * np.array([1.0, 0.0, 0.0])
    assert names(record_of(tip, one, diverging=diverging)) == ["divergent"]
    diverging[:, :20] = True
    assert names(record_of(noise(), diverging=diverging)) == ["divergent"]
    halves = RunKind(energy=True, learned=False, halves=True)
    for kind in (halves, RunKind(energy=True, learned=False)):
        (finding,) = judge(record_of(noise(), diverging=diverging, kind=kind)).findings
        assert ("`max_step_halvings` (to 5)" in finding.remedy) == kind.halves
    assert judge(record_of(noise(), diverging=diverging, kind=LEARNED)).ok
    diverging[:, :100] = True
    found = judge(record_of(noise(), diverging=diverging, kind=LEARNED)).findings
    assert "num_nodes" in found[0].remedy
    assert names(record_of(noise(), step_size=np.array([1e-4]))) == ["step_size"]


def test_length_at_its_cap_counts_only_beside_another_finding():
    kind = RunKind(energy=True, learned=False, most_steps=64)
    capped = {"kind": kind, "num_steps": np.full(CHAINS, 64)}
    assert judge(record_of(noise(), **capped)).ok
    slow = partial(record_of, autoregression(0.99))
    assert "length" in names(slow(**capped))
    assert "length" not in names(slow(**capped | {"num_steps": np.full(CHAINS, 63)}))
    assert "length" not in names(slow(num_steps=np.full(CHAINS, 64)))


def test_constant_latents_are_no_finding_of_their_own():
    """A coordinate without a gradient that does not move is not compared."""
    z = noise()
    z[..., 2] = 7.0
    found = judge(record_of(z))
    assert all(np.isfinite(finding.number) for finding in found.findings)


def test_chains_that_run_apart_are_judged_together():
    offset = np.array([-3.0, -3.0, 3.0, 3.0])[:, None, None]
    together = record_of(noise() + offset)
    apart = [record_of((noise() + offset)[[j]]) for j in range(CHAINS)]
    joined = combine(apart)
    np.testing.assert_allclose(split_r_hat(joined)[:-1], split_r_hat(together)[:-1])
    assert names(joined) == ["unmixed"]


def test_verdict_prints_numbers_thresholds_and_remedies():
    offset = np.array([-3.0, -3.0, 3.0, 3.0])[:, None, None]
    text = str(judge(record_of(noise() + offset, gradient=noise())))
    assert text.startswith("- modes: the largest split R-hat is ")
    assert "(threshold 1.05)" in text
    assert "ParallelTempering" in text


# in a run


def two_modes():
    locs = jnp.stack([-jnp.ones(10), jnp.ones(10)])
    weights = dist.Categorical(jnp.array([0.3, 0.7]))
    components = dist.Normal(locs, 1.0).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(weights, components))


def two_modes_with_data():
    x = numpyro.sample("x", dist.Normal(0, 3).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.abs(x), 0.05).to_event(1), obs=2 * jnp.ones(2))


def easy():
    numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))


def run(model, kernel=ScoreLangevin, start=None, **options):
    defaults = {
        "num_warmup": 200,
        "num_samples": 400,
        "num_chains": 4,
        "chain_method": "vectorized",
        "progress_bar": False,
    }
    mcmc = MCMC(kernel(model), **defaults | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(jax.random.key(0), init_params=start)
        jax.effects_barrier()
    return mcmc, [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def modes():
    return run(two_modes)


def test_a_run_over_two_modes_warns_once_and_says_what_verdict_says(modes):
    mcmc, (message,) = modes
    found = verdict(mcmc)
    assert not found.ok
    assert found.findings[0].name == "modes"
    assert message == f"The draws of this run are not to be trusted:\n{found}"


def test_verdict_travels_with_the_tree(modes):
    mcmc, _ = modes
    tree = mark_verdict(arviz.from_numpyro(mcmc), mcmc)
    assert tree.attrs["verdict"].split(", ")[0] == "modes"
    assert "ParallelTempering" in tree["posterior"].attrs["verdict_findings"]


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_an_easy_run_is_silent(method, caplog):
    mcmc, messages = run(easy, chain_method=method)
    assert messages == []
    assert verdict(mcmc) == Verdict(())
    # a second run and its verdict compile what every run of NumPyro does: its loop, and
    # the search for starts of several chains
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, logger="jax"):
        mcmc.run(jax.random.key(1))
        assert "gap" not in verdict(mcmc).names
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    loops = [message for message in compiled if "_collect_loop" in message]
    starts = [message for message in compiled if "jit(scan)" in message]
    assert len(loops) == (1 if method == "vectorized" else 4)
    assert len(compiled) == len(loops) + len(starts)


def unbounded():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("sign", jnp.square(x))  # +x^2/2 in all


def improper():
    real = dist.constraints.real
    x = numpyro.sample("x", dist.ImproperUniform(real, (), ()))
    numpyro.factor("edge", -jnp.exp(-x))


@pytest.mark.parametrize("model", [unbounded, improper])
def test_densities_without_a_bound_are_warned_of(model):
    mcmc, messages = run(model)
    assert verdict(mcmc).findings[0].name == "runaway"
    assert sum("- runaway: " in message for message in messages) == 1


def test_heavy_tails_that_mix_are_no_runaway():
    def student():
        numpyro.sample("x", dist.StudentT(3.0).expand([3]).to_event(1))

    mcmc, messages = run(student)
    assert "gap" not in verdict(mcmc).names
    assert messages == []


def spike_in_a_slab():
    """Half of the mass is a twentieth as wide as the rest, in the same place."""
    scales = jnp.array([0.05, 1.0])[:, None]
    parts = dist.Normal(jnp.zeros((2, 3)), scales).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), parts)
    numpyro.sample("x", mixture)


@pytest.mark.slow
def test_a_narrow_place_that_no_chain_enters_is_missed():
    lengths = {"num_warmup": 1000, "num_samples": 2000}
    mcmc, (message,) = run(spike_in_a_slab, **lengths)
    assert float(mcmc.get_samples()["x"].std()) > 0.95  # it is 0.71
    assert verdict(mcmc).names == "missed"
    assert "cannot enter it" in message


def straight_line():
    """Years that are not centred: intercept and slope are correlated by -.99996."""
    year = np.arange(1952.0, 2014.0)
    y = 9 + 0.03 * (year - 1982) + 1.1 * np.random.default_rng(1).normal(size=62)
    intercept = numpyro.sample("intercept", dist.Normal(0, 1000))
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.sample("y", dist.Normal(intercept + slope * year, sigma), obs=y)


def centered_schools():
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel():
    v = numpyro.sample("v", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([9]).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (straight_line, {"num_warmup": 50, "num_samples": 500}, "unmixed"),
        (centered_schools, {"num_warmup": 500, "num_samples": 1000}, "curved"),
        (funnel, {"num_warmup": 500, "num_samples": 1000}, "curved"),
    ],
)
def test_runs_that_fail_say_so(model, options, expected):
    mcmc, messages = run(model, **options)
    (message,) = (m for m in messages if "not to be trusted" in m)
    assert expected in message
    assert expected in [finding.name for finding in verdict(mcmc).findings]


def test_a_chain_that_stays_where_it_started_is_found():
    def model():
        """A spike of weight e^40 and width 1e-4 beside a broad mode."""
        x = numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))
        spike = 40 - 1e8 * jnp.square(x - 3).sum()
        numpyro.factor("spike", jnp.logaddexp(0.0, spike))

    start = {"x": jnp.array([[3.0] * 3, *[[0.1] * 3] * 3])}
    mcmc, messages = run(model, start=start)
    # the one step size of all lets none see a tenth of the broad mode's variance
    assert verdict(mcmc).findings[0].name in ("modes", "unmixed", "runaway")
    assert sum("The draws of this run" in message for message in messages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_parallel_tempering_is_judged(method):
    poor = partial(ParallelTempering, num_rungs=2)
    mcmc, messages = run(two_modes_with_data, poor, chain_method=method, num_chains=2)
    assert "restarts" in [finding.name for finding in verdict(mcmc).findings]
    assert sum("The draws of this run" in message for message in messages) == 1


def test_transitions_are_counted_in_their_run():
    span, numbers = RunSpan.zero(), []
    three, two = RunLength(3, 1), RunLength(2, 1)
    runs = [three] * 8 + [two] * 4 + [three] * 2 + [two] * 2
    for drawn, run_length in enumerate(runs, start=-1):
        span = span.at(jnp.array(drawn), run_length)
        numbers.append(int(span.number(jnp.array(drawn))))
    # two of warm-up, two runs of 3, two of 2, the start of one of 3, one of 2
    assert numbers == [0, 0, *[1, 2, 3] * 2, *[1, 2] * 2, 1, 2, 1, 2]


def test_a_run_of_another_length_is_judged_by_its_own_draws():
    options = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    kernel = ScoreLangevin(easy)
    first = MCMC(kernel, num_warmup=100, num_samples=250, **options)
    first.run(jax.random.key(0))
    second = MCMC(kernel, num_warmup=0, num_samples=180, **options)
    second.post_warmup_state = first.last_state
    second.run(jax.random.key(1))
    x = np.asarray(second.get_samples(True)["x"]).reshape(4, 2, 90, -1)
    moments = second.last_state.moments
    found = (moments.mean + moments.origin[:, None])[..., :-1]
    np.testing.assert_allclose(found, x.mean(2), atol=1e-4)
    assert int(moments.counts[:, 0].max()) <= 180


@pytest.mark.slow
def test_tempered_chains_that_go_on_with_far_data_have_a_gap():
    def counts(y):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 0.1))
        numpyro.sample("y", dist.Poisson(rate).expand([4]).to_event(1), obs=y)

    run_of = partial(MCMC, num_warmup=300, num_samples=300, progress_bar=False)
    mcmc = run_of(ParallelTempering(counts))
    mcmc.run(jax.random.key(0), jnp.array([3, 5, 4, 2]))
    assert "gap" not in verdict(mcmc).names
    mcmc.post_warmup_state = mcmc.last_state
    with pytest.warns(UserWarning, match="gap: the difference of a chain's log evid"):
        mcmc.run(jax.random.key(1), jnp.array([60, 55, 70, 61]))
    assert "gap" in verdict(mcmc).names


def test_no_moments_are_kept_where_no_verdict_is_due():
    kernel = ScoreLangevin(easy)
    state = kernel.init(jax.random.key(0), 10)
    assert state.moments is None
    state = jax.jit(lambda state: kernel.sample(state, (), {}))(state)
    assert state.moments is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sequential", "parallel", jax.vmap])
def test_chains_that_run_apart_give_one_warning(method):
    # as many as devices in tests, which start in different modes
    start = {"x": 2 * jnp.stack([-jnp.ones(10), jnp.ones(10)])}
    _, messages = run(two_modes, chain_method=method, num_chains=2, start=start)
    (message,) = (m for m in messages if "not to be trusted" in m)
    # chains with dense metrics of their own have no common coordinates
    assert "modes" in message or "unmixed" in message


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_runs_that_are_mapped_are_judged_each():
    def draw(key, loc):
        def model():
            numpyro.sample("x", dist.Normal(loc, 1).expand([2]).to_event(1))

        mcmc = MCMC(
            ScoreLangevin(model),
            num_warmup=200,
            num_samples=400,
            num_chains=4,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(key)
        return mcmc.get_samples()["x"].mean()

    keys, locs = jax.random.split(jax.random.key(0)), jnp.array([-50.0, 50.0])
    assert np.allclose(jax.vmap(draw)(keys, locs), locs, atol=0.5)


@pytest.mark.slow
def test_a_second_run_is_judged_by_itself():
    mcmc, _ = run(easy)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1))
    counts = mcmc.last_state.moments.counts
    assert counts[:, 0].max() <= 400
    assert "gap" not in verdict(mcmc).names


@pytest.mark.slow
def test_runs_in_blocks_are_judged_at_their_end(tmp_path):
    mcmc = MCMC(
        ScoreLangevin(two_modes),
        num_warmup=200,
        num_samples=400,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    with pytest.warns(UserWarning, match="modes") as caught:
        run_in_blocks(mcmc, jax.random.key(0), path=tmp_path, num_blocks=5)
    assert len(caught) == 1
    assert not verdict(mcmc).ok


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")
def test_annealed_chains_are_judged():
    mcmc, _ = run(two_modes, partial(AnnealedLangevin, levels=5), num_chains=16)
    assert verdict(mcmc).findings[0].name in ("modes", "unmixed")


def two_signs():
    x = numpyro.sample("x", dist.Normal(0.5, 1))
    numpyro.sample("y", dist.Normal(x**2, 0.1), obs=2.0)


@pytest.mark.slow
def test_annealed_particles_in_two_modes_have_no_findings():
    """Their draws and evidence are right, and no particle needs to cross."""
    options = {"num_chains": 500, "num_samples": 100}
    mcmc, messages = run(two_signs, AnnealedLangevin, **options)
    assert messages == []
    assert "gap" not in verdict(mcmc).names


def sharp():
    x = numpyro.sample("x", dist.Normal(0, 1).expand([6]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.01).to_event(1), obs=jnp.ones(6))


@pytest.mark.slow
def test_lost_ancestors_are_in_the_verdict():
    """Warned of at the last level, and a finding for those who ask later."""
    options = {"num_chains": 100, "num_samples": 100, "num_warmup": 100}
    mcmc, messages = run(sharp, AnnealedLangevin, **options)
    assert sum("effective number" in message for message in messages) == 1
    assert "ancestors" in {finding.name for finding in verdict(mcmc).findings}


@pytest.mark.slow
def test_a_model_without_latents_has_no_findings():
    def model():
        numpyro.sample("y", dist.Normal(0, 1), obs=0.0)

    mcmc, messages = run(model)
    assert messages == []
    assert "gap" not in verdict(mcmc).names


def test_bad_input():
    with pytest.raises(ValueError, match="must have run"):
        verdict(MCMC(ScoreLangevin(easy), num_warmup=1, num_samples=1))
    short, messages = run(easy, num_warmup=10, num_samples=20)
    assert messages == []
    with pytest.raises(ValueError, match="must have drawn 100 or more"):
        verdict(short)
    other = MCMC(NUTS(easy), num_warmup=5, num_samples=5, progress_bar=False)
    other.run(jax.random.key(0))
    with pytest.raises(TypeError, match="Got NUTS"):
        verdict(other)


def horn(width):
    numpyro.sample("others", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    y = numpyro.sample("y", dist.Normal(x**2, width))
    numpyro.sample("w", dist.Normal(y**2, width))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "least"), [(0.5, 3), (0.2, 5)])
@pytest.mark.filterwarnings("ignore:The draws of this run", "ignore:.*stand still")
def test_horns_that_no_chain_enters_are_loud(width, least):
    """x is N(0, 1), and most of its tails lie where the step is too long.

    A run that has seen ten divergent proposals or fewer may pass: of 12 runs three did
    at a width of 0.5 and none at 0.2.
    """
    mcmc = MCMC(
        ScoreLangevin(horn),
        num_warmup=1000,
        num_samples=2000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    right_or_loud = 0
    for seed in range(6):
        mcmc.run(jax.random.key(seed), width)
        x = np.asarray(mcmc.get_samples()["x"])
        right_or_loud += abs(np.log(x.std())) < 0.1 or not verdict(mcmc).ok
    assert right_or_loud >= least


def test_counts_of_proposals_are_those_of_the_run():
    """Accepted, divergent, refused in a row now and at most; from the first again.

    And places with divergent proposals, and these at the present one.
    """
    moments = RunMoments.zero(jnp.zeros(2))
    accepted = [True, False, False, False, True, False]
    for number, accept in enumerate(accepted, 1):
        diverging = jnp.array(number == 3)
        moments = moments.count_proposal(
            jnp.array(number), jnp.array(accept), diverging
        )
    assert moments.counts.tolist() == [2, 1, 1, 3, 1, 0]
    again = moments.count_proposal(jnp.array(1), jnp.array(False), jnp.array(False))
    assert again.counts.tolist() == [0, 0, 1, 1, 0, 0]


def test_lowest_potentials_are_those_of_draws_and_of_proposals():
    moments = RunMoments.zero(jnp.zeros(2))._replace(lowest=jnp.full(2, -9.0))
    for number, (energy, proposed) in enumerate([(3, 1.0), (2, np.nan), (5, 4.0)], 1):
        moments = moments.follow_lowest(
            jnp.array(number), jnp.array(float(energy)), jnp.array(proposed)
        )
    assert moments.lowest.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("dof", [1, 3, 7, 50])
@pytest.mark.parametrize("probability", [0.95, 0.999])
def test_quantiles_are_those_of_chi_squared_by_its_degrees(probability, dof):
    exact = stats.chi2(dof).ppf(probability) / dof
    assert _chi2_quantile(probability, dof) == pytest.approx(exact, rel=0.04)
