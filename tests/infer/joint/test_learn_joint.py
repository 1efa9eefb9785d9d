import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score import MLP, VE, ScoreMatching, ScoreModel
from numpyro_score.data.columns import unconstrain_rows
from numpyro_score.data.context_scale import ContextScale
from numpyro_score.infer import learn_joint
from numpyro_score.infer.amortized.fit_verdict import CoordinateFit, FitVerdict
from numpyro_score.infer.amortized.layout import ObservationLayout, ObservedSite
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.joint.conditionals import conditional_trainer
from numpyro_score.infer.joint.draw_check import warn_of_wrong_conditional
from numpyro_score.infer.joint.layout import (
    JointLayout,
    _completed,
    check_densities,
    observed_columns,
)
from numpyro_score.infer.joint.learn_joint import LearnedJoint
from numpyro_score.infer.joint.storage import JointParts, describe_joint, read_joint
from numpyro_score.io import folder
from tests.npse_models import NOISE_SD, PRIOR_MEAN, PRIOR_SD, A, gaussian_model
from tests.targets import unchecked

NAN = np.nan
KEY = jax.random.key(0)


def layout_of(model, observed, *, width=0.0, loc=0.0, scale=1.0, high=1e9):
    """The layout of a model with a known map to the unit scale."""
    simulator = Simulator.of(model, observed, softness=0.01)
    columns = observed_columns(simulator.observed)
    size = simulator.latents.size + len(columns)
    parts = (loc, scale, 0.0, width, -high, high)
    unit = ContextScale(*(jnp.broadcast_to(jnp.asarray(p, float), size) for p in parts))
    return JointLayout(simulator.latents, simulator.observed, columns, unit)


# the exact score in the place of the trained one

LOC = np.concatenate([PRIOR_MEAN, A @ PRIOR_MEAN])
G = np.concatenate([np.eye(2), A])
COV = G @ np.diag(PRIOR_SD**2) @ G.T + np.diag([0, 0, *3 * [NOISE_SD**2]])
SD = np.sqrt(np.diag(COV))


class ExactDenoiser:
    """E[x_0 given levels] of standardized vectors of the Gaussian model."""

    def __init__(self):
        self.num_traces = 0

    def __call__(self, u, levels):
        self.num_traces += 1
        cov = jnp.asarray(COV / np.outer(SD, SD), float)
        return cov @ jnp.linalg.solve(cov + jnp.diag(jnp.square(levels)), u)


def exact_joint(denoise):
    score = ScoreModel.from_coordinate_denoiser(denoise, (5,), VE(0.003, 100.0))
    return LearnedJoint(score, layout_of(gaussian_model, "y", loc=LOC, scale=SD))


@pytest.fixture(scope="module")
def exact():
    return exact_joint(ExactDenoiser())


GIVEN = {
    "theta given y": {"y": [1.0, -1.0, -1.5]},
    "y given theta": {"x": [2.0, -1.0]},
    "missing y given other y": {"y": [1.0, NAN, -3.0]},
    "theta_1 given theta_2 and part of y": {"x": [NAN, -1.0], "y": [NAN, 1.5, NAN]},
    "prior predictive": {},
}


def check_gaussian(joint, given, mean_error, sd_error):
    vector = np.concatenate([given.get("x", 2 * [NAN]), given.get("y", 3 * [NAN])])
    draws = joint.sample(jax.random.key(3), 4000, given)
    values = np.concatenate([draws["x"], draws["y"]], axis=1)
    seen = ~np.isnan(vector)
    gain = COV[:, seen] @ np.linalg.inv(COV[np.ix_(seen, seen)])
    mean = LOC + gain @ (vector[seen] - LOC[seen])
    sd = np.sqrt(np.diag(COV - gain @ COV[seen])[~seen])
    np.testing.assert_array_equal(
        values[:, seen], np.tile(vector[seen].astype(np.float32), (4000, 1))
    )
    error = (values.mean(0) - mean)[~seen] / sd
    assert np.abs(error).max() < mean_error
    np.testing.assert_allclose(values.std(0)[~seen], sd, rtol=sd_error)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_exact_score_gives_the_conditional_laws(exact, given):
    # 4000 draws: .016 sd of the mean, 1.1 % of the sd
    check_gaussian(exact, given, 0.08, 0.06)


def test_one_program_for_all_that_may_be_given():
    denoise = ExactDenoiser()
    joint = exact_joint(denoise)
    joint.sample(KEY, 7, {"y": [0.0, 0.0, 0.0]})
    count = denoise.num_traces
    for given in GIVEN.values():
        joint.sample(KEY, 7, given)
    assert denoise.num_traces == count
    joint.sample(KEY, 8)
    assert denoise.num_traces > count


def test_all_given_come_back(exact):
    given = {"x": jnp.array([0.5, 1.0]), "y": np.ma.masked_invalid([1.0, 2.0, 3.0])}
    draws = exact.sample(KEY, 3, given)
    np.testing.assert_array_equal(draws["x"], np.tile([0.5, 1.0], (3, 1)))
    np.testing.assert_array_equal(draws["y"], np.tile([1.0, 2.0, 3.0], (3, 1)))


def test_masked_numbers_are_unknown(exact):
    masked = np.ma.array([1.0, 99.0, -3.0], mask=[False, True, False])
    got = exact.sample(KEY, 10, {"y": masked})
    expected = exact.sample(KEY, 10, {"y": [1.0, NAN, -3.0]})
    np.testing.assert_array_equal(got["x"], expected["x"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": 1.0}, r"sites that were learned.*\['z'\].*learned \['x', 'y'\]"),
        ({"y": 1.0}, r"`given\['y'\]` must have the shape.*\(\), expected \(3,\)"),
        ({"y": np.zeros((2, 3))}, r"Got \(2, 3\), expected \(3,\)"),
        ({"x": np.zeros(3)}, r"`given\['x'\]` must have the shape"),
        ({"y": [np.inf, 0, 0]}, r"`given\['y'\]` must be finite"),
        ({"x": [-np.inf, NAN]}, r"`given\['x'\]` must be finite"),
        ({"y": ["a", "b", "c"]}, r"`given\['y'\]` must be real numbers"),
        ({"y": [1j, 0, 0]}, r"`given\['y'\]` must be real numbers"),
        ({"y": [[1.0], [2.0, 3.0]]}, r"`given\['y'\]` must be real numbers"),
        ({"y": None}, r"`given\['y'\]` must be real numbers"),
        ([1.0], "`given` must be a dict"),
    ],
)
def test_wrong_values_are_refused(exact, given, message):
    with unchecked(), pytest.raises((TypeError, ValueError), match=message):
        exact.sample(KEY, 3, given)


def test_wrong_counts_keys_and_traced_values_are_refused(exact):
    with pytest.raises(ValueError, match="`num_samples` must be an integer"):
        exact.sample(KEY, 0)
    with unchecked(), pytest.raises(TypeError, match="`rng_key` must be one random"):
        exact.sample(0, 3)
    with pytest.raises(TypeError, match=r"`given\['y'\]` must be numbers, not traced"):
        jax.jit(lambda y: exact.sample(KEY, 3, {"y": y}))(jnp.zeros(3))


def test_values_far_from_simulations_warn():
    layout = layout_of(gaussian_model, "y", loc=LOC, scale=SD, high=20.0)
    joint = LearnedJoint(exact_joint(ExactDenoiser()).score, layout)
    far = LOC[3] + 40 * SD[3]
    with pytest.warns(UserWarning, match=r"`given\['y'\]` is far.*Got 40 sd"):
        joint.sample(KEY, 3, {"y": [NAN, far, NAN]})
    with pytest.warns(UserWarning, match=r"`given\['x'\]` is far"):
        joint.sample(KEY, 3, {"x": [-25.0, NAN]})


def test_values_far_together_warn(exact):
    """Numbers of x and y that no simulation has at once."""
    rows = np.random.default_rng(0).multivariate_normal(LOC, COV, 2000)
    score = replace(exact.score, rows=jnp.asarray((rows - LOC) / SD, float))
    joint = replace(exact, score=score)
    for row in rows[:3]:
        joint.sample(KEY, 3, {"x": row[:2], "y": [NAN, row[3], NAN]})
    joint.sample(KEY, 3)
    joint.sample(KEY, 3, {"x": [NAN, 5.0]})
    with pytest.warns(UserWarning, match=r"`given` \(x, y\) are together far"):
        joint.sample(KEY, 3, {"x": [3.0, -6.0], "y": [NAN, NAN, 1.5]})


def test_draws_that_are_not_finite_raise():
    joint = exact_joint(lambda u, levels: jnp.where(u > -3.0, u / (1 + levels), NAN))
    with pytest.raises(FloatingPointError, match="not finite"):
        joint.sample(KEY, 3)


# the verdict


@pytest.fixture
def learn_with(monkeypatch):
    """The result of training that gives a score of a denoiser."""

    def learn(denoise):
        score = exact_joint(denoise).score
        result = SimpleNamespace(score=score)
        monkeypatch.setattr(ScoreMatching, "run", lambda *args, **options: result)
        return learn_joint(KEY, gaussian_model, 2000, observed="y", num_steps=9)

    return learn


def test_exact_law_has_no_finding(learn_with):
    joint = learn_with(ExactDenoiser())
    assert joint.verdict.ok
    assert len(joint.verdict.coordinates) == (2 + 1) + (3 + 1)  # with those of all
    assert joint.verdict.num_simulations == 100
    assert "no finding, p = " in repr(joint)


def test_law_without_dependence_is_found(learn_with):
    with pytest.warns(UserWarning, match="joint law fails on held-out") as caught:
        joint = learn_with(lambda u, levels: u / (1 + jnp.square(levels)))
    assert "information" in str(caught[0].message)
    assert len(caught) == 1
    words = joint.verdict.describe()
    assert "where a regression on ranks" in words["x[1]"]
    assert "where a regression on ranks" in words["y[1]"]
    assert "verdict" in repr(joint)


# draws judged by the score of the model


def judged(joint):
    simulator = Simulator.of(gaussian_model, "y")
    layout = replace(joint.layout, latents=simulator.latents)
    return replace(joint, layout=layout, simulator=simulator)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_exact_draws_of_any_conditional_are_right(exact, given):
    judged(exact).sample(KEY, 1000, given)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_wrong_draws_of_any_conditional_are_found(given):
    """Levels of all sizes pull the draws up."""

    def denoise(u, levels):
        return ExactDenoiser()(u, levels) + 2 * jnp.square(levels / (1 + levels))

    with pytest.warns(UserWarning, match="not those of the conditional law") as record:
        judged(exact_joint(denoise)).sample(KEY, 1000, given)
    (warning,) = record
    found = re.findall(r"([xy])\[(\d)\] is (?:off by|about)", str(warning.message))
    assert found
    assert all(np.isnan(given.get(k, 3 * [NAN])[int(i)]) for k, i in found)


@pytest.mark.parametrize("given", ["theta given y", "missing y given other y"])
def test_some_wild_draws_of_a_conditional_are_found(given):
    """A few draws far off are noise in averages of the score."""
    joint, given = judged(exact_joint(ExactDenoiser())), GIVEN[given]
    vector = np.concatenate([given.get("x", 2 * [NAN]), given.get("y", 3 * [NAN])])
    known = ~np.isnan(vector)
    far = np.arange(1000)[:, None] % 32 == 0
    draws = {
        name: jnp.where(far & ~known[part], 99.0, value)
        for (name, value), part in zip(
            sorted(joint.sample(KEY, 1000, given).items()),
            (slice(2), slice(2, 5)),
            strict=True,
        )
    }
    with pytest.warns(UserWarning, match="3% of them have a density of zero, or"):
        warn_of_wrong_conditional(joint.simulator, joint.layout, draws, known)


def jumping_model():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(jnp.floor(2 * x), 0.5))


def test_conditionals_of_a_density_that_jumps_are_judged_by_steps():
    """Its gradient misses the jumps: exact draws are silent, wide ones are not."""
    simulator = Simulator.of(jumping_model, "y")
    layout = layout_of(jumping_model, "y", loc=np.zeros(2), scale=np.ones(2))
    grid = np.linspace(-5, 5, 100_001)
    log_density = -(grid**2) / 2 - 2 * (1.2 - np.floor(2 * grid)) ** 2
    weights = np.exp(log_density) / np.exp(log_density).sum()
    x = np.random.default_rng(0).choice(grid, 1000, p=weights).astype(np.float32)
    known = np.array([False, True])
    for factor in (1, 3):
        wide = x.mean() + factor * (x - x.mean())
        draws = {"x": jnp.asarray(wide), "y": jnp.full(1000, 1.2)}
        loud = pytest.warns(UserWarning, match="x is about .* times too wide")
        with loud if factor > 1 else nullcontext():
            warn_of_wrong_conditional(simulator, layout, draws, known)


def test_few_draws_and_saved_laws_are_not_judged(tmp_path, untrained):
    joint = judged(exact_joint(lambda u, levels: 3 + 0 * u))
    joint.sample(KEY, 63, {"y": [1.0, -1.0, -1.5]})
    untrained.save(tmp_path / "joint")
    assert LearnedJoint.load(tmp_path / "joint").simulator is None


@pytest.mark.slow
def test_likelihood_that_is_too_wide_is_found(learn_with):
    """Latents given observations are right, observations given latents too wide."""
    exact = ExactDenoiser()
    cov = jnp.asarray(COV / np.outer(SD, SD) + np.diag([0, 0, 0.1, 0.1, 0.1]), float)

    def denoise(u, levels):
        wide = cov @ jnp.linalg.solve(cov + jnp.diag(jnp.square(levels)), u)
        return jnp.where((levels[:2] == 0).all(), wide, exact(u, levels))

    with pytest.warns(UserWarning, match="too wide by about"):
        words = learn_with(denoise).verdict.describe()
    assert "too wide" in words["y[1]"]
    assert words["x[0]"] == "no finding"


# trained


@pytest.mark.slow
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_trained_score_gives_the_conditional_laws(given, trained):
    check_gaussian(trained, given, 0.15, 0.15)


@pytest.fixture(scope="module")
def trained():
    return learn_joint(
        KEY, gaussian_model, 4000, observed="y", num_steps=200, progress_bar=False
    )


def bounded_model(count=None):
    rate = numpyro.sample("rate", dist.Gamma(4.0, 1.0))
    share = numpyro.sample("share", dist.Uniform(0.0, 1.0))
    with numpyro.plate("rows", 3):
        numpyro.sample("count", dist.Poisson(10 * rate * share), obs=count)
    numpyro.sample("wait", dist.Gamma(3.0, rate))


def weighed(count, wait, size=200_000):
    """Weights of prior draws given observed numbers that are not NaN."""
    rate = dist.Gamma(4.0, 1.0).sample(jax.random.key(1), (size,))
    share = jax.random.uniform(jax.random.key(2), (size,))
    terms = dist.Poisson(10 * rate * share).log_prob(np.nan_to_num(count)[:, None])
    log_weights = jnp.where(np.isnan(count)[:, None], 0.0, terms).sum(0)
    log_weights += dist.Gamma(3.0, rate).log_prob(wait)
    return {"rate": rate, "share": share}, jax.nn.softmax(log_weights)


@pytest.mark.long
@pytest.mark.slow
def test_bounded_sites_and_missing_counts():
    joint = learn_joint(
        KEY,
        bounded_model,
        6000,
        observed=("count", "wait"),
        num_steps=1500,
        check=False,
        progress_bar=False,
    )
    count, wait = np.array([15.0, NAN, 20.0]), 0.6
    draws = joint.sample(KEY, 4000, {"count": count, "wait": wait})
    points, weights = weighed(count, wait)
    for name, point in points.items():
        mean = float((weights * point).sum())
        sd = float((weights * (point - mean) ** 2).sum()) ** 0.5
        assert abs(float(draws[name].mean()) - mean) < 0.15 * sd
        np.testing.assert_allclose(float(draws[name].std()), sd, rtol=0.15)
    expected = 10 * points["rate"] * points["share"]
    mean = float((weights * expected).sum())
    sd = float((weights * (expected**2 + expected)).sum() - mean**2) ** 0.5
    missing = np.asarray(draws["count"][:, 1], float)
    assert abs(missing.mean() - mean) < 0.15 * sd
    np.testing.assert_allclose(missing.std(), sd, rtol=0.15)


@pytest.fixture(scope="module")
def untrained():
    layout = layout_of(supports_model, OBSERVED, loc=0.1, width=0.3)
    trainer = conditional_trainer(None, MLP(layout.size, width=4, depth=1))
    rows = np.random.default_rng(0).normal(size=(20, layout.size))
    score = trainer.get_score(trainer.init(KEY, rows))
    fit = CoordinateFit("rate", 0.2, 1.1, 0.1, 0.0, 0.5, 0.5, 0.0)
    return LearnedJoint(score, layout, FitVerdict((fit,), 50))


def test_saved_law_is_the_same(untrained, tmp_path):
    joint = untrained
    joint.save(tmp_path / "joint")
    loaded = LearnedJoint.load(tmp_path / "joint")
    assert repr(loaded) == repr(joint)
    assert loaded.layout.columns == joint.layout.columns
    assert loaded.verdict == joint.verdict
    given = {"rate": 0.7, "angle": [NAN, 8.5], "count": [NAN, 3, NAN]}
    draws, again = (law.sample(KEY, 5, given) for law in (joint, loaded))
    for name, value in draws.items():
        np.testing.assert_array_equal(value, again[name])
        assert value.dtype == again[name].dtype
    with pytest.raises(FileExistsError, match="`path` must not exist"):
        joint.save(tmp_path / "joint")


@pytest.mark.parametrize("dtype", ["float64", "int64", "float32", "bool"])
def test_draws_have_a_type_of_the_precision_in_use(dtype):
    """Laws that were saved in double precision made JAX warn of its own types."""
    site = ObservedSite("y", (), dtype)
    for known in (NAN, 1.0):
        values = _completed(site, np.array(known), np.ones(4))
        assert values.dtype.kind == np.dtype(dtype).kind
        np.testing.assert_array_equal(values, np.ones(4))


def test_laws_are_loaded_in_the_precision_in_use(untrained, tmp_path):
    """Observed sites of a law of single precision stayed in it."""
    untrained.save(tmp_path / "joint")
    with jax.enable_x64(True):
        sites = LearnedJoint.load(tmp_path / "joint").layout.observed.sites
        values = [_completed(s, np.full(s.shape, NAN), np.ones(s.shape)) for s in sites]
    assert {str(value.dtype) for value in values} == {"float64", "int64"}


def test_exact_functions_are_not_saved(exact, tmp_path):
    with pytest.raises(TypeError, match="`score` must come from ScoreMatching"):
        exact.save(tmp_path / "joint")
    assert not (tmp_path / "joint").exists()


def test_altered_laws_are_refused(untrained, tmp_path):
    untrained.save(tmp_path / "one")
    replace(untrained, verdict=None).save(tmp_path / "two")
    for file in (tmp_path / "two" / "sites").iterdir():
        shutil.copy(file, tmp_path / "one" / "sites")
    with pytest.raises(ValueError, match="were saved together"):
        LearnedJoint.load(tmp_path / "one")
    header = tmp_path / "two" / "sites" / "header.json"
    header.write_text(header.read_text().replace("count", "counts"))
    with pytest.raises(ValueError, match="a hash does not match"):
        LearnedJoint.load(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="must be a folder made by"):
        LearnedJoint.load(tmp_path / "three")


@pytest.mark.parametrize(
    ("name", "value"), [("scale", -1), ("width", -1), ("low", 3e38)]
)
def test_arrays_that_are_no_scale_are_refused(untrained, tmp_path, name, value):
    layout = untrained.layout
    values = jnp.full(layout.size, float(value))
    scale = replace(layout.scale, **{name: values})
    replace(untrained, layout=replace(layout, scale=scale)).save(tmp_path / "joint")
    with pytest.raises(ValueError, match=rf"safetensors must hold a .*`{name}`"):
        LearnedJoint.load(tmp_path / "joint")


SEVENFOLD = {
    "constraint": "_IndependentConstraint",
    "parts": {"base_constraint": {"constraint": "_Real", "parts": {}, "options": {}}},
    "options": {"reinterpreted_batch_ndims": 7},
}


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("kind", "score", "`kind` in .* must be 'learned joint law'"),
        ("sites", [], "`sites` in .* must be a list of sites"),
        ("sites[0].name", "share", "`sites` in .* must be sites of different names"),
        ("sites[2].shape", [], "`sites` in .* cannot be built"),
        ("sites[1].edge", -1, "`sites` in .* cannot be built.* `softness` must be"),
        ("sites[1].edge", 10**12, "`sites` in .* cannot be built"),
        ("sites[0].support", SEVENFOLD, "`sites` in .* events. Got 0, expected 7"),
        ("sites[1].shape", [1], "`sites` in .* cannot be built"),
        ("observed", [], "`observed` in .* must be a list of sites"),
        ("observed", "y", "`observed` in .* must be a list of sites"),
        ("verdict", {}, "`verdict` in .* cannot be built"),
        ("verdict", 3, "`verdict` in .* cannot be built"),
        ("observed[0].dtype", "string", r"`observed` in .* cannot be built"),
        ("observed[0].shape", [2], "must be sites of the arrays"),
        ("observed[0].support", 3, r"`observed\[0\].support` in .* must be"),
    ],
)
def test_headers_that_describe_no_law_are_refused(
    untrained, tmp_path, entry, value, message
):
    arrays, header = describe_joint(JointParts(untrained.layout, None))
    name, _, field = entry.partition("[")
    if field:
        header[name][int(field[0])][field[3:]] = value
    else:
        header[name] = value
    folder.write(tmp_path / "sites", arrays, header)
    with pytest.raises(ValueError, match=message):
        read_joint(tmp_path / "sites")


# sites of many supports


def supports_model(count=None):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("share", dist.Uniform(-1.0, jnp.array([2.0, 5.0])).to_event(1))
    with numpyro.plate("groups", 2):
        numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    numpyro.deterministic("twice", 2 * rate)
    with numpyro.plate("rows", 3):
        numpyro.sample("count", dist.Poisson(rate), obs=count)
        numpyro.sample("wait", dist.Exponential(rate))
    numpyro.sample("flag", dist.Bernoulli(0.3))
    numpyro.sample("angle", dist.Uniform(0.0, jnp.array([1.0, 9.0])).to_event(1))


OBSERVED = ("count", "wait", "flag", "angle")
VALUES = {
    "rate": 0.7,
    "share": [1.5, 4.0],
    "simplex": [[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]],
    "count": [0, 3, 900],
    "wait": [0.1, 2.0, 1e4],
    "flag": 1,
    "angle": [0.25, 8.5],
}


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["linear", "asinh"])
def layout(request):
    return layout_of(supports_model, OBSERVED, width=request.param, loc=0.1, scale=2.0)


def test_values_of_all_supports_come_back(layout):
    u = layout.standardize(layout.parse(VALUES))
    assert len(u) == layout.size == len(layout.owners) == 7 + 9
    unknown = layout.parse({})
    back = layout.constrain(u[None], unknown)
    assert set(back) == set(VALUES)  # and not the deterministic site
    for name, value in VALUES.items():
        np.testing.assert_allclose(back[name][0], value, rtol=2e-4)
    assert back["count"].dtype == back["flag"].dtype == jnp.int32
    assert back["wait"].dtype == back["simplex"].dtype == jnp.float32


def test_unknown_numbers_are_unknown_after_the_map(layout):
    given = {
        "share": [NAN, 4.0],
        "simplex": [[0.2, 0.3, 0.5], [NAN, NAN, NAN]],
        "count": [NAN, 3, NAN],
    }
    u = layout.standardize(layout.parse(given))
    known = [False, False, True, True, True, False, False, False, True, *7 * [False]]
    np.testing.assert_array_equal(~np.isnan(u), known)
    whole = layout.standardize(layout.parse(VALUES | {"count": [0, 3, 0]}))
    np.testing.assert_array_equal(u[known], whole[known])


def test_any_vector_is_inside_of_the_supports(layout):
    u = 0.3 * np.random.default_rng(0).normal(size=(200, layout.size))
    draws = layout.constrain(u, layout.parse({"count": [NAN, 5, NAN]}))
    assert (draws["rate"] > 0).all()
    assert (draws["wait"] > 0).all()
    assert (draws["count"] >= 0).all()
    assert (draws["count"][:, 1] == 5).all()
    assert set(np.unique(draws["flag"])) == {0, 1}
    assert (draws["angle"] < jnp.array([1.0, 9.0])).all()
    np.testing.assert_allclose(draws["simplex"].sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": -0.5}, r"`given\['rate'\]` must be finite and inside.*Got \[-0.5"),
        ({"rate": 0.0}, "not on its edge"),
        ({"share": [NAN, 5.0]}, r"`given\['share'\]`.*Got \[5.0\]"),
        ({"share": [3.0, NAN]}, r"`given\['share'\]`.*Got \[3.0\]"),
        ({"simplex": np.ones((2, 3))}, r"`given\['simplex'\]` must be finite and in"),
        ({"simplex": [[NAN, 0.5, 0.2], 3 * [NAN]]}, "known or unknown as a whole"),
        ({"count": [0, -1, NAN]}, r"`given\['count'\]`.*Got \[-1.0\]"),
        ({"count": [0.5, 1, 2]}, r"`given\['count'\]`.*Got \[0.5\]"),
        ({"wait": [0.0, 1.0, 1.0]}, r"`given\['wait'\]`.*Got \[0.0\]"),
        ({"wait": [1.0, -3.0, np.inf]}, r"`given\['wait'\]`.*Got \[-3.0, inf\]"),
        ({"flag": 2}, r"`given\['flag'\]`.*Got \[2.0\]"),
        ({"angle": [1.5, 1.5]}, r"`given\['angle'\]`.*Got \[1.5\]"),
        ({"twice": 1.0}, "sites that were learned"),
    ],
)
def test_values_outside_of_supports_are_refused(layout, given, message):
    with pytest.raises(ValueError, match=message):
        layout.standardize(layout.parse(given))


def test_numbers_that_no_float_or_integer_holds_are_refused(layout):
    u = layout.standardize(layout.parse(VALUES))
    for site in ("wait", "count"):
        beyond = np.where(np.array(layout.owners) == site, 60.0, u)
        with pytest.raises(FloatingPointError, match="not finite"):
            layout.constrain(beyond[None], layout.parse({}))


def test_integers_are_cells_of_width_one():
    site = ObservedSite("n", (2,), "int32", None)
    columns = observed_columns(ObservationLayout((site,)))
    rows = unconstrain_rows(np.random.default_rng(0), columns, np.full((900, 2), 3.0))
    assert 2.5 < rows.min() < 2.55
    assert 3.45 < rows.max() < 3.5


def test_atoms_are_refused_by_name():
    rows = np.random.default_rng(0).normal(size=(1000, 2))
    check_densities(("a", "b"), rows)
    rows[:20, 1] = 0.0
    with pytest.raises(ValueError, match=r"must have a density.*Got \['b'\]"):
        check_densities(("a", "b"), rows)


# what cannot be learned is refused before training


def discrete():
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x + k, 1.0))


def outside_noise():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x + np.random.default_rng().normal(), 1.0))


def moving():
    x = numpyro.sample("x", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Uniform(0.0, x))


def function():
    x = numpyro.sample("x", dist.Normal(0, 1))
    y = numpyro.sample("y", dist.Normal(x, 1.0))
    numpyro.deterministic("sum", x + y)


def simplex():
    x = numpyro.sample("x", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Dirichlet(x * jnp.ones(3)))


def cut_off():
    x = numpyro.sample("x", dist.Normal(0, 1))
    noise = jax.random.normal(numpyro.prng_key())
    numpyro.deterministic("y", jnp.maximum(x + noise, 0.0))


def constant():
    numpyro.sample("c", dist.Delta(2.0))
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1.0))


def factor():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("f", x)
    numpyro.sample("y", dist.Normal(x, 1.0))


REFUSED = {
    "discrete latent": (discrete, "y", r"continuous latents.*Got discrete \['k'\]"),
    "noise from outside": (outside_noise, "y", "must be a function of its random key"),
    "no such site": (function, "w", "`observed` must name the sites"),
    "no name": (function, 3, "`observed` must be the name of a site"),
    "support that moves": (moving, "y", r"same support in every run.*Got \['y'\]"),
    "function of others": (function, ("y", "sum"), r"random given all.*Got \['sum'\]"),
    "simplex": (simplex, "y", "Site 'y' must hold real, positive"),
    "atom": (cut_off, "y", r"must have a density.*Got \['y'\]"),
    "constant": (constant, "y", r"must have a density.*Got \['c'\]"),
    "factor": (factor, "y", "Site 'f' is a factor"),
}


@pytest.mark.parametrize(
    ("model", "observed", "message"), REFUSED.values(), ids=REFUSED
)
def test_models_that_cannot_be_learned_are_refused(model, observed, message):
    with unchecked(), pytest.raises((TypeError, ValueError), match=message):
        learn_joint(KEY, model, 300, observed=observed, progress_bar=False)


def test_wrong_options_are_refused():
    options = {"observed": "y", "progress_bar": False}
    with pytest.raises(ValueError, match="`num_simulations` must be an integer of at"):
        learn_joint(KEY, gaussian_model, 99, **options)
    with pytest.raises(ValueError, match="`trainer` must have loss"):
        learn_joint(KEY, gaussian_model, 200, trainer=ScoreMatching(MLP(5)), **options)
    for wrong, message in (
        ({"trainer": MLP(5)}, "`trainer` must be a ScoreMatching"),
        ({"check": "no"}, "`check` must be True or False"),
        ({"model_kwargs": [3]}, "`model_kwargs` must be a dict of keyword arguments"),
    ):
        with unchecked(), pytest.raises(TypeError, match=message):
            learn_joint(KEY, gaussian_model, 200, **options | wrong)
    with unchecked(), pytest.raises(TypeError, match="`model` must be callable"):
        learn_joint(KEY, 3, 200, **options)
