"""A posterior as a prior: joint laws of sites, learned from draws of them."""

import contextlib
import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import condition, do, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, Predictive, log_likelihood
from numpyro.infer.util import log_density

from numpyro_score import MLP, VE, ScoreLangevin, ScoreMatching, ScoreModel, io
from numpyro_score import learn_prior as learn
from numpyro_score.data.support import Support
from numpyro_score.infer.prior.check import effective_share
from numpyro_score.infer.prior.learn_prior import (
    _split,
    _values,
    _warn_of_angles,
    _warn_of_blur,
    _warn_of_few,
    _warn_of_repeated_terms,
)
from numpyro_score.model.handlers import with_prior
from numpyro_score.model.latents import LatentLayout, LatentSite
from numpyro_score.model.learned_prior import LearnedPrior, PriorFit
from numpyro_score.model.potential import model_potential
from tests.targets import unchecked

KEY = jax.random.key(0)
NORMAL = ScoreModel.from_fn(
    lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
)
LOC, FACTOR = np.array([0.5, -1.0]), np.array([[1.0, 0.0], [0.6, 0.4]])
RNG = np.random.default_rng(0)
REALS, POSITIVE = dist.constraints.real, dist.constraints.positive


def site(name, constraint):
    return LatentSite(name, Support.of(constraint, ()), ())


def vector(name):
    return LatentSite(name, Support.of(REALS, (2,)), (2,))


def gaussian_prior(score=NORMAL, second=POSITIVE):
    """Return the prior under which (a, log s) is normal."""
    latents = LatentLayout((site("a", REALS), site("s", second)))
    arrays = jnp.asarray(LOC, float), jnp.asarray(FACTOR, float)
    return LearnedPrior(score, *arrays, latents, 0.1)


def model(y=None):
    a = numpyro.sample("a", dist.Normal(0, 10))
    s = numpyro.sample("s", dist.HalfNormal(10.0))
    b = numpyro.sample("b", dist.Normal(7, 0.5))
    numpyro.deterministic("sum", a + b)
    numpyro.sample("y", dist.Normal(a + jnp.log(s), 0.5), obs=y)


SHAPES = {
    "real": (),
    "positive": (),
    "unit": (),
    "simplex": (3,),
    "ordered": (3,),
    "cholesky": (3, 3),
    "effect": (2, 3),
}
SUPPORTS = {
    "real": REALS,
    "positive": POSITIVE,
    "unit": dist.constraints.unit_interval,
    "simplex": dist.constraints.simplex,
    "ordered": dist.constraints.ordered_vector,
    "cholesky": dist.constraints.corr_cholesky,
    "effect": REALS,
}


@pytest.fixture(autouse=True, scope="module")
def without_type_checker():
    """Let our own checks see what users pass, who run without beartype."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def mixed():
    numpyro.sample("real", dist.Normal(0, 1))
    numpyro.sample("positive", dist.HalfNormal(1.0))
    numpyro.sample("unit", dist.Beta(1.0, 1.0))
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    base = dist.Normal(0, 1).expand([3]).to_event(1)
    transform = dist.transforms.OrderedTransform()
    numpyro.sample("ordered", dist.TransformedDistribution(base, transform))
    numpyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with numpyro.plate("group", 2):
        numpyro.sample("effect", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    numpyro.sample("count", dist.Poisson(2.0))


@pytest.fixture(scope="module")
def learned():
    """Return correlated draws that are normal in unconstrained space, and a prior."""
    layout = LatentLayout(
        tuple(LatentSite(k, Support.of(SUPPORTS[k], v), v) for k, v in SHAPES.items())
    )
    mix = np.eye(layout.size) + 0.2 * RNG.normal(size=(layout.size, layout.size))
    z = 0.3 * RNG.normal(size=(400, layout.size)) @ mix
    draws = layout.unflatten(jnp.asarray(z, float))
    prior = learn(KEY, draws, mixed, num_steps=20, progress_bar=False)
    return draws, layout, prior


def test_draws_are_whitened_and_come_back(learned):
    draws, layout, prior = learned
    u = np.asarray(prior.whiten(draws))
    assert prior.names == tuple(SHAPES)
    assert u.shape == (400, layout.size)
    np.testing.assert_allclose(u.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(u, rowvar=False), np.eye(u.shape[1]), atol=6e-3)
    back = prior.constrain(u * np.sqrt(1 + prior.level**2))
    for name in SHAPES:
        np.testing.assert_allclose(back[name], draws[name], atol=1e-4, rtol=1e-3)


def test_gaussian_laws_are_exact_at_every_level():
    prior = gaussian_prior()
    draws = prior.sample(KEY, (20_000,))
    z = np.stack([draws["a"], np.log(draws["s"])], 1)
    np.testing.assert_allclose(z.mean(0), LOC, atol=0.03)
    np.testing.assert_allclose(np.cov(z.T), FACTOR @ FACTOR.T, atol=0.03)


def test_learned_sites_become_deterministic_and_others_stay():
    sites = trace(seed(with_prior(model, gaussian_prior()), 0)).get_trace(y=1.0)
    kinds = {name: site["type"] for name, site in sites.items()}
    assert kinds["a"] == kinds["s"] == "deterministic"
    assert kinds["b"] == kinds["learned_prior"] == "sample"
    u = sites["learned_prior"]["value"]
    z = LOC + FACTOR @ np.asarray(u) / np.sqrt(1.01)
    np.testing.assert_allclose(sites["a"]["value"], z[0], rtol=1e-5)
    np.testing.assert_allclose(sites["s"]["value"], np.exp(z[1]), rtol=1e-5)


def test_intervention_inside_leaves_the_learned_site():
    replaced = with_prior(do(model, {"a": 7.0}), gaussian_prior())
    sites = trace(seed(replaced, 0)).get_trace(y=1.0)
    assert sites["sum"]["value"] == 7.0 + sites["b"]["value"]
    assert sites["a"]["type"] == "deterministic"
    assert sites["a"]["value"] != 7.0


def test_log_density_is_that_of_the_flow():
    """The density that NUTS uses: of u, with no Jacobian, and no term of the priors."""
    values = {"learned_prior": jnp.array([0.4, -0.3]), "b": jnp.array(7.0)}
    got, _ = log_density(with_prior(model, gaussian_prior()), (1.0,), {}, values)
    u = np.array([0.4, -0.3])
    z = LOC + FACTOR @ u / np.sqrt(1.01)
    wide = dist.Normal(0, np.sqrt(1.01)).log_prob(u).sum()
    rest = dist.Normal(7, 0.5).log_prob(7.0) + dist.Normal(z.sum(), 0.5).log_prob(1.0)
    np.testing.assert_allclose(got, wide + rest, atol=2e-3)


def test_posterior_is_exact():
    """With a + log s seen under noise, all is normal: compare with the closed form."""
    kernel = ScoreLangevin(with_prior(model, gaussian_prior()))
    mcmc = MCMC(
        kernel,
        num_warmup=300,
        num_samples=500,
        num_chains=8,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, 1.5)
    draws = mcmc.get_samples()
    z = np.stack([draws["a"], np.log(draws["s"])], 1)
    covariance, seen = FACTOR @ FACTOR.T, np.ones(2)
    gain = covariance @ seen / (seen @ covariance @ seen + 0.25)
    mean = LOC + gain * (1.5 - LOC.sum())
    sd = np.sqrt(np.diag(covariance - np.outer(gain, seen @ covariance)))
    assert (np.abs(z.mean(0) - mean) < 0.15 * sd).all()
    np.testing.assert_allclose(z.std(0), sd, rtol=0.1)
    np.testing.assert_allclose(draws["b"].mean(), 7.0, atol=0.1)
    np.testing.assert_allclose(draws["sum"], draws["a"] + draws["b"], rtol=1e-5)


def test_values_of_learned_sites_alone_are_refused():
    """Predictions were those of the prior, whatever was given."""
    replaced, u = with_prior(model, gaussian_prior()), RNG.normal(size=(3, 2))
    values = {k: np.asarray(v) for k, v in gaussian_prior().constrain(u).items()}
    rest = {"b": np.full(3, 7.0)}
    for some in (values, {"a": values["a"]}):
        with pytest.raises(ValueError, match="'learned_prior' must be given with"):
            Predictive(replaced, some | rest)(KEY)
        with pytest.raises(ValueError, match=r"without `with_prior`.*Got values of"):
            log_likelihood(replaced, some | rest, 0.3)
    drawn = Predictive(replaced, values | rest | {"learned_prior": u})(KEY)
    np.testing.assert_allclose(drawn["sum"], values["a"] + 7.0, rtol=1e-5)


def test_predictive_runs_the_model():
    prior = gaussian_prior()
    draws = Predictive(with_prior(model, prior), num_samples=50)(KEY)
    assert draws["y"].shape == (50,)
    assert draws["a"].shape == (50,)
    assert (draws["s"] > 0).all()


class Finished:
    """What an ``MCMC`` offers after it has run."""

    def __init__(self, draws):
        self.draws = draws

    def get_samples(self):
        return self.draws


FORMS = {
    "mcmc": Finished,
    "chains": lambda draws: {k: v.reshape(4, 100) for k, v in draws.items()},
    "dataset": lambda draws: dataset(draws),
    "tree": lambda draws: xr.DataTree.from_dict({"/posterior": dataset(draws)}),
}


def dataset(draws):
    dims = ("chain", "draw")
    return xr.Dataset({k: (dims, v.reshape(4, 100)) for k, v in draws.items()})


def draws_of_two(num=400):
    z = LOC + RNG.normal(size=(num, 2)) @ FACTOR.T
    return {"a": z[:, 0], "s": np.exp(z[:, 1]), "b": z[:, 0]}


SHORT = pytest.mark.filterwarnings("ignore:The learned prior differs")


def learn_two(draws, **options):
    """Learn for four steps, which leave the net rough."""
    options = {"sites": ["a", "s"], "num_steps": 4, "progress_bar": False} | options
    return learn(KEY, draws, model, 1.0, **options)


TWO = draws_of_two()


@SHORT
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_draws_are_equal(form):
    draws = TWO  # fixed: the check of 50 rows has a false alarm in a hundred
    prior = learn_two(FORMS[form](draws))
    z = np.stack([draws["a"], np.log(draws["s"])], 1)
    np.testing.assert_allclose(prior.loc, z.mean(0), rtol=1e-5)
    covariance = prior.factor @ prior.factor.T
    np.testing.assert_allclose(covariance, np.cov(z.T, bias=True), rtol=1e-4)


def test_held_out_rows_are_not_trained_on():
    rows = np.arange(1000.0).reshape(-1, 1)
    train, held_out = _split(KEY, rows)
    assert len(held_out) == 100
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train, held_out])[:, 0]), rows[:, 0]
    )


def test_equal_rows_are_held_out_together():
    rows = np.repeat(np.arange(500.0), 2).reshape(-1, 1)
    train, held_out = _split(KEY, rows)
    assert len(held_out) == 100
    assert not set(held_out[:, 0]) & set(train[:, 0])


def test_draws_of_a_chain_that_hardly_moves_warn():
    noise = np.random.default_rng(0).normal(size=(1000, 2))
    walk = noise.copy()
    for i in range(1, len(walk)):
        walk[i] = 0.98 * walk[i - 1] + 0.2 * noise[i]
    _warn_of_few(len(noise) * effective_share(noise), len(noise))
    with pytest.warns(UserWarning, match=r"`draws` count as \d+ independent ones"):
        _warn_of_few(len(walk) * effective_share(walk), len(walk))


def test_equal_draws_in_any_order_warn():
    """Five values of 2000 draws, as of resampling, passed for 2000 independent ones."""
    for count, is_few in ((5, True), (80, True), (800, False)):
        rows = np.random.default_rng(0).normal(size=(count, 2))
        again = np.random.default_rng(1).permutation(np.repeat(rows, 5, axis=0))
        assert len(again) * effective_share(again) <= count + 1e-6
        with (
            pytest.warns(UserWarning, match=rf"`draws` count as {count} .*are equal")
            if is_few
            else contextlib.nullcontext()
        ):
            _warn_of_few(len(again) * effective_share(again), len(again))


def test_a_level_that_blurs_more_than_the_default_warns():
    """Two narrow modes were learned at level .3, each 1.7 times too wide, silently."""
    fit = PriorFit(0.1, 0.5, 400, marginal=0.13, neighbors=0.05)
    with pytest.warns(UserWarning, match=r"uses noise level 0.3 in place of 0.1"):
        _warn_of_blur(0.3, fit, 400.0)
    _warn_of_blur(0.1, fit, 400.0)
    _warn_of_blur(0.3, fit, 50.0)  # so far by chance
    _warn_of_blur(0.3, fit._replace(marginal=0.09), 4000.0)


def with_terms(x, y, offset=0.0):
    a = numpyro.sample("a", dist.Normal(0, 10).expand([3]).to_event(1))
    numpyro.factor("steps", -0.5 * jnp.square(jnp.diff(a)).sum())
    numpyro.sample("sum", dist.Normal(a.sum(), 0.01), obs=0.0)
    numpyro.factor("constant", 1.0)
    numpyro.sample("y", dist.Normal(a * x + offset, 1), obs=y)


def without_terms(x, y):
    a = numpyro.sample("a", dist.Normal(0, 10).expand([3]).to_event(1))
    numpyro.factor("likelihood", -jnp.square(y - a * x).sum())


def with_values(x, y):
    a = numpyro.sample("a", dist.Normal(0, 10).expand([3]).to_event(1))
    numpyro.factor("steps", -0.5 * jnp.square(jnp.diff(a)).sum() * len(set(x.tolist())))
    numpyro.sample("y", dist.Normal(a, 1), obs=y)


def test_terms_that_new_data_do_not_replace_are_named():
    """They count twice, once in the draws and once beside them."""
    x, y = np.ones(3), np.arange(3.0)
    for args, kwargs in (((x, y), {}), ((x,), {"y": jnp.asarray(y), "offset": 1.0})):
        with pytest.warns(UserWarning, match=r"count again.*Got \['steps', 'sum'\]"):
            _warn_of_repeated_terms(with_terms, args, kwargs, ["a"])
    _warn_of_repeated_terms(without_terms, (x, y), {}, ["a"])
    _warn_of_repeated_terms(with_values, (x, y), {}, ["a"])
    _warn_of_repeated_terms(lambda: with_terms(x, y), (), {}, ["a"])


def angles_around(center, sd):
    values = center + sd * np.random.default_rng(0).normal(size=1000)
    layout = LatentLayout((site("phi", dist.constraints.circular),))
    return layout, np.array(
        layout.flatten({"phi": (values + np.pi) % (2 * np.pi) - np.pi})
    )


@pytest.mark.parametrize("center", [np.pi, -2.5, 1.8])
def test_angles_at_their_ends_warn_by_name(center):
    """Half of a posterior around pi was learned at pi, half at -pi, without a word."""
    with pytest.warns(
        UserWarning, match=r"Angles are learned as .*ends \{'phi': '\d+%'"
    ):
        _warn_of_angles(*angles_around(center, 0.5))
    _warn_of_angles(*angles_around(0.0, 0.5))


def test_columns_without_a_density_are_named_by_their_sites():
    """Training calls whitened columns by their numbers. Warnings are errors here."""
    message = r"`draws` has discrete columns.*Discrete columns: \['s'\]"
    with pytest.raises(UserWarning, match=message):
        learn_two(TWO | {"s": np.round(TWO["s"] + 1)})


def test_summary_has_every_site(capsys):
    prior = gaussian_prior()
    prior.print_summary(jax.random.key(0), 50)
    printed = capsys.readouterr().out
    assert " a " in printed
    assert " s " in printed
    assert printed.strip().endswith(repr(prior))


@SHORT
def test_repr_says_what_was_learned():
    text = repr(learn_two(draws_of_two()))
    assert "a, s" in text
    assert "held-out check" in text
    assert "with 50 draws" in text


def changing(y=None):
    low = numpyro.sample("low", dist.Normal(0, 1))
    numpyro.sample("x", dist.Uniform(low, low + 1))
    numpyro.sample("n", dist.Poisson(2.0))


def observed(y=None):
    numpyro.sample("a", dist.Normal(0, 1), obs=0.3)
    numpyro.sample("s", dist.HalfNormal(1.0))


def longer(y=None):
    with numpyro.plate("rows", 3):
        numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("s", dist.HalfNormal(1.0))


def unbounded(y=None):
    numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("s", dist.Normal(0.0, 1.0))


def counted(y=None):
    numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("s", dist.Poisson(1.0))


def bounded(y=None):
    numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("s", dist.Pareto(0.5, 1.0))


def without(y=None):
    numpyro.sample("a", dist.Normal(0, 1))


def masked(y=None):
    numpyro.sample("a", dist.Normal(0, 1).mask(False))
    numpyro.sample("s", dist.HalfNormal(1.0))


def scaled(y=None):
    numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.handlers.scale(scale=0.5):
        numpyro.sample("s", dist.HalfNormal(1.0))


def centred(y=None):
    a = numpyro.sample("a", dist.Normal(0, 10))
    numpyro.sample("s", dist.LogNormal(a, 1.0))


GIVEN = "Site 'a' must not be observed, or given a value"
REFUSED = {
    "child alone": (
        lambda: learn(KEY, TWO, centred, sites=["s"]),
        r"what the prior of 's' depends on.*Got \['s'\] without \['a'\]",
    ),
    "not run": (
        lambda: learn_two(MCMC(NUTS(changing), num_warmup=1, num_samples=1)),
        "an MCMC that has run. Call `run`",
    ),
    "unknown site": (
        lambda: learn_two(TWO, sites=["c"]),
        r"`sites` must name.*\['c'\]",
    ),
    "site as text": (lambda: learn_two(TWO, sites="a"), "`sites` must name"),
    "discrete site": (
        lambda: learn(KEY, TWO, changing, sites=["n"]),
        r"`sites` must name continuous.*has \['low', 'x'\]",
    ),
    "changing support": (
        lambda: learn(KEY, TWO, changing, sites=["x"]),
        r"Site 'x' must have the same support and shape in every run",
    ),
    "missing site": (
        lambda: learn_two({"a": TWO["a"]}),
        r"`draws` must hold all sites.*missing \['s'\]",
    ),
    "few draws": (
        lambda: learn_two({k: v[:100] for k, v in TWO.items()}),
        "at least 200 draws",
    ),
    "unequal draws": (
        lambda: learn_two(TWO | {"a": TWO["a"][:300]}),
        "same leading dimensions",
    ),
    "constant site": (
        lambda: learn_two(TWO | {"a": np.full(400, 0.1)}),
        r"must vary at every site.*Constant: \['a'\]",
    ),
    "outside the support": (
        lambda: learn_two(TWO | {"s": -TWO["s"]}),
        r"`draws\['s'\]` must lie inside the support",
    ),
    "missing values": (
        lambda: learn_two(TWO | {"a": np.where(TWO["a"] > 1, np.nan, TWO["a"])}),
        r"`draws\['a'\]` must lie inside the support",
    ),
    "masked values": (
        lambda: learn_two(TWO | {"a": np.ma.masked_greater(TWO["a"], 1.0)}),
        r"`draws\['a'\]` must not have masked values",
    ),
    "text": (
        lambda: learn_two(TWO | {"a": ["a"] * 400}),
        r"`draws\['a'\]` must be real numbers",
    ),
    "lists of unequal lengths": (
        lambda: learn_two(TWO | {"a": [[1.0, 2.0], [3.0]] * 200}),
        r"`draws\['a'\]` must be real numbers",
    ),
    "complex numbers": (
        lambda: learn_two(TWO | {"a": TWO["a"] * (1 + 1j)}),
        r"`draws\['a'\]` must be real numbers.*complex",
    ),
    "no digits left": (
        lambda: learn_two(TWO | {"a": 1e9 + TWO["a"]}),
        r"float32 rounds to a few.*Constant: \['a'\]",
    ),
    "counts in its place": (lambda: run(counted), "Site 's' must have the support"),
    "observed site": (lambda: run(observed), "Site 'a' must not be observed"),
    "condition inside": (lambda: run(condition(model, {"a": 0.3})), GIVEN),
    "substitute inside": (lambda: run(substitute(model, {"a": 0.3})), GIVEN),
    "condition around": (lambda: run_in(condition, {"a": 0.3}), GIVEN),
    "condition_fn around": (
        lambda: run_in(condition, None, lambda m: 0.3 if m["name"] == "a" else None),
        GIVEN,
    ),
    "intervention around": (lambda: run_in(do, {"a": 0.3}), GIVEN),
    "other shape": (lambda: run(longer), r"Site 'a' must have the shape.*Got \(3,\)"),
    "other support": (lambda: run(unbounded), "Site 's' must have the support"),
    "other bounds": (
        lambda: run(bounded),
        r"Site 's' must have the support.*Got GreaterThan\(lower_bound=0.5\)",
    ),
    "masked site": (lambda: run(masked), "Site 'a' must not be masked or scaled"),
    "scaled site": (lambda: run(scaled), "Site 's' must not be masked or scaled"),
    "two of one name": (
        lambda: run(with_prior(model, gaussian_prior())),
        "`name` must be that of no site.*two names.*Got 'learned_prior'",
    ),
    "no such site": (lambda: run(without), r"must have the sites.*none named \['s'\]"),
}


def run(other):
    return trace(seed(with_prior(other, gaussian_prior()), 0)).get_trace()


def run_in(handler, *args):
    replaced = seed(with_prior(model, gaussian_prior()), 0)
    return trace(handler(replaced, *args)).get_trace()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_bounds_in_small_units_are_compared_in_them():
    """Draws beyond the new support came out, as if bounds differed by rounding."""

    def shorter(scale):
        numpyro.sample("a", dist.Normal(0, 10))
        numpyro.sample("s", dist.Uniform(0.0, scale * 1e-9))

    prior = gaussian_prior(second=dist.constraints.interval(0.0, 1e-9))
    trace(seed(with_prior(shorter, prior), 0)).get_trace(1.0)
    with pytest.raises(ValueError, match="Site 's' must have the support"):
        trace(seed(with_prior(shorter, prior), 0)).get_trace(0.5)


def test_kinds_are_checked():
    with pytest.raises(TypeError, match="`draws` must be an MCMC"):
        learn_two(3)
    with pytest.raises(TypeError, match="`prior` must be a LearnedPrior"):
        with_prior(model, NORMAL)
    of_function = SimpleNamespace(get_samples=lambda: np.zeros((400, 2)))
    with pytest.raises(TypeError, match="potential function does not name its sites"):
        learn_two(of_function)
    with unchecked(), pytest.raises(TypeError, match="`fn` must be callable"):
        with_prior(gaussian_prior(), gaussian_prior())
    with unchecked(), pytest.raises(TypeError, match="`name` must be the name"):
        with_prior(model, gaussian_prior(), name=3)
    for options, message in (
        ({"trainer": MLP(2)}, "`trainer` must be a ScoreMatching"),
        ({"model_kwargs": [1]}, "`model_kwargs` must be a dict of keyword arguments"),
        (
            {"model_kwargs": {1: 2}},
            "`model_kwargs` must be a dict of keyword arguments",
        ),
    ):
        with unchecked(), pytest.raises(TypeError, match=message):
            learn(KEY, TWO, model, 0.0, **options)


@pytest.mark.parametrize("sites", [3, ("a", "a"), ["s", "a", "s"], (1, 2)])
def test_sites_are_distinct_names(sites):
    """A site that was named twice was learned twice, as one number in two places."""
    with unchecked(), pytest.raises(ValueError, match="`sites` must "):
        learn(KEY, TWO, model, 0.0, sites=sites)


def test_trees_without_a_posterior_are_refused():
    for tree in (xr.DataTree(), xr.DataTree.from_dict({"prior": xr.Dataset()})):
        with pytest.raises(ValueError, match="group 'posterior' if it is a tree"):
            learn(KEY, tree, model, 0.0)


@pytest.fixture
def saved(tmp_path):
    trainer = ScoreMatching(MLP(2, width=4, depth=1))
    rows = RNG.normal(size=(64, 2))
    score = trainer.get_score(trainer.init(KEY, rows))
    prior = gaussian_prior(score, dist.constraints.interval(-1.0, 2.0))
    io.save(prior, tmp_path / "prior")
    return prior, tmp_path / "prior"


@pytest.mark.parametrize("fit", [(0.1, 0.5, 50), (0.1, 0.5, 50, 0.03, 0.04)])
def test_saved_fit_is_equal(saved, tmp_path, fit):
    """Files of older versions hold three numbers."""
    prior = dataclasses.replace(saved[0], fit=PriorFit(*fit))
    io.save(prior, tmp_path / "other")
    assert io.load_prior(tmp_path / "other").fit == prior.fit


def test_saved_prior_is_equal(saved):
    prior, path = saved
    loaded = io.load_prior(path)
    assert loaded.latents == prior.latents
    assert (loaded.level, loaded.fit) == (prior.level, prior.fit)
    for name in prior.names:
        first, second = (p.sample(KEY, (5,))[name] for p in (prior, loaded))
        np.testing.assert_array_equal(first, second)


def test_altered_or_mixed_files_are_refused(saved, tmp_path):
    prior, path = saved
    with pytest.raises(FileExistsError, match="`path` must not exist"):
        io.save(prior, path)
    header = path / "sites" / "header.json"
    header.write_text(header.read_text().replace("0.1", "0.2"))
    with pytest.raises(ValueError, match="a hash does not match"):
        io.load_prior(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("level", -0.1, r"`level` in .*header.json must be positive"),
        ("level", 1e-3, "`path` must hold a prior at a level that its score has"),
        ("level", 50.0, "`path` must hold a prior at a level that its score has"),
        ("factor", jnp.zeros((2, 2)), "must hold a `factor` that can be inverted"),
    ],
)
def test_numbers_that_describe_no_prior_are_refused(
    saved, tmp_path, field, value, message
):
    io.save(dataclasses.replace(saved[0], **{field: value}), tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        io.load_prior(tmp_path / "other")


def test_units_of_a_prior_may_differ_by_any_factor(saved, tmp_path):
    factor = jnp.diag(jnp.array([1e-12, 1e12]))
    io.save(dataclasses.replace(saved[0], factor=factor), tmp_path / "other")
    np.testing.assert_array_equal(io.load_prior(tmp_path / "other").factor, factor)


def test_parts_of_two_priors_are_refused(saved, tmp_path):
    prior, path = saved
    other = LearnedPrior(prior.score, prior.loc + 1, prior.factor, prior.latents, 0.1)
    io.save(other, tmp_path / "other")
    (path / "sites").rename(tmp_path / "sites")
    (tmp_path / "other" / "sites").rename(path / "sites")
    with pytest.raises(ValueError, match="saved together"):
        io.load_prior(path)


def conjugate(y, counts):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = numpyro.sample("share", dist.Beta(2.0, 2.0))
    mix = numpyro.sample("mix", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("y", dist.Exponential(rate), obs=y)
    numpyro.sample("hits", dist.Binomial(10, share), obs=7.0)
    total = int(counts.sum())
    numpyro.sample("counts", dist.Multinomial(total_count=total, probs=mix), obs=counts)


@pytest.mark.slow
@SHORT
def test_two_batches_are_one():
    """Exact posteriors: batch 2 by the learned prior against both batches at once."""
    rng = np.random.default_rng(0)
    y, first, second = (
        rng.exponential(0.5, 16),
        np.array([3, 5, 2]),
        np.array([6, 2, 2]),
    )

    def posterior(y, hits, misses, counts, num):
        return {
            "rate": rng.gamma(2 + len(y), 1 / (1 + y.sum()), num),
            "share": rng.beta(2 + hits, 2 + misses, num),
            "mix": rng.dirichlet(1 + counts, num),
        }

    draws = posterior(y[:8], 7, 3, first, 4000)
    exact = posterior(y, 14, 6, first + second, 20_000)
    prior = learn(KEY, draws, conjugate, y[:8], first, progress_bar=False)
    mcmc = MCMC(
        ScoreLangevin(with_prior(conjugate, prior)),
        num_warmup=500,
        num_samples=1000,
        num_chains=8,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, y[8:], second)
    for name, values in mcmc.get_samples().items():
        if name in exact:
            sd = exact[name].std(0)
            shift = np.abs(values.mean(0) - exact[name].mean(0))
            assert (shift < 0.3 * sd).all(), name
            np.testing.assert_allclose(values.std(0), sd, rtol=0.1)


# sites inside of scan and cond


def walk(y=None):
    def step(last, y):
        x = numpyro.sample("x", dist.Normal(last, 5.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, x

    _, path = scan(step, 0.0, y, length=2)
    numpyro.deterministic("used", path)


def branch(y=None):
    x = cond(
        True,
        lambda _: numpyro.sample("x", dist.Normal(0.0, 5.0).expand([2]).to_event(1)),
        lambda _: -numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1)),
        None,
    )
    numpyro.deterministic("used", x)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("fn", [walk, branch])
def test_prior_acts_inside_scan_and_cond(fn):
    """The known part of the potential is the likelihood: the sites' own laws leave."""
    support = Support.of(dist.constraints.real_vector, (2,))
    layout = LatentLayout((LatentSite("x", support, (2,)),))
    arrays = jnp.asarray(LOC, float), jnp.asarray(FACTOR, float)
    prior = LearnedPrior(NORMAL, *arrays, layout, 0.1)
    y = jnp.array([2.0, -1.5])
    replaced = with_prior(fn, prior)
    sites = trace(seed(replaced, 0)).get_trace(y)
    np.testing.assert_array_equal(sites["used"]["value"], sites["x"]["value"])
    potential = model_potential(replaced, (y,), {})
    u = {"learned_prior": jnp.array([0.3, -0.7])}
    x = prior.constrain(u["learned_prior"])["x"]
    exact = -dist.Normal(x, 0.5).log_prob(y).sum()
    assert float(potential.value(u)) == pytest.approx(float(exact), rel=1e-5)


def test_dimensions_of_draws_may_be_in_any_order():
    values = RNG.normal(size=(4, 100, 3, 2))
    tree = xr.Dataset({"w": (("chain", "draw", "row", "column"), values)})
    turned = tree.transpose("row", "draw", "column", "chain")
    extracted = tree.stack(sample=("chain", "draw"))  # as by arviz.extract
    for form in (tree, turned, extracted):
        found = _values(form)["w"]
        np.testing.assert_array_equal(
            found.reshape(400, 3, 2), values.reshape(400, 3, 2)
        )


def test_two_priors_act_in_one_model():
    """Each of two sites is a function of its own learned point."""

    def pair(y=None):
        a = numpyro.sample("a", dist.Normal(0, 10).expand([2]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0, 10).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(a + b, 0.5).to_event(1), obs=y)

    arrays = jnp.asarray(LOC, float), jnp.asarray(FACTOR, float)
    first, second = (
        LearnedPrior(NORMAL, *arrays, LatentLayout((vector(name),)), 0.1)
        for name in "ab"
    )
    both = with_prior(with_prior(pair, first), second, name="second")
    y, u = jnp.ones(2), {"learned_prior": jnp.ones(2), "second": -jnp.ones(2)}
    values = trace(substitute(seed(both, KEY), u)).get_trace(y)
    np.testing.assert_allclose(values["a"]["value"], first.constrain(jnp.ones(2))["a"])
    np.testing.assert_allclose(
        values["b"]["value"], second.constrain(-jnp.ones(2))["b"]
    )
    assert values["a"]["type"] == values["b"]["type"] == "deterministic"


def test_improper_priors_are_learned_over():
    def flat(y=None):
        a = numpyro.sample("a", dist.ImproperUniform(REALS, (), ()))
        s = numpyro.sample("s", dist.ImproperUniform(POSITIVE, (), ()))
        numpyro.sample("y", dist.Normal(a, s), obs=y)

    draws = {"a": RNG.normal(size=400), "s": np.exp(RNG.normal(size=400))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a fit by 20 steps
        prior = learn(KEY, draws, flat, 0.5, num_steps=20, progress_bar=False)
    assert prior.names == ("a", "s")
    assert (prior.sample(KEY, (50,))["s"] > 0).all()
