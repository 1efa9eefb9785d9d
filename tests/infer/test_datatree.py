"""Results of every sampler as ArviZ's DataTree: values, names of axes, errors."""

from dataclasses import dataclass, replace

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    NPSE,
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
    ScoreSDE,
    to_datatree,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import DPS, AmortizedPosterior, datatree
from numpyro_score.infer.amortized.fit_verdict import CoordinateFit, FitVerdict
from numpyro_score.infer.datatree import _fit_verdict, axis_names
from tests.hierarchical_models import (
    NOISE_SD,
    exact_hierarchy,
    observe,
    shared_posterior,
)
from tests.targets import STANDARD_NORMAL

KEY = jax.random.key(0)
PROCESS = VE(0.01, 100.0)
DATA = np.array([1.0, -2.0, 0.5])
SD = 4.0  # of the noise: LOO is then reliable with few draws
KERNELS = ("ScoreLangevin", "AnnealedLangevin", "ParallelTempering")
PARTICLES = ("ScoreSDE", "ParticleMetropolis")  # of models with learned sites
KINDS = (*KERNELS, *PARTICLES, "NPSE")
EVIDENCE = float(dist.Normal(0, (1 + SD**2) ** 0.5).log_prob(DATA).sum())


def schools(y=None):
    """Prior N(0, 1), noise SD: posterior N(y / (1 + SD^2), SD^2 / (1 + SD^2))."""
    with numpyro.plate("school", 3):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.deterministic("square", jnp.stack([x, x**2], -1))
        numpyro.sample("y", dist.Normal(x, SD), obs=y)


def learned_schools(y=None):
    with numpyro.plate("school", 3):
        x = numpyro.sample("x", ScoreDistribution(NORMAL))
        numpyro.sample("y", dist.Normal(x, SD), obs=y)


NORMAL = STANDARD_NORMAL.score_model(PROCESS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExactDenoiser:
    """E[x_0 | x_0 + level n, y] of the schools."""

    def __call__(self, x, level, context=None):
        precision = 1 + 1 / SD**2 + 1 / level**2
        return (context / SD**2 + x / level**2) / precision


def run_mcmc(kernel, **options):
    options = {"num_chains": 2, "num_samples": 100, "num_warmup": 100} | options
    mcmc = MCMC(kernel, chain_method="vectorized", progress_bar=False, **options)
    has_potential = not isinstance(kernel, ParticleMetropolis)
    fields = ("potential_energy",) if has_potential else ()
    mcmc.run(KEY, jnp.asarray(DATA), extra_fields=fields)
    return mcmc


def run_score_sde(**options):
    inference = ScoreSDE(
        learned_schools,
        num_samples=400,
        num_particles=400,
        levels=20,
        progress_bar=False,
        **options,
    )
    inference.run(KEY, jnp.asarray(DATA))
    return inference


def amortized():
    score = ScoreModel(ExactDenoiser(), Affine.identity((3,)), PROCESS, (3,))
    return AmortizedPosterior(score, NPSE(schools, "y").simulator(), num_steps=20)


def make(kind):
    if kind == "ScoreLangevin":
        return run_mcmc(ScoreLangevin(schools))
    if kind == "AnnealedLangevin":
        kernel = AnnealedLangevin(schools, levels=10)
        return run_mcmc(kernel, num_chains=32, num_samples=40, num_warmup=60)
    if kind == "ParallelTempering":
        return run_mcmc(ParallelTempering(schools, num_rungs=3))
    if kind == "ParticleMetropolis":
        kernel = ParticleMetropolis(learned_schools, num_particles=50, levels=20)
        return run_mcmc(kernel, num_warmup=20)
    return run_score_sde() if kind == "ScoreSDE" else amortized()


SLOW_TO_COMPILE = ("ParallelTempering", *PARTICLES)
CASES = [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW_TO_COMPILE))
    for kind in KINDS
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Return the kind, the result and its tree."""
    result = make(request.param)
    given = (DATA,) if request.param == "NPSE" else ()
    options = {"num_samples": 200} if given else {}
    options |= {"learned_density": True}
    tree = to_datatree(result, *given, rng_key=KEY, num_prior_samples=60, **options)
    return request.param, result, tree


def test_values_are_those_of_get_samples(case):
    kind, result, tree = case
    if kind == "NPSE":
        first, _, _ = jax.random.split(KEY, 3)
        draws = {k: v[None] for k, v in result.sample(first, DATA, 200).items()}
    else:
        draws = result.get_samples(group_by_chain=True)
    assert set(tree["posterior"].data_vars) == set(draws)
    for name, value in draws.items():
        np.testing.assert_array_equal(tree["posterior"][name].values, value)


def test_axes_of_plates_have_their_names(case):
    kind, _, tree = case
    groups = ["posterior", "prior"]
    assert all(tree[g]["x"].dims == ("chain", "draw", "school") for g in groups)
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
        assert tree[group]["y"].dims == ("chain", "draw", "school")
    assert tree["observed_data"]["y"].dims == ("school",)
    np.testing.assert_allclose(tree["observed_data"]["y"], DATA)
    if kind in KERNELS:
        assert tree["posterior"]["square"].dims[2:] == ("school", "square_dim_0")


def test_likelihood_and_energy_are_those_of_the_model(case):
    kind, result, tree = case
    x = tree["posterior"]["x"].values
    likelihood = np.asarray(dist.Normal(x, SD).log_prob(DATA))
    np.testing.assert_allclose(tree["log_likelihood"]["y"], likelihood, rtol=1e-4)
    stats = tree["sample_stats"] if "sample_stats" in tree.children else {}
    exact = likelihood.sum(-1) + np.asarray(dist.Normal(0, 1).log_prob(x).sum(-1))
    tolerance = 1e-2 if kind in PARTICLES else 1e-4  # of the flow
    np.testing.assert_allclose(stats["lp"], exact, rtol=tolerance)
    np.testing.assert_array_equal(stats["energy"], -stats["lp"])
    if kind in KERNELS:
        known = result.get_extra_fields(group_by_chain=True)
        np.testing.assert_allclose(
            stats["energy"], known["potential_energy"], rtol=1e-4
        )
        np.testing.assert_array_equal(stats["diverging"], known["diverging"])
        np.testing.assert_array_equal(stats["n_steps"], known["num_steps"])


def test_predictions_and_prior_have_the_laws_of_the_model(case):
    _, _, tree = case
    x = tree["posterior"]["x"].values
    noise = (tree["posterior_predictive"]["y"].values - x).ravel() / SD
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    prior = tree["prior"]["x"].values.ravel()
    assert prior.size == 180
    assert abs(prior.mean()) < 4 / 180**0.5
    assert abs(prior.var() - 1) < 4 * (2 / 180) ** 0.5
    noise = (tree["prior_predictive"]["y"] - tree["prior"]["x"]).values.ravel() / SD
    assert abs(noise.var() - 1) < 4 * (2 / 180) ** 0.5


def test_attributes_say_what_made_the_draws(case):
    kind, result, tree = case
    marks = tree["posterior"].attrs
    made_by = result.sampler if isinstance(result, MCMC) else result
    assert marks["sampler"] == type(made_by).__name__
    if kind in KERNELS:
        assert marks["exactness"] == "exact"
        assert marks["accept_rule"] == "VALUE"
        judged = kind != "AnnealedLangevin"  # forty draws per chain
        assert (marks["verdict"] != "not judged") == judged
        assert marks["verdict_findings"]
    elif kind in PARTICLES:
        assert marks["exactness"].startswith("exact for the learned law")
    else:
        assert marks["exactness"].startswith("approximate")
    if kind in ("ScoreLangevin", "NPSE"):
        assert "log_evidence" not in marks
        return
    error = marks["log_evidence_error"]
    assert 0 < error < 0.3
    assert abs(marks["log_evidence"] - EVIDENCE) < 4 * error + 0.01
    assert tree.attrs["log_evidence"] == marks["log_evidence"]


# few draws: the shape of the weights' tail is near ArviZ's limit
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_arviz_works_on_it(case):
    _, _, tree = case
    summary = arviz.summary(tree, var_names=["x"])
    exact = DATA / (1 + SD**2)
    assert (np.abs(summary["mean"].astype(float) - exact) < 0.5).all()
    loo = arviz.loo(tree)
    assert loo.n_data_points == 3
    assert np.isfinite(loo.elpd)
    assert arviz.plot_energy(tree) is not None


def test_names_and_coordinates_can_be_given(case):
    kind, result, _ = case
    given = (DATA,) if kind == "NPSE" else ()
    tree = to_datatree(
        result,
        *given,
        rng_key=KEY if given else None,
        coords={"school": ["a", "b", "c"]},
        dims={"y": ["pupil"]},
    )
    assert tree["posterior"]["x"].coords["school"].values.tolist() == ["a", "b", "c"]
    assert tree["observed_data"]["y"].dims == ("pupil",)
    assert "prior" not in tree.children
    assert ("posterior_predictive" in tree.children) == bool(given)


def trace_dims(model, *args):
    model = numpyro.handlers.seed(model, KEY)
    sites = numpyro.handlers.trace(model).get_trace(*args)
    kinds = ("sample", "deterministic")
    return {k: axis_names(v) for k, v in sites.items() if v["type"] in kinds}


def test_names_of_axes_in_every_place():
    def model():
        with numpyro.plate("column", 4, dim=-1), numpyro.plate("row", 3, dim=-2):
            x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.deterministic("norm", jnp.sum(x**2, -1))
        with numpyro.plate("column_alone", 4, dim=-1):
            numpyro.sample("above", dist.Normal(jnp.zeros((3, 4)), 1))
            numpyro.deterministic("constant", 1.0)
        with numpyro.plate("row_alone", 3, dim=-2):
            numpyro.sample("beside", dist.Normal(0, 1))
        with numpyro.plate("draw", 4):
            numpyro.sample("reserved", dist.Normal(0, 1))
        event = dist.Normal(0, 1).expand([2]).to_event(1)
        numpyro.sample("named", event, infer={"event_dims": ["side"]})
        numpyro.deterministic("no_plate", jnp.zeros((2, 3)))

    assert trace_dims(model) == {
        "x": ["row", "column", None],
        "norm": ["row", "column"],
        "above": [None, "column_alone"],
        "constant": [],
        "beside": ["row_alone", None],
        "reserved": [None],
        "named": ["side"],
        "no_plate": [None, None],
    }


def tree_of(model, *args, options=None):
    mcmc = MCMC(ScoreLangevin(model), num_warmup=20, num_samples=30, progress_bar=False)
    mcmc.run(KEY, *args)
    return to_datatree(mcmc, **(options or {}))


def test_scoped_names_and_factors():
    """Names with "/" are those of groups in a tree; a factor observes no data."""

    def inner():
        with numpyro.plate("row", 3):
            numpyro.sample("x", dist.HalfNormal(1))

    def model(y):
        numpyro.handlers.scope(inner, prefix="a")()
        numpyro.factor("weight", -1.0)
        numpyro.sample("y", dist.Normal(0, 1).expand([2]).to_event(1), obs=y)

    tree = tree_of(model, DATA[:2], options={"rng_key": KEY, "num_prior_samples": 5})
    assert tree["posterior"]["a.x"].dims == ("chain", "draw", "a.row")
    assert set(tree["observed_data"].data_vars) == {"y"}
    assert set(tree["posterior_predictive"].data_vars) == {"y"}
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw")
    assert set(tree["log_likelihood"].data_vars) == {"y"}
    x = tree["posterior"]["a.x"].values
    # log p(x) + log |dx/dz| with z = log x, the factor and the data
    exact = (np.asarray(dist.HalfNormal(1).log_prob(x)) + np.log(x)).sum(-1) - 1.0
    exact += float(dist.Normal(0, 1).log_prob(DATA[:2]).sum())
    np.testing.assert_allclose(tree["sample_stats"]["lp"], exact, rtol=1e-4)


def test_discrete_sites_that_are_summed_out():
    """No draws of them: no likelihood or prediction given them, but a joint density."""

    def model(y):
        p = numpyro.sample("p", dist.Beta(2, 2))
        with numpyro.plate("row", 3):
            law = dist.Bernoulli(p)
            k = numpyro.sample("k", law, infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(2.0 * k, 1), obs=y)

    tree = tree_of(model, DATA, options={"rng_key": KEY})
    assert set(tree.children) == {"posterior", "sample_stats", "observed_data"}
    p = tree["posterior"]["p"].values
    zero, two = (np.exp(dist.Normal(m, 1).log_prob(DATA)) for m in (0, 2))
    exact = np.log(p[..., None] * two + (1 - p[..., None]) * zero).sum(-1)
    exact += np.asarray(dist.Beta(2, 2).log_prob(p)) + np.log(p * (1 - p))
    np.testing.assert_allclose(tree["sample_stats"]["lp"], exact, rtol=1e-3)


def test_model_without_latent_sites():
    def model(y):
        numpyro.deterministic("twice", 2 * y)
        numpyro.sample("y", dist.Normal(0, 1), obs=y)  # wider than its law

    tree = tree_of(model, DATA, options={"rng_key": KEY})
    assert tree["posterior"]["twice"].shape == (1, 30, 3)
    assert tree["observed_data"]["y"].shape == (3,)
    assert tree["posterior_predictive"]["y"].shape == (1, 30)
    assert not {"lp", "energy"} & set(tree["sample_stats"].data_vars)


def test_learned_site_has_the_density_of_its_flow():
    tree = tree_of(learned_schools, DATA, options={"learned_density": True})
    x = tree["posterior"]["x"].values
    prior, likelihood = (dist.Normal(0, 1), dist.Normal(x, SD))
    exact = (prior.log_prob(x) + likelihood.log_prob(DATA)).sum(-1)
    np.testing.assert_allclose(tree["sample_stats"]["lp"], exact, rtol=1e-2)
    assert tree.attrs["exactness"].startswith("exact for the learned law")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "school")


def test_kernel_of_a_potential():
    kernel = ScoreLangevin(potential_fn=lambda z: 0.5 * jnp.sum(z["x"] ** 2))
    mcmc = MCMC(kernel, num_warmup=20, num_samples=30, progress_bar=False)
    mcmc.run(KEY, init_params={"x": jnp.zeros(2)})
    tree = to_datatree(mcmc, rng_key=KEY)
    x = tree["posterior"]["x"].values
    np.testing.assert_array_equal(x, mcmc.get_samples(group_by_chain=True)["x"])
    energy = tree["sample_stats"]["energy"]
    np.testing.assert_allclose(energy, 0.5 * (x**2).sum(-1), rtol=1e-5)
    assert set(tree.children) == {"posterior", "sample_stats"}
    with pytest.raises(ValueError, match=r"has no prior\. Got 3"):
        to_datatree(mcmc, rng_key=KEY, num_prior_samples=3)


def test_attributes_can_be_saved(case):
    """Files hold text and numbers."""
    _, _, tree = case
    for node in (tree, tree["posterior"]):
        kinds = {
            type(value) for name, value in node.attrs.items() if "sample_" not in name
        }
        assert kinds <= {str, float}


class SimulatedSchools:
    """A simulator: its output is deterministic given what it draws."""

    def __call__(self):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))
        noise = numpyro.sample("noise", dist.Normal(0, SD).expand([3]).to_event(1))
        numpyro.deterministic("y", x + noise)


def test_simulator_without_likelihood():
    simulator = NPSE(SimulatedSchools(), "y", latents="x").simulator()
    posterior = AmortizedPosterior(amortized().score, simulator, num_steps=20)
    tree = to_datatree(posterior, DATA, rng_key=KEY, num_samples=300)
    np.testing.assert_allclose(tree["observed_data"]["y"], DATA)
    assert set(tree.children) == {"posterior", "observed_data", "posterior_predictive"}
    noise = (tree["posterior_predictive"]["y"] - tree["posterior"]["x"]).values / SD
    assert abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5


def test_scaled_and_masked_learned_sites_count_as_in_the_model():
    def model():
        with numpyro.handlers.scale(scale=3.0), numpyro.plate("rows", 3):
            law = ScoreDistribution(NORMAL).mask(jnp.array([True, True, False]))
            numpyro.sample("x", law)

    mcmc = MCMC(ScoreLangevin(model), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(KEY)
    tree = to_datatree(mcmc, learned_density=True)
    x = tree["posterior"]["x"].values
    exact = 3 * np.asarray(dist.Normal(0, 1).log_prob(x))[..., :2].sum(-1)
    np.testing.assert_allclose(tree["sample_stats"]["lp"], exact, rtol=1e-2, atol=1e-2)
    stats = to_datatree(mcmc)["sample_stats"]
    assert not {"lp", "energy"} & set(stats.data_vars)


def test_importance_corrects_amortized_draws():
    options = {"rng_key": KEY, "num_samples": 200, "importance": True}
    tree = to_datatree(amortized(), DATA, **options)
    assert tree.attrs["exactness"].startswith("exact as `num_samples` grows")
    assert abs(tree.attrs["log_evidence"] - EVIDENCE) < 0.05
    assert tree.attrs["effective_sample_size"] > 150
    assert np.isfinite(tree.attrs["khat"])
    mcmc = MCMC(ScoreLangevin(schools), num_warmup=1, num_samples=1)
    with pytest.raises(ValueError, match="`importance` must be False unless"):
        to_datatree(mcmc, importance=True)


def test_summary_of_an_amortized_posterior(capsys):
    amortized().print_summary(KEY, DATA, 200)
    printed = capsys.readouterr().out
    assert "x[2]" in printed
    assert "Given y of shape (3,): 200 independent draws" in printed


@pytest.mark.parametrize(("width", "p_value"), [(1.0, 0.4), (2.0, 1e-9)])
def test_verdict_on_the_training_is_in_the_attributes(width, p_value):
    fit = CoordinateFit("x[0]", p_value, width, 0.0, 0.0, 0.5, 0.5, 0.0)
    verdict = FitVerdict((fit,), 400)
    trained = replace(amortized(), verdict=verdict)
    marks = to_datatree(trained, DATA, rng_key=KEY, num_samples=20).attrs
    assert marks["verdict"] == verdict.names
    assert (marks["verdict"] == "ok") == (width == 1)
    assert marks["verdict_findings"] == str(verdict)
    assert "verdict" not in to_datatree(amortized(), DATA, rng_key=KEY).attrs


def test_verdicts_on_both_trainings_of_a_hierarchy_are_in_the_attributes():
    posterior, few = exact_hierarchy(), FitVerdict((), 12)
    fine = FitVerdict((CoordinateFit("z", 0.4, 1, 0, 0, 0.5, 0.5, 0),), 400)
    shared = replace(posterior.shared, verdict=fine)
    local = replace(posterior.local, verdict=few)
    marks = _fit_verdict(replace(posterior, shared=shared, local=local))
    assert marks["verdict"] == "not judged"
    assert marks["verdict_findings"] == f"shared: {fine}\nlocal: {few}"
    assert _fit_verdict(replace(posterior, shared=shared))["verdict"] == "ok"
    assert _fit_verdict(posterior) == {}


@pytest.mark.slow
def test_hierarchy_has_an_axis_of_groups(capsys):
    y = observe(8)
    posterior = exact_hierarchy()
    tree = to_datatree(posterior, y, rng_key=KEY, num_samples=400, num_prior_samples=50)
    draws = tree["posterior"]
    assert draws["z"].dims == ("chain", "draw", "groups")
    assert draws["z"].shape == (1, 400, 8)
    assert tree["prior"]["z"].shape == (1, 50, 8)
    np.testing.assert_allclose(tree["observed_data"]["y"], y, rtol=1e-6)
    exact = dist.Normal(draws["z"].values, NOISE_SD).log_prob(y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], exact, rtol=1e-4)
    joint = exact.sum(-1) + dist.Normal(0, 1).log_prob(draws["mu"].values)
    joint += (
        dist.Normal(draws["mu"].values[..., None], 1)
        .log_prob(draws["z"].values)
        .sum(-1)
    )
    np.testing.assert_allclose(tree["sample_stats"]["lp"], joint, rtol=1e-4)
    mean, sd = shared_posterior(y)
    assert abs(float(draws["mu"].mean()) - mean) < 4 * sd / 20
    with pytest.warns(UserWarning, match="shape parameter of Pareto"):  # one datum each
        assert arviz.loo(tree).n_data_points == 8
    assert tree.attrs["exactness"].startswith("approximate")
    posterior.print_summary(KEY, {"y": y}, 100)
    printed = capsys.readouterr().out
    assert "z[7]" in printed
    assert "Given y of shape (8,): 100 independent draws" in printed


# bad input


def test_before_run():
    mcmc = MCMC(ScoreLangevin(schools), num_warmup=1, num_samples=1)
    with pytest.raises(RuntimeError, match="`run` must be called first"):
        to_datatree(mcmc)
    mcmc = MCMC(ScoreLangevin(schools), num_warmup=2, num_samples=1, progress_bar=False)
    mcmc.warmup(KEY, DATA)
    with pytest.raises(RuntimeError, match="`run` must be called first"):
        to_datatree(mcmc)
    inference = ScoreSDE(learned_schools, num_samples=10)
    with pytest.raises(RuntimeError, match="`run` must be called first"):
        to_datatree(inference)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"x": DATA}, "Got a dict"),
        (NPSE(schools, "y"), "Got an NPSE, whose method `fit` returns the posterior"),
        (MCMC(NUTS(schools), num_warmup=1, num_samples=1), "Got an MCMC with NUTS"),
    ],
)
def test_other_results_are_refused(result, message):
    with pytest.raises(TypeError, match=f"`result` must be an MCMC with .*{message}"):
        to_datatree(result)


def test_missing_and_needless_arguments():
    posterior = amortized()
    with pytest.raises(ValueError, match="`observation` must be given"):
        to_datatree(posterior, rng_key=KEY)
    with pytest.raises(ValueError, match="`rng_key` must be given"):
        to_datatree(posterior, DATA)
    with pytest.raises(ValueError, match="`num_samples` must be"):
        to_datatree(posterior, DATA, rng_key=KEY, num_samples=0)
    mcmc = MCMC(ScoreLangevin(schools), num_warmup=1, num_samples=1)
    with pytest.raises(ValueError, match="`observation` is for amortized posteriors"):
        to_datatree(mcmc, DATA)
    with pytest.raises(ValueError, match="`rng_key` must be given for draws of the pr"):
        to_datatree(mcmc, num_prior_samples=10)
    with pytest.raises(ValueError, match=r"must be an integer of at least 0.* Got -1"):
        to_datatree(mcmc, rng_key=KEY, num_prior_samples=-1)
    with pytest.raises(TypeError, match="`rng_key` must be one random key"):
        to_datatree(mcmc, rng_key=3)


@pytest.mark.slow
def test_improper_prior_has_no_draws():
    def model(y):
        real = dist.constraints.real
        x = numpyro.sample("x", dist.ImproperUniform(real, (), ()))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    with pytest.raises(ValueError, match=r"has no draws\. Got 5"):
        tree_of(model, DATA, options={"rng_key": KEY, "num_prior_samples": 5})


@pytest.mark.slow
def test_guided_particles_are_approximate():
    tree = to_datatree(run_score_sde(guidance=DPS()))
    assert tree.attrs["exactness"].startswith("approximate: ")
    assert "log_evidence" not in tree.attrs


def test_masked_numbers_are_no_data_of_cross_validation():
    y = jnp.array([[0.3, jnp.nan, 1.0], [-0.4, 0.8, jnp.nan]])

    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        with numpyro.handlers.mask(mask=~jnp.isnan(y)):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.nan_to_num(y))

    mcmc = MCMC(
        ScoreLangevin(model), num_warmup=200, num_samples=200, progress_bar=False
    )
    mcmc.run(jax.random.key(0), y)
    tree = to_datatree(mcmc)
    values = tree.log_likelihood["y"]
    assert values.dims == ("chain", "draw", "y_known")
    np.testing.assert_array_equal(values["y_known"], [0, 2, 3, 4])
    x = tree.posterior["x"].to_numpy()
    exact = dist.Normal(x[..., None], 1.0).log_prob(jnp.array([0.3, 1.0, -0.4, 0.8]))
    np.testing.assert_allclose(values, exact, rtol=1e-5)
    loo = arviz.loo(tree)
    assert loo.n_data_points == 4
    assert np.isfinite(loo.elpd)
    np.testing.assert_array_equal(tree.observed_data["y"], y)


ROWS = jnp.array([True, False, True])
NORMAL_LAW = dist.Normal(0, 1)
MASKED = {  # a law, and the places that it leaves out
    "discrete": (dist.Poisson(2.0).expand([3]).mask(ROWS), [1]),
    "in an event": (NORMAL_LAW.expand([3]).mask(ROWS).to_event(1), [1]),
    "of events": (NORMAL_LAW.expand([3, 2]).to_event(1).mask(ROWS), [2, 3]),
    "twice": (NORMAL_LAW.expand([3]).mask(ROWS).mask(jnp.arange(3) < 2), [1, 2]),
    "expanded": (NORMAL_LAW.expand([3]).mask(ROWS).expand([2, 3]), [1, 4]),
    "nothing": (NORMAL_LAW.expand([3]).mask(True), []),
}


@pytest.mark.parametrize("kind", MASKED)
def test_masked_numbers_are_no_observed_data(kind):
    law, places = MASKED[kind]

    def model(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", law, obs=y)

    y = law.sample(KEY)
    draws = datatree._Draws(model, (y,), {}, {"x": jnp.zeros((1, 2))}, {})
    sites = datatree._Sites.of(draws)
    expected = np.array(y)
    if places:
        expected = expected.astype(float)
        expected.ravel()[places] = np.nan
    np.testing.assert_array_equal(sites.data["y"], expected)
    np.testing.assert_array_equal(sites.observed["y"], y)  # what predictions are of
    nothing = datatree._without_masked_data(np.asarray(y), law.mask(False))
    assert nothing is None


def test_factors_are_the_likelihood_where_nothing_is_observed():
    def model(y, is_observed):
        x = numpyro.sample("x", dist.Normal(0, 1))
        with numpyro.plate("row", 3):
            numpyro.factor("by_hand", dist.Normal(x, SD).log_prob(y))
        if is_observed:
            numpyro.sample("y", dist.Normal(x, SD).expand([3]).to_event(1), obs=y)

    draws = {"x": jnp.linspace(-1.0, 1.0, 4)[None]}
    for is_observed, name in ((True, "y"), (False, "by_hand")):
        result = datatree._Draws(model, (DATA, is_observed), {}, draws, {})
        found = datatree._log_likelihood(result, datatree._Sites.of(result))
        assert set(found) == {name}
    exact = dist.Normal(draws["x"][..., None], SD).log_prob(DATA)
    np.testing.assert_allclose(found["by_hand"], exact, rtol=1e-5)


def test_draws_that_are_rounded_to_the_end_of_a_support():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    draws = datatree._Draws(model, (jnp.ones(3),), {}, {}, {})
    sites = draws.trace({"scale": jnp.zeros(())})
    assert sites["y"]["value"].shape == (3,)
    assert not np.isfinite(sites["y"]["fn"].log_prob(0.0))
