"""Posteriors of models with a plate, for any number of groups."""

import re
import shutil
import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import MLP, ScoreMatching
from numpyro_score.infer import NPSE, AmortizedPosterior
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from numpyro_score.infer.amortized.group_draw_check import _group_densities
from numpyro_score.infer.amortized.group_langevin import (
    ComposedScore,
    Groups,
    langevin,
    particle_covariance,
    without_strays,
)
from numpyro_score.infer.amortized.hierarchical import (
    LOCAL,
    HierarchicalPosterior,
    group_sites,
    local_simulator,
    shared_simulator,
)
from numpyro_score.infer.amortized.sampling import map_in_batches
from tests.hierarchical_models import (
    NOISE_SD,
    VARIANCE,
    LocalDenoiser,
    SharedDenoiser,
    exact_hierarchy,
    exact_score,
    local_posterior,
    normal_groups,
    observe,
    shared_posterior,
)

KEY = jax.random.key(0)
MAX_BIAS, MAX_RATIO = 0.1, 0.1  # of the mean in posterior sd, of the sd


@pytest.fixture(scope="module")
def exact():
    return exact_hierarchy()


def errors(draws, mean, sd):
    """Return offset of the mean in sd, and relative error of the sd."""
    draws = np.asarray(draws, float)
    return abs(draws.mean(0) - mean) / sd, abs(draws.std(0) / sd - 1)


def assert_shared(draws, y, max_bias):
    """Assert that draws of the shared site given y have its mean and sd."""
    offset, width = errors(draws, *shared_posterior(y))
    assert offset < max_bias
    assert width < MAX_RATIO


# The law of the draws


@pytest.mark.parametrize(
    "num_groups", [pytest.param(1000, marks=pytest.mark.slow), 100_000]
)
def test_shared_sites_follow_the_closed_form(exact, num_groups):
    y = observe(num_groups)
    draws = exact.sample_shared(KEY, y, 2000, num_simulations=0)["mu"]
    assert_shared(draws, y, MAX_BIAS)


@pytest.mark.parametrize("num_groups", [pytest.param(1, marks=pytest.mark.slow), 10])
def test_all_sites_follow_the_closed_form(exact, num_groups):
    y = observe(num_groups)
    draws = exact.sample(KEY, y, 2000, num_simulations=0)
    assert draws["mu"].shape == (2000,)
    assert draws["z"].shape == (2000, num_groups)
    for name, expected in (("mu", shared_posterior(y)), ("z", local_posterior(y))):
        offset, width = errors(draws[name], *expected)
        assert offset.max() < MAX_BIAS
        assert width.max() < MAX_RATIO
    # given mu the z_j are independent: together they depend on mu as each does
    slope = np.polyfit(draws["mu"], draws["z"].mean(1), 1)[0]
    assert abs(slope - NOISE_SD**2 / VARIANCE) < 0.15  # of E[z | mu, y] in mu


# Draws judged by the exact score of the model


def judged(exact, shared=None, local=None):
    """Return the posterior as if fitted with ``check=True``, with other denoisers."""
    parts = {}
    for name, denoiser in (("shared", shared), ("local", local)):
        part = getattr(exact, name)
        denoiser = denoiser or part.score.denoiser
        score = replace(part.score, denoiser=denoiser)
        parts[name] = replace(part, score=score, verdict=FitVerdict((), 0))
    return replace(exact, **parts)


@pytest.mark.parametrize("num_groups", [1, 10])
def test_right_draws_are_silent(exact, num_groups):
    """And a second call compiles nothing for its check."""
    y, posterior = observe(num_groups), judged(exact)
    posterior.sample(KEY, y, num_simulations=0)
    programs = _group_densities._cache_size()
    posterior.sample(KEY, y + 1, num_simulations=0)
    assert _group_densities._cache_size() == programs > 0


@pytest.mark.parametrize("method", ["sample", "sample_shared"])
def test_errors_that_add_up_over_groups_are_loud(exact, method):
    y = observe(10)
    posterior = judged(exact, SharedDenoiser(0.3))
    with pytest.warns(UserWarning, match="Given these groups") as caught:
        draws = getattr(posterior, method)(KEY, y, num_simulations=0)
    mean, sd = shared_posterior(y)
    offset = (np.asarray(draws["mu"]).mean() - mean) / sd
    words = r"mu is off by about ([0-9.]+) sd \(high\)"
    found = re.search(words, str(caught[0].message))
    assert float(found[1]) == pytest.approx(offset, abs=0.15)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShiftedLocalDenoiser:
    """The exact one, given an observation that is off."""

    def __call__(self, x, level, context):
        return LocalDenoiser()(x, level, context + jnp.array([2.0, 0.0]))


def test_wrong_local_draws_are_loud(exact):
    posterior = judged(exact, local=ShiftedLocalDenoiser())
    match = r"sd\): in group 0, given .*, z is off by .* and in 7 more groups"
    with pytest.warns(UserWarning, match=match):
        posterior.sample(KEY, observe(10), num_simulations=0)


def prior_score(x):
    return -x


def particles_after(
    y,
    denoiser=SharedDenoiser(),
    simulate=None,
    num_simulations=0,
    prior=prior_score,
    strays=0.0,
):
    """Return draws by Langevin steps alone, from the exact posterior."""
    mean, sd = shared_posterior(y)
    x = mean + sd * jax.random.normal(KEY, (1000, 1)) + strays
    each = jnp.full((1, 1, 1), 1 + 1 / VARIANCE)
    groups = Groups(jnp.asarray(y, float)[:, None], each, jnp.eye(1))
    score = exact_score(denoiser)
    target = ComposedScore(score, prior, simulate, groups, 64, num_simulations)
    return jax.jit(lambda key, x: langevin(key, x, target))(KEY, x)


def test_steps_without_the_prior_correction_are_caught():
    """The mutant: the sum of the scores, of which none of the prior is taken away."""
    y = observe(10)
    right, _ = particles_after(y)
    assert errors(right[:, 0], *shared_posterior(y))[0] < MAX_BIAS
    wrong, _ = particles_after(y, SharedDenoiser(forget_prior=True))
    assert errors(wrong[:, 0], *shared_posterior(y))[0] > 5 * MAX_BIAS


def simulate(key, x):
    return x + np.sqrt(VARIANCE) * jax.random.normal(key, (1,))


def test_simulations_correct_the_mean_error_of_a_net():
    """Errors that are a tenth of the score's sd add up to a posterior sd."""
    y = observe(100)
    biased = SharedDenoiser(0.1)
    wrong, _ = particles_after(y, biased)
    assert errors(wrong[:, 0], *shared_posterior(y))[0] > 8 * MAX_BIAS
    right, convergence = particles_after(y, biased, simulate, 10_000)
    assert convergence.error < 0.06
    assert_shared(right[:, 0], y, MAX_BIAS + 3 * convergence.error)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoughDenoiser:
    """The exact one with small errors, another function of x for every group."""

    def __call__(self, x, level, context=None):
        phase = 0.0 if context is None else 10 * context.reshape(1)
        exact = SharedDenoiser()(x, level, context)
        return exact + 3e-4 * jnp.sin(50 * x + phase)


def test_small_errors_of_a_net_at_low_noise_do_not_move_draws():
    """They grow as (D - x) / r^2, and over the groups: at r = 0.01 draws are lost."""
    y = observe(10)
    draws, _ = particles_after(y, RoughDenoiser())
    assert_shared(draws[:, 0], y, 2 * MAX_BIAS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatDenoiser:
    """The exact one, with a slope given a group that is ``slope`` too flat."""

    slope: float

    def __call__(self, x, level, context=None):
        exact = SharedDenoiser()(x, level, context)
        if context is None:
            return exact
        return exact + self.slope * (x - 1.0) / (1 + 1 / VARIANCE + 1 / level**2)


def test_simulations_correct_the_slope_of_a_net():
    """Its errors at the center vanish; away from it they grow."""
    y = observe(100)
    flat = FlatDenoiser(0.8)  # more than that of the exact score: it has no peak
    right, _ = particles_after(y, flat, simulate, 10_000)
    assert_shared(right[:, 0], y, 2 * MAX_BIAS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepellingDenoiser:
    """The exact one near 1; farther than ``reach`` its likelihood points outward."""

    reach: float

    def __call__(self, x, level, context=None):
        exact = SharedDenoiser()(x, level, context)
        prior = SharedDenoiser()(x, level, None)
        outward = prior + (x - 1.0) / (1 + 1 / level**2)
        return jnp.where(
            (jnp.abs(x - 1.0) < self.reach) | (context is None), exact, outward
        )


def test_stray_particles_do_not_take_the_others_along():
    y = observe(1000)
    strays = jnp.where(jnp.arange(1000) % 50 == 0, 3.0, 0.0)[:, None]
    denoiser = RepellingDenoiser(2.2)
    draws, found = particles_after(y, denoiser, simulate, 10_000, strays=strays)
    assert found.ok
    assert_shared(draws[:, 0], y, 2 * MAX_BIAS + 3 * found.error)


def test_modes_are_not_taken_for_stray_particles():
    x = jnp.where(jnp.arange(1000) % 10 == 0, 50.0, 0.0)[:, None]
    x = x + jax.random.normal(KEY, (1000, 1))
    np.testing.assert_array_equal(without_strays(KEY, x), x)
    box = jnp.array([[-5.0], [30.0]])  # of prior draws: none are there
    assert without_strays(KEY, x, box).max() < 5


def test_few_simulations_for_many_groups_warn():
    y = observe(100)
    _, convergence = particles_after(y, SharedDenoiser(), simulate, 500)
    # of 4 rounds; the share of the likelihood in the precision is nearly 1
    assert abs(convergence.error - (100 / 500 / 4) ** 0.5) < 0.05
    with pytest.warns(UserWarning, match=r"Pass `num_simulations` of .* Got 500"):
        convergence.warn(64, 500)


def test_draws_that_have_not_converged_warn():
    """A prior whose curvature cancels that of the likelihood: a random walk."""
    y, slope = observe(10), 10 / VARIANCE
    _, convergence = particles_after(y, prior=lambda x: slope * x)
    assert convergence.width > 0.5
    with pytest.warns(UserWarning, match="have not converged"):
        convergence.warn(64, 0)


# Learned scores


def nets(num_shared, num_observed):
    """Return small nets of shared sites and of one local number."""
    options = {"width": 64, "depth": 2, "norm": False}
    shared = MLP(num_shared, context_size=num_observed, **options)
    return shared, MLP(1, context_size=num_observed + num_shared, **options)


@pytest.mark.slow
@pytest.mark.long
def test_learned_groups_are_near_the_closed_form(tmp_path):
    npse = NPSE(normal_groups, "y", plate="groups", net=nets(1, 1))
    learned = npse.fit(KEY, 10_000, num_steps=4000, check=False, progress_bar=False)
    learned.save(tmp_path / "posterior")
    posterior = npse.load(tmp_path / "posterior")
    y = observe(10)
    draws = posterior.sample(KEY, y, 4000, num_simulations=20_000)
    for name, expected in (("mu", shared_posterior(y)), ("z", local_posterior(y))):
        offset, width = errors(draws[name], *expected)
        print(f"{name}: mean {np.mean(offset):.3f} sd off, sd by {np.mean(width):.3f}")
        assert np.mean(offset) < 0.15
        assert np.mean(width) < 0.15


# Which models


def groups_of(*sites, size=3, **options):
    """Return a model of ``normal_groups`` with more sites, called in the plate."""

    def model(num_groups=size):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("groups", num_groups, **options) as index:
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            loc = z
            for site in sites:
                loc = site(mu, loc, index, num_groups)
            numpyro.sample("y", dist.Normal(loc, 0.5))

    return model


def data_outside():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 3):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
    numpyro.sample("y", dist.Normal(z[jnp.array([0, 0, 1, 2])], 1.0).to_event(1))


def shared_of_groups():
    """A site outside of the plate whose law depends on those inside."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 3):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0))
    numpyro.sample("late", dist.Normal(z.sum(), 1.0))


def size_by_default(num_groups=2):
    """The size of the plate is not passed, and the law depends on it."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", num_groups):
        numpyro.sample("y", dist.Normal(mu / num_groups**0.5, 1.0))


def nothing_shared():
    with numpyro.plate("groups", 3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0))


def array_of_groups():
    """Standard errors of all groups, not sites, beside one group of z."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 3):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, jnp.array([1.0, 2.0, 3.0])))


SCALES = jnp.array([1.0, 2.0, 3.0])
ALIKE = "must be independent and alike"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (groups_of(), {"plate": "group"}, r"Got 'group'; the model has \['groups'\]"),
        (groups_of(subsample_size=2), {}, r"must not be subsampled.*=2 of 3"),
        (groups_of(), {"latents": "z"}, r"must name all latent.*Left out: \['mu'\]"),
        (data_outside, {}, r"must be in `plate` 'groups'.* \['y'\] outside"),
        (nothing_shared, {}, r"a latent site outside of `plate`"),
        (shared_of_groups, {}, r"Site 'late' must not depend on `plate`"),
        (array_of_groups, {}, r"Site 'y' must have one group per index"),
        (groups_of(lambda mu, z, i, n: z * SCALES[i]), {}, ALIKE),  # known by index
        (groups_of(lambda mu, z, i, n: jnp.cumsum(z)), {}, ALIKE),  # of the one before
        (groups_of(lambda mu, z, i, n: z - z.mean()), {}, ALIKE),  # of all
        (groups_of(lambda mu, z, i, n: z / len(i)), {}, ALIKE),  # of their number
        (groups_of(lambda mu, z, i, n: z / n), {}, r"Argument 1 of the model must set"),
    ],
)
def test_models_that_are_not_of_alike_groups_are_refused(model, options, message):
    npse = NPSE(model, "y", **{"plate": "groups", **options})
    args = (3,) if "Argument" in message else ()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        npse.simulator(*args)


def test_sizes_by_default_are_looked_at():
    npse = NPSE(size_by_default, "y", plate="groups")
    with pytest.raises(ValueError, match="Argument `num_groups` of the model must set"):
        npse.simulator()


def small_size(num_groups=3):
    """As ``size_by_default``, in units of a millionth."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1e-6))
    with numpyro.plate("groups", num_groups):
        numpyro.sample("y", dist.Normal(mu / num_groups**0.5, 1e-6))


def small_index(num_groups=3):
    """A simulator in units of a millionth that knows its group."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1e-6))
    with numpyro.plate("groups", num_groups) as index:
        noise = numpyro.sample("noise", dist.Normal(0.0, 1.0))
        numpyro.deterministic("y", mu * SCALES[index] + 1e-6 * noise)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_size, "Argument `num_groups` of the model must set"),
        (small_index, ALIKE),
    ],
)
def test_groups_in_small_units_are_compared_in_them(model, message):
    """Differences of a millionth passed for rounding."""
    npse = NPSE(model, "y", latents="mu", plate="groups")
    with pytest.raises(ValueError, match=message):
        npse.simulator()


def empirical_prior(y):
    mu = numpyro.sample("mu", dist.Normal(y.mean(), 1.0))
    with numpyro.plate("groups", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_priors_from_the_data_are_refused():
    npse = NPSE(empirical_prior, "y", plate="groups")
    with pytest.raises(ValueError, match=r"Argument 1 .*the sites \['mu', 'y'\]"):
        npse.simulator(np.array([0.0, 1.0, 5.0]))


def nested(num_groups=4):
    """A plate of two groups outside, and one of three repetitions inside."""
    with numpyro.plate("outer", 2, dim=-1):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", num_groups, dim=-2):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        with numpyro.plate("outer", 2, dim=-1):
            w = numpyro.sample("w", dist.Normal(mu, 1.0))
            numpyro.sample("y", dist.Normal(w + z[..., 0], 1.0))


def quick(npse, **options):
    options = {"num_steps": 2, "check": False, "progress_bar": False, **options}
    return npse.fit(KEY, 200, **options)


@pytest.mark.slow  # it compiles two trainings and two kinds of draws
def test_plates_inside_and_outside_keep_their_places():
    nets = (
        MLP(2, width=8, depth=1, context_size=2),
        MLP(5, width=8, depth=1, context_size=4),
    )
    posterior = quick(NPSE(nested, "y", plate="groups", net=nets))
    y = jnp.zeros((5, 2))
    draws = posterior.sample(KEY, y, 7, num_simulations=0)
    shapes = {name: value.shape for name, value in draws.items()}
    assert shapes == {"mu": (7, 2), "z": (7, 5, 1, 3), "w": (7, 5, 2)}
    with pytest.raises(ValueError, match=r"Got \(2, 5\), expected \(groups, 2\)"):
        posterior.sample(KEY, y.T, 7)


def simulated_groups(num_groups=3):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", num_groups):
        noise = numpyro.sample("noise", dist.Normal(0.0, 1.0))
        numpyro.deterministic("y", mu + noise)


@pytest.mark.slow
def test_groups_without_a_likelihood_cannot_be_judged_and_fit_says_so():
    npse = NPSE(simulated_groups, "y", "mu", plate="groups", net=(nets(1, 1)[0], None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quick(npse, check=True)
    assert [w for w in caught if "single groups only" in str(w.message)]


# Which observations


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(0), r"at least one group.*Predictive"),
        (np.zeros((3, 2)), r"Got \(3, 2\), expected \(groups\)"),
        (
            np.array([0.0, np.nan, np.inf]),
            r"in 2 of 3 groups, the first of them \[1, 2\]",
        ),
        ([[0.0], [0.0, 1.0]], r"must be an array of groups of one shape"),
        ({"z": np.zeros(3)}, r"exactly the observed sites"),
        (np.ma.masked_array(np.zeros(3), [0, 1, 0]), r"mask"),
        (np.array(["a", "b"]), r"must be real numbers"),
    ],
)
def test_groups_that_do_not_fit_are_refused(exact, observation, message):
    with pytest.raises(ValueError, match=message):
        exact.sample(KEY, observation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` must be"),
        ({"num_samples": 0}, r"`num_samples` must be"),
        ({"num_simulations": -1}, r"`num_simulations` must be"),
    ],
)
def test_options_of_draws_are_checked(exact, options, message):
    with pytest.raises(ValueError, match=message):
        exact.sample(KEY, np.zeros(3), **options)


def test_what_does_not_fit_groups_is_named(exact):
    data = np.zeros(3)
    shared = dict.fromkeys(exact.shared.latents.names, 0.0)
    with pytest.raises(ValueError, match="`shared` must have one draw per row"):
        exact.sample_local(KEY, data, shared)
    shared = dict.fromkeys(shared, "a")
    with pytest.raises(ValueError, match="` must be real numbers"):
        exact.sample_local(KEY, data, shared)
    with pytest.raises(TypeError, match="`observation` must be known when `sample`"):
        jax.jit(lambda y: exact.sample(KEY, y))(data)


def test_options_that_do_not_go_with_a_plate_are_refused():
    with pytest.raises(ValueError, match="`net` must be a pair"):
        NPSE(normal_groups, "y", plate="groups", net=MLP(1, context_size=1))
    with pytest.raises(ValueError, match="`fit_rounds` must be without `plate`"):
        NPSE(normal_groups, "y", plate="groups").fit_rounds(KEY, np.zeros(3), 100)


# Files


def untrained(key, simulator, num_given):
    """A posterior of one latent number whose net has not been trained."""
    trainer = ScoreMatching(MLP(1, width=4, depth=1, context_size=num_given))
    rows = np.array([[0.0], [1.0]])
    state = trainer.init(key, rows, context=np.tile(rows, num_given))
    return AmortizedPosterior(trainer.get_score(state), simulator)


def test_parts_of_two_posteriors_are_refused(tmp_path):
    npse = NPSE(normal_groups, "y", plate="groups", net=nets(1, 1))
    simulator = npse.simulator()
    sites = group_sites(simulator)
    shared, local = (
        shared_simulator(simulator, sites),
        local_simulator(simulator, sites),
    )
    for name, key in zip(("one", "two"), jax.random.split(KEY), strict=True):
        parts = untrained(key, shared, 1), untrained(key, local, 2)
        HierarchicalPosterior.of(*parts, sites.axes).save(tmp_path / name)
    npse = replace(npse, net=None)
    assert npse.load(tmp_path / "one").local is not None
    shutil.rmtree(tmp_path / "one" / LOCAL)
    with pytest.raises(FileNotFoundError, match="one/local, which has no layout"):
        npse.load(tmp_path / "one")
    shutil.copytree(tmp_path / "two" / LOCAL, tmp_path / "one" / LOCAL)
    with pytest.raises(ValueError, match="must hold parts that were saved together"):
        npse.load(tmp_path / "one")


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_batches_give_what_all_at_once_give(count):
    rows = {"a": jnp.arange(count * 2.0).reshape(count, 2), "b": jnp.arange(count)}
    found = map_in_batches(lambda row: row["a"].sum() * row["b"], rows, 4)
    np.testing.assert_allclose(found, rows["a"].sum(1) * rows["b"])


def test_correlations_of_few_particles_are_shrunk_and_variances_are_not():
    x = jnp.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [5.0, 10.0]])
    found = np.asarray(particle_covariance(x))
    exact = np.cov(np.asarray(x).T)
    np.testing.assert_allclose(np.diag(found), np.diag(exact), rtol=1e-5)
    np.testing.assert_allclose(found[0, 1], exact[0, 1] * 4 / (2 + 4), rtol=1e-5)
