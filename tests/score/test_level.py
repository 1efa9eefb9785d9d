"""The level in use of a learned score, and draws off its data."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from scipy import stats

from numpyro_score import (
    MLP,
    VE,
    VP,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreMatching,
    ScoreModel,
    io,
)
from numpyro_score.diagnostics import mark_verdict, verdict
from numpyro_score.io import folder
from numpyro_score.model.data_range import OffDataCounts, find_off_data
from numpyro_score.model.potential import model_potential
from numpyro_score.score.identity import IdentityKey
from numpyro_score.score.level import (
    _MEASURED,
    DataRange,
    _coordinate_range,
    _energies,
    compare_densities,
    data_range,
    is_off_data,
    known_level,
    level_in_use,
    run_chains,
)

SDE = VE()
ROWS = jax.random.normal(jax.random.key(0), (3000, 2))


def exact(x, t):
    return -x / (1 + SDE.sigma(t) ** 2)


def invented(x, t):
    """Score of a normal law that pushes outwards beyond its data at low levels."""
    lost = (SDE.sigma(t) < 0.08) & (jnp.abs(x).max() > 4.5)
    return jnp.where(lost, x, exact(x, t))


def model_of(score_fn):
    return ScoreModel.from_fn(score_fn, SDE, (2,), data=ROWS)


def test_densities_of_a_normal_law_agree_with_its_own():
    score = model_of(exact)
    for level in (0.01, 0.3):
        by_line, by_flow = compare_densities(score, score.rows, level)
        np.testing.assert_allclose(by_line, by_flow, atol=0.05, rtol=0.03)
    # doubled rows, from mean 0: the density falls by 3/2 |a|^2 of chi-squared |a|^2
    assert by_line[3].mean() == pytest.approx(-3, abs=1.5)
    assert by_line[5].max() < -10


def test_an_exact_score_is_used_at_its_lowest_level():
    score = model_of(exact)
    assert level_in_use(score) == score.level_in_use == SDE.sigma_min
    assert ScoreDistribution(score).t == SDE.t_min


@pytest.mark.parametrize("sde", [VE(0.01, 20.0), VP()], ids=str)
def test_exact_scores_of_two_modes_are_used_at_their_lowest_level(sde):
    """Steps from beyond one mode to beyond the other are missed by Simpson's rule."""
    means, shares, sd = jnp.array([[1.0], [-1.0]]), jnp.array([0.6, 0.4]), 0.6

    def score_fn(x, t):
        variance = jnp.square(sde.alpha(t) * sd) + jnp.square(sde.sigma(t))
        away = sde.alpha(t) * means - x
        logits = jnp.log(shares) - 0.5 * jnp.square(away).sum(1) / variance
        return jax.nn.softmax(logits) @ away / variance

    rng = np.random.default_rng(0)
    rows = np.where(rng.random((2000, 1)) < 0.6, 1.0, -1.0)
    rows = np.float32(rows + sd * rng.normal(size=rows.shape))
    assert level_in_use(ScoreModel.from_fn(score_fn, sde, (1,), data=rows)) == 0.01


def normal_law(case):
    """Return rows of a normal law, few for their columns, and its exact score."""
    if case == "nearly equal columns":
        num_rows, covariance = 100, np.ones((5, 5)) + 1e-4 * np.eye(5)
    else:
        num_rows, grid = 60, np.linspace(0, 1, 32)
        covariance = np.exp(-0.5 * np.square((grid[:, None] - grid) / 0.3))
    size = len(covariance)
    rows = np.random.default_rng(3).multivariate_normal(
        np.zeros(size), covariance, num_rows
    )
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = jnp.asarray(np.maximum(values, 0.0)), jnp.asarray(vectors)

    def score_fn(x, t):
        return -vectors @ ((x @ vectors) / (values + SDE.sigma(t) ** 2))

    return ScoreModel.from_fn(score_fn, SDE, (size,), data=np.float32(rows))


@pytest.mark.parametrize("case", ["nearly equal columns", "smooth curves"])
def test_exact_scores_with_few_rows_are_used_at_their_lowest_level(case):
    assert level_in_use(normal_law(case)) == SDE.sigma_min


def test_an_invented_region_raises_the_level_and_is_said_once():
    score = model_of(invented)
    with pytest.warns(
        UserWarning, match=r"level 0.1 .* lowest of 0.01.* 1\.00\d\d times as wide"
    ):
        law = ScoreDistribution(score)
    assert score.level_in_use == 0.1
    assert SDE.sigma(law.t) == pytest.approx(0.1, rel=1e-4)
    assert ScoreDistribution(score).t == law.t  # silent: warnings are errors
    assert ScoreDistribution(score, t=SDE.t_min).t == SDE.t_min


def test_the_level_is_known_inside_of_programs():
    score = model_of(exact)

    @jax.jit
    def closed_over(x):
        assert level_in_use(score) == SDE.sigma_min
        return ScoreDistribution(score).log_prob(x)

    @jax.jit
    def given(score, x):
        assert level_in_use(score) is None
        return ScoreDistribution(score).log_prob(x)

    x = jnp.zeros(2)
    assert closed_over(x) == pytest.approx(float(given(score, x)), abs=1e-5)


@pytest.mark.parametrize("sde", [VE(), VP()], ids=str)
def test_energy_of_points_without_noise_is_the_share_of_the_noise_in_a_normal_law(sde):
    """Of r s = -r u / (1 + r^2), whatever the signal scale."""
    score = ScoreModel.from_fn(
        lambda x, t: -x / (sde.alpha(t) ** 2 + sde.sigma(t) ** 2), sde, (2,)
    )
    u, levels = jnp.array([[1.0, 3.0], [0.0, 2.0]]), jnp.array([0.5, 2.0])
    found = _energies(score, u, levels)
    share = (levels / (1 + levels**2)) ** 2
    np.testing.assert_allclose(found, share[:, None] * jnp.array([5.0, 2.0]), rtol=1e-3)


def test_points_off_the_data_are_told_at_the_signal_scale_of_their_time():
    """Of unit variance at alpha = .45: 5 sd are 11 of the clean data, of sd 2.2."""
    sde = VP()
    rows = jax.random.normal(jax.random.key(1), (200, 2))
    score = ScoreModel.from_fn(lambda x, t: -x, sde, (2,), data=rows)
    law = ScoreDistribution(score, t=float(sde.time(2.0)))
    alpha = float(sde.alpha(law.t))
    assert alpha == pytest.approx(0.2**0.5, rel=1e-3)
    usual = jax.random.normal(jax.random.key(2), (400, 2))
    far = jnp.tile(jnp.array([5.0, 0.0]), (400, 1))
    assert find_off_data({"x": law}, lambda: {"x": usual}) == []
    (found,) = find_off_data({"x": law}, lambda: {"x": far})
    assert found.number == 1.0


def test_points_off_the_data_are_those_of_their_last_thousandth():
    score = model_of(exact)
    found = data_range(score, 0.01)
    fresh = jax.random.normal(jax.random.key(1), (20_000, 2))
    share = is_off_data(score, found, fresh).mean()
    assert 2e-4 < share < 5e-3  # a thousandth by each of two kinds of limits
    # as |x|^2 is chi-squared
    radius = stats.chi2(2).ppf([0.99, 0.99999]) ** 0.5
    points = radius[:, None] * jnp.array([[0.6, 0.8]])
    assert is_off_data(score, found, points).tolist() == [False, True]
    assert is_off_data(score, found, jnp.full((1, 2), jnp.nan)).all()
    assert found.max_share == 0.01
    few = replace(score, rows=score.rows[:100])
    assert data_range(few, 0.01).max_share == pytest.approx(0.07)


def test_points_beyond_the_limit_of_any_level_are_off_the_data():
    score = ScoreModel.from_fn(exact, SDE, (2,))
    # |r s|^2 / d is r^2 / (1 + r^2)^2 |x|^2 / d: .0098 and .25 times 1 or 4
    points = jnp.array([[1.0, 1.0], [2.0, -2.0]])
    for limits, off in [
        ((0.02, 0.5), [False, True]),
        ((1.0, 0.5), [False, True]),
        ((0.02, 2.0), [False, True]),
        ((1.0, 2.0), [False, False]),
    ]:
        limited = DataRange((0.1, 1.0), limits, (-5.0, -5.0), (5.0, 5.0), 0.01)
        assert is_off_data(score, limited, points).tolist() == off


def test_points_beyond_the_range_of_any_coordinate_are_off_the_data():
    score = ScoreModel.from_fn(exact, SDE, (2,))
    points = jnp.array([[0.0, 0.0], [1.5, 0.0], [0.0, -1.5], [-1.5, 0.0]])
    limited = DataRange((0.1,), (9.0,), (-2.0, -1.0), (1.0, 2.0), 0.01)
    assert is_off_data(score, limited, points).tolist() == [False, True, True, False]


def test_ends_of_coordinates_leave_out_one_in_a_thousand():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.exponential(size=2048), rng.normal(size=2048)], 1)
    low, high = _coordinate_range(rows)
    fresh = np.stack([rng.exponential(size=10**5), rng.normal(size=10**5)], 1)
    assert ((fresh < low) | (fresh > high)).any(1).mean() < 0.003
    assert -0.3 < low[0] < 0.01  # the short side
    assert 5 < high[0] < 15
    assert -6 < low[1] < -3


def test_chains_know_a_law_by_its_score():
    score = model_of(exact)
    draws = run_chains(score, score.rows, 0.3)
    assert draws.shape == (15 * 128, 2)
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.15)  # 700 effective draws
    np.testing.assert_allclose(draws.var(0), 1.09, atol=0.2)
    lost = run_chains(model_of(invented), score.rows, 0.03)
    assert is_off_data(score, data_range(score, 0.03), lost).mean() > 0.05


def test_trained_scores_keep_held_out_rows():
    data = np.random.default_rng(0).normal(3.0, 2.0, (200, 2)).astype(np.float32)

    def run(net=MLP(2, width=8, depth=1), **options):
        key, options = jax.random.key(0), {"progress_bar": False, **options}
        trainer = ScoreMatching(net)
        return trainer.run(key, 2, data[:100], batch_size=50, **options).score

    score = run(validation=data[100:])
    np.testing.assert_allclose(
        score.rows, (data[100:] - score.standardize.loc) / score.standardize.scale
    )
    assert run().rows.shape == (100, 2)
    conditional = MLP(2, width=8, depth=1, context_size=2)
    assert run(conditional, context=data[:100]).rows is None


def test_rows_are_saved_and_files_without_them_are_read(tmp_path):
    trainer = ScoreMatching(MLP(2, width=8, depth=1))
    score = trainer.get_score(trainer.init(jax.random.key(0), ROWS))
    assert score.rows.shape == (2048, 2)
    io.save(score, tmp_path / "new")
    io.save(replace(score, rows=None), tmp_path / "old")
    np.testing.assert_array_equal(io.load(tmp_path / "new").rows, score.rows)
    old = io.load(tmp_path / "old")
    assert old.rows is None
    assert old.level_in_use == SDE.sigma_min


def test_the_level_is_saved_once_it_was_measured(tmp_path):
    trainer = ScoreMatching(MLP(2, width=8, depth=1))
    score = trainer.get_score(trainer.init(jax.random.key(0), ROWS))
    io.save(score, tmp_path / "before")
    assert io.load(tmp_path / "before").denoiser.measured_level is None
    _MEASURED[IdentityKey.of(score)] = 0.2
    io.save(score, tmp_path / "after")
    loaded = io.load(tmp_path / "after")
    assert loaded.denoiser.measured_level == loaded.level_in_use == 0.2
    assert level_in_use(loaded) == known_level(loaded) == 0.2
    assert jax.jit(lambda s: level_in_use(s) * s.rows.sum())(loaded).shape == ()
    io.save(loaded, tmp_path / "again")
    assert io.load(tmp_path / "again").level_in_use == 0.2
    assert replace(loaded, rows=None).level_in_use == SDE.sigma_min
    # a score that is guided, or of another net, is not that which was measured
    assert known_level(replace(loaded, denoiser=model_of(exact).denoiser)) is None


@pytest.mark.parametrize("value", [-0.1, 1e9, "0.2", True])
def test_levels_of_other_processes_are_refused(tmp_path, value):
    trainer = ScoreMatching(MLP(2, width=8, depth=1))
    score = trainer.get_score(trainer.init(jax.random.key(0), ROWS))
    denoiser = replace(score.denoiser, measured_level=0.2)
    io.save(replace(score, denoiser=denoiser), tmp_path / "score")
    arrays, header = folder.read(tmp_path / "score")
    folder.write(tmp_path / "other", arrays, header | {"level_in_use": value})
    with pytest.raises(ValueError, match=r"`level_in_use` in .*header\.json must be"):
        io.load(tmp_path / "other")


def model_with(score, t=None):
    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score, t=t))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    return model


def run(kernel, score, y, num_warmup=200, num_chains=4):
    mcmc = MCMC(
        kernel(model_with(score)),
        num_warmup=num_warmup,
        num_samples=200,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), jnp.full(2, y))
    return mcmc


def off_data(mcmc):
    return [f for f in verdict(mcmc).findings if f.name == "off_data"]


def test_a_level_below_the_trusted_one_is_found():
    score = model_of(invented)  # trusted down to .1
    for level, trusted in ((0.1, True), (0.2, True), (0.099, False), (0.01, False)):
        model = model_with(score, t=score.sde.time(level))
        potential = model_potential(model, (jnp.zeros(2),), {})
        found = OffDataCounts.zero(potential, by_line_integrals=True).level_findings()
        assert trusted == (found == [])
    assert (found[0].name, found[0].threshold) == ("level", 0.1)
    assert found[0].number == pytest.approx(0.01, rel=1e-4)


def test_a_run_at_a_level_below_the_trusted_one_warns():
    model = model_with(model_of(invented), t=SDE.time(0.05))
    mcmc = MCMC(
        ScoreLangevin(model), num_warmup=200, num_samples=200, progress_bar=False
    )
    with pytest.warns(UserWarning, match="level: .* of site 'x' is 0.05 .*old 0.1"):
        mcmc.run(jax.random.key(0), jnp.ones(2))


def test_draws_off_the_data_are_found_and_named():
    score, kernel = model_of(exact), ScoreLangevin
    assert off_data(run(kernel, score, 1.0)) == []
    with pytest.warns(UserWarning, match="off_data: .* 'x', at noise level 0.01"):
        mcmc = run(kernel, score, 5.0)
    (found,) = off_data(mcmc)
    # posterior N(.8 y, .2 I) at y = (5, 5): |x| = 5.66, beyond 3.7 but for 1e-5
    assert 0.99 < found.number <= 1
    assert "ScoreDistribution(score, t=score.sde.time(level))" in found.remedy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ArviZ
        import arviz

        tree = mark_verdict(arviz.from_numpyro(mcmc), mcmc)
    assert "off_data" in tree.attrs["verdict"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (ParallelTempering, {"num_warmup": 300}),
        (AnnealedLangevin, {"num_chains": 128, "num_warmup": 100}),
    ],
)
def test_other_kernels_find_draws_off_the_data(kernel, options):
    score = model_of(exact)
    assert off_data(run(kernel, score, 1.0, **options)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few ancestors, and of this
        mcmc = run(kernel, score, 5.0, **options)
    assert off_data(mcmc)[0].number > 0.99
