"""NPSE: the model as simulator, the layout of its sites, draws, densities, files."""

import json
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import multivariate_normal
from numpyro.distributions import biject_to
from numpyro.handlers import reparam, seed, trace
from numpyro.infer.reparam import ProjectedNormalReparam

from numpyro_score import MLP, VE, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import NPSE, AmortizedPosterior
from numpyro_score.infer.amortized.sampling import draw
from numpyro_score.infer.amortized.simulator import (
    Simulations,
    Simulator,
    train_validation_split,
)
from numpyro_score.loss import DenoisingScoreMatching, TargetScore
from tests.npse_models import (
    NOISE_SD,
    PRIOR_MEAN,
    PRIOR_SD,
    A,
    exact_gaussian,
    gaussian_model,
    gaussian_posterior,
    supports_model,
    two_supports_model,
)
from tests.targets import z_scores

Y = np.array([1.0, 0.5, -1.5])
KEY = jax.random.key(0)
TINY = MLP(2, width=8, depth=1, context_size=3)


def quick_fit(npse, *args, num_simulations=200, num_steps=2, **kwargs):
    return npse.fit(
        KEY, num_simulations, *args, num_steps=num_steps, progress_bar=False, **kwargs
    )


@pytest.fixture(scope="module")
def tiny():
    """A posterior that has hardly been trained."""
    return quick_fit(NPSE(gaussian_model, "y", net=TINY))


# Draws and densities


@pytest.mark.slow
def test_posterior_of_a_conjugate_model_is_learned():
    npse = NPSE(gaussian_model, "y", net=MLP(2, width=64, depth=2, context_size=3))
    posterior = quick_fit(npse, num_simulations=20_000, num_steps=4000)
    for y in (Y, np.array([2.0, -1.0, -3.0])):
        mean, covariance = gaussian_posterior(y)
        draws = posterior.sample(jax.random.key(1), y, 10_000)["x"]
        sd = np.sqrt(np.diag(covariance))
        assert np.abs(draws.mean(0) - mean).max() < 0.15 * sd.min()
        np.testing.assert_allclose(
            np.cov(draws.T), covariance, atol=0.1 * sd.max() ** 2
        )
        exact = multivariate_normal.logpdf(draws[:200], mean, covariance)
        got = posterior.log_prob({"x": draws[:200]}, y)
        assert np.sqrt(np.mean(np.square(got - exact))) < 0.2


def test_draws_follow_the_exact_score():
    draws = exact_gaussian().sample(KEY, Y, 4000)["x"]
    mean, covariance = gaussian_posterior(Y)
    assert (z_scores(draws, mean) < 4.5).all()
    spread = np.sqrt(2 / 4000) * np.diag(covariance)
    assert (np.abs(draws.var(0) - np.diag(covariance)) < 4.5 * spread).all()


def test_density_is_that_of_the_exact_posterior():
    posterior = exact_gaussian()
    mean, covariance = gaussian_posterior(Y)
    x = mean + np.array([[0.0, 0.0], [0.3, -0.4]])
    exact = multivariate_normal.logpdf(x, mean, covariance)
    np.testing.assert_allclose(posterior.log_prob({"x": x}, Y), exact, atol=5e-3)


@pytest.mark.slow
def test_each_row_has_its_own_draws():
    posterior = exact_gaussian()
    ys = np.stack([Y, Y + 1.0, Y - 2.0])
    draws = posterior.sample_each(KEY, ys, 2000)["x"]
    assert draws.shape == (3, 2000, 2)
    for y, rows in zip(ys, draws, strict=True):
        assert (z_scores(rows, gaussian_posterior(y)[0]) < 4.5).all()


def test_one_program_serves_all_observations(tiny):
    draw.clear_cache()
    first = tiny.sample(KEY, Y, 10_000)
    tiny.sample(jax.random.key(1), Y + 1.0, 10_000)
    again = quick_fit(NPSE(gaussian_model, "y", net=TINY), num_steps=3)
    again.sample(KEY, Y, 10_000)
    assert first["x"].shape == (10_000, 2)
    assert draw._cache_size() == 1


# The layout of sites


def standard_posterior(model, observed):
    """The posterior whose z is standard normal whatever the observation."""
    simulator = Simulator.of(model, observed)
    size, sde = simulator.latents.size, VE(1e-3, 20.0)
    score = ScoreModel.from_fn(lambda x, t: -x / (1 + sde.sigma(t) ** 2), sde, (size,))
    return AmortizedPosterior(score, simulator)


def test_values_are_inside_and_come_back():
    simulator = Simulator.of(two_supports_model, "y", softness=0.01)
    z = 5.0 * jax.random.normal(KEY, (200, simulator.latents.size))
    values = simulator.latents.unflatten(z)
    assert simulator.latents.in_support(values).all()
    assert values["unit"].shape == (200, 2)
    assert values["simplex"].shape == (200, 2, 3)
    near = jnp.clip(0.2 * z, -0.9, 1.9)  # far outside rounding decides
    again = simulator.latents.flatten(simulator.latents.unflatten(near))
    np.testing.assert_allclose(again, near, atol=1e-3)


@pytest.mark.parametrize(
    "model",
    [two_supports_model, pytest.param(supports_model, marks=pytest.mark.slow)],
)
def test_every_support_is_kept_and_its_jacobian_counted(model, monkeypatch):
    def standard_normal(score, z, **options):
        return dist.Normal().log_prob(z).sum(-1)

    monkeypatch.setattr(ScoreModel, "log_prob", standard_normal)
    posterior = standard_posterior(model, "y")
    layout, y = posterior.latents, jnp.zeros(2)
    draws = layout.unflatten(jax.random.normal(KEY, (50, layout.size)))
    sites = trace(seed(model, 0)).get_trace()
    expected = jnp.zeros(3)
    for name, values in draws.items():
        support = sites[name]["fn"].support
        assert values.shape == (50, *sites[name]["value"].shape)
        assert support(values).all()
        transform, few = biject_to(support), values[:3]
        z = transform.inv(few)
        term = dist.Normal().log_prob(z).reshape(3, -1).sum(1)
        jacobian = transform.log_abs_det_jacobian(z, few).reshape(3, -1).sum(1)
        expected = expected + term - jacobian
    few = {name: values[:3] for name, values in draws.items()}
    np.testing.assert_allclose(posterior.log_prob(few, y), expected, atol=1e-3)
    few["unit"] = few["unit"] - 9.0
    assert (posterior.log_prob(few, y) == -jnp.inf).all()


def counts_model(y=None, words=None):
    rate = numpyro.sample("rate", dist.HalfNormal(1.0))
    level = numpyro.sample("level", dist.Bernoulli(0.5))
    logits = jnp.full(2, rate - level)
    numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)
    words = numpyro.sample("words", dist.Normal(rate, 1.0), obs=words)
    numpyro.deterministic("summary", jnp.stack([words, 2 * words]))


def test_values_that_arguments_give_are_simulated():
    npse = NPSE(counts_model, ("y", "words"), latents="rate")
    simulator = npse.simulator(jnp.array([1, 0]), words=1.0)
    simulations = simulator.simulate(KEY, 100)
    assert simulations.context.shape == (100, 3)
    assert (np.ptp(simulations.context, axis=0) > 0).all()


def test_several_sites_are_observed_by_name():
    posterior = standard_posterior_of_rate(("y", "words"))
    given = posterior.simulator.observed.parse({"words": 2.0, "y": [1, 0]})
    assert given.tolist() == [1.0, 0.0, 2.0]
    values = posterior.simulator.observed.unflatten(given)
    assert values["y"].dtype == jnp.int32
    with pytest.raises(ValueError, match="`observation` must be a dict of arrays"):
        posterior.sample(KEY, [1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="exactly the observed sites"):
        posterior.sample(KEY, {"y": [1, 0]})


def standard_posterior_of_rate(observed):
    sde = VE()
    score = ScoreModel.from_fn(lambda x, t: -x / (1 + sde.sigma(t) ** 2), sde, (1,))
    npse = NPSE(counts_model, observed, latents="rate")
    return AmortizedPosterior(score, npse.simulator(words=0.0))


def test_a_posterior_without_a_likelihood_says_that_its_draws_are_not_judged(tiny):
    posterior = standard_posterior_of_rate(("y", "words"))
    assert "not judged: ['level'] are latent too" in repr(posterior)
    assert "are latent too" not in repr(tiny)


def test_a_deterministic_site_can_be_observed():
    def model():
        rate = numpyro.sample("rate", dist.HalfNormal(1.0))
        numpyro.deterministic("summary", jnp.stack([rate, 2 * rate]))

    simulations = Simulator.of(model, "summary").simulate(KEY, 10)
    np.testing.assert_allclose(
        simulations.context[:, 1], 2 * simulations.context[:, 0], rtol=1e-6
    )


@pytest.mark.slow
def test_simulations_do_not_depend_on_batches_or_devices():
    simulator = Simulator.of(gaussian_model, "y")
    one = simulator.simulate(KEY, 25)
    for options in ({"batch_size": 10}, {"devices": jax.devices()}):
        other = simulator.simulate(KEY, 25, **options)
        np.testing.assert_allclose(one.z, other.z, rtol=1e-5)
        np.testing.assert_allclose(one.context, other.context, rtol=1e-5)


def test_simulations_follow_the_model():
    z, y, _ = Simulator.of(gaussian_model, "y").simulate(KEY, 4000)
    assert (z_scores(z, PRIOR_MEAN) < 4.5).all()
    residual = y - z @ A.T
    assert (z_scores(residual, 0.0) < 4.5).all()
    assert abs(residual.std() - NOISE_SD) < 0.02
    assert abs(z.std(0) / PRIOR_SD - 1).max() < 0.06


def test_validation_rows_are_not_trained_on():
    z = np.arange(20.0).reshape(10, 2)
    train, held_out = train_validation_split(Simulations(z, -z), 0.2)
    for part, rows in ((train, z[:8]), (held_out, z[8:])):
        np.testing.assert_array_equal(part.z, rows)
        np.testing.assert_array_equal(part.context, -rows)


def test_joint_density_and_its_gradient():
    simulator = Simulator.of(gaussian_model, "y")
    simulations = simulator.simulate(KEY, 5)
    exact = (PRIOR_MEAN - simulations.z) / PRIOR_SD**2
    exact += (simulations.context - simulations.z @ A.T) @ A / NOISE_SD**2
    got = simulator.joint_score(simulations)
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-3)
    x, y = jnp.asarray(simulations.z[0]), jnp.asarray(simulations.context[0])
    exact = dist.Normal(PRIOR_MEAN, PRIOR_SD).log_prob(x).sum()
    exact += dist.Normal(A @ x, NOISE_SD).log_prob(y).sum()
    np.testing.assert_allclose(simulator.log_joint(x, y), exact, rtol=1e-5)


@pytest.mark.slow
def test_known_scores_are_used():
    loss = DenoisingScoreMatching(target=TargetScore())
    posterior = quick_fit(
        NPSE(gaussian_model, "y", net=TINY, loss=loss), validation_share=0.0
    )
    assert posterior.sample(KEY, Y, 10)["x"].shape == (10, 2)


# Simulators that fail


def fragile_model(threshold=0.0):
    x = numpyro.sample("x", dist.Normal(0, 1))
    y = numpyro.sample("y", dist.Normal(x, 0.1))
    numpyro.deterministic("out", jnp.where(x > threshold, y, jnp.nan))


@pytest.mark.filterwarnings("ignore:.* simulations are not finite")
def test_parameters_that_are_nan_drop_their_simulations():
    """Validation of NumPyro would end the first trace that meets one."""

    def model(y=None):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jnp.sqrt(x), 1), obs=y)

    simulations = NPSE(model, "y").simulator().simulate(jax.random.key(0), 400)
    assert 150 < simulations.num_dropped < 250
    assert (simulations.z > 0).all()


def test_simulations_that_fail_are_counted_and_dropped():
    simulator = Simulator.of(fragile_model, "out", "x")
    with pytest.warns(UserWarning, match=r"of 400 simulations are not finite") as said:
        simulations = simulator.simulate(KEY, 400)
    assert (simulations.z > 0).all()
    assert len(simulations.z) + simulations.num_dropped == 400
    assert 150 < simulations.num_dropped < 250
    assert str(said[0].message).startswith(f"{simulations.num_dropped} of 400")


@pytest.mark.filterwarnings("ignore:.* simulations are not finite")
def test_too_few_simulations_are_refused():
    with pytest.raises(ValueError, match="`num_simulations` must leave at least 50"):
        quick_fit(NPSE(gaussian_model, "y"), num_simulations=49)
    with pytest.raises(ValueError, match=r"Got 0 usable ones, 100 dropped"):
        quick_fit(NPSE(fragile_model, "out", "x"), 9.0, num_simulations=100)


# What is refused


def test_observations_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match=r"Got \(2,\), expected \(3,\)"):
        tiny.sample(KEY, Y[:2])
    with pytest.raises(ValueError, match=r"`observation` of site 'y' must be finite"):
        tiny.sample(KEY, np.array([0.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match=r"Got \(3,\), expected \(rows, \*\)\(3,\)"):
        tiny.sample_each(KEY, Y)
    with pytest.raises(ValueError, match=r"exactly the sites whose posterior"):
        tiny.log_prob({"w": 0.0}, Y)
    with pytest.raises(ValueError, match=r"`samples` of site 'x' must end with"):
        tiny.log_prob({"x": np.zeros(3)}, Y)


def no_latent():
    numpyro.sample("y", dist.Normal(0, 1))


def factor_model():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("penalty", -(x**2))
    numpyro.sample("y", dist.Normal(x, 1))


def moving_support():
    low = numpyro.sample("low", dist.Normal(0, 1))
    x = numpyro.sample("x", dist.Uniform(low, low + 1))
    numpyro.sample("y", dist.Normal(x, 1))


def subsampled():
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.plate("rows", 10, subsample_size=5):
        numpyro.sample("y", dist.Normal(x, 1))


def masked():
    x = numpyro.sample("x", dist.Normal(0, 1))
    with numpyro.handlers.mask(mask=jnp.array([True, False])):
        numpyro.sample("y", dist.Normal(x, jnp.ones(2)))


def masked_inside():
    x = numpyro.sample("x", dist.Normal(0, 1))
    rows = dist.Normal(x, jnp.ones(2)).mask(jnp.array([True, False]))
    numpyro.sample("y", rows.to_event(1))


def improper():
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x, 1))


class OnlyDensity(dist.Distribution):
    """A law whose density is known, and nothing else."""

    support = dist.constraints.real

    def log_prob(self, value):
        return -(value**4)


def no_draws():
    x = numpyro.sample("x", dist.Normal(0, 1))
    law = dist.TransformedDistribution(
        OnlyDensity(), dist.transforms.AffineTransform(x, 1.0)
    )
    numpyro.sample("y", law, obs=1.0)


def complex_model():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.deterministic("y", x * 1j)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (improper, {}, r"Site 'x' must have a law .*drawn from.*Got ImproperUniform"),
        (no_draws, {}, r"Site 'y' must have a law .*drawn from.*Got OnlyDensity"),
        (complex_model, {}, r"Observed site 'y' must hold real numbers.*Got complex"),
        (gaussian_model, {"observed": "w"}, r"`observed` must name the sites"),
        (gaussian_model, {"observed": ()}, r"`observed` must name the sites"),
        (no_latent, {}, r"The model must have a latent site"),
        (gaussian_model, {"latents": "w"}, r"`latents` must name latent sample"),
        (gaussian_model, {"latents": ()}, r"`latents` must name latent sample"),
        (counts_model, {}, r"integrated out by simulation.* Got discrete \['level'\]"),
        (factor_model, {}, r"Site 'penalty' is a factor but not named"),
        (moving_support, {}, r"Site 'x' must have the same support"),
        (subsampled, {}, r"Site 'y' is masked or scaled"),
        (masked, {}, r"Site 'y' is masked or scaled"),
        (masked_inside, {}, r"Site 'y' is masked or scaled"),
    ],
)
def test_models_that_cannot_be_simulated_are_refused(model, options, message):
    npse = NPSE(model, **{"observed": "y", **options})
    with pytest.raises(ValueError, match=message):
        npse.simulator()


def numpy_noise(rng):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.deterministic("y", x + rng.normal(size=3))


def python_noise(draw):
    x = numpyro.sample("x", dist.Normal(draw(), 1))
    numpyro.sample("y", dist.Normal(x, 1))


def test_sites_without_unconstrained_space_are_refused_by_name():
    def directions(y=None):
        v = numpyro.sample("v", dist.ProjectedNormal(jnp.zeros(2)))
        numpyro.sample("y", dist.Normal(v[0], 1.0), obs=y)

    message = r"Site 'v' must have a support with a bijection.*of ProjectedNormal"
    with pytest.raises(TypeError, match=message):
        NPSE(directions, "y").simulator()
    config = {"v": ProjectedNormalReparam()}
    NPSE(reparam(directions, config=config), "y").simulator()


def test_noise_that_is_no_function_of_the_key_is_refused():
    npse = NPSE(numpy_noise, "y", net=TINY)
    with pytest.raises(ValueError, match=r"numpy\.random.* at the sites \['y'\]"):
        quick_fit(npse, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"one key differ at the sites \['x', 'y'\]"):
        NPSE(python_noise, "y").simulator(random.random)
    fixed = NPSE(python_noise, "y").simulator(lambda: 0.5)
    assert fixed.latents.names == ("x",)


def test_another_observed_site_is_refused():
    npse = NPSE(counts_model, "y", latents="rate")
    with pytest.raises(ValueError, match=r"Site 'words' is observed but not named"):
        npse.simulator(words=1.0)


def test_bad_shares_are_refused():
    with pytest.raises(ValueError, match=r"`validation_share` must lie in \[0, 1\)"):
        quick_fit(NPSE(gaussian_model, "y", net=TINY), validation_share=1.0)


def test_draws_that_are_not_finite_are_refused():
    posterior = exact_gaussian()
    scale = Affine(jnp.full(2, jnp.nan), jnp.ones(2))
    broken = replace(posterior.score, standardize=scale)
    posterior = AmortizedPosterior(broken, posterior.simulator)
    with pytest.raises(FloatingPointError, match="draws are not finite"):
        posterior.sample(KEY, Y, 3)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (counts_model, {"latents": "rate"}, r"\['level', 'words'\] are latent too"),
        (fragile_model, {"observed": "out", "latents": "x"}, r"\['out'\] are determ"),
    ],
)
def test_intractable_likelihoods_are_refused_with_their_reason(model, options, reason):
    simulator = NPSE(model, **{"observed": "y", **options}).simulator()
    with pytest.raises(ValueError, match=rf"tractable likelihood.*{reason}"):
        simulator.check_tractable()


# Files


def test_saved_posteriors_are_the_same_after_loading(tiny, tmp_path):
    npse = NPSE(gaussian_model, "y", net=TINY)
    tiny.save(tmp_path / "posterior")
    loaded = npse.load(tmp_path / "posterior")
    draws, again = (p.sample(KEY, Y, 5)["x"] for p in (tiny, loaded))
    np.testing.assert_array_equal(draws, again)
    with pytest.raises(FileExistsError, match="never overwritten"):
        tiny.save(tmp_path / "posterior")


def bounded_model(y=None):
    """Ends that single and double precision round to two numbers."""
    ends = jnp.array([0.1, 0.2]), jnp.array([0.7, 1.1])
    x = numpyro.sample("x", dist.Uniform(*ends).to_event(1))
    numpyro.sample("y", dist.Normal(x.sum(), 0.3), obs=y)


@pytest.mark.slow
def test_files_are_of_any_precision(tmp_path):
    """A posterior of single precision was refused by a process of double precision."""
    npse = NPSE(bounded_model, "y")
    options = {"num_steps": 20, "check": False, "progress_bar": False}
    posterior = npse.fit(KEY, 200, **options)
    posterior.save(tmp_path / "posterior")
    x = {"x": np.array([[0.3, 0.6]])}
    expected = posterior.log_prob(x, 1.0)
    with jax.enable_x64(True):
        loaded = npse.load(tmp_path / "posterior")
        assert loaded.sample(KEY, 1.0, 5)["x"].dtype == jnp.float64
        np.testing.assert_allclose(loaded.log_prob(x, 1.0), expected, atol=5e-3)
        loaded.save(tmp_path / "again")
    again = npse.load(tmp_path / "again")
    assert again.sample(KEY, 1.0, 5)["x"].dtype == jnp.float32
    np.testing.assert_allclose(again.log_prob(x, 1.0), expected, atol=5e-3)


def test_files_of_other_types_are_refused(tiny, tmp_path):
    tiny.save(tmp_path / "posterior")

    def rounded():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.deterministic("y", jnp.zeros(Y.shape, int) + x.sum().astype(int))

    with pytest.raises(ValueError, match=r"Differences in .*observed"):
        NPSE(rounded, "y", net=TINY).load(tmp_path / "posterior")


def test_files_of_another_model_are_refused(tiny, tmp_path):
    tiny.save(tmp_path / "posterior")
    npse = NPSE(counts_model, "y", latents="rate")
    with pytest.raises(ValueError, match=r"Differences in latents, observed"):
        npse.load(tmp_path / "posterior")
    with pytest.raises(FileNotFoundError, match=r"which has no layout.json"):
        npse.load(tmp_path / "nothing")
    layout = tmp_path / "posterior" / "layout.json"
    layout.write_text(json.dumps({"latents": []}))
    with pytest.raises(ValueError, match=r"a hash does not match.*layout\.json"):
        NPSE(gaussian_model, "y").load(tmp_path / "posterior")
    (tmp_path / "posterior" / "SHA256SUMS").unlink()  # as version 0.1.0 wrote it
    with pytest.raises(ValueError, match=r"must hold a posterior of this model"):
        NPSE(gaussian_model, "y").load(tmp_path / "posterior")
